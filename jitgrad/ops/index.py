"""Ops that read or write at places given by integer operands.

Indices are i32 or i64 and count from the front; one outside of its dimension raises OutOfRangeError. Where an index
occurs twice, the ``add`` ops accumulate in the order of the operand and the overwriting ones keep the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int32, int64
from jitgrad.errors import DTypeError, OutOfRangeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import zeros_like
from jitgrad.ops.record import MAY_FAIL, in_float32, require_axes, require_category, require_same

__all__ = ["gather", "index_add", "index_update", "scatter", "scatter_add", "take"]


def _require_index(name: str, index: TensorType) -> None:
    if index.dtype not in (int32, int64):
        raise complain(DTypeError, name, f"indices are i32 or i64, got {index}", fix="Did you mean index.long()?")


def check_range(name: str, index: np.ndarray, size: int) -> None:
    """OutOfRangeError unless all of `index` lie in 0 … size - 1."""
    # As unsigned numbers negative indices are too large: one pass over the operand finds both kinds.
    if index.size and index.view(_UNSIGNED[index.dtype.itemsize]).max() >= size:
        bad = index[(index < 0) | (index >= size)].flat[0]
        raise complain(OutOfRangeError, name, f"index {bad} is out of range for a dimension of size {size}")


_UNSIGNED: dict[int, Any] = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def _infer_take(x: TensorType, index: TensorType, *, axis: int) -> TensorType:
    require_axes("take", (axis,), x)
    _require_index("take", index)
    return x.with_shape(x.shape[:axis] + index.shape + x.shape[axis + 1:])


def _take(x: np.ndarray, index: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("take", index, x.shape[axis])
    # After the check, "wrap" only spares NumPy the buffered copy that its own check costs.
    return x.take(index, axis, mode="wrap") if index.size else np.take(x, index, axis)


take: Op = register(Op(
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
    return (*(slice(None),) * axis, index)


def _index_add(x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("index_add", index, x.shape[axis])
    out = np.array(x)
    if not index.size or not source.size:
        return out
    # Rows of equal index are added up side by side, which is much faster than np.add.at; sorting keeps their order.
    flat = index.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    rows = source.reshape(x.shape[:axis] + flat.shape + x.shape[axis + 1:])
    sums = np.add.reduceat(rows.take(order, axis), starts, axis, x.dtype)
    out[_place(ordered[starts], axis)] += sums
    return out


index_add: Op = register(Op(
    "index_add", ("x", "index", "source"), _infer_indexed_write("index_add", "buifc"), in_float32(_index_add), "index",
    effects=MAY_FAIL, vjp=(lambda g: g, None, lambda g, index, axis: ops.take(g, index, axis=axis)),
    doc="x with the slices of `source` added at the places along `axis` that `index` names; the adjoint of take."))


def _index_update(x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("index_update", index, x.shape[axis])
    out = np.array(x)
    out[_place(index, axis)] = source
    return out


index_update: Op = register(Op(
    "index_update", ("x", "index", "source"), _infer_indexed_write("index_update", "buifc"), _index_update, "index",
    effects=MAY_FAIL,
    vjp=(lambda g, index, source_type, axis: ops.index_update(g, index, zeros_like(source_type), axis=axis), None,
         lambda g, index, axis: ops.take(g, index, axis=axis)),
    doc="x with the slices at the places along `axis` that `index` names replaced by those of `source`; of equal "
        "indices the last one wins."))

# ---- element by element: index has the dimensions of x -----------------------------------------------------------


def along(index: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """For NumPy: the element of every place of `index`, but along `axis` the one that it names."""
    ndim = index.ndim
    return tuple([index if k == axis else np.arange(n).reshape((1,) * k + (n,) + (1,) * (ndim - k - 1))
                  for k, n in enumerate(index.shape)])


def _check_along(name: str, x: TensorType, index: TensorType, axis: int) -> None:
    require_axes(name, (axis,), x)
    _require_index(name, index)
    if index.ndim != x.ndim or any(n > size for k, (n, size) in enumerate(zip(index.shape, x.shape, strict=True))
                                   if k != axis):
        raise complain(ShapeError, name, f"index {index} does not lie in {x} outside of axis {axis}")


def _infer_gather(x: TensorType, index: TensorType, *, axis: int) -> TensorType:
    _check_along("gather", x, index, axis)
    return x.with_shape(index.shape)


def _gather(x: np.ndarray, index: np.ndarray, *, axis: int) -> Any:
    check_range("gather", index, x.shape[axis])
    return x[along(index, axis)]


gather: Op = register(Op(
    "gather", ("x", "index"), _infer_gather, _gather, "index", effects=MAY_FAIL,
    vjp=(lambda g, x_type, index, axis: ops.scatter_add(zeros_like(x_type), index, g, axis=axis), None),
    doc="For every place of `index` the element of x there, but along `axis` the one that index names."))


def _infer_scatter(name: str) -> Callable[..., TensorType]:
    def infer(x: TensorType, index: TensorType, source: TensorType, *, axis: int) -> TensorType:
        _check_along(name, x, index, axis)
        require_same(name, x.with_shape(index.shape), source)
        return x

    return infer


def _scatter_add(x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("scatter_add", index, x.shape[axis])
    out = np.array(x)
    np.add.at(out, along(index, axis), source)
    return out


scatter_add: Op = register(Op(
    "scatter_add", ("x", "index", "source"), _infer_scatter("scatter_add"), in_float32(_scatter_add), "index",
    effects=MAY_FAIL, vjp=(lambda g: g, None, lambda g, index, axis: ops.gather(g, index, axis=axis)),
    doc="x with every element of `source` added at its place, along `axis` at the one that `index` names; the adjoint "
        "of gather."))


def _scatter(x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int) -> np.ndarray:
    check_range("scatter", index, x.shape[axis])
    out = np.array(x)
    out[along(index, axis)] = source
    return out


scatter: Op = register(Op(
    "scatter", ("x", "index", "source"), _infer_scatter("scatter"), _scatter, "index", effects=MAY_FAIL,
    vjp=(lambda g, index, source_type, axis: ops.scatter(g, index, zeros_like(source_type), axis=axis), None,
         lambda g, index, axis: ops.gather(g, index, axis=axis)),
    doc="As scatter_add, but elements are replaced; of equal places the last one wins."))
