"""Indexing: ``x[...]`` in all its forms, gather and scatter, selection by masks, sorting.

Integers, slices, None and ``...`` make views. Integer tensors, lists and masks copy, by NumPy's (and PyTorch's)
rules: all of them together stand for one group of dimensions, at the place of the first when they are neighbours,
otherwise in front. What depends on the values of a mask in its *size* reads the mask. """

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, OutOfRangeError, ShapeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_operand,
    broadcast_all,
    broadcast_shape,
    cast,
    describe,
    from_array,
    is_eager_on_gpu,
    is_number,
    one_dim,
    read,
    require_shape,
    size,
)
from jitgrad.functional.shape import permute, ravel, section
from jitgrad.ops.builders import broadcast, expand_dims, full, zeros_like

__all__ = [
    "gather", "index_add", "index_copy", "index_fill", "index_put", "index_select", "masked_fill",
    "masked_scatter", "masked_select", "scatter", "scatter_add", "take", "take_along_dim",
]


@dataclass(frozen=True, slots=True)
class Advanced:
    """An index by values: an integer tensor for `width` dimensions (as one, in row-major order) from `axis` on, or,
    before it is read, a mask over them."""

    axis: int
    width: int
    index: Tensor


# reading

def getitem(x: Tensor, key: Any) -> Tensor:
    """``x[key]``."""
    if type(key) is int and x.shape:
        return _row(x, key)
    view, advanced = split_key(x, key)
    return _take_advanced(view, advanced) if advanced else view


def _row(x: Tensor, index: int) -> Tensor:
    shape = x.shape
    index = _checked_position(index, shape[0], 0)
    rest = (0,) * (len(shape) - 1)
    one = ops.slice(x, start=(index, *rest), stop=(index + 1, *shape[1:]), step=(1,) * len(shape))
    return ops.reshape(one, shape=shape[1:])


def _checked_position(index: int, extent: int, dim: int) -> int:
    if not -extent <= index < extent:
        raise complain(OutOfRangeError, "index",
                       f"index {index} is out of range for dimension {dim} with size {extent}")
    return index + extent if index < 0 else index


def split_key(x: Tensor, key: Any) -> tuple[Tensor, list[Advanced]]:
    """The view of `x` that the integers, slices, None and ``...`` of `key` select, and the rest of the key on it."""
    items = _with_ellipsis(x, [_classified(item) for item in (key if type(key) is tuple else (key,))])
    start: list[int] = []
    stop: list[int] = []
    step: list[int] = []
    shape: list[int] = []
    advanced: list[Advanced] = []
    for item in items:
        if item is None:
            shape.append(1)
            continue
        dim = len(start)
        width = _consumed(item)
        first, last, stride = (0, 0, 1) if width == 0 else _range(item, x.shape[dim], dim)
        if hasattr(item, "shape"):
            _require_mask_fits(item, x, dim)
            advanced.append(Advanced(len(shape), width, item))
            start += [0] * width
            stop += x.shape[dim:dim + width]
            step += [1] * width
            shape += x.shape[dim:dim + width]
            continue
        start.append(first)
        stop.append(last)
        step.append(stride)
        if isinstance(item, slice):
            shape.append(-(-(last - first) // stride))
    return _view(x, start, stop, step, shape), advanced


def _view(x: Tensor, start: list[int], stop: list[int], step: list[int], shape: list[int]) -> Tensor:
    if any(start) or tuple(stop) != x.shape or any(s != 1 for s in step):
        x = ops.slice(x, start=tuple(start), stop=tuple(stop), step=tuple(step))
    return x if x.shape == tuple(shape) else ops.reshape(x, shape=tuple(shape))


def _classified(item: Any) -> Any:
    """An item of a key as int, slice, None, Ellipsis, or a tensor of integers or bools."""
    if item is None or item is Ellipsis or type(item) in (int, slice):
        return item
    if hasattr(item, "_traced_number"):
        return item._traced_number
    if isinstance(item, (bool, np.bool_)):
        return from_array(np.array(bool(item)))
    if isinstance(item, (int, np.integer)):
        return int(item)
    if isinstance(item, (list, tuple, range, np.ndarray)):
        item = _index_array(item)
    if not hasattr(item, "shape"):
        raise complain(DTypeError, "index", f"{type(item).__name__} is no index",
                       fix="Use integers, slices, None, ..., integer tensors or masks")
    return _require_index(item)


def _index_array(item: Any) -> Tensor:
    if isinstance(item, (list, tuple)) and any(hasattr(v, "_chain") for v in item):
        return _stacked(item)
    array = np.asarray(item)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)
    return from_array(array)


def _stacked(items: Sequence[Tensor]) -> Tensor:
    rows = [expand_dims(cast(as_operand(v), dtypes.int64), (0,)) for v in items]
    return ops.concat(*rows, axis=0)


def _require_index(index: Tensor) -> Tensor:
    if index.dtype is dtypes.bool_ or index.dtype in (dtypes.int32, dtypes.int64):
        return index
    if index.dtype.category != "i":
        fix = "Did you mean mask.bool()?" if index.dtype is dtypes.uint8 else "Did you mean index.long()?"
        raise complain(DTypeError, "index", f"tensors used as indices must be integers or bools, got {describe(index)}",
                       fix=fix)
    return cast(index, dtypes.int64)


def _consumed(item: Any) -> int:
    """How many dimensions an item of a key uses up."""
    if item is None or item is Ellipsis:
        return 0
    return len(item.shape) if hasattr(item, "shape") and item.dtype is dtypes.bool_ else 1


def _with_ellipsis(x: Tensor, items: list[Any]) -> list[Any]:
    """`items` with ``...`` (or nothing, at the end) replaced by full slices for the dimensions that are left."""
    left = len(x.shape) - sum(_consumed(item) for item in items)
    if left < 0:
        raise complain(OutOfRangeError, "index", f"too many indices for {describe(x)}")
    places = [k for k, item in enumerate(items) if item is Ellipsis]
    if len(places) > 1:
        raise complain(OutOfRangeError, "index", "an index can only have a single ellipsis")
    at = places[0] if places else len(items)
    return items[:at] + [slice(None)] * left + items[at + 1:]


def _range(item: Any, extent: int, dim: int) -> tuple[int, int, int]:
    """start, stop, step of what an item selects of a dimension."""
    if type(item) is int:
        first = _checked_position(item, extent, dim)
        return first, first + 1, 1
    if not isinstance(item, slice):
        return 0, extent, 1
    step = 1 if item.step is None else operator.index(item.step)
    if step <= 0:
        raise complain(ShapeError, "index", f"the step of a slice must be positive, got {step}",
                       fix="Did you mean jitgrad.flip?")
    first, last, _ = slice(item.start, item.stop, step).indices(extent)
    return first, max(first, last), step


def _require_mask_fits(item: Tensor, x: Tensor, dim: int) -> None:
    covered = x.shape[dim:dim + len(item.shape)]
    if item.dtype is dtypes.bool_ and tuple(item.shape) != tuple(covered):
        raise complain(OutOfRangeError, "index", f"the mask {describe(item)} does not fit the dimensions of "
                                                 f"{describe(x)} from {dim} on")


def _take_advanced(x: Tensor, advanced: list[Advanced]) -> Tensor:
    x, advanced = _select_scalars(x, advanced)
    if not advanced:
        return x
    flat, axis, index, _ = _flattened(x, advanced)
    return ops.take(flat, index, axis=axis)


def _select_scalars(x: Tensor, advanced: list[Advanced]) -> tuple[Tensor, list[Advanced]]:
    """0-d integers select like Python's: each on its own, before all others."""
    left: list[Advanced] = []
    for item in reversed(advanced):
        if item.index.shape or item.width != 1 or item.index.dtype is dtypes.bool_:
            left.insert(0, item)
            continue
        x = ops.take(x, _counted_from_front(item.index, x.shape[item.axis]), axis=item.axis)
        left = [Advanced(other.axis - 1, other.width, other.index) for other in left]
    return x, left


def _counted_from_front(index: Tensor, extent: int) -> Tensor:
    zero, length = zeros_like(index), full(index.shape, extent, index.dtype)
    return ops.where(ops.lt(index, zero), ops.add(index, length), index)


def _flattened(x: Tensor, advanced: list[Advanced]) -> tuple[Tensor, int, Tensor, Callable[[Tensor], Tensor]]:
    """`x` with all dimensions of the advanced indices as one; where that dimension is; the index into it; and how a
    tensor like the flattened one gets the dimensions of `x` back."""
    advanced = [Advanced(item.axis, item.width, _positions(item.index)) for item in advanced]
    covered = [d for item in advanced for d in range(item.axis, item.axis + item.width)]
    axis = advanced[0].axis
    neighbours = all(a.axis + a.width == b.axis for a, b in itertools.pairwise(advanced))
    rest = [d for d in range(len(x.shape)) if d not in covered]
    order = list(range(len(x.shape))) if neighbours else covered + rest
    axis = axis if neighbours else 0
    moved = permute(x, order)
    index = _combined([(size(x.shape[i.axis:i.axis + i.width]), i.index, i.width > 1) for i in advanced])
    shape = moved.shape
    count = size(shape[axis:axis + len(covered)])
    flat = moved
    if len(covered) != 1:
        flat = ops.reshape(moved, shape=(*shape[:axis], count, *shape[axis + len(covered):]))

    def restore(y: Tensor) -> Tensor:
        back = y if y.shape == shape else ops.reshape(y, shape=shape)
        return permute(back, [order.index(d) for d in range(len(order))])

    return flat, axis, index, restore


def _positions(index: Tensor) -> Tensor:
    """A mask as the row-major positions where it is True; integers as they are."""
    if index.dtype is not dtypes.bool_:
        return index
    return true_places(index) if is_eager_on_gpu(index) else from_array(np.flatnonzero(read(index)), index)


def true_places(mask: Tensor) -> Tensor:
    """The row-major positions where a mask on a GPU is True, int64: only their number is read. They come first in a stable
    order of the mask."""
    flat = ravel(mask)
    if not flat.shape[0]:
        return from_array(np.zeros(0, np.int64), mask)
    count = int(read(ops.sum(cast(flat, dtypes.int64), axes=(0,))))
    _, order = ops.sort(flat, axis=0, descending=True, stable=True)
    return section(order, 0, 0, count)


def _combined(parts: list[tuple[int, Tensor, bool]]) -> Tensor:
    """One index into the product of dimensions from one index for each, given with its extent. A position that is out
    of range in one of them is out of range in the product too, so that it is an error there."""
    if len(parts) == 1:
        extent, index, _ = parts[0]
        return _counted_from_front(index, extent)
    indices = broadcast_all("index", *[cast(index, dtypes.int64) for _, index, _ in parts])
    total = valid = None
    for (extent, _, _), index in zip(parts, indices):
        index = _counted_from_front(index, extent)
        length = full(index.shape, extent, index.dtype)
        inside = ops.bitwise_and(ops.ge(index, zeros_like(index)), ops.lt(index, length))
        total = index if total is None else ops.add(ops.mul(total, length), index)
        valid = inside if valid is None else ops.bitwise_and(valid, inside)
    return ops.where(valid, total, full(indices[0].shape, -1, dtypes.int64))


# writing

@casts(cuda="widest")
def index_put(input: Tensor, indices: Sequence[Tensor | None], values: Operand, accumulate: bool = False) -> Tensor:
    """`input` with ``input[indices]`` replaced by `values` (broadcast), or with `values` added there."""
    view, advanced = split_key(input, tuple([slice(None) if i is None else i for i in indices]))
    return put_advanced(view, advanced, values, accumulate)


def put_advanced(x: Tensor, advanced: list[Advanced], values: Operand, accumulate: bool = False) -> Tensor:
    """`x` with what `advanced` selects of it replaced by `values`, or with `values` added there."""
    values = cast(as_operand(values, x.dtype), x.dtype)
    if not accumulate and not values.shape and len(advanced) == 1 and advanced[0].index.dtype is dtypes.bool_:
        return _put_under_mask(x, advanced[0], values)
    flat, axis, index, restore = _flattened(x, advanced)
    target = flat.shape[:axis] + tuple(index.shape) + flat.shape[axis + 1:]
    values = _fit("index_put", values, target)
    write = ops.index_add if accumulate else ops.index_update
    return restore(write(flat, index, values, axis=axis))


def _put_under_mask(x: Tensor, item: Advanced, value: Tensor) -> Tensor:
    """One value wherever the mask is True: no need to know where that is."""
    after = len(x.shape) - item.axis - item.width
    mask = ops.reshape(item.index, shape=tuple(item.index.shape) + (1,) * after) if after else item.index
    return ops.where(broadcast(mask, x.shape), broadcast(value, x.shape), x)


def _fit(op: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`values` broadcast to `shape`; ones in front of it are dropped, as assignment allows."""
    while len(values.shape) > len(shape) and values.shape[0] == 1:
        values = ops.reshape(values, shape=values.shape[1:])
    fits = broadcast_shape(op, values.shape, shape) == shape
    require_shape(op, fits, f"{describe(values)} does not fit into shape {list(shape)}")
    return broadcast(values, shape)


def setitem(x: Tensor, key: Any, value: Operand) -> None:
    """``x[key] = value``: changes `x` in place."""
    view, advanced = split_key(x, key)
    if advanced:
        view._assign(put_advanced(view, advanced, value))
        return
    value = cast(as_operand(value, x.dtype, "index"), x.dtype)
    view._assign(_fit("index", value, view.shape))


# gather and scatter

def _index_like(op: str, x: Tensor, index: Tensor, same_rank: bool = True) -> Tensor:
    if index.dtype not in (dtypes.int64, dtypes.int32):
        raise complain(DTypeError, op, f"the index must be int64 or int32, got {describe(index)}",
                       fix="Did you mean index.long()?")
    if same_rank and len(index.shape) != len(x.shape):
        raise complain(ShapeError, op, f"the index must have as many dimensions as the tensor: {describe(x)}, "
                                       f"index {describe(index)}")
    return index


def gather(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """``out[i][j][k] = input[i][index[i][j][k]][k]`` for dim 1, and so on; the shape of `index`."""
    axis = one_dim("gather", dim, len(input.shape))
    if not input.shape:
        return ops.reshape(ops.take(ops.reshape(input, shape=(1,)), _index_like("gather", input, index, False), axis=0),
                           shape=tuple(index.shape))
    return ops.gather(input, _index_like("gather", input, index), axis=axis)


def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """`gather` with `input` and `indices` broadcast against each other, or on the flattened `input`."""
    if dim is None:
        return gather(ravel(input), 0, ravel(indices))
    axis = one_dim("take_along_dim", dim, len(input.shape))
    of_input = (*input.shape[:axis], 1, *input.shape[axis + 1:])
    of_index = (*indices.shape[:axis], 1, *indices.shape[axis + 1:])
    common = broadcast_shape("take_along_dim", of_input, of_index)
    input = broadcast(input, (*common[:axis], input.shape[axis], *common[axis + 1:]))
    return gather(input, axis, broadcast(indices, (*common[:axis], indices.shape[axis], *common[axis + 1:])))


def take(input: Tensor, index: Tensor) -> Tensor:
    """The elements of the flattened `input` at `index`."""
    return getitem(ops.reshape(input, shape=(size(input.shape),)), index)


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """The slices along `dim` that the 1-d `index` names."""
    axis = one_dim("index_select", dim, len(input.shape))
    index = _index_like("index_select", input, index, same_rank=False)
    require_shape("index_select", len(index.shape) <= 1, f"the index must be 1-d, got {describe(index)}")
    return ops.take(input, index if index.shape else ops.reshape(index, shape=(1,)), axis=axis)


def _source(x: Tensor, index: Tensor, src: Operand) -> Tensor:
    """What is scattered: a number everywhere, or the part of a tensor that the index covers."""
    if is_number(src):
        return broadcast(as_operand(src, x.dtype), tuple(index.shape))
    if src.dtype is not x.dtype:
        raise complain(DTypeError, "scatter",
                       f"the source must have the tensor's dtype: {describe(x)}, {describe(src)}")
    for axis, n in enumerate(index.shape):
        src = section(src, axis, 0, n)
    return src


def scatter(input: Tensor, dim: int, index: Tensor, src: Operand, *, reduce: str | None = None) -> Tensor:
    """`input` with ``out[i][index[i][j][k]][k] = src[i][j][k]`` for dim 1, and so on; `src` may be a number."""
    if reduce == "add":
        return scatter_add(input, dim, index, src)
    require_shape("scatter", reduce is None, f"reduce={reduce!r} is none of None, 'add'")
    axis = one_dim("scatter", dim, len(input.shape))
    index = _index_like("scatter", input, index)
    return ops.scatter(input, index, _source(input, index, src), axis=axis)


@casts(cuda="widest")
def scatter_add(input: Tensor, dim: int, index: Tensor, src: Operand) -> Tensor:
    """`input` with ``out[i][index[i][j][k]][k] += src[i][j][k]`` for dim 1, and so on."""
    axis = one_dim("scatter_add", dim, len(input.shape))
    index = _index_like("scatter_add", input, index)
    return ops.scatter_add(input, index, _source(input, index, src), axis=axis)


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Operand = 1) -> Tensor:
    """`input` with the slices of ``alpha * source`` added at the places along `dim` that `index` names."""
    axis = one_dim("index_add", dim, len(input.shape))
    if type(alpha) is not int or alpha != 1:
        source = ops.mul(source, broadcast(as_operand(alpha, source.dtype), source.shape))
    index = _index_like("index_add", input, index, same_rank=False)
    return ops.index_add(input, index, cast(source, input.dtype), axis=axis)


@casts(cpu="widest")
def index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`input` with the slices along `dim` that `index` names replaced by those of `source`."""
    axis = one_dim("index_copy", dim, len(input.shape))
    return ops.index_update(input, _index_like("index_copy", input, index, same_rank=False), source, axis=axis)


def index_fill(input: Tensor, dim: int, index: Tensor, value: Operand) -> Tensor:
    """`input` with the slices along `dim` that `index` names filled with `value`."""
    axis = one_dim("index_fill", dim, len(input.shape))
    shape = (*input.shape[:axis], *index.shape, *input.shape[axis + 1:])
    return index_copy(input, axis, index, broadcast(cast(as_operand(value, input.dtype), input.dtype), shape))


# masks

def masked_fill(input: Tensor, mask: Tensor, value: Operand) -> Tensor:
    """`input` with `value` (a number or a 0-d tensor) where `mask` is True; both broadcast."""
    if mask.dtype is not dtypes.bool_:
        raise complain(DTypeError, "masked_fill", f"the mask must be bool, got {describe(mask)}",
                       fix="Did you mean mask.bool()?")
    value = cast(as_operand(value, input.dtype), input.dtype)
    require_shape("masked_fill", not value.shape, "the value must be a number or a 0-d tensor")
    mask, x = broadcast_all("masked_fill", mask, input)
    return ops.where(mask, broadcast(value, x.shape), x)


def masked_select(input: Tensor, mask: Tensor) -> Tensor:
    """The elements where `mask` is True, in one dimension. Reads the mask."""
    mask, x = broadcast_all("masked_select", mask, input)
    return getitem(x, mask)


def masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`input` with the elements where `mask` is True replaced by those of `source`, in order."""
    mask, x = broadcast_all("masked_scatter", mask, input)
    place = ops.cumsum(cast(ops.reshape(mask, shape=(size(mask.shape),)), dtypes.int64), axis=0)
    before = ops.maximum(ops.sub(place, full(place.shape, 1, dtypes.int64)), zeros_like(place))
    taken = ops.take(ops.reshape(source, shape=(size(source.shape),)), before, axis=0)
    return ops.where(mask, ops.reshape(cast(taken, x.dtype), shape=x.shape), x)
