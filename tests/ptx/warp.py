"""Instructions of whole warps: shuffles, votes, warp barriers, matrix loads and products.

When one of these runs, all lanes of its mask are there (`machine.Wave.converge`). Products are summed in float64 and
rounded to float32 once; a tensor core's own sums are a little less accurate. Which lane holds which element is in NVIDIA's
PTX ISA, sections "Matrix Fragments for mma" and "ldmatrix".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import values
from ptx.access import address, checked, require_known, space_of
from ptx.errors import Deadlock, Unsupported
from ptx.parse import Instruction, split_operands

if TYPE_CHECKING:
    from ptx.machine import Lanes, Step, Wave


def decode(wave: Wave, instruction: Instruction) -> Step | None:
    known = {"shfl": shuffle, "vote": vote, "activemask": active_mask, "redux": reduce, "ldmatrix": load_matrix,
             "mma": multiply}
    maker = known.get(instruction.opcode[0])
    return maker(wave, instruction) if maker else None


def barrier(wave: Wave, instruction: Instruction) -> Step:
    def step(lanes: Lanes) -> None:
        wave.warp_barriers[lanes] += 1

    return step


def shuffle(wave: Wave, instruction: Instruction) -> Step:
    """``shfl.sync``: the value of another lane. Reading a lane that does not take part is an error."""
    mode = instruction.opcode[2]
    target, *operands = instruction.operands
    names = target.split("|")
    value, other, limit, mask = (wave.reader(text, "u32") for text in operands)
    write = wave.writer(names[0], "b32")
    found = wave.writer(names[1], "pred") if len(names) > 1 else None

    def step(lanes: Lanes) -> None:
        lane = wave.lane[lanes]
        b, c = other(lanes).astype(np.int64) & 31, limit(lanes).astype(np.int64)
        bound, segment = c & 31, c >> 8 & 31
        first, last = lane & segment, lane & segment | bound & ~segment
        wanted = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        inside = wanted >= last if mode == "up" else wanted <= last
        wanted = np.where(inside, wanted, lane)
        absent = mask(lanes) >> wanted.astype(np.uint32) & np.uint32(1) == 0
        if absent.any():
            k = int(np.argmax(absent))
            wave.fail(Deadlock, k, f"reads lane {int(wanted[k])}, which is not in the mask", lanes)
        everyone = lanes if isinstance(lanes, slice) else slice(0, wave.count)
        source = wave.numbers(lanes) - lane + wanted - everyone.start
        write(lanes, np.broadcast_to(value(everyone), everyone.stop - everyone.start)[source])
        if found:
            found(lanes, inside)

    return step


def warps_of(wave: Wave, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
    """For each lane the number of its warp among those taking part, and where these begin in the list of lanes."""
    first = np.flatnonzero(np.diff(wave.warp[lanes], prepend=-1))
    sizes = np.diff(np.append(first, len(wave.numbers(lanes))))
    return np.repeat(np.arange(len(first)), sizes), first


def ballot(wave: Wave, lanes: Lanes, truth: np.ndarray) -> np.ndarray:
    """One bit per lane of the warp where `truth` holds."""
    index, first = warps_of(wave, lanes)
    bits = np.where(truth, np.uint32(1) << wave.lane[lanes].astype(np.uint32), np.uint32(0))
    return np.bitwise_or.reduceat(bits, first)[index]


def vote(wave: Wave, instruction: Instruction) -> Step:
    mode = instruction.opcode[2]
    target, source, _ = instruction.operands
    read = wave.reader(source, "pred")
    write = wave.writer(target, "b32" if mode == "ballot" else "pred")

    def step(lanes: Lanes) -> None:
        truth = np.broadcast_to(read(lanes), len(wave.numbers(lanes)))
        yes, everyone = ballot(wave, lanes, truth), ballot(wave, lanes, np.ones_like(truth))
        results = {"ballot": yes, "any": yes != 0, "all": yes == everyone, "uni": (yes == 0) | (yes == everyone)}
        write(lanes, results[mode])

    return step


def active_mask(wave: Wave, instruction: Instruction) -> Step:
    write = wave.writer(instruction.operands[0], "b32")
    return lambda lanes: write(lanes, ballot(wave, lanes, np.ones(len(wave.numbers(lanes)), np.bool_)))


def reduce(wave: Wave, instruction: Instruction) -> Step:
    function: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                     "xor": np.bitwise_xor}[instruction.opcode[2]]
    kind = instruction.opcode[-1]
    read, write = wave.reader(instruction.operands[1], kind), wave.writer(instruction.operands[0], kind)

    def step(lanes: Lanes) -> None:
        index, first = warps_of(wave, lanes)
        given = np.broadcast_to(read(lanes), len(index)).copy()
        write(lanes, function.reduceat(given, first, dtype=given.dtype)[index])

    return step


# --- matrices ----------------------------------------------------------------------------------------------------------

def load_matrix(wave: Wave, instruction: Instruction) -> Step:
    """``ldmatrix``: matrix q's row r is where lane ``8 q + r`` says; every lane gets two neighbouring elements."""
    opcode = instruction.opcode
    if "m8n8" not in opcode or opcode[-1] != "b16" or space_of(opcode) != "shared":
        raise Unsupported(f"no meaning is known of {'.'.join(opcode)}")
    writers = [wave.writer(name, "b32") for name in split_operands(instruction.operands[0].strip("{}"))]
    read = address(wave, instruction.operands[1])

    def step(lanes: Lanes) -> None:
        numbers = wave.numbers(lanes)
        giving = wave.lane[numbers] < 8 * len(writers)
        givers = numbers[giving]
        part, = checked(wave, givers, read(givers), "shared", 16, False)
        require_known(wave, givers, part, 16)
        region, places = part[0], part[2].reshape(-1, len(writers), 8)
        rows = region.view(2)[places[..., None] // 2 + np.arange(8)]            # warp, matrix, row, column
        if "trans" in opcode:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows), len(writers), 32)
        for q, write in enumerate(writers):
            write(lanes, np.ascontiguousarray(pairs[:, q]).reshape(-1))

    return step


def multiply(wave: Wave, instruction: Instruction) -> Step:
    """``mma.sync``: D = A B + C for matrices spread over a warp."""
    opcode = instruction.opcode
    shape = next(part for part in opcode if part[0] == "m" and part[1:2].isdigit())
    target_kind, kind, other_kind, sum_kind = opcode[-4:]
    if (target_kind, sum_kind) != ("f32", "f32") or kind != other_kind or shape not in DEPTHS.get(kind, ()):
        raise Unsupported(f"no meaning is known of {'.'.join(opcode)}")
    names = [split_operands(operand.strip("{}")) for operand in instruction.operands]
    left, right = ([wave.reader(name, "b32") for name in names[k]] for k in (1, 2))
    sums = [wave.reader(name, "f32") for name in names[3]]
    writers = [wave.writer(name, "f32") for name in names[0]]
    depth = int(shape.split("k")[1])

    def step(lanes: Lanes) -> None:
        count = len(wave.numbers(lanes)) // 32

        def words(readers: list[Any]) -> np.ndarray:
            """warp, lane, word"""
            return np.stack([np.broadcast_to(read(lanes), 32 * count) for read in readers], -1).reshape(count, 32, -1)

        a, b = factors(words(left), words(right), kind, depth)
        start = np.zeros((count, 16, 8), np.float64)
        start[:, ROWS, COLUMNS] = words(sums).reshape(count, 32, 4)
        result = (a @ b + start)[:, ROWS, COLUMNS].astype(np.float32)
        for k, write in enumerate(writers):
            write(lanes, np.ascontiguousarray(result[:, :, k]).reshape(-1))

    return step


DEPTHS = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"), "tf32": ("m16n8k8", "m16n8k4")}
GROUP, MEMBER = np.arange(32) // 4, np.arange(32) % 4
ROWS = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], -1)                         # of the results, lane by register
COLUMNS = np.stack([2 * MEMBER, 2 * MEMBER + 1] * 2, -1)


def factors(left: np.ndarray, right: np.ndarray, kind: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(warps, 16, depth) and (warps, depth, 8) in float64 from the words of the lanes."""
    a, b = np.zeros((len(left), 16, depth)), np.zeros((len(left), depth, 8))
    for word in range(left.shape[2]):
        row, column = GROUP + 8 * (word % 2), word // 2
        for place, value in elements(left[:, :, word], kind):
            a[:, row, _depth(kind, column, place)] = value
    for word in range(right.shape[2]):
        for place, value in elements(right[:, :, word], kind):
            b[:, _depth(kind, word, place), GROUP] = value
    return a, b


def _depth(kind: str, block: int, place: int) -> np.ndarray:
    """Along the summed dimension: where element `place` of a lane's word in a block of words lies."""
    return MEMBER + 4 * block if kind == "tf32" else 2 * MEMBER + place + 8 * block


def elements(words: np.ndarray, kind: str) -> list[tuple[int, np.ndarray]]:
    """The numbers in 32-bit words: (place in the word, values). Of tf32 the lowest 13 bits do not count."""
    if kind == "tf32":
        return [(0, (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64))]
    return [(k, values.widen((words >> np.uint32(16 * k)).astype(np.uint16), kind)) for k in (0, 1)]
