"""Ordering along one dimension."""

from __future__ import annotations

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import bfloat16, int64
from jitgrad.errors import ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import zeros_like
from jitgrad.ops.index import along
from jitgrad.ops.record import require_axes, require_category

__all__ = ["sort", "topk"]


def _infer_sort(x: TensorType, *, axis: int, descending: bool, stable: bool) -> tuple[TensorType, TensorType]:
    require_axes("sort", (axis,), x)
    require_category("sort", x.dtype, "buif")
    return x, TensorType(int64, x.shape, x.device)


def _sort(x: np.ndarray, *, axis: int, descending: bool, stable: bool) -> tuple[np.ndarray, np.ndarray]:
    keys = x.astype(np.float32) if x.dtype == bfloat16.numpy else x           # NumPy does not put its nan last
    if descending:
        # Sorting the reversed rows keeps the order of equals, and brings nan (largest for NumPy, too) to the front.
        order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(keys, axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(keys, axis, kind="stable")
    return x[along(order, axis)], order.astype(np.int64, copy=False)


sort: Op = register(Op(
    "sort", ("x",), _infer_sort, _sort, "sort", outputs=2,
    vjp=(lambda g0, out1, x_type, axis: ops.scatter(zeros_like(x_type), out1, g0, axis=axis),),
    doc="The elements of x in order along `axis`, and where each one stood; nan is larger than everything. The order "
        "of equals is kept whether `stable` asks for it or not."))


def _infer_topk(x: TensorType, *, axis: int, k: int, descending: bool) -> tuple[TensorType, TensorType]:
    sorted_type, _ = _infer_sort(x, axis=axis, descending=descending, stable=True)
    if not 0 <= k <= x.shape[axis]:
        raise complain(ShapeError, "topk", f"k={k} is not in [0, {x.shape[axis]}], the size of dimension {axis} of {x}")
    kept = sorted_type.with_shape((*x.shape[:axis], k, *x.shape[axis + 1:]))
    return kept, kept.with_dtype(int64)


def _topk(x: np.ndarray, *, axis: int, k: int, descending: bool) -> tuple[np.ndarray, np.ndarray]:
    kept = (slice(None),) * axis + (slice(0, k),)
    values, order = _sort(x, axis=axis, descending=descending, stable=True)
    return np.ascontiguousarray(values[kept]), np.ascontiguousarray(order[kept])


topk: Op = register(Op(
    "topk", ("x",), _infer_topk, _topk, "sort", outputs=2,
    vjp=(lambda g0, out1, x_type, axis: ops.scatter(zeros_like(x_type), out1, g0, axis=axis),),
    doc="The first k elements of x in order along `axis`, and where each one stood: what `sort` begins with."))
