"""The template "matmul": one matrix product, the movement ops that feed it, the elementwise ops that follow it.

What goes in: the body of a region with one `matmul`. Movement ops between the body's inputs and the product become
strides; what is no stride (or no movement op) is computed first, by a kernel of its own. What comes out: launches that
pack operands where `gemm.arrange` says so, then one launch whose items are blocks of the product. With an epilogue
that launch is a generated kernel: it calls the compiled core for a block, then runs the elementwise part over the block
while it is in cache; or what follows is a kernel of its own behind it, where that was measured to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jitgrad import dtypes
from jitgrad.codegen.blocking import choose_blocking, stands_apart
from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.kernel import Buffer, Function, Launch, Let, Loop, Lowered
from jitgrad.codegen.region import Place, Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name, lower_map
from jitgrad.codegen.writer import Axis, Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.ir.axes import Axes, Strided, atoms_of, source_index
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, run_node
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm
from jitgrad.kernels.cpu.gemm import Arrangement, Form, Matrices, Packing
from jitgrad.ops.contraction import PRODUCTS, int_matmul, matmul

Shared = Sequence[tuple[int, int]]


@lowers("matmul")
def lower_product(call: Call) -> Lowered:
    """The primitive alone."""
    return _lower_alone(call, matmul)


@lowers("int_matmul")
def lower_int_product(call: Call) -> Lowered:
    """The primitive alone."""
    return _lower_alone(call, int_matmul)


def _lower_alone(call: Call, op: Op) -> Lowered:
    builder = GraphBuilder(op.name)
    x, y = [builder.input(t) for t in call.inputs]
    return lower_matmul(builder.build([builder.run(op, (x, y), {})]))


def lower_matmul(body: Graph, shared: Shared = ()) -> Lowered:
    """The launches of a region around one matrix product. No output may share the memory of an operand of it."""
    if any(v.type.size == 0 for v in body.outputs):
        return Lowered(())
    return _Lowering(body, dict(shared)).lower()


@dataclass(frozen=True, slots=True)
class Operand:
    """A factor of the product where it lies: its memory, and strides of its batch dimensions, rows and columns."""

    buffer: Buffer
    matrices: Matrices


@dataclass
class _Lowering:
    """One region on its way: what has been launched so far, and the scratch memory that it needs."""

    body: Graph
    shared: dict[int, int]
    launches: list[Launch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producers = self.body.producers()
        (self.node,) = [n for n in self.body.nodes if n.op in PRODUCTS]
        self.product = self.node.output
        self.dtype = compute_dtype(self.product.dtype)

    def lower(self) -> Lowered:
        factors = [self.factor(v) for v in self.node.inputs]
        epilogue = split_epilogue(self.body, self.node)
        region = analyse(epilogue, [])
        region.buffers = {v: Buffer(k) for k, v in enumerate(epilogue.inputs[1:])}
        region.outputs = [(v, index, self.output_buffer(k)) for k, (v, index, _) in enumerate(region.outputs)]
        region.buffers[epilogue.inputs[0]] = target = self.target(region, epilogue.inputs[0])
        self.multiply(factors, target, region, epilogue.inputs[0])
        return Lowered(tuple(self.launches), tuple(self.scratch))

    # ---- memory

    def output_buffer(self, k: int) -> Buffer:
        return Buffer(self.shared.get(k, len(self.body.inputs) + k))

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(max(nbytes, 8))
        return Buffer(len(self.body.inputs) + len(self.body.outputs) + len(self.scratch) - 1)

    def target(self, region: Region, product: Value) -> Buffer:
        """Where blocks of the product are summed up: an output that holds the same elements in the same places and
        type, if there is one, so that no memory is needed beside it."""
        place = region.axes.flat(region.index_of(product))
        for k, (v, index, buffer) in enumerate(region.outputs):
            if k not in self.shared and v.dtype is self.dtype and v.type.size == product.type.size and (
                    region.axes.flat(index) == place):
                return buffer
        return self.new_scratch(product.type.size * self.dtype.itemsize)

    # ---- operands

    def factor(self, value: Value) -> Operand:
        """`value` read through strides where that can be, else computed into scratch memory."""
        chain: list[Node] = []
        source = value
        while source in self.producers and self.producers[source].op.kind == "movement":
            chain.append(self.producers[source])
            source = chain[-1].inputs[0]
        if source not in self.producers:
            matrices = strides_through(chain, source.type, value.type)
            if matrices is not None:
                return Operand(Buffer(self.body.inputs.index(source)), matrices)
        return self.compute(value)

    def compute(self, value: Value) -> Operand:
        """A kernel that stores `value`, a function of the body's inputs."""
        before = restrict(self.body, [value])
        place = self.new_scratch(value.type.nbytes)
        region = analyse(before, [])
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region)
        matrices = strides_through([], value.type, value.type)
        assert matrices is not None
        return Operand(place, matrices)

    # ---- the product

    def multiply(self, factors: list[Operand], target: Buffer, region: Region, product: Value) -> None:
        a, b = factors
        batch, m, n = self.product.shape[:-2], self.product.shape[-2], self.product.shape[-1]
        k = self.node.inputs[0].shape[-1]
        rows_of_batch = fold_rows(batch, m, a.matrices, b.matrices)
        if rows_of_batch is not None:
            a, b = Operand(a.buffer, rows_of_batch[0]), Operand(b.buffer, rows_of_batch[1])
            batch, m = (), math.prod(batch) * m
        batch, first, second = merge_batch(batch, a.matrices, b.matrices)
        if len(batch) > gemm.BATCH_DIMENSIONS:
            a, b = self.compute(self.node.inputs[0]), self.compute(self.node.inputs[1])
            batch, first, second = merge_batch(self.product.shape[:-2], a.matrices, b.matrices)
        form = gemm.form_for(self.node.inputs[0].dtype.short, self.dtype.short)
        blocking = choose_blocking(form, batch, (m, n, k), first, second)
        made = gemm.arrange(form, batch, m, n, k, first, second, blocking)
        followed = not is_bare(region, product, target)
        apart = followed and product.dtype is self.dtype and stands_apart(batch, (m, n, k))
        if apart:                                               # whose operands are no results, so in memory of its own
            target = region.buffers[product] = self.new_scratch(product.type.nbytes)
        pointers = (self.pack(made.pack_a, a.buffer, form), self.pack(made.pack_b, b.buffer, form), target)
        core = gemm.core_source(form)
        if apart or not followed:
            self.launches.append(launch(core, made.items, *pointers, *made.integers))
            self.launches += lower_map(region) if apart else []
        else:
            block = (Function(form.name, core), *pointers, *made.integers)
            self.launches.append(Epilogue(region, product, target, self.dtype, made).launch(block))

    def pack(self, packing: Packing | None, operand: Buffer, form: Form) -> Buffer:
        """The memory that the core reads: packed panels, or the operand itself."""
        if packing is None:
            return operand
        panels = self.new_scratch(packing.elements * dtypes.BY_SHORT[form.left].itemsize)
        source = gemm.pack_text(form, packing.kind)
        self.launches.append(launch(source, packing.items, operand, panels, *packing.integers))
        return panels


def is_bare(region: Region, product: Value, target: Buffer) -> bool:
    """True when the product itself is all that is wanted."""
    return [(v, buffer) for v, _, buffer in region.outputs] == [(product, target)]


# --- the graph around the product -----------------------------------------------------------------------------------


def restrict(body: Graph, outputs: Sequence[Value]) -> Graph:
    """The nodes that `outputs` need, over the same inputs."""
    wanted, producers, stack = set[Node](), body.producers(), list(outputs)
    while stack:
        node = producers.get(stack.pop())
        if node is not None and node not in wanted:
            wanted.add(node)
            stack.extend(node.inputs)
    return body.replace(nodes=tuple(n for n in body.nodes if n in wanted), outputs=tuple(outputs))


def split_epilogue(body: Graph, node: Node) -> Graph:
    """What follows the product: a graph whose first input is the product, then the inputs of the body."""
    builder = GraphBuilder(body.name)
    environment = {v: builder.input(v.type) for v in (node.output, *body.inputs)}
    with builder:
        for n in restrict(body.replace(nodes=tuple(k for k in body.nodes if k is not node)), body.outputs).nodes:
            builder.where = n.where
            run_node(n, environment)
    return builder.build([environment[v] for v in body.outputs])


# --- operands as strides --------------------------------------------------------------------------------------------


def strides_through(chain: Sequence[Node], source: TensorType, result: TensorType) -> Matrices | None:
    """How `source`, contiguous, is read as `result` through the movement ops of `chain` (last one first): None when
    some dimension has no one stride."""
    axes = Axes()
    index = wanted = axes.fresh_index(result.shape)
    for node in chain:
        found = source_index(axes, node, index)
        if found is None:
            return None
        index = found
    steps, first, stride = dict[int, int](), 0, 1
    for size, dim in zip(reversed(source.shape), reversed(index), strict=True):
        start, step = (dim.start, dim.step) if isinstance(dim, Strided) else (0, 1)
        first += start * stride
        inner = stride * step
        for atom in reversed(axes.resolve(atoms_of(dim))):
            steps[atom] = inner
            inner *= axes.sizes[atom]
        stride *= size
    strides = [_one_stride(axes, axes.resolve(atoms_of(dim)), steps) for dim in wanted]
    known = [s for s in strides if s is not None]
    return Matrices(tuple(known[:-2]), known[-2], known[-1], first) if len(known) == len(strides) else None


def _one_stride(axes: Axes, atoms: Place, steps: dict[int, int]) -> int | None:
    """The stride along nested loops, if they are evenly spaced; loops that the source lacks have stride 0."""
    if not atoms:
        return 0
    spacing = [steps.get(atom, 0) for atom in atoms]
    even = all(outer == axes.sizes[atom] * inner for outer, inner, atom in zip(spacing, spacing[1:], atoms[1:]))
    return spacing[-1] if even else None


def fold_rows(batch: tuple[int, ...], m: int, a: Matrices, b: Matrices) -> tuple[Matrices, Matrices] | None:
    """A batch of products with one B is one product with more rows, where the rows of A are evenly spaced."""
    if not batch or any(stride for size, stride in zip(batch, b.batch, strict=True) if size > 1):
        return None
    spacing, sizes = (*a.batch, a.row), (*batch, m)
    long = [(stride, size) for stride, size in zip(spacing, sizes, strict=True) if size > 1] or [(a.row, 1)]
    if any(outer != size * inner for (outer, _), (inner, size) in pairwise(long)):
        return None
    return Matrices((), long[-1][0], a.column, a.first), Matrices((), b.row, b.column, b.first)


def merge_batch(batch: tuple[int, ...], a: Matrices, b: Matrices) -> tuple[tuple[int, ...], Matrices, Matrices]:
    """The same batch with fewer dimensions: neighbours that both operands hold evenly spaced become one."""
    merged: list[tuple[int, int, int]] = []
    for size, x, y in zip(batch, a.batch, b.batch, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * x and merged[-1][2] == size * y:
            merged[-1] = merged[-1][0] * size, x, y
        else:
            merged.append((size, x, y))
    sizes, xs, ys = zip(*merged, strict=True) if merged else ((), (), ())
    return sizes, Matrices(xs, a.row, a.column, a.first), Matrices(ys, b.row, b.column, b.first)


# --- the kernel around the core -------------------------------------------------------------------------------------


@dataclass
class Epilogue:
    """The generated kernel: per item one call of the core, then the loops over the block that it made."""

    region: Region
    product: Value
    target: Buffer
    dtype: DType
    made: Arrangement

    def launch(self, block: Sequence[Function | Buffer | int]) -> Launch:
        """`block` is the core's address and its arguments; they stand behind the kernel's own."""
        writer = self.region.writer()
        writer.operand(self.target, self.dtype, str(self.product.type.with_dtype(self.dtype)))
        integers = dict(zip(gemm.ARGUMENTS, self.made.integers, strict=True))
        for name in ("m", "n", "rows_per_item", "row_blocks", "columns_per_item", "column_blocks"):
            writer.size(name, integers[name])
        writer.open("item", "begin", "end")
        writer.filled_at[self.target] = len(writer.levels) - 1
        call = len(writer.levels[-1].body)
        writer.let("_", "")
        for name, value in gemm.LOCATE_ITEM:
            writer.let(name, value)
        self.open_loops(writer, integers["m"])
        for value, index, buffer in self.region.outputs:
            if buffer != self.target or value is not self.product:
                writer.store(buffer, value.type, index, writer.evaluate(value, index))
        writer.flush()
        name = f"matmul_{kernel_name(self.region.body).removeprefix('fused_')}"
        kernel, arguments = writer.kernel(name)
        (items,) = [s for s in kernel.body if isinstance(s, Loop)]
        place = len(arguments) + 1
        items.body[call] = Let("_", None, f"invoke(args, {place}, item, item + 1, thread)")
        return Launch(name, emit(kernel), self.made.items, (*arguments, *block))

    def open_loops(self, writer: Writer, rows: int) -> None:
        """Batch, row and column give the variables of all loops of the region."""
        groups = self.split_loops(rows)
        for name, (stop, atoms) in {"batch": ("", groups[0]), "row": ("last_row", groups[1]),
                                    "column": ("last_column", groups[2])}.items():
            if stop:
                writer.open(name, f"first_{name}", stop)
            self.spread(writer, name, atoms)

    def split_loops(self, rows: int) -> tuple[Place, Place, Place]:
        """The loops of the product's batch, rows and columns; `rows` is more than its last but one size where the batch
        was folded into the rows."""
        axes, index = self.region.axes, self.region.index_of(self.product)
        batch, row, column = axes.flat(index[:-2]), axes.flat(index[-2:-1]), axes.flat(index[-1:])
        return (batch, row, column) if rows == self.product.shape[-2] else ((), batch + row, column)

    def spread(self, writer: Writer, name: str, atoms: Place) -> None:
        """The variables of the loops `atoms`, from their common number `name`."""
        groups = collapse(atoms, accesses(self.region))
        if len(groups) == 1:
            writer.know(writer.axis(groups[0], name))
            return
        rest = name
        for k, group in reversed(list(enumerate(groups))):
            axis: Axis = writer.axis(group, f"{name}_{k}")
            writer.let(axis.name, f"{rest} % {axis.size}" if k else rest)
            writer.know(axis)
            rest = f"{rest} // {axis.size}"
