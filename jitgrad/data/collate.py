"""Making a batch of a list of samples, whatever structure they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jitgrad import functional
from jitgrad.tensor import Tensor


def default_collate(batch: Sequence[Any]) -> Any:
    """Tensors, arrays and numbers are stacked along a new first dimension (Python floats as float64, ints as int64);
    dicts, named tuples, tuples and lists keep their form, entry by entry; strings stay a list."""
    first = batch[0]
    if isinstance(first, Tensor):
        return _stacked_tensors(batch)
    if isinstance(first, (np.ndarray, np.generic)) and first.dtype.kind not in "USO":
        return Tensor(np.stack(batch))
    if isinstance(first, (bool, int, float, complex)):
        return Tensor(np.asarray(batch))
    if isinstance(first, (str, bytes)):
        return list(batch)
    if isinstance(first, Mapping):
        return _rebuilt_mapping(first, {key: default_collate([sample[key] for sample in batch]) for key in first})
    if isinstance(first, Sequence):
        return _collated_sequences(first, batch)
    raise TypeError(f"default_collate: a batch holds Tensors, NumPy arrays, numbers, strings, dicts, tuples or lists; "
                    f"found {type(first).__name__}. Give the DataLoader a collate_fn")


def _stacked_tensors(batch: Sequence[Tensor]) -> Tensor:
    if any(t.requires_grad or t.is_cuda for t in batch):
        return functional.stack(batch)
    shapes = {t.shape for t in batch}
    if len(shapes) > 1:
        raise RuntimeError(f"default_collate: samples have different shapes: {sorted(shapes)}. "
                           f"Pad them in a collate_fn")
    return Tensor(np.stack([t.numpy() for t in batch]))


def _rebuilt_mapping(like: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    try:
        return type(like)(entries)                                    # type: ignore[call-arg]
    except TypeError:                                                 # a type that cannot be made from a dict
        return entries


def _collated_sequences(first: Sequence[Any], batch: Sequence[Sequence[Any]]) -> Any:
    if any(len(sample) != len(first) for sample in batch):
        raise RuntimeError(f"default_collate: samples have different lengths: {sorted({len(s) for s in batch})}")
    columns = [default_collate(column) for column in zip(*batch)]
    return type(first)(*columns) if hasattr(first, "_fields") else columns


def default_convert(data: Any) -> Any:
    """A single sample: arrays become Tensors that share their memory, containers are kept."""
    if isinstance(data, (np.ndarray, np.generic)) and data.dtype.kind not in "USO":
        return Tensor(np.asarray(data))
    if isinstance(data, Mapping):
        return _rebuilt_mapping(data, {key: default_convert(value) for key, value in data.items()})
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        converted = [default_convert(value) for value in data]
        return type(data)(*converted) if hasattr(data, "_fields") else type(data)(converted)  # type: ignore[call-arg]
    return data
