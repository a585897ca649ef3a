"""Signs, comparisons, roundings and divisions of floats and integers, with the rules of PyTorch and NumPy.

Every function works on each numeric type and returns the type of its first argument, unless it says otherwise.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.scalar import Scalar, absolute, like, scalar, select, sqrt


@scalar
def sign(x: Scalar) -> Scalar:
    """-1, 0 or 1; NaN for NaN."""
    zero = like(x, 0)
    return select(x > zero, like(x, 1), select(x < zero, like(x, -1), x))


@scalar
def relu(x: Scalar) -> Scalar:
    """x where it is positive, else 0; NaN for NaN."""
    return select(x <= like(x, 0), like(x, 0), x)


@scalar
def maximum(x: Scalar, y: Scalar) -> Scalar:
    """The larger one; NaN if either is NaN."""
    return select((x > y) | (x != x), x, y)


@scalar
def minimum(x: Scalar, y: Scalar) -> Scalar:
    """The smaller one; NaN if either is NaN."""
    return select((x < y) | (x != x), x, y)


@scalar
def rsqrt(x: Scalar) -> Scalar:
    """1 / sqrt(x)."""
    return like(x, 1) / sqrt(x)


@scalar
def reciprocal(x: Scalar) -> Scalar:
    """1 / x."""
    return like(x, 1) / x


@scalar
def isnan(x: Scalar) -> Scalar:
    """True for NaN."""
    return x != x


@scalar
def isinf(x: Scalar) -> Scalar:
    """True for either infinity."""
    return absolute(x) == like(x, INFINITY)


@scalar
def isfinite(x: Scalar) -> Scalar:
    """True for everything but NaN and the infinities."""
    return absolute(x) < like(x, INFINITY)


INFINITY = float("inf")
