"""What `kernels.cpu.intrinsics` offers to kernel text, as plain Python: for running a kernel without compiling it.

Pointers are typed views of arrays that check every access; loads give NumPy scalars, so that arithmetic keeps its type.
A kernel's `args` is an `Arguments`; breakpoints and prints work inside of the kernel's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jitgrad.kernels.cpu import scalar

Scalar = Any


class Arguments:
    """The argument block: arrays and ints, which become ``args[1], args[2], …``; and the error word of the call."""

    def __init__(self, kernel: str, values: Sequence[Any]):
        self.kernel = kernel
        self.values = (None, *values)
        self.error: tuple[int, int, int] | None = None      # code, item, value

    def __getitem__(self, position: int) -> Any:
        return self.values[position]

    def behind(self, position: int) -> Arguments:
        """The arguments after `position`, as a block of their own."""
        return Arguments(self.kernel, self.values[position + 1:])


class Pointer:
    """Elements of `memory` (one dimension) from `base` on. An access outside raises IndexError."""

    __slots__ = ("base", "memory", "name", "rounds")

    def __init__(self, memory: np.ndarray, name: str, base: int = 0):
        self.memory = memory
        self.name = name
        self.base = base
        self.rounds = memory.dtype.itemsize == 2 and memory.dtype.kind != "i"    # float16 and bfloat16

    def __getitem__(self, index: int) -> Scalar:
        value = self.memory[self.place(index)]
        return np.float32(value) if self.rounds else value

    def __setitem__(self, index: int, value: Scalar) -> None:
        self.memory[self.place(index)] = cast(value, self.memory.dtype)

    def place(self, index: int) -> int:
        place = self.base + index
        if 0 <= place < self.memory.size:
            return place
        raise IndexError(f"{self.name}: element {place} of {self.memory.size} ({self.memory.dtype})")


def cast(value: Scalar, dtype: np.dtype) -> Scalar:
    """`value` with another element type, as NumPy casts arrays; Python ints wrap around."""
    number = value if isinstance(value, np.generic) else (
        np.float64(value) if isinstance(value, float) else np.uint64(value & 0xFFFF_FFFF_FFFF_FFFF).view(np.int64))
    return number if number.dtype == dtype else number.astype(dtype)


def _make_cast(name: str, dtype: type) -> Any:
    kind = np.dtype(dtype)

    def convert(x: Scalar) -> Scalar:
        return cast(x, kind)

    convert.__name__ = name
    return convert


i64, i32, i16, i8 = (_make_cast(f"i{8 * d().itemsize}", d) for d in (np.int64, np.int32, np.int16, np.int8))
u64, u32, u8 = (_make_cast(f"u{8 * d().itemsize}", d) for d in (np.uint64, np.uint32, np.uint8))


def f16(x: Scalar) -> Scalar:
    """float16 is a storage format: inside of a kernel the value is a float32."""
    return np.float32(x)


def bf16(x: Scalar) -> Scalar:
    """bfloat16 is a storage format: inside of a kernel the value is a float32."""
    return np.float32(x)


_STORAGE = {scalar.f64: np.float64, scalar.f32: np.float32, i64: np.int64, i32: np.int32, i16: np.int16, i8: np.int8,
            u64: np.uint64, u32: np.uint32, u8: np.uint8, scalar.boolean: np.bool_, f16: np.float16,
            bf16: ml_dtypes.bfloat16}


def pointer(args: Arguments, position: int, dtype: Any) -> Pointer:
    """Argument `position`, a C-contiguous array, as a pointer to elements of `dtype`."""
    array, wanted = args[position], np.dtype(_STORAGE[dtype])
    name = f"{args.kernel}, operand {position}"
    if isinstance(array, Pointer):                             # a caller's own memory
        return Pointer(array.memory, name, array.base)
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise TypeError(f"{name}: needs a C-contiguous array, got {type(array).__name__}")
    if array.dtype != wanted and array.dtype != np.uint8:      # scratch memory comes as bytes
        raise TypeError(f"{name}: read as {wanted}, but it holds {array.dtype}")
    return Pointer(array.reshape(-1).view(wanted), name)


def advance(p: Pointer, count: int) -> Pointer:
    """The pointer `count` elements behind p."""
    return Pointer(p.memory, p.name, p.base + count)


def load(p: Pointer, index: int, operand: int, count: int) -> Scalar:
    """Element `index` of operand `operand` of `count`."""
    return p[index]


def store(p: Pointer, index: int, value: Scalar, operand: int, count: int) -> None:
    """Write `value`, cast to the element type."""
    p[index] = value


def fail(args: Arguments, code: int, item: int, value: int) -> None:
    """Record an error: of several the one with the lowest item stays, of one item's the first."""
    if args.error is None or item < args.error[1]:
        args.error = int(code), int(item), int(value)


def reassociate_add(accumulator: Scalar, value: Scalar) -> Scalar:
    """accumulator + value."""
    return accumulator + cast(value, accumulator.dtype)


def reassociate_mul(accumulator: Scalar, value: Scalar) -> Scalar:
    """accumulator * value."""
    return accumulator * cast(value, accumulator.dtype)


def reassociate_max(accumulator: Scalar, value: Scalar) -> Scalar:
    """The larger of two; a NaN wins."""
    return np.maximum(accumulator, cast(value, accumulator.dtype))


def reassociate_min(accumulator: Scalar, value: Scalar) -> Scalar:
    """The smaller of two; a NaN wins."""
    return np.minimum(accumulator, cast(value, accumulator.dtype))


def prefetch(p: Pointer, index: int) -> None:
    """Nothing: when memory is fetched changes no value."""


NAMES: dict[str, Any] = {
    "pointer": pointer, "advance": advance, "load": load, "store": store, "prefetch": prefetch, "fail": fail,
    "f64": scalar.f64, "f32": scalar.f32, "f16": f16, "bf16": bf16, "i64": i64, "i32": i32, "i16": i16, "i8": i8,
    "u64": u64, "u32": u32, "u8": u8, "boolean": scalar.boolean,
    "reassociate_add": reassociate_add, "reassociate_mul": reassociate_mul, "reassociate_max": reassociate_max,
    "reassociate_min": reassociate_min,
}
