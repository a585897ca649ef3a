"""Samplers: the order in which a loader asks for samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Generic, TypeVar

import numpy as np

from jitgrad.data.random import permutation, uniforms

Index = TypeVar("Index", covariant=True)


class Sampler(Generic[Index]):
    """Base: define ``__iter__``, and ``__len__`` if the number is known."""

    def __iter__(self) -> Iterator[Index]:
        raise NotImplementedError(f"{type(self).__name__}: define __iter__(self)")


class SequentialSampler(Sampler[int]):
    """0, 1, 2 …"""

    def __init__(self, data_source: Sized):
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source)))

    def __len__(self) -> int:
        return len(self.data_source)


class RandomSampler(Sampler[int]):
    """All indices in random order, or `num_samples` of them, independent ones with `replacement`."""

    def __init__(self, data_source: Sized, replacement: bool = False, num_samples: int | None = None,
                 generator: Any = None):
        if num_samples is not None and num_samples <= 0:
            raise ValueError(f"RandomSampler: num_samples must be positive, got {num_samples}")
        self.data_source, self.replacement, self.generator = data_source, replacement, generator
        self._num_samples = num_samples

    @property
    def num_samples(self) -> int:
        return len(self.data_source) if self._num_samples is None else self._num_samples

    def __iter__(self) -> Iterator[int]:
        count = len(self.data_source)
        if self.replacement:
            yield from (uniforms(self.num_samples, self.generator) * count).astype(np.int64).tolist()
            return
        rounds = (permutation(count, self.generator) for _ in itertools.count()) if count else ()
        yield from itertools.islice(itertools.chain.from_iterable(rounds), self.num_samples)

    def __len__(self) -> int:
        return self.num_samples


class SubsetRandomSampler(Sampler[int]):
    """The given indices in random order."""

    def __init__(self, indices: Sequence[int], generator: Any = None):
        self.indices, self.generator = indices, generator

    def __iter__(self) -> Iterator[int]:
        return (self.indices[k] for k in permutation(len(self.indices), self.generator))

    def __len__(self) -> int:
        return len(self.indices)


class WeightedRandomSampler(Sampler[int]):
    """`num_samples` indices with probabilities in proportion to `weights`."""

    def __init__(self, weights: Sequence[float], num_samples: int, replacement: bool = True, generator: Any = None):
        self.weights = np.asarray(weights, np.float64)
        if self.weights.ndim != 1 or (self.weights < 0).any() or not self.weights.sum() > 0:
            raise ValueError("WeightedRandomSampler: weights are a sequence of numbers >= 0, not all 0")
        if num_samples <= 0 or (not replacement and num_samples > np.count_nonzero(self.weights)):
            raise ValueError(f"WeightedRandomSampler: num_samples={num_samples} is not positive, or more than there "
                             f"are positive weights to draw without replacement")
        self.num_samples, self.replacement, self.generator = num_samples, replacement, generator

    def __iter__(self) -> Iterator[int]:
        draw = self._with_replacement if self.replacement else self._without_replacement
        return iter(draw().tolist())

    def _with_replacement(self) -> np.ndarray:
        edges = np.cumsum(self.weights)
        return np.searchsorted(edges, uniforms(self.num_samples, self.generator) * edges[-1], side="right")

    def _without_replacement(self) -> np.ndarray:
        """The first `num_samples` of a race with exponential times (Efraimidis & Spirakis 2006)."""
        with np.errstate(divide="ignore"):
            times = -np.log1p(-uniforms(len(self.weights), self.generator)) / self.weights
        return np.argsort(times, kind="stable")[:self.num_samples]

    def __len__(self) -> int:
        return self.num_samples


class BatchSampler(Sampler[list[int]]):
    """Lists of `batch_size` indices of another sampler; the last may be shorter, unless `drop_last`."""

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool):
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size <= 0:
            raise ValueError(f"BatchSampler: batch_size must be a positive integer, got {batch_size!r}")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def __len__(self) -> int:
        count = len(self.sampler)                                     # type: ignore[arg-type]
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)
