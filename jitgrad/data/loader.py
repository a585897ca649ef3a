"""`DataLoader`: batches of a dataset, made ahead by threads if asked.

Workers are threads: NumPy, decoding and reading files release the interpreter lock, nothing has to be pickled, and a
worker computes eagerly even while the main thread is compiling. Batch j is made by worker ``j % num_workers`` and
batches come in order, so a run does not depend on timing.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad import cuda
from jitgrad.data.collate import default_collate, default_convert
from jitgrad.data.dataset import IterableDataset, Subset, TensorDataset
from jitgrad.data.random import draw_seed
from jitgrad.data.sampler import BatchSampler, RandomSampler, SequentialSampler
from jitgrad.tensor import Tensor
from jitgrad.tree import map_tree

_END = object()                                 # what a worker answers when its iterable is used up


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Which worker the calling code runs in; an IterableDataset shares its samples out by it."""

    id: int
    num_workers: int
    seed: int
    dataset: Any


class _Here(threading.local):
    info: WorkerInfo | None = None


_here = _Here()


def get_worker_info() -> WorkerInfo | None:
    """The `WorkerInfo` of this thread; None outside of workers."""
    return _here.info


class DataLoader:
    """Iterate over it once per epoch.

    batch_size        samples per batch; None: single samples, converted but not batched
    shuffle           a new random order each epoch, from `generator` if given
    sampler           any iterable of indices; batch_sampler: of lists of indices
    num_workers       threads that make batches ahead, `prefetch_factor` (default 2) each
    collate_fn        list of samples -> batch, see `default_collate`
    drop_last         leave out a last batch that is not full
    timeout           seconds to wait for a batch of a worker; 0: for ever
    worker_init_fn    called with the worker's number in each worker before its first batch
    persistent_workers  keep the threads between epochs
    pin_memory        give Tensors in pinned memory, for ``x.cuda(non_blocking=True)``; without a GPU it changes nothing

    `multiprocessing_context` is accepted and means nothing here."""

    def __init__(self, dataset: Any, batch_size: int | None = 1, shuffle: bool | None = None,
                 sampler: Iterable[Any] | None = None, batch_sampler: Iterable[Sequence[Any]] | None = None,
                 num_workers: int = 0, collate_fn: Callable[[list[Any]], Any] | None = None, pin_memory: bool = False,
                 drop_last: bool = False, timeout: float = 0, worker_init_fn: Callable[[int], Any] | None = None,
                 multiprocessing_context: Any = None, generator: Any = None, *, prefetch_factor: int | None = None,
                 persistent_workers: bool = False):
        if num_workers < 0 or timeout < 0:
            raise ValueError(f"DataLoader: num_workers and timeout must not be negative, got {num_workers}, {timeout}")
        if num_workers == 0 and (prefetch_factor is not None or persistent_workers):
            raise ValueError("DataLoader: prefetch_factor and persistent_workers need num_workers > 0")
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ValueError("DataLoader: batch_sampler replaces batch_size, shuffle, sampler and drop_last")
        if sampler is not None and shuffle:
            raise ValueError("DataLoader: sampler and shuffle exclude each other")
        if batch_size is None and drop_last:
            raise ValueError("DataLoader: without batches (batch_size=None) there is no last one to drop")
        self.dataset, self.drop_last, self.generator = dataset, drop_last, generator
        self.num_workers, self.timeout, self.worker_init_fn = num_workers, timeout, worker_init_fn
        self.prefetch_factor, self.persistent_workers = prefetch_factor or 2, persistent_workers
        self.pin_memory = pin_memory
        self.batch_size = None if batch_sampler is not None else batch_size
        self._iterable = isinstance(dataset, IterableDataset)
        self.sampler, self.batch_sampler = self._order(batch_size, shuffle, sampler, batch_sampler)
        batched = self.batch_sampler is not None or (self._iterable and batch_size is not None)
        self.collate_fn = collate_fn or (default_collate if batched else default_convert)
        self._workers: _Workers | None = None

    def _order(self, batch_size: int | None, shuffle: bool | None, sampler: Iterable[Any] | None,
               batch_sampler: Iterable[Sequence[Any]] | None) -> tuple[Any, Any]:
        if self._iterable:
            if shuffle or sampler is not None or batch_sampler is not None:
                raise ValueError("DataLoader: an IterableDataset decides its order itself; shuffle, sampler and "
                                 "batch_sampler do not apply")
            return None, None
        if batch_sampler is not None:
            return None, batch_sampler
        if sampler is None:
            sampler = RandomSampler(self.dataset, generator=self.generator) if shuffle \
                else SequentialSampler(self.dataset)
        return sampler, None if batch_size is None else BatchSampler(sampler, batch_size, self.drop_last)

    def __len__(self) -> int:
        """Batches per epoch."""
        if not self._iterable:
            return len(self.batch_sampler if self.batch_sampler is not None else self.sampler)
        count = len(self.dataset)
        if self.batch_size is None:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0:
            batches = self._batches()
        else:
            if self._workers is None or not self.persistent_workers:
                self._workers = _Workers(self)
            batches = self._workers.batches(self)
        return map(_pinned, batches) if self.pin_memory and cuda.is_available() else batches

    def _batches(self) -> Iterator[Any]:
        if self._iterable:
            yield from self._stream()
        else:
            for indices in self._tasks():
                yield self._fetch(indices)

    # what a worker, or the caller's thread, does

    def _tasks(self) -> Iterable[Any]:
        """Index lists, or indices when there are no batches."""
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    def _fetch(self, task: Any) -> Any:
        """The batch (or sample) of one task."""
        if self.batch_sampler is None:
            return self.collate_fn(self._sample(task))
        if self.collate_fn is default_collate:
            batch = _tensor_batch(self.dataset, task)
            if batch is not None:
                return batch
        samples = self.dataset.__getitems__(task) if hasattr(self.dataset, "__getitems__") \
            else [self._sample(index) for index in task]
        try:
            return self.collate_fn(samples)
        except Exception as error:
            error.add_note(f"DataLoader: while collating the samples {list(task)}")
            raise

    def _sample(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            error.add_note(f"DataLoader: while loading sample {index}{_who()}")
            raise

    def _stream(self) -> Iterator[Any]:
        """Batches of an iterable dataset."""
        samples = iter(self.dataset)
        if self.batch_size is None:
            yield from map(self.collate_fn, samples)
            return
        while batch := list(itertools.islice(samples, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield self.collate_fn(batch)


def _pinned(batch: Any) -> Any:
    """`batch` with its Tensors in pinned memory."""
    return map_tree(lambda leaf: leaf.pin_memory() if isinstance(leaf, Tensor) and leaf.is_cpu else leaf, batch)


def _who() -> str:
    return f" in worker {_here.info.id}" if _here.info else ""


def _tensor_batch(dataset: Any, indices: Sequence[int]) -> list[Tensor] | None:
    """The batch of a TensorDataset, or of a Subset of one, by one indexing per Tensor; None for other datasets."""
    rows = np.asarray(indices)
    while type(dataset) is Subset:
        dataset, rows = dataset.dataset, np.asarray(dataset.indices)[rows]
    if type(dataset) is not TensorDataset or rows.ndim != 1 or rows.dtype.kind not in "iu":
        return None
    if any(t.requires_grad for t in dataset.tensors):
        return None
    return [t[rows] if t.is_cuda else Tensor(t.numpy()[rows]) for t in dataset.tensors]


class _Workers:
    """One thread per worker, each with a queue of its own."""

    def __init__(self, loader: DataLoader):
        seed = draw_seed(loader.generator)
        self.pools = [ThreadPoolExecutor(1, "jitgrad-data") for _ in range(loader.num_workers)]
        self.entered = [pool.submit(_enter_worker, WorkerInfo(k, loader.num_workers, seed + k, loader.dataset),
                                    loader.worker_init_fn) for k, pool in enumerate(self.pools)]
        weakref.finalize(self, _stop, self.pools)

    def batches(self, loader: DataLoader) -> Iterator[Any]:
        """All batches of one epoch, in order; what is not asked for any more is cancelled."""
        for entered in self.entered:
            entered.result()                            # raises what worker_init_fn raised
        submit = self._streaming(loader) if loader._iterable else self._indexed(loader)
        pending: deque[Future[Any]] = deque(itertools.islice(submit, loader.num_workers * loader.prefetch_factor))
        try:
            while pending:
                batch = _wait(pending.popleft(), loader.timeout)
                pending.extend(itertools.islice(submit, 1))
                if batch is not _END:
                    yield batch
        finally:
            for future in pending:
                future.cancel()
            if not loader.persistent_workers:
                _stop(self.pools)

    def _indexed(self, loader: DataLoader) -> Iterator[Future[Any]]:
        for task, pool in zip(loader._tasks(), itertools.cycle(self.pools)):
            yield pool.submit(loader._fetch, task)

    def _streaming(self, loader: DataLoader) -> Iterator[Future[Any]]:
        """One stream per worker, asked in turn until it ends."""
        streams = [(pool, _Stream(loader)) for pool in self.pools]
        while streams := [(pool, stream) for pool, stream in streams if not stream.ended]:
            for pool, stream in streams:
                yield pool.submit(stream.advance)


class _Stream:
    """A worker's own iterator over an iterable dataset, made in that worker."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.batches: Iterator[Any] | None = None
        self.ended = False

    def advance(self) -> Any:
        if self.batches is None:
            self.batches = self.loader._stream()
        batch = next(self.batches, _END)
        self.ended = batch is _END
        return batch


def _enter_worker(info: WorkerInfo, worker_init_fn: Callable[[int], Any] | None) -> None:
    _here.info = info
    if worker_init_fn is not None:
        worker_init_fn(info.id)


def _wait(future: Future[Any], timeout: float) -> Any:
    try:
        return future.result(timeout or None)
    except FutureTimeout as error:
        if future.done():                                   # the sample's own TimeoutError
            raise
        raise RuntimeError(f"DataLoader: no batch within {timeout} s") from error


def _stop(pools: list[ThreadPoolExecutor]) -> None:
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
