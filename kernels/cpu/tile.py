"""The vector pieces of contractions, as plain Python on pointers: what a GEMM or convolution kernel is built from.

A tile of C (at most `rows` x `columns` elements, see `Tile`) is held in registers while a loop over the depth adds
outer products to it; packing transposes blocks of one vector width. In here each piece is a loop that says what it
means; `kernels.cpu.tile_native` teaches Numba the same functions as LLVM vector code. Offsets and strides are counted
in elements. Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), has the scheme.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad import config
from jitgrad.kernels.cpu import tile_transform

Pointer = Any                                   # a typed pointer of kernel text

HIGH = 8                                        # rows of a tile from which it pays to look at how A lies in memory
DEPTH_BLOCK = 384
"""Steps of the depth that are multiplied at once: what is reused out of the nearest caches."""
WIDEST = 4                                      # columns of a window that `spread_rows` knows
PANEL_BYTES = 64 * 1024
"""Room for a panel of B of that depth, two vectors wide, at the widest; or for 128 rows of 128 elements."""
MOST_ARGUMENTS = 96
"""Of a kernel that another one calls on memory of its own."""
BLOCK_OF_B = 1 << 16
"""Elements of the panels of B that stay in the second cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The register tile for one element type: `rows` x `columns` accumulators in vectors of `lanes` elements. `embeds`:
    an instruction can multiply with an element in memory, as those of AVX-512 can. `edge`: how the micro-kernels of fewer
    columns do without those that there are not (`tile_text.MicroKernel.edge`)."""

    rows: int
    vectors: int
    lanes: int
    embeds: bool = False
    edge: str = "masked"

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes

    @property
    def forms(self) -> list[tuple[int, str, tuple[int, ...]]]:
        """(vectors, edge, heights) of the micro-kernels: for each width below the full one in vectors, for one that
        ends inside of the last vector, and for the full one. A tile of another height is several, one below the other:
        eight accumulators are enough to keep the processor's multipliers busy."""
        low = tuple([n for n in (8, 4, 2, 1) if n < self.rows])
        return [*[(v, self.edge, low) for v in range(1, self.vectors + 1)], (self.vectors, "", (self.rows, *low))]

    @property
    def layouts(self) -> tuple[str, ...]:
        """Which of `tile_text.MicroKernel.adjacent` there are for tiles of `HIGH` rows and more."""
        return ("rows", "steps") if self.embeds else ("",)

    @property
    def packed_rows(self) -> int:
        """Rows of a packed panel of A: whole vectors, so that a transposed block is stored without a mask."""
        return -(-self.rows // self.lanes) * self.lanes


@functools.cache
def tile_for(itemsize: int) -> Tile:
    """The tile of this machine for elements of 4 or 8 bytes: two vectors wide, and as high as the registers allow
    beside two vectors of B and what a broadcast needs. Where every element of A passes through a register, several are on
    their way at a time: a quarter of the registers is left for them and for B."""
    bits, registers = vector_unit()
    embeds = bits == 512
    rows = (registers - (4 if embeds else registers // 4)) // 2
    edge = "masked" if config.processor().masks else "clamped"
    return Tile(rows, 2, bits // 8 // itemsize, embeds=embeds, edge=edge)


def low_tile_for(itemsize: int) -> Tile:
    """The tile for one or two rows, twice as wide: sums of fewer vectors would wait for each other."""
    usual = tile_for(itemsize)
    return Tile(2, 2 * usual.vectors, usual.lanes, edge=usual.edge)


def vector_unit() -> tuple[int, int]:
    """(vector width in bits, number of vector registers) of the processor that kernels are generated for."""
    return config.processor().vectors


# --- plain meanings -------------------------------------------------------------------------------------------------


def multiply_tile(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                  b: Pointer, b_offset: int, b_step: int, c: Pointer, c_offset: int, c_row: int,
                  accumulate: int) -> None:
    """C[i, j] = (C[i, j] if accumulate else 0) + sum over d of A[i, d] * B[d, j] for i < rows, j < columns.

    A[i, d] is ``a[a_offset + i * a_row + d * a_step]``, B[d, j] ``b[b_offset + d * b_step + j]`` and C[i, j]
    ``c[c_offset + i * c_row + j]``; C is disjoint from A and B. Sums are taken in the order of d, and added to C at the
    end: sums of blocks of the depth lose less than one long sum."""
    for i in range(rows):
        for j in range(columns):
            old = c[c_offset + i * c_row + j]
            total = type(old)(0)
            for d in range(depth):
                total += a[a_offset + i * a_row + d * a_step] * b[b_offset + d * b_step + j]
            c[c_offset + i * c_row + j] = old + total if accumulate else total


def multiply_placed(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                    b: Pointer, b_offset: int, places: Pointer, first_place: int, c: Pointer, c_offset: int, c_row: int,
                    accumulate: int) -> None:
    """`multiply_tile` for a B whose rows are anywhere: B[d, j] is ``b[b_offset + places[first_place + d] + j]``. M. Dukhan,
    "The Indirect Convolution Algorithm" (2019), has such a table."""
    for i in range(rows):
        for j in range(columns):
            old = c[c_offset + i * c_row + j]
            total = type(old)(0)
            for d in range(depth):
                total += a[a_offset + i * a_row + d * a_step] * b[b_offset + places[first_place + d] + j]
            c[c_offset + i * c_row + j] = old + total if accumulate else total


def multiply_ahead(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                   b: Pointer, b_offset: int, b_step: int, c: Pointer, c_offset: int, c_row: int, accumulate: int,
                   x: Pointer, x_offset: int, x_step: int, y: Pointer, y_offset: int, y_step: int) -> None:
    """`multiply_tile` that meanwhile fetches what will be needed soon into the second cache, where the processor's tile
    `embeds`: the elements of x at `x_offset`, `x_offset` + `x_step`, … and of y likewise, one of each in as many steps of
    the depth as `tile_text.UNROLLED`. They may lie outside of their memory."""
    multiply_tile(rows, columns, depth, a, a_offset, a_row, a_step, b, b_offset, b_step, c, c_offset, c_row, accumulate)


def multiply_low(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                 b: Pointer, b_offset: int, b_step: int, c: Pointer, c_offset: int, c_row: int, accumulate: int,
                 x: Pointer, x_offset: int, x_step: int, y: Pointer, y_offset: int, y_step: int) -> None:
    """`multiply_tile` of up to as many columns as `low_tile_for` has, for few rows. It may stand where `multiply_ahead`
    does, and fetches nothing."""
    multiply_tile(rows, columns, depth, a, a_offset, a_row, a_step, b, b_offset, b_step, c, c_offset, c_row, accumulate)


def transpose_tile(rows: int, x: Pointer, x_offset: int, x_row: int, o: Pointer, o_offset: int, o_row: int,
                   lanes: int) -> None:
    """o[o_offset + j * o_row + i] = x[x_offset + min(i, rows - 1) * x_row + j] for i, j < lanes, in the order of j: where
    the rows of o overlap, the later one stays."""
    for j in range(lanes):
        for i in range(lanes):
            o[o_offset + j * o_row + i] = x[x_offset + min(i, rows - 1) * x_row + j]


def transpose_block(rows: int, columns: int, x: Pointer, x_offset: int, x_row: int, o: Pointer, o_offset: int,
                    o_row: int) -> None:
    """o[o_offset + j * o_row + i] = x[x_offset + i * x_row + j] for i < rows, j < columns."""
    for i in range(rows):
        for j in range(columns):
            o[o_offset + j * o_row + i] = x[x_offset + i * x_row + j]


def gather_run(count: int, low: int, high: int, x: Pointer, x_offset: int, x_step: int, o: Pointer,
               o_offset: int) -> None:
    """o[o_offset + r] = x[x_offset + (r - low) * x_step] if low <= r < high else 0, for r < count. `count`, `low` and
    `high` are below 2**30."""
    for r in range(count):
        inside = low <= r < high
        o[o_offset + r] = x[x_offset + (r - low) * x_step] if inside else o.memory.dtype.type(0)


def gather_rows(rows: int, top: int, bottom: int, count: int, low: int, high: int, x: Pointer, x_offset: int, x_row: int,
                x_step: int, o: Pointer, o_offset: int, o_row: int) -> None:
    """`gather_run` of several rows: to ``o[o_offset + y * o_row + r]`` for y < rows, from ``x[x_offset + (y - top) * x_row +
    (r - low) * x_step]`` where top <= y < bottom, else zeros. Neither `top` nor `bottom` is negative."""
    for y in range(rows):
        inside = top <= y < bottom
        gather_run(count, low, high if inside else low, x, x_offset + (y - top) * x_row, x_step, o, o_offset + y * o_row)


def largest_rows(rows: int, count: int, down: int, across: int, deep: int, deep_step: int, tall: int, tall_step: int,
                 wide: int, wide_step: int, low: int, high: int, x: Pointer, x_offset: int, x_end: int, first_tap: int,
                 deep_taps: int, o: Pointer, o_offset: int, o_end: int, taps: Pointer, taps_offset: int) -> None:
    """The maxima of `rows` times `count` windows to ``o[o_offset + y * count + r]``, and at which of their taps these are to
    ``taps[taps_offset + y * count + r]``, numbered ``first_tap + i * deep_taps + j * wide + k``.

    Window r of row y has the elements ``x[x_offset + y * down + r * across + i * deep_step + j * tall_step +
    k * wide_step]`` for i < deep, j < tall, k < wide, of those with low <= r * across + k * wide_step < high: of equal ones
    the first is taken, and of NaNs the last. The maximum of none is -inf. `high` is below 2**31. Whole vectors cost less
    than masked ones: all elements of x before `x_end` may be read, and anything be written behind the maxima up to
    ``o[o_end - 1]``, and behind their taps."""
    for y, r in itertools.product(range(rows), range(count)):
        best, at = o.memory.dtype.type(-np.inf), first_tap + sum(r * across + k * wide_step < low for k in range(wide))
        for i, j, k in itertools.product(range(deep), range(tall), range(wide)):
            column = r * across + k * wide_step
            place = x_offset + y * down + column + i * deep_step + j * tall_step
            if low <= column < high and (x[place] > best or x[place] != x[place]):
                best, at = x[place], first_tap + i * deep_taps + j * wide + k
        o[o_offset + y * count + r] = best
        taps[taps_offset + y * count + r] = at


def largest_grad_row(z: int, y: int, layers: int, rows: int, count: int, deep: int, tall: int, wide: int, onward: int,
                     down: int, across: int, behind: int, apart: int, beside: int, left: int, width: int, g: Pointer,
                     g_offset: int, taps: Pointer, taps_offset: int, o: Pointer, o_offset: int, o_end: int) -> None:
    """``o[o_offset + p]``, for p < width, becomes the sum of ``g[g_offset + n]``, n being ``(layer * rows + row) * count +
    r``, of those of `layers` times `rows` times `count` windows whose maximum is there: it is tap (i, j, k), their number is
    ``taps[taps_offset + n]``, and layer * onward + i * behind == z, row * down + j * apart == y, and
    r * across + k * beside == p + left. `across` is 1 or 2, `width` below 2**31. Anything may be written behind the row up
    to ``o[o_end - 1]``."""
    for p in range(width):
        total = o.memory.dtype.type(0)
        for i, j, k in itertools.product(*[reversed(range(n)) for n in (deep, tall, wide)]):
            (layer, a), (row, b), (r, c) = (divmod(z - i * behind, onward), divmod(y - j * apart, down),
                                            divmod(p + left - k * beside, across))
            n = (layer * rows + row) * count + r
            if (a == b == c == 0 and 0 <= layer < layers and 0 <= row < rows and 0 <= r < count
                    and taps[taps_offset + n] == (i * tall + j) * wide + k):
                total += g[g_offset + n]
        o[o_offset + p] = total


def spread_rows(rows: int, height: int, width: int, count: int, tall: int, wide: int, g: Pointer, g_offset: int, g_end: int,
                taps: Pointer, taps_offset: int, first_tap: int, o: Pointer, o_offset: int, o_end: int) -> None:
    """What `rows` times `count` windows, `tall` times `wide`, that share nothing give to the rows that they lie in, of
    `width` columns, as far as there are these, `height`: ``o[o_offset + q * width + p]`` becomes ``g[g_offset + n]``, n
    being ``q // tall * count + p // wide``, where there is this window and its maximum, ``taps[taps_offset + n]``, is
    there: ``first_tap + q % tall * wide + p % wide``; else 0. `wide` is at most `WIDEST`, `width` below 2**31. All of g
    before `g_end` may be read, of taps as much, and anything be written behind the rows up to ``o[o_end - 1]``."""
    for q, p in itertools.product(range(min(rows * tall, height)), range(width)):
        n, number = q // tall * count + p // wide, first_tap + q % tall * wide + p % wide
        chosen = p // wide < count and taps[taps_offset + n] == number
        o[o_offset + q * width + p] = g[g_offset + n] if chosen else o.memory.dtype.type(0)


def weighted_rows(rows: int, count: int, down: int, across: int, deep: int, deep_step: int, tall: int, tall_step: int,
                  wide: int, wide_step: int, low: int, high: int, x: Pointer, x_offset: int, w: Pointer, w_offset: int,
                  w_deep: int, w_tall: int, w_wide: int, o: Pointer, o_offset: int, o_row: int) -> None:
    """The sums over `rows` times `count` windows, those of a row as `largest_rows` has them, of their elements times
    ``w[w_offset + i * w_deep + j * w_tall + k * w_wide]``, to ``o[o_offset + y * o_row + r]``. The windows of row y begin
    ``y * down`` elements behind those of row 0. There is at least one window; sums are taken in any order."""
    for y, r in itertools.product(range(rows), range(count)):
        total = o.memory.dtype.type(0)
        for i, j, k in itertools.product(range(deep), range(tall), range(wide)):
            column = r * across + k * wide_step
            if low <= column < high:
                total += (x[x_offset + y * down + column + i * deep_step + j * tall_step]
                          * w[w_offset + i * w_deep + j * w_tall + k * w_wide])
        o[o_offset + y * o_row + r] = total


def dot_rows(rows: int, count: int, down: int, across: int, wide: int, wide_step: int, low: int, high: int, x: Pointer,
             x_offset: int, g: Pointer, g_offset: int, g_row: int, o: Pointer, o_offset: int) -> None:
    """For each tap k < wide, add to ``o[o_offset + k]`` the sum over rows y < rows and windows r < count of
    x[x_offset + y * down + r * across + k * wide_step] * g[g_offset + y * g_row + r], of those with
    low <= r * across + k * wide_step < high, in any order. There is at least one window."""
    for k in range(wide):
        total = o.memory.dtype.type(0)
        for y, r in itertools.product(range(rows), range(count)):
            column = r * across + k * wide_step
            if low <= column < high:
                total += x[x_offset + y * down + column] * g[g_offset + y * g_row + r]
        o[o_offset + k] += total


def invoke(args: Any, place: int, begin: int, end: int, thread: int) -> None:
    """Run items begin … end of the kernel whose address is ``args[place]`` (in the plain form: the function itself);
    its own arguments are those that follow."""
    args[place](args.behind(place), begin, end, thread)


def invoke_on(args: Any, place: int, count: int, number: int, memory: Pointer, begin: int, end: int, thread: int) -> None:
    """`invoke`, with `memory` in the place of argument `number` of the `count` that the kernel has, `MOST_ARGUMENTS` at
    most."""
    values = list(args.behind(place).values[1:count + 1])
    values[number - 1] = memory
    args[place](type(args)(args.kernel, values), begin, end, thread)


def make_panel(like: Pointer) -> Pointer:
    """A buffer on the stack, of the element type of `like`, for one panel of B as deep as a block of the core."""
    elements = PANEL_BYTES // like.memory.dtype.itemsize
    return type(like)(np.zeros(elements, like.memory.dtype), "panel")


def make_panels(like: Pointer) -> Pointer:
    """A buffer on the stack, of the element type of `like`, for panels of B with `BLOCK_OF_B` elements."""
    return type(like)(np.zeros(BLOCK_OF_B, like.memory.dtype), "panels")


def multiply_block(args: Any, place: int, rows: int, columns: int, depth: int, depth_block: int, panel_rows: int,
                   a: Pointer, a_offset: int, a_panel: int, a_row: int, a_step: int, b: Pointer, b_offset: int,
                   b_panel: int, b_step: int, c: Pointer, c_offset: int, c_row: int, accumulate: int) -> None:
    """Run the GEMM core, whose address is ``args[place]``, for `rows` x `columns` elements of C, which are added to if
    `accumulate` is not 0. A lies in panels of `panel_rows` rows, B in panels as wide as the tile, whose rows are contiguous;
    `depth_block` steps of the depth are summed up at once. Kernels that call it compile faster than with tiles of their
    own, which are most of the core."""
    block = core_block(rows, columns, depth, depth_block, panel_rows, a_panel, a_row, a_step, b_panel, b_step, c_row,
                       accumulate, int(b_panel > 0))
    memory = [p.memory[p.base + offset:] for p, offset in ((a, a_offset), (b, b_offset), (c, c_offset))]
    args[place](type(args)(args.kernel, [*memory, *block]), 0, 1, 0)


def core_block(rows: Any, columns: Any, depth: Any, depth_block: Any, panel_rows: Any, a_panel: Any, a_row: Any,
               a_step: Any, b_panel: Any, b_step: Any, c_row: Any, accumulate: Any, several: Any) -> list[Any]:
    """The core's integers (`gemm.ARGUMENTS`) for one item that is all of C. `several`: 1 if B has panels one behind the
    other, of which the next is fetched while one is multiplied, and 0 if it has only one."""
    return [rows, columns, depth, panel_rows, a_panel, a_row, a_step, b_panel, b_step, 1, 0, several, c_row, 0,
            rows, 1, columns, 1, depth_block, accumulate, 1, 1, 1, *[0] * 10]


def pack_block(args: Any, place: int, rows: int, depth: int, x: Pointer, x_offset: int, x_row: int, x_step: int,
               o: Pointer, o_offset: int, width: int) -> None:
    """Run the packing phase of products, whose address is ``args[place]``, for one panel: `rows` rows of A, or columns of B,
    by `depth` steps, of which ``x[x_offset + i * x_row + d * x_step]`` has row i at step d."""
    block = packed_block(rows, depth, x_row, x_step, width)
    memory = [p.memory[p.base + offset:] for p, offset in ((x, x_offset), (o, o_offset))]
    args[place](type(args)(args.kernel, [*memory, *block]), 0, 1, 0)


def packed_block(rows: Any, depth: Any, x_row: Any, x_step: Any, width: Any) -> list[Any]:
    """The packing phase's integers (`gemm_pack.PACK_ARGUMENTS`) for one panel that is all there is."""
    return [rows, depth, x_row, x_step, rows, width, 1, 1, 1, 1, 1, *[0] * 5]


NAMES: dict[str, Callable[..., Any]] = {**tile_transform.NAMES, **{f.__name__: f for f in (
    multiply_tile, multiply_placed, multiply_ahead, multiply_low, transpose_tile, transpose_block, gather_run, gather_rows,
    largest_rows, largest_grad_row, spread_rows, weighted_rows, dot_rows, invoke, invoke_on, make_panel, make_panels,
    multiply_block, pack_block)}}
