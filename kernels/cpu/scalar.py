"""What scalar functions of kernels are made of, as ordinary Python functions of NumPy scalars.

Each name in here is one machine instruction or a few of them: a cast, a bit pattern, a select, a rounding, a multiply
and add. As plain Python they make every scalar function runnable without Numba; `kernels.cpu.native` teaches Numba
what the very same function objects mean in machine code. There is one text of each function and no second one.

`scalar` marks a function as inlinable in kernels, `by_type` joins a float32 and a float64 body under one name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Scalar = Any                                    # a NumPy scalar; natively a value of the same type

f64, f32 = np.float64, np.float32
i64, i32, i16, i8 = np.int64, np.int32, np.int16, np.int8
u64, u32, u8 = np.uint64, np.uint32, np.uint8
boolean = np.bool_

SCALARS: dict[str, Callable[..., Scalar]] = {}
"""Every function marked with `scalar`, by name."""

DISPATCHERS: dict[str, tuple[Callable[..., Scalar], ...]] = {}
"""Every function made by `by_type`: (the function itself, its float32, float64 and integer bodies)."""

TWO_OVER_PI = (42722829, 48555073, 21659401, 56087029, 13858563, 28715353, 38736100, 4324945, 26128250, 62674459,
               29957006, 37899730, 58726692, 49193117, 6588223, 35515164, 46442140, 65964067, 24988590, 54822121,
               41009306, 54917092, 5137525, 37323603, 15192690, 4585659, 58608142, 52426903, 67074070, 25231090,
               63202006, 34237727, 28629499, 15891632, 40752081, 37709470, 25143477, 55737260, 33225084, 24853767,
               15195689, 19476134, 50255852, 18845021, 2185228, 50622407, 47901436)
"""The binary places of 2 / pi, 26 at a time: those behind the point first."""


PIECES: list[tuple[tuple[float, ...], ...]] = []
"""Tables of numbers for `pick`: rows of 16."""


def pieces(*rows: tuple[float, ...]) -> int:
    """Enter a table into `PIECES`; its number there."""
    PIECES.append(rows)
    return len(PIECES) - 1


def scalar(function: Callable[..., Scalar]) -> Callable[..., Scalar]:
    """Mark `function` as part of kernel text: natively it is always inlined, with no flags on its arithmetic."""
    SCALARS[function.__name__] = function
    return function


def by_type(name: str, single: Callable[..., Scalar], double: Callable[..., Scalar],
            whole: Callable[..., Scalar] | None = None) -> Callable[..., Scalar]:
    """A function that runs `single` when its first argument is a float32, `whole` when it is an integer or bool (where there
    is such a body), and otherwise `double`. Natively the choice is made while compiling."""

    def choose(*arguments: Scalar) -> Scalar:
        if whole is not None and isinstance(arguments[0], np.integer | np.bool_):
            return whole(*arguments)
        return (single if isinstance(arguments[0], f32) else double)(*arguments)

    choose.__name__ = choose.__qualname__ = name
    choose.__doc__ = double.__doc__
    DISPATCHERS[name] = (choose, single, double, whole or double)
    return choose


# --- one instruction each: plain meanings -------------------------------------------------------------------------


def select(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    """x where `condition` holds, else y; both are computed. The result has the type of x."""
    return x if condition else like(x, y)


def like(x: Scalar, constant: Scalar) -> Scalar:
    """`constant` in the type of x."""
    if not isinstance(x, np.generic):
        return type(x)(constant)
    return np.asarray(constant).astype(x.dtype)[()]


def bit_width(x: Scalar) -> Scalar:
    """The number of bits of an integer, in the type of x."""
    return type(x)(8 * x.itemsize)


def multiply_add(x: Scalar, y: Scalar, z: Scalar) -> Scalar:
    """x * y + z, rounded once or twice as the machine likes: the only arithmetic that may contract."""
    return x * y + z


def horner(x: Scalar, coefficients: tuple[float, ...]) -> Scalar:
    """The polynomial with these coefficients, highest power first, in the type of x; may contract."""
    kind = type(x)
    total = kind(coefficients[0])
    for c in coefficients[1:]:
        total = total * x + kind(c)
    return total


def bits(x: Scalar) -> Scalar:
    """The bit pattern of a float32 as int32, of a float64 as int64."""
    return x.view(i32 if isinstance(x, f32) else i64)


def from_bits(pattern: Scalar) -> Scalar:
    """The float32 (float64) with the bit pattern of an int32 (int64)."""
    return pattern.view(f32 if isinstance(pattern, i32) else f64)


def sqrt(x: Scalar) -> Scalar:
    """Square root, correctly rounded."""
    return np.sqrt(x)


def floor(x: Scalar) -> Scalar:
    """The largest integer that is not above x, in the type of x."""
    return x if isinstance(x, np.integer) else np.floor(x)


def ceil(x: Scalar) -> Scalar:
    """The smallest integer that is not below x, in the type of x."""
    return x if isinstance(x, np.integer) else np.ceil(x)


def round(x: Scalar) -> Scalar:
    """The nearest integer, halves to even, in the type of x."""
    return x if isinstance(x, np.integer) else np.rint(x)


def trunc(x: Scalar) -> Scalar:
    """x without its fraction, in the type of x."""
    return x if isinstance(x, np.integer) else np.trunc(x)


def abs(x: Scalar) -> Scalar:
    """Absolute value; the lowest integer stays what it is."""
    return np.absolute(x)


def copysign(x: Scalar, y: Scalar) -> Scalar:
    """The magnitude of x with the sign of y (floats)."""
    return np.copysign(x, y)


def to_int(x: Scalar) -> Scalar:
    """A float32 as int32, a float64 as int64. Exact for values in range; otherwise anything."""
    kind = i32 if isinstance(x, f32) else i64
    limit = np.iinfo(kind)
    return kind(x) if limit.min <= x <= limit.max - 512 else kind(limit.min)


def clamp(x: Scalar, low: Scalar, high: Scalar) -> Scalar:
    """x limited to low … high; NaN gives low."""
    raised = x if x > low else low
    return raised if raised < high else high


def power_of_two(n: Scalar) -> Scalar:
    """2**n: float32 for an int32 n in -126 … 127, float64 for an int64 n in -1022 … 1023."""
    return from_bits((n + i32(127)) << i32(23) if isinstance(n, i32) else (n + i64(1023)) << i64(52))


def scale(x: Scalar, n: Scalar) -> Scalar:
    """x * 2**n, also where 2**n alone is denormal or too large: |n| < 250 for float32 x, < 2040 for float64."""
    half = n >> type(n)(1)
    return x * power_of_two(half) * power_of_two(n - half)


def two_over_pi(k: Scalar) -> Scalar:
    """Binary places 26 * k + 1 … 26 * k + 26 of 2 / pi, as a float64 integer; k is an int64 in 0 … 46."""
    return f64(TWO_OVER_PI[k])


def permutes() -> Scalar:
    """Whether the processor picks from 16 numbers in a register by one instruction, so that `pick` costs no more than an
    addition. Plain Python is no such processor; natively the answer is known while compiling."""
    return boolean(False)


def pick(table: Scalar, row: Scalar, k: Scalar) -> Scalar:
    """Number k modulo 16 in a row of a table of `PIECES`, as float32; k is an int32."""
    return f32(PIECES[table][row][k & 15])
