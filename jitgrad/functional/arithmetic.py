"""Elementwise functions that are made of others: angles, signs, powers of two, common divisors, neighbours.

Operands are tensors or numbers of any dtypes and shapes that broadcast; results have the promoted dtype. What reads
values (`gcd`, `lcm`, `frexp`, `nextafter`) is computed by NumPy, and is a cut in a compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    as_operand,
    cast,
    describe,
    from_array,
    matched,
    on_dtype,
    read,
    require_floating,
    result_type,
)
from jitgrad.functional.elementwise import mul, pow
from jitgrad.functional.reduce import detached
from jitgrad.ops.builders import full, full_like, ones_like, zeros_like

__all__ = ["deg2rad", "float_power", "frexp", "gcd", "isneginf", "isposinf", "isreal", "lcm", "ldexp", "logaddexp2",
           "nextafter", "rad2deg", "signbit", "sinc"]


def deg2rad(input: Tensor) -> Tensor:
    """Degrees as radians."""
    return mul(as_float(input), math.pi / 180)


def rad2deg(input: Tensor) -> Tensor:
    """Radians as degrees."""
    return mul(as_float(input), 180 / math.pi)


def signbit(input: Tensor) -> Tensor:
    """Whether the sign is negative, of -0.0 too: bool."""
    x = _real("signbit", input)
    if x.dtype.category == "f":
        x = ops.copysign(ones_like(x), x)
    return ops.lt(x, zeros_like(x)) if x.dtype is not dtypes.bool_ else zeros_like(x)


def _real(op: str, input: Tensor) -> Tensor:
    x = as_operand(input)
    if x.dtype.is_complex:
        raise complain(DTypeError, op, f"complex numbers have no order, got {describe(x)}")
    return x


def isposinf(input: Tensor) -> Tensor:
    """Where `input` is infinity: bool."""
    return _equals_infinity("isposinf", input, math.inf)


def isneginf(input: Tensor) -> Tensor:
    """Where `input` is minus infinity: bool."""
    return _equals_infinity("isneginf", input, -math.inf)


def _equals_infinity(op: str, input: Tensor, infinity: float) -> Tensor:
    x = _real(op, input)
    return ops.eq(x, full_like(x, infinity)) if x.dtype.category == "f" else _everywhere(x, False)


def _everywhere(x: Tensor, value: bool) -> Tensor:
    return full(tuple(x.shape), value, dtypes.bool_)


def isreal(input: Tensor) -> Tensor:
    """Where the imaginary part is 0: bool."""
    if not input.dtype.is_complex:
        return _everywhere(input, True)
    part = ops.imag(input)
    return ops.eq(part, zeros_like(part))


def sinc(input: Tensor) -> Tensor:
    """``sin(pi x) / (pi x)``, and 1 at 0."""
    x = mul(as_float(input), math.pi)
    zero = ops.eq(x, zeros_like(x))
    safe = ops.where(zero, ones_like(x), x)
    return ops.where(zero, ones_like(x), ops.div(ops.sin(safe), safe))


def logaddexp2(input: Operand, other: Operand) -> Tensor:
    """``log2(2 ** input + 2 ** other)`` without overflow."""
    x, y = matched("logaddexp2", input, other, to_float=True)
    large = ops.maximum(x, y)
    distance = ops.neg(ops.abs(ops.sub(x, y)))
    rest = ops.div(ops.log1p(ops.exp2(distance)), full_like(large, math.log(2)))
    return ops.where(ops.isinf(large), large, ops.add(large, rest))


def float_power(input: Operand, exponent: Operand) -> Tensor:
    """``input ** exponent`` in float64, or complex128 when either is complex."""
    promoted = result_type(input, exponent)
    wide = dtypes.complex128 if promoted.is_complex else dtypes.float64
    return ops.pow(*on_dtype("float_power", wide, input, exponent))


def ldexp(input: Tensor, other: Tensor) -> Tensor:
    """``input * 2 ** other``. A floating-point `input` keeps its type where `other` is an integer."""
    power = pow(2.0, other)
    narrow = input.dtype.category == "f" and other.dtype.category not in "fc"
    return mul(input, cast(power, input.dtype) if narrow else power)


# what reads values

def gcd(input: Operand, other: Operand) -> Tensor:
    """The greatest common divisor of integers, never negative."""
    return _of_integers("gcd", np.gcd, input, other)


def lcm(input: Operand, other: Operand) -> Tensor:
    """The least common multiple of integers, never negative."""
    return _of_integers("lcm", np.lcm, input, other)


def _of_integers(op: str, function: np.ufunc, input: Operand, other: Operand) -> Tensor:
    x, y = matched(op, input, other)
    if not x.dtype.is_integer:
        raise complain(DTypeError, op, f"needs integers, got {describe(x)}")
    return _by_numpy(function, x, y)


def _by_numpy(function: Callable[..., Any], *operands: Tensor) -> Tensor:
    """A NumPy function of values that are read, in the dtype of the operands."""
    like = operands[0]
    found = np.asarray(function(*[read(detached(x)) for x in operands]))
    return from_array(found.astype(like.dtype.numpy, copy=False), like)


def nextafter(input: Tensor, other: Tensor) -> Tensor:
    """The floating-point number after `input` in the direction of `other`. The gradient goes to `input` as it is."""
    x, y = matched("nextafter", input, other)
    found = _by_numpy(np.nextafter, require_floating("nextafter", x), y)
    finite = ops.where(ops.isfinite(x), x, zeros_like(x))
    return ops.add(found, ops.sub(finite, detached(finite)))             # adds 0, and the gradient


class Parts(NamedTuple):
    """Floats as ``mantissa * 2 ** exponent``."""

    mantissa: Any
    exponent: Any


def frexp(input: Tensor) -> Parts:
    """``(mantissa, exponent)`` with ``input = mantissa * 2 ** exponent`` and mantissas from 0.5 up to, not including, 1; 0,
    infinities and NaN are mantissas themselves. The exponent is int32 and has no gradient."""
    x = require_floating("frexp", _real("frexp", input))
    exponent = from_array(np.frexp(read(detached(x)).astype(np.float64))[1].astype(np.int32), x)
    half = ops.floor_divide(exponent, full_like(exponent, 2))             # in two steps: neither factor is too large
    scaled = x
    for part in (half, ops.sub(exponent, half)):
        scaled = mul(scaled, cast(pow(2.0, cast(ops.neg(part), dtypes.float64)), x.dtype))
    return Parts(scaled, exponent)

