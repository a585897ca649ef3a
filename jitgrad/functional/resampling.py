"""Resampling: other sizes (`interpolate`), other places (`grid_sample`, `affine_grid`), and channels that become places
(`pixel_shuffle`, `pixel_unshuffle`, `channel_shuffle`).

`interpolate` is a matrix for each dimension, made when it is called: a new place is a weighted sum of old ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Tensor,
    cast,
    describe,
    from_array,
    is_number,
    require_floating,
    require_shape,
    size,
    unknown_choice,
    widened,
)
from jitgrad.functional.elementwise import add, clamp, div, mul, remainder, sub, where
from jitgrad.functional.logic import ge, gt, le
from jitgrad.functional.pooling import adaptive_mean
from jitgrad.functional.shape import section
from jitgrad.functional.window import Sizes, apply_matrices, flattened, per_dimension
from jitgrad.ops.builders import broadcast, expand_dims, full_like

__all__ = [
    "affine_grid", "channel_shuffle", "grid_sample", "interpolate", "pixel_shuffle", "pixel_unshuffle", "upsample",
]

# other sizes

_SMOOTH = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}
"""Interpolating modes and the number of sizes that each is for."""
_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")


@casts(cuda="full")
def interpolate(input: Tensor, size: Sizes | None = None, scale_factor: Any = None, mode: str = "nearest",
                align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
                antialias: bool = False) -> Tensor:
    """[N, C, L], [N, C, H, W] or [N, C, D, H, W] resampled to `size`, or by `scale_factor`. `mode` is nearest,
    nearest-exact, area, linear (sequences), bilinear, bicubic (images) or trilinear (volumes). With `align_corners` the
    centers of the outermost elements stay where they are, otherwise their edges. With `recompute_scale_factor` the
    scale is that of the rounded sizes. `antialias` (bilinear and bicubic) averages where the result is smaller."""
    dims = len(input.shape) - 2
    require_shape("interpolate", dims in (1, 2, 3),
                  f"expected [N, C, L], [N, C, H, W] or [N, C, D, H, W], got {describe(input)}")
    require_shape("interpolate", (size is None) != (scale_factor is None), "give either size or scale_factor")
    _check_mode(mode, dims, align_corners, antialias)
    target, scales = _resampled(input, dims, size, scale_factor, bool(recompute_scale_factor))
    require_shape("interpolate", min(*target, *input.shape[2:]) > 0,
                  f"sizes must be at least 1, got {tuple(target)} for {describe(input)}")
    if mode in ("nearest", "nearest-exact"):
        for k, (count, scale) in enumerate(zip(target, scales)):
            input = _nearest(input, 2 + k, count, scale, 0.5 if mode == "nearest-exact" else 0.0)
        return input
    require_floating("interpolate", input)
    if mode == "area":
        return adaptive_mean(input, target)
    matrix = _antialiased_matrix if antialias else _cubic_matrix if mode == "bicubic" else _linear_matrix
    options = {"cubic": mode == "bicubic"} if antialias else {}
    return _smoothed(input, [matrix(n, count, scale, bool(align_corners), **options)
                             for n, count, scale in zip(input.shape[2:], target, scales)])


def upsample(input: Tensor, size: Sizes | None = None, scale_factor: Any = None, mode: str = "nearest",
             align_corners: bool | None = None) -> Tensor:
    """The old name of `interpolate`."""
    return interpolate(input, size, scale_factor, mode, align_corners)


def _check_mode(mode: str, dims: int, align_corners: bool | None, antialias: bool) -> None:
    if mode not in _MODES:
        raise unknown_choice("interpolate", "mode", mode, _MODES)
    fitting = [name for name, rank in _SMOOTH.items() if rank == dims]
    require_shape("interpolate", _SMOOTH.get(mode, dims) == dims,
                  f"mode={mode!r} is for {_SMOOTH.get(mode)} dimension(s) after N and C, and there are {dims}",
                  fix=f"Did you mean mode={fitting[0]!r}?")
    require_shape("interpolate", align_corners is None or mode in _SMOOTH,
                  f"align_corners means nothing to mode={mode!r}")
    require_shape("interpolate", not antialias or (dims == 2 and mode in _SMOOTH),
                  f"antialias is for mode='bilinear' and 'bicubic', not for {mode!r}")


def _resampled(x: Tensor, dims: int, size: Sizes | None, scale_factor: Any,
               recompute: bool) -> tuple[list[int], list[float]]:
    """For each dimension its new size, and how far apart the new places are in the old ones."""
    sizes = x.shape[2:]
    if size is not None:
        require_shape("interpolate", not recompute, "recompute_scale_factor is for scale_factor, and size is given")
        target = list(per_dimension("interpolate", "size", size, dims))
        return target, [n / max(t, 1) for n, t in zip(sizes, target)]
    factors = [float(scale_factor)] * dims if is_number(scale_factor) else [float(f) for f in scale_factor]
    require_shape("interpolate", len(factors) == dims and min(factors) > 0,
                  f"scale_factor={scale_factor} needs a positive number, or one for each of {dims} dimension(s)")
    target = [math.floor(n * f) for n, f in zip(sizes, factors)]
    return target, [n / max(t, 1) for n, t in zip(sizes, target)] if recompute else [1.0 / f for f in factors]


def _nearest(x: Tensor, axis: int, count: int, scale: float, shift: float) -> Tensor:
    n = x.shape[axis]
    # PyTorch computes places in float32, which shows where they are whole numbers.
    places = np.floor((np.arange(count, dtype=np.float32) + np.float32(shift)) * np.float32(scale)).astype(np.int64)
    places = np.minimum(places, n - 1)
    if count % n == 0 and (places == np.repeat(np.arange(n), count // n)).all():
        grown = broadcast(expand_dims(x, (axis + 1,)), (*x.shape[:axis + 1], count // n, *x.shape[axis + 1:]))
        return ops.reshape(grown, shape=(*x.shape[:axis], count, *x.shape[axis + 1:]))
    return ops.take(x, from_array(places), axis=axis)


@widened
def _smoothed(x: Tensor, matrices: Sequence[np.ndarray]) -> Tensor:
    return apply_matrices(x, matrices)


def _centers(extent: int, count: int, scale: float, align_corners: bool) -> np.ndarray:
    """Where the new elements are in the old ones."""
    steps = np.arange(count, dtype=np.float64)
    if align_corners:
        return steps * ((extent - 1) / (count - 1) if count > 1 else 0.0)
    return (steps + 0.5) * scale - 0.5


def _weight_matrix(extent: int, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[new size, size] from the `weights` [new size, width] of neighbours, `first` and those behind it; those outside are
    the element at the border."""
    count, width = weights.shape
    matrix = np.zeros((count, extent))
    columns = np.clip(first[:, None] + np.arange(width), 0, extent - 1)
    np.add.at(matrix, (np.arange(count)[:, None], columns), weights)
    return matrix


def _linear_matrix(extent: int, count: int, scale: float, align_corners: bool) -> np.ndarray:
    places = np.maximum(_centers(extent, count, scale, align_corners), 0.0)
    left = np.minimum(np.floor(places).astype(np.int64), extent - 1)
    share = np.clip(places - left, 0.0, 1.0)
    return _weight_matrix(extent, left, np.stack([1.0 - share, share], 1))


def _cubic_matrix(extent: int, count: int, scale: float, align_corners: bool) -> np.ndarray:
    places = _centers(extent, count, scale, align_corners)
    left = np.floor(places).astype(np.int64)
    distance = np.abs((places - left)[:, None] - np.arange(-1, 3))
    return _weight_matrix(extent, left - 1, _cubic(distance, -0.75))


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Weights of elements at a `distance` (Keys 1981, cubic convolution with parameter `a`)."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _antialiased_matrix(extent: int, count: int, scale: float, align_corners: bool, cubic: bool) -> np.ndarray:
    """Weights of a triangle, or of a cubic with a = -0.5, as wide as the new elements are apart."""
    if align_corners:
        scale = (extent - 1) / (count - 1) if count > 1 else 0.0
    wide = max(scale, 1.0)
    centers = (np.arange(count) + 0.5) * scale
    reach = (2.0 if cubic else 1.0) * wide
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), extent)
    places = np.arange(extent)
    distance = np.abs((places - centers[:, None] + 0.5) / wide)
    weights = _cubic(distance, -0.5) if cubic else np.maximum(1.0 - distance, 0.0)
    weights = np.where((places >= first[:, None]) & (places < last[:, None]), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


# other places

def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """The grid for `grid_sample` that maps by `theta`: [N, 2, 3] for ``size = (N, C, H, W)`` gives [N, H, W, 2], [N, 3, 4]
    for (N, C, D, H, W) gives [N, D, H, W, 3]. Coordinates go from -1 to 1, x first."""
    sizes = tuple([int(n) for n in size])
    dims = len(sizes) - 2
    fits = dims in (2, 3) and tuple(theta.shape) == (sizes[0], dims, dims + 1) and min(sizes) > 0
    require_shape("affine_grid", fits, f"theta {describe(theta)} does not fit size={sizes}: expected [N, 2, 3] with "
                                       "(N, C, H, W), or [N, 3, 4] with (N, C, D, H, W)")
    require_floating("affine_grid", theta)
    return ops.reshape(_mapped(theta, _base_grid(sizes[2:], bool(align_corners))), shape=(sizes[0], *sizes[2:], dims))


@widened
def _mapped(theta: Tensor, base: np.ndarray) -> Tensor:
    places = from_array(base.astype(theta.dtype.numpy))
    return ops.matmul(broadcast(places, (theta.shape[0], *base.shape)), ops.permute(theta, axes=(0, 2, 1)))


def _base_grid(sizes: Sequence[int], align_corners: bool) -> np.ndarray:
    """[places, dims + 1]: x, y (, z) and 1 of every place."""
    lines = []
    for n in sizes:
        line = np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1)
        lines.append(line if align_corners else line * (n - 1) / n)
    grids = np.meshgrid(*lines, indexing="ij")
    return np.stack([*[g.reshape(-1) for g in reversed(grids)], np.ones(math.prod(sizes))], 1)


@casts(cpu="full", cuda="widest")
def grid_sample(input: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros",
                align_corners: bool | None = None) -> Tensor:
    """`input` [N, C, H, W] (or [N, C, D, H, W]) at the places `grid` [N, H', W', 2] (or [N, D', H', W', 3]): the last
    dimension is x, y (, z), from -1 at the first to 1 at the last element (its center with `align_corners`, otherwise its
    edge). `mode` is bilinear, nearest, or (images) bicubic; `padding_mode` says what is outside: zeros, border or
    reflection."""
    dims = len(input.shape) - 2
    fits = dims in (2, 3) and len(grid.shape) == dims + 2 and grid.shape[-1] == dims and grid.shape[0] == input.shape[0]
    require_shape("grid_sample", fits, f"input {describe(input)} and grid {describe(grid)} do not fit: expected "
                                       "[N, C, H, W] with [N, H', W', 2], or [N, C, D, H, W] with [N, D', H', W', 3]")
    for name, value, legal in (("mode", mode, ("bilinear", "nearest", "bicubic")),
                               ("padding_mode", padding_mode, tuple(_OUTSIDE))):
        if value not in legal:
            raise unknown_choice("grid_sample", name, value, legal)
    require_shape("grid_sample", mode != "bicubic" or dims == 2, "mode='bicubic' is for images [N, C, H, W]")
    require_shape("grid_sample", input.dtype is grid.dtype,
                  f"input and grid differ in dtype: {describe(input)} and {describe(grid)}")
    require_shape("grid_sample", min(input.shape[2:]) > 0, f"there is nothing to sample from in {describe(input)}")
    require_floating("grid_sample", input)
    return _sampled(input, grid, mode, padding_mode, bool(align_corners))


@widened
def _sampled(x: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool) -> Tensor:
    """The weighted sum, over the neighbours of each place, of what `x` holds there."""
    n, c, *sizes = x.shape
    count = size(grid.shape[1:-1])
    places = ops.reshape(grid, shape=(n, count, len(sizes)))
    lines = []
    for axis, extent in enumerate(sizes):
        one = section(places, 2, len(sizes) - 1 - axis, len(sizes) - axis)
        place = _unnormalized(ops.reshape(one, shape=(n, 1, count)), extent, align_corners)
        bring_in = functools.partial(_OUTSIDE[padding_mode], extent=extent, align_corners=align_corners)
        lines.append(_neighbours(place, mode, bring_in))
    values, total = flattened(x), None
    for neighbours in itertools.product(*lines):
        part = _weighed(values, neighbours, sizes)
        total = part if total is None else ops.add(total, part)
    return ops.reshape(total, shape=(n, c, *grid.shape[1:-1]))


def _unnormalized(place: Tensor, extent: int, align_corners: bool) -> Tensor:
    """From -1 … 1 to elements."""
    if align_corners:
        return mul(add(place, 1.0), (extent - 1) / 2)
    return div(sub(mul(add(place, 1.0), float(extent)), 1.0), 2.0)


def _clipped(place: Tensor, extent: int, align_corners: bool) -> Tensor:
    return clamp(place, 0.0, float(extent - 1))


def _reflected(place: Tensor, extent: int, align_corners: bool) -> Tensor:
    """Reflected at the centers (or edges) of the outermost elements as often as needed."""
    low, span = (0.0, extent - 1.0) if align_corners else (-0.5, float(extent))
    if span == 0:
        return mul(place, 0.0)
    within = remainder(sub(place, low), 2 * span)
    folded = add(where(gt(within, span), sub(2 * span, within), within), low)
    return _clipped(folded, extent, align_corners)


_OUTSIDE: dict[str, Callable[..., Tensor]] = {
    "zeros": lambda place, extent, align_corners: place, "border": _clipped, "reflection": _reflected}


def _neighbours(place: Tensor, mode: str, bring_in: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Along one dimension, pairs of a place (a whole number, as a float) and its weight. Outside of the input, a place is
    brought in; in bicubic mode every neighbour by itself."""
    if mode == "bicubic":
        low = ops.floor(place)
        distances = [(add(low, float(k)), ops.abs(sub(sub(place, low), float(k)))) for k in range(-1, 3)]
        return [(bring_in(p), _cubic_weight(d, near=k in (1, 2))) for k, (p, d) in enumerate(distances)]
    place = bring_in(place)
    if mode == "nearest":
        return [(ops.round(place), None)]
    low = ops.floor(place)
    share = sub(place, low)
    return [(low, sub(1.0, share)), (add(low, 1.0), share)]


def _cubic_weight(distance: Tensor, near: bool) -> Tensor:
    """`_cubic` with a = -0.75 for a distance up to 1 (`near`) or from 1 to 2."""
    a = -0.75
    if near:
        return add(mul(mul(sub(mul(distance, a + 2), a + 3), distance), distance), 1.0)
    return sub(mul(mul(add(mul(sub(distance, 5.0), distance), 8.0), distance), a), 4 * a)


def _weighed(values: Tensor, neighbours: Sequence[tuple[Tensor, Tensor | None]], sizes: Sequence[int]) -> Tensor:
    """What stands at a combination of places along all dimensions, times the weights; 0 outside."""
    index: Tensor = None
    inside: Tensor = None
    weight: Tensor = None
    for (place, share), extent in zip(neighbours, sizes):
        here = ops.bitwise_and(ge(place, 0.0), le(place, float(extent - 1)))
        step = cast(where(here, place, 0.0), dtypes.int64)
        index = step if index is None else add(mul(index, extent), step)
        inside = here if inside is None else ops.bitwise_and(inside, here)
        weight = share if weight is None else weight if share is None else ops.mul(weight, share)
    shape = (*values.shape[:2], index.shape[2])
    taken = ops.gather(values, broadcast(index, shape), axis=2)
    part = taken if weight is None else ops.mul(taken, broadcast(weight, shape))
    return ops.where(broadcast(inside, shape), part, full_like(part, 0.0))


# channels and places

def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """[*, C * r * r, H, W] -> [*, C, H * r, W * r]."""
    _check_image("pixel_shuffle", input, upscale_factor)
    *outer, channels, height, width = input.shape
    r = upscale_factor
    require_shape("pixel_shuffle", channels % (r * r) == 0, f"{channels} channels are no multiple of {r * r}")
    apart = ops.reshape(input, shape=(*outer, channels // (r * r), r, r, height, width))
    k = len(outer)
    mixed = ops.permute(apart, axes=(*range(k), k, k + 3, k + 1, k + 4, k + 2))
    return ops.reshape(mixed, shape=(*outer, channels // (r * r), height * r, width * r))


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """The inverse of `pixel_shuffle`."""
    _check_image("pixel_unshuffle", input, downscale_factor)
    *outer, channels, height, width = input.shape
    r = downscale_factor
    require_shape("pixel_unshuffle", height % r == 0 and width % r == 0, f"{describe(input)} cannot be divided by {r}")
    apart = ops.reshape(input, shape=(*outer, channels, height // r, r, width // r, r))
    k = len(outer)
    mixed = ops.permute(apart, axes=(*range(k), k, k + 2, k + 4, k + 1, k + 3))
    return ops.reshape(mixed, shape=(*outer, channels * r * r, height // r, width // r))


def _check_image(op: str, x: Tensor, factor: int) -> None:
    require_shape(op, len(x.shape) >= 3 and factor > 0,
                  f"expected [*, C, H, W] and a positive factor, got {describe(x)} and {factor}")


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Channels of `groups` groups interleaved."""
    require_shape("channel_shuffle", len(input.shape) >= 3 and groups > 0 and input.shape[1] % groups == 0,
                  f"{groups} groups do not divide the channels of {describe(input)}")
    n, channels, *rest = input.shape
    apart = ops.reshape(input, shape=(n, groups, channels // groups, *rest))
    mixed = ops.permute(apart, axes=(0, 2, 1, *range(3, len(apart.shape))))
    return ops.reshape(mixed, shape=tuple(input.shape))
