"""Elementwise ops in front of a product, computed where a factor is packed: no copy of it is in memory but its panels.

The generated kernel computes a piece of a panel after the other into memory on the stack, then has the compiled packing
phase put it in order (`tile.pack_block`); `codegen.epilogue` has what follows a product. What goes in is a factor as a value
of the region's body, what comes out the launch that makes its panels.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgrad import dtypes
from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.epilogue import locate, restrict
from jitgrad.codegen.kernel import Buffer, Function, Launch, Operand
from jitgrad.codegen.region import Place, Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name
from jitgrad.ir.graph import Graph, Value
from jitgrad.kernels.cpu import gemm
from jitgrad.kernels.cpu.gemm import Form, Packing

STEPS = 64
"""Steps of the depth of a piece: with the rows of a panel, it stays in the first cache."""

LINE = 64                                       # bytes of a cache line, or of half of one

PIECE = Buffer(-1)
"""The memory on the stack, as an operand."""


@dataclass(frozen=True, slots=True)
class Made:
    """A factor that is computed where it is packed: the body's value, and what it reads through movement ops, the result
    of the last elementwise one. `of_b`: the second factor."""

    value: Value
    source: Value
    of_b: bool

    def loops(self, region: Region) -> tuple[Place, Place]:
        """The atoms of rows (of B: columns) and of the depth. A batch of A counts as rows; of B there is one matrix."""
        index = region.outputs[0][1]
        rows, steps = (index[-1:], index[-2:-1]) if self.of_b else (index[:-1], index[-1:])
        return region.axes.flat(rows), region.axes.flat(steps)


def pack_made(body: Graph, made: Made, form: Form, packing: Packing, panels: Buffer) -> Launch:
    """The launch that packs `made`, of the type that `form` multiplies, as `packing` says. Items are panels; where what is
    read lies along their rows, a few of them, so that it is read in longer runs."""
    region = analyse(restrict(body, [made.value]), [])
    return _Packing(region, made, form, packing, panels).launch()


class _Packing:
    """One kernel in the making. Its loops run along `rows` and `steps` of the factor."""

    def __init__(self, region: Region, made: Made, form: Form, packing: Packing, panels: Buffer):
        self.region, self.made, self.form, self.panels = region, made, form, panels
        self.rows, self.steps = made.loops(region)
        count, depth, _, _, panel_rows, width, number = packing.integers[:7]
        self.dtype, self.writer = dtypes.BY_SHORT[form.left], region.writer()
        self.target = self.writer.operand(panels, self.dtype, "panels")
        self.largest = self.largest_operand()
        self.along_rows = self.largest[1][-1:] in [(atom,) for atom in self.rows]
        beside = gemm.beside(number) if self.along_rows and form.group == 1 else 1
        self.items = -(-number // beside)
        for name, size in (("rows", count), ("depth", depth), ("panel_rows", panel_rows), ("width", width),
                           ("panels", number), ("panel_size", packing.elements // number), ("beside", beside)):
            self.writer.size(name, size)

    def largest_operand(self) -> tuple[Value, Place]:
        """Which operand is read most, and the atoms that it lies along."""
        region = self.region
        places = [(v, region.axes.flat(index)) for v in region.body.inputs for index in region.demands.of.get(v, [])]
        return max(places, key=lambda found: region.axes.size(found[1]))

    def launch(self) -> Launch:
        more = self.in_rows() if self.along_rows and self.form.group == 1 else self.in_pieces()
        kernel, arguments = self.writer.kernel(f"pack_{kernel_name(self.region.body).removeprefix('fused_')}")
        return Launch(kernel.name, emit(kernel), self.items, (*arguments, *more))

    def store(self, buffer: Buffer, place: str) -> None:
        """Store the factor's element at the open loops."""
        value, index, _ = self.region.outputs[0]
        self.writer.store_at(buffer, value.type, place, self.writer.evaluate(value, index))
        self.writer.flush()

    def open(self, loop: str, first: str, last: str, atoms: Place) -> None:
        self.writer.open(loop, first, last)
        locate(self.writer, self.region, loop, atoms)

    def in_rows(self) -> tuple[Function, ...]:
        """Straight into panels that lie side by side, step after step."""
        writer = self.writer
        writer.open("item", "begin", "end")
        writer.open("step", "0", "depth")
        self.fetch()
        locate(writer, self.region, "step", self.steps)
        writer.open("panel", "item * beside", "min(item * beside + beside, panels)")
        writer.let("top", "panel * panel_rows")
        self.open("row", "top", "min(top + panel_rows, rows)", self.rows)
        self.store(self.panels, "panel * panel_size + step * width + row - top")
        return ()

    def fetch(self) -> None:
        """What will be read some steps later, each of which may be a page of its own."""
        writer, (value, _) = self.writer, self.largest
        if any(len(collapse(atoms, accesses(self.region))) != 1 for atoms in (self.rows, self.steps)):
            return
        writer.let("soon", f"step + {gemm.FETCHED}")
        writer.know(writer.axis(self.steps, "soon"))
        size = LINE // value.dtype.itemsize
        writer.open("line", "0", f"(beside * panel_rows + {size - 1}) // {size}")
        writer.let("spot", f"item * beside * panel_rows + line * {size}")
        writer.know(writer.axis(self.rows, "spot"))
        name = writer.operand(self.region.buffers[value], value.dtype, str(value.type))
        place = writer.offset(name, value.type, self.region.demands.of[value][0])
        writer.let("_", f"prefetch({name}, {place})")
        writer.close()

    def in_pieces(self) -> tuple[Function, ...]:
        """Piece by piece of a panel; the packing phase puts each in order."""
        writer = self.writer
        writer.tables[PIECE] = Operand("piece", self.dtype)
        pitch = writer.size("pitch", STEPS + self.form.tile.lanes)                  # apart from powers of two
        writer.let("piece", f"make_panel({self.target})")
        writer.open("panel", "begin", "end")
        writer.let("first_row", "panel * panel_rows")
        writer.let("last_row", "min(first_row + panel_rows, rows)")
        writer.open("part", "0", f"(depth + {STEPS - 1}) // {STEPS}")
        writer.let("first_step", f"part * {STEPS}")
        writer.let("last_step", f"min(first_step + {STEPS}, depth)")
        loops = [("row", self.rows), ("step", self.steps)]
        for loop, atoms in reversed(loops) if self.along_rows else loops:
            self.open(loop, f"first_{loop}", f"last_{loop}", atoms)
        place = ("row - first_row + (step - first_step) * panel_rows" if self.along_rows
                 else f"(row - first_row) * {pitch} + step - first_step")
        self.store(PIECE, place)
        writer.close(2)
        strides = "1, panel_rows" if self.along_rows else f"{pitch}, 1"
        function = 1 + len(writer.operands) + len(writer.sizes)
        writer.let("_", f"pack_block(args, {function}, last_row - first_row, last_step - first_step, piece, 0, {strides}, "
                        f"{self.target}, panel * panel_size + first_step * width, width)")
        source = gemm.pack_text(self.form, "rows" if self.along_rows else "depth", self.made.of_b)
        return (Function(source[4:source.index("(")], source),)
