"""Pooling over one, two and three dimensions: maxima, their inverse, means, norms, and as many windows as are asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int64
from jitgrad.errors import OutOfRangeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Tensor,
    describe,
    from_array,
    is_number,
    require_floating,
    require_shape,
    size,
    widened,
)
from jitgrad.functional.window import Ints, Sizes, apply_matrices, batched, both_sides, flattened, per_dimension
from jitgrad.ops.builders import broadcast, expand_dims, full
from jitgrad.ops.window import window_places

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d", "lp_pool3d", "max_pool1d",
    "max_pool2d", "max_pool3d", "max_unpool1d", "max_unpool2d", "max_unpool3d",
]

# maxima

def max_pool1d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """The largest of each window of [N, C, L]; with `return_indices` also where it stands."""
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """The largest of each window of [N, C, H, W]; with `return_indices` also where it stands in its H x W plane."""
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@casts(cpu="full")
def max_pool3d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """The largest of each window of [N, C, D, H, W]; with `return_indices` also where it stands in its volume."""
    return _max_pool("max_pool3d", 3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _max_pool(op: str, dims: int, x: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes,
              ceil_mode: bool, return_indices: bool) -> Any:
    images, restore = batched(op, x, dims)
    window, steps, border = _windows(op, dims, kernel, stride, padding)
    windows = {"kernel": window, "stride": steps, "padding": both_sides(border),
               "dilation": per_dimension(op, "dilation", dilation, dims)}
    values, taps = ops.max_pool(images, **windows, ceil_mode=bool(ceil_mode))
    return (restore(values), restore(_indices(taps, images, windows))) if return_indices else restore(values)


def _indices(taps: Tensor, images: Tensor, windows: dict[str, Any]) -> Tensor:
    """i64: where the `taps` of windows stand in their planes."""
    of_window, of_tap = window_places(tuple(images.shape[2:]), tuple(taps.shape[2:]), **windows)
    shift = ops.take(from_array(of_tap), ops.cast(taps, dtype=int64), axis=0)
    return ops.add(shift, broadcast(from_array(of_window), shift.shape))


def _windows(op: str, dims: int, kernel: Sizes, stride: Sizes | None, padding: Sizes) -> tuple[Ints, Ints, Ints]:
    """Kernel, stride (by default the kernel) and padding for each dimension."""
    window = per_dimension(op, "kernel_size", kernel, dims)
    given = stride is not None and stride != () and stride != []
    steps = per_dimension(op, "stride", stride, dims) if given else window
    return window, steps, per_dimension(op, "padding", padding, dims)


@casts(cpu="full")
def max_unpool1d(input: Tensor, indices: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
                 output_size: Sequence[int] | None = None) -> Tensor:
    """Zeros [N, C, L'] in which the elements of `input` [N, C, L] stand at their `indices` of `max_pool1d`."""
    return _max_unpool("max_unpool1d", 1, input, indices, kernel_size, stride, padding, output_size)


@casts(cpu="full")
def max_unpool2d(input: Tensor, indices: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
                 output_size: Sequence[int] | None = None) -> Tensor:
    """Zeros [N, C, H', W'] in which the elements of `input` [N, C, H, W] stand at their `indices` of `max_pool2d`."""
    return _max_unpool("max_unpool2d", 2, input, indices, kernel_size, stride, padding, output_size)


@casts(cpu="full")
def max_unpool3d(input: Tensor, indices: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
                 output_size: Sequence[int] | None = None) -> Tensor:
    """Zeros [N, C, D', H', W'] in which the elements of `input` [N, C, D, H, W] stand at their `indices` of
    `max_pool3d`."""
    return _max_unpool("max_unpool3d", 3, input, indices, kernel_size, stride, padding, output_size)


def _max_unpool(op: str, dims: int, x: Tensor, indices: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes,
                output_size: Sequence[int] | None) -> Tensor:
    require_shape(op, tuple(x.shape) == tuple(indices.shape),
                  f"input and indices differ in shape: {describe(x)} and {describe(indices)}")
    images, restore = batched(op, x, dims)
    sizes = _unpooled_sizes(op, images.shape[2:], _windows(op, dims, kernel, stride, padding), output_size)
    planes = full((*images.shape[:2], size(sizes)), 0.0, x.dtype)
    filled = ops.scatter(planes, flattened(batched(op, indices, dims)[0]), flattened(images), axis=2)
    return restore(ops.reshape(filled, shape=(*images.shape[:2], *sizes)))


def _unpooled_sizes(op: str, sizes: Sequence[int], windows: tuple[Ints, Ints, Ints],
                    output_size: Sequence[int] | None) -> Ints:
    """The sizes before pooling. They are known up to a stride; `output_size`, with or without N and C, says them."""
    usual = tuple([(n - 1) * s + k - 2 * p for n, k, s, p in zip(sizes, *windows)])
    if output_size is None:
        return usual
    wanted = tuple([int(n) for n in output_size])
    wanted = wanted[2:] if len(wanted) == len(usual) + 2 else wanted
    near = [u - s < w < u + s for w, u, s in zip(wanted, usual, windows[1])]
    require_shape(op, len(wanted) == len(usual) and all(near),
                  f"output_size {tuple(output_size)} is not within a stride {windows[1]} of {usual}")
    return wanted


# means

def avg_pool1d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:
    """The mean of each window of [N, C, L]."""
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None) -> Tensor:
    """The mean of each window of [N, C, H, W], or its sum divided by `divisor_override`."""
    return _avg_pool("avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                     divisor_override)


@casts(cpu="full")
def avg_pool3d(input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None) -> Tensor:
    """The mean of each window of [N, C, D, H, W], or its sum divided by `divisor_override`."""
    return _avg_pool("avg_pool3d", 3, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                     divisor_override)


def _avg_pool(op: str, dims: int, x: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes, ceil_mode: bool,
              count_include_pad: bool, divisor: int | None = None) -> Tensor:
    require_shape(op, divisor != 0, "divisor_override must not be 0")
    images, restore = batched(op, x, dims)
    window, steps, border = _windows(op, dims, kernel, stride, padding)
    return restore(ops.avg_pool(images, kernel=window, stride=steps, padding=both_sides(border),
                                count_include_pad=bool(count_include_pad), divisor=int(divisor or 0),
                                ceil_mode=bool(ceil_mode)))


# norms

def lp_pool1d(input: Tensor, norm_type: float, kernel_size: Sizes, stride: Sizes | None = None,
              ceil_mode: bool = False) -> Tensor:
    """The `norm_type`-norm of each window of [N, C, L]: the root of the sum of its powers."""
    return _lp_pool(avg_pool1d, 1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(input: Tensor, norm_type: float, kernel_size: Sizes, stride: Sizes | None = None,
              ceil_mode: bool = False) -> Tensor:
    """The `norm_type`-norm of each window of [N, C, H, W]: the root of the sum of its powers."""
    return _lp_pool(avg_pool2d, 2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(input: Tensor, norm_type: float, kernel_size: Sizes, stride: Sizes | None = None,
              ceil_mode: bool = False) -> Tensor:
    """The `norm_type`-norm of each window of [N, C, D, H, W]: the root of the sum of its powers."""
    return _lp_pool(avg_pool3d, 3, input, norm_type, kernel_size, stride, ceil_mode)


def _lp_pool(average: Callable[..., Tensor], dims: int, x: Tensor, norm_type: float, kernel: Sizes,
             stride: Sizes | None, ceil_mode: bool) -> Tensor:
    """As in PyTorch, windows that stick out weigh as much as whole ones."""
    powers = ops.pow(x, full(x.shape, float(norm_type), x.dtype))
    means = average(powers, kernel, stride, 0, ceil_mode)
    count = math.prod(per_dimension(f"lp_pool{dims}d", "kernel_size", kernel, dims))
    total = ops.mul(means, full(means.shape, float(count), means.dtype))
    return ops.pow(total, full(total.shape, 1.0 / norm_type, total.dtype))


# as many windows as are asked for: window k of n elements in t windows is k * n // t … ceil((k + 1) * n / t)

def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Means of windows chosen so that there are `output_size` of them."""
    return _adaptive_avg_pool("adaptive_avg_pool1d", 1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means of windows chosen so that there are `output_size` of them; None keeps a size."""
    return _adaptive_avg_pool("adaptive_avg_pool2d", 2, input, output_size)


@casts(cpu="full")
def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Means of windows chosen so that there are `output_size` of them; None keeps a size."""
    return _adaptive_avg_pool("adaptive_avg_pool3d", 3, input, output_size)


def _adaptive_avg_pool(op: str, dims: int, x: Tensor, output_size: Any) -> Tensor:
    images, restore = batched(op, require_floating(op, x), dims)
    return restore(adaptive_mean(images, _target(op, images.shape[2:], output_size)))


def _target(op: str, sizes: Sequence[int], output_size: Any) -> Ints:
    given = (output_size,) * len(sizes) if output_size is None or is_number(output_size) else tuple(output_size)
    given = given * len(sizes) if len(given) == 1 else given
    require_shape(op, len(given) == len(sizes) and all(wanted is None or int(wanted) > 0 for wanted in given),
                  f"output_size={output_size} needs a positive number, or one for each of {len(sizes)} dimension(s)")
    return tuple([n if wanted is None else int(wanted) for n, wanted in zip(sizes, given)])


def adaptive_mean(images: Tensor, target: Sequence[int]) -> Tensor:
    """[N, C, *sizes] -> [N, C, *target]. Equal windows are ordinary pooling, one window is a mean; others are averaged by
    a matrix for each dimension."""
    sizes = images.shape[2:]
    if all(t == 1 for t in target):
        return _mean_of_planes(images)
    if all(n % t == 0 for n, t in zip(sizes, target)):
        kernel = tuple([n // t for n, t in zip(sizes, target)])
        return ops.avg_pool(images, kernel=kernel, stride=kernel, padding=both_sides((0,) * len(kernel)),
                            count_include_pad=True, divisor=0, ceil_mode=False)
    return _averaged(images, [_averaging_matrix(n, t) for n, t in zip(sizes, target)])


@widened
def _mean_of_planes(images: Tensor) -> Tensor:
    axes = tuple(range(2, len(images.shape)))
    total = ops.sum(images, axes=axes)
    count = float(size(images.shape[2:]))
    return expand_dims(ops.div(total, full(total.shape, count, total.dtype)), axes)


@widened
def _averaged(images: Tensor, matrices: Sequence[np.ndarray]) -> Tensor:
    return apply_matrices(images, matrices)


def _window_bounds(extent: int, count: int) -> list[tuple[int, int]]:
    return [(k * extent // count, -(-(k + 1) * extent // count)) for k in range(count)]


def _averaging_matrix(extent: int, count: int) -> np.ndarray:
    matrix = np.zeros((count, extent))
    for k, (begin, end) in enumerate(_window_bounds(extent, count)):
        matrix[k, begin:end] = 1.0 / (end - begin)
    return matrix


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of windows chosen so that there are `output_size` of them; with `return_indices` also where they stand."""
    return _adaptive_max_pool("adaptive_max_pool1d", 1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of windows chosen so that there are `output_size` of them (None keeps a size); with `return_indices` also
    where they stand in their plane."""
    return _adaptive_max_pool("adaptive_max_pool2d", 2, input, output_size, return_indices)


@casts(cpu="full")
def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of windows chosen so that there are `output_size` of them (None keeps a size); with `return_indices` also
    where they stand in their volume."""
    return _adaptive_max_pool("adaptive_max_pool3d", 3, input, output_size, return_indices)


def _adaptive_max_pool(op: str, dims: int, x: Tensor, output_size: Any, return_indices: bool) -> Any:
    images, restore = batched(op, x, dims)
    sizes = images.shape[2:]
    target = _target(op, sizes, output_size)
    if 0 in sizes:
        raise complain(OutOfRangeError, op, f"there is no maximum of nothing: {describe(x)}")
    if all(n % t == 0 for n, t in zip(sizes, target)):
        kernel = tuple([n // t for n, t in zip(sizes, target)])
        return _max_pool(op, dims, x, kernel, None, 0, 1, False, return_indices)
    values, indices = _maxima_at(images, _adaptive_places(sizes, target), target)
    return (restore(values), restore(indices)) if return_indices else restore(values)


def _adaptive_places(sizes: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """i64 [windows, elements]: where the elements of each window lie in its plane. Smaller windows end with their first
    element again, which changes neither the maximum nor its first place."""
    grid = np.arange(size(sizes)).reshape(sizes)
    bounds = [_window_bounds(n, t) for n, t in zip(sizes, target)]
    windows = [grid[tuple([slice(*pair) for pair in pairs])].reshape(-1) for pairs in itertools.product(*bounds)]
    widest = max(map(len, windows))
    return np.array([np.concatenate((w, np.repeat(w[:1], widest - len(w)))) for w in windows])


def _maxima_at(images: Tensor, places: np.ndarray, target: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest of each row of `places`, and at which of them it stands."""
    flat, where = flattened(images), from_array(places)
    within = expand_dims(ops.argmax(ops.take(flat, where, axis=2), axis=3), (3,))
    table = ops.broadcast_to(expand_dims(where, (0, 1)), shape=(*images.shape[:2], *places.shape))
    indices = ops.reshape(ops.gather(table, within, axis=3), shape=(*images.shape[:2], len(places)))
    values, shape = ops.gather(flat, indices, axis=2), (*images.shape[:2], *target)
    return ops.reshape(values, shape=shape), ops.reshape(indices, shape=shape)
