"""The scalar functions that GPU kernel text may call by their bare names: `NAMES`.

They are those of `kernels.cpu.math`, function by function: one text for both kinds of machine, so results agree to the
rounding of single operations, and random bits agree exactly. exp, exp2, expm1, log, tanh, sigmoid, erf and the roots compute
in float32 throughout; those that need more digits on the way (pow, sin, log1p, lgamma and others) take them in float64.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import NAMES
from jitgrad.kernels.cpu.scalar import Scalar, scalar, select

__all__ = ["NAMES", "is_better"]


@scalar
def is_better(x: Scalar, x_place: Scalar, y: Scalar, y_place: Scalar, largest: Scalar) -> Scalar:
    """True when argmax (argmin where `largest` is 0) takes x, found at `x_place`, and not y: NaN is beyond every number,
    and of equals the one at the lower place is taken."""
    beyond = select(largest != 0, x > y, x < y) | ((x != x) & (y == y))
    behind = select(largest != 0, y > x, y < x) | ((y != y) & (x == x))
    return beyond | (select(behind, False, True) & (x_place < y_place))
