"""The scalar functions that kernel text may call by their bare names: `NAMES`.

Each runs as plain Python on NumPy scalars, and natively (after ``import jitgrad.kernels.cpu.native``) as code that is
inlined into the kernel and vectorized with it. float32 and float64 arguments choose their own body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad.kernels.cpu import scalar
from jitgrad.kernels.cpu.arithmetic import isfinite, isinf, isnan, maximum, minimum, reciprocal, relu, rsqrt, sign
from jitgrad.kernels.cpu.exponential import exp, expm1, log, sigmoid, tanh
from jitgrad.kernels.cpu.scalar import (
    ceil,
    copysign,
    floor,
    like,
    multiply_add,
    reassociate_add,
    reassociate_mul,
    round,
    select,
    sqrt,
    trunc,
)

NAMES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
    ceil, copysign, exp, expm1, floor, isfinite, isinf, isnan, like, log, maximum, minimum, multiply_add,
    reassociate_add, reassociate_mul, reciprocal, relu, round, rsqrt, select, sigmoid, sign, sqrt, tanh, trunc)}
