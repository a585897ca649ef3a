"""Ops that read or write at places given by integer operands.

Indices are i32 or i64 and count from the front; one outside of its dimension raises OutOfRangeError. Where an index
occurs twice, the ``add`` ops accumulate in the order of the operand and the overwriting ones keep the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int32, int64
from jitgrad.errors import DTypeError, OutOfRangeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import zeros_like
from jitgrad.ops.record import MAY_FAIL, in_float32, require_axes, require_category


def _require_index(name: str, index: TensorType) -> None:
    if index.dtype not in (int32, int64):
        raise complain(DTypeError, name, f"indices are i32 or i64, got {index}", fix="Did you mean index.long()?")


def check_range(name: str, index: np.ndarray, size: int) -> None:
    """OutOfRangeError unless all of `index` lie in 0 … size - 1."""
    if index.size and (index.min() < 0 or index.max() >= size):
        bad = index[(index < 0) | (index >= size)].flat[0]
        raise complain(OutOfRangeError, name, f"index {bad} is out of range for a dimension of size {size}")


def _infer_take(x: TensorType, index: TensorType, *, axis: int) -> TensorType:
    require_axes("take", (axis,), x)
    _require_index("take", index)
    return x.with_shape(x.shape[:axis] + index.shape + x.shape[axis + 1:])


def _take(x: np.ndarray, index: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("take", index, x.shape[axis])
    # After the check, "wrap" only spares NumPy the buffered copy that its own check costs.
    return x.take(index, axis, mode="wrap") if index.size else np.take(x, index, axis)


take = register(Op(
    "take", ("x", "index"), _infer_take, _take, "index", effects=MAY_FAIL,
    vjp=(lambda g, x_type, index, axis: ops.index_add(zeros_like(x_type), index, g, axis=axis), None),
    doc="The slices of x along `axis` that `index` names: x.shape[:axis] + index.shape + x.shape[axis + 1:]."))


def _infer_indexed_write(name: str, categories: str) -> Any:
    def infer(x: TensorType, index: TensorType, source: TensorType, *, axis: int) -> TensorType:
        require_axes(name, (axis,), x)
        require_category(name, x.dtype, categories)
        _require_index(name, index)
        expected = x.with_shape(x.shape[:axis] + index.shape + x.shape[axis + 1:])
        if source != expected:
            raise complain(ShapeError, name, f"source is {source}, but {x} at {index} along axis {axis} "
                                             f"takes {expected}")
        return x

    return infer


def _place(index: np.ndarray, axis: int) -> tuple[Any, ...]:
    return (slice(None),) * axis + (index,)


def _index_add(x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("index_add", index, x.shape[axis])
    out = np.array(x)
    np.add.at(out, _place(index, axis), source)
    return out


index_add = register(Op(
    "index_add", ("x", "index", "source"), _infer_indexed_write("index_add", "buifc"), in_float32(_index_add), "index",
    effects=MAY_FAIL, vjp=(lambda g: g, None, lambda g, index, axis: ops.take(g, index, axis=axis)),
    doc="x with the slices of `source` added at the places along `axis` that `index` names; the adjoint of take."))
