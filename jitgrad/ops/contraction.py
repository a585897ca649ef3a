"""Ops that multiply and add up along shared dimensions: matrix products and convolutions.

16-bit floats accumulate in float32 and round once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import conjugate
from jitgrad.ops.record import in_float32, require_category


def _infer_matmul(x: TensorType, y: TensorType) -> TensorType:
    shown = f"{x} @ {y}"
    if x.dtype is not y.dtype:
        raise complain(DTypeError, "matmul", f"operands differ in dtype: {shown}",
                       fix=f"Did you mean y.to(jitgrad.{x.dtype.name})?")
    require_category("matmul", x.dtype, "uifc")
    if x.ndim < 2 or x.ndim != y.ndim:
        raise complain(ShapeError, "matmul", f"operands need the same number of dimensions, at least two: {shown}")
    if x.shape[-1] != y.shape[-2]:
        fix = "Did you mean x @ w.T?" if x.shape[-1] == y.shape[-1] else ""
        raise complain(ShapeError, "matmul", f"inner dimensions differ: {shown}", fix=fix)
    if x.shape[:-2] != y.shape[:-2]:
        raise complain(ShapeError, "matmul", f"batch dimensions differ: {shown}")
    return x.with_shape(x.shape[:-1] + y.shape[-1:])


def transposed(x: Any) -> Any:
    """The last two dimensions swapped."""
    n = len(x.shape)
    return ops.permute(x, axes=(*range(n - 2), n - 1, n - 2))


matmul = register(Op(
    "matmul", ("x", "y"), _infer_matmul, in_float32(np.matmul), "contraction",
    vjp=(lambda g, y: ops.matmul(g, conjugate(transposed(y))), lambda g, x: ops.matmul(conjugate(transposed(x)), g)),
    doc="Matrix product of the last two dimensions; leading (batch) dimensions are equal."))
