"""sin, cos, tan and their inverses: scalar functions without branches or calls.

float32 bodies compute in float64 where that is simplest: the result is then correctly rounded nearly always.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.logarithmic import INFINITY, NAN
from jitgrad.kernels.cpu.pairs import split, two_product, two_sum
from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    bits,
    by_type,
    copysign,
    f32,
    f64,
    horner,
    i64,
    multiply_add,
    power_of_two,
    round,
    scalar,
    select,
    sqrt,
    to_int,
    two_over_pi,
)

PI_HIGH, PI_LOW = 3.141592653589793, 1.2246467991473532e-16
HALF_PI_HIGH, HALF_PI_LOW = 1.5707963267948966, 6.123233995736766e-17
PIECE_0, PIECE_1, PIECE_2, PIECE_3, PIECE_4, PIECE_5, PIECE_6 = [     # 28 binary places of 2/pi each
    places * 2.0 ** (-28 * (k + 1)) for k, places in enumerate(
        (170891318, 240010261, 44024437, 131200308, 232525238, 43358524, 70845471))]

# (sin(r) - r) / r**3 and (cos(r) - 1 + r**2 / 2) / r**4 of z = r**2 on |r| <= pi / 4
SIN_DOUBLE = (1.591784866512194e-10, -2.505112794596564e-08, 2.755731608382574e-06, -0.00019841269836722437,
              0.008333333333330925, -0.16666666666666666)
COS_DOUBLE = (-1.1382456865840483e-11, 2.0876143829213935e-09, -2.755731726001471e-07, 2.480158729874308e-05,
              -0.0013888888888887382, 0.041666666666666664)
SIN_WIDE = (2.7246868722877944e-06, -0.00019840063040804117, 0.00833333183062943, -0.16666666663741367)
COS_WIDE = (-2.7298407652795173e-07, 2.4800580601354642e-05, -0.0013888887635227975, 0.04166666666422613)
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
def part_of_turn(x: Scalar) -> Scalar:
    """x modulo 4, in -2 … 2, exactly."""
    return x - f64(4.0) * round(f64(0.25) * x)


@scalar
def add_places(total: Scalar, lost: Scalar, high: Scalar, low: Scalar, places: Scalar) -> tuple[Scalar, Scalar]:
    """total + lost + (high + low) * places, modulo 4, as such a pair again."""
    total, high_error = two_sum(total, part_of_turn(high * places))
    total, low_error = two_sum(total, part_of_turn(low * places))
    return total, lost + (high_error + low_error)


@scalar
def reduce_quadrant(x: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """x = n * pi/2 + r + s with |r| <= pi/4 and s the rounding error of r, for any finite float64; gives (r, s, n
    modulo 4 as int64). M. Payne and R. Hanek, *Radian reduction for trigonometric functions* (1983): x is multiplied
    by those places of 2/pi that are not whole turns of it."""
    exponent = i64(i64(bits(x) >> i64(52)) & i64(0x7FF))
    first = select(exponent >= i64(1103), i64(i64(i64(exponent - i64(1077)) * i64(2521)) >> i64(16)), i64(0))
    scaled = x * power_of_two(i64(i64(-26) * first)) * f64(2.0 ** -26)
    high, low = split(scaled)
    total, lost = add_places(f64(0.0), f64(0.0), high, low, two_over_pi(first))
    total, lost = add_places(total, lost, high, low, two_over_pi(i64(first + i64(1))) * f64(2.0 ** -26))
    total, lost = add_places(total, lost, high, low, two_over_pi(i64(first + i64(2))) * f64(2.0 ** -52))
    total, lost = add_places(total, lost, high, low, two_over_pi(i64(first + i64(3))) * f64(2.0 ** -78))
    total, lost = add_places(total, lost, high, low, two_over_pi(i64(first + i64(4))) * f64(2.0 ** -104))
    lost = lost + scaled * (two_over_pi(i64(first + i64(5))) * f64(2.0 ** -130))
    lost = lost + scaled * (two_over_pi(i64(first + i64(6))) * f64(2.0 ** -156))
    n = round(total)
    turn, rest = two_sum(total - n, lost)
    r, error = two_product(turn, f64(HALF_PI_HIGH))
    r, s = two_sum(r, error + (turn * f64(HALF_PI_LOW) + rest * f64(HALF_PI_HIGH)))
    return r, s, to_int(select(x - x == f64(0.0), n, f64(0.0)))


@scalar
def by_size(t: Scalar, near: float, far: float, farther: float, farthest: float) -> Scalar:
    """One of four constants: for t below 2**53, 2**81, 2**109, and above."""
    close = select(t < f64(2.0 ** 53), f64(near), f64(far))
    return select(t < f64(2.0 ** 81), close, select(t < f64(2.0 ** 109), f64(farther), f64(farthest)))


@scalar
def reduce_quadrant_wide(x: Scalar) -> tuple[Scalar, Scalar]:
    """(r, n) as `reduce_quadrant` for a float32 given as float64, with four pieces of 28 places of 2/pi."""
    t = abs(x)
    first = part_of_turn(x * by_size(t, PIECE_0, PIECE_1, PIECE_2, PIECE_3))
    second = part_of_turn(x * by_size(t, PIECE_1, PIECE_2, PIECE_3, PIECE_4))
    third = x * by_size(t, PIECE_2, PIECE_3, PIECE_4, PIECE_5)
    total, lost = two_sum(first, second)
    n = round(total)
    total, error = two_sum(total - n, third)
    turn = total + (lost + error + x * by_size(t, PIECE_3, PIECE_4, PIECE_5, PIECE_6))
    return turn * f64(HALF_PI_HIGH), to_int(select(t < f64(INFINITY), n, f64(0.0)))


@scalar
def sin_reduced(r: Scalar, s: Scalar) -> tuple[Scalar, Scalar]:
    """sin(r + s) for |r| <= pi/4, with its rounding error."""
    z = r * r
    tail = multiply_add(z * r, horner(z, SIN_DOUBLE), s - f64(0.5) * z * s)
    y = r + tail
    return y, tail - (y - r)


@scalar
def cos_reduced(r: Scalar, s: Scalar) -> tuple[Scalar, Scalar]:
    """cos(r + s) for |r| <= pi/4, with its rounding error."""
    z = r * r
    half = f64(0.5) * z
    w = f64(1.0) - half
    tail = ((f64(1.0) - w) - half) + multiply_add(z * z, horner(z, COS_DOUBLE), -r * s)
    y = w + tail
    return y, tail - (y - w)


@scalar
def sin_quadrant(r: Scalar, s: Scalar, n: Scalar) -> Scalar:
    """sin(r + s + n * pi/2)."""
    sine, _ = sin_reduced(r, s)
    cosine, _ = cos_reduced(r, s)
    y = select((n & i64(1)) != i64(0), cosine, sine)
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
    sine, sine_low = sin_reduced(r, s)
    cosine, cosine_low = cos_reduced(r, s)
    odd = (n & i64(1)) != i64(0)
    a, a_low = select(odd, -cosine, sine), select(odd, -cosine_low, sine_low)
    b, b_low = select(odd, sine, cosine), select(odd, sine_low, cosine_low)
    y = a / b
    p, e = two_product(y, b)
    return select(abs(x) < f64(1e-8), x, y + ((a - p) - e + (a_low - y * b_low)) / b)


@scalar
def sin_cos_wide(r: Scalar) -> tuple[Scalar, Scalar]:
    """(sin(r), cos(r)) for |r| <= pi/4, to 1e-11."""
    z = r * r
    sine = multiply_add(r * z, horner(z, SIN_WIDE), r)
    return sine, multiply_add(z * z, horner(z, COS_WIDE), f64(1.0) - f64(0.5) * z)


@scalar
def sin_f32(x: Scalar) -> Scalar:
    r, n = reduce_quadrant_wide(f64(x))
    sine, cosine = sin_cos_wide(r)
    y = f32(select((n & i64(1)) != i64(0), cosine, sine))
    return select(x == f32(0.0), x, select((n & i64(2)) != i64(0), -y, y))


@scalar
def cos_f32(x: Scalar) -> Scalar:
    r, n = reduce_quadrant_wide(f64(x))
    sine, cosine = sin_cos_wide(r)
    y = f32(select((n & i64(1)) != i64(0), sine, cosine))
    return select((i64(n + i64(1)) & i64(2)) != i64(0), -y, y)


@scalar
def tan_f32(x: Scalar) -> Scalar:
    r, n = reduce_quadrant_wide(f64(x))
    sine, cosine = sin_cos_wide(r)
    odd = (n & i64(1)) != i64(0)
    return select(x == f32(0.0), x, f32(select(odd, -cosine, sine) / select(odd, sine, cosine)))


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


sin = by_type("sin", sin_f32, sin_f64)
cos = by_type("cos", cos_f32, cos_f64)
tan = by_type("tan", tan_f32, tan_f64)
asin = by_type("asin", asin_f32, asin_f64)
acos = by_type("acos", acos_f32, acos_f64)
atan = by_type("atan", atan_f32, atan_f64)
atan2 = by_type("atan2", atan2_f32, atan2_f64)
