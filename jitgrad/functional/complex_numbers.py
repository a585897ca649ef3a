"""Complex numbers: their parts, and how they are made of them.

Parts are copies, not views: to change a tensor, assign to the whole of it. Real operands are allowed where PyTorch
allows them.
"""

from __future__ import annotations

import math

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.core import Tensor, as_float, as_operand, broadcast_all, describe, require_shape
from jitgrad.functional.reduce import detached
from jitgrad.functional.shape import section, stack
from jitgrad.ops.builders import conjugate, full_like, zeros_like

__all__ = ["angle", "complex", "conj", "conj_physical", "imag", "polar", "real", "resolve_conj", "resolve_neg",
           "view_as_complex", "view_as_real"]


def real(input: Tensor) -> Tensor:
    """The real part (copied); a real tensor as it is."""
    return ops.real(input) if input.dtype.is_complex else input


def imag(input: Tensor) -> Tensor:
    """The imaginary part (copied) of a complex tensor."""
    return ops.imag(_complex("imag", input))


def _complex(op: str, x: Tensor) -> Tensor:
    if not x.dtype.is_complex:
        raise complain(DTypeError, op, f"needs a complex tensor, got {describe(x)}")
    return x


def conj(input: Tensor) -> Tensor:
    """The complex conjugate; a real tensor as it is."""
    return conjugate(as_operand(input))


def conj_physical(input: Tensor) -> Tensor:
    """`conj`."""
    return conj(input)


def resolve_conj(input: Tensor) -> Tensor:
    """`input` itself: conjugates are computed at once."""
    return input


def resolve_neg(input: Tensor) -> Tensor:
    """`input` itself: negatives are computed at once."""
    return input


def angle(input: Tensor) -> Tensor:
    """The angle to the positive real axis, in radians; of real numbers 0 or pi."""
    if input.dtype.is_complex:
        return ops.atan2(ops.imag(input), ops.real(input))
    x = as_float(input)
    turned = ops.where(ops.lt(x, zeros_like(x)), full_like(x, math.pi), zeros_like(x))
    return ops.where(ops.isnan(x), detached(x), turned)


def complex(real: Tensor, imag: Tensor) -> Tensor:
    """``real + i imag`` of float32 or float64 tensors of one dtype, which broadcast."""
    return ops.complex(*_parts("complex", real, imag))


def _parts(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    if x.dtype is not y.dtype or x.dtype not in (dtypes.float32, dtypes.float64):
        raise complain(DTypeError, op, f"needs two float32 or two float64 tensors, got {describe(x)} and {describe(y)}")
    return broadcast_all(op, x, y)


def polar(abs: Tensor, angle: Tensor) -> Tensor:
    """``abs * (cos(angle) + i sin(angle))`` of float32 or float64 tensors of one dtype, which broadcast."""
    size, turn = _parts("polar", abs, angle)
    return ops.complex(ops.mul(size, ops.cos(turn)), ops.mul(size, ops.sin(turn)))


def view_as_real(input: Tensor) -> Tensor:
    """Real and imaginary part side by side in a new last dimension of size 2 (copied)."""
    x = _complex("view_as_real", input)
    return stack([ops.real(x), ops.imag(x)], -1)


def view_as_complex(input: Tensor) -> Tensor:
    """Complex numbers from a last dimension of size 2 that holds real and imaginary part (copied)."""
    shape = tuple(input.shape)
    require_shape("view_as_complex", shape[-1:] == (2,), f"the last dimension must have size 2, got {describe(input)}")
    parts = [ops.reshape(section(input, len(shape) - 1, k, k + 1), shape=shape[:-1]) for k in range(2)]
    return ops.complex(*_parts("view_as_complex", *parts))
