"""Ops that only say where elements lie: no arithmetic.

Those with ``view=True`` give NumPy views of their operand; in a kernel they are index arithmetic. The others copy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.errors import ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import sum_to, zeros_like
from jitgrad.ops.derived import derived
from jitgrad.ops.record import require_axes, require_same

__all__ = ["align", "broadcast_to", "concat", "flip", "inverse_permutation", "pad", "permute", "reshape", "slice",
           "slice_update"]

Ints = tuple[int, ...]

# ---- views -----------------------------------------------------------------------------------------------------


def _infer_reshape(x: TensorType, *, shape: Ints) -> TensorType:
    if min(shape, default=0) < 0 or math.prod(shape) != x.size:
        raise complain(ShapeError, "reshape", f"{x} has {x.size} elements, shape {list(shape)} "
                                              f"has {math.prod(shape)}")
    return x.with_shape(tuple(shape))


reshape: Op = register(Op(
    "reshape", ("x",), _infer_reshape, lambda x, *, shape: x.reshape(shape), "movement", view=True,
    alias=True, vjp=(lambda g, x_type: ops.reshape(g, shape=x_type.shape),),
    doc="The same elements in row-major order at another shape; a view where strides allow it."))


def _infer_permute(x: TensorType, *, axes: Ints) -> TensorType:
    if sorted(axes) != list(range(x.ndim)):
        raise complain(ShapeError, "permute", f"axes {axes} are no permutation of the {x.ndim} dimensions of {x}")
    return x.with_shape(tuple([x.shape[a] for a in axes]))


def inverse_permutation(axes: Ints) -> Ints:
    """The permutation that undoes `axes`."""
    inverse = [0] * len(axes)
    for position, axis in enumerate(axes):
        inverse[axis] = position
    return tuple(inverse)


permute: Op = register(Op(
    "permute", ("x",), _infer_permute, lambda x, *, axes: x.transpose(axes), "movement", view=True,
    vjp=(lambda g, axes: ops.permute(g, axes=inverse_permutation(axes)),),
    doc="Dimensions reordered: dimension k of the result is dimension axes[k] of x."))


def _infer_broadcast_to(x: TensorType, *, shape: Ints) -> TensorType:
    if len(shape) != x.ndim or any([have != want and have != 1 for have, want in zip(x.shape, shape, strict=False)]):
        raise complain(ShapeError, "broadcast_to", f"{x} does not broadcast to shape {list(shape)}")
    return x.with_shape(tuple(shape))


def _broadcast_to(x: np.ndarray, *, shape: Ints) -> np.ndarray:
    if type(x) is not np.ndarray or not x.flags.c_contiguous:
        return np.broadcast_to(x, shape)               # an array on another device makes this view itself
    # The constructor is several times faster than np.broadcast_to, which builds an iterator.
    strides = tuple([0 if s == 1 != n else t for s, n, t in zip(x.shape, shape, x.strides, strict=True)])
    view = np.ndarray(shape, x.dtype, np.asarray(x), 0, strides) if x.size else np.empty(shape, x.dtype)
    view.flags.writeable = False
    return view


def _broadcast_axes(x_type: TensorType, shape: Ints) -> Ints:
    return tuple([k for k, (have, want) in enumerate(zip(x_type.shape, shape, strict=True)) if have != want])


def _broadcast_gradient(g: Any, x_type: TensorType, shape: Ints) -> Any:
    summed = ops.sum(g, axes=_broadcast_axes(x_type, shape))
    return summed if summed.shape == x_type.shape else ops.reshape(summed, shape=x_type.shape)


broadcast_to: Op = register(Op(
    "broadcast_to", ("x",), _infer_broadcast_to, _broadcast_to, "movement", view=True, vjp=(_broadcast_gradient,),
    doc="Dimensions of size 1 repeated to the sizes of `shape`, which has as many dimensions as x."))


@derived(lambda x, *, shape: _broadcast_to(x.reshape((1,) * (len(shape) - x.ndim) + x.shape), shape=shape),
         vjp=(lambda g, x_type: sum_to(g, x_type.shape),), view=True)
def align(x: Any, *, shape: Ints) -> Any:
    """`broadcast_to` a shape of more dimensions, which come first."""
    leading = (1,) * (len(shape) - len(x.shape))
    return ops.broadcast_to(ops.reshape(x, shape=leading + tuple(x.shape)), shape=shape)


def _infer_slice(x: TensorType, *, start: Ints, stop: Ints, step: Ints) -> TensorType:
    bounds = list(zip(x.shape, start, stop, step, strict=False))
    if {len(start), len(stop), len(step)} != {x.ndim} or any(
            not 0 <= first <= last <= size or stride < 1 for size, first, last, stride in bounds):
        raise complain(ShapeError, "slice", f"start {start}, stop {stop}, step {step} do not lie in {x}")
    return x.with_shape(tuple([-(-(last - first) // stride) for _, first, last, stride in bounds]))


def _slices(start: Ints, stop: Ints, step: Ints) -> tuple[Any, ...]:
    return tuple([_slice_object(*bounds) for bounds in zip(start, stop, step, strict=True)])


_slice_object: Any = slice             # the built-in, before the op takes its name


def _slice_gradient(g: Any, x_type: TensorType, start: Ints, step: Ints) -> Any:
    if all(s == 1 for s in step):
        high = tuple([size - first - taken for size, first, taken in zip(x_type.shape, start, g.shape, strict=True)])
        return ops.pad(g, low=start, high=high)
    return ops.slice_update(zeros_like(x_type), g, start=start, step=step)


slice: Op = register(Op(
    "slice", ("x",), _infer_slice, lambda x, *, start, stop, step: x[_slices(start, stop, step)], "movement",
    view=True, vjp=(_slice_gradient,), doc="x[start:stop:step] in every dimension; steps are positive."))


def _infer_flip(x: TensorType, *, axes: Ints) -> TensorType:
    require_axes("flip", axes, x)
    return x


def _flip(x: np.ndarray, *, axes: Ints) -> Any:
    return x[tuple([_REVERSED if k in axes else _ALL for k in range(x.ndim)])]


_ALL, _REVERSED = _slice_object(None), _slice_object(None, None, -1)

flip: Op = register(Op("flip", ("x",), _infer_flip, _flip, "movement", view=True,
                       vjp=(lambda g, axes: ops.flip(g, axes=axes),),
                       doc="The order of elements along `axes` reversed."))

# ---- copies ----------------------------------------------------------------------------------------------------


def _infer_pad(x: TensorType, *, low: Ints, high: Ints) -> TensorType:
    if len(low) != x.ndim or len(high) != x.ndim or any(p < 0 for p in (*low, *high)):
        raise complain(ShapeError, "pad", f"low {low}, high {high} for {x}: one amount >= 0 per dimension and side")
    return x.with_shape(tuple([n + before + after for n, before, after in zip(x.shape, low, high, strict=True)]))


def _pad(x: np.ndarray, *, low: Ints, high: Ints) -> np.ndarray:
    sizes = [n + before + after for n, before, after in zip(x.shape, low, high, strict=True)]
    out = np.zeros(sizes, x.dtype)
    out[tuple([_slice_object(before, before + n) for n, before in zip(x.shape, low, strict=True)])] = x
    return out


def _pad_gradient(g: Any, x_type: TensorType, low: Ints) -> Any:
    stop = tuple([before + n for before, n in zip(low, x_type.shape, strict=True)])
    return ops.slice(g, start=low, stop=stop, step=(1,) * len(low))


pad: Op = register(Op("pad", ("x",), _infer_pad, _pad, "movement", vjp=(_pad_gradient,),
                      doc="x with `low` zeros before and `high` zeros after it in every dimension."))


def _infer_concat(*xs: TensorType, axis: int) -> TensorType:
    if not xs:
        raise complain(ShapeError, "concat", "needs at least one operand")
    first = xs[0]
    require_axes("concat", (axis,), first)
    for x in xs[1:]:
        aligned = x.with_shape(x.shape[:axis] + first.shape[axis:axis + 1] + x.shape[axis + 1:])
        if aligned.shape != first.shape:
            raise complain(ShapeError, "concat", f"{first} and {x} differ outside of axis {axis}")
        require_same("concat", first, aligned)
    total = 0
    for x in xs:
        total += x.shape[axis]
    return first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1:]))


def _concat_gradient(g: Any, xs_types: tuple[TensorType, ...], axis: int) -> tuple[Any, ...]:
    pieces, begin, ndim = [], 0, len(g.shape)
    for x in xs_types:
        end = begin + x.shape[axis]
        start = tuple([begin if k == axis else 0 for k in range(ndim)])
        stop = tuple([end if k == axis else n for k, n in enumerate(g.shape)])
        pieces.append(ops.slice(g, start=start, stop=stop, step=(1,) * ndim))
        begin = end
    return tuple(pieces)


concat: Op = register(Op("concat", ("xs",), _infer_concat, lambda *xs, axis: np.concatenate(xs, axis), "movement",
                         vjp=_concat_gradient, variadic=True, doc="Operands one after the other along `axis`."))


def _region_stop(start: Ints, shape: Ints, step: Ints) -> Ints:
    """Where a slice of `shape` elements from `start` by `step` ends."""
    return tuple([first + (n - 1) * stride + 1 if n else first
                  for first, n, stride in zip(start, shape, step, strict=True)])


def _infer_slice_update(x: TensorType, update: TensorType, *, start: Ints, step: Ints) -> TensorType:
    require_same("slice_update", x, x.with_dtype(update.dtype))
    if len({x.ndim, update.ndim, len(start), len(step)}) != 1 or any(
            first < 0 or stride < 1 or last > size for first, stride, last, size in
            zip(start, step, _region_stop(start, update.shape, step), x.shape, strict=True)):
        raise complain(ShapeError, "slice_update", f"{update} at {start} by {step} does not lie in {x}")
    return x


def _slice_update(x: np.ndarray, update: np.ndarray, *, start: Ints, step: Ints) -> np.ndarray:
    out = np.array(x)
    out[_slices(start, _region_stop(start, update.shape, step), step)] = update
    return out


def _slice_update_gradient(g: Any, update_type: TensorType, start: Ints, step: Ints) -> Any:
    return ops.slice_update(g, zeros_like(update_type), start=start, step=step)


def _update_gradient(g: Any, update_type: TensorType, start: Ints, step: Ints) -> Any:
    return ops.slice(g, start=start, stop=_region_stop(start, update_type.shape, step), step=step)


slice_update: Op = register(Op(
    "slice_update", ("x", "update"), _infer_slice_update, _slice_update, "movement",
    vjp=(_slice_update_gradient, _update_gradient),
    doc="x with the region that starts at `start` and goes by `step` replaced by `update`."))
