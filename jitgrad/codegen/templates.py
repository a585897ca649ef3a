"""The template "map", and what all templates share: storing results, naming and finishing a kernel."""

from __future__ import annotations

from collections.abc import Iterable

from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.kernel import Launch
from jitgrad.codegen.region import Region, accesses, collapse
from jitgrad.codegen.space import make_space, open_block, open_items
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
    """Items are blocks of elements."""
    writer = region.writer()
    space = make_space(writer, collapse(region.order(), accesses(region)))
    open_items(writer)
    open_block(writer, space)
    store_outputs(writer, region, range(len(region.outputs)))
    return [finish(writer, region, space.items)]


def store_outputs(writer: Writer, region: Region, which: Iterable[int]) -> None:
    """Store these outputs at the variables of the loops that are open."""
    for k in which:
        value, index, buffer = region.outputs[k]
        writer.store(buffer, value.type, index, writer.evaluate(value, index))
    writer.flush()
