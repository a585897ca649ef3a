"""Activation functions, softmax, dropout, as compositions that fuse into one kernel.

All take floating-point tensors of any shape. Half precision is widened to float32 in between where PyTorch does so.
``inplace=True`` stores the result in the operand, as in PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, complain
from jitgrad.functional import random
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    as_operand,
    broadcast_all,
    cast,
    describe,
    one_dim,
    require_floating,
    require_shape,
    unknown_choice,
    widened,
)
from jitgrad.functional.elementwise import add, mul, where
from jitgrad.functional.logic import gt
from jitgrad.functional.reduce import detached
from jitgrad.functional.shape import chunk
from jitgrad.ops.builders import broadcast, expand_dims, full_like, ones_like, zeros_like
from jitgrad.ops.derived import derived, pointwise

__all__ = [
    "alpha_dropout", "celu", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu",
    "feature_alpha_dropout", "gelu", "glu",
    "gumbel_softmax", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax",
    "logsigmoid", "mish", "prelu", "relu", "relu6", "selu", "silu", "softmax", "softmin", "softplus",
    "softshrink", "softsign", "swish", "tanhshrink", "threshold",
]


def _with_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with an option ``inplace``: its result becomes the contents of the operand."""

    @functools.wraps(function)
    def wrapper(input: Tensor, *args: Any, inplace: bool = False, **options: Any) -> Tensor:
        result = function(input, *args, **options)
        return input._assign(result) if inplace else result

    return wrapper


# pointwise

@_with_inplace
def relu(input: Tensor) -> Tensor:
    """``max(x, 0)``; the gradient at 0 is 0."""
    if input.dtype is dtypes.bool_:
        raise complain(DTypeError, "relu", f"needs numbers, got {describe(input)}", fix="Did you mean x.float()?")
    return ops.relu(input)


@_with_inplace
def relu6(input: Tensor) -> Tensor:
    """``min(max(x, 0), 6)``; the gradient at 0 and 6 is 0."""
    return hardtanh(input, 0, 6)


@_with_inplace
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """`clamp` to [min_val, max_val], whose gradient at both of them is 0."""
    low, high = (broadcast(cast(as_operand(v, input.dtype), input.dtype), shape=input.shape) for v in (min_val, max_val))
    raised = ops.where(ops.le(input, low), low, input)
    return ops.where(ops.ge(raised, high), high, raised)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``x * Phi(x)``, Phi the normal distribution function; with "tanh" the approximation of Hendrycks and Gimpel
    (2016)."""
    if approximate not in ("none", "tanh"):
        raise unknown_choice("gelu", "approximate", approximate, ("none", "tanh"))
    return _gelu(require_floating("gelu", input), approximate=approximate)


@pointwise
@widened
def _gelu(x: Tensor, *, approximate: str) -> Tensor:
    half, one = full_like(x, 0.5), ones_like(x)
    if approximate == "none":
        inner = ops.erf(ops.mul(x, full_like(x, math.sqrt(0.5))))
    else:
        cube = ops.mul(ops.mul(x, x), x)
        bent = ops.add(x, ops.mul(cube, full_like(x, 0.044715)))
        inner = ops.tanh(ops.mul(bent, full_like(x, math.sqrt(2.0 / math.pi))))
    return ops.mul(ops.mul(half, x), ops.add(one, inner))


@_with_inplace
def silu(input: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return _silu(require_floating("silu", input))


@pointwise
@widened
def _silu(x: Tensor) -> Tensor:
    return ops.mul(x, ops.sigmoid(x))


swish = silu


@_with_inplace
@widened
def mish(input: Tensor) -> Tensor:
    """``x * tanh(softplus(x))``."""
    return ops.mul(input, ops.tanh(softplus(input)))


@casts(cuda="full")
@widened
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``log(1 + exp(beta * x)) / beta``, and x itself where ``beta * x > threshold``."""
    require_floating("softplus", input)
    scaled = input if type(beta) in (int, float) and beta == 1 else mul(input, beta)
    bent = _log1p_exp(scaled)
    bent = bent if scaled is input else ops.div(bent, full_like(bent, float(beta)))
    return where(gt(scaled, threshold), input, bent)


@pointwise
def _log1p_exp(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` without overflow. -|x| is a choice, not an `abs`: the derivative at 0 is 1/2."""
    folded = ops.where(ops.gt(x, zeros_like(x)), ops.neg(x), x)
    return ops.add(ops.relu(x), ops.log1p(ops.exp(folded)))


def softsign(input: Tensor) -> Tensor:
    """``x / (1 + |x|)``."""
    input = as_float(input)
    return ops.div(input, ops.add(ops.abs(input), ones_like(input)))


@widened
def logsigmoid(input: Tensor) -> Tensor:
    """``log(sigmoid(x))`` without underflow."""
    smallest = ops.minimum(input, zeros_like(input))
    return ops.sub(smallest, ops.log1p(ops.exp(ops.neg(ops.abs(input)))))


@_with_inplace
def leaky_relu(input: Tensor, negative_slope: Operand = 0.01) -> Tensor:
    """x where it is positive, ``negative_slope * x`` elsewhere."""
    return where(ops.gt(input, zeros_like(input)), input, mul(input, negative_slope))


@casts(cpu="lower", cuda="lower")
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`leaky_relu` with a learned slope: one, or one per channel (dimension 1)."""
    if len(weight.shape) == 1 and weight.shape[0] != 1:
        channels = (1,) * min(1, len(input.shape) - 1) + (weight.shape[0],) + (1,) * (len(input.shape) - 2)
        weight = ops.reshape(weight, shape=channels)
    return where(ops.gt(input, zeros_like(input)), input, mul(input, weight))


@_with_inplace
@widened
def elu(input: Tensor, alpha: Operand = 1.0) -> Tensor:
    """x where it is positive, ``alpha * (exp(x) - 1)`` elsewhere."""
    positive, low = _parted(input)
    return where(positive, input, mul(ops.expm1(low), alpha))


def _parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where x is positive, and ``min(x, 0)``, whose gradient at 0 is 1: that of `elu` is the one from below, as in
    PyTorch."""
    zero = zeros_like(x)
    positive = ops.gt(x, zero)
    return positive, ops.where(positive, zero, x)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@_with_inplace
def selu(input: Tensor) -> Tensor:
    """The self-normalizing unit (Klambauer and others 2017): a scaled `elu`."""
    return mul(elu(input, _SELU_ALPHA), _SELU_SCALE)


@_with_inplace
def celu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """x where it is positive, ``alpha * (exp(x / alpha) - 1)`` elsewhere."""
    positive, low = _parted(input)
    return where(positive, input, mul(ops.expm1(ops.div(low, full_like(input, float(alpha)))), alpha))


@_with_inplace
def hardsigmoid(input: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``."""
    return ops.div(relu6(add(input, 3)), full_like(input, 6.0))


@_with_inplace
def hardswish(input: Tensor) -> Tensor:
    """``x * relu6(x + 3) / 6``."""
    return ops.mul(input, hardsigmoid(input))


def tanhshrink(input: Tensor) -> Tensor:
    """``x - tanh(x)``."""
    input = as_float(input)
    return ops.sub(input, ops.tanh(input))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x moved toward 0 by `lambd`, and 0 within it."""
    limit = full_like(input, float(lambd))
    above = where(ops.gt(input, limit), ops.sub(input, limit), zeros_like(input))
    return where(ops.lt(input, ops.neg(limit)), ops.add(input, limit), above)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x, and 0 where ``|x| <= lambd``."""
    return where(gt(ops.abs(input), lambd), input, zeros_like(input))


@_with_inplace
def threshold(input: Tensor, threshold: float, value: float) -> Tensor:
    """x where it is above `threshold`, `value` elsewhere."""
    return where(gt(input, threshold), input, cast(as_operand(value, input.dtype), input.dtype))


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half along `dim` times the sigmoid of the second."""
    axis = one_dim("glu", dim, len(input.shape))
    require_shape("glu", input.shape[axis] % 2 == 0, f"dimension {dim} of {describe(input)} cannot be halved")
    value, gate = chunk(input, 2, axis)
    return ops.mul(value, ops.sigmoid(gate))


# over a dimension

@casts(cuda="total")
def softmax(input: Tensor, dim: int, dtype: DType | None = None) -> Tensor:
    """``exp(x) / sum(exp(x))`` along `dim`, without overflow."""
    x = require_floating("softmax", input if dtype is None else cast(input, dtype))
    return _over_dim(_softmax, x, one_dim("softmax", dim, len(x.shape)))


@casts(cuda="total")
def log_softmax(input: Tensor, dim: int, dtype: DType | None = None) -> Tensor:
    """``log(softmax(x))`` along `dim`, without underflow."""
    x = require_floating("log_softmax", input if dtype is None else cast(input, dtype))
    return _over_dim(_log_softmax, x, one_dim("log_softmax", dim, len(x.shape)))


def _over_dim(function: Callable[..., Tensor], x: Tensor, axis: int) -> Tensor:
    """`function` along a dimension; a 0-d tensor counts as one of size 1."""
    if not x.shape:
        return ops.reshape(function(ops.reshape(x, shape=(1,)), axis=0), shape=())
    return function(x, axis=axis) if x.shape[axis] else x


def softmin(input: Tensor, dim: int, dtype: DType | None = None) -> Tensor:
    """`softmax` of ``-x``."""
    return softmax(ops.neg(input), dim, dtype)


def _softmax_arrays(x: Any, *, axis: int) -> Any:
    out = np.subtract(x, x.max(axis, keepdims=True))
    np.exp(out, out=out)
    out *= np.reciprocal(out.sum(axis, keepdims=True))
    return out


def _softmax_gradient_arrays(g: Any, out: Any, *, axis: int) -> Any:
    product = g * out
    product -= out * product.sum(axis, keepdims=True)
    return product


@derived(_softmax_gradient_arrays)
def _softmax_gradient(g: Tensor, out: Tensor, *, axis: int) -> Tensor:
    """``out * (g - sum(g * out))``."""
    product = ops.mul(g, out)
    total = expand_dims(ops.sum(product, axes=(axis,)), (axis,))
    return ops.sub(product, ops.mul(out, broadcast(total, out.shape)))


@derived(_softmax_arrays, vjp=(lambda g, out, axis: _softmax_gradient(g, out, axis=axis),))
@widened
def _softmax(x: Tensor, *, axis: int) -> Tensor:
    """`softmax` of a tensor that is not empty along `axis`."""
    weights = ops.exp(_below_largest(x, axis))
    total = expand_dims(ops.sum(weights, axes=(axis,)), (axis,))
    return ops.mul(weights, broadcast(ops.reciprocal(total), x.shape))       # dividing costs more than all the rest


def _log_softmax_arrays(x: Any, *, axis: int) -> Any:
    out = np.subtract(x, x.max(axis, keepdims=True))
    out -= np.log(np.exp(out).sum(axis, keepdims=True))
    return out


def _log_softmax_gradient_arrays(g: Any, out: Any, *, axis: int) -> Any:
    result = np.exp(out)
    result *= -g.sum(axis, keepdims=True)
    result += g
    return result


@derived(_log_softmax_gradient_arrays)
def _log_softmax_gradient(g: Tensor, out: Tensor, *, axis: int) -> Tensor:
    """``g - exp(out) * sum(g)``."""
    total = expand_dims(ops.sum(g, axes=(axis,)), (axis,))
    return ops.sub(g, ops.mul(ops.exp(out), broadcast(total, out.shape)))


@derived(_log_softmax_arrays, vjp=(lambda g, out, axis: _log_softmax_gradient(g, out, axis=axis),))
@widened
def _log_softmax(x: Tensor, *, axis: int) -> Tensor:
    """`log_softmax` of a tensor that is not empty along `axis`."""
    shifted = _below_largest(x, axis)
    total = expand_dims(ops.sum(ops.exp(shifted), axes=(axis,)), (axis,))
    return ops.sub(shifted, broadcast(ops.log(total), x.shape))


def _below_largest(x: Tensor, axis: int) -> Tensor:
    """x minus its maximum along `axis`. The maximum is a constant for gradients: they cancel."""
    largest = expand_dims(ops.max(detached(x), axes=(axis,)), (axis,))
    return ops.sub(x, broadcast(largest, x.shape))


def gumbel_softmax(logits: Tensor, tau: float = 1.0, hard: bool = False, dim: int = -1) -> Tensor:
    """A sample of the Gumbel-softmax distribution (Jang and others 2017); with `hard` one-hot forward, soft
    backward."""
    noise = ops.neg(ops.log(random.exponential(tuple(logits.shape), 1.0, logits.dtype, device=logits.device)))
    soft = softmax(ops.div(ops.add(logits, noise), full_like(logits, float(tau))), dim)
    if not hard:
        return soft
    axis = one_dim("gumbel_softmax", dim, len(logits.shape))
    chosen = expand_dims(ops.argmax(soft, axis=axis), (axis,))
    numbers = ops.iota(shape=tuple(logits.shape), axis=axis, dtype=dtypes.int64)
    one_hot = cast(ops.eq(*broadcast_all("gumbel_softmax", numbers, chosen)), soft.dtype)
    return ops.add(ops.sub(one_hot, detached(soft)), soft)


# dropout

def check_probability(op: str, p: float) -> None:
    """ShapeError unless `p` is between 0 and 1."""
    if not 0.0 <= p <= 1.0:
        require_shape(op, False, f"the probability has to be between 0 and 1, got {p}")


@_with_inplace
def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Each element set to 0 with probability `p`, the others scaled by ``1 / (1 - p)``; nothing when not training."""
    check_probability("dropout", p)
    if not training or p == 0:
        return input
    return _dropped("dropout", input, p, tuple(input.shape))


def _dropped(op: str, x: Tensor, p: float, mask_shape: tuple[int, ...]) -> Tensor:
    require_floating(op, x)
    if p == 1:
        return ops.mul(x, zeros_like(x))
    kept = broadcast(random.keep_mask(mask_shape, p, device=x.device), x.shape)
    return ops.where(kept, mul(x, 1.0 / (1.0 - p)), zeros_like(x))


def _channel_dropout(name: str) -> Callable[..., Tensor]:
    @_with_inplace
    def function(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        """`dropout` of whole channels: dimensions 0 and 1 decide."""
        check_probability(name, p)
        if not training or p == 0:
            return input
        return _dropped(name, input, p, tuple(input.shape[:2]) + (1,) * (len(input.shape) - 2))

    function.__name__ = function.__qualname__ = name
    return function


dropout1d, dropout2d, dropout3d = map(_channel_dropout, ("dropout1d", "dropout2d", "dropout3d"))


@_with_inplace
def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False) -> Tensor:
    """Dropout that keeps mean and variance of `selu` activations (Klambauer and others 2017)."""
    return _alpha_dropped("alpha_dropout", input, p, training, tuple(input.shape))


@_with_inplace
def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False) -> Tensor:
    """`alpha_dropout` of whole channels: dimensions 0 and 1 decide."""
    mask_shape = tuple(input.shape[:2]) + (1,) * (len(input.shape) - 2)
    return _alpha_dropped("feature_alpha_dropout", input, p, training, mask_shape)


def _alpha_dropped(op: str, x: Tensor, p: float, training: bool, mask_shape: tuple[int, ...]) -> Tensor:
    """What is dropped becomes the value that `selu` goes to; all is then scaled and shifted."""
    check_probability(op, p)
    if not training or p == 0:
        return x
    require_floating(op, x)
    floor = -_SELU_ALPHA * _SELU_SCALE
    scale = (1.0 - p + p * (1.0 - p) * floor ** 2) ** -0.5 if p < 1 else 0.0
    kept = broadcast(random.keep_mask(mask_shape, p, device=x.device), x.shape)
    return add(mul(where(kept, x, floor), scale), -scale * floor * p)
