"""Instructions that access memory: loads, stores, atomics, copies to shared memory in the background."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import values
from ptx.errors import OutOfBounds, PtxError, Uninitialized, Unsupported
from ptx.memory import Region, expand, places_of
from ptx.parse import Instruction, split_operands
from ptx.values import TYPES, size_of

if TYPE_CHECKING:
    from ptx.machine import Lanes, Step, Wave

SPACES = ("global", "shared", "local", "const")


def decode(wave: Wave, instruction: Instruction) -> Step | None:
    opcode = instruction.opcode
    if opcode[0] in ("ld", "ldu") and "param" not in opcode:
        return load(wave, instruction)
    if opcode[0] == "st" and "param" not in opcode:
        return store(wave, instruction)
    if opcode[0] in ("atom", "red"):
        return atomic(wave, instruction)
    if opcode[:2] == ("cp", "async"):
        return copy(wave, instruction)
    return None


def space_of(opcode: tuple[str, ...]) -> str:
    """The state space that an opcode names; generic where it names none."""
    for part in opcode:
        if part.split("_")[0] in SPACES:
            return part.split("_")[0]
    return "generic"


def address(wave: Wave, text: str) -> Callable[[Lanes], np.ndarray]:
    """What gives the addresses of an operand such as ``[%rd1+8]``, one per lane."""
    match = re.fullmatch(r"\[\s*([%\w$'~#]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?\s*\]", text)
    if not match:
        raise Unsupported(f"address {text}")
    name, offset = match.group(1), int((match.group(2) or match.group(3) or "0").replace(" ", ""), 0)
    register = wave.registers.get(name)
    read = wave.reader(name, "u64" if register is None or register.dtype.itemsize == 8 else "u32")

    def addresses(lanes: Lanes) -> np.ndarray:
        found = read(lanes).astype(np.int64) + offset
        return found if found.ndim else np.full(len(wave.numbers(lanes)), found)

    return addresses


Part = tuple[Region, Any, np.ndarray, np.ndarray]


def checked(wave: Wave, lanes: Lanes, addresses: np.ndarray, space: str, size: int, writes: bool,
            atomic: bool = False) -> list[Part]:
    """The places of an access of `size` bytes per lane, by region: (region, lanes of it or None, places, offsets)."""
    memory = wave.memory

    def fail(error: type[PtxError], lane: int, problem: str) -> None:
        wave.fail(error, lane, problem, lanes)

    found = []
    for region, chosen, offsets in memory.split(addresses, space, fail):
        memory.check(region, offsets, size, chosen, fail, "writes" if writes else "reads")
        numbers = wave.numbers(lanes)
        numbers = numbers if chosen is None else numbers[chosen]
        rows: Any = 0
        if region is memory.shared:
            rows = wave.row[numbers]
        elif region is memory.local:
            rows = numbers
        places = places_of(region, offsets, rows)
        if memory.races and region is not memory.local and region.writable:
            memory.track(region, places, size, wave.who(numbers, atomic), writes, fail)
        found.append((region, chosen, places, offsets))
    return found


def require_known(wave: Wave, lanes: Lanes, part: Part, size: int) -> None:
    """All bytes that lanes are about to read were written before."""
    region, chosen, places, offsets = part
    if region.all_known:
        return
    known = region.known[places]
    for k in range(1, size):
        known = known & region.known[places + k]
    if not known.all():
        k = int(np.argmin(known))
        wave.fail(Uninitialized, k if chosen is None else int(chosen[k]),
                  f"reads {size} bytes of {region.describe()} at byte {int(offsets[k])}, which were never written "
                  "or are still being copied", lanes)


def vector_of(opcode: tuple[str, ...]) -> int:
    return next((int(part[1:]) for part in opcode if part in ("v2", "v4", "v8")), 1)


def load(wave: Wave, instruction: Instruction) -> Step:
    kind, count, space = instruction.opcode[-1], vector_of(instruction.opcode), space_of(instruction.opcode)
    addresses = address(wave, instruction.operands[1])
    writers = [wave.writer(name, kind) for name in split_operands(instruction.operands[0].strip("{}"))]
    size = size_of(kind)

    def step(lanes: Lanes) -> None:
        parts = checked(wave, lanes, addresses(lanes), space, size * count, False)
        for part in parts:
            require_known(wave, lanes, part, size * count)
            region, chosen, places, _ = part
            view, first = region.view(size), places // size
            target = lanes if chosen is None else wave.numbers(lanes)[chosen]
            for k, write in enumerate(writers):
                write(target, view[first + k] if k else view[first])

    return step


def store(wave: Wave, instruction: Instruction) -> Step:
    kind, count, space = instruction.opcode[-1], vector_of(instruction.opcode), space_of(instruction.opcode)
    addresses = address(wave, instruction.operands[0])
    plain = f"b{8 * size_of(kind)}"
    readers = [wave.reader(name, plain) for name in split_operands(instruction.operands[1].strip("{}"))]
    size = size_of(kind)

    def step(lanes: Lanes) -> None:
        for region, chosen, places, _ in checked(wave, lanes, addresses(lanes), space, size * count, True):
            require_writable(wave, lanes, region)
            view, first = region.view(size), places // size
            target = lanes if chosen is None else wave.numbers(lanes)[chosen]
            for k, read in enumerate(readers):
                view[first + k] = read(target)
            mark_known(region, places, size * count)
            if wave.products and region is wave.memory.shared:
                wave.products.hide(places, size * count, wave.numbers(target))

    return step


def require_writable(wave: Wave, lanes: Lanes, region: Region) -> None:
    if not region.writable:
        wave.fail(OutOfBounds, 0, f"writes {region.describe()}, which is constant", lanes)


def mark_known(region: Region, places: np.ndarray, size: int, known: bool = True) -> None:
    if region.all_known and known:
        return
    region.all_known = False
    for k in range(size):
        region.known[places + k] = known


# --- atomics -----------------------------------------------------------------------------------------------------------

def combine(opcode: tuple[str, ...], kind: str) -> Callable[..., Any]:
    """old, operands -> new."""
    name = next(part for part in opcode if part in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
    if kind in values.NARROW or kind.endswith("x2"):
        raise Unsupported(f"{'.'.join(opcode)}: atomics of 16-bit floats")
    return {"add": lambda old, x: old + x, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor, "exch": lambda old, x: np.broadcast_to(x, old.shape).astype(old.dtype),
            "cas": lambda old, test, x: np.where(old == test, x, old),
            "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
            "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1))}[name]


def atomic(wave: Wave, instruction: Instruction) -> Step:
    """One lane after the other where they meet at one place: upward, or downward when the schedule is reversed."""
    opcode, operands = instruction.opcode, instruction.operands
    kind, space = opcode[-1], space_of(opcode)
    returns = opcode[0] == "atom"
    addresses = address(wave, operands[1 if returns else 0])
    sources = [wave.reader(name, kind) for name in operands[2 if returns else 1:]]
    write = wave.writer(operands[0], kind) if returns else None
    compute, size = combine(opcode, kind), size_of(kind)

    def step(lanes: Lanes) -> None:
        for part in checked(wave, lanes, addresses(lanes), space, size, True, True):
            region, chosen, places, _ = part
            require_writable(wave, lanes, region)
            require_known(wave, lanes, part, size)
            view, at = region.view(size).view(TYPES[kind]), places // size
            target = wave.numbers(lanes) if chosen is None else wave.numbers(lanes)[chosen]
            given = [np.broadcast_to(source(target), at.shape) for source in sources]
            old = np.empty(at.shape, TYPES[kind])
            for turn in turns(at, wave.schedule == "reversed"):
                old[turn] = view[at[turn]]
                view[at[turn]] = compute(old[turn], *[value[turn] for value in given])
            if write:
                write(target, old)

    return step


def turns(at: np.ndarray, downward: bool) -> list[np.ndarray]:
    """Lanes in turns in which no two meet at one place."""
    order = np.argsort(at, kind="stable")
    first = np.flatnonzero(np.diff(at[order], prepend=-1))
    number = np.arange(len(at)) - np.repeat(first, np.diff(np.append(first, len(at))))
    found = [order[number == k] for k in range(int(number.max()) + 1)]
    return found[::-1] if downward else found


# --- copies in the background ------------------------------------------------------------------------------------------

def copy(wave: Wave, instruction: Instruction) -> Step:
    """``cp.async``: the bytes arrive when the thread waits for them, and count as unwritten until then."""
    action = instruction.opcode[2]
    if action == "commit_group":
        def commit(lanes: Lanes) -> None:
            wave.copy_groups[lanes] += 1
        return commit
    if action == "wait_all":
        return lambda lanes: arrive(wave, lanes, -1)
    if action == "wait_group":
        pending = int(instruction.operands[0])
        return lambda lanes: arrive(wave, lanes, pending)
    if action not in ("ca", "cg"):
        raise Unsupported(f"no meaning is known of {'.'.join(instruction.opcode)}")
    target, source = address(wave, instruction.operands[0]), address(wave, instruction.operands[1])
    size = int(instruction.operands[2])
    given = wave.reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def step(lanes: Lanes) -> None:
        numbers = wave.numbers(lanes)
        data = np.zeros((len(numbers), size), np.uint8)
        wanted = np.array(size) if given is None else given(lanes).astype(np.int64)
        count = np.broadcast_to(wanted, len(numbers))
        for amount in np.unique(count[count > 0]):
            some = np.flatnonzero(count == amount)
            data[some, :amount] = fetch(wave, numbers[some], source(numbers[some]), int(amount), size)
        (region, _, places, _), = checked(wave, lanes, target(lanes), "shared", size, True)
        mark_known(region, places, size, False)
        wave.copies.append([numbers, wave.copy_groups[numbers], places, data])

    return step


def fetch(wave: Wave, lanes: np.ndarray, addresses: np.ndarray, amount: int, size: int) -> np.ndarray:
    """The first `amount` bytes at addresses of global memory that are multiples of `size`."""
    found = np.zeros((len(lanes), amount), np.uint8)
    for part in checked(wave, lanes, addresses, "global", size if amount == size else 1, False):
        region, chosen, places, offsets = part
        require_known(wave, lanes, part, amount)
        found[slice(None) if chosen is None else chosen] = region.bytes[expand(places, amount)]
        if (offsets + amount > region.size).any():
            wave.fail(PtxError, 0, f"copies {amount} bytes that reach beyond {region.describe()}", lanes)
    return found


def arrive(wave: Wave, lanes: Lanes, pending: int) -> None:
    """All but the `pending` latest groups of these lanes are there; -1 stands for what is in no group yet, too."""
    region = wave.memory.shared
    assert region is not None
    waits = np.zeros(wave.count, np.bool_)
    waits[lanes] = True
    left = []
    for record in wave.copies:
        numbers, groups, places, data = record
        done = waits[numbers] & (groups < wave.copy_groups[numbers] - pending)
        at = expand(places[done], data.shape[1])
        region.bytes[at] = data[done]
        region.known[at] = True
        if wave.products:
            wave.products.hide(places[done], data.shape[1], numbers[done])
        if wave.memory.races and done.any():
            wave.memory.track(region, places[done], data.shape[1], wave.who(numbers[done]), True,
                              lambda error, lane, problem, who=numbers[done]: wave.fail(error, lane, problem, who))
        if not done.all():
            left.append([part[~done] for part in record])
    wave.copies[:] = left
