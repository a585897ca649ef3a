"""Sorting and searching, and functions whose result has a size that depends on values (these read the value)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.functional import elementwise
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_operand,
    broadcast_all,
    cast,
    from_array,
    is_eager_on_gpu,
    matched,
    one_dim,
    read,
    require_shape,
    size,
)
from jitgrad.functional.index import true_places
from jitgrad.functional.reduce import Extremes
from jitgrad.functional.shape import section
from jitgrad.ops.builders import expand_dims, full, zeros_like

__all__ = [
    "argsort", "argwhere", "bincount", "bucketize", "histc", "isin", "nonzero", "searchsorted", "sort",
    "topk", "unique", "where",
]

# sorting

FEW = 128                                       # of `topk`: as many are kept in order while a line goes by; more are sorted


def sort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = True) -> Extremes:
    """``(values, indices)`` in order along `dim`; NaN is the largest."""
    axis = one_dim("sort", dim, len(input.shape))
    if not input.shape:
        return Extremes(input, full((), 0, dtypes.int64))
    values, indices = ops.sort(input, axis=axis, descending=bool(descending), stable=bool(stable))
    return Extremes(values, indices)


def argsort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    """The indices that `sort` gives."""
    return sort(input, dim, descending, stable).indices


def topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Extremes:
    """The `k` largest (or smallest) along `dim` as ``(values, indices)``, in order."""
    axis = one_dim("topk", dim, len(input.shape))
    extent = input.shape[axis] if input.shape else 1
    require_shape("topk", 0 <= k <= extent, f"k={k} is not in [0, {extent}], the size of dimension {dim}")
    if input.shape and k <= FEW:
        return Extremes(*ops.topk(input, axis=axis, k=int(k), descending=bool(largest)))
    values, indices = sort(input, dim, descending=largest)
    if not input.shape:
        return Extremes(values, indices)
    return Extremes(section(values, axis, 0, k), section(indices, axis, 0, k))


def searchsorted(sorted_sequence: Tensor, input: Operand, *, right: bool = False) -> Tensor:
    """How many elements of each ascending last dimension are below `input` (with `right`, not above): int64."""
    values = as_operand(input, sorted_sequence.dtype)
    boundaries = sorted_sequence
    column = expand_dims(values, (len(values.shape),))
    rows = boundaries if len(boundaries.shape) == 1 else expand_dims(boundaries, (len(boundaries.shape) - 1,))
    left, there = broadcast_all("searchsorted", cast(rows, values.dtype), column)
    counted = ops.le(left, there) if right else ops.lt(left, there)
    return ops.sum(cast(counted, dtypes.int64), axes=(len(counted.shape) - 1,))


def bucketize(input: Operand, boundaries: Tensor, *, right: bool = False) -> Tensor:
    """`searchsorted` with the operands exchanged."""
    return searchsorted(boundaries, input, right=right)


# results whose size depends on values

def where(condition: Tensor, input: Operand | None = None, other: Operand | None = None) -> Any:
    """`input` where `condition` is True, `other` elsewhere; of the condition alone where it is True, as `nonzero`."""
    if input is None or other is None:
        return nonzero(condition, as_tuple=True)
    return elementwise.where(condition, input, other)


def nonzero(input: Tensor, *, as_tuple: bool = False) -> Any:
    """Where `input` is not zero: int64 [count, ndim], or one 1-d tensor for each dimension. Reads the value."""
    if is_eager_on_gpu(input) and input.shape:
        return _nonzero_on_gpu(input, as_tuple)
    found = np.nonzero(np.atleast_1d(read(input)))
    if as_tuple:
        return tuple([from_array(v, input) for v in found])
    stacked = np.stack(found[:len(input.shape)], 1) if input.shape else np.zeros((len(found[0]), 0), np.int64)
    return from_array(stacked, input)


def _nonzero_on_gpu(input: Tensor, as_tuple: bool) -> Any:
    """`nonzero`, of which only the number of places is read."""
    flat, after = true_places(ops.ne(input, zeros_like(input))), size(input.shape)
    found = []
    for n in input.shape:
        after = after // n if n else 1
        found.append(elementwise.remainder(elementwise.floor_divide(flat, max(after, 1)), max(n, 1)))
    return tuple(found) if as_tuple else ops.concat(*[expand_dims(v, (1,)) for v in found], axis=1)


def argwhere(input: Tensor) -> Tensor:
    """`nonzero` as one tensor."""
    return nonzero(input)


def unique(input: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False,
           dim: int | None = None) -> Any:
    """The different elements (or slices along `dim`) in ascending order; on request where each element went, and how
    often each one occurs. Reads the value."""
    options: dict[str, Any] = {"return_inverse": return_inverse, "return_counts": return_counts, "axis": dim}
    found = np.unique(read(input), **options)
    if isinstance(found, tuple):
        return tuple([from_array(np.asarray(v), input) for v in found])
    return from_array(found, input)


def isin(elements: Tensor, test_elements: Tensor) -> Tensor:
    """Where an element is one of `test_elements`."""
    rows = ops.reshape(test_elements, shape=(size(test_elements.shape),))
    found = ops.eq(*matched("isin", expand_dims(elements, (len(elements.shape),)), rows))
    return ops.max(found, axes=(len(elements.shape),)) if rows.shape[0] else full(elements.shape, False, dtypes.bool_)


def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """How often each non-negative integer occurs in a 1-d tensor, or the sum of its weights. Reads the value."""
    largest = int(read(ops.max(input, axes=(0,)))) + 1 if input.shape[0] else 0
    length = max(largest, minlength)
    dtype = dtypes.int64 if weights is None else weights.dtype
    added = full(input.shape, 1, dtypes.int64) if weights is None else weights
    return ops.index_add(full((length,), 0, dtype), cast(input, dtypes.int64), added, axis=0)


def histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """How many elements fall into each of `bins` equal intervals of [min, max] (by default, of all). Reads the
    value."""
    array = read(input)
    limits = (float(array.min()), float(array.max())) if min == max and array.size else (float(min), float(max))
    counts, _ = np.histogram(array, bins, limits)
    return from_array(counts.astype(array.dtype), input)
