"""The templates of regions that reduce: "row", "full" and "column".

A region's loops are the kept ones (those of its reductions' results) and the reduced ones. Work items are cut by shape
alone, and partial results belong to items, so no result depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from jitgrad.codegen.kernel import Buffer, Launch
from jitgrad.codegen.region import BLOCK, Place, Region, accesses, collapse
from jitgrad.codegen.space import (
    make_space,
    open_block,
    open_items,
    open_line_of_block,
    open_rows,
    open_rows_of_block,
    outer_axes,
)
from jitgrad.codegen.templates import finish, store_outputs
from jitgrad.codegen.writer import Axis, Writer, compute_dtype, is_position
from jitgrad.ir.axes import Index
from jitgrad.ir.graph import Node, Value
from jitgrad.ir.types import TensorType


@dataclass(frozen=True)
class Split:
    """The loops of a reducing region, in order, collapsed; and which outputs run along the reduced ones too."""

    kept: list[Place]
    reduced: list[Place]
    full: list[int]
    small: list[int]


def split_loops(region: Region) -> Split:
    _join_free_loops(region)
    reduced = set(region.axes.resolve(region.reduced))
    order, runs = region.order(), accesses(region)
    full = [k for k, (_, index, _) in enumerate(region.outputs) if reduced.intersection(region.axes.flat(index))]
    return Split(collapse([a for a in order if a not in reduced], runs),
                 collapse([a for a in order if a in reduced], runs), full,
                 [k for k in range(len(region.outputs)) if k not in full])


def _join_free_loops(region: Region) -> None:
    """Loops that are neither kept nor reduced are the reduced ones under another name: ``x - mean(y)``."""
    kept = {a for node in region.reductions for i in region.demands.of[node.output] for a in region.axes.flat(i)}
    reduced = region.axes.resolve(region.reduced)
    for place in list(region.demands.places):
        free = tuple([a for a in region.axes.resolve(place) if a not in kept and a not in reduced])
        if free:
            region.demands.try_unify(partial(region.axes.unify_atoms, reduced, free))
            reduced = region.axes.resolve(reduced)


# ---- row -------------------------------------------------------------------------------------------------------


def lower_row(region: Region) -> list[Launch]:
    """Items are blocks of rows. A row is walked once per step of the computation and stays in the cache."""
    writer, split = region.writer(), split_loops(region)
    rows = math.prod([region.axes.size(group) for group in split.kept])
    length = math.prod([region.axes.size(group) for group in split.reduced])
    per_item = max(1, BLOCK // max(1, length))
    outer = outer_axes(writer, split.kept)
    inner = [writer.axis(group, f"j{k}" if len(split.reduced) > 1 else "j") for k, group in enumerate(split.reduced)]
    open_items(writer)
    if outer:
        open_rows(writer, outer, "item", per_item)
    grouped = steps(region)
    kept = find_kept(region, writer, split, grouped)
    for number, step in enumerate(grouped):
        _reduce(writer, region, step, inner, kept if kept and number >= kept.step else None, number)
    if split.full:
        writer.open_axes(inner)
        if kept:
            kept.fetch(writer, region, [region.outputs[k][0] for k in split.full])
        store_outputs(writer, region, split.full)
        writer.close(len(inner))
    store_outputs(writer, region, split.small)
    return [finish(writer, region, -(-rows // per_item))]


def steps(region: Region) -> list[list[Node]]:
    """The reductions, grouped by how many others must be done before."""
    depth: dict[object, int] = {}
    groups: list[list[Node]] = []
    for node in region.body.nodes:
        before = max([depth.get(v, 0) for v in node.inputs], default=0)
        is_reduction = node.op.kind == "reduction"
        depth[node.output] = before + is_reduction
        if is_reduction:
            if before == len(groups):
                groups.append([])
            groups[before].append(node)
    return groups


@dataclass(frozen=True)
class Kept:
    """A value that costs much and is read again behind the step that computes it: it waits in the memory of an output."""

    value: Value
    index: Index
    buffer: Buffer
    step: int

    def leave(self, writer: Writer, region: Region) -> None:
        """Behind the reductions of its step."""
        writer.store(self.buffer, self.value.type, self.index, writer.evaluate(self.value, self.index))
        writer.flush()

    def fetch(self, writer: Writer, region: Region, roots: Iterable[Value]) -> None:
        """In a later loop, if what it computes, `roots`, needs it."""
        if self.value in read_by(region, roots, self.value):
            operand = writer.operand(self.buffer, self.value.dtype, str(self.value.type))
            place = writer.offset(operand, self.value.type, self.index)
            writer.bind(self.value, self.index, writer.load(self.buffer, self.value.type, place))


def find_kept(region: Region, writer: Writer, split: Split, grouped: list[list[Node]]) -> Kept | None:
    """The operand of a reduction that is made by a function such as exp, if an output has the same type and place, and
    memory that nothing else reads any more."""
    for number, step in enumerate(grouped):
        later = [v for nodes in grouped[number + 1:] for node in nodes for v in node.inputs]
        for node in step:
            value, index = node.inputs[0], region.demands.reads[node]
            maker = region.producers.get(value)
            if maker is None or not is_function(maker):
                continue
            needed = read_by(region, [*later, *[v for v, _, _ in region.outputs]], value)
            for out, place, buffer in [region.outputs[k] for k in split.full]:
                alike = out.type == value.type and compute_dtype(out.dtype) is out.dtype and (
                    writer.key(value, place) == writer.key(value, index))
                free = not any(buffer == region.buffers[v] for v in needed if v in region.buffers)
                if value in needed and alike and free:
                    return Kept(value, index, buffer, number)
    return None


def read_by(region: Region, roots: Iterable[Value], kept: Value | None = None) -> set[Value]:
    """What the values `roots` are computed from, down to inputs, results of reductions and `kept`; and they."""
    found: set[Value] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            maker = region.producers.get(value)
            if value is not kept and maker is not None and maker.op.kind != "reduction":
                stack.extend(maker.inputs)
    return found


PART = 4096
"""Elements of a row that are added up by themselves: the error of a long sum grows with their number only."""


def _reduce(writer: Writer, region: Region, nodes: list[Node], inner: list[Axis], kept: Kept | None, number: int) -> None:
    """One walk along the reduced loops for all of `nodes`, step `number`; their results are known behind it."""
    totals = [start(writer, node) for node in nodes]
    if inner:
        writer.open_axes(inner[:-1])
        writer.open("part", "0", f"({inner[-1].size} + {PART - 1}) // {PART}")
        variables = [start(writer, node) if is_float_sum(node) else total
                     for node, total in zip(nodes, totals, strict=True)]
        writer.open(inner[-1].name, f"part * {PART}", f"min({inner[-1].size}, part * {PART} + {PART})")
        writer.know(inner[-1])
    else:
        variables = totals
    if kept and number > kept.step:
        kept.fetch(writer, region, [v for node in nodes for v in node.inputs])
    for node, names in zip(nodes, variables, strict=True):
        accumulate(writer, region, node, names)
    if kept and number == kept.step:
        kept.leave(writer, region)
    if inner:
        writer.close()
        for node, names, total in zip(nodes, variables, totals, strict=True):
            if names is not total:
                writer.accumulate(node, total[0], names[0])
        writer.close(len(inner))
    for node, names in zip(nodes, totals, strict=True):
        writer.bind(node.output, region.index_of(node.output), names[-1])


def is_float_sum(node: Node) -> bool:
    return node.op.spell == "{0} + {1}" and node.output.dtype.is_floating_point


def start(writer: Writer, node: Node) -> tuple[str, ...]:
    return writer.start_position(node) if is_position(node) else (writer.start(node),)


def accumulate(writer: Writer, region: Region, node: Node, names: tuple[str, ...]) -> None:
    """Add the operand of `node` at the open loops to its accumulator."""
    index = region.demands.reads[node]
    value = writer.evaluate(node.inputs[0], index)
    if is_position(node):
        axis = index[node.attrs["axis"]]
        assert isinstance(axis, tuple)
        writer.accumulate_position(node, names, value, writer.position(axis))
    else:
        writer.accumulate(node, names[0], value)


# ---- full ------------------------------------------------------------------------------------------------------


def lower_full(region: Region) -> list[Launch]:
    """First every item leaves a partial result; then one item combines them and computes what follows."""
    writer, split = region.writer(), split_loops(region)
    assert not split.kept, "a full reduction keeps no loop"
    space = make_space(writer, split.reduced)
    partials = [partial_results(region, node, space.items) for node in region.reductions]
    open_items(writer)
    variables = [writer.start(node) for node in region.reductions]
    opened = open_block(writer, space)
    for node, name in zip(region.reductions, variables, strict=True):
        accumulate(writer, region, node, (name,))
    store_outputs(writer, region, split.full)
    writer.close(opened)
    for name, (buffer, type) in zip(variables, partials, strict=True):
        writer.store_at(buffer, type, "item", name)
    writer.flush()
    first = finish(writer, region, space.items, "_partial")
    return [first, _combine_partials(region, split, partials, space.items)]


def partial_results(region: Region, node: Node, count: int) -> tuple[Buffer, TensorType]:
    type = TensorType(compute_dtype(node.inputs[0].dtype), (count,))
    return region.new_scratch(type.nbytes), type


def _combine_partials(region: Region, split: Split, partials: list[tuple[Buffer, TensorType]], count: int) -> Launch:
    writer = region.writer()
    limit = writer.size("partials", count)
    open_items(writer)
    variables = [writer.start(node) for node in region.reductions]
    writer.open("part", "0", limit)
    for node, name, (buffer, type) in zip(region.reductions, variables, partials, strict=True):
        writer.accumulate(node, name, writer.load(buffer, type, "part"))
    writer.close()
    for node, name in zip(region.reductions, variables, strict=True):
        writer.bind(node.output, region.index_of(node.output), name)
    store_outputs(writer, region, split.small)
    return finish(writer, region, 1, "_combine")


# ---- column ----------------------------------------------------------------------------------------------------

ROW_BLOCKS, FEW_BLOCKS, ENOUGH_ROWS = 64, 8, 16
"""At most so many partial sums per column; and so few of them as long as each is of fewer than enough rows: they are written
and read again."""


def lower_column(region: Region) -> list[Launch]:
    """First every block of rows adds its rows up, into a row of partial results; then these rows are combined."""
    split = split_loops(region)
    columns = math.prod([region.axes.size(group) for group in split.kept])
    rows = math.prod([region.axes.size(group) for group in split.reduced])
    per_block = max(-(-rows // ROW_BLOCKS), min(ENOUGH_ROWS, -(-rows // FEW_BLOCKS)), BLOCK // max(1, columns), 1)
    blocks = max(-(-rows // per_block), 1)                          # the sum over nothing, too, is a row of them
    partials = [partial_results(region, node, blocks * columns) for node in region.reductions]
    return [_column_partials(region, split, partials, per_block, blocks), combine_columns(region, split, partials, blocks)]


def _column_partials(region: Region, split: Split, partials: list[tuple[Buffer, TensorType]], per_block: int,
                     blocks: int) -> Launch:
    writer = region.writer()
    inner = [writer.axis(group, f"j{k}") for k, group in enumerate(split.kept)]
    outer = outer_axes(writer, split.reduced)
    open_items(writer)
    place = partial_place(writer, split, "item", inner)
    writer.open_axes(inner)
    for node, (buffer, type) in zip(region.reductions, partials, strict=True):
        writer.store_at(buffer, type, place, writer.start(node))
    writer.flush()
    writer.close(len(inner))
    open_rows(writer, outer, "item", per_block)
    writer.open_axes(inner)
    for node, (buffer, type) in zip(region.reductions, partials, strict=True):
        total = writer.load(buffer, type, place)
        accumulate(writer, region, node, (total,))
        writer.store_at(buffer, type, place, total)
    if split.full and costs_little(region, [region.outputs[k][0] for k in split.full]):
        writer.flush()
        writer.close(len(inner))
        writer.open_axes(inner)
    store_outputs(writer, region, split.full)
    return finish(writer, region, blocks, "_partial")


def costs_little(region: Region, roots: Iterable[Value]) -> bool:
    """Whether `roots` are made by plain operators: then they are computed in a loop of their own, for stores that miss the
    cache hold up those of partial results behind them. A row's operands are still near."""
    makers = [region.producers.get(v) for v in read_by(region, roots)]
    return not any([maker is not None and maker.op.kind != "reduction" and is_function(maker) for maker in makers])


def is_function(node: Node) -> bool:
    """Whether its scalar form is a function such as exp, and no plain operator."""
    return node.op.kind == "elementwise" and "{" not in (node.op.spell or "{")


def partial_place(writer: Writer, split: Split, block: str, inner: list[Axis]) -> str:
    """Where the partial result of a block of rows lies, for the column at the variables of `inner`."""
    text = block
    for axis in inner:
        text = f"({text}) * {axis.size} + {axis.name}" if " " in text else f"{text} * {axis.size} + {axis.name}"
    return text


def combine_columns(region: Region, split: Split, partials: list[tuple[Buffer, TensorType]], blocks: int) -> Launch:
    """The launch that adds up `blocks` rows of partial results: each row to the first one, so that memory is read in its
    order. What follows reads the first one."""
    writer = region.writer()
    space = make_space(writer, split.kept)
    open_items(writer)
    open_rows_of_block(writer, space)
    axes = [*space.outer, *([space.inner] if space.inner else [])]
    first = partial_place(writer, split, "0", axes)
    writer.open("part", "1", writer.size("partials", blocks))
    inside = open_line_of_block(writer, space)
    for node, (buffer, type) in zip(region.reductions, partials, strict=True):
        total = writer.load(buffer, type, first)
        writer.accumulate(node, total, writer.load(buffer, type, partial_place(writer, split, "part", axes)))
        writer.store_at(buffer, type, first, total)
    writer.flush()
    writer.close(inside + 1)
    open_line_of_block(writer, space)
    for node, (buffer, type) in zip(region.reductions, partials, strict=True):
        writer.bind(node.output, region.index_of(node.output), writer.load(buffer, type, first))
    store_outputs(writer, region, split.small)
    return finish(writer, region, space.items, "_combine")
