"""Small constructions that gradient rules and derived operations are written with.

In: anything Typed (a Tensor, a graph Value; where only the type counts, a bare TensorType). Out: what the current
interpreter makes of the primitives called here. A construction that would change nothing calls no primitive.
"""

from __future__ import annotations

from typing import Any

from jitgrad import ops
from jitgrad.dtypes import DType
from jitgrad.ir.interpreter import state
from jitgrad.ir.types import Typed

__all__ = ["as_type_of", "broadcast", "conjugate", "expand_dims", "full", "full_like", "ones_like", "sum_to", "times",
           "zero_of", "zeros_like"]


def full(shape: tuple[int, ...], value: Any, dtype: DType) -> Any:
    """A value of `shape` with the Python scalar `value` everywhere. An interpreter may have it at hand (eager)."""
    at_hand = getattr(state.current, "full", None)
    if at_hand is not None:
        return at_hand(tuple(shape), value, dtype)
    return broadcast(ops.constant(value=value, dtype=dtype), tuple(shape))


def full_like(x: Typed, value: Any) -> Any:
    """Shape and dtype of `x`, the Python scalar `value` everywhere."""
    return full(x.shape, value, x.dtype)


def zeros_like(x: Typed) -> Any:
    return full(x.shape, ops.zero_of(x.dtype), x.dtype)


def ones_like(x: Typed) -> Any:
    return full(x.shape, ops.zero_of(x.dtype) + 1, x.dtype)


def zero_of(dtype: DType) -> Any:
    """The Python scalar zero that fits `dtype`, so that equal constants are written in one way."""
    return _ZEROS[dtype.category]


_ZEROS = {"b": False, "u": 0, "i": 0, "f": 0.0, "c": 0.0}


def expand_dims(x: Any, axes: tuple[int, ...]) -> Any:
    """`x` with dimensions of size 1 put in so that they stand at `axes` of the result (non-negative, any order)."""
    if not axes:
        return x
    sizes = iter(x.shape)
    ndim = len(x.shape) + len(axes)
    return ops.reshape(x, shape=tuple([1 if k in axes else next(sizes) for k in range(ndim)]))


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """`x` at `shape` by NumPy's rules."""
    if x.shape == shape:
        return x
    if len(x.shape) == len(shape):
        return ops.broadcast_to(x, shape=shape)
    aligned = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
    return ops.reshape(x, shape=shape) if aligned == shape else ops.align(x, shape=shape)


def sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    """The adjoint of `broadcast`: sums `x` over what `broadcast(…, x.shape)` of a value of `shape` would repeat."""
    if x.shape == shape:
        return x
    missing = len(x.shape) - len(shape)
    aligned = (1,) * missing + tuple(shape)
    axes = tuple([k for k, (have, want) in enumerate(zip(x.shape, aligned, strict=True))
                  if have != want or k < missing])
    result = ops.sum(x, axes=axes)
    return result if result.shape == shape else ops.reshape(result, shape=tuple(shape))


def conjugate(x: Any) -> Any:
    """The complex conjugate; of a real operand the operand itself."""
    return ops.conj(x) if x.dtype.is_complex else x


def times(g: Any, derivative: Any) -> Any:
    """An incoming gradient times a derivative, in PyTorch's convention: the derivative conjugated when complex."""
    return ops.mul(g, conjugate(derivative))


def as_type_of(g: Any, x: Typed) -> Any:
    """`g` cast to the dtype of `x`, where it is not there yet; the real part when `x` is real and `g` complex."""
    return g if g.dtype is x.dtype else ops.cast(g, dtype=x.dtype)
