"""GPU lowering of sort and topk, and of sorting keys for other lowerings.

Scratch memory is two halves, each with keys and places: every launch reads one and writes the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jitgrad.codegen.call import Call, split
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.cuda_scan import Scan
from jitgrad.codegen.cuda_templates import WIDE
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.dtypes import DType, bool_, int32
from jitgrad.kernels.cuda import sort

SPAN = 2048
"""The most elements that a block sorts; `helpers.SPAN`."""

ENOUGH = 264
"""Blocks that give every multiprocessor two."""

MOST_PLACES = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Lines:
    """What is sorted: lines of `x`, along the middle dimension of [outer, size, inner]."""

    x: Buffer
    dtype: DType
    count: int
    size: int
    inner: int
    flip: int
    wide: bool

    @property
    def key(self) -> str:
        return "u64" if self.dtype.itemsize == 8 else "u32"

    @property
    def key_bytes(self) -> int:
        return 8 if self.dtype.itemsize == 8 else 4

    def text(self, kernel: object, element: str | None = None) -> str:
        return kernel_text(kernel, self.wide, T=element or self.dtype.short, K=self.key)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Halves:
    """Scratch memory: keys and places, twice."""

    buffers: tuple[Buffer, Buffer, Buffer, Buffer]

    def half(self, k: int) -> tuple[Buffer, Buffer]:
        return self.buffers[2 * (k % 2)], self.buffers[2 * (k % 2) + 1]


def halves(call: Call, first: int = 0) -> Halves:
    """Scratch buffers `first` … `first` + 3."""
    a, b, c, d = [call.scratch(first + k) for k in range(4)]
    return Halves((a, b, c, d))


def scratch_for(lines: Lines, length: int) -> tuple[int, ...]:
    """The bytes of `Halves` for so many elements of each line."""
    count = max(lines.count * length, 1)
    return lines.key_bytes * count, 4 * count, lines.key_bytes * count, 4 * count


def places(size: int) -> int:
    """The power of two that has room for a line of `size`."""
    return 1 << max(0, size - 1).bit_length()


def sort_short(lines: Lines, values: Buffer, indices: Buffer, kept: int) -> CudaLaunch:
    """The launch that sorts lines of at most SPAN elements. Blocks are smaller where there would be few."""
    run = places(lines.size)
    span = SPAN
    while span > max(run, 256) and lines.count * run // span < ENOUGH:
        span //= 2
    grid = -(-lines.count // (span // run))
    return gpu_launch(lines.text(sort.sort_lines), grid, lines.x, values, indices, lines.count, lines.size, lines.inner,
                      kept, run, span, lines.flip, wide=lines.wide, alignment=lines.dtype.itemsize)


def sort_pieces(lines: Lines, memory: Halves, kept: int, stride: int, turn: int = 0) -> CudaLaunch:
    """The launch that keeps the first `kept` of each piece, in the half number `turn`. Of the first turn pieces are of x,
    of later ones of the keys that were kept before."""
    pieces, run, (keys, places_before) = -(-lines.size // SPAN), places(min(lines.size, SPAN)), memory.half(turn - 1)
    source, x, inner, flip, alignment = (
        (lines.text(sort.sort_pieces, lines.key), keys, 1, 0, lines.key_bytes) if turn else
        (lines.text(sort.sort_pieces), lines.x, lines.inner, lines.flip, lines.dtype.itemsize))
    return gpu_launch(source, lines.count * pieces, x, places_before, *memory.half(turn), pieces, lines.size, inner, kept,
                      stride, run, flip, int(turn > 0), wide=lines.wide, alignment=alignment)


def looks_far(elements: int, size: int) -> bool:
    """Whether merging or searching lines of `size`, of so many `elements`, needs indices in int64 where elements alone would
    not: the distance to look at is doubled, which leads up to two lines beyond the last one."""
    return elements + 2 * size >= WIDE


def sort_long(lines: Lines, memory: Halves) -> tuple[list[CudaLaunch], int]:
    """The launches that sort lines of any length, and the half in which the result lies."""
    lines = replace(lines, wide=lines.wide or looks_far(lines.count * lines.size, lines.size))
    launches, width = [sort_pieces(lines, memory, SPAN, lines.size)], SPAN
    elements, source = lines.count * lines.size, lines.text(sort.merge_pieces)
    while width < lines.size:
        turn = len(launches)
        launches.append(gpu_launch(source, blocks_for(elements), *memory.half(turn - 1), *memory.half(turn), elements,
                                   lines.size, width, wide=lines.wide, alignment=lines.key_bytes))
        width *= 2
    return launches, len(launches) - 1


def kept_of(size: int, kept: int) -> int:
    """How many elements are left of a line when `kept` of every piece are."""
    return size // SPAN * kept + min(size % SPAN, kept)


def keep_first(lines: Lines, memory: Halves, kept: int) -> tuple[list[CudaLaunch], int, int]:
    """The launches that leave the first `kept` of each line, the half in which they lie, and the stride of lines there."""
    left = kept_of(lines.size, kept)
    launches = [sort_pieces(lines, memory, kept, left)]
    while left > kept:
        size, left = left, kept_of(left, kept)
        launches.append(sort_pieces(replace(lines, size=size), memory, kept, left, len(launches)))
    return launches, len(launches) - 1, left


def lower_order(call: Call, kept: int) -> CudaLowered | None:
    """The first `kept` elements of every line in order."""
    x = call.inputs[0]
    outer, size, inner = split(x.shape, call.attrs["axis"])
    if not x.size or not kept:
        return CudaLowered(())
    if size > MOST_PLACES:
        return None
    lines = Lines(call.input(0), x.dtype, outer * inner, size, inner, -int(call.attrs["descending"]), is_wide(call))
    if size <= SPAN:
        return CudaLowered((sort_short(lines, call.output(0), call.output(1), kept),))
    if x.dtype is bool_:
        return part(call, lines, kept)
    memory = halves(call)
    if kept <= SPAN // 2:
        launches, half, stride = keep_first(lines, memory, kept)
        room = kept_of(size, kept)
    else:
        launches, half = sort_long(lines, memory)
        stride = room = size
    elements = lines.count * kept
    launches.append(gpu_launch(lines.text(sort.write_sorted), blocks_for(elements), lines.x, memory.half(half)[1],
                               call.output(0), call.output(1), elements, size, inner, kept, stride, wide=lines.wide,
                               alignment=lines.dtype.itemsize))
    return CudaLowered(tuple(launches), scratch_for(lines, room))


def part(call: Call, lines: Lines, kept: int) -> CudaLowered:
    """Long lines of bools: where each one goes, by how many are True in front of it."""
    elements, outer = lines.count * lines.size, lines.count // lines.inner
    scan, counts = Scan(call, False, scratch=[4 * elements]), call.scratch(0)
    scan.lower(lines.x, counts, (bool_, int32), outer, lines.size, lines.inner)
    write = gpu_launch(kernel_text(sort.write_parted, lines.wide), blocks_for(elements), lines.x, counts, call.output(0),
                       call.output(1), elements, lines.size, lines.inner, kept, lines.flip, wide=lines.wide, alignment=8)
    return CudaLowered((*scan.launches, write), tuple(scan.scratch))


@lowers_on_gpu("sort")
def lower_sort(call: Call, aligned: bool) -> CudaLowered | None:
    """Always stable: what `stable=False` promises is less."""
    return lower_order(call, call.inputs[0].shape[call.attrs["axis"]])


@lowers_on_gpu("topk")
def lower_topk(call: Call, aligned: bool) -> CudaLowered | None:
    return lower_order(call, call.attrs["k"])
