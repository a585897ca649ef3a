"""The templates of regions that reduce, on a GPU: "row", "full" and "column".

A row belongs to some threads of one warp, or to one block, and stays in their registers from the first step to the last;
one that is too long for that is walked once per step. What threads have found is joined by shuffles, between the warps of a
block through shared memory, between blocks by a second kernel. All of it in an order that shape alone decides, without
atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jitgrad.codegen.cuda_lanes import Chunk, Lanes, load_where, replace
from jitgrad.codegen.cuda_templates import THREADS, close_unit, finish, lane_width, loaded_dtypes, open_unit, share
from jitgrad.codegen.emit_cuda import may_fail
from jitgrad.codegen.kernel import Buffer, CudaLaunch, Let, Load, Loop, Statement, Store, When
from jitgrad.codegen.reduce import Split, accumulate, partial_place, partial_results, split_loops, start, steps
from jitgrad.codegen.region import Region
from jitgrad.codegen.space import make_space, outer_axes, spread
from jitgrad.codegen.templates import store_outputs
from jitgrad.codegen.writer import Axis, Writer, compute_dtype, is_position
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Node
from jitgrad.ir.types import TensorType

WARP = 32
ELEMENTS = 8
"""Elements of a row that a thread holds, as long as there are threads; a block of 1024 threads holds up to twice that."""

MOST_THREADS = 1024

# ---- joining what threads have found -------------------------------------------------------------------------------


def join(writer: Writer, node: Node, names: tuple[str, ...], threads: int) -> None:
    """The accumulators `names` of `threads` neighbouring threads become those of all of them. More than a warp: the whole
    block takes part, and no slot of shared memory is used twice, so one barrier does."""
    _join_warp(writer, node, names, min(threads, WARP))
    if threads <= WARP:
        return
    slots = [share(writer, dtype, WARP) for dtype in _dtypes(node)]
    writer.enter(When(f"lane % {WARP} == 0"))
    for name, slot in zip(names, slots, strict=True):
        writer.emit(Store(slot, f"lane // {WARP}", name))
    writer.close()
    writer.emit(Let("_", None, "barrier()"))
    for name, slot in zip(names, slots, strict=True):
        writer.emit(Load(name, slot, f"lane % {threads // WARP}"))
    _join_warp(writer, node, names, threads // WARP)


def _dtypes(node: Node) -> list[DType]:
    value = compute_dtype(node.inputs[0].dtype)
    return [value, node.output.dtype] if is_position(node) else [value]


def _join_warp(writer: Writer, node: Node, names: tuple[str, ...], threads: int) -> None:
    while threads > 1:
        threads //= 2
        if is_position(node):
            _join_positions(writer, node, names, threads)
        else:
            writer.accumulate(node, names[0], f"shuffle({names[0]}, {threads})")


def _join_positions(writer: Writer, node: Node, names: tuple[str, ...], distance: int) -> None:
    best, place = names
    value, position, better = writer.fresh("other"), writer.fresh("where"), writer.fresh("better")
    dtypes = _dtypes(node)
    writer.emit(Let(value, dtypes[0], f"shuffle({best}, {distance})"))
    writer.emit(Let(position, dtypes[1], f"shuffle({place}, {distance})"))
    largest = int(node.op.name == "argmax")
    writer.emit(Let(better, None, f"is_better({value}, {position}, {best}, {place}, {largest})"))
    writer.emit(Let(place, dtypes[1], f"{position} if {better} else {place}"))
    writer.emit(Let(best, dtypes[0], f"{value} if {better} else {best}"))


def store_by(writer: Writer, region: Region, which: Iterable[int], leader: str, barrier: bool = False) -> None:
    """Store these outputs, each once: by the thread for which `leader` is true. `barrier`: what it overwrites, other threads
    of the block may still have to read."""
    which = list(which)
    for k in which:
        value, index, _ = region.outputs[k]
        writer.evaluate(value, index)
    if which:
        if barrier:
            writer.emit(Let("_", None, "barrier()"))
        writer.enter(When(leader))
        store_outputs(writer, region, which)
        writer.close()


# ---- row -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowPlan:
    """`threads` of a block of `block` threads for each row, which take `width` neighbours at a time, `chunks` times. 0
    chunks: more than they can hold."""

    threads: int
    block: int
    width: int
    chunks: int


def plan_row(length: int, width: int) -> RowPlan:
    if 0 < length <= WARP * ELEMENTS:
        threads = min(WARP, _power_of_two(-(-length // width)))
        return RowPlan(threads, THREADS, width, -(-length // (threads * width)))
    threads = min(MOST_THREADS, max(2 * WARP, _power_of_two(-(-length // ELEMENTS))))
    chunks = -(-length // (threads * width))
    return RowPlan(threads, threads, width, chunks if chunks * width <= 2 * ELEMENTS else 0)


def plan_strided_row(length: int) -> RowPlan:
    """A thread per row, where memory runs across rows: neighbouring threads then read neighbours."""
    return RowPlan(1, THREADS, 1, length if length <= ELEMENTS else 0)


def reads_along_rows(region: Region) -> bool:
    """True when in some operand the elements of a row lie behind each other."""
    reduced = set(region.axes.resolve(region.reduced))
    places = [region.axes.flat(index) for v in region.body.inputs for index in region.demands.of.get(v, [])]
    return any(place[-1] in reduced for place in places if reduced.intersection(place))


def _power_of_two(n: int) -> int:
    """The lowest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def lower_row(region: Region, aligned: bool) -> list[CudaLaunch]:
    """Every thread of a row knows the results of its reductions."""
    writer, split = region.writer(), split_loops(region)
    rows = math.prod([region.axes.size(group) for group in split.kept])
    length = math.prod([region.axes.size(group) for group in split.reduced])
    width = lane_width(region, split.reduced[0], False, aligned) if len(split.reduced) == 1 else 1
    plan = plan_row(length, width) if rows < WARP or reads_along_rows(region) else plan_strided_row(length)
    row = Row(writer, region, split, plan, length)
    row.open(rows)
    if plan.chunks:
        _write_held(row)
    else:
        _write_walked(row)
    if plan.threads < plan.block:
        _leave_dead_alone(writer)
    return [finish(writer, region, -(-rows // (plan.block // plan.threads)), aligned, threads=plan.block)]


def _leave_dead_alone(writer: Writer) -> None:
    """Threads of no row take part in shuffles, but they read nothing that belongs to a row, and report nothing."""
    body, dtypes = writer.levels[0].body, loaded_dtypes(writer)
    made: list[Statement] = []
    for statement in body:
        if isinstance(statement, When) and may_fail(statement.body):
            made.append(When(f"live and ({statement.condition})", statement.body))
        elif isinstance(statement, Load) and statement.index != "0" and statement.lanes == 1:
            made += load_where("live", [statement], [statement.name], dtypes)
        else:
            made.append(statement)
    body[:] = made


@dataclass
class Row:
    """One row in the making. `leader`: the condition that a thread stores what belongs to the row once; `live`: what has
    to be added to other conditions for threads that may have no row."""

    writer: Writer
    region: Region
    split: Split
    plan: RowPlan
    length: int
    leader: str = "lane == 0"
    live: str = ""

    def open(self, rows: int) -> None:
        """Which row it is, and which of its threads this one is."""
        writer, plan = self.writer, self.plan
        outer = outer_axes(writer, self.split.kept)
        if plan.threads == plan.block:
            writer.let("row", "block()")
            writer.let("lane", "thread()")
        else:
            per_block = plan.block // plan.threads
            writer.let("row", f"block() * {per_block} + thread() // {plan.threads}")
            writer.let("lane", f"thread() % {plan.threads}")
            writer.let("live", f"row < {writer.size('rows', rows)}")
            self.leader, self.live = "lane == 0 and live", " and live"
        if outer:
            spread(writer, outer, "row")
            for axis in outer:
                writer.know(axis)
        reduced = self.split.reduced
        self.inner = [writer.axis(group, f"j{k}" if len(reduced) > 1 else "j") for k, group in enumerate(reduced)]
        self.total = self.inner[0].size if len(self.inner) == 1 else writer.size("length", self.length)

    def open_elements(self) -> Loop:
        """A loop over the elements of this thread; `Lanes` make it statements for all of them."""
        loop = self.writer.open("j" if len(self.inner) == 1 else "r", "0", "0")
        if len(self.inner) > 1:
            spread(self.writer, self.inner, "r")
        for axis in self.inner:
            self.writer.know(axis)
        return loop

    def begin(self, nodes: list[Node]) -> list[tuple[str, ...]]:
        return [start(self.writer, node) for node in nodes]

    def take_up(self, nodes: list[Node], names: list[tuple[str, ...]]) -> None:
        for node, accumulators in zip(nodes, names, strict=True):
            accumulate(self.writer, self.region, node, accumulators)

    def end(self, nodes: list[Node], names: list[tuple[str, ...]]) -> None:
        for node, accumulators in zip(nodes, names, strict=True):
            join(self.writer, node, accumulators, self.plan.threads)
            self.writer.bind(node.output, self.region.index_of(node.output), accumulators[-1])


def _write_held(row: Row) -> None:
    """All elements of the row are in registers, each in a variable of its own."""
    writer, plan = row.writer, row.plan
    for m in range(plan.chunks):
        writer.let(f"first{m}", f"(lane + {m * plan.threads}) * {plan.width}")
        writer.let(f"in{m}", f"first{m} < {row.total}{row.live}")
    body = writer.levels[-1].body
    loop = row.open_elements()
    for step in steps(row.region):
        names = row.begin(step)
        row.take_up(step, names)
        row.end(step, names)
    store_outputs(writer, row.region, row.split.full)
    store_by(writer, row.region, row.split.small, row.leader)
    writer.close()
    chunks = [Chunk(f"first{m}", plan.width, f"in{m}") for m in range(plan.chunks)]
    replace(body, loop, Lanes(loop.index, chunks, set(), loaded_dtypes(writer)).widen(loop.body))


def _write_walked(row: Row) -> None:
    """The row is read once per step, by its threads side by side."""
    trips = row.writer.size("trips", -(-row.length // (row.plan.threads * row.plan.width)))
    for step in steps(row.region):
        names = row.begin(step)
        for _ in _walk(row, trips, [name for group in names for name in group]):
            row.take_up(step, names)
        row.end(step, names)
    if row.split.full:
        for _ in _walk(row, trips, []):
            store_outputs(row.writer, row.region, row.split.full)
    store_by(row.writer, row.region, row.split.small, row.leader, barrier=True)


def _walk(row: Row, trips: str, accumulators: list[str]) -> Iterator[None]:
    """The loops of one walk along the row, open while the caller writes what is done with an element."""
    writer, plan = row.writer, row.plan
    writer.open("m", "0", trips)
    writer.let("first", f"(m * {plan.threads} + lane) * {plan.width}")
    inside = writer.enter(When(f"first < {row.total}{row.live}"))
    loop = row.open_elements()
    yield
    writer.close(3)
    replace(inside.body, loop, Lanes(loop.index, [Chunk("first", plan.width)], set(accumulators)).widen(loop.body))


# ---- full ------------------------------------------------------------------------------------------------------------

UNITS = 8
"""Units of a thread, in a full reduction that is not very large."""

MOST_PARTS = 4096


def lower_full(region: Region, aligned: bool) -> list[CudaLaunch]:
    """First every block leaves a partial result; then one block combines them and computes what follows."""
    writer, split = region.writer(), split_loops(region)
    assert not split.kept, "a full reduction keeps no loop"
    space = make_space(writer, split.reduced)
    width = lane_width(region, split.reduced[-1] if split.reduced else (), space.rows == 1, aligned)
    units = space.rows * -(-space.length // width)
    trips = max(UNITS, -(-units // (THREADS * MOST_PARTS)))
    blocks = -(-units // (THREADS * trips))
    partials = [partial_results(region, node, blocks) for node in region.reductions]
    writer.let("lane", "thread()")
    names = [start(writer, node) for node in region.reductions]
    writer.open("m", "0", writer.size("trips", trips))
    writer.let("unit", f"(block() * trips + m) * {THREADS} + lane")
    open_unit(writer, space, width)
    for node, name in zip(region.reductions, names, strict=True):
        accumulate(writer, region, node, name)
    store_outputs(writer, region, split.full)
    close_unit(writer, space, width, [name for name, in names])
    writer.close()
    for node, name in zip(region.reductions, names, strict=True):
        join(writer, node, name, THREADS)
    writer.enter(When("lane == 0"))
    for (found,), (buffer, type) in zip(names, partials, strict=True):
        writer.store_at(buffer, type, "block()", found)
    writer.flush()
    first = [finish(writer, region, blocks, aligned, "_partial")] if blocks else []
    return [*first, _combine_partials(region, split, partials, blocks, aligned)]


Partials = list[tuple[Buffer, TensorType]]


def _combine_partials(region: Region, split: Split, partials: Partials, count: int, aligned: bool) -> CudaLaunch:
    writer = region.writer()
    limit = writer.size("partials", count)
    writer.let("lane", "thread()")
    names = [start(writer, node) for node in region.reductions]
    writer.open("m", "0", f"({limit} + {THREADS - 1}) // {THREADS}")
    writer.let("part", f"m * {THREADS} + lane")
    writer.enter(When(f"part < {limit}"))
    for node, (found,), (buffer, type) in zip(region.reductions, names, partials, strict=True):
        writer.accumulate(node, found, writer.load(buffer, type, "part"))
    writer.close(2)
    for node, name in zip(region.reductions, names, strict=True):
        join(writer, node, name, THREADS)
        writer.bind(node.output, region.index_of(node.output), name[0])
    store_by(writer, region, split.small, "lane == 0", barrier=True)
    return finish(writer, region, 1, aligned, "_combine")


# ---- column ----------------------------------------------------------------------------------------------------------

RESIDENT = 1 << 18
"""About so many threads are at work at a time on a large GPU: rows are cut into blocks until there are as many."""

LEAST_ROWS = 16


def lower_column(region: Region, aligned: bool) -> list[CudaLaunch]:
    """First a thread per column adds the rows of a block of rows up; then these partial results are combined."""
    split = split_loops(region)
    columns = math.prod([region.axes.size(group) for group in split.kept])
    rows = math.prod([region.axes.size(group) for group in split.reduced])
    per_block = max(LEAST_ROWS, -(-rows * columns // RESIDENT))
    blocks = -(-rows // per_block) if columns else 0
    partials = [partial_results(region, node, max(blocks, 1) * columns) for node in region.reductions]
    launches = [_column_partials(region, split, partials, per_block, blocks, aligned)] if blocks else []
    return [*launches, _column_combine(region, split, partials, blocks, aligned)]


def _open_columns(writer: Writer, kept: list[Axis], columns: str, blocks: str = "") -> None:
    """The condition that this thread has a column, and the variables of the kept loops there."""
    writer.let("unit", f"block() * {THREADS} + thread()")
    writer.enter(When(f"unit < {columns}{blocks}"))
    if kept:
        spread(writer, kept, f"unit % {columns}")
        for axis in kept:
            writer.know(axis)


def _column_partials(region: Region, split: Split, partials: Partials, per_block: int, blocks: int,
                     aligned: bool) -> CudaLaunch:
    writer = region.writer()
    kept = [writer.axis(group, f"j{k}") for k, group in enumerate(split.kept)]
    outer = outer_axes(writer, split.reduced)
    count = math.prod([region.axes.size(group) for group in split.kept])
    columns, number = writer.size("columns", count), writer.size("blocks", blocks)
    _open_columns(writer, kept, columns, f" * {number}")
    names = [start(writer, node) for node in region.reductions]
    rows, total = writer.size("rows", per_block), writer.size(
        "total", math.prod([region.axes.size(group) for group in split.reduced]))
    writer.let("start", f"unit // {columns} * {rows}")
    writer.open("row", "start", f"min({total}, start + {rows})")
    spread(writer, outer, "row")
    for axis in outer:
        writer.know(axis)
    for node, name in zip(region.reductions, names, strict=True):
        accumulate(writer, region, node, name)
    store_outputs(writer, region, split.full)
    writer.close()
    for (found,), (buffer, type) in zip(names, partials, strict=True):
        writer.store_at(buffer, type, "unit", found)
    writer.flush()
    return finish(writer, region, -(-blocks * count // THREADS), aligned, "_partial")


def _column_combine(region: Region, split: Split, partials: Partials, blocks: int, aligned: bool) -> CudaLaunch:
    writer = region.writer()
    kept = [writer.axis(group, f"j{k}") for k, group in enumerate(split.kept)]
    count = math.prod([region.axes.size(group) for group in split.kept])
    number = writer.size("partials", blocks)
    _open_columns(writer, kept, writer.size("columns", count))
    names = [start(writer, node) for node in region.reductions]
    writer.open("part", "0", number)
    place = partial_place(writer, split, "part", kept)
    for node, (name,), (buffer, type) in zip(region.reductions, names, partials, strict=True):
        writer.accumulate(node, name, writer.load(buffer, type, place))
    writer.close()
    for node, (name,) in zip(region.reductions, names, strict=True):
        writer.bind(node.output, region.index_of(node.output), name)
    store_outputs(writer, region, split.small)
    return finish(writer, region, -(-count // THREADS), aligned, "_combine")
