"""Running sums and products along one dimension. 16-bit floats accumulate in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int64
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import conjugate, ones_like, zeros_like
from jitgrad.ops.record import in_float32, require_axes, require_category

__all__ = ["cumprod", "cumsum"]


def _infer(name: str) -> Callable[..., TensorType]:
    def infer(x: TensorType, *, axis: int) -> TensorType:
        require_axes(name, (axis,), x)
        require_category(name, x.dtype, "uifc")
        return x

    return infer


def _scan(ufunc: np.ufunc) -> Callable[..., Any]:
    return in_float32(lambda x, *, axis: ufunc.accumulate(x, axis, x.dtype))


def _sum_from_the_end(g: Any, axis: int) -> Any:
    return ops.flip(ops.cumsum(ops.flip(g, axes=(axis,)), axis=axis), axes=(axis,))


cumsum: Op = register(Op("cumsum", ("x",), _infer("cumsum"), _scan(np.add), "scan", spell="{0} + {1}",
                         vjp=(_sum_from_the_end,), doc="Sum of all elements up to and with each one along `axis`."))


def _cumprod_gradient(g: Any, out: Any, x: Any, axis: int) -> Any:
    """Before the first zero of a row the usual quotient; at it the products without it; behind it nothing, since every
    product there holds that zero."""
    zero, one = zeros_like(x), ones_like(x)
    is_zero = ops.eq(x, zero)
    zeros_so_far = ops.cumsum(ops.cast(is_zero, dtype=int64), axis=axis)
    before = ops.eq(zeros_so_far, zeros_like(zeros_so_far))
    first = ops.bitwise_and(is_zero, ops.eq(zeros_so_far, ones_like(zeros_so_far)))
    quotient = ops.div(_sum_from_the_end(ops.mul(g, conjugate(out)), axis), conjugate(ops.where(is_zero, one, x)))
    without = ops.cumprod(ops.where(first, one, x), axis=axis)
    at_first = _sum_from_the_end(ops.where(before, zero, ops.mul(g, conjugate(without))), axis)
    return ops.where(before, quotient, ops.where(first, at_first, zero))


cumprod: Op = register(Op("cumprod", ("x",), _infer("cumprod"), _scan(np.multiply), "scan", spell="{0} * {1}",
                          vjp=(_cumprod_gradient,),
                          doc="Product of all elements up to and with each one along `axis`."))
