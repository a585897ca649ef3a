"""Elementwise ops that follow a product or a convolution, computed over each block of the result while it is in cache.

A region with such a contraction in it is lowered around a launch that makes the contraction's result and says what its
items make of it (`kernel.Blocks`). With something behind the contraction that launch becomes a generated kernel: it calls
the compiled one for an item, then runs the elementwise part over the block that it made. Or what follows is a kernel of its
own behind it: where blocks are not known, or where that was measured to be faster.

What pools a convolution's result is called in the same way, for the planes that an item has made. If nothing else needs
these, they are made in memory that each thread has of its own, and not kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from jitgrad.codegen.choice import Choice
from jitgrad.codegen.kernel import Blocks, Buffer, Launch, Lowered, Private
from jitgrad.codegen.pooled import OWN, Calls, Planes, lower_pool, span_of_item
from jitgrad.codegen.reduce import accumulate, combine_columns, split_loops
from jitgrad.codegen.region import Place, Region, accesses, analyse, collapse
from jitgrad.codegen.templates import kernel_name, lower_map
from jitgrad.codegen.writer import Axis, Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.ir.types import TensorType

Shared = Sequence[tuple[int, int]]
PART_PLACE = "part * n + column"
"""Where the partial sum of a column lies."""
WORTH_ASKING = 1 << 13                          # elements of a result from which a kernel of its own can be measured


@dataclass
class WithEpilogue(ABC):
    """One region on its way: what has been launched so far, and the memory that it needs."""

    body: Graph
    shared: dict[int, int]
    launches: list[Launch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    private: tuple[int, ...] = ()
    sums: list[tuple[ColumnSums, Buffer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producers = self.body.producers()
        self.pools = [n for n in self.body.nodes if n.op.kind == "window"]
        self.memory: dict[Value, Buffer] = {v: Buffer(k) for k, v in enumerate(self.body.inputs)}
        self.memory |= {v: self.output_buffer(k) for k, v in enumerate(self.body.outputs)}
        (self.node,) = [n for n in self.body.nodes if n.op.epilogue]
        self.product = self.node.output
        self.dtype = compute_dtype(self.product.dtype)

    @abstractmethod
    def make(self, target: Buffer) -> Launch:
        """What makes the contraction's result in `target`; whatever has to come before it goes into `launches`."""

    def made_blocks(self) -> Blocks | None:
        """The blocks of what `make` will make, if they are known before."""
        return None

    def lower(self) -> Lowered:
        planes = self.place_planes()
        epilogue = split_epilogue(self.body, self.node)
        product = epilogue.inputs[0]
        region = analyse(epilogue, [])
        region.buffers = {v: self.memory[v] for v in epilogue.inputs[1:]}
        region.outputs = [(v, index, self.memory[v]) for v, index, _ in region.outputs]
        region.buffers[product] = target = self.target(region, product)
        made, pools = self.make(target), [lower_pool(node, self.memory) for node in self.pools]
        if planes is None and is_bare(region, product, target):
            self.launches.append(made)
        elif planes is None and (made.blocks is None or self.stands_apart(region, made.blocks)):
            self.launches += [made, *lower_map(region)]
        else:
            sums, joined = self.column_sums(region, made), pools if planes else []
            name = f"{self.node.op.epilogue}_{kernel_name(without(self.body, self.node)).removeprefix('fused_')}"
            self.launches.append(Epilogue(name, region, product, target, self.dtype, made, sums, planes, joined).launch())
            self.launches += [combine_sums(one, buffer) for one, buffer in self.sums]
        self.launches += [] if planes else pools
        return Lowered(tuple(self.launches), tuple(self.scratch), self.private)

    def place_planes(self) -> Planes | None:
        """The planes that are pooled in the same kernel: if items have whole planes, and the second cache has room for them.
        What is pooled gets memory, unless it is a result: then of each thread's own, and only for an item's planes."""
        if not self.pools:
            return None
        (value,) = {v for node in self.pools for v in node.inputs}
        span = span_of_item(value, self.made_blocks())
        if value not in self.memory and span:
            self.private = (*self.private, span * value.dtype.itemsize)
            self.memory[value] = OWN
        elif value not in self.memory:
            self.memory[value] = self.new_scratch(value.type.nbytes)
        return Planes(value, self.memory[value], span, Private(len(self.private) - 1)) if span else None

    def stands_apart(self, region: Region, blocks: Blocks) -> bool:
        """Whether what follows is a kernel of its own, for a machine whose caches hold the result between the two. Sums of
        columns and updates are fused in order to run block by block."""
        if self.product.dtype is not self.dtype or self.product.type.size < WORTH_ASKING:
            return False
        if blocks.whole_rows or any(node.op.kind == "reduction" for node in region.producers.values()):
            return False
        return Choice("what follows", {"in the same kernel": False, "in a kernel of its own": True}).take()

    def output_buffer(self, k: int) -> Buffer:
        return Buffer(self.shared.get(k, len(self.body.inputs) + k))

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(max(nbytes, 8))
        return Buffer(len(self.body.inputs) + len(self.body.outputs) + len(self.scratch) - 1)

    def target(self, region: Region, product: Value) -> Buffer:
        """Where blocks of the result are made: an output that holds the same elements in the same places and type, if
        there is one, so that no memory is needed beside it."""
        place = region.axes.flat(region.index_of(product))
        for k, (v, index, buffer) in enumerate(region.outputs):
            if k not in self.shared and v.dtype is self.dtype and v.type.size == product.type.size and (
                    region.axes.flat(index) == place):
                return buffer
        return self.new_scratch(product.type.size * self.dtype.itemsize)


    def column_sums(self, region: Region, made: Launch) -> list[ColumnSums]:
        """The sums over rows among the outputs: each block of rows has a row of partial sums in scratch memory."""
        for value, _, buffer in region.outputs:
            node = region.producers.get(value)
            if node is not None and node.op.kind == "reduction":
                assert made.blocks is not None
                type = value.type.with_shape((made.items // made.blocks.sizes["column_blocks"], *value.shape))
                self.sums.append((ColumnSums(node, self.new_scratch(type.nbytes), type), buffer))
        return [sums for sums, _ in self.sums]


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """A sum over rows: its node, and memory for a row of partial sums per block of rows."""

    node: Node
    partials: Buffer
    type: TensorType


def combine_sums(sums: ColumnSums, result: Buffer) -> Launch:
    """The launch that adds partial sums up."""
    builder = GraphBuilder("sum")
    rows = builder.input(sums.type)
    region = analyse(builder.build([builder.run(sums.node.op, (rows,), {"axes": (0,)})]), [])
    region.outputs = [(v, index, result) for v, index, _ in region.outputs]
    return combine_columns(region, split_loops(region), [(sums.partials, sums.type)], sums.type.shape[0])


def is_bare(region: Region, product: Value, target: Buffer) -> bool:
    """True when the contraction itself is all that is wanted."""
    return [(v, buffer) for v, _, buffer in region.outputs] == [(product, target)]


# --- the graph around the contraction -------------------------------------------------------------------------------


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
    """What follows the contraction up to what is pooled: a graph whose first input is its result, then the inputs of the
    body."""
    pools = [n for n in body.nodes if n.op.kind == "window"]
    pooled = {v for n in pools for v in n.outputs}
    outputs = dict.fromkeys([*[v for v in body.outputs if v not in pooled], *[v for n in pools for v in n.inputs]])
    return restrict(without(body, node), tuple(outputs)).replace(inputs=(node.output, *body.inputs))


def without(body: Graph, node: Node) -> Graph:
    return body.replace(nodes=tuple([n for n in body.nodes if n is not node]))


# --- the kernel around the compiled one ---------------------------------------------------------------------------------


@dataclass
class Epilogue:
    """The generated kernel: per item one call of the compiled one, then the loops over the block that it made."""

    name: str
    region: Region
    product: Value
    target: Buffer
    dtype: DType
    made: Launch
    sums: list[ColumnSums]
    planes: Planes | None = None
    pools: list[Launch] = field(default_factory=list)

    def launch(self) -> Launch:
        writer, blocks = self.region.writer(), self.made.blocks
        assert blocks is not None
        writer.operand(self.target, self.dtype, str(self.product.type.with_dtype(self.dtype)))
        for name, size in blocks.sizes.items():
            writer.size(name, size)
        writer.open("item", "begin", "end")
        writer.filled_at[self.target] = len(writer.levels) - 1
        for name, expression in blocks.locate:
            writer.let(name, expression)
        calls = Calls(writer, blocks, self.planes)
        calls.call(self.made, "item", "item + 1")
        self.start_sums(writer)
        totals = {sums.node.output for sums in self.sums}
        stored = [(value, index, buffer) for value, index, buffer in self.region.outputs
                  if value not in totals and (buffer != self.target or value is not self.product)]
        if stored or totals:
            self.open_loops(writer, blocks)
        self.add_to_sums(writer)
        for value, index, buffer in stored:
            writer.store(buffer, value.type, index, writer.evaluate(value, index))
        writer.flush()
        writer.close(len(writer.levels) - 2)
        calls.pool(self.pools)
        return calls.launch(self.name, self.made.items)

    def start_sums(self, writer: Writer) -> None:
        """The item's part of its row of partial sums begins with zeros."""
        if self.sums:
            writer.let("part", "item // column_blocks")
            writer.open("column", "first_column", "last_column")
            for sums in self.sums:
                writer.store_at(sums.partials, sums.type, PART_PLACE, writer.start(sums.node))
            writer.flush()
            writer.close()

    def add_to_sums(self, writer: Writer) -> None:
        """The element at the open loops, added to its column's sum."""
        for sums in self.sums:
            total = writer.load(sums.partials, sums.type, PART_PLACE)
            accumulate(writer, self.region, sums.node, (total,))
            writer.store_at(sums.partials, sums.type, PART_PLACE, total)

    def open_loops(self, writer: Writer, blocks: Blocks) -> None:
        """Batch, row and column give the variables of all loops of the region; where items are whole rows of everything
        that is read and written, one loop does."""
        axes, index, (rows, columns) = self.region.axes, self.region.index_of(self.product), blocks.cuts
        elements = collapse(axes.flat(index[rows:]), accesses(self.region)) if blocks.whole_rows else []
        if len(elements) == 1 and not axes.flat(index[:rows]):
            writer.open("element", "first_row * n", "last_row * n")
            writer.know(writer.axis(elements[0], "element"))
            return
        for name, part in (("batch", index[:rows]), ("row", index[rows:columns]), ("column", index[columns:])):
            if not blocks.locates(name):
                writer.open(name, f"first_{name}", f"last_{name}")
            locate(writer, self.region, name, axes.flat(part))


def locate(writer: Writer, region: Region, name: str, atoms: Place) -> None:
    """The variables of the loops `atoms`, from their common number `name`."""
    groups = collapse(atoms, accesses(region))
    if len(groups) == 1:
        writer.know(writer.axis(groups[0], name))
        return
    rest = name
    for k, group in reversed(list(enumerate(groups))):
        axis: Axis = writer.axis(group, f"{name}_{k}")
        writer.let(axis.name, f"{rest} % {axis.size}" if k else rest)
        writer.know(axis)
        rest = f"{rest} // {axis.size}"
