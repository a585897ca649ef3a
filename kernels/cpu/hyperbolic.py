"""sinh, cosh, tanh and their inverses: scalar functions without branches, calls or tables.

Near zero the first two are polynomials, elsewhere they come from exp; the inverses come from log1p.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.exponential import LOG2_E, exp2_wide, exp_f64, exp_parts_f32, exp_scaled_f64
from jitgrad.kernels.cpu.logarithmic import INFINITY, LN2, NAN, log1p_f64, log1p_wide, log_f64
from jitgrad.kernels.cpu.pieces import tanh_by_pieces
from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    by_type,
    copysign,
    f32,
    f64,
    horner,
    i64,
    multiply_add,
    permutes,
    power_of_two,
    scalar,
    select,
    sqrt,
)

# (tanh(x) - x) / x**3 of x**2, |x| <= 0.63; (sinh(x) - x) / x**3 of x**2, |x| <= 1
TANH_SINGLE = (0.002277154836702404, -0.008330076704155741, 0.021764649205449123, -0.05395873068577102,
               0.1333330130532635, -0.3333333315717251)
TANH_DOUBLE = (-2.4030435460377594e-06, 1.2128764181746385e-05, -3.700068879170042e-05, 9.59954447743919e-05,
               -0.00023887304169216485, 0.0005899779307331993, -0.0014558277875939337, 0.0035921274442678127,
               -0.008863235495662057, 0.021869488534974113, -0.05396825396823275, 0.1333333333333332,
               -0.3333333333333333)
SINH_DOUBLE = (7.747174966629771e-13, 1.6057652088360194e-10, 2.5052117978908062e-08, 2.7557319190054655e-06,
               0.00019841269841326976, 0.008333333333333297, 0.16666666666666666)

SINH_WIDE = (2.8067902527471688e-06, 0.00019838037921205955, 0.008333339868928756, 0.16666666646034534)


@scalar
def tanh_f32(x: Scalar) -> Scalar:
    t = abs(x)
    z = x * x
    near = multiply_add(x * z, horner(z, TANH_SINGLE), x)
    e, n = exp_parts_f32(f32(2.0) * select(t < f32(10.0), t, f32(10.0)))
    power = power_of_two(n)
    far = f32(1.0) - f32(2.0) / (multiply_add(power, e, power) + f32(1.0))
    y = select(x != x, x, copysign(select(t < f32(0.625), near, far), x))
    return select(permutes(), tanh_by_pieces(x), y)


@scalar
def tanh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    z = x * x
    near = multiply_add(x * z, horner(z, TANH_DOUBLE), x)
    far = f64(1.0) - f64(2.0) / (exp_f64(f64(2.0) * t) + f64(1.0))
    return select(x != x, x, copysign(select(t < f64(0.625), near, far), x))


@scalar
def sinh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    z = x * x
    near = multiply_add(x * z, horner(z, SINH_DOUBLE), x)
    half = exp_scaled_f64(t, i64(-1))
    return select(t < f64(1.0), near, copysign(half - f64(0.25) / half, x))


@scalar
def cosh_f64(x: Scalar) -> Scalar:
    half = exp_scaled_f64(abs(x), i64(-1))
    return half + f64(0.25) / half


@scalar
def asinh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    z = select(t < f64(1e8), t, f64(1e8))
    square = z * z
    near = log1p_f64(z + square / (f64(1.0) + sqrt(f64(1.0) + square)))
    return copysign(select(t < f64(1e8), near, log_f64(t) + f64(LN2)), x)


@scalar
def acosh_f64(x: Scalar) -> Scalar:
    t = select(x < f64(1e8), x, f64(1e8)) - f64(1.0)
    near = log1p_f64(t + sqrt(f64(2.0) * t + t * t))
    y = select(x >= f64(1e8), log_f64(x) + f64(LN2), near)
    return select(x >= f64(1.0), y, f64(NAN))


@scalar
def atanh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    return copysign(f64(0.5) * log1p_f64(f64(2.0) * t / (f64(1.0) - t)), x)


@scalar
def sinh_f32(x: Scalar) -> Scalar:
    wide = f64(x)
    z = wide * wide
    near = multiply_add(wide * z, horner(z, SINH_WIDE), wide)
    half = exp2_wide(abs(wide) * f64(LOG2_E) - f64(1.0))
    return f32(select(z < f64(1.0), near, copysign(half - f64(0.25) / half, wide)))


@scalar
def cosh_f32(x: Scalar) -> Scalar:
    half = exp2_wide(abs(f64(x)) * f64(LOG2_E) - f64(1.0))
    return f32(half + f64(0.25) / half)


@scalar
def asinh_f32(x: Scalar) -> Scalar:
    t = abs(f64(x))
    square = t * t
    y = log1p_wide(t + square / (f64(1.0) + sqrt(f64(1.0) + square)))
    return copysign(select(t < f64(INFINITY), f32(y), f32(t)), x)


@scalar
def acosh_f32(x: Scalar) -> Scalar:
    t = f64(x) - f64(1.0)
    return select(x >= f32(1.0), f32(log1p_wide(t + sqrt(f64(2.0) * t + t * t))), f32(NAN))


@scalar
def atanh_f32(x: Scalar) -> Scalar:
    t = abs(f64(x))
    return copysign(f32(f64(0.5) * log1p_wide(f64(2.0) * t / (f64(1.0) - t))), x)


sinh = by_type("sinh", sinh_f32, sinh_f64)
cosh = by_type("cosh", cosh_f32, cosh_f64)
tanh = by_type("tanh", tanh_f32, tanh_f64)
asinh = by_type("asinh", asinh_f32, asinh_f64)
acosh = by_type("acosh", acosh_f32, acosh_f64)
atanh = by_type("atanh", atanh_f32, atanh_f64)
