"""The scalar functions that kernel text may call by their bare names: `NAMES`.

Each runs as plain Python on NumPy scalars, and natively (after ``import jitgrad.kernels.cpu.native``) as code that is
inlined into the kernel and vectorized with it. float32 and float64 arguments choose their own body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad.kernels.cpu.arithmetic import (
    bitwise_not,
    floor_divide,
    fmod,
    goes_before,
    integer_power,
    isfinite,
    isinf,
    isnan,
    maximum,
    minimum,
    order,
    pow,
    reciprocal,
    relu,
    remainder,
    rsqrt,
    shift_left,
    shift_right,
    sign,
)
from jitgrad.kernels.cpu.exponential import exp, exp2, exp_of_score, expm1, sigmoid
from jitgrad.kernels.cpu.hyperbolic import acosh, asinh, atanh, cosh, sinh, tanh
from jitgrad.kernels.cpu.logarithmic import log, log1p, log2, log10
from jitgrad.kernels.cpu.philox import random_bits_block, random_bits_lane
from jitgrad.kernels.cpu.scalar import abs, ceil, copysign, floor, like, multiply_add, round, select, sqrt, trunc
from jitgrad.kernels.cpu.special import digamma, erf, erfc, erfinv, lgamma, polygamma
from jitgrad.kernels.cpu.trigonometric import acos, asin, atan, atan2, cos, sin, tan

NAMES: dict[str, Callable[..., Any]] = {function.__name__: function for function in (
    abs, acos, acosh, asin, asinh, atan, atan2, atanh, bitwise_not, ceil, copysign, cos, cosh, digamma, erf, erfc,
    erfinv, exp, exp2, exp_of_score, expm1, floor, floor_divide, fmod, goes_before, integer_power, isfinite, isinf, isnan,
    lgamma, like, log, log10, log1p, log2, maximum, minimum, multiply_add, order, polygamma, pow, random_bits_block,
    random_bits_lane, reciprocal, relu, remainder, round, rsqrt, select, shift_left, shift_right, sigmoid, sign, sin, sinh,
    sqrt, tan, tanh, trunc)}
