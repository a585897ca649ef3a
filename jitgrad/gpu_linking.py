"""The last step of compiling for a GPU: nodes with memory become the entries of a plan, as `linking` does for the CPU.

In: the `Assignment` of a fused graph. Every node is lowered to launches of GPU kernels; one that has none is carried out
by NumPy in the computer's own memory: its operands are copied down, its results up. Out: a PlanSpec, whose kernels have
keys for one architecture. Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jitgrad import linking
from jitgrad.codegen.choice import answering
from jitgrad.codegen.cuda_call import GPU_ANY_TYPE, GPU_IN_PLACE
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_product import EXACT, Products
from jitgrad.codegen.kernel import BoxMap, Buffer, CudaLaunch, CudaLibraryCall, CudaLowered, ErrorWord, Table
from jitgrad.codegen.sharing import shareable_by
from jitgrad.errors import CompileError
from jitgrad.ir.graph import Graph, Node
from jitgrad.runtime.cuda.code import kernel_key
from jitgrad.runtime.spec import Argument, Boxes, Entry, LibraryCall, Output, PlanSpec, Ref
from jitgrad.transforms.memory import Assignment, Copy, Slot, Step, place_temporaries


@dataclass(frozen=True, slots=True, eq=False)
class GpuStep:
    """A node with its memory, its launches (None: NumPy carries it out), and the memory of their scratch buffers."""

    step: Step
    lowered: CudaLowered | None
    scratch: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GpuLinked:
    """All steps in order, and the size of the arena in bytes."""

    steps: tuple[GpuStep, ...]
    arena: int


def may_share(node: Node, output: int, operand: int) -> bool:
    """Whether a kernel for `node` may write that output over that operand."""
    if node.op.name in GPU_IN_PLACE:
        return output == operand == 0
    return node.op.kind in ("region", "foreach") and (output, operand) in shareable_by(node)


Choose = Callable[[Step, Products], Mapping[str, str]]
"""Answers to what a step can be lowered by, given what is allowed for it."""


def link(assignment: Assignment, arch: str, allowed: Products = EXACT, choose: Choose | None = None) -> GpuLinked:
    """Lower every step for GPUs of that architecture, with the answers that `choose` gives for it, and place all temporary
    memory. `allowed`: what may be done about products."""
    steps = []
    for position, part in enumerate(assignment.steps):
        step = linking.copy_step(part) if isinstance(part, Copy) else part
        known = replace(allowed, numbers={**allowed.numbers, **_numbers(step, assignment.constants)})
        if choose is None:
            lowered = lower_step(step, arch, known)
        else:
            with answering(choose(step, known)):
                lowered = lower_step(step, arch, known)
        scratch = lowered.scratch if lowered else ()
        steps.append(GpuStep(step, lowered, tuple([Slot("arena", 0, n, position, position) for n in scratch])))
    shared = [slot for linked in steps for slot in linked.scratch]
    return GpuLinked(tuple(steps), place_temporaries([*assignment.temporaries, *shared]))


def _numbers(step: Step, constants: bytes) -> dict[int, float]:
    """Which operands of a step are constant numbers, and their values."""
    return {k: float(np.frombuffer(constants, v.dtype.numpy, 1, slot.index)[0])
            for k, (v, slot) in enumerate(zip(step.node.inputs, step.inputs, strict=True))
            if slot.space == "constant" and v.type.size == 1 and v.dtype.is_floating_point}


def lower_step(step: Step, arch: str, allowed: Products = EXACT) -> CudaLowered | None:
    """The launches of one node; None where there is no GPU kernel."""
    node = step.node
    if node.op.name not in GPU_ANY_TYPE and any(v.dtype.is_complex for v in (*node.inputs, *node.outputs)):
        return None
    try:
        return lower_cuda(node.op, tuple([v.type for v in node.inputs]), node.attrs, step.shared, allowed=allowed, arch=arch)
    except CompileError:
        return None


def plan_spec(graph: Graph, assignment: Assignment, linked: GpuLinked, traced: Graph, arch: str) -> PlanSpec:
    """The plan of `graph` for GPUs of that architecture, as data. `traced`: the graph before all passes."""
    nodes = linking.first_nodes(traced)
    entries: list[Entry] = []
    sources: dict[str, str] = {}
    tables: list[tuple[Ref | int, ...]] = []
    for step in linked.steps:
        if step.lowered is None:
            entries.append(linking.host_entry(step.step, nodes))
            continue
        for launch in step.lowered.launches:
            if isinstance(launch, CudaLibraryCall):
                entries.append(_library_entry(step, launch, nodes.get(step.step.node.where)))
                continue
            key = kernel_key(launch.source, arch)
            sources.setdefault(key, launch.source)
            entries.append(Entry(launch.name, key, None, launch.grid, _arguments(step, launch, tables),
                                 nodes.get(step.step.node.where), launch.threads, launch.wide, dynamic=launch.dynamic))
    outputs = [Output(v.type, linking.reference(slot))
               for v, slot in zip(graph.outputs, assignment.outputs, strict=True)]
    written = tuple(sorted({position for position, _ in graph.writes}))
    return PlanSpec(tuple([v.type for v in graph.inputs]), tuple(outputs), written, assignment.constants, linked.arena,
                    tuple(entries), sources, tables=tuple(tables))


def _library_entry(step: GpuStep, launch: CudaLibraryCall, node: int | None) -> Entry:
    slots: Sequence[Slot] = (*step.step.inputs, *step.step.outputs, *step.scratch)
    call = LibraryCall(launch.asked, tuple([linking.reference(slots[buffer.index]) for buffer in launch.arguments]))
    return Entry(launch.name, None, None, 1, (), node, library=call)


def _arguments(step: GpuStep, launch: CudaLaunch, tables: list[tuple[Ref | int, ...]]) -> tuple[Argument, ...]:
    """The arguments of a launch; its tables are added to `tables`."""
    slots: Sequence[Slot] = (*step.step.inputs, *step.step.outputs, *step.scratch)

    def place(buffer: Buffer | int) -> Ref | int:
        return linking.reference(slots[buffer.index]) if isinstance(buffer, Buffer) else buffer

    def argument(given: Buffer | Table | BoxMap | ErrorWord | int) -> Argument:
        if isinstance(given, BoxMap):
            return Boxes(linking.reference(slots[given.buffer.index]), given.start, given.sizes, given.pitch, given.box)
        if isinstance(given, ErrorWord):
            return "error", 0
        if isinstance(given, Table):
            tables.append(tuple([place(e) for e in given.entries]))
            return "table", len(tables) - 1
        return place(given)

    return tuple([argument(a) for a in launch.arguments])
