"""Ops without operands to compute from: constants, counting, random bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad.dtypes import DType, int64, uint32
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.philox import philox_bits

__all__ = ["constant", "iota", "random_bits"]


def _infer_constant(*, value: Any, dtype: DType) -> TensorType:
    if isinstance(value, complex) and not dtype.is_complex:
        raise complain(DTypeError, "constant", f"{value} does not fit {dtype.short}")
    return TensorType(dtype, ())


constant: Op = register(Op(
    "constant", (), _infer_constant, lambda *, value, dtype: np.array(value, dtype.numpy), "source",
    doc="A 0-d value: the Python scalar `value` as `dtype`."))


def _infer_iota(*, shape: tuple[int, ...], axis: int, dtype: DType) -> TensorType:
    if not 0 <= axis < len(shape):
        raise complain(ShapeError, "iota", f"axis {axis} is not among the {len(shape)} dimensions of shape {shape}")
    if dtype.category == "b":
        raise complain(DTypeError, "iota", "cannot count in bool")
    return TensorType(dtype, tuple(shape))


def _iota(*, shape: tuple[int, ...], axis: int, dtype: DType) -> np.ndarray:
    count = np.arange(shape[axis]).astype(dtype.numpy)
    aligned = count.reshape([-1 if k == axis else 1 for k in range(len(shape))]) if shape[axis] else count
    return np.broadcast_to(aligned, shape).copy() if count.size else np.empty(shape, dtype.numpy)


iota: Op = register(Op("iota", (), _infer_iota, _iota, "source",
                       doc="0, 1, 2 … along `axis`, the same along all other dimensions."))


def _infer_random_bits(key: TensorType, offset: TensorType, *, shape: tuple[int, ...]) -> TensorType:
    for x in (key, offset):
        if x.dtype is not int64 or x.shape:
            raise complain(DTypeError, "random_bits", f"key and offset are i64[], got {key} and {offset}")
    return TensorType(uint32, tuple(shape))


random_bits: Op = register(Op(
    "random_bits", ("key", "offset"), _infer_random_bits,
    lambda key, offset, *, shape: philox_bits(int(key), int(offset), shape), "source",
    effects=frozenset({"random"}),
    doc="Uniform random 32-bit words by Philox4x32-10; equal for equal key, offset and element number."))
