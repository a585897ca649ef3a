"""Convolution over one, two and three dimensions, its transpose, and windows as columns (`unfold`, `fold`).

A sequence is handed on as an image of height 1, for which there are kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import Tensor, describe, from_array, require_shape, size, unknown_choice, wide_on_cpu
from jitgrad.functional.padding import pad
from jitgrad.functional.shape import section
from jitgrad.functional.window import Ints, Sizes, batched, both_sides, flattened, per_dimension
from jitgrad.ops.builders import broadcast, expand_dims, full

__all__ = [
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "fold", "unfold",
]

# convolution

@casts(cpu="lower", cuda="lower")
def conv1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Any = 0,
           dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of [N, C, L] with `weight` [O, C / groups, k], plus `bias` [O]. `padding` is a number, "same"
    or "valid"."""
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


@casts(cpu="lower", cuda="lower")
def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Any = 0,
           dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of [N, C, H, W] with `weight` [O, C / groups, kh, kw], plus `bias` [O]. `padding` is a
    number, a pair, "same" or "valid"."""
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


@casts(cpu="lower", cuda="lower")
def conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Any = 0,
           dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of [N, C, D, H, W] with `weight` [O, C / groups, kd, kh, kw], plus `bias` [O]. `padding` is a
    number, three of them, "same" or "valid"."""
    return _convolution("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def _convolution(op: str, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Any,
                 dilation: Sizes, groups: int) -> Tensor:
    images, restore = batched(op, x, dims)
    _check_weight(op, dims, weight, bias, weight.shape[0])
    steps, spread = per_dimension(op, "stride", stride, dims), per_dimension(op, "dilation", dilation, dims)
    sides = _padding(op, padding, weight.shape[2:], spread, steps)
    if dims == 1:
        images, weight = expand_dims(images, (2,)), expand_dims(weight, (2,))
        steps, spread, sides = (1, *steps), (1, *spread), ((0, 0), *sides)
    result = wide_on_cpu(ops.convolution, images, weight, stride=steps, padding=sides, dilation=spread, groups=groups)
    return restore(_without_height(_with_bias(result, bias), dims))


def _check_weight(op: str, dims: int, weight: Tensor, bias: Tensor | None, channels: int) -> None:
    require_shape(op, len(weight.shape) == dims + 2, f"expected a weight of {dims + 2} dimensions, got {describe(weight)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        require_shape(op, False, f"expected a bias of shape [{channels}], got {describe(bias)}")


def _without_height(x: Tensor, dims: int) -> Tensor:
    return ops.reshape(x, shape=(*x.shape[:2], x.shape[3])) if dims == 1 else x


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    inner = (1,) * (len(x.shape) - 2)
    return ops.add(x, broadcast(ops.reshape(bias, shape=(1, bias.shape[0], *inner)), x.shape))


def _padding(op: str, padding: Any, kernel: Sequence[int], dilation: Ints, stride: Ints) -> tuple[tuple[int, int], ...]:
    """Elements before and after, for each dimension."""
    if padding == "valid":
        return both_sides((0,) * len(kernel))
    if padding == "same":
        require_shape(op, all(s == 1 for s in stride), "padding='same' is not possible with a stride")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return tuple([(t // 2, t - t // 2) for t in totals])
    if isinstance(padding, str):
        raise unknown_choice(op, "padding", padding, ("valid", "same"))
    return both_sides(per_dimension(op, "padding", padding, len(kernel)))


# its transpose

@casts(cpu="lower", cuda="lower")
def conv_transpose1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0,
                     output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1) -> Tensor:
    """The transpose (gradient) of `conv1d`: [N, C, L] with `weight` [C, O / groups, k]."""
    return _transposed("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation)


@casts(cpu="lower", cuda="lower")
def conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0,
                     output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1) -> Tensor:
    """The transpose (gradient) of `conv2d`: [N, C, H, W] with `weight` [C, O / groups, kh, kw]."""
    return _transposed("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation)


@casts(cpu="lower", cuda="lower")
def conv_transpose3d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0,
                     output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1) -> Tensor:
    """The transpose (gradient) of `conv3d`: [N, C, D, H, W] with `weight` [C, O / groups, kd, kh, kw]."""
    return _transposed("conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _transposed(op: str, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes,
                output_padding: Sizes, groups: int, dilation: Sizes) -> Tensor:
    images, restore = batched(op, x, dims)
    _check_weight(op, dims, weight, bias, weight.shape[1] * groups)
    require_shape(op, images.shape[1] == weight.shape[0],
                  f"{describe(x)} does not have the {weight.shape[0]} channels of the weight {describe(weight)}")
    steps, spread, border, extra = (
        per_dimension(op, name, value, dims) for name, value in
        (("stride", stride), ("dilation", dilation), ("padding", padding), ("output_padding", output_padding)))
    require_shape(op, all(0 <= e < max(s, d) for e, s, d in zip(extra, steps, spread)),
                  f"output_padding {extra} must be smaller than stride {steps} or dilation {spread}")
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in
             zip(images.shape[2:], steps, border, spread, weight.shape[2:], extra)]
    require_shape(op, min(sizes) > 0, f"the padding {border} leaves nothing of the result of {describe(x)} with "
                                      f"{describe(weight)}: its sizes would be {sizes}")
    # Beyond a stride less one, output_padding is taken from the padding behind, and then is zeros that nothing reaches.
    beyond = [max(e - s + 1, 0) for e, s in zip(extra, steps)]
    sides = tuple([(p, p - min(p, b)) for p, b in zip(border, beyond)])
    unreached = [b - min(p, b) for p, b in zip(border, beyond)]
    sizes = [n - u for n, u in zip(sizes, unreached)]
    if dims == 1:
        images, weight, sizes = expand_dims(images, (2,)), expand_dims(weight, (2,)), [1, *sizes]
        steps, spread, sides = (1, *steps), (1, *spread), ((0, 0), *sides)
    shape = images.shape[0], weight.shape[1] * groups, *sizes
    result = wide_on_cpu(
        ops.convolution_input_grad, images, weight, input_shape=shape, stride=steps,
        padding=sides, dilation=spread, groups=groups)
    if any(unreached):
        result = pad(result, [n for u in reversed(unreached) for n in (0, u)])
    return restore(_without_height(_with_bias(result, bias), dims))


# windows as columns

def unfold(input: Tensor, kernel_size: Sizes, dilation: Sizes = 1, padding: Sizes = 0, stride: Sizes = 1) -> Tensor:
    """The windows of [N, C, H, W] as columns: [N, C * kh * kw, number of windows]."""
    images, restore = batched("unfold", input, 2)
    border = per_dimension("unfold", "padding", padding, 2)
    padded = pad(images, (border[1], border[1], border[0], border[0]))
    places = _window_places("unfold", padded.shape[2:], kernel_size, dilation, stride)
    columns = ops.take(flattened(padded), from_array(places), axis=2)
    return restore(ops.reshape(columns, shape=(images.shape[0], images.shape[1] * len(places), places.shape[1])))


def fold(input: Tensor, output_size: Sizes, kernel_size: Sizes, dilation: Sizes = 1, padding: Sizes = 0,
         stride: Sizes = 1) -> Tensor:
    """Columns [N, C * kh * kw, number of windows] added up where `unfold` takes them from: [N, C, *output_size]."""
    batch = expand_dims(input, (0,)) if len(input.shape) == 2 else input
    require_shape("fold", len(batch.shape) == 3, f"expected [N, C * kh * kw, windows], got {describe(input)}")
    target, border = (per_dimension("fold", name, value, 2) for name, value in
                      (("output_size", output_size), ("padding", padding)))
    sizes = tuple([n + 2 * p for n, p in zip(target, border)])
    places = _window_places("fold", sizes, kernel_size, dilation, stride)
    n, rows, windows = batch.shape
    require_shape("fold", rows % len(places) == 0 and windows == places.shape[1],
                  f"an output of {target} has {places.shape[1]} windows of {len(places)} elements, which {describe(input)} "
                  "does not fit")
    channels = rows // len(places)
    columns = ops.reshape(batch, shape=(n, channels, *places.shape))
    planes = ops.index_add(full((n, channels, size(sizes)), 0.0, input.dtype), from_array(places), columns, axis=2)
    image = ops.reshape(planes, shape=(n, channels, *sizes))
    for axis in (2, 3):
        image = section(image, axis, border[axis - 2], border[axis - 2] + target[axis - 2])
    return ops.reshape(image, shape=(channels, *target)) if len(input.shape) == 2 else image


def _window_places(op: str, sizes: Sequence[int], kernel_size: Sizes, dilation: Sizes, stride: Sizes) -> np.ndarray:
    """i64 [elements of a window, windows]: where each lies in its plane of `sizes`."""
    kernel, spread, steps = (per_dimension(op, name, value, 2) for name, value in
                             (("kernel_size", kernel_size), ("dilation", dilation), ("stride", stride)))
    require_shape(op, min(*kernel, *spread, *steps) > 0,
                  f"kernel_size {kernel}, dilation {spread} and stride {steps} must be at least 1")
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(sizes, spread, kernel, steps)]
    require_shape(op, min(counts) > 0, f"windows of {kernel} with dilation {spread} do not fit into {tuple(sizes)}")
    rows, columns = (np.arange(k)[:, None] * d + np.arange(count) * s
                     for k, d, s, count in zip(kernel, spread, steps, counts))
    places = rows[:, None, :, None] * sizes[1] + columns[:, None, :]
    return np.array(places.reshape(kernel[0] * kernel[1], counts[0] * counts[1]))          # an array of its own
