"""The check of an index as an op of its own, so that what the index selects can be computed inside of a kernel."""

from __future__ import annotations

import numpy as np

from jitgrad.errors import OutOfRangeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ops.record import MAY_FAIL, same_type

__all__ = ["check_index"]


def _check(index: np.ndarray, limit: np.ndarray) -> np.ndarray:
    outside = (index < 0) | (index >= limit)
    if outside.any():
        wrong = np.broadcast_to(index, outside.shape)[outside].flat[0]
        raise complain(OutOfRangeError, "check_index", f"index {wrong} is out of range")
    return index


check_index = register(Op(
    "check_index", ("index", "limit"), same_type("check_index", "ui"), _check, "elementwise", spell="{0}",
    effects=MAY_FAIL, doc="index; OutOfRangeError where it is not in 0 … limit - 1."))
