"""The loops of `cuda_warpgroup` with slices that the processor's copy engine fetches: one thread asks for boxes of the
factors, as long as these are matrices without a batch, and all wait for what has arrived.

Threads compute no address of global memory, and no instruction but the request is theirs. The swizzle is that of the
engine. What a box has beyond the last row, column or step arrives as zeros. Since nobody has to copy, there are three slices
on the way or there beside the one that is being multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitgrad.codegen.cuda_gemm import Side, Tile
from jitgrad.codegen.cuda_warpgroup import BLOCK, ROW, STAGES, Warpgroups
from jitgrad.codegen.kernel import BoxMap, Buffer, Operand, When
from jitgrad.codegen.writer import Writer
from jitgrad.dtypes import int16
from jitgrad.kernels.cpu.gemm import Matrices

ACROSS = 64
"""Elements of a line of a box: as many as the swizzle goes over."""


def map_of(buffer: Buffer, matrices: Matrices, sizes: tuple[int, int], along_depth: bool, outer: int) -> BoxMap | None:
    """The map of a factor, whose `sizes` are the outer dimension and the depth, for slices of `outer` rows or columns. None
    where the engine cannot fetch it: it wants a batch of one, elements, and lines that do not overlap."""
    line, lines = (sizes[1], sizes[0]) if along_depth else sizes
    pitch = 2 * (matrices.row if along_depth else matrices.column) if lines > 1 else -(-line // 8) * 16
    if matrices.batch or not line or not lines or pitch < 2 * line:
        return None
    return BoxMap(buffer, 2 * matrices.first, (line, lines), pitch, (ACROSS, outer if along_depth else ACROSS))


class Boxed(Warpgroups):
    """`maps` are those of A and of B."""

    def __init__(self, writer: Writer, tile: Tile, a: Side, b: Side, maps: Sequence[BoxMap]):
        super().__init__(writer, tile, a, b)
        self.maps = {Operand(f"{name}_map", int16, is_map=True): given for name, given in zip("ab", maps, strict=True)}

    @property
    def dynamic_bytes(self) -> int:
        """Behind the slices, which the arrivals of each stage follow; or for what comes after the product."""
        return max(STAGES * self.stage_bytes + 8 * STAGES, super().dynamic_bytes)

    def prepare(self) -> None:
        writer = self.writer
        writer.let("arrivals", f"memory + {STAGES * self.stage_bytes}")
        writer.enter(When("thread() == 0"))
        for stage in range(STAGES):
            self.call(f"arrival_begin(arrivals + {8 * stage})")
        self.call("show_to_products()")
        writer.close()
        self.call("barrier()")
        for early in range(STAGES - 1):
            self.fetch(str(early))

    def step(self) -> None:
        """The stage of the slice before is free when all threads have waited for its products."""
        self.call(f"arrival_wait(arrivals + slice % {STAGES} * 8, slice // {STAGES} % 2)")
        self.multiply()
        self.call("products_wait(1)")
        self.call("barrier()")
        self.fetch(f"slice + {STAGES - 1}")

    def fetch(self, number: str) -> None:
        """Ask for slice `number`, if there is one."""
        writer = self.writer
        writer.let("next_", number)
        writer.enter(When("thread() == 0 and next_ < slices"))
        writer.let("arrival", f"arrivals + next_ % {STAGES} * 8")
        writer.let("onto", f"memory + next_ % {STAGES} * {self.stage_bytes}")
        writer.let("ahead", f"next_ * {self.tile.depth}")
        self.call(f"arrival_expect(arrival, {self.stage_bytes})")
        for side in self.sides:
            self.fetch_side(side)
        writer.close()

    def fetch_side(self, side: Side) -> None:
        """One box along the depth; across it one for every 64 rows or columns."""
        start = self.tile.size * ROW if side.name == "b" else 0
        for block in range(1 if side.along_depth else self.outer_size(side) // ACROSS):
            place = f"ahead, {side.first}" if side.along_depth else f"{side.first} + {ACROSS * block}, ahead"
            self.call(f"fetch_box(onto + {start + BLOCK * block}, {side.name}_map, arrival, {place})")


def product_by_warpgroups(writer: Writer, tile: Tile, sides: Sequence[Side],
                          factors: Sequence[tuple[Buffer, Matrices, tuple[int, int]]]) -> Warpgroups:
    """The product whose factors the copy engine fetches, where it can fetch both, else threads copy them. `factors`: where
    those of `sides` are, and their sizes, the outer dimension and the depth."""
    a, b = sides
    maps = [map_of(*factor, side.along_depth, outer)
            for factor, side, outer in zip(factors, sides, (tile.size, tile.columns), strict=True)]
    found = [given for given in maps if given is not None]
    return Boxed(writer, tile, a, b, found) if len(found) == len(maps) else Warpgroups(writer, tile, a, b)
