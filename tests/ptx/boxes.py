"""Copies of boxes by the copy engine, ``cp.async.bulk.tensor``, and what counts their bytes, ``mbarrier``.

A box arrives as late as can be: when a thread waits for it. Until then what it goes to counts as unwritten, and a wait that
is in vain lets others go first; when all wait in vain, it is a `Deadlock`. A map is made by `encode`, which takes what the
driver's cuTensorMapEncodeTiled takes and checks it as that would.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.access import address, checked, mark_known
from ptx.errors import Deadlock, Misaligned, PtxError, Race, Unsupported
from ptx.memory import expand
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.machine import Lanes, Step, Wave

MAP_BYTES, _LAYOUT = 128, "<6Q"
PATIENCE = 1000                                # waits in vain one after the other


def encode(place: int, sizes: tuple[int, int], pitch: int, box: tuple[int, int]) -> bytes:
    """The map of a matrix of 16-bit elements at `place`, swizzled by 128 bytes; ValueError where a driver would refuse."""
    if place % 16 or pitch % 16 or pitch < 2 * sizes[0] or not all(0 < n <= 1 << 32 for n in sizes):
        raise ValueError(f"a matrix at {place:#x} of {sizes} elements, {pitch} bytes from line to line")
    if not all(0 < n <= 256 for n in box) or 2 * box[0] > 128 or box[0] % 8:
        raise ValueError(f"boxes of {box} elements")
    return struct.pack(_LAYOUT, place, *sizes, pitch, *box).ljust(MAP_BYTES, b"\0")


@dataclass(slots=True)
class Arrival:
    """One ``mbarrier``: threads that have to arrive in each phase and have not yet, bytes that have to come, phases done."""

    count: int
    pending: int
    nbytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        while self.pending == 0 and self.nbytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass(slots=True)
class Box:
    """A copy under way: where its lines of bytes go, and what they will be."""

    arrival: int
    places: np.ndarray
    data: np.ndarray


class Arrivals:
    """What a wave knows: arrivals by their place in shared memory, copies under way, and waits in vain."""

    def __init__(self, wave: Wave):
        self.known: dict[int, Arrival] = {}
        self.boxes: list[Box] = []
        self.vain, self.waits = 0, False

    def give_way(self) -> bool:
        """Whether the last instruction was a wait in vain."""
        waits, self.waits = self.waits, False
        return waits

    def deliver(self, wave: Wave, place: int) -> None:
        """What was on its way to be counted at `place`."""
        region = wave.memory.shared
        assert region is not None
        coming = [box for box in self.boxes if box.arrival == place]
        self.boxes = [box for box in self.boxes if box.arrival != place]
        for box in coming:
            at = expand(box.places, 16)
            region.bytes[at] = box.data.reshape(-1, 16)
            region.known[at] = True
            if region.shadow is not None:                    # whoever waits is in order with it
                region.shadow.written.thread[box.places[:, None] // region.shadow.granule
                                             + np.arange(16 // region.shadow.granule)] = -1
            self.known[place].nbytes -= box.data.size
        self.known[place].settle()


def decode(wave: Wave, instruction: Instruction) -> Step | None:
    opcode = instruction.opcode
    if opcode[0] == "mbarrier":
        action = {"init": begin, "arrive": expect, "try_wait": wait}.get(opcode[1])
        if action is None or "shared_cta" not in opcode:
            raise Unsupported(f"no meaning is known of {'.'.join(opcode)}")
        return action(wave, instruction)
    return fetch(wave, instruction) if opcode[:5] == ("cp", "async", "bulk", "tensor", "2d") else None


def each(wave: Wave, lanes: Lanes, addresses: np.ndarray, writes: bool) -> list[tuple[int, int]]:
    """Lanes, and where in shared memory the arrivals are that they name."""
    (_, _, places, _), = checked(wave, lanes, addresses, "shared", 8, writes)
    return list(zip(wave.numbers(lanes).tolist(), places.tolist()))


def begin(wave: Wave, instruction: Instruction) -> Step:
    read, count = address(wave, instruction.operands[0]), int(instruction.operands[1])

    def step(lanes: Lanes) -> None:
        for lane, place in each(wave, lanes, read(lanes), True):
            wave.arrivals.known[place] = Arrival(count, count)
            if wave.products:
                wave.products.hide(np.array([place]), 8, np.array([lane]))

    return step


def arrival_at(wave: Wave, lanes: Lanes, place: int) -> Arrival:
    if place not in wave.arrivals.known:
        wave.fail(PtxError, 0, "names an mbarrier that nobody has initialized", lanes)
    return wave.arrivals.known[place]


def expect(wave: Wave, instruction: Instruction) -> Step:
    if "expect_tx" not in instruction.opcode or instruction.operands[0] != "_":
        raise Unsupported(f"no meaning is known of {instruction.text}")
    read, amount = address(wave, instruction.operands[1]), wave.reader(instruction.operands[2], "u32")

    def step(lanes: Lanes) -> None:
        wanted = np.broadcast_to(amount(lanes), len(wave.numbers(lanes))).tolist()
        for (_, place), nbytes in zip(each(wave, lanes, read(lanes), False), wanted):
            arrival = arrival_at(wave, lanes, place)
            arrival.nbytes += nbytes
            arrival.pending -= 1
            arrival.settle()
            wave.arrivals.vain = 0

    return step


def wait(wave: Wave, instruction: Instruction) -> Step:
    """``try_wait.parity``: true when the phase of that parity is done."""
    write, read = wave.writer(instruction.operands[0], "pred"), address(wave, instruction.operands[1])
    parity = wave.reader(instruction.operands[2], "u32")

    def step(lanes: Lanes) -> None:
        wanted = np.broadcast_to(parity(lanes), len(wave.numbers(lanes)))
        places = np.array([place for _, place in each(wave, lanes, read(lanes), False)])
        done = np.zeros(len(places), np.bool_)
        for place in np.unique(places).tolist():
            arrival = arrival_at(wave, lanes, place)
            before = arrival.phase
            wave.arrivals.deliver(wave, place)
            wave.arrivals.vain = wave.arrivals.vain if arrival.phase == before else 0
            done |= (places == place) & (arrival.phase % 2 != wanted)
        wave.arrivals.waits = not done.all()
        wave.arrivals.vain += not done.all()
        if wave.arrivals.vain > PATIENCE:
            wave.fail(Deadlock, int(np.argmin(done)), "waits for bytes that never come", lanes)
        write(lanes, done)

    return step


def fetch(wave: Wave, instruction: Instruction) -> Step:
    """One thread asks for a box."""
    to, arrival = address(wave, instruction.operands[0]), address(wave, instruction.operands[2])
    name, *place = re.split(r",\s*", instruction.operands[1].strip("[]").replace("{", "").replace("}", ""))
    described = address(wave, f"[{name}]")
    along, line = (wave.reader(text, "s32") for text in place)

    def step(lanes: Lanes) -> None:
        numbers = wave.numbers(lanes)
        for k, lane in enumerate(numbers):
            one = np.array([lane])
            x, y = (int(np.broadcast_to(read(lanes), len(numbers))[k]) for read in (along, line))
            request(wave, one, int(to(one)[0]), int(arrival(one)[0]), int(described(one)[0]), x, y)

    return step


def request(wave: Wave, one: np.ndarray, to: int, arrival: int, described: int, x: int, y: int) -> None:
    ((_, place),) = each(wave, one, np.array([arrival]), False)
    arrival_at(wave, one, place)
    if wave.products and wave.products.hidden[place // 16] >= 0:
        wave.fail(Race, 0, "counts at an mbarrier that was initialized without a fence.proxy.async since", one)
    ((source, _, at, _),) = checked(wave, one, np.array([described]), "generic", 1, False)
    start, width, height, pitch, across, lines = struct.unpack_from(_LAYOUT, source.bytes, int(at[0]))
    offset = np.arange(lines)[:, None] * 2 * across + np.arange(across // 8) * 16
    target = to + (offset ^ (offset >> 7 & 7) << 4)
    if to % 1024:
        wave.fail(Misaligned, 0, f"copies a box to {to:#x}, no multiple of 1024 bytes", one)
    many = np.repeat(one, target.size)
    ((region, _, places, _),) = checked(wave, many, target.reshape(-1), "shared", 16, True)
    mark_known(region, places, 16, False)
    data = np.zeros((lines, across), np.uint16)
    columns, rows = np.arange(max(x, 0), min(x + across, width)), np.arange(max(y, 0), min(y + lines, height))
    if len(columns) and len(rows):
        wanted = start + rows[:, None] * pitch + 2 * columns
        data[rows[0] - y:rows[-1] - y + 1, columns[0] - x:columns[-1] - x + 1] = elements(wave, one, wanted)
    wave.arrivals.boxes.append(Box(place, places, data.view(np.uint8).reshape(-1, 16)))


def elements(wave: Wave, one: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The 16-bit elements at these addresses of global memory."""
    ((region, _, places, _),) = checked(wave, np.repeat(one, wanted.size), wanted.reshape(-1), "global", 2, False)
    return region.bytes[expand(places, 2)].copy().view(np.uint16).reshape(wanted.shape)
