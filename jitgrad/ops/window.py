"""Pooling over windows of x[N, C, *sizes] with one, two or three sizes (L, or H and W, or D, H and W).

Attributes have one entry for each of these dimensions: kernel, stride and dilation a number, padding a pair (before,
after). Padding never wins a maximum. With `ceil_mode` a last window may reach beyond the padding, if it starts inside
of the image or its low padding. Where a maximum was found is the number of its tap: the place in the window, counted in
row-major order. It fits into a byte, unless windows are very large. With the window's own place it says the position in the
plane, the sizes of one channel (`window_places`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType, int32, uint8
from jitgrad.errors import ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.record import checked_first, in_float32, require_category, require_same

__all__ = ["avg_pool", "avg_pool_grad", "max_pool", "max_pool_gather", "max_pool_grad"]

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]
RANKS = (1, 2, 3)


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


def tap_dtype(kernel: Ints) -> DType:
    """What numbers of taps are."""
    return uint8 if math.prod(kernel) <= 256 else int32


def window_places(sizes: Ints, out: Ints, kernel: Ints, stride: Ints, padding: Padding,
                  dilation: Ints) -> tuple[np.ndarray, np.ndarray]:
    """Two i64 arrays of which the sum is a position within a plane: what each window adds to it, [*out], and what each tap
    does."""
    windows, taps = np.zeros(out, np.int64), np.zeros(kernel, np.int64)
    for axis, (s, (low, _), d) in enumerate(zip(stride, padding, dilation, strict=True)):
        step = math.prod(sizes[axis + 1:])
        windows += (np.indices(out, sparse=True)[axis] * s - low) * step
        taps += np.indices(kernel, sparse=True)[axis] * (d * step)
    return windows, taps.reshape(-1)


def _infer_max_pool(x: TensorType, *, kernel: Ints, stride: Ints, padding: Padding, dilation: Ints,
                    ceil_mode: bool) -> tuple[TensorType, TensorType]:
    require_category("max_pool", x.dtype, "uif")
    shape = _pooled_shape("max_pool", x, kernel, stride, padding, dilation, ceil_mode)
    return x.with_shape(shape), TensorType(tap_dtype(kernel), shape, x.device)


def _max_pool(x: np.ndarray, *, kernel: Ints, stride: Ints, padding: Padding, dilation: Ints,
              ceil_mode: bool) -> tuple[np.ndarray, np.ndarray]:
    sizes = x.shape[2:]
    out = tuple([pooled_size(*one, ceil_mode) for one in zip(sizes, kernel, stride, padding, dilation, strict=True)])
    padded = _padded(x, 0, out, kernel, stride, padding, dilation)
    best, taps = np.zeros((*x.shape[:2], *out), x.dtype), np.zeros((*x.shape[:2], *out), tap_dtype(kernel).numpy)
    found: Any = np.zeros(out, bool)
    starts = [grid * s - low for grid, s, (low, _) in zip(np.indices(out, sparse=True), stride, padding, strict=True)]
    for number, (offset, place) in enumerate(_taps(kernel, stride, dilation, out)):
        inside: Any = True
        for start, shift, size in zip(starts, offset, sizes, strict=True):
            inside = inside & (start + shift >= 0) & (start + shift < size)
        value = padded[place]
        better = inside & (~found | (value > best) | (value != value))
        np.copyto(best, value, where=better)
        np.copyto(taps, number, where=better)
        found = found | inside
    return best, taps


def _infer_max_pool_grad(gradient: TensorType, taps: TensorType, *, input_shape: Ints, kernel: Ints,
                         **_: Any) -> TensorType:
    require_same("max_pool_grad", gradient, taps.with_dtype(gradient.dtype))
    return gradient.with_shape(tuple(input_shape))


def _max_pool_grad(gradient: np.ndarray, taps: np.ndarray, *, input_shape: Ints, kernel: Ints, stride: Ints,
                   padding: Padding, dilation: Ints) -> np.ndarray:
    out, nothing = gradient.shape[2:], gradient.dtype.type(0)
    total = np.array(_padded(np.zeros(input_shape, gradient.dtype), 0, out, kernel, stride, padding, dilation))
    for number, (_, place) in enumerate(_taps(kernel, stride, dilation, out)):
        total[place] += np.where(taps == number, gradient, nothing)
    return np.ascontiguousarray(total[_image(input_shape, padding)])


def _infer_max_pool_gather(x: TensorType, taps: TensorType, **_: Any) -> TensorType:
    if x.ndim != taps.ndim or x.shape[:2] != taps.shape[:2]:
        raise complain(ShapeError, "max_pool_gather", f"taps {taps} do not belong to x {x}")
    return x.with_shape(taps.shape)


def _max_pool_gather(x: np.ndarray, taps: np.ndarray, *, kernel: Ints, stride: Ints, padding: Padding,
                     dilation: Ints) -> np.ndarray:
    out, result = taps.shape[2:], np.zeros(taps.shape, x.dtype)
    padded = _padded(x, 0, out, kernel, stride, padding, dilation)
    for number, (_, place) in enumerate(_taps(kernel, stride, dilation, out)):
        np.copyto(result, padded[place], where=taps == number)
    return result


max_pool: Op = register(Op(
    "max_pool", ("x",), _infer_max_pool, checked_first(_infer_max_pool, _max_pool), "window", outputs=2,
    vjp=(lambda g0, out1, x_type, kernel, stride, padding, dilation: ops.max_pool_grad(
        g0, out1, input_shape=x_type.shape, kernel=kernel, stride=stride, padding=padding, dilation=dilation),),
    doc="Largest element of every window (nan if there is one), and the number of its tap."))
max_pool_grad: Op = register(Op(
    "max_pool_grad", ("gradient", "taps"), _infer_max_pool_grad, in_float32(_max_pool_grad), "window",
    vjp=(lambda g, taps, kernel, stride, padding, dilation: ops.max_pool_gather(
        g, taps, kernel=kernel, stride=stride, padding=padding, dilation=dilation), None),
    doc="Zeros of `input_shape` with the `gradient` of every window added at that of its `taps`."))
max_pool_gather: Op = register(Op(
    "max_pool_gather", ("x", "taps"), _infer_max_pool_gather, _max_pool_gather, "window",
    vjp=(lambda g, taps, x_type, kernel, stride, padding, dilation: ops.max_pool_grad(
        g, taps, input_shape=x_type.shape, kernel=kernel, stride=stride, padding=padding, dilation=dilation), None),
    doc="The element of x at that of the `taps` of every window."))

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
