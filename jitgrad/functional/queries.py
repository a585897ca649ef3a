"""Questions about tensors, as functions: what a dtype is, how many elements there are, whether two shapes are equal."""

from __future__ import annotations

from jitgrad.errors import ShapeError, complain
from jitgrad.functional.core import Tensor, describe, size

__all__ = ["is_complex", "is_conj", "is_floating_point", "is_neg", "is_nonzero", "is_same_size", "is_signed", "numel"]


def is_floating_point(input: Tensor) -> bool:
    """Whether the dtype is a real floating-point type."""
    return bool(input.dtype.is_floating_point)


def is_complex(input: Tensor) -> bool:
    """Whether the dtype is complex."""
    return bool(input.dtype.is_complex)


def is_signed(input: Tensor) -> bool:
    """Whether the dtype has negative values."""
    return bool(input.dtype.is_signed)


def is_conj(input: Tensor) -> bool:
    """Whether a conjugate is still to be computed: never, `conj` computes it at once."""
    return False


def is_neg(input: Tensor) -> bool:
    """Whether a negative is still to be computed: never."""
    return False


def numel(input: Tensor) -> int:
    """The number of elements."""
    return size(input.shape)


def is_same_size(input: Tensor, other: Tensor) -> bool:
    """Whether both have the same shape."""
    return tuple(input.shape) == tuple(other.shape)


def is_nonzero(input: Tensor) -> bool:
    """Whether the only element of `input` is not zero. Reads the value. ShapeError for other numbers of elements."""
    if size(input.shape) != 1:
        raise complain(ShapeError, "is_nonzero", f"the truth of {describe(input)} is ambiguous", fix="Use any() or all()")
    return bool(input)
