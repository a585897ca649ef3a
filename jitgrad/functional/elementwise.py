"""Elementwise functions: arithmetic, comparisons, logic and special functions, with PyTorch's names and meaning.

Operands are tensors or numbers of any dtypes and shapes that broadcast; results have the promoted dtype. Integer
``//`` and ``%`` round toward minus infinity, ``/`` of integers gives the default float.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    as_operand,
    broadcast_all,
    describe,
    largest_finite,
    matched,
    on_dtype,
    require_shape,
    result_type,
    unknown_choice,
)
from jitgrad.ir.op import Op
from jitgrad.ops.builders import full_like, ones_like, zeros_like

__all__ = [
    "abs",
    "absolute",
    "acos",
    "acosh",
    "add",
    "addcdiv",
    "addcmul",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "ceil",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "copysign",
    "cos",
    "cosh",
    "digamma",
    "div",
    "divide",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expit",
    "expm1",
    "fix",
    "floor",
    "floor_divide",
    "fmax",
    "fmin",
    "fmod",
    "frac",
    "heaviside",
    "hypot",
    "lerp",
    "lgamma",
    "log",
    "log1p",
    "log2",
    "log10",
    "logaddexp",
    "logit",
    "maximum",
    "minimum",
    "mul",
    "multiply",
    "nan_to_num",
    "neg",
    "negative",
    "polygamma",
    "positive",
    "pow",
    "reciprocal",
    "remainder",
    "round",
    "rsqrt",
    "rsub",
    "sgn",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "sub",
    "subtract",
    "tan",
    "tanh",
    "true_divide",
    "trunc",
    "xlogy",
]

# unary

def _float_function(name: str, op: Op, doc: str, on_gpu: str | None = None) -> Callable[[Tensor], Tensor]:
    """An elementwise function of floats that first converts integers and bools to the default float. `on_gpu`: its rule
    of autocast there."""

    def function(input: Tensor) -> Tensor:
        return op(as_float(input))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function if on_gpu is None else casts(cuda=on_gpu)(function)


exp = _float_function("exp", ops.exp, "e to the power `input`.", on_gpu="full")
exp2 = _float_function("exp2", ops.exp2, "2 to the power `input`.")
expm1 = _float_function("expm1", ops.expm1, "``exp(input) - 1``, accurate near 0.", on_gpu="full")
log = _float_function("log", ops.log, "Natural logarithm.", on_gpu="full")
log2 = _float_function("log2", ops.log2, "Logarithm to base 2.", on_gpu="full")
log10 = _float_function("log10", ops.log10, "Logarithm to base 10.", on_gpu="full")
log1p = _float_function("log1p", ops.log1p, "``log(1 + input)``, accurate near 0.", on_gpu="full")
sqrt = _float_function("sqrt", ops.sqrt, "Square root.")
rsqrt = _float_function("rsqrt", ops.rsqrt, "``1 / sqrt(input)``.", on_gpu="full")
reciprocal = _float_function("reciprocal", ops.reciprocal, "``1 / input``.", on_gpu="full")
sin = _float_function("sin", ops.sin, "Sine of radians.")
cos = _float_function("cos", ops.cos, "Cosine of radians.")
tan = _float_function("tan", ops.tan, "Tangent of radians.", on_gpu="full")
asin = arcsin = _float_function("asin", ops.asin, "Inverse sine, in radians.", on_gpu="full")
acos = arccos = _float_function("acos", ops.acos, "Inverse cosine, in radians.", on_gpu="full")
atan = arctan = _float_function("atan", ops.atan, "Inverse tangent, in radians.")
sinh = _float_function("sinh", ops.sinh, "Hyperbolic sine.", on_gpu="full")
cosh = _float_function("cosh", ops.cosh, "Hyperbolic cosine.", on_gpu="full")
tanh = _float_function("tanh", ops.tanh, "Hyperbolic tangent.")
asinh = arcsinh = _float_function("asinh", ops.asinh, "Inverse hyperbolic sine.")
acosh = arccosh = _float_function("acosh", ops.acosh, "Inverse hyperbolic cosine.")
atanh = arctanh = _float_function("atanh", ops.atanh, "Inverse hyperbolic tangent.")
erf = _float_function("erf", ops.erf, "The error function.")
erfc = _float_function("erfc", ops.erfc, "``1 - erf(input)``, accurate for large `input`.")
erfinv = _float_function("erfinv", ops.erfinv, "The inverse of `erf`.", on_gpu="full")
lgamma = _float_function("lgamma", ops.lgamma, "Logarithm of the absolute value of the gamma function.")
digamma = _float_function("digamma", ops.digamma, "Derivative of `lgamma`.")
sigmoid = expit = _float_function("sigmoid", ops.sigmoid, "``1 / (1 + exp(-input))``.")


def polygamma(n: int, input: Tensor) -> Tensor:
    """The derivative of order `n` of `digamma`, which is that of order 0. NaN for negative input unless `n` is at most 1."""
    if not isinstance(n, int) or n < 0:
        raise complain(DTypeError, "polygamma", f"n must be an integer that is not negative, got {n!r}")
    x, order = as_float(input), int(n)
    return ops.polygamma(x, n=order) if order else ops.digamma(x)


def neg(input: Tensor) -> Tensor:
    """``-input``; bools have no negative."""
    input = as_operand(input)
    if input.dtype is dtypes.bool_:
        raise complain(DTypeError, "neg", f"bool tensors have no negative, got {describe(input)}",
                       fix="Did you mean ~x?")
    return ops.neg(input)


negative = neg


def positive(input: Tensor) -> Tensor:
    """`input` itself."""
    return as_operand(input)


def abs(input: Tensor) -> Tensor:
    """Absolute value."""
    input = as_operand(input)
    return input if input.dtype is dtypes.bool_ else ops.abs(input)


absolute = abs


def sign(input: Tensor) -> Tensor:
    """-1, 0 or 1."""
    input = as_operand(input)
    return input if input.dtype is dtypes.bool_ else ops.sign(input)


sgn = sign


def _rounding(name: str, op: Op, doc: str) -> Callable[[Tensor], Tensor]:
    """A rounding function: nothing to do for integers."""

    def function(input: Tensor) -> Tensor:
        input = as_operand(input)
        return op(input) if input.dtype.category == "f" else input

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


floor = _rounding("floor", ops.floor, "The largest integer that is not above `input`.")
ceil = _rounding("ceil", ops.ceil, "The smallest integer that is not below `input`.")
trunc = fix = _rounding("trunc", ops.trunc, "`input` rounded toward zero.")


def round(input: Tensor, *, decimals: int = 0) -> Tensor:
    """`input` rounded to that many decimals; halves go to the even neighbour."""
    input = as_operand(input)
    if input.dtype.category != "f":
        return input
    if decimals == 0:
        return ops.round(input)
    scale = 10.0 ** builtins.abs(decimals)
    if decimals > 0:
        return div(ops.round(mul(input, scale)), scale)
    return mul(ops.round(div(input, scale)), scale)


def frac(input: Tensor) -> Tensor:
    """What `trunc` takes away, with the sign of `input`."""
    return ops.sub(input, ops.trunc(input))


def square(input: Tensor) -> Tensor:
    """``input * input``."""
    input = as_operand(input)
    if input.dtype is dtypes.bool_:
        input = ops.cast(input, dtype=dtypes.int64)
    return ops.mul(input, input)


def nan_to_num(input: Tensor, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Tensor:
    """NaN and infinities replaced, by default with 0 and the largest finite values."""
    if input.dtype.category != "f":
        return input
    largest = largest_finite(input.dtype)
    high = largest if posinf is None else posinf
    low = -largest if neginf is None else neginf
    result = where(ops.isnan(input), nan, input)
    result = where(ops.eq(input, full_like(input, math.inf)), high, result)
    return where(ops.eq(input, full_like(input, -math.inf)), low, result)


def logit(input: Tensor, eps: float | None = None) -> Tensor:
    """``log(p / (1 - p))``, with `input` first clamped to [eps, 1 - eps] when `eps` is given."""
    p = as_float(input)
    if eps is not None:
        p = clamp(p, eps, 1.0 - eps)
    return ops.sub(ops.log(p), ops.log1p(ops.neg(p)))


# arithmetic

def add(input: Operand, other: Operand, *, alpha: Operand = 1) -> Tensor:
    """``input + alpha * other``; for bools, or."""
    if type(alpha) is not int or alpha != 1:
        other = mul(other, alpha)
    return ops.add(*matched("add", input, other))


def sub(input: Operand, other: Operand, *, alpha: Operand = 1) -> Tensor:
    """``input - alpha * other``; not for bools."""
    if type(alpha) is not int or alpha != 1:
        other = mul(other, alpha)
    x, y = matched("sub", input, other)
    if x.dtype is dtypes.bool_:
        raise complain(DTypeError, "sub", "bool tensors cannot be subtracted", fix="Did you mean x ^ y, or ~x?")
    return ops.sub(x, y)


subtract = sub


def rsub(input: Operand, other: Operand, *, alpha: Operand = 1) -> Tensor:
    """``other - alpha * input``."""
    return sub(other, input, alpha=alpha)


def mul(input: Operand, other: Operand) -> Tensor:
    """``input * other``; for bools, and."""
    return ops.mul(*matched("mul", input, other))


multiply = mul


def div(input: Operand, other: Operand, *, rounding_mode: str | None = None) -> Tensor:
    """``input / other``; integers are converted to the default float. `rounding_mode` "floor" and "trunc" keep integers
    and round the quotient."""
    if rounding_mode is None:
        return ops.div(*matched("div", input, other, to_float=True))
    if rounding_mode == "floor":
        return floor_divide(input, other)
    if rounding_mode == "trunc":
        return _truncated_quotient(*_integers_at_least(matched("div", input, other)))
    raise unknown_choice("div", "rounding_mode", rounding_mode, (None, "floor", "trunc"))


divide = true_divide = div


def _truncated_quotient(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype.category == "f":
        return ops.trunc(ops.div(x, y))
    quotient = ops.floor_divide(x, y)
    inexact = ops.ne(ops.mul(quotient, y), x)
    below_zero = ops.lt(quotient, zeros_like(quotient))
    return ops.add(quotient, ops.cast(ops.bitwise_and(inexact, below_zero), dtype=x.dtype))


def _integers_at_least(operands: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The operands, bools converted to int64: they have no quotient."""
    if operands[0].dtype is dtypes.bool_:
        return tuple([ops.cast(x, dtype=dtypes.int64) for x in operands])
    return operands


def floor_divide(input: Operand, other: Operand) -> Tensor:
    """The quotient rounded toward minus infinity. Integer division by zero: DivisionByZeroError."""
    return ops.floor_divide(*_integers_at_least(matched("floor_divide", input, other)))


def remainder(input: Operand, other: Operand) -> Tensor:
    """What ``%`` gives: it has the sign of `other`. Integer division by zero: DivisionByZeroError."""
    return ops.remainder(*_integers_at_least(matched("remainder", input, other)))


def fmod(input: Operand, other: Operand) -> Tensor:
    """The remainder with the sign of `input`, as C gives it."""
    return ops.fmod(*_integers_at_least(matched("fmod", input, other)))


@casts(cuda="full")
def pow(input: Operand, exponent: Operand) -> Tensor:
    """``input ** exponent``. Small constant powers become products and roots. An integer tensor has no negative
    power."""
    if type(exponent) in (int, float) and hasattr(input, "shape"):
        shortcut = _constant_power(input, exponent)
        if shortcut is not None:
            return shortcut
    return ops.pow(*_integers_at_least(matched("pow", input, exponent)))


def _constant_power(x: Tensor, exponent: float) -> Tensor | None:
    """`x` to a power that needs no ``pow``, or None."""
    if x.dtype.category == "f":
        short = _FLOAT_POWERS.get(exponent)
        return short(x) if short else None
    if x.dtype.is_integer and isinstance(exponent, int) and exponent < 0:
        raise complain(DTypeError, "pow", f"integers to negative integer powers are not allowed, got {describe(x)} ** "
                                          f"{exponent}", fix="Did you mean x.float()?")
    return None


_FLOAT_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    2: lambda x: ops.mul(x, x),
    3: lambda x: ops.mul(ops.mul(x, x), x),
    0.5: lambda x: ops.sqrt(x),
    -0.5: lambda x: ops.rsqrt(x),
    -1: lambda x: ops.reciprocal(x),
    -2: lambda x: ops.reciprocal(ops.mul(x, x)),
}


def maximum(input: Operand, other: Operand) -> Tensor:
    """The larger of both; NaN when either is."""
    return ops.maximum(*matched("maximum", input, other))


def minimum(input: Operand, other: Operand) -> Tensor:
    """The smaller of both; NaN when either is."""
    return ops.minimum(*matched("minimum", input, other))


def fmax(input: Operand, other: Operand) -> Tensor:
    """The larger of both; the number when one is NaN."""
    return _ignoring_nan(ops.maximum, *matched("fmax", input, other))


def fmin(input: Operand, other: Operand) -> Tensor:
    """The smaller of both; the number when one is NaN."""
    return _ignoring_nan(ops.minimum, *matched("fmin", input, other))


def _ignoring_nan(op: Op, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype.category != "f":
        return op(x, y)
    return ops.where(ops.isnan(x), y, ops.where(ops.isnan(y), x, op(x, y)))


@casts(cuda="widest")
def atan2(input: Operand, other: Operand) -> Tensor:
    """The angle of the point (other, input), in radians."""
    return ops.atan2(*matched("atan2", input, other, to_float=True))


arctan2 = atan2


def copysign(input: Operand, other: Operand) -> Tensor:
    """The magnitude of `input` with the sign of `other`."""
    return ops.copysign(*matched("copysign", input, other, to_float=True))


def hypot(input: Operand, other: Operand) -> Tensor:
    """``sqrt(input ** 2 + other ** 2)`` without overflow in between."""
    x, y = (ops.abs(v) for v in matched("hypot", input, other, to_float=True))
    large, small = ops.maximum(x, y), ops.minimum(x, y)
    plain = ops.bitwise_and(ops.ne(large, zeros_like(large)), ops.isfinite(large))
    ratio = ops.div(ops.where(plain, small, zeros_like(small)), ops.where(plain, large, ones_like(large)))
    return ops.mul(large, ops.sqrt(ops.add(ones_like(ratio), ops.mul(ratio, ratio))))


def logaddexp(input: Operand, other: Operand) -> Tensor:
    """``log(exp(input) + exp(other))`` without overflow."""
    x, y = matched("logaddexp", input, other, to_float=True)
    large = ops.maximum(x, y)
    distance = ops.neg(ops.abs(ops.sub(x, y)))
    return ops.where(ops.isinf(large), large, ops.add(large, ops.log1p(ops.exp(distance))))


def xlogy(input: Operand, other: Operand) -> Tensor:
    """``input * log(other)``, and 0 where `input` is 0 (unless `other` is NaN)."""
    x, y = matched("xlogy", input, other, to_float=True)
    zero = ops.eq(x, zeros_like(x))
    safe = ops.where(ops.bitwise_and(zero, ops.logical_not(ops.isnan(y))), ones_like(y), y)
    return ops.mul(x, ops.log(safe))


def lerp(input: Operand, end: Operand, weight: Operand) -> Tensor:
    """``input + weight * (end - input)``."""
    return add(input, mul(weight, sub(end, input)))


@casts(cuda="widest")
def addcmul(input: Operand, tensor1: Operand, tensor2: Operand, *, value: Operand = 1) -> Tensor:
    """``input + value * tensor1 * tensor2``."""
    return add(input, mul(tensor1, tensor2), alpha=value)


@casts(cuda="widest")
def addcdiv(input: Operand, tensor1: Operand, tensor2: Operand, *, value: Operand = 1) -> Tensor:
    """``input + value * tensor1 / tensor2``."""
    return add(input, div(tensor1, tensor2), alpha=value)


def clamp(input: Tensor, min: Operand | None = None, max: Operand | None = None) -> Tensor:
    """`input` limited to [min, max]; either may be None. The gradient is 0 outside."""
    require_shape("clamp", min is not None or max is not None, "at least one of min and max must be given")
    bounds = [b for b in (min, max) if b is not None]
    x, *limits = on_dtype("clamp", result_type(input, *bounds), input, *bounds)
    if min is not None:
        x = ops.where(ops.lt(x, limits[0]), limits[0], x)
    if max is not None:
        x = ops.where(ops.gt(x, limits[-1]), limits[-1], x)
    return x


clip = clamp


def clamp_min(input: Tensor, min: Operand) -> Tensor:
    """`clamp` from below."""
    return clamp(input, min)


def clamp_max(input: Tensor, max: Operand) -> Tensor:
    """`clamp` from above."""
    return clamp(input, None, max)


def heaviside(input: Tensor, values: Tensor) -> Tensor:
    """0 where `input` < 0, `values` where it is 0, 1 where it is above."""
    x, y = matched("heaviside", input, values)
    zero = zeros_like(x)
    step = ops.where(ops.eq(x, zero), y, ops.cast(ops.gt(x, zero), dtype=x.dtype))
    return ops.where(ops.isnan(x), x, step) if x.dtype.category == "f" else step


# selection

def where(condition: Tensor, input: Operand, other: Operand) -> Tensor:
    """`input` where `condition` is True, `other` elsewhere."""
    if condition.dtype is not dtypes.bool_:
        raise complain(DTypeError, "where", f"the condition must be bool, got {describe(condition)}",
                       fix="Did you mean condition != 0?")
    dtype = result_type(input, other)
    x, y = on_dtype("where", dtype, input, other)
    return ops.where(*broadcast_all("where", condition, x, y))
