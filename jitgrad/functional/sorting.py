"""Sorting and searching, and functions whose result has a size that depends on values (these read the value)."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.functional import elementwise
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
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
    widened,
)
from jitgrad.functional.index import _positions, true_places
from jitgrad.functional.reduce import Extremes, any as any_of, detached
from jitgrad.functional.shape import movedim, ravel, section
from jitgrad.ops.builders import expand_dims, full, zeros_like

__all__ = [
    "argsort", "argwhere", "bincount", "bucketize", "histc", "isin", "nonzero", "searchsorted", "sort",
    "topk", "unique", "unique_consecutive", "where",
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
    often each one occurs. NaN is equal to nothing. Reads the value."""
    axis = None if dim is None else one_dim("unique", dim, len(input.shape))
    if is_eager_on_gpu(input) and size(input.shape) and not input.dtype.is_complex:
        return _unique_on_gpu(detached(input), axis, return_inverse, return_counts)
    options: dict[str, Any] = {"return_inverse": return_inverse, "return_counts": return_counts, "axis": axis}
    found = np.unique(read(input), **options, equal_nan=False)
    if isinstance(found, tuple):
        return tuple([from_array(np.asarray(v), input) for v in found])
    return from_array(found, input)


def _unique_on_gpu(x: Tensor, axis: int | None, return_inverse: bool, return_counts: bool) -> Any:
    """`unique`, of which only the number of different elements is read."""
    rows, along = (ravel(x), 0) if axis is None else (x, axis)
    order, is_new, rank = _ranked(_keys_of_slices(rows, along))
    first = true_places(is_new)
    found = [ops.take(rows, ops.take(order, first, axis=0), axis=along)]
    if return_inverse:
        inverse = ops.scatter(zeros_like(rank), order, ops.sub(rank, full(rank.shape, 1, dtypes.int64)), axis=0)
        found.append(inverse if axis is not None else ops.reshape(inverse, shape=x.shape))
    if return_counts:
        after = ops.concat(section(first, 0, 1, first.shape[0]), full((1,), rows.shape[along], dtypes.int64), axis=0)
        found.append(ops.sub(after, first))
    return tuple(found) if len(found) > 1 else found[0]


def _ranked(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of `keys` along their first dimension, where in it another key begins, and the number of each one, 1 for
    the smallest."""
    values, order = ops.sort(keys, axis=0, descending=False, stable=True)
    extent, others = values.shape[0], values.shape[1:]
    differs = ops.ne(section(values, 0, 1, extent), section(values, 0, 0, extent - 1))
    is_new = ops.concat(full((1, *others), True, dtypes.bool_), differs, axis=0)
    return order, is_new, ops.cumsum(cast(is_new, dtypes.int64), axis=0)


def _keys_of_slices(x: Tensor, axis: int) -> Tensor:
    """A number for each slice of `x` along `axis`, by which they are in lexicographic order. Each column is replaced by the
    ranks of its elements; then two columns are one number, again and again."""
    extent = x.shape[axis]
    keys = ops.reshape(movedim(x, axis, 0), shape=(extent, size(x.shape) // extent))
    while keys.shape[1] > 1:
        order, _, rank = _ranked(keys)
        ranks = ops.scatter(zeros_like(rank), order, rank, axis=0)
        if ranks.shape[1] % 2:
            ranks = ops.concat(ranks, full((extent, 1), 0, dtypes.int64), axis=1)
        high, low = [section(ranks, 1, k, ranks.shape[1], 2) for k in range(2)]
        keys = ops.add(ops.mul(high, full(high.shape, extent + 1, dtypes.int64)), low)
    return ops.reshape(keys, shape=(extent,))


def unique_consecutive(input: Tensor, return_inverse: bool = False, return_counts: bool = False,
                       dim: int | None = None) -> Any:
    """The elements (or slices along `dim`) without those that are equal to the one before; on request where each element
    went, and how many were equal. Reads how many there are."""
    x = detached(input)
    rows, axis = (ravel(x), 0) if dim is None else (x, one_dim("unique_consecutive", dim, len(x.shape)))
    extent = rows.shape[axis]
    places = from_array(np.zeros(0, np.int64), input) if not extent else _positions(_begins(rows, axis))
    found = [ops.take(rows, places, axis=axis)]
    if return_inverse:
        rank = ops.cumsum(cast(_begins(rows, axis), dtypes.int64), axis=0) if extent else places
        inverse = ops.sub(rank, full(tuple(rank.shape), 1, dtypes.int64))
        found.append(inverse if dim is not None else ops.reshape(inverse, shape=tuple(x.shape)))
    if return_counts:
        some = min(1, extent)
        after = ops.concat(section(places, 0, some, places.shape[0]), full((some,), extent, dtypes.int64), axis=0)
        found.append(ops.sub(after, places))
    return tuple(found) if len(found) > 1 else found[0]


def _begins(rows: Tensor, axis: int) -> Tensor:
    """Which slices along `axis` differ from the one before, the first one included."""
    extent = rows.shape[axis]
    differs = ops.ne(section(rows, axis, 1, extent), section(rows, axis, 0, extent - 1))
    others = tuple([d for d in range(len(rows.shape)) if d != axis])
    if others:
        differs = any_of(differs, others)
    return ops.concat(full((1,), True, dtypes.bool_), differs, axis=0)


def isin(elements: Tensor, test_elements: Tensor) -> Tensor:
    """Where an element is one of `test_elements`."""
    rows = ops.reshape(test_elements, shape=(size(test_elements.shape),))
    found = ops.eq(*matched("isin", expand_dims(elements, (len(elements.shape),)), rows))
    return ops.max(found, axes=(len(elements.shape),)) if rows.shape[0] else full(elements.shape, False, dtypes.bool_)


def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """How often each non-negative integer occurs in a 1-d tensor, or the sum of its weights. Reads the value."""
    largest = int(read(ops.max(input, axes=(0,)))) + 1 if input.shape[0] else 0
    length = max(largest, minlength)
    if weights is None:
        return _counted(input, length, full(input.shape, 1, _counting(input)))
    return ops.index_add(full((length,), 0, weights.dtype), cast(input, dtypes.int64), weights, axis=0)


def _counting(x: Tensor) -> DType:
    """The type in which elements of `x` are counted: the smaller one that has room is added up faster."""
    return dtypes.int32 if size(x.shape) < 2 ** 31 else dtypes.int64


def _counted(places: Tensor, length: int, weights: Tensor) -> Tensor:
    """The sum of the integer `weights` of each of the first `length` places: int64."""
    index = places if places.dtype is dtypes.int32 else cast(places, dtypes.int64)
    return cast(ops.index_add(full((length,), 0, weights.dtype), index, weights, axis=0), dtypes.int64)


@widened
def histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """How many elements fall into each of `bins` equal intervals of [min, max], in the dtype of `input`. Where both are
    equal, the smallest and the largest element are the limits, and are read. ShapeError without bins, or with limits that
    are not finite or the wrong way round."""
    bins = operator.index(bins)
    require_shape("histc", bins > 0, f"bins must be positive, got {bins}")
    x = detached(as_float(ravel(input)))
    low, high = float(min), float(max)
    if low == high and x.shape[0]:
        low, high = [float(read(extreme(x, axes=(0,)))) for extreme in (ops.min, ops.max)]
    require_shape("histc", low <= high and math.isfinite(low) and math.isfinite(high),
                  f"[{low}, {high}] is no range", fix="Give a finite min and max")
    if low == high:
        low, high = low - 1, high + 1
    first, last, count = [full(x.shape, v, x.dtype) for v in (low, high, bins)]
    inside = ops.bitwise_and(ops.ge(x, first), ops.le(x, last))
    place = ops.div(ops.mul(ops.sub(ops.where(inside, x, first), first), count), ops.sub(last, first))
    index = cast(ops.minimum(place, full(x.shape, bins - 1, x.dtype)), dtypes.int32)
    return cast(_counted(index, bins, cast(inside, _counting(x))), input.dtype)
