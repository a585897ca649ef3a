"""The last step of compiling: nodes with memory become the entries of a plan.

In: the `Assignment` of a fused graph (`jitgrad.transforms.memory`). Every node is lowered to launches of kernels, or
becomes a host entry when there is no kernel for it; slots become places in the arena, in inputs, outputs and constants.
Out: `LinkedStep`s and what runs when (`jitgrad.transforms.schedule`), from which `plan_spec` makes the PlanSpec. Nothing is
compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from jitgrad.codegen import library, library_recurrence, lower as regions
from jitgrad.codegen.call import IN_PLACE
from jitgrad.codegen.choice import answering
from jitgrad.codegen.kernel import Buffer, Function, Launch, Lowered, Private
from jitgrad.codegen.sharing import shareable_by
from jitgrad.dtypes import int16, int32, int64, uint8
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Where, attrs_key
from jitgrad.ir.types import TensorType
from jitgrad.ops.region import region
from jitgrad.ops.work import flops
from jitgrad.runtime.build import kernel_key
from jitgrad.runtime.spec import Argument, Entry, HostCall, Output, PlanSpec, Ref
from jitgrad.transforms.memory import ALIGNMENT, Assignment, Copy, Slot, Step, has_effects, place_temporaries
from jitgrad.transforms.schedule import Group, Task, schedule

LOWERED_IN_MEMORY = 512
SPREAD = 1 << 20                                        # bytes; up to here memory need not be used again
NS_PER_OPERATION, NS_PER_BYTE = 0.015, 0.05             # of a usual kernel on one thread, to see which ones are small
Choose = Callable[[Step], Mapping[str, str]]            # answers to what a step can be lowered by (`codegen.choice`)
_WORDS = {1: uint8, 2: int16, 4: int32, 8: int64}


@dataclass(frozen=True, slots=True, eq=False)
class LinkedStep:
    """A node with its memory, its launches (None: NumPy carries it out), and the memory of their scratch buffers."""

    step: Step
    lowered: Lowered | None
    scratch: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What becomes an entry: one launch of a step, or NumPy's call (then `launch` is None), into how many pieces it is cut
    beside others, and the memory that each thread has of its own for it, by the numbers that it has in the launch."""

    step: LinkedStep
    launch: Launch | None
    pieces: int = 1
    private: Mapping[int, Slot] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Linked:
    """All steps in the order of the program, the size of the arena in bytes, the bytes that each thread has beside it, and
    what runs when: groups of what runs side by side, one after the other."""

    steps: tuple[LinkedStep, ...]
    arena: int
    private: int
    turns: tuple[tuple[Turn, ...], ...]


def may_share(node: Node, output: int, operand: int) -> bool:
    """Whether a kernel for `node` may write that output over that operand."""
    best = best_in_place(node)
    return (output, operand) == best if best else (output, operand) in shareable_by(node)


def best_in_place(node: Node) -> tuple[int, int] | None:
    """The output of which the kernel for `node` saves work if it lies in the memory of an operand, and that operand."""
    if node.op is region and node.attrs["template"] == "recurrence":
        return library_recurrence.best_in_place(node.attrs["body"])
    pair = IN_PLACE.get(node.op.name)
    return pair if pair and not any([v.dtype.is_complex for v in node.outputs]) else None


def link(assignment: Assignment, choose: Choose | None = None) -> Linked:
    """Lower every step, with the answers that `choose` gives for it, and place all temporary memory."""
    steps = []
    for position, part in enumerate(assignment.steps):
        step = copy_step(part) if isinstance(part, Copy) else part
        lowered = lower_once(step, choose(step) if choose else {})
        scratch = lowered.scratch if lowered else ()
        steps.append(LinkedStep(step, lowered, tuple([Slot("arena", 0, n, position, position) for n in scratch])))
    shared = [slot for linked in steps for slot in linked.scratch]
    turns, tasks = list[Turn](), list[Task]()
    for linked in steps:
        operations = flops(linked.step.node)
        for launch in linked.lowered.launches if linked.lowered else [None]:
            turns.append(Turn(linked, launch))
            tasks.append(task(turns[-1], operations))
    arena, groups = place_and_schedule([*assignment.temporaries, *shared], tasks)
    order = [place_private([replace(turns[number], pieces=pieces) for number, pieces in group]) for group in groups]
    most = max([aligned(slot.index + slot.nbytes) for group in order for turn in group for slot in turn.private.values()],
               default=0)
    return Linked(tuple(steps), arena, most, tuple(order))


def place_and_schedule(slots: Sequence[Slot], tasks: Sequence[Task]) -> tuple[int, tuple[Group, ...]]:
    """Place `slots`; the size of the arena, and what runs side by side in it. Memory that is used again keeps the next user
    waiting: where it is little, each slot has its own, if more runs side by side then."""
    arena = place_temporaries(slots)
    groups = schedule(tasks)
    apart = sum(aligned(slot.nbytes) for slot in slots)
    if arena < apart <= SPREAD:
        for slot, place in zip(slots, accumulate([aligned(slot.nbytes) for slot in slots], initial=0), strict=False):
            slot.index = place
        spread = schedule(tasks)
        if len(spread) < len(groups):
            return apart, spread
        place_temporaries(slots)
    return arena, groups


def task(turn: Turn, operations: int) -> Task:
    """What the schedule has to know of a launch of a step with so many `operations`. Host calls, and what may fail, keep
    their place."""
    step, launch = turn.step.step, turn.launch
    if launch is None or turn.step.lowered is None or has_effects(step.node):
        return Task((), (), 1, 0.0, barrier=True)
    slots = (*step.inputs, *step.outputs, *turn.step.scratch)
    used = [slots[k] for k in {a.index: None for a in launch.arguments if isinstance(a, Buffer)}]
    written = {slot: None for slot in (*step.outputs, *turn.step.scratch)}
    work = NS_PER_OPERATION * operations / len(turn.step.lowered.launches) + NS_PER_BYTE * sum(s.nbytes for s in used)
    return Task(tuple([slot for slot in used if slot not in written]), tuple([slot for slot in used if slot in written]),
                launch.items, work)


def place_private(group: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns of a group with private memory, one behind the other: they run side by side, one thread in this of them and
    another in that. No other group needs it at that time."""
    placed, place = list[Turn](), 0
    for turn in group:
        private = dict[int, Slot]()
        if turn.launch and turn.step.lowered:
            for k in dict.fromkeys([a.index for a in turn.launch.arguments if isinstance(a, Private)]):
                private[k] = Slot("private", place, turn.step.lowered.private[k])
                place += aligned(private[k].nbytes)
        placed.append(replace(turn, private=private))
    return tuple(placed)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to whole lines of the cache."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lower_once(step: Step, answers: Mapping[str, str]) -> Lowered | None:
    """`lower_step`, but steps that are lowered alike are lowered once, also those of several programs: an optimizer's
    step is the same for every size of a batch."""
    key = step_key(step), step.node.where, tuple(sorted(answers.items()))
    try:
        return _lowered[key]
    except KeyError:
        if len(_lowered) >= LOWERED_IN_MEMORY:
            _lowered.clear()
        with answering(answers):
            lowered = _lowered[key] = lower_step(step)
        return lowered


_lowered: dict[tuple[Any, ...], Lowered | None] = {}


def step_key(step: Step) -> tuple[Any, ...]:
    """Equal for steps that are lowered alike."""
    return step.node.op.name, tuple([v.type for v in step.node.inputs]), attrs_key(step.node.attrs), step.shared


def lower_step(step: Step) -> Lowered | None:
    """The launches of one node; None when it becomes a host entry, as all of complex numbers do."""
    node = step.node
    types = tuple([v.type for v in node.inputs])
    if any(v.dtype.is_complex for v in (*node.inputs, *node.outputs)):
        return None
    lower = regions.lower if node.op.kind in ("region", "foreach") else library.lower
    return lower(node.op, types, node.attrs, step.shared, node.where)


def copy_step(copy: Copy) -> Step:
    """A copy as a region that computes nothing, over a flat array of integers: one kernel per width."""
    builder = GraphBuilder("copy")
    word = _WORDS[min(copy.type.dtype.itemsize, 8)]
    x = builder.input(TensorType(word, (copy.type.nbytes // word.itemsize,)))
    body = builder.build([x])
    outer = GraphBuilder("copy")
    source = outer.input(x.type)
    outer.run(region, (source,), {"body": body, "template": "map"})
    return Step(outer.nodes[-1], (copy.source,), (copy.target,))


def plan_spec(graph: Graph, assignment: Assignment, linked: Linked, traced: Graph) -> PlanSpec:
    """The plan of `graph` as data. `traced`: the graph before all passes, whose nodes know the user's lines."""
    nodes = first_nodes(traced)
    entries: list[Entry] = []
    sources: dict[str, str] = {}
    for number, group in enumerate(linked.turns, 1):
        for turn in group:
            step, launch = turn.step, turn.launch
            if launch is None:
                entries.append(host_entry(step.step, nodes))
                continue
            for text in kernel_texts(launch):
                sources.setdefault(kernel_key(text), text)
            entries.append(Entry(launch.name, kernel_key(launch.source), None, launch.items,
                                 launch_arguments(turn, launch), nodes.get(step.step.node.where),
                                 group=number if len(group) > 1 else 0, pieces=turn.pieces))
    outputs = [Output(v.type, reference(slot)) for v, slot in zip(graph.outputs, assignment.outputs, strict=True)]
    written = tuple(sorted({position for position, _ in graph.writes}))
    return PlanSpec(tuple([v.type for v in graph.inputs]), tuple(outputs), written, assignment.constants,
                    linked.arena, tuple(entries), sources, linked.private)


def first_nodes(graph: Graph) -> dict[Where, int]:
    """For every line of the user's the position of the first node that was recorded there."""
    lines = [node.where for node in graph.nodes]
    return {where: k for k, where in reversed(list(enumerate(lines))) if where is not None}


def kernel_texts(launch: Launch) -> list[str]:
    """The text of the kernel, and of those that it calls."""
    return [launch.source, *[a.source for a in launch.arguments if isinstance(a, Function)]]


def launch_arguments(turn: Turn, launch: Launch) -> tuple[Argument, ...]:
    """The arguments of a launch: buffers as places (inputs, then outputs, then scratch), kernels by their keys."""
    slots: Sequence[Slot] = (*turn.step.step.inputs, *turn.step.step.outputs, *turn.step.scratch)

    def argument(given: Buffer | Private | Function | int) -> Argument:
        if isinstance(given, Buffer):
            return reference(slots[given.index])
        if isinstance(given, Private):
            return reference(turn.private[given.index])
        return kernel_key(given.source) if isinstance(given, Function) else given

    return tuple([argument(a) for a in launch.arguments])


def host_entry(step: Step, nodes: Mapping[Where, int]) -> Entry:
    """A call of the op's NumPy form. `nodes`: `first_nodes` of the graph as traced."""
    node = step.node
    inputs = tuple([(reference(slot), v.type) for slot, v in zip(step.inputs, node.inputs, strict=True)])
    outputs = tuple([(reference(slot), v.type) for slot, v in zip(step.outputs, node.outputs, strict=True)])
    return Entry(node.op.name, None, HostCall(node.op.name, dict(node.attrs), inputs, outputs), 1, (), nodes.get(node.where))


def reference(slot: Slot) -> Ref:
    return slot.space, slot.index
