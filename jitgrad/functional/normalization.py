"""Normalization: layer, RMS, batch, group, instance norm, and `normalize`.

Statistics are computed in two passes (mean, then squared distances), in float32 for half-precision inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    HALF,
    Tensor,
    as_operand,
    cast,
    describe,
    require_floating,
    require_shape,
    size,
)
from jitgrad.functional.elementwise import add, clamp_min, mul, sub
from jitgrad.functional.reduce import detached, norm
from jitgrad.ops.builders import broadcast, expand_dims, full
from jitgrad.ops.derived import derived

__all__ = [
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "normalize", "rms_norm",
]


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32; None, for a parameter that is not there, as it is."""
    return ops.cast(x, dtype=dtypes.float32) if x is not None and x.dtype in HALF else x


def _moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over `axes`, which stay with size 1; distances from it, in full shape; and their mean square, with size 1
    at `axes`."""
    mean = _mean(x, axes)
    distance = ops.sub(x, broadcast(mean, x.shape))
    return mean, distance, _mean(ops.mul(distance, distance), axes)


def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    total = ops.sum(x, axes=axes)
    count = float(size([x.shape[a] for a in axes]))
    return expand_dims(ops.div(total, full(total.shape, count, x.dtype)), axes)


def _scaled(x: Tensor, mean_square: Tensor, eps: Any) -> Tensor:
    root = ops.rsqrt(ops.add(mean_square, broadcast(as_operand(eps, x.dtype), mean_square.shape)))
    return ops.mul(x, broadcast(root, x.shape))


def _array_mean(x: Any, axes: tuple[int, ...]) -> Any:
    """NumPy's, without its warning where nothing is averaged: there the result is empty, too, or not used."""
    total = np.add.reduce(x, axes, keepdims=True)
    total /= max(size([x.shape[a] for a in axes]), 1)
    return total


def _distance_and_root(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any]:
    distance = x - _array_mean(x, axes)
    variance = _array_mean(np.square(distance), axes)
    return distance, np.reciprocal(np.sqrt(variance + x.dtype.type(eps)))


def _standardized_arrays(x: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    distance, root = _distance_and_root(x, axes, eps)
    distance *= root
    return distance


def _standardized_gradient_arrays(g: Any, x: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    out, root = _distance_and_root(x, axes, eps)
    out *= root
    out *= -_array_mean(g * out, axes)
    out += g
    out -= _array_mean(g, axes)
    out *= root
    return out


@derived(_standardized_gradient_arrays)
def _standardized_gradient(g: Tensor, x: Tensor, *, axes: tuple[int, ...], eps: float) -> Tensor:
    """``(g - mean(g) - out * mean(g * out)) / deviation``."""
    _, distance, variance = _moments(x, axes)
    out = _scaled(distance, variance, eps)
    along = ops.mul(out, broadcast(_mean(ops.mul(g, out), axes), x.shape))
    across = ops.sub(g, broadcast(_mean(g, axes), x.shape))
    return _scaled(ops.sub(across, along), variance, eps)


@derived(_standardized_arrays, vjp=(lambda g, x, axes, eps: _standardized_gradient(g, x, axes=axes, eps=eps),))
def _standardized(x: Tensor, *, axes: tuple[int, ...], eps: float) -> Tensor:
    """`x` brought to mean 0 and variance 1 over `axes`."""
    _, distance, variance = _moments(x, axes)
    return _scaled(distance, variance, eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = ops.mul(x, broadcast(weight, x.shape))
    return x if bias is None else ops.add(x, broadcast(bias, x.shape))


# The usual case, with a weight and a bias: one step in eager execution, and one for each of its gradients. They have the
# shape of `x`, or 1 in its place, or only its last dimensions.


def _shared_axes(x: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of `x` along which a parameter of that shape repeats."""
    missing = len(x.shape) - len(shape)
    return (*range(missing), *[missing + k for k, n in enumerate(shape) if n == 1 != x.shape[missing + k]])


def _reduced(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` summed up to what a parameter of that shape is broadcast from."""
    return ops.reshape(ops.sum(x, axes=_shared_axes(x, shape)), shape=shape)


def _normalized_arrays(x: Any, weight: Any, bias: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    out = _standardized_arrays(x, axes=axes, eps=eps)
    out *= weight
    out += bias
    return out


def _normalized_gradient_arrays(g: Any, x: Any, weight: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    return _standardized_gradient_arrays(g * weight, x, axes=axes, eps=eps)


def _weight_gradient_arrays(g: Any, x: Any, *, axes: tuple[int, ...], eps: float, shape: tuple[int, ...]) -> Any:
    product = _standardized_arrays(x, axes=axes, eps=eps)
    product *= g
    return np.add.reduce(product, _shared_axes(x, shape)).reshape(shape)


@derived(_normalized_gradient_arrays)
def _normalized_gradient(g: Tensor, x: Tensor, weight: Tensor, *, axes: tuple[int, ...], eps: float) -> Tensor:
    """The gradient in `x`."""
    return _standardized_gradient(ops.mul(g, broadcast(weight, g.shape)), x, axes=axes, eps=eps)


@derived(_weight_gradient_arrays)
def _weight_gradient(g: Tensor, x: Tensor, *, axes: tuple[int, ...], eps: float, shape: tuple[int, ...]) -> Tensor:
    """The gradient in the weight."""
    return _reduced(ops.mul(g, _standardized(x, axes=axes, eps=eps)), shape)


@derived(_normalized_arrays, vjp=(
    lambda g, x, weight, axes, eps: _normalized_gradient(g, x, weight, axes=axes, eps=eps),
    lambda g, x, weight_type, axes, eps: _weight_gradient(g, x, axes=axes, eps=eps, shape=weight_type.shape),
    lambda g, bias_type: _reduced(g, bias_type.shape)))
def _normalized(x: Tensor, weight: Tensor, bias: Tensor, *, axes: tuple[int, ...], eps: float) -> Tensor:
    """`x` brought to mean 0 and variance 1 over `axes`, then ``* weight + bias``."""
    return _affine(_standardized(x, axes=axes, eps=eps), weight, bias)


def _standardized_and_affine(x: Tensor, axes: tuple[int, ...], eps: float, weight: Tensor | None,
                             bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None and weight.dtype is bias.dtype is x.dtype:
        return _normalized(x, weight, bias, axes=axes, eps=eps)
    return _affine(_standardized(x, axes=axes, eps=eps), weight, bias)


def _inner_axes(op: str, x: Tensor, shape: Sequence[int] | int, *parameters: Tensor | None) -> tuple[int, ...]:
    """The last dimensions, which must have `shape`, as the parameters must."""
    inner = (shape,) if isinstance(shape, int) else tuple(shape)
    fits = tuple(x.shape[len(x.shape) - len(inner):]) == inner
    if not fits or any(p is not None and p.shape != inner for p in parameters):
        require_shape(op, False, f"normalized_shape={inner} does not fit {describe(x)} with parameters "
                                 f"{[describe(p) for p in parameters if p is not None]}")
    return tuple(range(len(x.shape) - len(inner), len(x.shape)))


@casts(cuda="full")
def layer_norm(input: Tensor, normalized_shape: Sequence[int] | int, weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The last dimensions (of `normalized_shape`) brought to mean 0 and variance 1, then ``* weight + bias``."""
    axes = _inner_axes("layer_norm", input, normalized_shape, weight, bias)
    x = _wide(require_floating("layer_norm", input))
    return cast(_standardized_and_affine(x, axes, eps, _wide(weight), _wide(bias)), input.dtype)


@casts(cuda="full")
def rms_norm(input: Tensor, normalized_shape: Sequence[int] | int, weight: Tensor | None = None,
             eps: float | None = None) -> Tensor:
    """The last dimensions (of `normalized_shape`) divided by their root mean square, then ``* weight``. `eps`
    defaults to the dtype's spacing at 1."""
    axes = _inner_axes("rms_norm", input, normalized_shape, weight)
    x = _wide(require_floating("rms_norm", input))
    eps = spacing(x.dtype) if eps is None else eps
    return cast(_affine(_scaled(x, _mean(ops.mul(x, x), axes), eps), _wide(weight), None), input.dtype)


def spacing(dtype: Any) -> float:
    """The distance from 1 to the next larger number of a floating-point dtype."""
    return {"f16": 2.0 ** -10, "bf16": 2.0 ** -7, "f32": 2.0 ** -23, "f64": 2.0 ** -52}[dtype.short]


@casts(cuda="full")
def group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    """Channels (dimension 1) in `num_groups` groups, each brought to mean 0 and variance 1 with all that follows; then
    ``* weight + bias`` per channel."""
    shape = tuple(input.shape)
    if len(shape) < 2 or shape[1] % num_groups:
        require_shape("group_norm", False, f"{num_groups} groups do not divide the channels of {describe(input)}")
    grouped = (shape[0], num_groups, size(shape[1:]) // num_groups)
    x = ops.reshape(_wide(require_floating("group_norm", input)), shape=grouped)
    scaled = ops.reshape(_standardized(x, axes=(2,), eps=eps), shape=shape)
    return cast(_affine(scaled, *_per_channel("group_norm", scaled, weight, bias)), input.dtype)


def _per_channel(op: str, x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters of shape [C] so that they broadcast along dimension 1 of `x`."""
    for p in parameters:
        if p is not None and tuple(p.shape) != (x.shape[1],):
            require_shape(op, False, f"{describe(x)} has {x.shape[1]} channels, and a parameter is {describe(p)}")
    shape = (1, x.shape[1]) + (1,) * (len(x.shape) - 2)
    return [None if p is None else ops.reshape(_wide(p), shape=shape) for p in parameters]


def batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
               bias: Tensor | None = None, training: bool = False, momentum: Any = 0.1, eps: float = 1e-5) -> Tensor:
    """Each channel (dimension 1) brought to mean 0 and variance 1 over all other dimensions, then ``* weight + bias``.
    While training by the statistics of the batch, which also enter the running ones (in place, with the unbiased
    variance); otherwise by the running statistics."""
    x = _wide(require_floating("batch_norm", input))
    require_shape("batch_norm", len(x.shape) > 1, f"expected [N, C, ...], got {describe(input)}")
    axes = (0, *range(2, len(x.shape)))
    use_batch = training or running_mean is None
    if use_batch:
        count = size([x.shape[a] for a in axes])
        if count <= 1 and training:
            require_shape("batch_norm", False, f"expected more than 1 value per channel when training, got "
                                               f"{describe(input)}")
        parameters = _per_channel("batch_norm", x, weight, bias)
        if not training or running_mean is None or running_var is None:
            return cast(_standardized_and_affine(x, axes, eps, *parameters), input.dtype)
        moved = functools.partial(_update_running, running_mean, running_var, momentum, count)
        if _standardized.in_one_step(x):
            moved(_mean_over(detached(x), axes=axes), _variance_over(detached(x), axes=axes))
            return cast(_standardized_and_affine(x, axes, eps, *parameters), input.dtype)
        mean, distance, variance = _moments(x, axes)          # what is traced is recorded once
        moved(detached(mean), detached(variance))
        return cast(_affine(_scaled(distance, variance, eps), *parameters), input.dtype)
    center, variance = _per_channel("batch_norm", x, running_mean, running_var)
    scaled = _scaled(sub(x, center), variance, eps)
    return cast(_affine(scaled, *_per_channel("batch_norm", x, weight, bias)), input.dtype)


@derived(_array_mean)
def _mean_over(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    """The mean over `axes`, which stay with size 1."""
    return _mean(x, axes)


@derived(lambda x, axes: _array_mean(np.square(x - _array_mean(x, axes)), axes))
def _variance_over(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    """The mean square of the distance from the mean over `axes`, which stay with size 1."""
    return _moments(x, axes)[2]


def _update_running(running_mean: Tensor, running_var: Tensor, momentum: Any, count: int, mean: Tensor,
                    variance: Tensor) -> None:
    """Running statistics moved by `momentum` toward those of a batch of `count` values."""
    unbiased = mul(ops.reshape(variance, shape=running_var.shape), count / (count - 1))
    _move(running_mean, ops.reshape(mean, shape=running_mean.shape), momentum)
    _move(running_var, unbiased, momentum)


def _move(running: Tensor, batch: Tensor, momentum: Any) -> None:
    batch = cast(batch, running.dtype)
    running._assign(add(running, mul(sub(batch, running), momentum)))


def instance_norm(input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                  weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                  momentum: Any = 0.1, eps: float = 1e-5) -> Tensor:
    """Each channel of each sample brought to mean 0 and variance 1, then ``* weight + bias`` per channel. The mean of
    these statistics over the batch enters the running ones, in place; without `use_input_stats` those are used."""
    if not use_input_stats:
        require_shape("instance_norm", running_mean is not None and running_var is not None,
                      "use_input_stats=False needs running_mean and running_var")
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _wide(require_floating("instance_norm", input))
    axes = tuple(range(2, len(x.shape)))
    count = size([x.shape[a] for a in axes])
    require_shape("instance_norm", count > 1,
                  f"expected [N, C, ...] with more than 1 element per channel, got {describe(input)}")
    parameters = _per_channel("instance_norm", x, weight, bias)
    if running_mean is not None and running_var is not None:
        _per_channel("instance_norm", x, running_mean, running_var)
        mean, _, variance = _moments(detached(x), axes)
        mean, unbiased = _mean(mean, (0,)), mul(_mean(variance, (0,)), count / (count - 1))
        _move(running_mean, ops.reshape(mean, shape=running_mean.shape), momentum)
        _move(running_var, ops.reshape(unbiased, shape=running_var.shape), momentum)
    return cast(_standardized_and_affine(x, axes, eps, *parameters), input.dtype)


def normalize(input: Tensor, p: float = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12) -> Tensor:
    """`input` divided by its `p`-norm along `dim`, which is taken as at least `eps`."""
    length = clamp_min(norm(input, p, dim, keepdim=True), eps)
    return ops.div(input, broadcast(length, input.shape))


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Each channel divided by ``(k + alpha * mean of squares of neighbouring channels) ** beta``."""
    require_shape("local_response_norm", len(input.shape) >= 3 and size > 0,
                  f"expected [N, C, ...] of at least 3 dimensions and a positive size, got {describe(input)} and {size}")
    squares = ops.mul(require_floating("local_response_norm", input), input)
    before, ndim = size // 2, len(input.shape)
    low = tuple([before if d == 1 else 0 for d in range(ndim)])
    high = tuple([size - 1 - before if d == 1 else 0 for d in range(ndim)])
    padded = ops.pad(squares, low=low, high=high)
    total = None
    for offset in range(size):
        start = tuple([offset if d == 1 else 0 for d in range(ndim)])
        stop = tuple([offset + input.shape[1] if d == 1 else n for d, n in enumerate(padded.shape)])
        part = ops.slice(padded, start=start, stop=stop, step=(1,) * ndim)
        total = part if total is None else ops.add(total, part)
    scale = add(mul(total, alpha / size), k)
    return ops.div(input, ops.pow(scale, full(scale.shape, float(beta), scale.dtype)))
