"""Arithmetic that keeps its rounding errors: a float64 result and what is missing from it, as a pair.

T. J. Dekker, *A floating-point technique for extending the available precision* (1971). None of it may contract, and
none of it needs a fused multiply-add.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.scalar import Scalar, bits, from_bits, i64, scalar


@scalar
def two_sum(x: Scalar, y: Scalar) -> tuple[Scalar, Scalar]:
    """(s, e) with x + y = s + e exactly: s is the rounded sum."""
    s = x + y
    from_y = s - x
    return s, (x - (s - from_y)) + (y - from_y)


@scalar
def sum_ordered(x: Scalar, y: Scalar) -> tuple[Scalar, Scalar]:
    """As `two_sum`, for |x| >= |y|."""
    s = x + y
    return s, y - (s - x)


@scalar
def split(x: Scalar) -> tuple[Scalar, Scalar]:
    """(high, low) with x = high + low exactly, 26 significant bits in high and at most 27 in low."""
    high = from_bits(i64(bits(x) & i64(-134217728)))
    return high, x - high


@scalar
def two_product(x: Scalar, y: Scalar) -> tuple[Scalar, Scalar]:
    """(p, e) with x * y = p + e exactly (float64, no overflow): p is the rounded product."""
    p = x * y
    x_high, x_low = split(x)
    y_high, y_low = split(y)
    return p, ((x_high * y_high - p) + x_high * y_low + x_low * y_high) + x_low * y_low
