"""Less common ways to make Tensors: window functions, ranges with both ends, memory of other objects, and the constructors
that are named after types.

Windows are worked out by NumPy in float64 and rounded once; they are constants of a compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.creation import _counted, _finish, tensor, zeros
from jitgrad.devices import chosen
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.core import cast, made_on, require_shape
from jitgrad.tensor import Tensor

__all__ = [
    "BFloat16Tensor", "BoolTensor", "ByteTensor", "CharTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor",
    "LongTensor", "ShortTensor", "bartlett_window", "blackman_window", "frombuffer", "hamming_window", "hann_window",
    "kaiser_window", "range",
]


# windows

def _window(name: str, length: int, periodic: bool, values: Callable[[np.ndarray], np.ndarray], dtype: DType | None,
            device: Any, requires_grad: bool) -> Tensor:
    """`values` of places from 0 to 1; a periodic window is one longer without its last value."""
    require_shape(name, length >= 0, f"the length must not be negative, got {length}")
    wanted = dtype or dtypes.get_default_dtype()
    if not wanted.is_floating_point:
        raise complain(DTypeError, name, f"needs a floating-point dtype, got {wanted.short}")
    last = length if periodic else length - 1
    found = values(np.arange(length) / last) if length > 1 else np.ones(length)
    return _finish(Tensor(found.astype(wanted.numpy)), requires_grad, device)


def _cosines(*factors: float) -> Callable[[np.ndarray], np.ndarray]:
    """``factors[0] - factors[1] * cos(2 pi x) + factors[2] * cos(4 pi x)`` …"""
    def values(x: np.ndarray) -> np.ndarray:
        found = np.zeros_like(x)
        for k, factor in enumerate(factors):
            found += (-1) ** k * factor * np.cos(2 * math.pi * k * x)
        return found

    return values


def bartlett_window(window_length: int, periodic: bool = True, *, dtype: DType | None = None, device: Any = None,
                    requires_grad: bool = False) -> Tensor:
    """A triangle from 0 to 1 and back; periodic, so that it can be repeated, or symmetric."""
    return _window("bartlett_window", window_length, periodic, lambda x: 1 - np.abs(2 * x - 1), dtype, device,
                   requires_grad)


def hann_window(window_length: int, periodic: bool = True, *, dtype: DType | None = None, device: Any = None,
                requires_grad: bool = False) -> Tensor:
    """One period of ``(1 - cos) / 2``; periodic, so that it can be repeated, or symmetric."""
    return _window("hann_window", window_length, periodic, _cosines(0.5, 0.5), dtype, device, requires_grad)


def hamming_window(window_length: int, periodic: bool = True, alpha: float = 0.54, beta: float = 0.46, *,
                   dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """One period of ``alpha - beta * cos``; periodic, so that it can be repeated, or symmetric."""
    return _window("hamming_window", window_length, periodic, _cosines(alpha, beta), dtype, device, requires_grad)


def blackman_window(window_length: int, periodic: bool = True, *, dtype: DType | None = None, device: Any = None,
                    requires_grad: bool = False) -> Tensor:
    """Blackman's window, ``0.42 - 0.5 cos + 0.08 cos`` of the double angle; periodic or symmetric."""
    return _window("blackman_window", window_length, periodic, _cosines(0.42, 0.5, 0.08), dtype, device, requires_grad)


def kaiser_window(window_length: int, periodic: bool = True, beta: float = 12.0, *, dtype: DType | None = None,
                  device: Any = None, requires_grad: bool = False) -> Tensor:
    """Kaiser's window of shape `beta`, by the modified Bessel function of order 0; periodic or symmetric."""
    def values(x: np.ndarray) -> np.ndarray:
        return np.i0(beta * np.sqrt(np.clip(1 - (2 * x - 1) ** 2, 0, 1))) / np.i0(beta)

    return _window("kaiser_window", window_length, periodic, values, dtype, device, requires_grad)


# ranges and buffers

def range(start: float = 0, end: float | None = None, step: float = 1, *, dtype: DType | None = None, device: Any = None,
          requires_grad: bool = False) -> Tensor:
    """start, start + step, … up to `end`, which is included, by default in the default dtype. `arange` leaves it out."""
    start, end = (0, start) if end is None else (start, end)
    require_shape("range", step != 0 and (end - start) * step >= 0, f"the step {step} does not lead from {start} to {end}")
    count = math.floor((end - start) / step) + 1
    wanted = dtype or dtypes.get_default_dtype()
    return _finish(made_on(chosen(device), _counted, count, step, start, dtypes.float64, wanted), requires_grad, device)


def frombuffer(buffer: Any, *, dtype: DType, count: int = -1, offset: int = 0, requires_grad: bool = False) -> Tensor:
    """The bytes of an object (bytearray, memoryview, array …) from byte `offset` on as `count` numbers (-1: all) of `dtype`,
    without a copy; memory that must not be changed, as that of bytes, is copied."""
    try:
        array = np.frombuffer(buffer, dtype.numpy, count, offset)
    except (ValueError, TypeError, BufferError) as error:
        raise complain(DTypeError, "frombuffer", str(error)) from None
    return _finish(Tensor(array if array.flags.writeable else array.copy()), requires_grad)


# constructors named after types

def _constructor(name: str, dtype: DType) -> Callable[..., Tensor]:
    def make(*arguments: Any) -> Tensor:
        if len(arguments) == 1 and not isinstance(arguments[0], int):
            data = arguments[0]
            return cast(data.detach(), dtype) if isinstance(data, Tensor) else tensor(data, dtype=dtype)
        return zeros(*arguments or (0,), dtype=dtype)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"A {dtype.name} Tensor of values, or, given integers one by one, of that shape (here it holds zeros)."
    return make


FloatTensor, DoubleTensor = _constructor("FloatTensor", dtypes.float32), _constructor("DoubleTensor", dtypes.float64)
HalfTensor, BFloat16Tensor = _constructor("HalfTensor", dtypes.float16), _constructor("BFloat16Tensor", dtypes.bfloat16)
LongTensor, IntTensor = _constructor("LongTensor", dtypes.int64), _constructor("IntTensor", dtypes.int32)
ShortTensor, CharTensor = _constructor("ShortTensor", dtypes.int16), _constructor("CharTensor", dtypes.int8)
ByteTensor, BoolTensor = _constructor("ByteTensor", dtypes.uint8), _constructor("BoolTensor", dtypes.bool_)
