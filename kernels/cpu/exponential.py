"""exp, exp2, expm1 and sigmoid: scalar functions that LLVM turns into full-width vector code.

Each is straight-line: argument reduction by bit patterns, a polynomial, a select for the special values; no branches,
no tables, no calls. Coefficients are Chebyshev fits on the reduced range, made with 40 digits. The reductions follow
W. J. Cody and W. Waite, *Software Manual for the Elementary Functions* (1980).
"""

from __future__ import annotations

from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    bits,
    by_type,
    clamp,
    f32,
    f64,
    from_bits,
    horner,
    i32,
    i64,
    like,
    multiply_add,
    power_of_two,
    round,
    scalar,
    scale,
    select,
    to_int,
)

# (exp(r) - 1 - r) / r**2 on |r| <= log(2) / 2
EXP_SINGLE = (0.00019891180158282143, 0.001393382048977602, 0.008333310754576892, 0.041666463386339524,
              0.16666666681794626, 0.5000000013620138)
EXP_MINUS_SINGLE = tuple([c * (-1.0) ** k for k, c in enumerate(EXP_SINGLE, 1)])      # of -r
EXP_DOUBLE = (2.091483135138041e-09, 2.5105419192016337e-08, 2.7557273295539724e-07, 2.75572549134867e-06,
              2.4801587325822283e-05, 0.00019841269875205077, 0.001388888888888367, 0.008333333333326025,
              0.04166666666666667, 0.1666666666666667, 0.5)
# (2**r - 1) / r on |r| <= 1 / 2
EXP2_SINGLE = (1.5297502543635438e-05, 0.00015461676975973325, 0.0013333501938341237, 0.009618056096717177,
               0.055504108841199315, 0.24022650925021063, 0.6931471805599453)
EXP2_DOUBLE = (2.572952812566595e-11, 4.455859112330208e-10, 7.054897189206508e-09, 1.0178056855501161e-07,
               1.3215486808929518e-06, 1.5252733842009231e-05, 0.00015403530393370558, 0.0013333558146406117,
               0.00961812910762848, 0.055504108664821625, 0.24022650695910072, 0.6931471805599453)

LOG2_E = 1.4426950408889634
WHOLE = 1.5 * 2.0 ** 23                         # numbers near it are whole
EXPONENT = WHOLE + 127                         # integers near it have the last bits of a float32, from its bias on
LN2_HIGH_SINGLE, LN2_LOW_SINGLE = 0.693145751953125, 1.428606765330187e-06
LN2_HIGH_DOUBLE, LN2_LOW_DOUBLE = 0.6931471803691238, 1.9082149292705877e-10


@scalar
def exp_parts_f32(t: Scalar) -> tuple[Scalar, Scalar]:
    """(z, n) with exp(t) = (1 + z) * 2**n, for abs(t) < 1e6; n is an int32. A sum with `WHOLE` rounds to a whole number."""
    n = multiply_add(t, f32(LOG2_E), f32(WHOLE)) - f32(WHOLE)
    r = multiply_add(n, f32(-LN2_LOW_SINGLE), multiply_add(n, f32(-LN2_HIGH_SINGLE), t))
    return multiply_add(r * r, horner(r, EXP_SINGLE), r), to_int(n)


@scalar
def vanishing(x: Scalar) -> Scalar:
    """What a power is whose exponent is NaN, or so low that computing with it would underflow, which is many times slower
    than anything else here."""
    return select(x != x, x, like(x, 0.0))


@scalar
def exp_f32(x: Scalar) -> Scalar:
    counts = x >= f32(-104.0)
    t = select(counts, x, f32(0.0))
    z, n = exp_parts_f32(select(t < f32(89.0), t, f32(89.0)))
    return select(counts, scale(z + f32(1.0), n), vanishing(x))


@scalar
def exp_of_score_f32(x: Scalar) -> Scalar:
    """exp(x) for an x below 88, as fast as it can be: 0 below -87, where `exp` goes on to denormal results. A sum with
    `EXPONENT` leaves the rounded exponent in the last bits, where a shift makes a power of two of it."""
    marked = multiply_add(x, f32(LOG2_E), f32(EXPONENT))
    n = marked - f32(EXPONENT)
    r = multiply_add(n, f32(-LN2_LOW_SINGLE), multiply_add(n, f32(-LN2_HIGH_SINGLE), x))
    power = from_bits(i32(bits(marked) << i32(23)))
    return select(x < f32(-87.0), f32(0.0), multiply_add(multiply_add(r * r, horner(r, EXP_SINGLE), r), power, power))


@scalar
def exp_scaled_f64(x: Scalar, k: Scalar) -> Scalar:
    """exp(x) * 2**k for an int64 k in -2 … 2, with no overflow on the way."""
    return exp_pair_f64(x, f64(0.0), k)


@scalar
def exp_parts_f64(t: Scalar, error: Scalar) -> tuple[Scalar, Scalar]:
    """(z, n) with exp(t + error) = (1 + z) * 2**n for a finite t and a tiny `error`; n is an int64."""
    n = round(t * f64(LOG2_E))
    r = multiply_add(n, f64(-LN2_LOW_DOUBLE), multiply_add(n, f64(-LN2_HIGH_DOUBLE), t)) + error
    return multiply_add(r * r, horner(r, EXP_DOUBLE), r), to_int(n)


@scalar
def exp_pair_f64(x: Scalar, error: Scalar, k: Scalar) -> Scalar:
    """exp(x + error) * 2**k for a tiny `error`."""
    counts = x >= f64(-748.0)
    z, n = exp_parts_f64(clamp(select(counts, x, f64(0.0)), f64(-748.0), f64(712.0)), error)
    return select(counts, scale(z + f64(1.0), i64(n + k)), vanishing(x))


@scalar
def exp_f64(x: Scalar) -> Scalar:
    return exp_scaled_f64(x, i64(0))


@scalar
def exp2_f32(x: Scalar) -> Scalar:
    counts = x >= f32(-151.0)
    t = clamp(select(counts, x, f32(0.0)), f32(-151.0), f32(129.0))
    n = round(t)
    r = t - n
    return select(counts, scale(multiply_add(r, horner(r, EXP2_SINGLE), f32(1.0)), to_int(n)), vanishing(x))


@scalar
def exp2_f64(x: Scalar) -> Scalar:
    counts = x >= f64(-1076.0)
    t = clamp(select(counts, x, f64(0.0)), f64(-1076.0), f64(1025.0))
    n = round(t)
    r = t - n
    return select(counts, scale(multiply_add(r, horner(r, EXP2_DOUBLE), f64(1.0)), to_int(n)), vanishing(x))


@scalar
def exp2_wide(x: Scalar) -> Scalar:
    """2**x in float64 with a relative error of 2e-10, for |x| < 200 and beyond as for 200; NaN for NaN."""
    t = clamp(x, f64(-200.0), f64(200.0))
    n = round(t)
    r = t - n
    return select(x != x, x, multiply_add(r, horner(r, EXP2_SINGLE), f64(1.0)) * power_of_two(to_int(n)))


@scalar
def expm1_f32(x: Scalar) -> Scalar:
    z, n = exp_parts_f32(clamp(x, f32(-20.0), f32(89.0)))
    half = power_of_two(i32(n - i32(1)))
    return select(abs(x) < f32(1e-20), x, select(x != x, x, f32(2.0) * multiply_add(half, z, half - f32(0.5))))


@scalar
def expm1_f64(x: Scalar) -> Scalar:
    z, n = exp_parts_f64(clamp(x, f64(-40.0), f64(710.0)), f64(0.0))
    half = power_of_two(i64(n - i64(1)))
    return select(abs(x) < f64(1e-30), x, select(x != x, x, f64(2.0) * multiply_add(half, z, half - f64(0.5))))


exp = by_type("exp", exp_f32, exp_f64)
exp_of_score = by_type("exp_of_score", exp_of_score_f32, exp_f64)
exp2 = by_type("exp2", exp2_f32, exp2_f64)
expm1 = by_type("expm1", expm1_f32, expm1_f64)


@scalar
def sigmoid_f32(x: Scalar) -> Scalar:
    """By exp(-x) times 2**-64, which neither overflows nor is denormal where it counts: beyond 30 the result is 1."""
    t = select(x < f32(-104.0), f32(-104.0), x)
    t = select(t > f32(30.0), f32(30.0), t)
    marked = multiply_add(t, f32(-LOG2_E), f32(EXPONENT - 64))
    n = marked - f32(EXPONENT - 64)
    r = multiply_add(n, f32(LN2_LOW_SINGLE), multiply_add(n, f32(LN2_HIGH_SINGLE), t))
    power = from_bits(i32(bits(marked) << i32(23)))
    e = multiply_add(multiply_add(r * r, horner(r, EXP_MINUS_SINGLE), -r), power, power)
    return f32(2.0 ** -64) / (e + f32(2.0 ** -64))


@scalar
def sigmoid_f64(x: Scalar) -> Scalar:
    t = exp_f64(-abs(x))
    y = f64(1.0) / (f64(1.0) + t)
    return select(x < f64(0.0), t * y, y)


sigmoid = by_type("sigmoid", sigmoid_f32, sigmoid_f64)
"""1 / (1 + exp(-x)), accurate down to denormal results."""
