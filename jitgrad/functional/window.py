"""Convolution, pooling and resampling of images ``[N, C, H, W]`` and sequences ``[N, C, L]``; the batch dimension may
be missing, as in PyTorch.

A sequence is an image of height 1. Sizes are one number for all dimensions or one for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import ShapeError, complain
from jitgrad.functional.core import (
    Tensor,
    cast,
    describe,
    from_array,
    is_number,
    require_floating,
    require_shape,
    unknown_choice,
    widened,
)
from jitgrad.functional.padding import pad
from jitgrad.functional.shape import section
from jitgrad.ops.builders import broadcast, expand_dims

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "avg_pool1d",
    "avg_pool2d", "channel_shuffle", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d",
    "interpolate", "lp_pool2d", "max_pool1d", "max_pool2d", "pixel_shuffle", "pixel_unshuffle", "unfold",
]

Sizes = int | Sequence[int]
Pair = tuple[int, int]


def _numbers(value: Sizes, count: int) -> tuple[int, ...]:
    """One number for each of `count` dimensions."""
    if is_number(value):
        return (int(value),) * count  # type: ignore[arg-type]
    given = tuple([int(v) for v in value])  # type: ignore[union-attr]
    return given * count if len(given) == 1 else given


def _as_images(op: str, x: Tensor, dims: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`x` as [N, C, H, W], and how a result of that form gets the dimensions that `x` has."""
    if len(x.shape) not in (dims + 1, dims + 2):
        raise complain(ShapeError, op, f"expected {dims + 1} or {dims + 2} dimensions, got {describe(x)}")
    batched = len(x.shape) == dims + 2
    if batched and dims == 2:
        return x, lambda y: y
    images = x if batched else expand_dims(x, (0,))
    images = images if dims == 2 else expand_dims(images, (2,))

    def restore(y: Tensor) -> Tensor:
        n, c, height, width = y.shape
        inner = (height, width) if dims == 2 else (width,)
        return ops.reshape(y, shape=(n, c, *inner) if batched else (c, *inner))

    return images, restore


def _for_images(value: Sizes, dims: int, height: int) -> Pair:
    """Sizes for (H, W): a sequence has `height` along H."""
    numbers = _numbers(value, dims)
    return (height, *numbers) if dims == 1 else numbers  # type: ignore[return-value]


# convolution

def conv1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Any = 0,
           dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of [N, C, L] with `weight` [O, C / groups, k], plus `bias` [O]. `padding` is a number, "same"
    or "valid"."""
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Any = 0,
           dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of [N, C, H, W] with `weight` [O, C / groups, kh, kw], plus `bias` [O]. `padding` is a
    number, a pair, "same" or "valid"."""
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def _convolution(op: str, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Any,
                 dilation: Sizes, groups: int) -> Tensor:
    images, restore = _as_images(op, x, dims)
    kernel = weight if dims == 2 else expand_dims(weight, (2,))
    steps, spread = _for_images(stride, dims, 1), _for_images(dilation, dims, 1)
    sides = _padding(op, padding, dims, kernel.shape[2:], spread, steps)
    result = ops.convolution(images, kernel, stride=steps, padding=sides, dilation=spread, groups=groups)
    return restore(_with_bias(result, bias))


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    return ops.add(x, broadcast(ops.reshape(bias, shape=(1, bias.shape[0], 1, 1)), x.shape))


def _padding(op: str, padding: Any, dims: int, kernel: Sequence[int], dilation: Pair,
             stride: Pair) -> tuple[Pair, Pair]:
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        require_shape(op, stride == (1, 1), "padding='same' is not possible with a stride")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return tuple([(t // 2, t - t // 2) for t in totals])  # type: ignore[return-value]
    if isinstance(padding, str):
        raise unknown_choice(op, "padding", padding, ("valid", "same"))
    height, width = _for_images(padding, dims, 0)
    return (height, height), (width, width)


def conv_transpose1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0,
                     output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1) -> Tensor:
    """The transpose (gradient) of `conv1d`: [N, C, L] with `weight` [C, O / groups, k]."""
    return _transposed("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0,
                     output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1) -> Tensor:
    """The transpose (gradient) of `conv2d`: [N, C, H, W] with `weight` [C, O / groups, kh, kw]."""
    return _transposed("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _transposed(op: str, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes,
                output_padding: Sizes, groups: int, dilation: Sizes) -> Tensor:
    images, restore = _as_images(op, x, dims)
    kernel = weight if dims == 2 else expand_dims(weight, (2,))
    steps, spread = _for_images(stride, dims, 1), _for_images(dilation, dims, 1)
    border, extra = _for_images(padding, dims, 0), _for_images(output_padding, dims, 0)
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in
             zip(images.shape[2:], steps, border, spread, kernel.shape[2:], extra)]
    result = ops.convolution_input_grad(
        images, kernel, input_shape=(images.shape[0], kernel.shape[1] * groups, *sizes), stride=steps,
        padding=tuple([(p, p) for p in border]), dilation=spread, groups=groups)
    return restore(_with_bias(result, bias))


# pooling

def max_pool1d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """The largest of each window of [N, C, L]; with `return_indices` also where it stands."""
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """The largest of each window of [N, C, H, W]; with `return_indices` also where it stands in its H x W plane."""
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _sides(padding: Pair) -> tuple[Pair, Pair]:
    return (padding[0], padding[0]), (padding[1], padding[1])


def _max_pool(op: str, dims: int, x: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes,
              ceil_mode: bool, return_indices: bool) -> Any:
    images, restore = _as_images(op, x, dims)
    values, indices = ops.max_pool2d(
        images, kernel=_for_images(kernel, dims, 1), stride=_for_images(kernel if stride is None else stride, dims, 1),
        padding=_sides(_for_images(padding, dims, 0)), dilation=_for_images(dilation, dims, 1),
        ceil_mode=bool(ceil_mode))
    return (restore(values), restore(indices)) if return_indices else restore(values)


def avg_pool1d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:
    """The mean of each window of [N, C, L]."""
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:
    """The mean of each window of [N, C, H, W]."""
    return _avg_pool("avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def _avg_pool(op: str, dims: int, x: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes, ceil_mode: bool,
              count_include_pad: bool) -> Tensor:
    images, restore = _as_images(op, x, dims)
    return restore(ops.avg_pool2d(
        images, kernel=_for_images(kernel, dims, 1), stride=_for_images(kernel if stride is None else stride, dims, 1),
        padding=_sides(_for_images(padding, dims, 0)), count_include_pad=bool(count_include_pad),
        ceil_mode=bool(ceil_mode)))


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Means of windows chosen so that there are `output_size` of them."""
    images, restore = _as_images("adaptive_avg_pool1d", input, 1)
    return restore(_adaptive_mean(images, (1, *_numbers(output_size, 1))))


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means of windows chosen so that there are `output_size` of them; None keeps a size."""
    images, restore = _as_images("adaptive_avg_pool2d", input, 2)
    return restore(_adaptive_mean(images, _target(images, output_size)))


def _target(images: Tensor, output_size: Any) -> tuple[int, ...]:
    given = (output_size, output_size) if output_size is None or is_number(output_size) else tuple(output_size)
    return tuple([n if wanted is None else int(wanted) for n, wanted in zip(images.shape[2:], given)])


def _adaptive_mean(images: Tensor, target: Sequence[int]) -> Tensor:
    """Equal windows are ordinary pooling, one window is a mean; others are averaged by a matrix for each dimension."""
    sizes = images.shape[2:]
    require_floating("adaptive_avg_pool", images)
    if all(t == 1 for t in target):
        return _mean_of_planes(images)
    if all(n % t == 0 for n, t in zip(sizes, target)):
        kernel = tuple([n // t for n, t in zip(sizes, target)])
        return ops.avg_pool2d(images, kernel=kernel, stride=kernel, padding=((0, 0), (0, 0)), count_include_pad=True,
                              ceil_mode=False)
    rows, columns = (_averaging_matrix(n, t, images.dtype) for n, t in zip(sizes, target))
    return _apply_matrices(images, rows, columns)


@widened
def _mean_of_planes(images: Tensor) -> Tensor:
    total = ops.sum(images, axes=(2, 3))
    count = float(images.shape[2] * images.shape[3])
    return expand_dims(ops.div(total, ops.full(total.shape, count, total.dtype)), (2, 3))


def _window_bounds(extent: int, count: int) -> list[Pair]:
    return [(k * extent // count, -(-(k + 1) * extent // count)) for k in range(count)]


def _averaging_matrix(extent: int, count: int, dtype: Any) -> Tensor:
    matrix = np.zeros((count, extent))
    for k, (begin, end) in enumerate(_window_bounds(extent, count)):
        matrix[k, begin:end] = 1.0 / (end - begin)
    return from_array(matrix.astype(dtype.numpy))


def _apply_matrices(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ plane @ columns.T`` for every plane."""
    n, c, height, width = images.shape
    wide = ops.matmul(ops.reshape(images, shape=(n * c * height, width)), ops.permute(columns, axes=(1, 0)))
    planes = ops.reshape(wide, shape=(n * c, height, columns.shape[0]))
    tall = ops.matmul(broadcast(rows, (n * c, *rows.shape)), planes)
    return ops.reshape(tall, shape=(n, c, rows.shape[0], columns.shape[0]))


def adaptive_max_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Maxima of windows chosen so that there are `output_size` of them."""
    images, restore = _as_images("adaptive_max_pool1d", input, 1)
    return restore(_adaptive_max(images, (1, *_numbers(output_size, 1))))


def adaptive_max_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Maxima of windows chosen so that there are `output_size` of them; None keeps a size."""
    images, restore = _as_images("adaptive_max_pool2d", input, 2)
    return restore(_adaptive_max(images, _target(images, output_size)))


def _adaptive_max(images: Tensor, target: Sequence[int]) -> Tensor:
    for axis, count in ((2, target[0]), (3, target[1])):
        windows = [section(images, axis, begin, end) for begin, end in _window_bounds(images.shape[axis], count)]
        images = ops.concat(*[expand_dims(ops.max(w, axes=(axis,)), (axis,)) for w in windows], axis=axis)
    return images


def lp_pool2d(input: Tensor, norm_type: float, kernel_size: Sizes, stride: Sizes | None = None,
              ceil_mode: bool = False) -> Tensor:
    """The `norm_type`-norm of each window of [N, C, H, W]."""
    powers = ops.pow(ops.abs(input), ops.full(input.shape, float(norm_type), input.dtype))
    count = math.prod(_numbers(kernel_size, 2))
    means = avg_pool2d(powers, kernel_size, stride, 0, ceil_mode)
    total = ops.mul(means, ops.full(means.shape, float(count), means.dtype))
    return ops.pow(total, ops.full(total.shape, 1.0 / norm_type, total.dtype))


# windows as columns

def unfold(input: Tensor, kernel_size: Sizes, dilation: Sizes = 1, padding: Sizes = 0, stride: Sizes = 1) -> Tensor:
    """The windows of [N, C, H, W] as columns: [N, C * kh * kw, number of windows]."""
    images, _ = _as_images("unfold", input, 2)
    kernel, spread = _numbers(kernel_size, 2), _numbers(dilation, 2)
    border, steps = _numbers(padding, 2), _numbers(stride, 2)
    padded = pad(images, (border[1], border[1], border[0], border[0]))
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(padded.shape[2:], spread, kernel, steps)]
    parts = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = section(padded, 2, i * spread[0], i * spread[0] + (counts[0] - 1) * steps[0] + 1, steps[0])
            part = section(rows, 3, j * spread[1], j * spread[1] + (counts[1] - 1) * steps[1] + 1, steps[1])
            parts.append(expand_dims(part, (2,)))
    n, c = images.shape[:2]
    columns = ops.reshape(ops.concat(*parts, axis=2), shape=(n, c * len(parts), counts[0] * counts[1]))
    return columns if len(input.shape) == 4 else ops.reshape(columns, shape=columns.shape[1:])


# resampling

def interpolate(input: Tensor, size: Sizes | None = None, scale_factor: Any = None, mode: str = "nearest",
                align_corners: bool | None = None) -> Tensor:
    """[N, C, H, W] or [N, C, L] resampled to `size`, or by `scale_factor`. `mode` is nearest, nearest-exact, linear
    (sequences), bilinear (images) or area."""
    dims = len(input.shape) - 2
    require_shape("interpolate", dims in (1, 2), f"expected [N, C, L] or [N, C, H, W], got {describe(input)}")
    require_shape("interpolate", (size is None) != (scale_factor is None), "give either size or scale_factor")
    target, scales = _resampled(input, dims, size, scale_factor)
    if mode in ("nearest", "nearest-exact"):
        for k, (count, scale) in enumerate(zip(target, scales)):
            input = _nearest(input, 2 + k, count, scale, 0.5 if mode == "nearest-exact" else 0.0)
        return input
    if mode == "area":
        return adaptive_avg_pool1d(input, target) if dims == 1 else adaptive_avg_pool2d(input, target)
    if mode not in ("linear", "bilinear"):
        raise unknown_choice("interpolate", "mode", mode, ("nearest", "nearest-exact", "linear", "bilinear", "area"))
    images, restore = _as_images("interpolate", input, dims)
    matrices = [_linear_matrix(n, count, scale, bool(align_corners), input.dtype)
                for n, count, scale in zip(input.shape[2:], target, scales)]
    if dims == 1:
        matrices.insert(0, from_array(np.ones((1, 1), input.dtype.numpy)))
    return restore(_apply_matrices(images, *matrices))


def _resampled(x: Tensor, dims: int, size: Sizes | None, scale_factor: Any) -> tuple[list[int], list[float]]:
    """For each dimension its new size, and how far apart the new places are in the old ones."""
    sizes = x.shape[2:]
    if size is not None:
        target = list(_numbers(size, dims))
        return target, [n / t for n, t in zip(sizes, target)]
    factors = [float(scale_factor)] * dims if is_number(scale_factor) else [float(f) for f in scale_factor]
    return [math.floor(n * f) for n, f in zip(sizes, factors)], [1.0 / f for f in factors]


def _nearest(x: Tensor, axis: int, count: int, scale: float, shift: float) -> Tensor:
    n = x.shape[axis]
    places = np.minimum(np.floor((np.arange(count) + shift) * scale).astype(np.int64), n - 1)
    if count % n == 0 and (places == np.repeat(np.arange(n), count // n)).all():
        grown = broadcast(expand_dims(x, (axis + 1,)), (*x.shape[:axis + 1], count // n, *x.shape[axis + 1:]))
        return ops.reshape(grown, shape=(*x.shape[:axis], count, *x.shape[axis + 1:]))
    return ops.take(x, from_array(places), axis=axis)


def _linear_matrix(extent: int, count: int, scale: float, align_corners: bool, dtype: Any) -> Tensor:
    """[count, extent]: each row holds the weights of the (at most two) neighbours of a new place."""
    steps = np.arange(count, dtype=np.float64)
    if align_corners:
        places = steps * ((extent - 1) / (count - 1) if count > 1 else 0.0)
    else:
        places = np.maximum((steps + 0.5) * scale - 0.5, 0.0)
    left = np.minimum(np.floor(places).astype(np.int64), extent - 1)
    right = np.minimum(left + 1, extent - 1)
    share = np.clip(places - left, 0.0, 1.0)
    matrix = np.zeros((count, extent))
    rows = np.arange(count)
    np.add.at(matrix, (rows, left), 1.0 - share)
    np.add.at(matrix, (rows, right), share)
    return from_array(matrix.astype(dtype.numpy))


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """[*, C * r * r, H, W] -> [*, C, H * r, W * r]."""
    *outer, channels, height, width = input.shape
    r = upscale_factor
    require_shape("pixel_shuffle", channels % (r * r) == 0, f"{channels} channels are no multiple of {r * r}")
    apart = ops.reshape(input, shape=(*outer, channels // (r * r), r, r, height, width))
    k = len(outer)
    mixed = ops.permute(apart, axes=(*range(k), k, k + 3, k + 1, k + 4, k + 2))
    return ops.reshape(mixed, shape=(*outer, channels // (r * r), height * r, width * r))


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """The inverse of `pixel_shuffle`."""
    *outer, channels, height, width = input.shape
    r = downscale_factor
    require_shape("pixel_unshuffle", height % r == 0 and width % r == 0, f"{describe(input)} cannot be divided by {r}")
    apart = ops.reshape(input, shape=(*outer, channels, height // r, r, width // r, r))
    k = len(outer)
    mixed = ops.permute(apart, axes=(*range(k), k, k + 2, k + 4, k + 1, k + 3))
    return ops.reshape(mixed, shape=(*outer, channels * r * r, height // r, width // r))


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Channels of `groups` groups interleaved."""
    n, channels, *rest = input.shape
    apart = ops.reshape(input, shape=(n, groups, channels // groups, *rest))
    mixed = ops.permute(apart, axes=(0, 2, 1, *range(3, len(apart.shape))))
    return ops.reshape(mixed, shape=tuple(input.shape))


def one_hot_positions(indices: Tensor, count: int) -> Tensor:
    """True where the number of the new last dimension is the index: bool [*, count]."""
    shape = (*indices.shape, count)
    numbers = ops.iota(shape=shape, axis=len(indices.shape), dtype=dtypes.int64)
    return ops.eq(numbers, broadcast(expand_dims(cast(indices, dtypes.int64), (len(indices.shape),)), shape))
