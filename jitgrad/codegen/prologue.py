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
from jitgrad.codegen.kernel import Buffer, Function, Launch, Let, Operand
from jitgrad.codegen.region import Place, Region, analyse
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Writer
from jitgrad.ir.graph import Graph, Value
from jitgrad.kernels.cpu import gemm
from jitgrad.kernels.cpu.gemm import Form, Packing

STEPS = 64
"""Steps of the depth of a piece: with the rows of one panel, or of a few side by side, it stays in the first cache."""

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
    """The launch that packs `made`, of the type that `form` multiplies, as `packing` says. Items are panels, or a few of
    them where what is read lies along their rows: so it is read in longer runs."""
    region = analyse(restrict(body, [made.value]), [])
    rows, steps = made.loops(region)
    along_rows = _lies_along(region, rows)
    count, depth, _, _, panel_rows, width, number = packing.integers[:7]
    beside = min(gemm.BESIDE, number) if along_rows else 1
    writer, dtype = region.writer(), dtypes.BY_SHORT[form.left]
    target = writer.operand(panels, dtype, "panels")
    writer.tables[PIECE] = Operand("piece", dtype)
    for name, size in (("rows", count), ("depth", depth), ("panel_rows", panel_rows), ("width", width), ("panels", number),
                       ("panel_size", packing.elements // number), ("beside", beside),
                       ("piece_row", 1 if along_rows else STEPS + form.tile.lanes),     # apart from powers of two
                       ("piece_step", beside * panel_rows if along_rows else 1)):
        writer.size(name, size)
    writer.let("piece", f"make_panel({target})")
    _open_item(writer)
    loops = [("row", rows), ("step", steps)]
    for loop, atoms in reversed(loops) if along_rows else loops:
        writer.open(loop, f"first_{loop}", f"last_{loop}")
        locate(writer, region, loop, atoms)
    place = "row - first_row + (step - first_step) * piece_step" if along_rows else "(row - first_row) * piece_row + step - first_step"
    writer.store_at(PIECE, made.value.type, place, writer.evaluate(*region.outputs[0][:2]))
    writer.flush()
    writer.close(2)
    writer.open("panel", "item * beside", "min(item * beside + beside, panels)")
    writer.let("top", "panel * panel_rows")
    calls = writer.levels[-1].body
    kernel, arguments = writer.kernel(f"pack_{kernel_name(region.body).removeprefix('fused_')}")
    calls.append(Let("_", None, f"pack_block(args, {len(arguments) + 1}, min(panel_rows, rows - top), last_step - first_step, "
                     f"piece, (top - first_row) * piece_row, piece_row, piece_step, "
                     f"{target}, panel * panel_size + first_step * width, width)"))
    source = gemm.pack_text(form, "rows" if along_rows else "depth", made.of_b)
    packs = Function(source[4:source.index("(")], source)
    return Launch(kernel.name, emit(kernel), -(-number // beside), (*arguments, packs))


def _open_item(writer: Writer) -> None:
    """The loops over the parts of an item, with the rows and steps of each."""
    writer.open("item", "begin", "end")
    writer.let("first_row", "item * beside * panel_rows")
    writer.let("last_row", "min(first_row + beside * panel_rows, rows)")
    writer.open("part", "0", f"(depth + {STEPS - 1}) // {STEPS}")
    writer.let("first_step", f"part * {STEPS}")
    writer.let("last_step", f"min(first_step + {STEPS}, depth)")


def _lies_along(region: Region, rows: Place) -> bool:
    """Whether the largest operand lies in memory along `rows`."""
    places = [region.axes.flat(index) for v in region.body.inputs for index in region.demands.of.get(v, [])]
    longest = max(places, key=region.axes.size)
    return bool(longest) and longest[-1] in rows
