"""The template "map" on a GPU, and what all templates there share.

A thread computes a *unit*: some neighbours of one row, as many as fit one 128-bit access. Where an operand is transposed, a
block of threads computes a tile of 32 by 32 elements and exchanges it through shared memory, so that every access to
global memory runs along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jitgrad.codegen.cuda_lanes import Chunk, Lanes, is_contiguous, replace
from jitgrad.codegen.emit_cuda import emit_cuda, may_fail
from jitgrad.codegen.kernel import (
    BoxMap,
    Buffer,
    CudaLaunch,
    ErrorWord,
    Kernel,
    Let,
    Load,
    Loop,
    Operand,
    Statement,
    Store,
    Table,
    When,
)
from jitgrad.codegen.region import Place, Region, accesses, collapse
from jitgrad.codegen.space import Space, make_space, outer_axes, spread
from jitgrad.codegen.templates import kernel_name, store_outputs, turned_group
from jitgrad.codegen.writer import Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Graph

THREADS = 256
ACCESS = 16
"""Bytes of the widest access of a thread."""

WIDE = 2**31 - 2**20
"""Tensors of so many elements are indexed in int64. Of smaller ones int32 has the numbers of threads beyond the end, too."""


def finish(writer: Writer, region: Region, grid: int, aligned: bool, phase: str = "", threads: int = THREADS) -> CudaLaunch:
    """The launch of a finished kernel."""
    kernel, arguments = writer.kernel(kernel_name(region.body) + phase)
    return pack(kernel, arguments, grid, threads, aligned, is_wide(region.body))


def is_wide(body: Graph) -> bool:
    """Whether the indices of a kernel for `body` are in int64. What is never in memory counts, too: threads are numbered by
    the elements of all that is computed."""
    return any(v.type.size >= WIDE for v in (*body.inputs, *[made for node in body.nodes for made in node.outputs]))


def pack(kernel: Kernel, arguments: tuple[Buffer | Table | BoxMap | int, ...], grid: int, threads: int, aligned: bool,
         wide: bool, dynamic: int = 0) -> CudaLaunch:
    """The launch of `kernel` with these arguments, and with the error word where it may fail; with `dynamic` bytes of
    shared memory beside what its text says."""
    word = (ErrorWord(),) if may_fail(kernel.body) else ()
    alignment = ACCESS if aligned else max([operand.dtype.itemsize for operand in kernel.operands], default=1)
    return CudaLaunch(kernel.name, emit_cuda(kernel, threads, wide), grid, threads, (*word, *arguments), alignment, wide,
                      dynamic)


def lane_width(region: Region, inner: Place, is_one_row: bool, aligned: bool) -> int:
    """How many neighbours along `inner` one thread takes: no operand's are more than 16 bytes, and rows begin at multiples
    of it. Pointers are multiples of 16 bytes when `aligned`."""
    if not aligned or not inner:
        return 1
    along = [v.dtype.itemsize for v in region.body.inputs for index in region.demands.of.get(v, [])
             if inner[-1] in region.axes.flat(index)]
    along += [v.dtype.itemsize for v, index, _ in region.outputs if inner[-1] in region.axes.flat(index)]
    width = ACCESS // max(along, default=ACCESS)
    while not is_one_row and region.axes.size(inner) % width:
        width //= 2
    return max(1, width)


# ---- map -------------------------------------------------------------------------------------------------------------


def lower_map(region: Region, aligned: bool) -> list[CudaLaunch]:
    """A unit per thread; tiles where an operand is transposed."""
    runs = accesses(region)
    groups = collapse(region.order(), runs)
    turned = turned_group(groups, runs)
    if turned is not None:
        return _lower_tiles(region, groups, turned, aligned)
    writer = region.writer()
    space = make_space(writer, groups)
    width = lane_width(region, groups[-1] if groups else (), space.rows == 1, aligned)
    writer.let("unit", f"block() * {THREADS} + thread()")
    units = open_unit(writer, space, width)
    store_outputs(writer, region, range(len(region.outputs)))
    close_unit(writer, space, width)
    return [finish(writer, region, -(-units // THREADS), aligned)]


def open_unit(writer: Writer, space: Space, width: int) -> int:
    """The condition that there is unit number ``unit``, and the loop over its elements; the number of units."""
    chunks = -(-space.length // width)
    writer.enter(When(f"unit < {writer.size('units', space.rows * chunks)}"))
    if space.inner is None:
        return 1
    if space.outer:
        name = writer.size("chunks", chunks)
        spread(writer, space.outer, f"unit // {name}")
        for axis in space.outer:
            writer.know(axis)
    writer.let("first", f"unit % {name} * {width}" if space.outer else f"unit * {width}")
    writer.open(space.inner.name, "first", f"min({space.inner.size}, first + {width})")
    writer.know(space.inner)
    return space.rows * chunks


def close_unit(writer: Writer, space: Space, width: int, accumulators: Sequence[str] = ()) -> None:
    """Close what `open_unit` opened."""
    if space.inner is not None:
        close_elements(writer, width, "" if space.rows > 1 else space.inner.size, accumulators)
    writer.close()


def close_elements(writer: Writer, width: int, limit: str, accumulators: Sequence[str] = ()) -> None:
    """Close the loop over `width` elements from ``first`` on, which are done at once; where not all of them are below
    `limit`, if there is one, they are done one by one."""
    writer.close()
    body = writer.levels[-1].body
    loop = body[-1]
    assert isinstance(loop, Loop)
    if width == 1:
        replace(body, loop, [Let(loop.index, None, "first"), *loop.body])
        return
    widened = Lanes(loop.index, [Chunk("first", width)], set(accumulators)).widen(loop.body)
    replace(body, loop, widened if not limit else [
        Let("whole", None, f"first + {width} <= {limit}"), When("whole", widened), When("not whole", [
            Loop("k", "0", str(width), [Let(loop.index, None, "first + k"), When(f"{loop.index} < {limit}", loop.body)])])])


# ---- tiles -----------------------------------------------------------------------------------------------------------

TILE = 32
STEPS = TILE * TILE // THREADS
DOWN = f"y + s * {THREADS // TILE}"
ALONG, ACROSS = f"({DOWN}) * {TILE + 1} + x", f"x * {TILE + 1} + {DOWN}"
"""Where an element of a tile lies in shared memory, read along a row and along a column: a row has one element more than a
tile, so that neither way two threads of a warp meet in a bank."""

MOST_SHARED = 48 << 10
"""Bytes of shared memory that every block may have. Operands beyond that are read and written as they lie."""


def _lower_tiles(region: Region, groups: list[Place], turned: int, aligned: bool) -> list[CudaLaunch]:
    """A tile per block, over loop number `turned` and the innermost one."""
    writer = region.writer()
    inner, across = writer.axis(groups[-1], "j"), writer.axis(groups[turned], "t")
    rest = [group for k, group in enumerate(groups[:-1]) if k != turned]
    counts = [-(-writer.axes.size(axis.atoms) // TILE) for axis in (inner, across)]
    columns, rows = [writer.size(name, count) for name, count in zip(("columns", "strips"), counts, strict=True)]
    outer = outer_axes(writer, rest)
    for name, text in (("x", f"thread() % {TILE}"), ("y", f"thread() // {TILE}"), ("tile", "block()"),
                       ("j0", f"tile % {columns} * {TILE}"), ("t0", f"tile // {columns} % {rows} * {TILE}")):
        writer.let(name, text)
    if outer:
        spread(writer, outer, f"tile // {columns} // {rows}")
        for axis in outer:
            writer.know(axis)
    body = writer.levels[-1].body
    loop = writer.open("s", "0", str(STEPS))
    writer.let("t", f"t0 + {DOWN}")
    writer.let("j", "j0 + x")
    inside = writer.enter(When(f"t < {across.size} and j < {inner.size}"))
    writer.know(across)
    writer.know(inner)
    store_outputs(writer, region, range(len(region.outputs)))
    writer.close(2)
    replace(body, loop, _exchanged(writer, loop, inside))
    return [finish(writer, region, prod(counts) * prod([region.axes.size(group) for group in rest]), aligned)]


def _exchanged(writer: Writer, loop: Loop, inside: When) -> list[Statement]:
    """The loop over the steps of a tile; in front of it and behind it what goes through shared memory."""
    dtypes, elements = loaded_dtypes(writer), TILE * (TILE + 1)
    turned = [s for s in inside.body if isinstance(s, Load | Store) and _is_turned(s.index)]
    turned = turned[:MOST_SHARED // (elements * max([dtypes[s.operand].itemsize for s in turned], default=1))]
    tiles = {id(s): share(writer, dtypes[s.operand], elements) for s in turned}
    before: list[Statement] = []
    behind: list[Statement] = []
    for k, s in enumerate(turned):
        if isinstance(s, Load):
            before += [s, Store(tiles[id(s)], ALONG, s.name)]
        else:
            behind += [Load(f"out{k}", tiles[id(s)], ALONG), Store(s.operand, s.index, f"out{k}")]
    inside.body[:] = [Load(s.name, tiles[id(s)], ACROSS) if isinstance(s, Load) and id(s) in tiles else
                      Store(tiles[id(s)], ACROSS, s.value) if isinstance(s, Store) and id(s) in tiles else s
                      for s in inside.body]
    made: list[Statement] = [loop]
    if before:
        made = [_turned_loop(inside.condition, before), Let("_", None, "barrier()"), *made]
    if behind:
        made += [Let("_", None, "barrier()"), _turned_loop(inside.condition, behind)]
    return made


def _is_turned(index: str) -> bool:
    return index.endswith(" + t") and is_contiguous(index, "t")


def _turned_loop(condition: str, body: list[Statement]) -> Loop:
    """The loop over the steps of a tile in which neighbouring threads go along ``t``."""
    return Loop("s", "0", str(STEPS), [Let("t", None, "t0 + x"), Let("j", None, f"j0 + {DOWN}"), When(condition, body)])


def loaded_dtypes(writer: Writer) -> dict[str, DType]:
    """By name, what the operands of a kernel are once they are loaded."""
    return {operand.name: compute_dtype(operand.dtype) for operand in (*writer.operands.values(), *writer.tables.values())}


def share(writer: Writer, dtype: DType, count: int) -> str:
    """The name of a new array of `count` elements in the memory that a block of threads shares."""
    name = f"shared{len(writer.tables)}"
    writer.tables[Buffer(-1 - len(writer.tables))] = Operand(name, dtype)
    short = "boolean" if dtype.category == "b" else dtype.short
    writer.levels[0].body.insert(0, Let(name, None, f"shared({len(writer.tables) - 1}, {short}, {count})"))
    return name


def share_dynamic(writer: Writer, dtype: DType) -> str:
    """The same for memory whose size the launch says: there can be more of it. A kernel has no other beside it."""
    writer.tables[Buffer(-1 - len(writer.tables))] = Operand("dynamic", dtype)
    writer.levels[0].body.insert(0, Let("dynamic", None, f"dynamic_shared({dtype.short})"))
    return "dynamic"
