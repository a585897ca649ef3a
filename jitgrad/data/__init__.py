"""Datasets, samplers and the DataLoader; PyTorch's ``torch.utils.data``."""

from jitgrad.data.collate import default_collate, default_convert
from jitgrad.data.dataset import (
                                  ChainDataset,
                                  ConcatDataset,
                                  Dataset,
                                  IterableDataset,
                                  Subset,
                                  TensorDataset,
                                  random_split,
)
from jitgrad.data.loader import DataLoader, WorkerInfo, get_worker_info
from jitgrad.data.sampler import (
                                  BatchSampler,
                                  RandomSampler,
                                  Sampler,
                                  SequentialSampler,
                                  SubsetRandomSampler,
                                  WeightedRandomSampler,
)

__all__ = ["BatchSampler", "ChainDataset", "ConcatDataset", "DataLoader", "Dataset", "IterableDataset",
           "RandomSampler", "Sampler", "SequentialSampler", "Subset", "SubsetRandomSampler", "TensorDataset",
           "WeightedRandomSampler", "WorkerInfo", "default_collate", "default_convert", "get_worker_info",
           "random_split"]
