"""Elementwise ops in front of a product, computed where a factor is packed: no copy of it is in memory but its panels.

What goes in is a factor as a value of the region's body. What comes out is the launch that makes its panels; for a second
factor of which every panel serves one item alone, a kernel around the product's core, which makes each panel on the stack.
Both compute a piece of a panel after the other, then have the compiled packing phase put it in order (`tile.pack_block`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jitgrad import dtypes
from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.epilogue import locate, restrict
from jitgrad.codegen.kernel import Argument, Buffer, Function, Launch, Operand
from jitgrad.codegen.region import Place, Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Graph, Value
from jitgrad.kernels.cpu import gemm, gemm_pack
from jitgrad.kernels.cpu.gemm import Form, Packing

STEPS = 64
"""Steps of the depth of a piece: with the rows of a panel, it stays in the first cache."""

LINE = 64                                       # bytes of a cache line, or of half of one

NOWHERE = Buffer(-1)
"""Where a factor lies that is not computed yet."""


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
    kernel = _Kernel(body, made, form)
    count, depth, _, _, panel_rows, width, number = packing.integers[:7]
    along = kernel.along_rows and form.group == 1 and form.left == form.right
    beside = gemm.beside(number) if along else 1
    target = kernel.writer.operand(panels, kernel.dtype, "panels")
    kernel.take_sizes(rows=count, depth=depth, panel_rows=panel_rows, width=width, panels=number,
                      panel_size=packing.elements // number, beside=beside)
    functions = kernel.pack_beside(panels) if along else kernel.pack_each(target)
    name, source, arguments = kernel.finish("pack")
    return Launch(name, source, -(-number // beside), (*arguments, *functions))


def multiply_made(body: Graph, made: Made, form: Form, a: Buffer, c: Buffer, integers: Mapping[str, int]
                  ) -> tuple[str, str, tuple[Argument, ...]]:
    """The name, text and arguments of the kernel that multiplies `a` by `made`, with the items and `integers` of the core
    (`gemm.ARGUMENTS`)."""
    kernel = _Kernel(body, made, form)
    kernel.writer.operand(a, kernel.dtype, "left factor")
    kernel.writer.operand(c, dtypes.BY_SHORT[form.total], "product")
    kernel.take_sizes(**{name: integers[name] for name in (
        "m", "n", "k", "a_panel", "a_row", "a_step", "a_first", "rows_per_item", "row_blocks", "columns_per_item",
        "column_blocks", "depth_block")}, high=integers["panel_rows"], width=form.tile.columns)
    functions = kernel.multiply()
    name, source, arguments = kernel.finish("multiply")
    return name, source, (*arguments, *functions)


class _Kernel:
    """One kernel in the making. Its loops run along `rows` and `steps` of the factor."""

    def __init__(self, body: Graph, made: Made, form: Form):
        self.region = analyse(restrict(body, [made.value]), [])
        self.made, self.form, self.dtype = made, form, dtypes.BY_SHORT[form.left]       # in panels
        self.rows, self.steps = made.loops(self.region)
        self.writer = self.region.writer()
        self.largest = self.largest_operand()
        self.along_rows = self.largest[1][-1:] in [(atom,) for atom in self.rows]

    def largest_operand(self) -> tuple[Value, Place]:
        """Which operand is read most, and the atoms that it lies along."""
        region = self.region
        places = [(v, region.axes.flat(index)) for v in region.body.inputs for index in region.demands.of.get(v, [])]
        return max(places, key=lambda found: region.axes.size(found[1]))

    def take_sizes(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self.writer.size(name, size)

    def finish(self, kind: str) -> tuple[str, str, tuple[Buffer | int, ...]]:
        """Name, text and arguments."""
        kernel, arguments = self.writer.kernel(f"{kind}_{kernel_name(self.region.body).removeprefix('fused_')}")
        return kernel.name, emit(kernel), arguments

    # ---- memory on the stack

    def make_panel(self, name: str, dtype: DType) -> Buffer:
        """Memory on the stack, as an operand."""
        buffer = Buffer(-1 - len(self.writer.tables))
        self.writer.tables[buffer] = Operand(name, dtype)
        self.writer.let(name, f"make_panel(pointer(args, 1, {dtype.short}))")
        return buffer

    # ---- loops

    def open(self, loop: str, first: str, last: str, atoms: Place) -> None:
        self.writer.open(loop, first, last)
        locate(self.writer, self.region, loop, atoms)

    def store(self, buffer: Buffer, place: str) -> None:
        """Store the factor's element at the open loops."""
        value, index, _ = self.region.outputs[0]
        self.writer.store_at(buffer, value.type, place, self.writer.evaluate(value, index))
        self.writer.flush()

    def pack_beside(self, panels: Buffer) -> tuple[Function, ...]:
        """Straight into panels that lie side by side, step after step."""
        writer = self.writer
        writer.open("item", "begin", "end")
        writer.open("step", "0", "depth")
        self.fetch()
        locate(writer, self.region, "step", self.steps)
        writer.open("panel", "item * beside", "min(item * beside + beside, panels)")
        writer.let("top", "panel * panel_rows")
        self.open("row", "top", "min(top + panel_rows, rows)", self.rows)
        self.store(panels, "panel * panel_size + step * width + row - top")
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

    def pack_each(self, target: str) -> tuple[Function, ...]:
        """One panel after the other, each in pieces."""
        writer, piece = self.writer, self.make_panel("piece", self.made.value.dtype)
        writer.open("panel", "begin", "end")
        writer.let("top", "panel * panel_rows")
        writer.let("bottom", "min(top + panel_rows, rows)")
        writer.let("first_step", "0")
        writer.let("last_step", "depth")
        return self.pack_pieces(piece, target, "panel * panel_size")

    def pack_pieces(self, piece: Buffer, target: str, place: str) -> tuple[Function, ...]:
        """Rows `top` … `bottom` at steps `first_step` … `last_step`, as a panel at `place` of `target`."""
        writer, pitch = self.writer, STEPS + self.form.tile.lanes                   # apart from powers of two
        writer.open("part", "0", f"(last_step - first_step + {STEPS - 1}) // {STEPS}")
        writer.let("done", f"part * {STEPS}")
        writer.let("first", "first_step + done")
        writer.let("last", f"min(first + {STEPS}, last_step)")
        loops = [("row", "top", "bottom", self.rows), ("step", "first", "last", self.steps)]
        for loop in reversed(loops) if self.along_rows else loops:
            self.open(*loop)
        self.store(piece, "row - top + (step - first) * width" if self.along_rows else
                   f"(row - top) * {pitch} + step - first")
        writer.close(2)
        strides = "1, width" if self.along_rows else f"{pitch}, 1"
        writer.let("_", f"pack_block(args, {self.number_of_function}, bottom - top, last - first, piece, 0, {strides}, "
                        f"{target}, {place} + done * width, width)")
        source = gemm_pack.pack_text(self.form, "rows" if self.along_rows else "depth", self.made.of_b)
        writer.close()
        return (Function(source[4:source.index("(")], source),)

    @property
    def number_of_function(self) -> int:
        """Which argument the first function is, once all else is known."""
        return 1 + len(self.writer.operands) + len(self.writer.sizes)

    def multiply(self) -> tuple[Function, ...]:
        """The items of the core, each panel made before it is multiplied."""
        writer, form, (a, c) = self.writer, self.form, [operand.name for operand in self.writer.operands.values()]
        piece, _ = self.make_panel("piece", self.made.value.dtype), self.make_panel("lines", self.dtype)
        writer.open("item", "begin", "end")
        for name, value in gemm.LOCATE_ITEM:
            writer.let(name, value)
        writer.open("block", "0", "(max(k, 1) + depth_block - 1) // depth_block")
        writer.let("first_step", "block * depth_block")
        writer.let("last_step", "min(first_step + depth_block, k)")
        writer.open("panel", "first_column // width", "(last_column + width - 1) // width")
        writer.let("top", "panel * width")
        writer.let("bottom", "min(top + width, last_column)")
        functions = self.pack_pieces(piece, "lines", "0")
        writer.let("_", f"multiply_block(args, {self.number_of_function + 1}, last_row - first_row, bottom - top, "
                        f"last_step - first_step, depth_block, high, {a}, "
                        f"a_first + first_row // high * a_panel + first_step // {form.group} * a_step, "
                        f"a_panel, a_row, a_step, lines, 0, 0, width, {c}, first_row * n + top, n, min(block, 1))")
        core = gemm.core_of_panels(form)
        return (*functions, Function(core.name, gemm.core_source(core)))
