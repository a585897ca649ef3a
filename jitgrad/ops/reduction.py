"""Ops that combine the elements along some dimensions into one; those dimensions are gone from the result.

16-bit floats accumulate in float32 and round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int64
from jitgrad.errors import ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import conjugate, expand_dims
from jitgrad.ops.record import in_float32, require_axes, require_category

__all__ = ["argmax", "argmin", "max", "min", "prod", "repeat_back", "sum"]

Ints = tuple[int, ...]


def _infer(name: str, categories: str, needs_elements: bool) -> Callable[..., TensorType]:
    def infer(x: TensorType, *, axes: Ints) -> TensorType:
        require_axes(name, axes, x)
        require_category(name, x.dtype, categories)
        if needs_elements and any(x.shape[a] == 0 for a in axes):
            raise complain(ShapeError, name, f"of no elements has no value: {x} over axes {axes}")
        return x.with_shape(tuple([n for k, n in enumerate(x.shape) if k not in axes]))

    return infer


def repeat_back(x: Any, axes: Ints, shape: Ints) -> Any:
    """`x`, reduced over `axes` of `shape`, repeated to that shape again."""
    return ops.broadcast_to(expand_dims(x, axes), shape=shape) if axes else x


def _reduce(ufunc: np.ufunc) -> Callable[..., Any]:
    """A reduction that keeps the dtype (NumPy would widen small integers and bool)."""
    return in_float32(lambda x, *, axes: ufunc.reduce(x, axes, x.dtype))


sum: Op = register(Op("sum", ("x",), _infer("sum", "buifc", False), _reduce(np.add), "reduction", identity=0,
                      vjp=(lambda g, x_type, axes: repeat_back(g, axes, x_type.shape),), spell="{0} + {1}",
                      doc="Sum over `axes`, in the dtype of x."))


def _prod_gradient(g: Any, x: Any, axes: Ints) -> Any:
    """The product of all other elements, without dividing: products from the left times products from the right."""
    kept = tuple([k for k in range(len(x.shape)) if k not in axes])
    moved = ops.permute(x, axes=kept + axes)
    outer, inner = tuple([x.shape[k] for k in kept]), math.prod([x.shape[k] for k in axes])
    rows = ops.reshape(moved, shape=(*outer, inner))
    others = ops.mul(_products_before(rows, len(outer)), _reverse(_products_before(_reverse(rows), len(outer))))
    spread = ops.mul(repeat_back(g, (len(outer),), (*outer, inner)), conjugate(others))
    return ops.permute(ops.reshape(spread, shape=moved.shape), axes=ops.inverse_permutation(kept + axes))


def _reverse(rows: Any) -> Any:
    return ops.flip(rows, axes=(len(rows.shape) - 1,))


def _products_before(rows: Any, axis: int) -> Any:
    """Along the last dimension: 1, r0, r0 r1, …; the product of all elements before each one."""
    *outer, n = rows.shape
    if n == 0:
        return rows
    ones = ops.full((*outer, 1), 1.0, rows.dtype)
    head = ops.slice(rows, start=(0,) * (axis + 1), stop=(*outer, n - 1), step=(1,) * (axis + 1))
    return ops.cumprod(ops.concat(ones, head, axis=axis), axis=axis)


prod: Op = register(Op("prod", ("x",), _infer("prod", "buifc", False), _reduce(np.multiply), "reduction", identity=1,
                       vjp=(_prod_gradient,), spell="{0} * {1}", doc="Product over `axes`, in the dtype of x."))


def _extreme_gradient(g: Any, out: Any, x: Any, axes: Ints) -> Any:
    """Evenly among the elements that are equal to the extreme (as ``torch.amax``)."""
    chosen = ops.eq(x, repeat_back(out, axes, x.shape))
    weight = ops.cast(chosen, dtype=x.dtype)
    share = ops.div(g, ops.sum(weight, axes=axes))
    return ops.mul(weight, repeat_back(share, axes, x.shape))


def _extreme(name: str, ufunc: np.ufunc, doc: str) -> Op:
    return register(Op(name, ("x",), _infer(name, "buif", True), lambda x, *, axes: ufunc.reduce(x, axes), "reduction",
                       vjp=(_extreme_gradient,), spell=ufunc.__name__ + "({0}, {1})", doc=doc))


max: Op = _extreme("max", np.maximum, "Largest element over `axes`; nan if there is one.")
min: Op = _extreme("min", np.minimum, "Smallest element over `axes`; nan if there is one.")


def _arg_extreme(name: str, eager: Callable[..., Any], doc: str) -> Op:
    def infer(x: TensorType, *, axis: int) -> TensorType:
        require_axes(name, (axis,), x)
        require_category(name, x.dtype, "buif")
        if x.shape[axis] == 0:
            raise complain(ShapeError, name, f"of no elements has no value: {x} along axis {axis}")
        return TensorType(int64, x.shape[:axis] + x.shape[axis + 1:], x.device)

    return register(Op(name, ("x",), infer, lambda x, *, axis: eager(x, axis).astype(np.int64, copy=False),
                       "reduction", doc=doc))


argmax: Op = _arg_extreme("argmax", np.argmax, "Position of the largest element along `axis`, the first of equals; "
                                               "nan counts as largest.")
argmin: Op = _arg_extreme("argmin", np.argmin, "Position of the smallest element along `axis`, the first of equals; "
                                               "nan counts as smallest.")
