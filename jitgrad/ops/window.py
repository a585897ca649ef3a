"""Pooling over windows of x[N, C, *sizes] with one, two or three sizes (L, or H and W, or D, H and W).

Attributes have one entry for each of these dimensions: kernel, stride and dilation a number, padding a pair (before,
after). Padding never wins a maximum. With `ceil_mode` a last window may reach beyond the padding, if it starts inside
of the image or its low padding. Positions of maxima are i64, counted in row-major order within the sizes of one channel,
here called a plane.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int64
from jitgrad.errors import ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.record import checked_first, in_float32, require_category, require_same

__all__ = ["avg_pool", "avg_pool_grad", "max_pool", "max_pool_gather", "max_pool_grad"]

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]
RANKS = (1, 2, 3)
ANYWHERE: dict[str, Ints] = {"kernel": (), "stride": (), "padding": (), "dilation": ()}
"""Windows of `max_pool_grad` of which nothing is known."""


def pooled_size(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, ceil_mode: bool) -> int:
    """How many windows fit along one dimension."""
    reach = size + padding[0] + padding[1] - dilation * (kernel - 1) - 1
    count = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding[0] else count


def _pooled_shape(name: str, x: TensorType, kernel: Ints, stride: Ints, padding: Padding, dilation: Ints,
                  ceil_mode: bool) -> Ints:
    if x.ndim - 2 not in RANKS or {len(kernel), len(stride), len(padding), len(dilation)} != {x.ndim - 2}:
        raise complain(ShapeError, name, f"needs x[N, C, *sizes] with one, two or three sizes, and as many entries in "
                                         f"kernel {kernel}, stride {stride}, padding {padding} and dilation {dilation}; "
                                         f"got {x}")
    if min(*kernel, *stride, *dilation) < 1:
        raise complain(ShapeError, name, f"kernel {kernel}, stride {stride}, dilation {dilation} are at least 1")
    if any(not 0 <= p <= k // 2 for k, side in zip(kernel, padding, strict=True) for p in side):
        raise complain(ShapeError, name, f"padding {padding} is between 0 and half of the kernel {kernel}")
    sizes = [pooled_size(*one, ceil_mode) for one in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]
    if min(sizes) < 1:
        raise complain(ShapeError, name, f"the window {kernel} is larger than the padded input {x}")
    return (*x.shape[:2], *sizes)


def _padded(x: np.ndarray, fill: Any, out: Ints, kernel: Ints, stride: Ints, padding: Padding,
            dilation: Ints) -> np.ndarray:
    """x with its low padding, and as much behind it as the last window reaches."""
    sizes = [max((n - 1) * s + d * (k - 1) + 1, low + size) for n, s, d, k, (low, _), size in
             zip(out, stride, dilation, kernel, padding, x.shape[2:], strict=True)]
    if sizes == list(x.shape[2:]):
        return x
    result = np.full((*x.shape[:2], *sizes), fill, x.dtype)
    result[_image(x.shape, padding)] = x
    return result


def _image(shape: Ints, padding: Padding) -> tuple[Any, ...]:
    """Where the image lies in its padded array."""
    return (..., *[slice(low, low + size) for size, (low, _) in zip(shape[2:], padding, strict=True)])


def _taps(kernel: Ints, stride: Ints, dilation: Ints, out: Ints) -> Iterator[tuple[Ints, tuple[Any, ...]]]:
    """For each place in the window (its offset in elements) the slices of the padded array that all windows see
    there."""
    for tap in np.ndindex(*kernel):
        offset = tuple([k * d for k, d in zip(tap, dilation, strict=True)])
        yield offset, (..., *[slice(first, first + (count - 1) * s + 1, s)
                              for first, count, s in zip(offset, out, stride, strict=True)])


# ---- maximum ---------------------------------------------------------------------------------------------------


def _infer_max_pool(x: TensorType, *, kernel: Ints, stride: Ints, padding: Padding, dilation: Ints,
                    ceil_mode: bool) -> tuple[TensorType, TensorType]:
    require_category("max_pool", x.dtype, "uif")
    shape = _pooled_shape("max_pool", x, kernel, stride, padding, dilation, ceil_mode)
    return x.with_shape(shape), TensorType(int64, shape, x.device)


def _max_pool(x: np.ndarray, *, kernel: Ints, stride: Ints, padding: Padding, dilation: Ints,
              ceil_mode: bool) -> tuple[np.ndarray, np.ndarray]:
    sizes = x.shape[2:]
    out = tuple([pooled_size(*one, ceil_mode) for one in zip(sizes, kernel, stride, padding, dilation, strict=True)])
    padded = _padded(x, 0, out, kernel, stride, padding, dilation)
    best = np.zeros((*x.shape[:2], *out), x.dtype)
    index = np.full(best.shape, -1, np.int64)
    starts = [grid * s - low for grid, s, (low, _) in zip(np.indices(out, sparse=True), stride, padding, strict=True)]
    for offset, place in _taps(kernel, stride, dilation, out):
        inside: Any = True
        position: Any = 0
        for start, shift, size in zip(starts, offset, sizes, strict=True):
            inside = inside & (start + shift >= 0) & (start + shift < size)
            position = position * size + start + shift
        value = padded[place]
        better = inside & ((index < 0) | (value > best) | (value != value))
        np.copyto(best, value, where=better)
        np.copyto(index, position, where=better)
    return best, index


def _infer_max_pool_grad(gradient: TensorType, index: TensorType, *, input_shape: Ints, **_: Any) -> TensorType:
    require_same("max_pool_grad", gradient, index.with_dtype(gradient.dtype))
    return gradient.with_shape(tuple(input_shape))


def _plane_places(index: np.ndarray, planes: int, size: int) -> np.ndarray:
    """Positions within planes as positions within the whole array, one row for each plane."""
    return index.reshape(planes, math.prod(index.shape[2:])) + np.arange(planes)[:, None] * size


def _max_pool_grad(gradient: np.ndarray, index: np.ndarray, *, input_shape: Ints, **_: Any) -> np.ndarray:
    planes, size = math.prod(input_shape[:2]), math.prod(input_shape[2:])
    places = _plane_places(index, planes, size).reshape(-1)
    total = np.bincount(places, gradient.reshape(-1), planes * size) if places.size else np.zeros(planes * size)
    return total.astype(gradient.dtype).reshape(input_shape)


def _infer_max_pool_gather(x: TensorType, index: TensorType) -> TensorType:
    if x.ndim != index.ndim or x.shape[:2] != index.shape[:2]:
        raise complain(ShapeError, "max_pool_gather", f"index {index} does not belong to x {x}")
    return x.with_shape(index.shape)


def _max_pool_gather(x: np.ndarray, index: np.ndarray) -> Any:
    planes, size = math.prod(x.shape[:2]), math.prod(x.shape[2:])
    return x.reshape(-1)[_plane_places(index, planes, size)].reshape(index.shape)


max_pool: Op = register(Op(
    "max_pool", ("x",), _infer_max_pool, checked_first(_infer_max_pool, _max_pool), "window", outputs=2,
    vjp=(lambda g0, out1, x_type, kernel, stride, padding, dilation: ops.max_pool_grad(
        g0, out1, input_shape=x_type.shape, kernel=kernel, stride=stride, padding=padding, dilation=dilation),),
    doc="Largest element of every window (nan if there is one), and its position within the plane."))
max_pool_grad: Op = register(Op(
    "max_pool_grad", ("gradient", "index"), _infer_max_pool_grad, _max_pool_grad, "window",
    vjp=(lambda g, index: ops.max_pool_gather(g, index), None),
    doc="Zeros of `input_shape` with `gradient` added at the positions `index` of each plane. Each lies in its window; with "
        "an empty `kernel` nothing is known of the windows, and it may lie anywhere."))
max_pool_gather: Op = register(Op(
    "max_pool_gather", ("x", "index"), _infer_max_pool_gather, _max_pool_gather, "window",
    vjp=(lambda g, index, x_type: ops.max_pool_grad(g, index, input_shape=x_type.shape, **ANYWHERE), None),
    doc="The elements of x at the positions `index` of each plane."))

# ---- mean ------------------------------------------------------------------------------------------------------


def _infer_avg_pool(x: TensorType, *, kernel: Ints, stride: Ints, padding: Padding, count_include_pad: bool,
                    divisor: int, ceil_mode: bool) -> TensorType:
    require_category("avg_pool", x.dtype, "f")
    return x.with_shape(_pooled_shape("avg_pool", x, kernel, stride, padding, (1,) * len(kernel), ceil_mode))


def _infer_avg_pool_grad(gradient: TensorType, *, input_shape: Ints, **attrs: Any) -> TensorType:
    x = gradient.with_shape(tuple(input_shape))
    require_same("avg_pool_grad", _infer_avg_pool(x, **attrs), gradient)
    return x


def _window_counts(size: int, count: int, kernel: int, stride: int, padding: tuple[int, int],
                   count_include_pad: bool) -> np.ndarray:
    """How many elements each of `count` windows along one dimension is the mean of."""
    low, high = padding
    first = np.arange(count) * stride - low
    last = np.minimum(first + kernel, size + high)
    if count_include_pad:
        return last - first
    return np.minimum(last, size) - np.maximum(first, 0)


def _divisors(shape: Ints, out: Ints, kernel: Ints, stride: Ints, padding: Padding, count_include_pad: bool,
              divisor: int, dtype: Any) -> Any:
    if divisor:
        return dtype.type(divisor)
    counts: Any = 1
    for one in zip(shape[2:], out, kernel, stride, padding, strict=True):
        counts = np.multiply.outer(counts, _window_counts(*one, count_include_pad))
    return counts.astype(dtype)


def _avg_pool(x: np.ndarray, *, kernel: Ints, stride: Ints, padding: Padding, count_include_pad: bool, divisor: int,
              ceil_mode: bool) -> np.ndarray:
    ones = (1,) * len(kernel)
    out = tuple([pooled_size(*one, ceil_mode) for one in zip(x.shape[2:], kernel, stride, padding, ones, strict=True)])
    padded = _padded(x, 0, out, kernel, stride, padding, ones)
    total = np.zeros((*x.shape[:2], *out), x.dtype)
    for _, place in _taps(kernel, stride, ones, out):
        total += padded[place]
    total /= _divisors(x.shape, out, kernel, stride, padding, count_include_pad, divisor, x.dtype)
    return total


def _avg_pool_grad(gradient: np.ndarray, *, input_shape: Ints, kernel: Ints, stride: Ints, padding: Padding,
                   count_include_pad: bool, divisor: int, ceil_mode: bool) -> np.ndarray:
    out, ones = gradient.shape[2:], (1,) * len(kernel)
    share = gradient / _divisors(input_shape, out, kernel, stride, padding, count_include_pad, divisor, gradient.dtype)
    total = np.array(_padded(np.zeros(input_shape, gradient.dtype), 0, out, kernel, stride, padding, ones))
    for _, place in _taps(kernel, stride, ones, out):
        total[place] += share
    return np.ascontiguousarray(total[_image(input_shape, padding)])


def _mean_attrs(kernel: Ints, stride: Ints, padding: Padding, count_include_pad: bool, divisor: int,
                ceil_mode: bool) -> dict[str, Any]:
    return {"kernel": kernel, "stride": stride, "padding": padding, "count_include_pad": count_include_pad,
            "divisor": divisor, "ceil_mode": ceil_mode}


avg_pool: Op = register(Op(
    "avg_pool", ("x",), _infer_avg_pool, checked_first(_infer_avg_pool, in_float32(_avg_pool)), "window",
    vjp=(lambda g, x_type, kernel, stride, padding, count_include_pad, divisor, ceil_mode: ops.avg_pool_grad(
        g, input_shape=x_type.shape, **_mean_attrs(kernel, stride, padding, count_include_pad, divisor, ceil_mode)),),
    doc="Sum of every window divided by `divisor`, or, if that is 0, by the number of its elements; padding counts as "
        "zeros, or not at all without `count_include_pad`."))
avg_pool_grad: Op = register(Op(
    "avg_pool_grad", ("gradient",), _infer_avg_pool_grad, in_float32(_avg_pool_grad), "window",
    vjp=(lambda g, kernel, stride, padding, count_include_pad, divisor, ceil_mode: ops.avg_pool(
        g, **_mean_attrs(kernel, stride, padding, count_include_pad, divisor, ceil_mode)),),
    doc="Gradient of avg_pool: each element's share spread over its window."))
