"""The loops of a large matrix product of bfloat16 or float16 on sm_90a, where four warps multiply together: the counterpart
of `cuda_gemm` for tiles whose factors tensor cores read from shared memory themselves.

What goes in and what comes out is the same. A block has 256 threads, two warpgroups, each with 64 of 128 rows. A slice has
64 steps of the depth, and there is room for four of each factor: that of the products which may still be under way, that
of those which begin, two on the way. While the products of a slice are under way the threads begin to copy a later one, and
nobody waits for products but those of the slice before, so that tensor cores go from slice to slice without a pause. Slices
lie as `kernels.cuda.warpgroup` says, and products take them along the depth or across it: no factor is transposed on its
way.
"""

from __future__ import annotations

from jitgrad.codegen.cuda_gemm import Loops, Side, Tile
from jitgrad.codegen.cuda_templates import share_dynamic
from jitgrad.codegen.kernel import Let, Statement, Store, When
from jitgrad.codegen.writer import Writer
from jitgrad.dtypes import DType

ARCHITECTURES = ("sm_90a",)
"""Those that have these instructions. They are of this one generation alone."""

ROW = 128
"""Bytes of a row of a slice."""

BLOCK = 64 * ROW
"""Bytes of 64 rows or columns of a slice, whichever way it lies."""

STAGES = 4
"""Slices of each factor in shared memory."""

AHEAD = STAGES - 2
"""How many slices the copies are ahead of the products: one stage belongs to the slice before."""


def warpgroup_tile(dtype: DType, columns: int) -> Tile:
    """128 rows and `columns` columns, 128 or 256."""
    return Tile(dtype, 128, ROW // 2, 256, 128, 128, columns, parts=1)


class Warpgroups(Loops):
    """Both factors are `wide`."""

    def __init__(self, writer: Writer, tile: Tile, a: Side, b: Side):
        super().__init__(writer, tile, a, b)
        self.raw: dict[str, str] = {}

    def share(self) -> str:
        return share_dynamic(self.writer, self.tile.sum_dtype)

    @property
    def dynamic_bytes(self) -> int:
        """For the slices; what follows the product needs the memory of all rows."""
        tile = self.tile
        return max(STAGES * self.stage_bytes, 4 * tile.size * tile.pitch)

    @property
    def stage_bytes(self) -> int:
        return ROW * (self.tile.size + self.tile.columns)

    def outer_size(self, side: Side) -> int:
        return self.tile.extent(side.name)

    def write(self) -> None:
        writer, tile = self.writer, self.tile
        writer.let("memory", f"shared_address({self.memory})")
        writer.let("rows_at", f"memory + thread() // 128 * {BLOCK}")
        writer.let("columns_at", f"memory + {tile.size * ROW}")
        writer.emit(Let("sums", None, f"zero_sums({tile.columns // 2})"))
        writer.let("slices", f"(k + {tile.depth - 1}) // {tile.depth}")
        self.prepare()
        writer.open("slice", "0", "slices")
        self.step()
        writer.close()
        writer.emit(Let("sums", None, "finished_sums(sums)"))
        self.call("barrier()")

    def prepare(self) -> None:
        """Where this thread copies from and to; the first copies."""
        for side in self.sides:
            self.raw[side.name] = self.view(f"{side.name}_bits", side.pointer)
            self.locate_pieces(side)
        for early in range(AHEAD):
            self.copy(str(early))

    def step(self) -> None:
        """One slice. The stage of the one before the last is free behind the barrier."""
        self.call(f"copy_wait({AHEAD - 1})")
        self.call("show_to_products()")
        self.call("barrier()")
        self.multiply()
        self.copy(f"slice + {AHEAD}")
        self.call("products_wait(1)")

    # ---- slices on their way into shared memory

    def locate_pieces(self, side: Side) -> None:
        """Which pieces of 16 bytes of a slice this thread fetches: the first one, and others at equal distances, some lines
        apart. A line of threads is along memory: along the depth 64 steps, across it all rows of a slice."""
        writer, name, lanes = self.writer, side.name, self.tile.lanes
        across = (self.tile.depth if side.along_depth else self.outer_size(side)) // lanes
        line = writer.let(f"line_{name}", f"thread() // {across}")
        piece = writer.let(f"piece_{name}", f"thread() % {across}")
        outer, step = (line, f"{piece} * {lanes}") if side.along_depth else (f"{piece} * {lanes}", line)
        writer.let(f"outer_{name}", f"{side.first} + {outer}")
        writer.let(f"step_{name}", step)
        writer.let(f"place_{name}", f"{name}_start + outer_{name} * {name}_outer + step_{name} * {name}_step")
        writer.let(f"room_{name}", f"{side.limit} - outer_{name}")
        writer.let(f"spot_{name}", f"{piece} // 8 * {BLOCK} + {line} * {ROW} + (({piece} & 7) ^ ({line} & 7)) * 16")

    def copy(self, number: str) -> None:
        """Begin to copy slice `number`, if there is one; in any case it is a group of copies."""
        writer = self.writer
        writer.let("next_", number)
        writer.enter(When("next_ < slices"))
        writer.let("ahead", f"next_ * {self.tile.depth}")
        writer.let("into", f"next_ % {STAGES} * {self.stage_bytes}")
        for side in self.sides:
            self.copy_side(side)
        writer.close()
        self.call("copy_commit()")

    def copy_side(self, side: Side) -> None:
        """Pieces begin at multiples of 16 bytes; where the factor ends within one, zeros come behind it."""
        writer, name, lanes = self.writer, side.name, self.tile.lanes
        across = (self.tile.depth if side.along_depth else self.outer_size(side)) // lanes
        lines, apart = self.outer_size(side) if side.along_depth else self.tile.depth, self.tile.threads // across
        steps = f"k - ahead - step_{name}"
        within, beyond = (steps, f"room_{name}") if side.along_depth else (f"room_{name}", steps)
        writer.let("from_", f"place_{name} + ahead * {name}_step")
        writer.let("present", f"max(0, min({within}, {lanes})) * 2")
        writer.let("beyond", beyond)
        stride = f"{name}_outer" if side.along_depth else f"{name}_step"
        base = f"memory + into + spot_{name}" + (f" + {self.tile.size * ROW}" if name == "b" else "")
        writer.let("onto", base)
        for line in range(0, lines, apart):
            writer.let("there", f"present if beyond > {line} else 0")
            writer.let("source", f"from_ + {line} * {stride}")
            self.call(f"copy_async(onto + {line * ROW}, {self.raw[name]}, source, there)")

    # ---- the products

    def multiply(self) -> None:
        writer, (a, b) = self.writer, self.sides
        writer.let("out_of", f"slice % {STAGES} * {self.stage_bytes}")
        across = ", ".join("0" if side.along_depth else "1" for side in (a, b))
        writer.emit(Let("sums", None, f"multiply_slices_{self.tile.dtype.short}(sums, slice_at(rows_at + out_of), "
                                      f"slice_at(columns_at + out_of), {across})"))

    def place_part(self, part: int) -> list[Statement]:
        """A thread has two neighbours of every eight columns of a row, and of the row 8 below."""
        tile = self.tile
        names = [f"s{k}" for k in range(tile.columns // 2)]
        spot = f"(thread() // 32 * 16 + thread() % 32 // 4) * {tile.pitch} + thread() % 4 * 2"
        made: list[Statement] = [Let(", ".join(names), None, "sums"), Let("spot", None, spot)]
        for k in range(0, len(names), 2):
            made.append(Store(self.memory, f"spot + {k % 4 // 2 * 8 * tile.pitch + k // 4 * 8}",
                              f"{names[k]}, {names[k + 1]}", 2))
        return made
