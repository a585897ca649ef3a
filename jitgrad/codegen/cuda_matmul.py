"""The templates "matmul" and "update" on a GPU: one matrix product, the movement ops that feed it, the elementwise ops that
follow it, in one kernel.

What goes in is what `codegen.matmul` takes: the body of a region with one `matmul`. Movement ops in front of the product
become strides; what is no stride is computed first, by a kernel of its own. What comes out: launches of which each block
computes one tile (`codegen.cuda_gemm`); from shared memory the elementwise part takes it row by row, so that results and
further operands are read and written in order. Sums over rows that belong to the region are a kernel behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_gemm import PARTS, Product, Scalar, Side, Tensor, Tile, tile_of, write_place
from jitgrad.codegen.cuda_reduce import lower_column
from jitgrad.codegen.cuda_templates import close_elements, lane_width, lower_map, pack
from jitgrad.codegen.epilogue import Shared, locate, restrict, split_epilogue
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered, Let, Load, Table, When
from jitgrad.codegen.matmul import Factor, fold_rows, merge_batch, read_through, strides_through
from jitgrad.codegen.region import Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Axis, Writer
from jitgrad.dtypes import bfloat16, float16, float32, float64
from jitgrad.errors import CompileError, complain
from jitgrad.ir.axes import Index
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.kernels.cpu.gemm import Matrices

DIMENSIONS = 3
"""Of a batch, at most; of what has more of them, both factors are copied."""

ENOUGH = 128
"""Large tiles that give every multiprocessor one."""

FLOATS = (float32, float64, bfloat16, float16)


def lower_matmul(body: Graph, shared: Shared, aligned: bool) -> CudaLowered:
    """The launches of a region around one matrix product. No output may share the memory of an operand of it. CompileError
    where the factors are no floats."""
    if any(v.type.size == 0 for v in body.outputs):
        return CudaLowered(())
    return _Lowering(body, dict(shared), aligned).lower()


@dataclass
class _Lowering:
    """One region on its way: what has been launched so far, and the memory that it needs."""

    body: Graph
    shared: dict[int, int]
    aligned: bool
    launches: list[CudaLaunch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.node,) = [n for n in self.body.nodes if n.op.epilogue]
        self.product, self.dtype = self.node.output, self.node.inputs[0].dtype
        if self.dtype not in FLOATS:
            raise complain(CompileError, self.node.op.name, f"there is no GPU kernel for a product of {self.dtype.name}",
                           fix="keep this part on the CPU")

    def lower(self) -> CudaLowered:
        a, b = [self.factor(v) for v in self.node.inputs]
        epilogue = split_epilogue(self.body, self.node)
        buffers = {v: self.output_buffer(k) for k, v in enumerate(epilogue.outputs)}
        producers = epilogue.producers()
        sums = [producers[v] for v in buffers if v in producers and producers[v].op.kind == "reduction"]
        outputs = {v: buffer for v, buffer in buffers.items() if v not in {node.output for node in sums}}
        for node in sums:
            outputs.setdefault(node.inputs[0], self.new_scratch(node.inputs[0].type.nbytes))
        region = analyse(restrict(epilogue, list(outputs)), [])
        region.buffers = {v: Buffer(k) for k, v in enumerate(epilogue.inputs[1:])}
        region.outputs = [(v, index, buffer) for (v, index, _), buffer in zip(region.outputs, outputs.values(), strict=True)]
        self.launches.append(self.multiply(region, a, b))
        for node in sums:
            self.add_up(node, outputs[node.inputs[0]], buffers[node.output])
        return CudaLowered(tuple(self.launches), tuple(self.scratch))

    # ---- memory

    def output_buffer(self, k: int) -> Buffer:
        return Buffer(self.shared.get(k, len(self.body.inputs) + k))

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(max(nbytes, 8))
        return Buffer(len(self.body.inputs) + len(self.body.outputs) + len(self.scratch) - 1)

    def factor(self, value: Value) -> Factor:
        """`value` read through strides where that can be, else computed into scratch memory."""
        return read_through(self.body, value) or self.compute(value)

    def compute(self, value: Value) -> Factor:
        """A kernel that stores `value`, a function of the body's inputs."""
        place = self.new_scratch(value.type.nbytes)
        region = analyse(restrict(self.body, [value]), [])
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region, self.aligned)
        matrices = strides_through([], value.type, value.type)
        assert matrices is not None
        return Factor(place, matrices)

    def add_up(self, node: Node, rows: Buffer, result: Buffer) -> None:
        """The launches of a sum over rows that lie in memory."""
        builder = GraphBuilder("sum")
        region = analyse(builder.build([builder.run(node.op, (builder.input(node.inputs[0].type),), dict(node.attrs))]), [])
        launches = lower_column(region, self.aligned)
        places = [rows, result, *[self.new_scratch(n) for n in region.scratch]]
        for launch in launches:
            arguments = tuple([places[a.index] if isinstance(a, Buffer) else a for a in launch.arguments])
            assert not any(isinstance(a, Table) for a in arguments)
            self.launches.append(replace(launch, arguments=arguments))

    # ---- the product

    def multiply(self, region: Region, a: Factor, b: Factor) -> CudaLaunch:
        """The launch that makes all outputs of `region`, whose first value is the product."""
        batch, (m, n), k = self.product.shape[:-2], self.product.shape[-2:], self.node.inputs[0].shape[-1]
        folded = fold_rows(batch, m, a.matrices, b.matrices)
        if folded is not None:
            a, b = Factor(a.buffer, folded[0]), Factor(b.buffer, folded[1])
            batch, m = (), prod(batch) * m
        sizes, first, second = merge_batch(batch, a.matrices, b.matrices)
        if len(sizes) > DIMENSIONS:
            a, b = self.compute(self.node.inputs[0]), self.compute(self.node.inputs[1])
            sizes, first, second = merge_batch(batch, a.matrices, b.matrices)
        large = prod(sizes) * -(-m // 128) * -(-n // 128) >= ENOUGH
        tile, writer = tile_of(self.dtype, large), region.writer()
        counts = -(-m // tile.size), -(-n // tile.size)
        sides = (self.side(writer, tile, "a", a.buffer, first, (m, k)),
                 self.side(writer, tile, "b", b.buffer, turned(second), (n, k)))
        named = {"m": m, "n": n, "k": k, "row_tiles": counts[0], "column_tiles": counts[1],
                 **{f"size_{d}": size for d, size in enumerate(sizes)}}
        for name, value in named.items():
            writer.size(name, value)
        write_place(writer, tile, len(sizes))
        made = (Tensor if tile.on_tensor_cores else Scalar)(writer, tile, *sides)
        made.write()
        *outer, last = region.index_of(region.body.inputs[0])
        rows = [("row", "", tuple(outer))] if folded else [("batch", "", tuple(outer[:-1])), ("row", "", tuple(outer[-1:]))]
        Epilogue(writer, region, made, region.body.inputs[0], rows, (last,), self.aligned).write()
        name = kernel_name(region.body).removeprefix("fused_").removeprefix("copy_")
        kernel, arguments = writer.kernel(f"matmul_{name}")
        values = (*self.body.inputs, *self.body.outputs, *self.node.inputs, self.product)
        wide = any(v.type.size >= cuda_templates.WIDE for v in values)
        return pack(kernel, arguments, prod(sizes) * prod(counts), tile.threads, self.aligned, wide)

    def side(self, writer: Writer, tile: Tile, name: str, buffer: Buffer, matrices: Matrices,
             sizes: tuple[int, int]) -> Side:
        """A factor as an operand of the kernel, and its strides as sizes; `matrices` and `sizes` are those of the outer
        dimension, then of the depth."""
        outer, step = matrices.row, matrices.column
        strides: dict[str | int, int] = {"first": matrices.first, "outer": outer, "step": step}
        strides.update(enumerate(matrices.batch))
        pointer = writer.operand(buffer, self.dtype, self.dtype.short)
        for key, stride in strides.items():
            writer.size(f"{name}_{key}", stride)
        along_depth = step <= outer if min(sizes) > 1 else step == 1
        return Side(name, pointer, self.dtype, along_depth, self.aligned and is_wide(tile, along_depth, matrices, sizes))


def turned(matrices: Matrices) -> Matrices:
    """The matrices transposed."""
    return Matrices(matrices.batch, matrices.column, matrices.row, matrices.first)


def is_wide(tile: Tile, along_depth: bool, matrices: Matrices, sizes: tuple[int, int]) -> bool:
    """Whether all pieces of 16 bytes that exist begin at multiples of it; on CUDA cores they must exist as a whole."""
    outer, step = matrices.row, matrices.column
    along, across, length = (step, outer, sizes[1]) if along_depth else (outer, step, sizes[0])
    whole = tile.on_tensor_cores or length % tile.lanes == 0
    return along == 1 and whole and all(number % tile.lanes == 0 for number in (across, matrices.first, *matrices.batch))


@dataclass
class Epilogue:
    """What follows the product of a tile: part by part through shared memory, row by row from there. `rows`: names, what
    they are, if that is not known yet, and the dimensions that a row's place is told by; `columns`: the others."""

    writer: Writer
    region: Region
    made: Product
    product: Value
    rows: Sequence[tuple[str, str, Index]]
    columns: Index
    aligned: bool

    def write(self) -> None:
        writer = self.writer
        writer.open("part", "0", str(PARTS))
        for part in range(PARTS):
            writer.emit(When(f"part == {part}", self.made.place_part(part)))
        writer.emit(Let("_", None, "barrier()"))
        self.write_rows()
        writer.emit(Let("_", None, "barrier()"))
        writer.close()

    def write_rows(self) -> None:
        """Threads beside each other have neighbours of a row."""
        writer, region, tile = self.writer, self.region, self.made.tile
        index = region.index_of(self.product)
        columns = collapse(region.axes.flat(self.columns), accesses(region))
        width = lane_width(region, columns[-1], False, self.aligned) if columns else 1
        across = tile.size // width
        writer.open("round", "0", str(tile.size // PARTS * across // tile.threads))
        writer.let("unit", f"round * {tile.threads} + thread()")
        writer.let("line", f"unit // {across}")
        writer.let("at", f"unit % {across} * {width}")
        row = f"line // {tile.group} * {tile.span} + part * {tile.group} + line % {tile.group}"
        writer.let("row", f"first_row + {row}")
        writer.let("start", "first_column + at")
        outside = len(writer.levels) - 1
        writer.enter(When("row < m and start < n"))
        for name, text, dimensions in self.rows:
            if region.axes.flat(dimensions):
                locate(writer, region, writer.let(name, text) if text else name, region.axes.flat(dimensions))
        inner = self.locate_columns([writer.axis(group, f"column_{k}" if len(columns) > 1 else "column")
                                     for k, group in enumerate(columns)])
        place = writer.let("local", f"line * {tile.pitch} + at" + (" - first" if inner else ""))
        if inner:
            writer.open(inner.name, "first", f"first + {width}")
            writer.know(inner)
        writer.emit(Load("product", self.made.memory, f"{place} + {inner.name}" if inner else place))
        writer.bind(self.product, index, "product")
        for value, at, buffer in region.outputs:
            writer.store(buffer, value.type, at, writer.evaluate(value, at))
        writer.flush()
        if inner:
            close_elements(writer, width, "")
        writer.close(len(writer.levels) - outside)

    def locate_columns(self, axes: list[Axis]) -> Axis | None:
        """The variables of all loops along columns but the innermost, which begins at ``first``."""
        rest, writer = "start", self.writer
        for k, axis in reversed(list(enumerate(axes))):
            name = "first" if k == len(axes) - 1 else axis.name
            writer.let(name, f"{rest} % {axis.size}" if k else rest)
            if k < len(axes) - 1:
                writer.know(axis)
            rest = f"{rest} // {axis.size}"
        return axes[-1] if axes else None
