"""erf, erfc, erfinv, lgamma, digamma, polygamma: scalar functions without branches, calls or tables.

erfc is exp(-x**2) times one polynomial on the whole half line (M. M. Shepherd and J. G. Laframboise, *Chebyshev
approximation of (1 + 2x) exp(x**2) erfc x*, 1981). lgamma and digamma use recurrences down to 1 … 2 (up to 8),
Stirling's series above, and reflection for negative arguments. polygamma is Hurwitz's zeta function, by Euler-Maclaurin
summation (NIST, *Digital Library of Mathematical Functions*, 25.11.5) behind the first 15 terms.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.arithmetic import integer_power
from jitgrad.kernels.cpu.exponential import LOG2_E, exp2_wide, exp_f32, exp_parts_f64
from jitgrad.kernels.cpu.logarithmic import INFINITY, NAN, log_f64
from jitgrad.kernels.cpu.pairs import split, sum_ordered, two_product
from jitgrad.kernels.cpu.pieces import erf_by_pieces
from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    by_type,
    copysign,
    f32,
    f64,
    floor,
    horner,
    i64,
    multiply_add,
    permutes,
    round,
    scalar,
    scale,
    select,
    sqrt,
)
from jitgrad.kernels.cpu.trigonometric import PI_HIGH, PI_LOW, cos_reduced, sin_reduced

# erf(x) / x - 1 of x**2: |x| <= 0.93, |x| <= 1
ERF_SINGLE = (8.334718615209905e-05, -0.0008134709332119057, 0.005200368586864961, -0.026859151472438985,
              0.11283691519733097, -0.3761263351714081, 0.12837916662064427)
ERF_DOUBLE = (5.957176147748911e-11, -1.1372848856791674e-09, 1.4659775274047436e-08, -1.6350312701054695e-07,
              1.6461000484121368e-06, -1.4925595266831182e-05, 0.0001205533111164271, -0.000854832698083379,
              0.0052239776248180145, -0.026866170645076792, 0.11283791670954879, -0.3761263890318375,
              0.1283791670955126)
# log(erfc(x)) on 0.92 … 4
LOG_ERFC_SINGLE = (1.6435696536038326e-06, -4.617791279040004e-05, 0.0005977434719606111, -0.0047635752491493495,
                   0.026431017603369227, -0.110094480827649, -0.6318145166593842, -1.1302376163746712,
                   0.00032044153127726646)
# (1 + 2 * x) * exp(x**2) * erfc(x) of q = (x - 3) / (x + 3), x >= 0.9
ERFC_DOUBLE = (-2.4463257462151428e-08, 1.4403583386129837e-07, -8.204373819350643e-08, -6.871189666681773e-07,
               3.420483221602019e-07, 3.5149530804581646e-06, -7.351941269643587e-07, -2.011418192644693e-05,
               4.952470533302082e-06, 0.00012510192359161854, -0.00010516054420877889, -0.0007798325676492488,
               0.0018886904539234515, 0.0025293918364890553, -0.02377051492504454, 0.06830802734317813,
               -0.119273663415099, 0.12964515870277596, -0.047562294353453334, -0.13562110612458128)
ERFC_DOUBLE_LAST = 1.2530080582697296
ERFC_WIDE = (0.00010785809181819806, -0.00010167544601057589, -0.0007737961882177074, 0.0018878015137289996,
             0.002528374285865266, -0.023770424824759016, 0.06830810877409164, -0.11927366590603534,
             0.12964515608662025, -0.047562294404099335, -0.13562110610452965, 1.2530080582705034)
# lgamma(z) / ((z - 1) * (z - 2)) of z - 1.5, 1 <= z <= 2
LGAMMA = (-7.760660152513446e-06, 1.2140008083973407e-05, -8.355075869795273e-06, 1.3186019073996835e-05,
          -2.7201673025504752e-05, 4.30276814976503e-05, -6.614136022346414e-05, 0.00010535512483785591,
          -0.0001689178215524898, 0.00027131373861446925, -0.00043799307479613914, 0.000711519067515296,
          -0.0011644145847310124, 0.0019229163127905161, -0.0032120740737152814, 0.005446457839126065,
          -0.009425622448525798, 0.01679709863127416, -0.031308487501010646, 0.06291140107456439,
          -0.14595989591430608, 0.4831289505409809)
# x * (lgamma(x) - (x - 1/2) * log(x) + x - log(2 * pi) / 2) and x**2 * (log(x) - 1 / (2 * x) - digamma(x)),
# of x**-2, x >= 8
STIRLING = (0.005065905360156132, -0.001890382993887715, 0.0008414700852503147, -0.0005952365845057049,
            0.0007936507897524059, -0.002777777777773988, 0.08333333333333333)
DIGAMMA = (0.06362150587634356, -0.020697987372370493, 0.007571689620283902, -0.0041666448230497,
           0.0039682539119537084, -0.008333333333278636, 0.08333333333333333)
# B(2k) / (2k)!
ZETA_0, ZETA_1, ZETA_2, ZETA_3, ZETA_4, ZETA_5, ZETA_6, ZETA_7 = (
    0.08333333333333333, -0.001388888888888889, 3.306878306878307e-05, -8.267195767195768e-07, 2.08767569878681e-08,
    -5.284190138687493e-10, 1.3382536530684679e-11, -3.3896802963225827e-13)

# erfinv(x) / x, w = -log(1 - x**2): of w < 2, of w - 4.125 < 2.125, of sqrt(w) - 3.25 < 0.75, of sqrt(w) - 5
ERFINV_CENTER = (2.2697626912516596e-14, -2.289628703441694e-13, -6.521037717532366e-13, 1.6764871819735877e-11,
                 -2.814313106037036e-11, -5.026332899563926e-10, 7.260482291725715e-10, 2.2820916379019017e-08,
                 -3.73147899537184e-08, -1.0125441301862486e-06, 2.0199849881037343e-06, 4.6611441407008436e-05,
                 -0.00012804329443152814, -0.0023351016415928544, 0.01154934203826991, 0.23201366653465452)
ERFINV_NEAR = (7.780972069273118e-19, 2.3470495548701027e-17, -2.635133515505956e-16, 1.6281505086267283e-16,
               1.454428482759722e-14, -1.2771784277132816e-13, 2.196832568898822e-13, 5.794627673946071e-12,
               -6.343712973520258e-11, 1.9794590344168086e-10, 2.154447580965131e-09, -3.117301702617685e-08,
               1.4491047054338556e-07, 6.273196973249886e-07, -1.5095674340358412e-05, 0.00010930641145857938,
               -0.00014693690018380441, -0.007286705803949207, 0.22654076904845152)
ERFINV_MIDDLE = (7.633691428917867e-09, -1.5405442548741828e-08, -2.079552944126927e-08, 1.3184413710135048e-07,
                 -2.456259700489211e-07, -2.7895486741709117e-08, 1.481672536807299e-06, -3.985541911448451e-06,
                 2.9325525810809953e-06, 1.246497096070878e-05, -4.732067527913043e-05, 6.828712942963752e-05,
                 2.403151221089547e-05, -0.0003550378152652618, 0.0009532893416222481, -0.0016882755353507652,
                 0.002491442097955697, -0.0037512085082276724, 0.005370914553555044, 1.0052589676941655)
ERFINV_FAR = (5.841530389700038e-12, -2.0541711940901768e-11, 1.4890382344482798e-11, 7.01823182982719e-11,
              -3.810309747432761e-10, 1.3149790570026425e-09, -3.5339457842733433e-09, 7.822305451465012e-09,
              -1.5213736370231545e-08, 2.9018232531614878e-08, -6.757272912034954e-08, 2.2905292974028484e-07,
              -9.930254932588424e-07, 4.526052509952851e-06, -1.9681771196366817e-05, 7.599527809787885e-05,
              -0.0002150301197991643, -0.0001387193183801729, 1.0103004648645448)
ERFINV_CENTER_LAST, ERFINV_NEAR_LAST = 0.886226925452758, 1.8872102492009424
ERFINV_MIDDLE_LAST, ERFINV_FAR_LAST = 3.0838856104922208, 4.849906401408584


@scalar
def erf_f32(x: Scalar) -> Scalar:
    t = abs(x)
    near = multiply_add(x, horner(x * x, ERF_SINGLE), x)
    far = f32(1.0) - exp_f32(horner(select(t < f32(4.0), t, f32(4.0)), LOG_ERFC_SINGLE))
    y = select(x != x, x, select(t < f32(0.925), near, copysign(far, x)))
    return select(permutes(), erf_by_pieces(x), y)


@scalar
def erfc_far(t: Scalar) -> Scalar:
    """erfc(t) for t >= 0.9. t**2 is carried with its rounding error, since exp magnifies it; and so are the factors."""
    t = select(t < f64(28.0), t, f64(28.0))
    head, _ = split(t)
    z, n = exp_parts_f64(-(head * head), (head - t) * (head + t))
    power, power_low = sum_ordered(f64(1.0), z)
    q = (t - f64(3.0)) / (t + f64(3.0))
    above, above_low = sum_ordered(f64(ERFC_DOUBLE_LAST), q * horner(q, ERFC_DOUBLE))
    below = f64(1.0) + f64(2.0) * t
    y = above / below
    p, e = two_product(y, below)
    y_low = ((above - p) - e + above_low) / below
    product, product_low = two_product(power, y)
    return scale(product + (product_low + power * y_low + power_low * y), n)


@scalar
def erf_f64(x: Scalar) -> Scalar:
    t = abs(x)
    near = multiply_add(x, horner(x * x, ERF_DOUBLE), x)
    return select(x != x, x, select(t < f64(1.0), near, copysign(f64(1.0) - erfc_far(t), x)))


@scalar
def erfc_f64(x: Scalar) -> Scalar:
    t = abs(x)
    y = x * horner(x * x, ERF_DOUBLE)
    near = select(x < f64(0.25), f64(1.0) - (x + y), f64(0.5) - ((x - f64(0.5)) + y))
    far = erfc_far(t)
    far = select(x < f64(0.0), f64(2.0) - far, far)
    return select(x != x, x, select(t < f64(0.9), near, far))


@scalar
def erfc_f32(x: Scalar) -> Scalar:
    wide = f64(x)
    t = select(abs(wide) < f64(12.0), abs(wide), f64(12.0))
    near = f64(1.0) - multiply_add(wide, horner(wide * wide, ERF_SINGLE), wide)
    q = (t - f64(3.0)) / (t + f64(3.0))
    far = exp2_wide(t * t * f64(-LOG2_E)) * horner(q, ERFC_WIDE) / (f64(1.0) + f64(2.0) * t)
    far = select(wide < f64(0.0), f64(2.0) - far, far)
    return select(x != x, x, f32(select(t < f64(0.92), near, far)))


@scalar
def log_gamma_positive(x: Scalar) -> Scalar:
    """log(gamma(x)) for x > 0."""
    z, p = x, f64(1.0)
    for _ in range(6):
        above = z >= f64(2.0)
        z = select(above & (x < f64(8.0)), z - f64(1.0), z)
        p = select(above, p * z, p)
    below = x < f64(1.0)
    z = select(below, x + f64(1.0), z)
    first = select(below, x, z - f64(1.0))
    second = select(below, x - f64(1.0), z - f64(2.0))
    logarithm = log_f64(select(x < f64(8.0), select(below, x, p), x))
    near = first * second * horner(z - f64(1.5), LGAMMA) + select(below, -logarithm, logarithm)
    inverse = f64(1.0) / select(x < f64(8.0), f64(8.0), x)
    series = f64(0.4189385332046727) + inverse * horner(inverse * inverse, STIRLING)
    return select(x < f64(8.0), near, (x - f64(0.5)) * (logarithm - f64(1.0)) + series)


@scalar
def sin_cos_pi(x: Scalar) -> tuple[Scalar, Scalar]:
    """(abs(sin(pi * x)), abs(cos(pi * x)))."""
    r = abs(x - round(x))
    small = r < f64(0.25)
    turn = select(small, r, f64(0.5) - r)
    angle, error = f64(PI_HIGH) * turn, f64(PI_LOW) * turn
    sine, _ = sin_reduced(angle, error)
    cosine, _ = cos_reduced(angle, error)
    return select(small, sine, cosine), select(small, cosine, sine)


@scalar
def lgamma_f64(x: Scalar) -> Scalar:
    """log(abs(gamma(x))); infinity at zero and the negative integers."""
    t = abs(x)
    positive = log_gamma_positive(t)
    sine, _ = sin_cos_pi(t)
    negative = log_f64(f64(PI_HIGH) / (t * sine)) - positive
    y = select(x > f64(0.0), positive, negative)
    y = select((x <= f64(0.0)) & (floor(x) == x), f64(INFINITY), y)
    return select(x != x, x, select(t == f64(INFINITY), f64(INFINITY), y))


@scalar
def digamma_f64(x: Scalar) -> Scalar:
    """The derivative of lgamma; NaN at the negative integers, minus infinity with the opposite sign of zero at
    zero."""
    reflected = x < f64(0.0)
    z = select(reflected, f64(1.0) - x, x)
    total = f64(0.0)
    for _ in range(8):
        below = z < f64(8.0)
        total = select(below, total - f64(1.0) / z, total)
        z = select(below, z + f64(1.0), z)
    inverse = f64(1.0) / z
    square = inverse * inverse
    y = log_f64(z) - f64(0.5) * inverse - square * horner(square, DIGAMMA) + total
    sine, cosine = sin_cos_pi(x)
    y = select(reflected, y - f64(PI_HIGH) * copysign(cosine / sine, x - round(x)), y)
    y = select(reflected & (floor(x) == x), f64(NAN), y)
    return select(x == f64(0.0), copysign(f64(INFINITY), -x), select(x == f64(INFINITY), x, y))


@scalar
def zeta_tail(rest: Scalar, s: Scalar, k: Scalar, square: Scalar, term: Scalar) -> Scalar:
    """Term k of the series for s, and all behind it: of each the next is (s + 2 k - 1) (s + 2 k) / x**2 times as much."""
    return f64(term) + (s + f64(2 * k + 1)) * (s + f64(2 * k + 2)) * square * rest


@scalar
def zeta(x: Scalar, n: Scalar) -> Scalar:
    """The sum of (x + k) ** -(n + 1) over all k >= 0, for n >= 1 and x >= 0."""
    s, total, z = f64(n + i64(1)), f64(0.0), x
    for _ in range(15):
        total = total + f64(1.0) / integer_power(z, n + i64(1))
        z = z + f64(1.0)
    inverse = f64(1.0) / z
    square, power = inverse * inverse, f64(1.0) / integer_power(z, n)
    rest = zeta_tail(f64(ZETA_7), s, 6, square, ZETA_6)
    rest = zeta_tail(rest, s, 5, square, ZETA_5)
    rest = zeta_tail(rest, s, 4, square, ZETA_4)
    rest = zeta_tail(rest, s, 3, square, ZETA_3)
    rest = zeta_tail(rest, s, 2, square, ZETA_2)
    rest = zeta_tail(rest, s, 1, square, ZETA_1)
    rest = zeta_tail(rest, s, 0, square, ZETA_0)
    return total + power * (f64(1.0) / f64(n) + inverse * f64(0.5) + s * square * rest)


@scalar
def polygamma_f64(x: Scalar, n: Scalar) -> Scalar:
    """The derivative of order n >= 1, an int64, of digamma; NaN for negative x unless n is 1."""
    reflected = x < f64(0.0)
    y = zeta(select(reflected, f64(1.0) - x, abs(x)), n)
    factorial, k = f64(1.0), n
    while k > i64(1):
        factorial, k = factorial * f64(k), k - i64(1)
    sine, _ = sin_cos_pi(x)
    turn = f64(PI_HIGH) / sine
    negative = select(n == i64(1), turn * turn - y, f64(NAN))
    positive = select((n & i64(1)) != i64(0), factorial * y, -factorial * y)
    return select(x != x, x, select(reflected, negative, positive))


@scalar
def polygamma_f32(x: Scalar, n: Scalar) -> Scalar:
    return f32(polygamma_f64(f64(x), n))


@scalar
def lgamma_f32(x: Scalar) -> Scalar:
    return f32(lgamma_f64(f64(x)))


@scalar
def digamma_f32(x: Scalar) -> Scalar:
    return f32(digamma_f64(f64(x)))


@scalar
def erfinv_f64(x: Scalar) -> Scalar:
    """The inverse of erf, after M. Giles, *Approximating the erfinv function* (2010): polynomials in log(1 - x**2)."""
    square, error = two_product(x, x)
    rest, rest_low = sum_ordered(f64(1.0), -square)
    w = -(log_f64(rest) + (rest_low - error) / rest)
    s = sqrt(w)
    center, near, middle = w < f64(2.0), w < f64(6.25), s < f64(4.0)
    u = select(center, w, select(near, w - f64(4.125), select(middle, s - f64(3.25), s - f64(5.0))))
    close = select(center, horner(u, ERFINV_CENTER), horner(u, ERFINV_NEAR))
    tail = u * select(near, close, select(middle, horner(u, ERFINV_MIDDLE), horner(u, ERFINV_FAR)))
    close = select(center, f64(ERFINV_CENTER_LAST), f64(ERFINV_NEAR_LAST))
    last = select(near, close, select(middle, f64(ERFINV_MIDDLE_LAST), f64(ERFINV_FAR_LAST)))
    slope, slope_low = sum_ordered(last, tail)
    y, y_low = two_product(x, slope)
    return select(abs(x) == f64(1.0), x * f64(INFINITY), y + (y_low + x * slope_low))


@scalar
def erfinv_f32(x: Scalar) -> Scalar:
    return f32(erfinv_f64(f64(x)))


erf = by_type("erf", erf_f32, erf_f64)
erfc = by_type("erfc", erfc_f32, erfc_f64)
erfinv = by_type("erfinv", erfinv_f32, erfinv_f64)
lgamma = by_type("lgamma", lgamma_f32, lgamma_f64)
digamma = by_type("digamma", digamma_f32, digamma_f64)
polygamma = by_type("polygamma", polygamma_f32, polygamma_f64)
