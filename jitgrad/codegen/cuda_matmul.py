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
from jitgrad.codegen.cuda_boxes import product_by_warpgroups
from jitgrad.codegen.cuda_gemm import Loops, Scalar, Side, Tensor, Tile, tile_of, write_place
from jitgrad.codegen.cuda_product import APART, EXACT, LIBRARY, Following, Products, asked_for, choose_way, following
from jitgrad.codegen.cuda_reduce import lower_column
from jitgrad.codegen.cuda_templates import close_elements, lane_width, lower_map, pack
from jitgrad.codegen.cuda_warpgroup import ARCHITECTURES, warpgroup_tile
from jitgrad.codegen.epilogue import Shared, locate, restrict, split_epilogue
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLibraryCall, CudaLowered, Let, Load, Table, When
from jitgrad.codegen.matmul import Factor, fold_rows, merge_batch, read_through, strides_through
from jitgrad.codegen.region import Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Axis, Writer
from jitgrad.dtypes import bfloat16, float16, float32, float64, int32, int64, uint32
from jitgrad.errors import CompileError, complain
from jitgrad.ir.axes import Index
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.ops import cast
from jitgrad.products import SLACK, WORKSPACE, Product

DIMENSIONS = 3
"""Of a batch, at most; of what has more of them, both factors are copied."""

ENOUGH = 128
"""Large tiles that give every multiprocessor one."""

MULTIPLIED = (float32, float64, bfloat16, float16, int32, int64, uint32)
"""What kernels multiply. Shorter integers become int32 first; a result has the lower bits."""


def lower_matmul(body: Graph, shared: Shared, aligned: bool, allowed: Products = EXACT, arch: str = "sm_80") -> CudaLowered:
    """The launches of a region around one matrix product, for GPUs of `arch`. No output may share the memory of an operand
    of it. CompileError where the factors are complex."""
    if any(v.type.size == 0 for v in body.outputs):
        return CudaLowered(())
    return _Lowering(body, dict(shared), aligned, allowed, arch).lower()


@dataclass(frozen=True)
class Factors:
    """The factors of a batch of products of m x k with k x n matrices: their memory, and how they lie there. `folded`: the
    rows of a whole batch are those of one product."""

    a: Buffer
    b: Buffer
    m: int
    n: int
    k: int
    sizes: tuple[int, ...]
    first: Matrices
    second: Matrices
    folded: bool


@dataclass
class _Lowering:
    """One region on its way: what has been launched so far, and the memory that it needs."""

    body: Graph
    shared: dict[int, int]
    aligned: bool
    allowed: Products
    arch: str
    launches: list[CudaLaunch | CudaLibraryCall] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.node,) = [n for n in self.body.nodes if n.op.epilogue]
        self.product, given = self.node.output, self.node.inputs[0].dtype
        self.dtype = int32 if given.is_integer and given.itemsize < 4 else given
        if self.dtype not in MULTIPLIED:
            raise complain(CompileError, self.node.op.name, f"there is no GPU kernel for a product of {given.name}",
                           fix="keep this part on the CPU")

    def lower(self) -> CudaLowered:
        factors = self.factors()
        follows = None if self.shared else following(self.body, self.node, self.allowed.numbers)
        asked = self.asked_for(factors, follows)
        way = choose_way(asked, follows is not None, self.allowed)
        if asked is not None and way == LIBRARY:
            self.ask_library(asked, factors, self.output_buffer(0), follows.bias if follows else None)
        else:
            self.compute_all(factors, asked if way == APART else None)
        return CudaLowered(tuple(self.launches), tuple(self.scratch))

    def compute_all(self, factors: Factors, asked: Product | None) -> None:
        """The product and what follows it by kernels, the product itself by the library if that is `asked` for it."""
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
        if asked is None:
            self.launches.append(self.multiply(region, factors))
        else:
            region.buffers[epilogue.inputs[0]] = made = self.new_scratch(self.product.type.nbytes)
            self.ask_library(asked, factors, made)
            self.launches += lower_map(region, self.aligned)
        for node in sums:
            self.add_up(node, outputs[node.inputs[0]], buffers[node.output])

    # ---- the library

    def asked_for(self, factors: Factors, follows: Following | None) -> Product | None:
        """What a library would be asked for; None where it cannot be, and where there is none."""
        if self.allowed.library is None or self.product.dtype is not self.dtype:
            return None
        sizes = factors.m, factors.n, factors.k
        return asked_for(self.dtype, self.allowed, factors.sizes, sizes, factors.first, factors.second, follows)

    def ask_library(self, asked: Product, factors: Factors, result: Buffer, bias: Value | None = None) -> None:
        """The launch that has the library compute the product."""
        inputs = self.body.inputs
        more = () if bias is None else (Buffer(inputs.index(bias)) if bias in inputs else self.stored(bias),)
        workspace = self.new_scratch(WORKSPACE + SLACK)
        name = "_".join(["cublaslt", "matmul", *["bias"] * asked.bias, *[asked.activation] * bool(asked.activation)])
        self.launches.append(CudaLibraryCall(name, asked, (factors.a, factors.b, result, workspace, *more)))

    # ---- memory

    def output_buffer(self, k: int) -> Buffer:
        return Buffer(self.shared.get(k, len(self.body.inputs) + k))

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(max(nbytes, 8))
        return Buffer(len(self.body.inputs) + len(self.body.outputs) + len(self.scratch) - 1)

    def factor(self, value: Value) -> Factor:
        """`value` read through strides where that can be, else computed into scratch memory."""
        found = read_through(self.body, value) if value.dtype is self.dtype else None
        return found or self.compute(value)

    def compute(self, value: Value) -> Factor:
        """`value`, a function of the body's inputs, computed into scratch memory in the type in which it is multiplied."""
        place = self.stored(value)
        matrices = strides_through([], value.type, value.type)
        assert matrices is not None
        return Factor(place, matrices)

    def stored(self, value: Value) -> Buffer:
        """Where a kernel stores `value`, in one piece, in the type in which it is multiplied."""
        made = restrict(self.body, [value])
        if value.dtype is not self.dtype:
            value = Value(value.id, value.type.with_dtype(self.dtype))
            longer = Node(cast, made.outputs, {"dtype": self.dtype}, (value,))
            made = made.replace(nodes=(*made.nodes, longer), outputs=(value,))
        place = self.new_scratch(value.type.nbytes)
        region = analyse(made, [])
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region, self.aligned)
        return place

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

    def factors(self) -> Factors:
        """Both factors, with as few dimensions of a batch as there can be."""
        a, b = [self.factor(v) for v in self.node.inputs]
        batch, (m, n), k = self.product.shape[:-2], self.product.shape[-2:], self.node.inputs[0].shape[-1]
        folded = fold_rows(batch, m, a.matrices, b.matrices)
        if folded is not None:
            a, b = Factor(a.buffer, folded[0]), Factor(b.buffer, folded[1])
            batch, m = (), prod(batch) * m
        sizes, first, second = merge_batch(batch, a.matrices, b.matrices)
        if len(sizes) > DIMENSIONS:
            a, b = self.compute(self.node.inputs[0]), self.compute(self.node.inputs[1])
            sizes, first, second = merge_batch(batch, a.matrices, b.matrices)
        return Factors(a.buffer, b.buffer, m, n, k, sizes, first, second, folded is not None)

    def multiply(self, region: Region, factors: Factors) -> CudaLaunch:
        """The launch that makes all outputs of `region`, whose first value is the product."""
        m, n, k, sizes = factors.m, factors.n, factors.k, factors.sizes
        large = prod(sizes) * -(-m // 128) * -(-n // 128) >= ENOUGH
        tile, writer = tile_of(self.dtype, large, self.allowed.tf32), region.writer()
        operands = (factors.a, factors.first, (m, k)), (factors.b, turned(factors.second), (n, k))
        a, b = [self.side(writer, tile, name, *operand) for name, operand in zip("ab", operands, strict=True)]
        wide = cuda_templates.is_wide(self.body)
        by_warpgroups = large and not wide and self.suits_warpgroups([a, b])
        if by_warpgroups:
            tile = warpgroup_tile(self.dtype, columns_of(n, prod(sizes) * -(-m // 128)))
        counts = -(-m // tile.size), -(-n // tile.columns)
        named = {"m": m, "n": n, "k": k, "row_tiles": counts[0], "column_tiles": counts[1],
                 **{f"size_{d}": size for d, size in enumerate(sizes)}}
        for name, value in named.items():
            writer.size(name, value)
        write_place(writer, tile, len(sizes))
        made: Loops
        if by_warpgroups:
            made = product_by_warpgroups(writer, tile, [a, b], operands)
        else:
            made = (Tensor if tile.on_tensor_cores else Scalar)(writer, tile, a, b)
        made.write()
        *outer, last = region.index_of(region.body.inputs[0])
        rows = [("row", "", tuple(outer))] if factors.folded else [("batch", "", tuple(outer[:-1])),
                                                                   ("row", "", tuple(outer[-1:]))]
        Epilogue(writer, region, made, region.body.inputs[0], rows, (last,), self.aligned).write()
        name = kernel_name(region.body).removeprefix("fused_").removeprefix("copy_")
        kernel, arguments = writer.kernel(f"matmul_{name}")
        kernel = replace(kernel, operands=(*made.maps, *kernel.operands))
        return pack(kernel, (*made.maps.values(), *arguments), prod(sizes) * prod(counts), tile.threads, self.aligned, wide,
                    made.dynamic_bytes)

    def suits_warpgroups(self, sides: list[Side]) -> bool:
        """Whether warpgroups can multiply: they read slices of 16-bit floats as copies of 16 bytes leave them. (With indices
        in int64 there are quotients by calls, which would make every product wait for the one before.)"""
        return self.dtype.itemsize == 2 and self.arch in ARCHITECTURES and all([side.wide for side in sides])

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


def columns_of(n: int, strips: int) -> int:
    """Of the tiles of warpgroups, of which each strip of 128 rows has some: 256 where they give every multiprocessor one and
    at most an eighth of what they compute is beyond the last column, else 128."""
    count = -(-n // 256)
    return 256 if strips * count >= ENOUGH and 256 * count * 7 <= 8 * n else 128


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
    made: Loops
    product: Value
    rows: Sequence[tuple[str, str, Index]]
    columns: Index
    aligned: bool

    def write(self) -> None:
        writer = self.writer
        tile = self.made.tile
        writer.open("part", "0", str(tile.parts))
        for part in range(tile.parts):
            writer.emit(When(f"part == {part}", self.made.place_part(part)))
        writer.emit(Let("_", None, "barrier()"))
        self.write_rows()
        if tile.parts > 1:
            writer.emit(Let("_", None, "barrier()"))
        writer.close()

    def write_rows(self) -> None:
        """Threads beside each other have neighbours of a row."""
        writer, region, tile = self.writer, self.region, self.made.tile
        index = region.index_of(self.product)
        columns = collapse(region.axes.flat(self.columns), accesses(region))
        width = lane_width(region, columns[-1], False, self.aligned) if columns else 1
        across = tile.columns // width
        writer.open("round", "0", str(tile.size // tile.parts * across // tile.threads))
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
        dtype, name = self.product.dtype, "product"
        if dtype.is_integer and dtype.itemsize < 4:
            name = "wrapped"
            writer.emit(Let(name, dtype, "product"))
        writer.bind(self.product, index, name)
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
