"""Writing into a copy: at indices with a reduction, at places of the flattened tensor, into slices and diagonals.

All of them give a new tensor; gradients flow to what is kept and to what is written. A reduction at indices sorts them,
so that sums have one order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import OutOfRangeError, complain
from jitgrad.functional.core import Tensor, cast, describe, one_dim, require_shape, size, unknown_choice
from jitgrad.functional.elementwise import add, div, floor_divide, sub
from jitgrad.functional.index import _index_like, _source, index_put
from jitgrad.functional.reduce import detached
from jitgrad.functional.shape import permute, ravel, section
from jitgrad.ops.builders import broadcast, expand_dims, full, ones_like, zeros_like

__all__ = ["diagonal_scatter", "index_reduce", "put", "scatter_reduce", "select_scatter", "slice_scatter"]


# reductions

_REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")


def scatter_reduce(input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *,
                   include_self: bool = True) -> Tensor:
    """`input` with the elements of `src` put together, by "sum", "prod", "mean", "amax" or "amin", at the places along `dim`
    that `index` names; with the element of `input` that is there, unless ``include_self=False``. The gradient of an extreme
    is shared evenly among ties."""
    if reduce not in _REDUCTIONS:
        raise unknown_choice("scatter_reduce", "reduce", reduce, _REDUCTIONS)
    axis = one_dim("scatter_reduce", dim, len(input.shape))
    if not input.shape:
        one = [ops.reshape(x, shape=(1,)) for x in (input, index, src)]
        return ops.reshape(scatter_reduce(one[0], 0, one[1], one[2], reduce, include_self=include_self), shape=())
    index = _index_like("scatter_reduce", input, index)
    src = _source(input, index, src)
    if not size(index.shape):
        return input
    if reduce in ("sum", "mean"):
        return _added(input, axis, index, src, reduce == "mean", include_self)
    if reduce == "prod":
        return _multiplied(input, axis, index, src, include_self)
    found = _extreme(input, axis, index, src, ops.maximum if reduce == "amax" else ops.minimum, include_self)
    if input.dtype.category != "f" or not (_learns(input) or _learns(src)):
        return found
    return _with_shares(found, input, axis, index, src, include_self)


def _learns(x: Tensor) -> bool:
    return bool(getattr(x, "requires_grad", True))


def _added(x: Tensor, axis: int, index: Tensor, src: Tensor, as_mean: bool, include_self: bool) -> Tensor:
    """Sums or means; places that nothing comes to keep their element."""
    def total(start: Tensor, added: Tensor) -> Tensor:
        kept = start if include_self else ops.scatter(start, index, zeros_like(added), axis=axis)
        return ops.scatter_add(kept, index, added, axis=axis)

    found = total(x, src)
    if not as_mean:
        return found
    count = total(full(tuple(x.shape), 1.0, dtypes.float32), full(tuple(src.shape), 1.0, dtypes.float32))
    return (div if x.dtype.category in "fc" else floor_divide)(found, cast(count, x.dtype))


def _groups(x: Tensor, axis: int, index: Tensor, src: Tensor, combine: Callable[[Any, Any], Any]) -> tuple[Tensor, Tensor]:
    """What comes to each place, put together, and whether anything does. Equal indices are brought next to each other;
    each element takes in those before it in log2(n) steps; the last of each place has them all."""
    order = ops.sort(index, axis=axis, descending=False, stable=True)[1]
    keys, values = ops.gather(index, order, axis=axis), ops.gather(src, order, axis=axis)
    extent, step = keys.shape[axis], 1
    while step < extent:
        same = ops.eq(section(keys, axis, step, extent), section(keys, axis, 0, extent - step))
        later = section(values, axis, step, extent)
        joined = ops.where(same, combine(section(values, axis, 0, extent - step), later), later)
        values = ops.concat(section(values, axis, 0, step), joined, axis=axis)
        step *= 2
    ends = ops.concat(ops.ne(section(keys, axis, 0, extent - 1), section(keys, axis, 1, extent)),
                      full(tuple(section(keys, axis, 0, 1).shape), True, dtypes.bool_), axis=axis)
    found = ops.scatter_add(zeros_like(x), keys, ops.where(ends, values, zeros_like(values)), axis=axis)
    return found, _reached(x, axis, index)


def _reached(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Which places of `x` the index names."""
    return ops.scatter(full(tuple(x.shape), False, dtypes.bool_), index, full(tuple(index.shape), True, dtypes.bool_),
                       axis=axis)


def _multiplied(x: Tensor, axis: int, index: Tensor, src: Tensor, include_self: bool) -> Tensor:
    product, reached = _groups(x, axis, index, src, ops.mul)
    return ops.where(reached, ops.mul(x, product) if include_self else product, x)


def _extreme(x: Tensor, axis: int, index: Tensor, src: Tensor, combine: Callable[[Any, Any], Any],
             include_self: bool) -> Tensor:
    """The extremes, as values without history."""
    known = detached(x)
    found, reached = _groups(known, axis, index, detached(src), combine)
    return ops.where(reached, combine(known, found) if include_self else found, known)


def _with_shares(found: Tensor, x: Tensor, axis: int, index: Tensor, src: Tensor, include_self: bool) -> Tensor:
    """`found`, which extremes are, with the mean of the finite elements that are equal to it added and taken away again:
    that changes nothing but the gradient."""
    stands = ops.bitwise_and(ops.eq(detached(x), found), ops.isfinite(found))
    if not include_self:
        stands = ops.bitwise_and(stands, ops.logical_not(_reached(x, axis, index)))
    there = ops.gather(found, index, axis=axis)
    comes = ops.bitwise_and(ops.eq(detached(src), there), ops.isfinite(there))
    count = ops.scatter_add(cast(stands, x.dtype), index, cast(comes, x.dtype), axis=axis)
    total = ops.scatter_add(ops.where(stands, x, zeros_like(x)), index, ops.where(comes, src, zeros_like(src)), axis=axis)
    shared = ops.div(total, ops.maximum(count, ones_like(count)))
    return add(found, sub(shared, detached(shared)))


def index_reduce(input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *,
                 include_self: bool = True) -> Tensor:
    """`scatter_reduce` of whole slices along `dim`, which the 1-d `index` names: "prod", "mean", "amax" or "amin"."""
    if reduce not in _REDUCTIONS[1:]:
        raise unknown_choice("index_reduce", "reduce", reduce, _REDUCTIONS[1:])
    axis = one_dim("index_reduce", dim, len(input.shape))
    shape = (*input.shape[:axis], *index.shape, *input.shape[axis + 1:])
    require_shape("index_reduce", len(index.shape) == 1 and tuple(source.shape) == shape,
                  f"{describe(source)} does not hold a slice of {describe(input)} for each of {describe(index)}")
    spread = ops.reshape(index, shape=tuple([n if d == axis else 1 for d, n in enumerate(shape)]))
    return scatter_reduce(input, axis, broadcast(spread, shape), source, reduce, include_self=include_self)


# places

def put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """`input` with the elements of the flattened tensor at `index` replaced by those of `source`, or with these added."""
    index = _index_like("put", input, index, same_rank=False)
    require_shape("put", size(index.shape) == size(source.shape),
                  f"index and source must have equally many elements: {describe(index)}, {describe(source)}")
    flat = index_put(ravel(input), (ravel(index),), ravel(source), accumulate)
    return ops.reshape(flat, shape=tuple(input.shape))


def slice_scatter(input: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None,
                  step: int = 1) -> Tensor:
    """`input` with ``input[start:end:step]`` along `dim` replaced by `src`."""
    axis = one_dim("slice_scatter", dim, len(input.shape))
    require_shape("slice_scatter", step > 0, f"the step must be positive, got {step}")
    first, last, _ = slice(start, end, step).indices(input.shape[axis])
    return _replaced("slice_scatter", input, src, axis, first, max(first, last), step)


def _replaced(op: str, x: Tensor, src: Tensor, axis: int, first: int, last: int, step: int) -> Tensor:
    shape = (*x.shape[:axis], -(-(last - first) // step), *x.shape[axis + 1:])
    require_shape(op, tuple(src.shape) == shape, f"{describe(src)} does not fit into shape {list(shape)}")
    start = tuple([first if d == axis else 0 for d in range(len(shape))])
    steps = tuple([step if d == axis else 1 for d in range(len(shape))])
    return ops.slice_update(x, cast(src, x.dtype), start=start, step=steps) if size(shape) else x


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`input` with slice number `index` along `dim` replaced by `src`, which lacks that dimension."""
    axis = one_dim("select_scatter", dim, len(input.shape))
    extent = input.shape[axis] if input.shape else 0
    if not -extent <= index < extent:
        raise complain(OutOfRangeError, "select_scatter",
                       f"index {index} is out of range for dimension {dim} of {describe(input)}")
    shape = (*input.shape[:axis], *input.shape[axis + 1:])
    require_shape("select_scatter", tuple(src.shape) == shape, f"{describe(src)} does not fit into shape {list(shape)}")
    first = index % extent
    return _replaced("select_scatter", input, expand_dims(src, (axis,)), axis, first, first + 1, 1)


def diagonal_scatter(input: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """`input` with that diagonal of two dimensions replaced by `src`, which has it as its last dimension."""
    ndim = len(input.shape)
    first, second = one_dim("diagonal_scatter", dim1, ndim), one_dim("diagonal_scatter", dim2, ndim)
    require_shape("diagonal_scatter", first != second, f"dim1 and dim2 are the same dimension: {dim1}, {dim2}")
    order = [*[d for d in range(ndim) if d not in (first, second)], first, second]
    moved = permute(input, order)
    *outer, rows, columns = moved.shape
    length = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    require_shape("diagonal_scatter", tuple(src.shape) == (*outer, length),
                  f"{describe(src)} does not fit into shape {[*outer, length]}")
    begin = max(-offset, 0) * columns + max(offset, 0)
    flat = ops.reshape(moved, shape=(*outer, rows * columns))
    last = begin + (length - 1) * (columns + 1) + 1 if length else begin
    written = _replaced("diagonal_scatter", flat, src, len(outer), begin, last, columns + 1)
    return permute(ops.reshape(written, shape=(*outer, rows, columns)), [order.index(d) for d in range(ndim)])
