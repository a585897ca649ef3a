"""log, log2, log10, log1p and pow: scalar functions without branches, calls or tables.

x is taken apart as 2**n * (1 + r) with sqrt(1/2) <= 1 + r < sqrt(2) by its bit pattern. The float64 bodies use the
series in s = r / (2 + r) of FreeBSD's msun (K. C. Ng); `pow` carries log(x) with its rounding error (T. J. Dekker, *A
floating-point technique for extending the available precision*, 1971).
"""

from __future__ import annotations

from jitgrad.kernels.cpu.exponential import (
    LN2_HIGH_DOUBLE,
    LN2_HIGH_SINGLE,
    LN2_LOW_DOUBLE,
    LN2_LOW_SINGLE,
    LOG2_E,
    exp2_wide,
    exp_pair_f64,
)
from jitgrad.kernels.cpu.pairs import two_product, two_sum
from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    bits,
    by_type,
    copysign,
    f32,
    f64,
    floor,
    from_bits,
    horner,
    i32,
    i64,
    like,
    multiply_add,
    scalar,
    select,
)

INFINITY = float("inf")
NAN = float("nan")
LN2 = 0.6931471805599453
LOG2_E_HIGH, LOG2_E_LOW = 1.4426950407214463, 1.6751713164886512e-10
LOG10_E_HIGH, LOG10_E_LOW = 0.4342944818781689, 2.5082946711645275e-11
LOG10_2_HIGH, LOG10_2_LOW = 0.30102999566395283, 2.8363394551044964e-14
THIRD, THIRD_ERROR = 0.3333333333333333, 1.850371707708594e-17

# (log(1 + r) - r + r**2 / 2) / r**3
LOG_SINGLE = (0.06971478495296086, -0.11481406972335893, 0.11686222034522518, -0.1242552372162497, 0.14248967401906973,
              -0.16667806040136202, 0.20000718242621346, -0.24999996944816255, 0.33333331170359354)
LOG_WIDE = (-0.050056344847761225, 0.09038542728139293, -0.09111065763948795, 0.09030852885532539,
            -0.09922647312867652, 0.11109478559409165, -0.12503231019881492, 0.14285861234751687,
            -0.16666611486077176, 0.19999997838093, -0.25000000268624517, 0.3333333333751603)
# (log((1 + s) / (1 - s)) - 2 * s) / s**3 of z = s**2
LOG_DOUBLE = (0.1309061350974888, 0.1326839132248912, 0.1538625398001191, 0.1818179537727345, 0.22222222394177335,
              0.2857142857079273, 0.40000000000000896, 0.6666666666666666)
# (log((1 + s) / (1 - s)) / (2 * s) - 1 - z / 3) / z**2 of z = s**2
LOG_PAIR = (0.0645846913372409, 0.06642844198324277, 0.07692791451050535, 0.09090904068065707, 0.1111111113589292,
            0.142857142856685, 0.20000000000000015)


@scalar
def split_f32(x: Scalar) -> tuple[Scalar, Scalar]:
    """(r, n) with x = 2**n * (1 + r), for positive finite x; both float32."""
    tiny = x < f32(1.1754944e-38)
    pattern = i32(bits(select(tiny, x * f32(33554432.0), x)) - i32(0x3F3504F3))
    n = i32(i32(pattern >> i32(23)) - select(tiny, i32(25), i32(0)))
    return from_bits(i32(i32(pattern & i32(0x7FFFFF)) + i32(0x3F3504F3))) - f32(1.0), f32(n)


@scalar
def split_f64(x: Scalar) -> tuple[Scalar, Scalar]:
    """(r, n) with x = 2**n * (1 + r), for positive finite x; both float64."""
    tiny = x < f64(2.2250738585072014e-308)
    pattern = i64(bits(select(tiny, x * f64(18014398509481984.0), x)) - i64(0x3FE6A09E667F3BCD))
    n = i64(i64(pattern >> i64(52)) - select(tiny, i64(54), i64(0)))
    return from_bits(i64(i64(pattern & i64(0xFFFFFFFFFFFFF)) + i64(0x3FE6A09E667F3BCD))) - f64(1.0), f64(n)


@scalar
def log_special(x: Scalar, y: Scalar) -> Scalar:
    """y = log(x) with the values for zero, negative numbers, infinity and NaN put in."""
    y = select(x < like(x, INFINITY), y, x)
    return select(x > like(x, 0.0), y, select(x == like(x, 0.0), like(x, -INFINITY), like(x, NAN)))


@scalar
def series_f64(r: Scalar) -> tuple[Scalar, Scalar]:
    """(half, tail) with log(1 + r) = r - (half - tail)."""
    s = r / (f64(2.0) + r)
    z = s * s
    half = f64(0.5) * r * r
    return half, s * (half + z * horner(z, LOG_DOUBLE))


@scalar
def log_f32(x: Scalar) -> Scalar:
    r, n = split_f32(x)
    z = r * r
    tail = multiply_add(n, f32(LN2_LOW_SINGLE), multiply_add(r * z, horner(r, LOG_SINGLE), f32(-0.5) * z))
    return log_special(x, multiply_add(n, f32(LN2_HIGH_SINGLE), r + tail))


@scalar
def log_f64(x: Scalar) -> Scalar:
    r, n = split_f64(x)
    half, tail = series_f64(r)
    tail = multiply_add(n, f64(LN2_LOW_DOUBLE), tail)
    return log_special(x, multiply_add(n, f64(LN2_HIGH_DOUBLE), r - (half - tail)))


@scalar
def log_wide(x: Scalar) -> tuple[Scalar, Scalar]:
    """(n, log(1 + r)) in float64 for a float32 x, with a relative error of 1e-10."""
    r, n = split_f64(f64(x))
    return n, multiply_add(r * r, multiply_add(r, horner(r, LOG_WIDE), f64(-0.5)), r)


@scalar
def log2_f32(x: Scalar) -> Scalar:
    n, y = log_wide(x)
    return log_special(x, f32(n + y * f64(LOG2_E)))


@scalar
def log10_f32(x: Scalar) -> Scalar:
    n, y = log_wide(x)
    return log_special(x, f32(n * f64(0.3010299956639812) + y * f64(0.4342944819032518)))


@scalar
def log_head_f64(r: Scalar) -> tuple[Scalar, Scalar]:
    """log(1 + r) as the sum of a number with at most 32 significant bits and a small rest."""
    half, tail = series_f64(r)
    head = from_bits(i64(bits(r - half) & i64(-4294967296)))
    return head, (r - head) - half + tail


@scalar
def log2_f64(x: Scalar) -> Scalar:
    r, n = split_f64(x)
    head, rest = log_head_f64(r)
    high = head * f64(LOG2_E_HIGH)
    total = n + high
    low = (n - total) + high + ((rest + head) * f64(LOG2_E_LOW) + rest * f64(LOG2_E_HIGH))
    return log_special(x, total + low)


@scalar
def log10_f64(x: Scalar) -> Scalar:
    r, n = split_f64(x)
    head, rest = log_head_f64(r)
    high, base = head * f64(LOG10_E_HIGH), n * f64(LOG10_2_HIGH)
    total = base + high
    low = (base - total) + high + ((rest + head) * f64(LOG10_E_LOW) + rest * f64(LOG10_E_HIGH))
    return log_special(x, total + (low + n * f64(LOG10_2_LOW)))


@scalar
def log1p_wide(x: Scalar) -> Scalar:
    """log(1 + x) in float64 with a relative error of 1e-10."""
    u = f64(1.0) + x
    r, n = split_f64(u)
    lost = select(n == f64(0.0), x - r, f64(0.0))
    y = multiply_add(r * r, multiply_add(r, horner(r, LOG_WIDE), f64(-0.5)), r + lost)
    return log_special(u, multiply_add(n, f64(LN2), y))


@scalar
def log1p_f32(x: Scalar) -> Scalar:
    return select(x == f32(0.0), x, f32(log1p_wide(f64(x))))


@scalar
def log1p_f64(x: Scalar) -> Scalar:
    u = f64(1.0) + x
    r, n = split_f64(u)
    whole = n == f64(0.0)
    lost = select(abs(x) < f64(1.0), x - (u - f64(1.0)), f64(1.0) - (u - x)) / u
    lost = select(whole | (u == f64(INFINITY)), f64(0.0), lost)
    r = select(whole, x, r)
    half, tail = series_f64(r)
    y = multiply_add(n, f64(LN2_HIGH_DOUBLE),
                     r - (half - (tail + multiply_add(n, f64(LN2_LOW_DOUBLE), lost))))
    return select(x == f64(0.0), x, log_special(u, y))


@scalar
def log_pair_f64(x: Scalar) -> tuple[Scalar, Scalar]:
    """log(x) as an unevaluated sum, for positive finite x, with a relative error of about 2**-65."""
    r, n = split_f64(x)
    d = f64(2.0) + r
    s = r / d
    p, e = two_product(s, d)
    s_low = ((r - p) - e - s * (r - (d - f64(2.0)))) / d
    z, z_low = two_product(s, s)
    z_low = z_low + f64(2.0) * s * s_low
    u, u_low = two_product(z, f64(THIRD))
    rest = u_low + z_low * f64(THIRD) + z * f64(THIRD_ERROR) + z * z * horner(z, LOG_PAIR)
    w = f64(1.0) + u
    w_low = (u - (w - f64(1.0))) + rest
    y, y_low = two_product(f64(2.0) * s, w)
    y_low = y_low + f64(2.0) * (s * w_low + s_low * w)
    base = n * f64(LN2_HIGH_DOUBLE)
    total, lost = two_sum(base, y)
    return total, lost + y_low + n * f64(LN2_LOW_DOUBLE)


@scalar
def pow_f64(x: Scalar, y: Scalar) -> Scalar:
    t = abs(x)
    high, low = log_pair_f64(t)
    high, low = log_special(t, high), select((t > f64(0.0)) & (t < f64(INFINITY)), low, f64(0.0))
    p, e = two_product(y, high)
    e = select(abs(p) < f64(1e4), e + y * low, f64(0.0))
    return pow_special(x, y, exp_pair_f64(p, e, i64(0)))


@scalar
def pow_f32(x: Scalar, y: Scalar) -> Scalar:
    t = abs(x)
    n, logarithm = log_wide(t)
    z = f64(y) * log_special(f64(t), n + logarithm * f64(LOG2_E))
    return f32(pow_special(f64(x), f64(y), exp2_wide(z)))


@scalar
def pow_special(x: Scalar, y: Scalar, magnitude: Scalar) -> Scalar:
    """|x| ** y with the sign of x ** y, and the cases of IEEE 754: NaN for a negative base with a broken exponent, 1
    for a zero exponent or the base 1, and for -1 with an infinite exponent."""
    whole = floor(y) == y
    odd = whole & (floor(f64(0.5) * y) != f64(0.5) * y)
    infinite = abs(y) == f64(INFINITY)
    z = select(odd, copysign(magnitude, x), magnitude)
    broken = (x < f64(0.0)) & (x > f64(-INFINITY)) & (floor(y) != y) & (y == y)
    z = select(broken, f64(NAN), z)
    one = (y == f64(0.0)) | (x == f64(1.0)) | ((x == f64(-1.0)) & infinite)
    return select(one, f64(1.0), z)


log = by_type("log", log_f32, log_f64)
log2 = by_type("log2", log2_f32, log2_f64)
log10 = by_type("log10", log10_f32, log10_f64)
log1p = by_type("log1p", log1p_f32, log1p_f64)
