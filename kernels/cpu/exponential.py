"""exp, log and what is built directly on them: scalar functions that LLVM turns into full-width vector code.

Each is straight-line: argument reduction by bit patterns, a polynomial, a select for the special values; no branches, no
tables, no calls. Coefficients are Chebyshev fits on the reduced range, made with 40 digits. The reductions follow
W. J. Cody and W. Waite, *Software Manual for the Elementary Functions* (1980).
"""

from __future__ import annotations

from jitgrad.kernels.cpu.scalar import (
    Scalar,
    absolute,
    bits,
    by_type,
    copysign,
    f32,
    f64,
    from_bits,
    horner,
    i32,
    i64,
    like,
    multiply_add,
    round,
    scalar,
    select,
    to_int,
)

# (exp(r) - 1 - r) / r**2 on |r| <= log(2) / 2
EXP_SINGLE = (0.00019891180158282143, 0.001393382048977602, 0.008333310754576892, 0.041666463386339524,
              0.16666666681794626, 0.5000000013620138)
EXP_DOUBLE = (2.091483135138041e-09, 2.5105419192016337e-08, 2.7557273295539724e-07, 2.75572549134867e-06,
              2.4801587325822283e-05, 0.00019841269875205077, 0.001388888888888367, 0.008333333333326025,
              0.04166666666666667, 0.1666666666666667, 0.5)
# (log(1 + r) - r + r**2 / 2) / r**3 on sqrt(1/2) <= 1 + r < sqrt(2)
LOG_SINGLE = (0.06971478495296086, -0.11481406972335893, 0.11686222034522518, -0.1242552372162497, 0.14248967401906973,
              -0.16667806040136202, 0.20000718242621346, -0.24999996944816255, 0.33333331170359354)
# (log((1 + s) / (1 - s)) - 2 * s) / s**3 of z = s**2, s = r / (2 + r)
LOG_DOUBLE = (0.1309061350974888, 0.1326839132248912, 0.1538625398001191, 0.1818179537727345, 0.22222222394177335,
              0.2857142857079273, 0.40000000000000896, 0.6666666666666666)

LOG2_E = 1.4426950408889634
LN2_HIGH_SINGLE, LN2_LOW_SINGLE = 0.693145751953125, 1.428606765330187e-06
LN2_HIGH_DOUBLE, LN2_LOW_DOUBLE = 0.6931471803691238, 1.9082149292705877e-10
INFINITY = float("inf")
NAN = float("nan")


@scalar
def power_of_two_f32(n: Scalar) -> Scalar:
    """2**n for an int32 n in -126 … 127."""
    return from_bits(i32(i32(n + i32(127)) << i32(23)))


@scalar
def power_of_two_f64(n: Scalar) -> Scalar:
    """2**n for an int64 n in -1022 … 1023."""
    return from_bits(i64(i64(n + i64(1023)) << i64(52)))


@scalar
def scale_f32(x: Scalar, n: Scalar) -> Scalar:
    """x * 2**n, also where 2**n alone is denormal or too large (|n| < 250)."""
    half = i32(n >> i32(1))
    return x * power_of_two_f32(half) * power_of_two_f32(i32(n - half))


@scalar
def scale_f64(x: Scalar, n: Scalar) -> Scalar:
    """x * 2**n, also where 2**n alone is denormal or too large (|n| < 2040)."""
    half = i64(n >> i64(1))
    return x * power_of_two_f64(half) * power_of_two_f64(i64(n - half))


@scalar
def clamp(x: Scalar, low: Scalar, high: Scalar) -> Scalar:
    """x limited to low … high; NaN gives low."""
    raised = select(x > low, x, low)
    return select(raised < high, raised, high)


@scalar
def exp_f32(x: Scalar) -> Scalar:
    t = clamp(x, f32(-104.0), f32(89.0))
    n = round(t * f32(LOG2_E))
    r = multiply_add(n, f32(-LN2_LOW_SINGLE), multiply_add(n, f32(-LN2_HIGH_SINGLE), t))
    y = multiply_add(r * r, horner(r, EXP_SINGLE), r) + f32(1.0)
    return select(x != x, x, scale_f32(y, to_int(n)))


@scalar
def exp_f64(x: Scalar) -> Scalar:
    t = clamp(x, f64(-746.0), f64(710.0))
    n = round(t * f64(LOG2_E))
    r = multiply_add(n, f64(-LN2_LOW_DOUBLE), multiply_add(n, f64(-LN2_HIGH_DOUBLE), t))
    y = multiply_add(r * r, horner(r, EXP_DOUBLE), r) + f64(1.0)
    return select(x != x, x, scale_f64(y, to_int(n)))


@scalar
def log_f32(x: Scalar) -> Scalar:
    tiny = x < f32(1.1754944e-38)
    pattern = i32(bits(select(tiny, x * f32(33554432.0), x)) - i32(0x3F3504F3))
    n = f32(i32(i32(pattern >> i32(23)) - select(tiny, i32(25), i32(0))))
    r = from_bits(i32(i32(pattern & i32(0x7FFFFF)) + i32(0x3F3504F3))) - f32(1.0)
    z = r * r
    tail = multiply_add(n, f32(LN2_LOW_SINGLE), multiply_add(r * z, horner(r, LOG_SINGLE), f32(-0.5) * z))
    return log_special(x, multiply_add(n, f32(LN2_HIGH_SINGLE), r + tail))


@scalar
def log_f64(x: Scalar) -> Scalar:
    tiny = x < f64(2.2250738585072014e-308)
    pattern = i64(bits(select(tiny, x * f64(18014398509481984.0), x)) - i64(0x3FE6A09E667F3BCD))
    n = f64(i64(i64(pattern >> i64(52)) - select(tiny, i64(54), i64(0))))
    r = from_bits(i64(i64(pattern & i64(0xFFFFFFFFFFFFF)) + i64(0x3FE6A09E667F3BCD))) - f64(1.0)
    s = r / (f64(2.0) + r)
    z = s * s
    half = f64(0.5) * r * r
    tail = s * (half + z * horner(z, LOG_DOUBLE)) + n * f64(LN2_LOW_DOUBLE)
    return log_special(x, multiply_add(n, f64(LN2_HIGH_DOUBLE), r - (half - tail)))


@scalar
def log_special(x: Scalar, y: Scalar) -> Scalar:
    """y = log(x) with the values for zero, negative numbers, infinity and NaN put in."""
    y = select(x == like(x, INFINITY), x, y)
    y = select(x == like(x, 0.0), like(x, -INFINITY), y)
    return select(x < like(x, 0.0), like(x, NAN), select(x != x, x, y))


@scalar
def expm1_f32(x: Scalar) -> Scalar:
    t = clamp(x, f32(-20.0), f32(89.0))
    n = round(t * f32(LOG2_E))
    r = multiply_add(n, f32(-LN2_LOW_SINGLE), multiply_add(n, f32(-LN2_HIGH_SINGLE), t))
    y = multiply_add(r * r, horner(r, EXP_SINGLE), r)
    half = power_of_two_f32(i32(to_int(n) - i32(1)))
    return select(x == f32(0.0), x, select(x != x, x, f32(2.0) * multiply_add(half, y, half - f32(0.5))))


@scalar
def expm1_f64(x: Scalar) -> Scalar:
    t = clamp(x, f64(-40.0), f64(710.0))
    n = round(t * f64(LOG2_E))
    r = multiply_add(n, f64(-LN2_LOW_DOUBLE), multiply_add(n, f64(-LN2_HIGH_DOUBLE), t))
    y = multiply_add(r * r, horner(r, EXP_DOUBLE), r)
    half = power_of_two_f64(i64(to_int(n) - i64(1)))
    return select(x == f64(0.0), x, select(x != x, x, f64(2.0) * multiply_add(half, y, half - f64(0.5))))


@scalar
def tanh_f32(x: Scalar) -> Scalar:
    t = absolute(x)
    y = expm1_f32(f32(2.0) * select(t < f32(10.0), t, f32(10.0)))
    return select(x != x, x, copysign(y / (y + f32(2.0)), x))


@scalar
def tanh_f64(x: Scalar) -> Scalar:
    t = absolute(x)
    y = expm1_f64(f64(2.0) * select(t < f64(20.0), t, f64(20.0)))
    return select(x != x, x, copysign(y / (y + f64(2.0)), x))


exp = by_type("exp", exp_f32, exp_f64)
log = by_type("log", log_f32, log_f64)
expm1 = by_type("expm1", expm1_f32, expm1_f64)
tanh = by_type("tanh", tanh_f32, tanh_f64)


@scalar
def sigmoid(x: Scalar) -> Scalar:
    """1 / (1 + exp(-x)), accurate down to denormal results."""
    t = exp(-absolute(x))
    y = like(x, 1.0) / (like(x, 1.0) + t)
    return select(x < like(x, 0.0), t * y, y)
