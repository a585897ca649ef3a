"""What a kernel's object file may be, and what it is in memory: a relocatable ELF file that defines `kernel`, has code and
constants but no variables, and needs little from outside.

In go bytes, from the compiler or from a cache; out come the names that the object defines and needs and its contents for the
address where they will stand, or an `ObjectError`. What is loaded is run, so the compiler checks what it made and the loader
what it was given.

Sources: System V ABI, chapters 4 and 5 (ELF header, sections, symbol table, relocation), and its supplements for x86-64
(4.4) and for the Arm 64-bit architecture (AAELF64, 5.7).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SYMBOL = "kernel"

# Functions of the C library that LLVM turns loops and arithmetic into, and those that kernel text may call.
OUTSIDE = frozenset(
    ["memset", "memcpy", "memmove"]
    + [name + suffix for suffix in ("", "f")
       for name in ("sqrt", "pow", "fmod", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan",
                    "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
                    "lgamma", "tgamma", "floor", "ceil", "trunc", "rint", "nearbyint", "round", "roundeven", "fma",
                    "fmin", "fmax", "ldexp", "hypot", "cbrt", "copysign", "fabs")])

PAGE = 4096
_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_RELOCATABLE = 1
_CONTENTS, _SYMBOL_TABLE, _RELOCATIONS, _NO_BITS, _SHORT_RELOCATIONS = 1, 2, 4, 8, 9
_WRITTEN, _IN_MEMORY = 1, 2                     # flags of a section
_BRIDGE_BYTES = 16


class ObjectError(ValueError):
    """Bytes that are no object file that may be loaded."""


def check(data: bytes, machine: str) -> ObjectFile:
    """The object file in `data`. ObjectError unless it is whole, for `machine`, defines `kernel`, needs only `OUTSIDE`."""
    try:
        file = _read(data, machine)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ObjectError(f"malformed object file: {error}") from None
    foreign = sorted(file.needed - OUTSIDE)
    if foreign:
        raise ObjectError(f"it needs symbols that are not given to kernels: {', '.join(foreign)}")
    return file


@dataclass(frozen=True, slots=True)
class Section:
    """A section header as it is in the file, and `start`: where its contents lie among those that are loaded, or None."""

    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    start: int | None


@dataclass(frozen=True, slots=True)
class Relocation:
    """A place in the contents, from their first byte on, that waits for an address: of the `target`, a place in the contents
    or a name from outside, plus `addend`."""

    kind: int
    place: int
    target: int | str
    addend: int


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """The contents of an object file that are loaded, where `kernel` begins in them, and what is to be relocated."""

    machine: str
    contents: bytes
    entry: int
    relocations: tuple[Relocation, ...]

    @property
    def needed(self) -> set[str]:
        """The names from outside that it refers to."""
        return {r.target for r in self.relocations if isinstance(r.target, str)}

    @property
    def size(self) -> int:
        """Bytes of memory that it takes, beginning with a page: the contents, and a bridge to every function outside."""
        return self._bridges + _BRIDGE_BYTES * len(self.needed)

    @property
    def _bridges(self) -> int:
        return _aligned(len(self.contents), _BRIDGE_BYTES)

    def placed_at(self, base: int, address_of: Callable[[str], int]) -> bytes:
        """The `size` bytes that are to stand at address `base`, with `address_of` the functions outside."""
        how, memory = MACHINES[self.machine], bytearray(self.size)
        memory[:len(self.contents)] = self.contents
        bridges = {}
        for k, name in enumerate(sorted(self.needed)):
            bridges[name] = place = self._bridges + _BRIDGE_BYTES * k
            address = address_of(name)
            if not address:
                raise ObjectError(f"there is no {name!r} here")
            memory[place:place + _BRIDGE_BYTES] = how.bridge + address.to_bytes(8, "little")
        for r in self.relocations:
            size, change = how.changes[r.kind]
            target = bridges[r.target] if isinstance(r.target, str) else r.target
            old = int.from_bytes(memory[r.place:r.place + size], "little")
            new = change(old, base + target + r.addend, base + r.place)
            memory[r.place:r.place + size] = new.to_bytes(size, "little")
        return bytes(memory)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(data: bytes, machine: str) -> ObjectFile:
    sections = _sections(data, machine)
    contents = bytearray(max([s.start + s.size for s in sections if s.start is not None], default=0))
    entry, relocations = None, list[Relocation]()
    for section in sections:
        if section.start is not None:
            contents[section.start:section.start + section.size] = data[section.offset:section.offset + section.size]
        elif section.kind == _SYMBOL_TABLE:
            for number in range(1, section.size // _SYMBOL.size):
                name, place = _symbol(data, sections, section, number)
                entry = place if name == SYMBOL and isinstance(place, int) else entry
        elif section.kind in (_RELOCATIONS, _SHORT_RELOCATIONS) and sections[section.info].start is not None:
            relocations += _relocations(data, sections, section, machine)
    if entry is None or entry >= len(contents):
        raise ObjectError(f"it does not define {SYMBOL!r}")
    return ObjectFile(machine, bytes(contents), entry, tuple(relocations))


def _sections(data: bytes, machine: str) -> list[Section]:
    """The sections, each known to lie within the file; those that are loaded lie one behind the other."""
    header = _HEADER.unpack_from(data)
    magic, bits, order, kind, processor, table, width, count = (header[k] for k in (0, 1, 2, 6, 7, 11, 16, 17))
    if (magic, bits, order, kind, width) != (b"\x7fELF", 2, 1, _RELOCATABLE, _SECTION.size):
        raise ObjectError("not a 64-bit little-endian relocatable ELF file")
    if machine not in MACHINES or processor != MACHINES[machine].number:
        raise ObjectError(f"made for another processor (ELF machine {processor}, this one is {machine})")
    found, end = [], 0
    for position in range(count):
        _, kind, flags, _, offset, size, link, info, alignment, _ = _SECTION.unpack_from(data, table + position * width)
        if kind != _NO_BITS and offset + size > len(data):
            raise ObjectError("a section reaches beyond the end of the file")
        if flags & _IN_MEMORY and size and (flags & _WRITTEN or kind == _NO_BITS):
            raise ObjectError("it has variables")
        start = None
        if flags & _IN_MEMORY and kind == _CONTENTS:
            if alignment & (alignment - 1) or alignment > PAGE:
                raise ObjectError(f"a section is aligned to {alignment} bytes")
            start = _aligned(end, max(alignment, 1))
            end = start + size
        found.append(Section(kind, flags, offset, size, link, info, alignment, start))
    return found


def _symbol(data: bytes, sections: list[Section], table: Section, number: int) -> tuple[str, int | str | None]:
    """The name of a symbol and where it is in the contents; its name where it is outside, None where it is not loaded."""
    if not 0 <= number < table.size // _SYMBOL.size:
        raise ObjectError(f"there is no symbol {number}")
    name, _, _, home, value, _ = _SYMBOL.unpack_from(data, table.offset + number * _SYMBOL.size)
    strings = sections[table.link]
    text = data[strings.offset:strings.offset + strings.size]
    label = text[name:max(text.find(b"\0", name), name)].decode("ascii")
    if home == 0:
        return label, label
    if home >= len(sections) or sections[home].start is None:
        return label, None
    if value > sections[home].size:
        raise ObjectError(f"the symbol {label!r} lies outside of its section")
    return label, sections[home].start + value


def _relocations(data: bytes, sections: list[Section], table: Section, machine: str) -> list[Relocation]:
    """What is to be relocated in a section that is loaded."""
    changes, home, found = MACHINES[machine].changes, sections[table.info], list[Relocation]()
    assert home.start is not None
    for at in range(table.offset, table.offset + table.size, _RELOCATION.size):
        place, info, addend = _RELOCATION.unpack_from(data, at)
        kind, (label, target) = info & 0xFFFFFFFF, _symbol(data, sections, sections[table.link], info >> 32)
        if table.kind == _SHORT_RELOCATIONS or kind not in changes:
            raise ObjectError(f"it has a relocation of type {kind}")
        if target is None:
            raise ObjectError(f"it refers to {label!r}, which is not loaded")
        if place + changes[kind][0] > home.size:
            raise ObjectError("a relocation lies outside of its section")
        found.append(Relocation(kind, home.start + place, target, addend))
    return found


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- relocation -------------------------------------------------------------------------------------------------------

Change = Callable[[int, int, int], int]
"""What was written at a place, the address that is wanted there, the address of the place -> what is to be written."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Its number in a header; by the type of a relocation, how many bytes it changes and how; and the first half of a
    bridge: the jump to the address behind it."""

    number: int
    changes: Mapping[int, tuple[int, Change]]
    bridge: bytes


def _fitting(distance: int, bits: int) -> int:
    """`distance` as a signed number of so many bits."""
    if not -(1 << (bits - 1)) <= distance < 1 << (bits - 1):
        raise ObjectError("a relocation does not reach its target")
    return distance & ((1 << bits) - 1)


def _address(old: int, wanted: int, place: int) -> int:
    return wanted & ((1 << 64) - 1)


def _distance(old: int, wanted: int, place: int) -> int:
    return _fitting(wanted - place, 32)


def _branch(old: int, wanted: int, place: int) -> int:
    """B and BL: the distance in instructions."""
    return old & ~0x3FFFFFF | _fitting(wanted - place, 28) >> 2


def _page(old: int, wanted: int, place: int) -> int:
    """ADRP: the distance in pages, of which the two lowest bits stand apart."""
    pages = _fitting((wanted & -PAGE) - (place & -PAGE), 33) >> 12
    return old & ~0x60FFFFE0 | (pages & 3) << 29 | pages >> 2 << 5


def _in_page(shift: int) -> Change:
    """ADD, and loads and stores of ``1 << shift`` bytes: where in its page something is."""
    return lambda old, wanted, place: old & ~0x3FFC00 | (wanted & (PAGE - 1)) >> shift << 10


MACHINES = {
    "x86_64": Machine(62, {1: (8, _address), 2: (4, _distance), 4: (4, _distance)},    # 64, PC32, PLT32
                      bytes.fromhex("ff2502000000 6690")),                             # jmp [rip + 2]
    "aarch64": Machine(183, {257: (8, _address), 261: (4, _distance),                  # ABS64, PREL32
                             275: (4, _page), 282: (4, _branch), 283: (4, _branch),    # ADR_PREL_PG_HI21, JUMP26, CALL26
                             277: (4, _in_page(0)), 278: (4, _in_page(0)),             # ADD_, LDST8_ABS_LO12_NC
                             284: (4, _in_page(1)), 285: (4, _in_page(2)),             # LDST16_, LDST32_
                             286: (4, _in_page(3)), 299: (4, _in_page(4))},            # LDST64_, LDST128_
                       bytes.fromhex("50000058 00021fd6")),                            # ldr x16, 8; br x16
}
