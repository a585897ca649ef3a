"""What a kernel's object file may be: a relocatable ELF file that defines `kernel` and needs little from outside.

In go bytes, from the compiler or from a cache; out come the names that the object defines and needs, or an
`ObjectError`. LLVM's loader crashes on a malformed file and accepts a missing symbol silently, so the compiler checks
what it made and the loader what it was given.

Source: System V ABI, chapters 4 and 5 (ELF header, sections, symbol table).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SYMBOL = "kernel"

# Functions of the C library that LLVM turns loops and arithmetic into, and those that kernel text may call.
OUTSIDE = frozenset(
    ["memset", "memcpy", "memmove"]
    + [name + suffix for suffix in ("", "f")
       for name in ("sqrt", "pow", "fmod", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan",
                    "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
                    "lgamma", "tgamma", "floor", "ceil", "trunc", "rint", "nearbyint", "round", "roundeven", "fma",
                    "fmin", "fmax", "ldexp", "hypot", "cbrt", "copysign", "fabs")])

MACHINES = {"x86_64": 62, "aarch64": 183}
_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATABLE, _SYMBOL_TABLE, _NO_BITS = 1, 2, 8


class ObjectError(ValueError):
    """Bytes that are no object file that may be loaded."""


def check(data: bytes, machine: str) -> None:
    """ObjectError unless `data` is a whole object file for `machine` that defines `kernel` and needs only `OUTSIDE`."""
    defined, needed = symbols(data, machine)
    if SYMBOL not in defined:
        raise ObjectError(f"it does not define {SYMBOL!r}")
    foreign = sorted(needed - OUTSIDE)
    if foreign:
        raise ObjectError(f"it needs symbols that are not given to kernels: {', '.join(foreign)}")


def symbols(data: bytes, machine: str) -> tuple[set[str], set[str]]:
    """The global names that an object file defines, and those that it needs from outside."""
    try:
        return _read_symbols(data, MACHINES.get(machine, 0))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ObjectError(f"malformed object file: {error}") from None


def _read_symbols(data: bytes, machine: int) -> tuple[set[str], set[str]]:
    sections = list(_sections(data, machine))
    defined: set[str] = set()
    needed: set[str] = set()
    for section in sections:
        kind, offset, size, link = section[1], section[4], section[5], section[6]
        if kind != _SYMBOL_TABLE:
            continue
        names = sections[link]
        text = data[names[4]:names[4] + names[5]]
        for name, info, _, home, _, _ in _SYMBOL.iter_unpack(data[offset:offset + size]):
            if info >> 4 == 0 or name == 0:                 # local, or unnamed
                continue
            (defined if home else needed).add(text[name:text.index(b"\0", name)].decode("ascii"))
    return defined, needed


def _sections(data: bytes, machine: int) -> Iterator[tuple[int, ...]]:
    """The section headers, each known to lie within the file."""
    header = _HEADER.unpack_from(data)
    magic, bits, order, kind, processor, table, width, count = (header[k] for k in (0, 1, 2, 6, 7, 11, 16, 17))
    if (magic, bits, order, kind, width) != (b"\x7fELF", 2, 1, _RELOCATABLE, _SECTION.size):
        raise ObjectError("not a 64-bit little-endian relocatable ELF file")
    if processor != machine:
        raise ObjectError(f"made for another processor (ELF machine {processor}, this one is {machine})")
    for position in range(count):
        section = _SECTION.unpack_from(data, table + position * _SECTION.size)
        if section[1] != _NO_BITS and section[4] + section[5] > len(data):
            raise ObjectError("a section reaches beyond the end of the file")
        yield section
