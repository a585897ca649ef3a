"""NumPy references of special functions: erf, erfc, erfinv, lgamma, digamma, polygamma.

In and out: floating-point arrays of any dtype and shape; the work is done in float64, to a few units in the last
place of it (digamma near its zero: of 1). The tables are Chebyshev series of smooth functions that were computed with
40 digits; what each one is of stands above it. Narrower operands use only the terms that they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# erf(x) / x on |x| <= 1, in 2 x² - 1
_ERF = (
    0.9754769393826541, -0.14226120510371365, 0.010035582187599796, -0.0005768764699767485, 2.741993125219606e-05,
    -1.1043175507344507e-06, 3.8488755420345036e-08, -1.1808582533875466e-09, 3.2334215826050907e-11,
    -7.991015947004549e-13, 1.7990725113961456e-14, -3.718635487818693e-16, 7.103599003714253e-18)

# exp(x²) erfc(x) (1 + 2 x) on 0 <= x < inf, in (x - 3.75) / (x + 3.75)
_ERFC = (
    1.1775789345674017, -0.004590054580646478, -0.08424913336651792, 0.05920993999819189, -0.026658668435305753,
    0.009074997670705265, -0.002413163540417608, 0.0004907758365258086, -6.916973302501207e-05, 4.13902798607301e-06,
    7.74038306619849e-07, -2.1886401049234397e-07, 1.076499946567091e-08, 4.521959811218287e-09,
    -7.754400208831351e-10, -6.318088340886684e-11, 2.86879501093067e-11, 1.9455868545777362e-13,
    -9.654696748433441e-13, 3.2525481481486934e-14, 3.3478119482867324e-14, -1.864562880420254e-15,
    -1.2507950530699507e-15, 7.418235256508847e-17, 5.068148904682642e-17)

# log(gamma(x)) / ((x - 1) (x - 2)) on 0.5 <= x <= 3, in (x - 1.75) / 1.25
_LGAMMA = (
    0.4969196496241282, -0.18983770295364127, 0.051642363278249136, -0.01620888582719529, 0.005480868756901195,
    -0.0019373470781938534, 0.0007048910082035581, -0.00026169697337740814, 9.861130565519249e-05,
    -3.7584856908988406e-05, 1.4455839828556131e-05, -5.6014342781194404e-06, 2.1839963102639326e-06,
    -8.560510993494189e-07, 3.3707703487176757e-07, -1.3325698991082197e-07, 5.286623421759879e-08,
    -2.1039026610571943e-08, 8.396346115994458e-09, -3.3593279703588836e-09, 1.347128417758247e-09,
    -5.413413585081661e-10, 2.179523895564128e-10, -8.790476934031152e-11, 3.551107466208523e-11,
    -1.4366889879916915e-11, 5.820523962016641e-12, -2.361128116146316e-12, 9.589528652171644e-13,
    -3.8990699504056754e-13, 1.5870109734168948e-13, -6.465854220933822e-14, 2.6367771020705008e-14,
    -1.0762152407586304e-14, 4.396243296659399e-15, -1.797221357503132e-15, 7.352595459272878e-16,
    -3.010110271283285e-16, 1.2331372609685956e-16, -5.054910883766592e-17, 2.073363598084663e-17,
    -8.509128175401906e-18, 3.494064241874015e-18)

# B(2k) / (2k): the asymptotic series of digamma in 1 / x² (Abramowitz and Stegun 6.3.18)
_DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12, -3617 / 8160)
_BERNOULLI = tuple(2 * (k + 1) * c for k, c in enumerate(_DIGAMMA))

Function = Callable[[np.ndarray, float], Any]


def _reference(function: Function) -> Callable[..., Any]:
    """A function of (at least 1-d float64 array, needed precision), as an op's reference of any dtype and shape."""

    def eager(x: np.ndarray) -> Any:
        precision = 1e-18 if x.dtype == np.float64 else 1e-10
        return function(np.atleast_1d(x).astype(np.float64), precision).astype(x.dtype).reshape(x.shape)

    return eager


def _chebyshev(coefficients: tuple[float, ...], t: np.ndarray, precision: float) -> Any:
    """The series at t in [-1, 1] by Clenshaw's recurrence, without its last terms where they are below `precision`."""
    terms = len(coefficients)
    while abs(coefficients[terms - 1]) < precision:
        terms -= 1
    twice = t + t
    current, last = np.zeros_like(t), np.zeros_like(t)
    for c in reversed(coefficients[1:terms]):
        current, last = twice * current - last + c, current
    return t * current - last + coefficients[0]


def _erf_near_zero(x: np.ndarray, precision: float) -> Any:
    return x * _chebyshev(_ERF, 2 * x * x - 1, precision)


def _erfc_positive(x: np.ndarray, precision: float) -> Any:
    x = np.minimum(x, 40.0)                                     # erfc is 0 from 27.3 on
    series = _chebyshev(_ERFC, (x - 3.75) / (x + 3.75), precision) / (1 + 2 * x)
    head = x.astype(np.float32).astype(np.float64)              # head² is exact, so exp(-x²) keeps its accuracy
    return series * np.exp(-head * head) * np.exp((head - x) * (head + x))


def _erf(x: np.ndarray, precision: float) -> Any:
    near = np.absolute(x) <= 1
    if near.all():
        return _erf_near_zero(x, precision)
    out = np.empty_like(x)
    out[near] = _erf_near_zero(x[near], precision)
    far = x[~near]
    out[~near] = np.copysign(1 - _erfc_positive(np.absolute(far), precision), far)
    return out


def _erfc(x: np.ndarray, precision: float) -> np.ndarray:
    small = x < 0.5
    out = np.empty_like(x)
    out[small] = 1 - _erf(x[small], precision)
    out[~small] = _erfc_positive(x[~small], precision)
    return out


def _erfinv(y: np.ndarray, precision: float) -> Any:
    """A first guess (S. Winitzki, 2008), then Halley's steps on erf, or on erfc where 1 - |y| is exact."""
    size = np.absolute(y)
    with np.errstate(all="ignore"):
        half_log = 0.5 * np.log1p(-size * size)
        a = 2 / (math.pi * 0.147) + half_log
        x = np.sqrt(np.sqrt(a * a - 2 * half_log / 0.147) - a)
        for _ in range(3):
            error = np.where(size < 0.5, _erf(x, precision) - size, (1 - size) - _erfc(x, precision))
            step = error * (math.sqrt(math.pi) / 2) * np.exp(x * x)
            x = x - step / (1 + x * step)
    x = np.where(size < 1e-9, size * (math.sqrt(math.pi) / 2), x)
    x = np.where(size == 1, np.inf, x)
    return np.copysign(np.where(size <= 1, x, np.nan), y)


def _lgamma(x: np.ndarray, precision: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        left = x < 0.5
        out = _lgamma_right(np.where(left, 1 - x, x), precision)
        reflected = np.log(math.pi / np.absolute(_sin_pi(x))) - out
        out = np.where(left, reflected, out)
        near_zero = left & (x > 0)
        out[near_zero] = _lgamma_right(x[near_zero] + 1, precision) - np.log(x[near_zero])
        return np.where(np.isinf(x), np.inf, out)


def _sin_pi(x: np.ndarray) -> Any:
    """sin(pi x), exactly 0 at integers."""
    return np.sin(math.pi * (x - np.rint(x)))


def _lgamma_right(x: np.ndarray, precision: float) -> Any:
    """log(gamma(x)) for x >= 0.5: Stirling's series from 10 on; below, shifted down into the table's range."""
    base, factor = np.minimum(x, 10.0), np.ones_like(x)
    for _ in range(7):
        above = base > 3
        base = np.where(above, base - 1, base)
        factor = np.where(above, factor * base, factor)
    table = (base - 1) * (base - 2) * _chebyshev(_LGAMMA, (base - 1.75) / 1.25, precision) + np.log(factor)
    inverse = 1 / x
    tail = np.zeros_like(x)
    for k in reversed(range(len(_BERNOULLI))):
        tail = tail * inverse * inverse + _BERNOULLI[k] / ((2 * k + 1) * (2 * k + 2))
    stirling = (x - 0.5) * (np.log(x) - 1) + (0.5 * math.log(2 * math.pi) - 0.5) + tail * inverse
    return np.where(x >= 10, stirling, table)


def _digamma(x: np.ndarray, precision: float) -> np.ndarray:
    """Upward recurrence to 10, then the asymptotic series; reflected for negative x."""
    with np.errstate(all="ignore"):
        negative = x < 0
        start = np.where(negative, 1 - x, x)
        shift, base = np.zeros_like(x), start
        for _ in range(10):
            below = base < 10
            shift = np.where(below, shift + 1 / base, shift)
            base = np.where(below, base + 1, base)
        inverse = 1 / (base * base)
        tail = np.zeros_like(x)
        for c in reversed(_DIGAMMA):
            tail = (tail + c) * inverse
        out = np.log(base) - 0.5 / base - tail - shift
        whole = np.rint(x)
        reflected = out - math.pi / np.tan(math.pi * (x - whole))
        out = np.where(negative, np.where(x == whole, np.nan, reflected), out)
        return np.where(x == 0, -np.copysign(np.inf, x), out)


def polygamma(x: np.ndarray, *, n: int) -> Any:
    """The derivative of order n >= 1 of digamma; nan at negative x unless n is 1."""

    def function(x: np.ndarray, precision: float) -> Any:
        with np.errstate(all="ignore"):
            sign = np.prod(np.arange(1.0, n + 1)) * (-1.0) ** (n + 1)
            if n > 1:
                return np.where(x < 0, np.nan, sign * _hurwitz_zeta(n + 1, x))
            right = _hurwitz_zeta(2, np.where(x < 0, 1 - x, x))
            return np.where(x < 0, (math.pi / _sin_pi(x)) ** 2 - right, right)

    return _reference(function)(x)


def _hurwitz_zeta(s: int, x: np.ndarray) -> np.ndarray:
    """The sum of 1 / (x + k) ** s over k >= 0, for s >= 2 and x > 0 (Euler-Maclaurin summation, 15 terms ahead)."""
    total = np.zeros_like(x)
    for k in range(15):
        total += (x + k) ** -float(s)
    base = x + 15
    total += base ** (1.0 - s) / (s - 1) + 0.5 * base ** -float(s)
    factor = s * base ** (-1.0 - s)
    for k, bernoulli in enumerate(_BERNOULLI):
        total += bernoulli * factor / math.factorial(2 * k + 2)
        factor = factor * (s + 2 * k + 1) * (s + 2 * k + 2) / (base * base)
    return total


erf, erfc, erfinv = _reference(_erf), _reference(_erfc), _reference(_erfinv)
lgamma, digamma = _reference(_lgamma), _reference(_digamma)
