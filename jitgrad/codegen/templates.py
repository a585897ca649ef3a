"""The template "map", and what all templates share: storing results, naming and finishing a kernel."""

from __future__ import annotations

from collections.abc import Iterable

from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.kernel import Launch
from jitgrad.codegen.region import Place, Region, accesses, collapse
from jitgrad.codegen.space import make_space, open_block, open_items, open_tiles
from jitgrad.codegen.writer import Writer
from jitgrad.ir.graph import Graph


def finish(writer: Writer, region: Region, items: int, phase: str = "") -> Launch:
    """The launch of a finished kernel."""
    kernel, arguments = writer.kernel(kernel_name(region.body) + phase)
    return Launch(kernel.name, emit(kernel), items, arguments)


def kernel_name(body: Graph) -> str:
    """``fused_sub_exp_f32``: what it computes, in order, and the type of its first result."""
    names = [node.op.name for node in body.nodes if node.op.kind not in ("movement", "source")]
    names = list(dict.fromkeys(names)) or [node.op.name for node in body.nodes][-1:] or ["copy"]
    if len(names) > 4:
        names = [*names[:3], "etc"]
    return f"fused_{'_'.join(names)}_{body.outputs[0].dtype.short}"


def lower_map(region: Region) -> list[Launch]:
    """Items are blocks of elements; strips of tiles where an operand is transposed."""
    runs = accesses(region)
    groups = collapse(region.order(), runs)
    turned = turned_group(groups, runs)
    writer = region.writer()
    open_items(writer)
    if turned is None:
        space = make_space(writer, groups)
        open_block(writer, space)
        items = space.items
    else:
        items = open_tiles(writer, groups, turned)
    store_outputs(writer, region, range(len(region.outputs)))
    return [finish(writer, region, items)]


def turned_group(groups: list[Place], runs: list[tuple[Place, ...]]) -> int | None:
    """The number of a loop, not the innermost, along which some operand lies in memory; None when there is none."""
    for access in runs:
        last = next((run[-1] for run in reversed(access) if run), None)
        for k, group in enumerate(groups[:-1]):
            if last in group and any(a in run for run in access for a in groups[-1]):
                return k
    return None


def store_outputs(writer: Writer, region: Region, which: Iterable[int]) -> None:
    """Store these outputs at the variables of the loops that are open."""
    for k in which:
        value, index, buffer = region.outputs[k]
        writer.store(buffer, value.type, index, writer.evaluate(value, index))
    writer.flush()
