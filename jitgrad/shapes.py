"""Sizes and strides: the arithmetic that type rules and views share, and `Size`. Strides are in elements."""

from __future__ import annotations

from math import prod
from typing import Any


class Size(tuple[int, ...]):
    """The shape that ``x.size()`` returns: a tuple that counts elements and stays a Size when it is cut or joined."""

    __slots__ = ()

    def numel(self) -> int:
        """The number of elements of a tensor of this shape."""
        return prod(self)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Size(found) if isinstance(key, slice) else found

    def __add__(self, other: Any) -> Any:
        return Size(super().__add__(other))

    def __repr__(self) -> str:
        return f"jitgrad.Size({list(self)})"


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense array in C order."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True when elements lie in C order without gaps; the strides of dimensions of size 1 do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def reshape_strides(shape: tuple[int, ...], strides: tuple[int, ...],
                    new_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a view of `new_shape` over the same memory, or None when there is no such view."""
    if prod(shape) == 0 or is_contiguous(shape, strides):
        return contiguous_strides(new_shape)
    old = [(n, s) for n, s in zip(shape, strides) if n != 1]
    result: list[int] = []
    runs = _contiguous_runs(old)
    new = list(new_shape)
    at = 0
    for size, stride in runs:
        inner: list[int] = []
        covered = 1
        while at < len(new) and covered < size:
            covered *= new[at]
            inner.append(new[at])
            at += 1
        if covered != size:
            return None
        result.extend(stride * s for s in contiguous_strides(tuple(inner)))
    result.extend(1 for _ in new[at:])
    return tuple(result) if all(n == 1 for n in new[at:]) else None


def _contiguous_runs(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbouring (size, stride) pairs that together step evenly: (size of the run, its smallest stride)."""
    runs: list[tuple[int, int]] = []
    for size, stride in dims:
        if runs and runs[-1][1] == size * stride:
            runs[-1] = runs[-1][0] * size, stride
        else:
            runs.append((size, stride))
    return runs
