"""Memory planning: which memory every value of a graph lives in, decided before anything is lowered.

In: a Graph of regions and primitives, in the order in which they will run. Out: `Assignment`, a list of steps (nodes,
and copies at the end) over `Slot`s. A slot is memory of an input, of an output, of the constants, or a temporary one;
`place_temporaries` then gives temporary slots their offsets in the arena, reusing what is no longer read.

An output has memory of its own, always. An input that the graph writes is updated in place when nobody needs its old
contents any more, nothing that may still fail comes later, and the node that makes the new contents reads the old ones
only where it writes (`shared` says which operand that is). Otherwise the new contents are copied in at the very end. A
temporary result takes over the memory of an operand in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jitgrad.ir.graph import Graph, Node, Value, inner_graphs
from jitgrad.ir.types import TensorType

ALIGNMENT = 64
WORTH_TAKING_OVER = 1 << 16         # bytes; for less no kernel is made that reads and writes one memory
_RANDOM = frozenset({"random"})
_IN_PASSING = frozenset({"map", "row", "column"})       # templates of regions that need no memory beside their operands'

MayShare = Callable[[Node, int, int], bool]
"""(node, output, operand): may the kernel write that output over that operand?"""


@dataclass(eq=False, slots=True)
class Slot:
    """`space` is input, output, constant or arena; `index` its number there: for constants the byte offset, for the
    arena too once it is placed. `first` … `last` are the steps between which an arena slot is in use."""

    space: str
    index: int
    nbytes: int
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One node and its memory. `shared`: pairs (output, operand) that are one slot."""

    node: Node
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """The contents of `source` to `target`."""

    type: TensorType
    source: Slot
    target: Slot


@dataclass(slots=True)
class Assignment:
    """`outputs`: for each output of the graph its slot, which is an input's when that very input is returned and an
    earlier output's when the two are one value of the program."""

    steps: list[Step | Copy] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    temporaries: list[Slot] = field(default_factory=list)
    constants: bytes = b""


def assign_memory(graph: Graph, identities: Sequence[tuple[str, int] | None], may_share: MayShare,
                  best_in_place: Callable[[Node], tuple[int, int] | None] = lambda node: None) -> Assignment:
    """See the module's text. `identities` are the outputs' in the program as traced, by `output_identities`.
    `best_in_place` tells of nodes that had best make an output in the memory of an operand."""
    planner = _Planner(graph, identities, may_share)
    wanted = [(node, best_in_place(node)) for node in reversed(planner.nodes)]
    return planner.run([(node, *pair) for node, pair in wanted if pair is not None])


def output_identities(graph: Graph) -> tuple[tuple[str, int] | None, ...]:
    """For each output ("input", k) when it is that input returned, ("output", k) when it is an earlier output again,
    None when it is a value of its own. To be asked before passes make equal what the program kept apart."""
    written = {position for position, _ in graph.writes}
    known: dict[Value, tuple[str, int]] = {v: ("input", k) for k, v in enumerate(graph.inputs) if k not in written}
    found = []
    for k, v in enumerate(graph.outputs):
        found.append(known.get(v))
        known.setdefault(v, ("output", k))
    return tuple(found)


class _Planner:
    """The state of one assignment. A value's *root* is the value whose memory it is: reshape and barrier move
    nothing."""

    def __init__(self, graph: Graph, identities: Sequence[tuple[str, int] | None], may_share: MayShare):
        self.graph = graph
        self.identities = identities
        self.may_share = may_share
        self.root: dict[Value, Value] = {}
        self.slots: dict[Value, Slot] = {}                  # by root
        self.made_at: dict[Value, int] = {}
        self.number: dict[Value, int] = {}                  # which output of its node a value is
        self.operands: dict[tuple[int, Value], list[int]] = {}  # where a node, by position, takes a root
        self.read_at: dict[Value, list[int]] = {}           # by root, ascending
        self.assignment = Assignment()
        self.nodes = [n for n in graph.nodes if not n.op.alias and n.op.name != "constant"]
        self.last_failure = last_failure(self.nodes)
        self.end = len(self.nodes)

    def run(self, updates: Sequence[tuple[Node, int, int]]) -> Assignment:
        """`updates`: nodes and which of their outputs had best lie in the memory of which operand, the last one first."""
        self._find_roots()
        self._place_constants()
        self._look_at_nodes()
        copies = self._place_outputs()
        writes = self._place_writes()
        for node, output, operand in updates:
            self._join(node.outputs[output], self.root[node.inputs[operand]])
        for position, node in enumerate(self.nodes):
            self.assignment.steps.append(self._step(node, position))
        self.assignment.steps += copies + self._final_writes(writes)
        self._set_lifetimes()
        return self.assignment

    def _find_roots(self) -> None:
        for k, v in enumerate(self.graph.inputs):
            self.root[v] = v
            self.slots[v] = Slot("input", k, v.type.nbytes)
        for node in self.graph.nodes:
            for v in node.outputs:
                self.root[v] = self.root[node.inputs[0]] if node.op.alias else v

    def _place_constants(self) -> None:
        """All constants in one block; equal ones share their place."""
        block, known = bytearray(), dict[tuple[str, bytes], int]()
        for node in self.graph.nodes:
            if node.op.name == "constant":
                data = np.asarray(node.op.eager(**node.attrs)).tobytes()
                content = node.output.dtype.short, data
                if content not in known:
                    known[content] = len(block)
                    block += data.ljust(_round_up(len(data), 16), b"\0")
                self.slots[node.output] = Slot("constant", known[content], len(data))
        self.assignment.constants = bytes(block)

    def _look_at_nodes(self) -> None:
        for position, node in enumerate(self.nodes):
            for j in read_operands(node):
                root = self.root[node.inputs[j]]
                self.read_at.setdefault(root, []).append(position)
                self.operands.setdefault((position, root), []).append(j)
            for j, v in enumerate(node.outputs):
                self.made_at[v], self.number[v] = position, j

    def _place_outputs(self) -> list[Step | Copy]:
        """A slot for every output; copies for those whose value lies elsewhere."""
        copies: list[Step | Copy] = []
        for k, (v, identity) in enumerate(zip(self.graph.outputs, self.identities, strict=True)):
            if identity is not None:
                space, index = identity
                self.assignment.outputs.append(
                    self.slots[self.graph.inputs[index]] if space == "input" else self.assignment.outputs[index])
                continue
            slot = Slot("output", k, v.type.nbytes)
            self.assignment.outputs.append(slot)
            root = self.root[v]
            if root in self.slots:
                copies.append(Copy(v.type, self.slots[root], slot))
                self.read_at.setdefault(root, []).append(self.end)
            else:
                self.slots[root] = slot
        return copies

    def _place_writes(self) -> list[tuple[Slot, Value]]:
        """New contents into their input's memory where possible; the (input's slot, value) pairs that remain."""
        for k, v in self.graph.writes:
            if self.root[v] in self.slots and self.root[v] is not self.graph.inputs[k]:
                self.read_at.setdefault(self.root[v], []).append(self.end)
        remaining = []
        for k, v in self.graph.writes:
            target, root = self.slots[self.graph.inputs[k]], self.root[v]
            if root not in self.slots and self._can_update(self.graph.inputs[k], root):
                self.slots[root] = target
            elif root is not self.graph.inputs[k]:
                remaining.append((target, v))
                self.read_at.setdefault(root, []).append(self.end)
        return remaining

    def _can_update(self, old: Value, new: Value) -> bool:
        """May the node that makes `new` put it over the contents of the input `old`?"""
        position = self.made_at[new]
        reads = self.read_at.get(old, [])
        if self.last_failure >= position or (reads and reads[-1] > position):
            return False
        operands = self.operands.get((position, old), [])
        if not operands:
            return True
        return len(operands) == 1 and self.may_share(self.nodes[position], self.number[new], operands[0])

    def _join(self, output: Value, operand: Value) -> None:
        """Make the operand in the memory of the output, when the node of that is the last that reads it."""
        position = self.made_at[output]
        readers = self.read_at[operand]
        if operand in self.slots or readers[-1] != position or readers.count(position) > 1:
            return
        if output not in self.slots:
            self.slots[output] = self._temporary(output.type.nbytes, position)
        if self.slots[output].space in ("arena", "output"):
            self.slots[operand] = self.slots[output]

    def _step(self, node: Node, position: int) -> Step:
        inputs = tuple([self.slots[self.root[v]] for v in node.inputs])
        outputs = []
        for k, v in enumerate(node.outputs):
            if v not in self.slots:
                self.slots[v] = self._taken_over(k, node, position) or self._temporary(v.type.nbytes, position)
            outputs.append(self.slots[v])
        first = {inputs[j]: j for j in reversed(read_operands(node))}
        shared = tuple([(i, first[slot]) for i, slot in enumerate(outputs) if slot in first])
        return Step(node, inputs, tuple(outputs), shared)

    def _taken_over(self, output: int, node: Node, position: int) -> Slot | None:
        """The temporary memory of an operand that nobody reads again, where the node may write this output over it."""
        nbytes = node.outputs[output].type.nbytes
        if nbytes < WORTH_TAKING_OVER or node.op.kind != "region" or node.attrs["template"] not in _IN_PASSING:
            return None
        taken = [self.slots.get(v) for v in node.outputs]
        for j in read_operands(node):
            root = self.root[node.inputs[j]]
            slot, readers = self.slots[root], self.read_at[root]
            if slot.space == "arena" and slot.nbytes == nbytes and slot not in taken and readers[-1] == position and (
                    readers.count(position) == 1 and self.may_share(node, output, j)):
                return slot
        return None

    def _temporary(self, nbytes: int, first: int) -> Slot:
        slot = Slot("arena", 0, nbytes, first, first)
        self.assignment.temporaries.append(slot)
        return slot

    def _final_writes(self, writes: list[tuple[Slot, Value]]) -> list[Step | Copy]:
        """Copies into written inputs, last of all. What one of them overwrites and another one reads is saved first."""
        overwritten = {target for target, _ in writes}
        saves: list[Step | Copy] = []
        copies: list[Step | Copy] = []
        for target, v in writes:
            source = self.slots[self.root[v]]
            if source in overwritten:
                saved = self._temporary(v.type.nbytes, self.end)
                saves.append(Copy(v.type, source, saved))
                source = saved
            copies.append(Copy(v.type, source, target))
        return saves + copies

    def _set_lifetimes(self) -> None:
        for position, step in enumerate(self.assignment.steps):
            used = ((*[step.inputs[j] for j in read_operands(step.node)], *step.outputs) if isinstance(step, Step)
                    else (step.source, step.target))
            for slot in used:
                slot.last = max(slot.last, position)
                if slot.space == "arena":
                    slot.first = min(slot.first, position)


def read_operands(node: Node) -> Sequence[int]:
    """The operands that a kernel for `node` looks at; of the others nothing but the type matters (`Op.unread`)."""
    everything = range(len(node.inputs))
    if node.op.kind != "region":
        return [j for j in everything if j not in node.op.unread] if node.op.unread else everything
    body: Graph = node.attrs["body"]
    if not any([n.op.unread for n in body.nodes]):
        return everything
    read = {*body.outputs, *[n.inputs[j] for n in body.nodes for j in read_operands(n)]}
    return [j for j, v in enumerate(body.inputs) if v in read]


def last_failure(nodes: Sequence[Node]) -> int:
    """The position of the last node that may fail, or whose effects are to be seen; -1 when there is none. An index that
    has been looked up before, along an axis of that length, is known to be in range."""
    last, checked = -1, set[tuple[Value, int]]()
    for position, node in enumerate(nodes):
        if node.op.kind == "index" and "axis" in node.attrs and len(node.inputs) > 1:
            place = node.inputs[1], node.inputs[0].shape[node.attrs["axis"]]
            if place in checked:
                continue
            if node.outputs[0].type.size:               # an empty result may have taken no look
                checked.add(place)
        if has_effects(node):
            last = position
    return last


def has_effects(node: Node) -> bool:
    """The node, or one inside of it, has an effect that comes before later writes: it may fail, or leave jitgrad."""
    return not (node.op.effects <= _RANDOM and all([graph.effects <= _RANDOM for _, graph in inner_graphs(node)]))


# ---- the arena --------------------------------------------------------------------------------------------------


def place_temporaries(slots: Sequence[Slot]) -> int:
    """Give every slot its offset, so that no two in use at one step overlap; the size of the arena in bytes. Those that
    take the most bytes for the most steps come first, each into the smallest gap that holds it between those that are in
    use with it; offsets and sizes are multiples of `ALIGNMENT`."""
    top, table = 0, np.zeros((4, len(slots)), np.int64)      # of the placed, from the lowest: offset, end, first, last step
    for count, slot in enumerate(sorted(slots, key=lambda s: -s.nbytes * (s.last - s.first + 1))):
        size = _round_up(max(slot.nbytes, 1), ALIGNMENT)
        offsets, ends, first, last = table[:, :count]
        meanwhile = (first <= slot.last) & (last >= slot.first)
        free = np.maximum.accumulate(np.append(0, ends[meanwhile]))          # what is below ends here, and so at the top
        gaps = offsets[meanwhile] - free[:-1]
        fitting = np.flatnonzero(gaps >= size)
        slot.index = int(free[fitting[gaps[fitting].argmin()] if len(fitting) else -1])
        place = int(offsets.searchsorted(slot.index))
        table[:, place + 1:count + 1] = table[:, place:count]
        table[:, place] = slot.index, slot.index + size, slot.first, slot.last
        top = max(top, slot.index + size)
    return top


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
