"""Instructions of warpgroups, ``wgmma``: products of matrices in shared memory that go on in the background.

Between a product and the wait for it nobody may touch its sums, nor the matrices that it reads: both are found. Registers
in flight are marked; matrices are read when the product begins and looked at again when it ends. What a product reads has
to be *shown* to it: whoever wrote it has carried out ``fence.proxy.async`` since. And sums that other instructions wrote
need a ``wgmma.fence`` before a product adds to them.

Each warp is done by itself: 16 of the 64 rows. Matrices lie in shared memory as their descriptors say, with the swizzle of
128 bytes, which is the only one known here; see NVIDIA's PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory
Layout".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import values
from ptx.errors import PtxError, Race, Uninitialized, Unsupported
from ptx.memory import Region, places_of
from ptx.parse import Instruction, split_operands
from ptx.shadow import Who

if TYPE_CHECKING:
    from ptx.machine import Lanes, Step, Wave

DEPTH = 16
Read = Callable[["Lanes"], np.ndarray]


@dataclass(slots=True)
class Product:
    """One product of some warps. `factors`: what was read, and where it lies."""

    lanes: np.ndarray
    group: np.ndarray
    names: list[str]
    kind: str
    factors: list[tuple[np.ndarray, np.ndarray]]
    turned: list[bool]


class Products:
    """What a wave knows of its products: those under way, in order; registers that are in flight or were written since the
    last fence, by name; groups that each thread has committed; who wrote what was not shown yet."""

    def __init__(self, wave: Wave, names: set[str]):
        self.running: list[Product] = []
        self.flying = {name: np.zeros(wave.count, np.int32) for name in names}
        self.written = {name: np.ones(wave.count, np.bool_) for name in names}
        self.groups = np.zeros(wave.count, np.int64)
        assert wave.memory.shared is not None
        self.hidden = np.full(len(wave.memory.shared.bytes) // 16 + 1, -1, np.int32)

    def hide(self, places: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Threads wrote to shared memory."""
        for offset in range(0, max(size, 1), 16):
            self.hidden[(places + offset) // 16] = lanes

    def show(self, wave: Wave, lanes: Lanes) -> None:
        shown = np.zeros(wave.count + 1, np.bool_)
        shown[lanes] = True
        self.hidden[shown[self.hidden]] = -1


def sums_of(code: list[Instruction]) -> set[str]:
    """The registers of sums of all products of a kernel."""
    return {name for i in code if i.opcode[:2] == ("wgmma", "mma_async") for name in names_of(i)}


def names_of(instruction: Instruction) -> list[str]:
    return split_operands(instruction.operands[0].strip("{}"))


def decode(wave: Wave, instruction: Instruction) -> Step | None:
    opcode, products = instruction.opcode, wave.products
    if products is None or opcode[0] not in ("wgmma", "fence"):
        return None
    if opcode[0] == "fence":
        return (lambda lanes: products.show(wave, lanes)) if opcode[1:3] == ("proxy", "async") else None
    action = {"fence": fence, "commit_group": commit, "wait_group": wait, "mma_async": multiply}[opcode[1]]
    return action(wave, products, instruction)


def fence(wave: Wave, products: Products, instruction: Instruction) -> Step:
    def step(lanes: Lanes) -> None:
        for written in products.written.values():
            written[lanes] = False

    return step


def commit(wave: Wave, products: Products, instruction: Instruction) -> Step:
    def step(lanes: Lanes) -> None:
        products.groups[lanes] += 1

    return step


def wait(wave: Wave, products: Products, instruction: Instruction) -> Step:
    pending = int(instruction.operands[0])

    def step(lanes: Lanes) -> None:
        waits = np.zeros(wave.count, np.bool_)
        waits[lanes] = True
        left = []
        for product in products.running:
            done = waits[product.lanes] & (product.group < products.groups[product.lanes] - pending)
            if done.any():
                finish(wave, products, part_of(product, done))
            if not done.all():
                left.append(part_of(product, ~done))
        products.running[:] = left

    return step


def part_of(product: Product, chosen: np.ndarray) -> Product:
    """That of some lanes, which are whole warps."""
    warps = chosen[::32]
    return Product(product.lanes[chosen], product.group[chosen], product.names, product.kind,
                   [(data[warps], places[warps]) for data, places in product.factors], product.turned)


# ---- registers --------------------------------------------------------------------------------------------------------


def guarded_reader(wave: Wave, name: str, read: Read) -> Read:
    """What reads a register of sums for any other instruction."""
    flying = wave.products.flying[name] if wave.products else np.zeros(wave.count, np.int32)

    def checked(lanes: Lanes) -> np.ndarray:
        if flying[lanes].any():
            wave.fail(Race, int(np.argmax(flying[lanes] > 0)), f"reads {name}, to which a product still adds", lanes)
        return read(lanes)

    return checked


def guarded_writer(wave: Wave, name: str, write: Callable[[Lanes, np.ndarray], None]) -> Callable[[Lanes, np.ndarray], None]:
    products = wave.products
    assert products is not None

    def checked(lanes: Lanes, value: np.ndarray) -> None:
        if products.flying[name][lanes].any():
            wave.fail(Race, int(np.argmax(products.flying[name][lanes] > 0)),
                      f"writes {name}, to which a product still adds", lanes)
        products.written[name][lanes] = True
        write(lanes, value)

    return checked


# ---- products ---------------------------------------------------------------------------------------------------------


def multiply(wave: Wave, products: Products, instruction: Instruction) -> Step:
    """``wgmma.mma_async``: D += A B, from descriptors of A and B."""
    opcode, operands = instruction.opcode, instruction.operands
    shape = re.fullmatch(r"m64n(\d+)k16", opcode[4])
    kind = opcode[-1]
    if not shape or opcode[2:4] != ("sync", "aligned") or opcode[5:] != ("f32", kind, kind) or kind not in values.NARROW:
        raise Unsupported(f"no meaning is known of {'.'.join(opcode)}")
    columns, names = int(shape.group(1)), names_of(instruction)
    if len(names) != columns // 2 or operands[4:6] != ("1", "1"):
        raise Unsupported(f"{instruction.text}: sums or signs")
    described = [wave.reader(name, "u64") for name in operands[1:3]]
    adds = wave.reader(operands[3], "pred")
    turned = [text == "1" for text in operands[6:8]]

    def step(lanes: Lanes) -> None:
        numbers = wave.numbers(lanes)
        if not np.all(adds(lanes)):
            raise Unsupported(f"{instruction.text}: sums that begin at 0")
        for name in names:
            if products.written[name][lanes].any():
                wave.fail(Race, int(np.argmax(products.written[name][lanes])),
                          f"adds to {name}, which was written since the last wgmma.fence", lanes)
            products.flying[name][lanes] += 1
        parts = []
        for read, across, rows, is_left in zip(described, turned, (16, columns), (True, False)):
            first = 16 * (wave.rank[numbers[::32]] // 32 % 4) if is_left else np.zeros(len(numbers) // 32, np.int64)
            places = locate(wave, numbers, np.broadcast_to(read(lanes), len(numbers)), across, first, rows)
            parts.append((look(wave, numbers, places), places))
        products.running.append(Product(numbers, products.groups[numbers], names, kind, parts, turned))

    return step


def locate(wave: Wave, numbers: np.ndarray, described: np.ndarray, across: bool, first: np.ndarray,
           rows: int) -> np.ndarray:
    """Where the pieces of 16 bytes lie of `rows` rows from `first` on, 16 steps of each: (warp, piece). Along the depth
    there are two pieces to a row; across it, to each step one of every eight rows."""
    words = described.astype(np.int64).reshape(-1, 32)
    if (words != words[:, :1]).any():
        wave.fail(PtxError, int(np.argmax((words != words[:, :1]).reshape(-1))), "lanes of a warp name different matrices",
                  numbers)
    word = words[:, :1]
    start, leading, stride = ((word >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (word >> 62 & 3 != 1).any() or (word >> 49 & 7).any() or (start & 0x380).any():
        raise Unsupported("matrices that are not swizzled by 128 bytes, or begin within eight rows")
    if across:
        row, step = np.divmod(np.arange(rows // 8 * DEPTH), DEPTH)
        row = first[:, None] + 8 * row
        logical = start + row // 64 * leading + row % 64 * 2 + step // 8 * stride + step % 8 * 128
    else:
        row, half = np.divmod(np.arange(rows * 2), 2)
        row = first[:, None] + row
        logical = start + row // 8 * stride + row % 8 * 128 + half * 16
    region = wave.memory.shared
    assert region is not None

    def fail(error: type[PtxError], lane: int, problem: str) -> None:
        wave.fail(error, 32 * (lane // logical.shape[1]), problem, numbers)

    offsets = (logical ^ (logical >> 7 & 7) << 4).reshape(-1)
    wave.memory.check(region, offsets, 16, None, fail, "multiplies")
    return places_of(region, offsets, np.repeat(wave.row[numbers[::32]], logical.shape[1])).reshape(logical.shape)


def look(wave: Wave, numbers: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The pieces, (warp, piece, element), which are all there, shown, and nobody's meanwhile."""
    region, products = wave.memory.shared, wave.products
    assert region is not None and products is not None
    flat = places.reshape(-1)
    report = reporter(wave, numbers, places.shape[1])
    at = flat[:, None] + np.arange(16)
    known = region.known[at].all(1)
    if not known.all():
        k = int(np.argmin(known))
        report(Uninitialized, k, f"multiplies {described(region, flat, k)}, never written or still being copied")
    writer = products.hidden[flat // 16]
    if (writer >= 0).any():
        k = int(np.argmax(writer >= 0))
        report(Race, k, f"multiplies {described(region, flat, k)}, written without a fence.proxy.async since")
    if wave.memory.races:
        wave.memory.track(region, flat, 16, readers(wave, numbers, places.shape[1]), False, report_lane(report))
    return region.view(2)[flat[:, None] // 2 + np.arange(8)].reshape(*places.shape, 8)


def described(region: Region, flat: np.ndarray, k: int) -> str:
    return f"16 bytes of {region.describe()} at byte {int(flat[k] - region.skew) % region.stride}"


def readers(wave: Wave, numbers: np.ndarray, count: int) -> Who:
    """The first lane of each warp stands for all of it."""
    return wave.who(np.repeat(numbers[::32], count))


def reporter(wave: Wave, numbers: np.ndarray, count: int) -> Callable[[type[PtxError], int, str], None]:
    return lambda error, k, problem: wave.fail(error, 32 * (k // count), problem, numbers)


def report_lane(report: Callable[[type[PtxError], int, str], None]) -> Any:
    return lambda error, lane, problem: report(error, lane, problem)


def finish(wave: Wave, products: Products, product: Product) -> None:
    """The results, if the matrices are still what they were."""
    wide = []
    for (data, places), across in zip(product.factors, product.turned):
        again = look(wave, product.lanes, places)
        if again.tobytes() != data.tobytes():
            k = int(np.argmax((again != data).reshape(-1, 8).any(1)))
            region = wave.memory.shared
            assert region is not None
            reporter(wave, product.lanes, places.shape[1])(
                Race, k, f"{described(region, places.reshape(-1), k)} was overwritten while a product read it")
        numbers = values.widen(data, product.kind)
        count = len(numbers)
        if across:                                           # warp, eight rows, step, row
            wide.append(numbers.reshape(count, -1, DEPTH, 8).transpose(0, 1, 3, 2).reshape(count, -1, DEPTH))
        else:
            wide.append(numbers.reshape(count, -1, DEPTH))
    a, b = wide
    lane = np.arange(32)
    results = a @ b.swapaxes(1, 2)
    for k, name in enumerate(product.names):
        register = wave.registers[name]
        added = results[:, lane // 4 + k % 4 // 2 * 8, k // 4 * 8 + lane % 4 * 2 + k % 2].reshape(-1)
        before = register[product.lanes].view(np.float32)
        register[product.lanes] = (before + added).astype(np.float32).view(register.dtype)
        products.flying[name][product.lanes] -= 1
