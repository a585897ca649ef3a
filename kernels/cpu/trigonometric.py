"""sin, cos, tan, their inverses, and the hyperbolic functions: scalar functions without branches, calls or tables.

float32 bodies compute in float64 where that is simplest: the result is then correctly rounded nearly always.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.exponential import exp_scaled_f64, expm1_f64
from jitgrad.kernels.cpu.logarithmic import NAN, log1p_f64, log_f64
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
    round,
    scalar,
    select,
    sqrt,
    to_int,
)

TWO_OVER_PI = 0.6366197723675814
HALF_PI_1, HALF_PI_2, HALF_PI_3 = 1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21
PI_HIGH, PI_LOW = 3.141592653589793, 1.2246467991473532e-16

# (sin(r) - r) / r**3 and (cos(r) - 1 + r**2 / 2) / r**4 of z = r**2 on |r| <= pi / 4
SIN_DOUBLE = (1.591784866512194e-10, -2.505112794596564e-08, 2.755731608382574e-06, -0.00019841269836722437,
              0.008333333333330925, -0.16666666666666666)
COS_DOUBLE = (-1.1382456865840483e-11, 2.0876143829213935e-09, -2.755731726001471e-07, 2.480158729874308e-05,
              -0.0013888888888887382, 0.041666666666666664)
SIN_SINGLE = (-0.00019587387320241361, 0.008332745937548115, -0.16666664650298102)
COS_SINGLE = (2.454743746250183e-05, -0.0013888300698073966, 0.04166666464746341)
# (atan(r) - r) / r**3 of r**2 on |r| <= tan(pi / 8)
ATAN_DOUBLE = (0.016258145857267047, -0.03454562257510452, 0.04550622525030452, -0.05230241257513991,
               0.058789000468626215, -0.06666422365298535, 0.07692296234562104, -0.09090908748637679,
               0.11111111105057618, -0.14285714285658824, 0.199999999999998, -0.3333333333333333)
# (asin(r) - r) / r**3 of r**2 on |r| <= 1 / 2
ASIN_DOUBLE = (0.028964515529972108, -0.015148720316881723, 0.0175870063207938, 0.00539062009261862,
               0.010338017463461142, 0.011476901613736898, 0.013971439493000882, 0.01735237793331728,
               0.022372173551590945, 0.030381944123781472, 0.044642857146538865, 0.07499999999998344,
               0.16666666666666669)


@scalar
def reduce_quadrant(x: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """x = n * pi/2 + r + s with |r| <= pi/4 and s the rounding error of r; gives (r, s, n as int64)."""
    n = round(x * f64(TWO_OVER_PI))
    a = x - n * f64(HALF_PI_1)
    w = n * f64(HALF_PI_2)
    b = a - w
    v = n * f64(HALF_PI_3) - ((a - b) - w)
    r = b - v
    return r, (b - r) - v, to_int(select(abs(n) < f64(9e18), n, f64(0.0)))


@scalar
def sin_reduced(r: Scalar, s: Scalar) -> Scalar:
    """sin(r + s) for |r| <= pi/4."""
    z = r * r
    v = z * r
    p = horner(z, SIN_DOUBLE)
    return r + multiply_add(v, p, s - f64(0.5) * z * s)


@scalar
def cos_reduced(r: Scalar, s: Scalar) -> Scalar:
    """cos(r + s) for |r| <= pi/4."""
    z = r * r
    half = f64(0.5) * z
    w = f64(1.0) - half
    return w + (((f64(1.0) - w) - half) + multiply_add(z * z, horner(z, COS_DOUBLE), -r * s))


@scalar
def sin_quadrant(r: Scalar, s: Scalar, n: Scalar) -> Scalar:
    """sin(r + s + n * pi/2)."""
    y = select((n & i64(1)) != i64(0), cos_reduced(r, s), sin_reduced(r, s))
    return select((n & i64(2)) != i64(0), -y, y)


@scalar
def sin_f64(x: Scalar) -> Scalar:
    r, s, n = reduce_quadrant(x)
    return select(abs(x) < f64(1e-8), x, sin_quadrant(r, s, n))


@scalar
def cos_f64(x: Scalar) -> Scalar:
    r, s, n = reduce_quadrant(x)
    return sin_quadrant(r, s, i64(n + i64(1)))


@scalar
def tan_f64(x: Scalar) -> Scalar:
    r, s, n = reduce_quadrant(x)
    sine, cosine = sin_reduced(r, s), cos_reduced(r, s)
    odd = (n & i64(1)) != i64(0)
    y = select(odd, -cosine, sine) / select(odd, sine, cosine)
    return select(abs(x) < f64(1e-8), x, y)


@scalar
def sin_f32(x: Scalar) -> Scalar:
    return f32(sin_f64(f64(x)))


@scalar
def cos_f32(x: Scalar) -> Scalar:
    return f32(cos_f64(f64(x)))


@scalar
def tan_f32(x: Scalar) -> Scalar:
    return f32(tan_f64(f64(x)))


@scalar
def atan_f64(x: Scalar) -> Scalar:
    t = abs(x)
    large, middle = t > f64(2.414213562373095), t > f64(0.41421356237309503)
    numerator = select(large, f64(-1.0), select(middle, t - f64(1.0), t))
    denominator = select(large, t, select(middle, t + f64(1.0), f64(1.0)))
    high = select(large, f64(PI_HIGH / 2), select(middle, f64(PI_HIGH / 4), f64(0.0)))
    low = select(large, f64(PI_LOW / 2), select(middle, f64(PI_LOW / 4), f64(0.0)))
    r = numerator / denominator
    z = r * r
    return copysign(high + (r + multiply_add(r * z, horner(z, ATAN_DOUBLE), low)), x)


@scalar
def asin_f64(x: Scalar) -> Scalar:
    t = abs(x)
    large = t > f64(0.5)
    z = select(large, f64(0.5) * (f64(1.0) - t), t * t)
    r = select(large, sqrt(z), t)
    y = multiply_add(r * z, horner(z, ASIN_DOUBLE), r)
    return copysign(select(large, f64(PI_HIGH / 2) - (f64(2.0) * y - f64(PI_LOW / 2)), y), x)


@scalar
def acos_f64(x: Scalar) -> Scalar:
    t = abs(x)
    large = t > f64(0.5)
    z = select(large, f64(0.5) * (f64(1.0) - t), t * t)
    r = select(large, sqrt(z), x)
    tail = r * z * horner(z, ASIN_DOUBLE)
    middle = f64(PI_HIGH / 2) - (r - (f64(PI_LOW / 2) - tail))
    far = f64(2.0) * (r + tail)
    return select(large, select(x < f64(0.0), f64(PI_HIGH) - (far - f64(PI_LOW)), far), middle)


@scalar
def atan2_f64(y: Scalar, x: Scalar) -> Scalar:
    """The angle of the point (x, y), in -pi … pi, with the signs of zeros as IEEE 754 wants them."""
    a, b = abs(y), abs(x)
    steep = a > b
    numerator, denominator = select(steep, b, a), select(steep, a, b)
    ratio = numerator / denominator
    ratio = select(numerator == denominator, select(a == f64(0.0), f64(0.0), f64(1.0)), ratio)
    angle = atan_f64(ratio)
    angle = select(steep, f64(PI_HIGH / 2) - (angle - f64(PI_LOW / 2)), angle)
    angle = select(copysign(f64(1.0), x) < f64(0.0), f64(PI_HIGH) - (angle - f64(PI_LOW)), angle)
    return select((x != x) | (y != y), f64(NAN), copysign(angle, y))


@scalar
def sinh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    e = expm1_f64(select(t < f64(20.0), t, f64(20.0)))
    near = f64(0.5) * (e + e / (e + f64(1.0)))
    return copysign(select(t < f64(20.0), near, exp_scaled_f64(t, i64(-1))), x)


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
    return copysign(select(t < f64(1e8), near, log_f64(t) + f64(0.6931471805599453)), x)


@scalar
def acosh_f64(x: Scalar) -> Scalar:
    t = select(x < f64(1e8), x, f64(1e8)) - f64(1.0)
    near = log1p_f64(t + sqrt(f64(2.0) * t + t * t))
    return select(x >= f64(1e8), log_f64(x) + f64(0.6931471805599453), select(x != x, x, near))


@scalar
def atanh_f64(x: Scalar) -> Scalar:
    t = abs(x)
    return copysign(f64(0.5) * log1p_f64(f64(2.0) * t / (f64(1.0) - t)), x)


@scalar
def atan_f32(x: Scalar) -> Scalar:
    return f32(atan_f64(f64(x)))


@scalar
def asin_f32(x: Scalar) -> Scalar:
    return f32(asin_f64(f64(x)))


@scalar
def acos_f32(x: Scalar) -> Scalar:
    return f32(acos_f64(f64(x)))


@scalar
def atan2_f32(y: Scalar, x: Scalar) -> Scalar:
    return f32(atan2_f64(f64(y), f64(x)))


@scalar
def sinh_f32(x: Scalar) -> Scalar:
    return f32(sinh_f64(f64(x)))


@scalar
def cosh_f32(x: Scalar) -> Scalar:
    return f32(cosh_f64(f64(x)))


@scalar
def asinh_f32(x: Scalar) -> Scalar:
    return f32(asinh_f64(f64(x)))


@scalar
def acosh_f32(x: Scalar) -> Scalar:
    return f32(acosh_f64(f64(x)))


@scalar
def atanh_f32(x: Scalar) -> Scalar:
    return f32(atanh_f64(f64(x)))


sin = by_type("sin", sin_f32, sin_f64)
cos = by_type("cos", cos_f32, cos_f64)
tan = by_type("tan", tan_f32, tan_f64)
asin = by_type("asin", asin_f32, asin_f64)
acos = by_type("acos", acos_f32, acos_f64)
atan = by_type("atan", atan_f32, atan_f64)
atan2 = by_type("atan2", atan2_f32, atan2_f64)
sinh = by_type("sinh", sinh_f32, sinh_f64)
cosh = by_type("cosh", cosh_f32, cosh_f64)
asinh = by_type("asinh", asinh_f32, asinh_f64)
acosh = by_type("acosh", acosh_f32, acosh_f64)
atanh = by_type("atanh", atanh_f32, atanh_f64)
