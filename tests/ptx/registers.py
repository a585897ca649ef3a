"""Instructions that move between registers, and those with the carry: moves, parameters, address spaces, additions of long
integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import Unsupported
from ptx.memory import LOCAL, SHARED, WINDOW
from ptx.parse import Instruction, split_operands
from ptx.values import size_of, unsigned

if TYPE_CHECKING:
    from ptx.machine import Lanes, Step, Wave


def decode(wave: Wave, instruction: Instruction) -> Step | None:
    opcode = instruction.opcode
    if opcode[0] == "mov":
        return move(wave, instruction)
    if opcode[0] == "cvta":
        return convert_address(wave, instruction)
    if opcode[0] == "isspacep":
        return is_in_space(wave, instruction)
    if opcode[0] in ("ld", "st") and opcode[1] == "param":
        return parameter(wave, instruction)
    if "cc" in opcode or opcode[0] in ("addc", "subc", "madc"):
        return with_carry(wave, instruction)
    return None


def move(wave: Wave, instruction: Instruction) -> Step:
    """A copy, or the packing of a vector into one register or the other way round."""
    target, source = instruction.operands
    kind = instruction.opcode[-1]
    if source.startswith("{"):
        return pack(wave, target, split_operands(source.strip("{}")), kind)
    if target.startswith("{"):
        return unpack(wave, split_operands(target.strip("{}")), source, kind)
    read, write = wave.reader(source, kind), wave.writer(target, kind)
    return lambda lanes: write(lanes, read(lanes))


def pack(wave: Wave, target: str, sources: list[str], kind: str) -> Step:
    size = size_of(kind) // len(sources)
    part, whole = f"b{8 * size}", unsigned(size_of(kind))
    readers, write = [wave.reader(source, part) for source in sources], wave.writer(target, kind)

    def step(lanes: Lanes) -> None:
        value = np.asarray(readers[0](lanes)).astype(whole)
        for k, read in enumerate(readers[1:], 1):
            value = value | read(lanes).astype(whole) << whole(8 * size * k)
        write(lanes, value)

    return step


def unpack(wave: Wave, targets: list[str], source: str, kind: str) -> Step:
    size = size_of(kind) // len(targets)
    part = f"b{8 * size}"
    read, writers = wave.reader(source, f"b{8 * size_of(kind)}"), [wave.writer(target, part) for target in targets]

    def step(lanes: Lanes) -> None:
        value = np.asarray(read(lanes))
        for k, write in enumerate(writers):
            write(lanes, (value >> value.dtype.type(8 * size * k)).astype(unsigned(size)))

    return step


def convert_address(wave: Wave, instruction: Instruction) -> Step:
    """Global addresses are generic ones already; shared and local ones get the number of their space, or lose it."""
    opcode, (target, source) = instruction.opcode, instruction.operands
    kind = opcode[-1]
    read, write = wave.reader(source, kind), wave.writer(target, kind)
    space = opcode[2] if opcode[1] == "to" else opcode[1]
    if space in ("global", "const", "param"):
        return lambda lanes: write(lanes, read(lanes))
    region = wave.memory.shared if space.startswith("shared") else wave.memory.local
    assert region is not None
    base = np.uint64(region.base)
    if opcode[1] == "to":
        return lambda lanes: write(lanes, read(lanes) - base)
    return lambda lanes: write(lanes, read(lanes) + base)


def is_in_space(wave: Wave, instruction: Instruction) -> Step:
    target, source = instruction.operands
    space = instruction.opcode[1]
    read, write = wave.reader(source, "u64"), wave.writer(target, "pred")

    def step(lanes: Lanes) -> None:
        window = read(lanes) >> np.uint64(WINDOW)
        inside = {"shared": window == SHARED, "local": window == LOCAL}.get(space.split("_")[0])
        write(lanes, (window != SHARED) & (window != LOCAL) if inside is None else inside)

    return step


def parameter(wave: Wave, instruction: Instruction) -> Step:
    """Parameters of the kernel are numbers; those of calls are registers that come into being when they are written."""
    kind = instruction.opcode[-1]
    if any(part.startswith("v") and part[1:].isdigit() for part in instruction.opcode):
        raise Unsupported(f"{instruction.text}: vectors of parameters")
    writes = instruction.opcode[0] == "st"
    place = instruction.operands[0 if writes else 1].strip("[] ").removesuffix("+0")
    other = instruction.operands[1 if writes else 0]
    if place in wave.parameters:
        write = wave.writer(other, kind)
        size = size_of(kind)
        constant = np.array(wave.parameters[place] & ((1 << 8 * size) - 1), unsigned(size))
        return lambda lanes: write(lanes, constant)
    stored = wave.registers.setdefault(f"[{place}]", np.zeros(wave.count, np.uint64))
    if writes:
        read = wave.reader(other, kind)

        def keep(lanes: Lanes) -> None:
            stored[lanes] = read(lanes).view(unsigned(size_of(kind))).astype(np.uint64)

        return keep
    read, write = wave.reader(f"[{place}]", kind), wave.writer(other, kind)
    return lambda lanes: write(lanes, read(lanes))


def with_carry(wave: Wave, instruction: Instruction) -> Step:
    """Parts of sums and products of long integers: the carry (the borrow, for a difference) goes from one to the next."""
    opcode = instruction.opcode
    name, kind = opcode[0], opcode[-1]
    bits = 8 * size_of(kind)
    if bits == 64 and name.startswith("mad"):
        raise Unsupported(f"{instruction.text}: products of 64 bits with a carry")
    plain = f"u{bits}"
    signed_high = "hi" in opcode and kind[0] == "s"
    sources = [wave.reader(text, "s32" if signed_high and k < 2 else plain)
               for k, text in enumerate(instruction.operands[1:])]
    write = wave.writer(instruction.operands[0], kind)
    keeps, takes = "cc" in opcode, name.endswith("c")

    def step(lanes: Lanes) -> None:
        values = [source(lanes) for source in sources]
        if name.startswith("mad"):
            wide = np.int64 if signed_high else np.uint64
            product = (values[0].astype(wide) * values[1].astype(wide)).astype(np.uint64)
            values = [(product >> np.uint64(32) if "hi" in opcode else product).astype(np.uint32), values[2]]
        a, b = (np.asarray(value) for value in values)
        carry = (wave.carry[lanes] if takes else np.zeros(1, np.uint64)).astype(a.dtype)
        if name.startswith("sub"):
            result = a - b - carry
            out = (a < b) | ((a == b) & (carry == 1))
        else:
            result = a + b + carry
            out = (result < a) | ((result == a) & (carry == 1) & (b != 0))
        if keeps:
            wave.carry[lanes] = out
        write(lanes, result)

    return step
