"""Groups of nodes that are to become one kernel each, and the questions that fusion asks about them.

Fusion walks a graph from its end to its beginning, so a group knows at which index it demands each value before the
node that makes it is seen. `Groups` keeps which group depends on which, so that no fusion makes a cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from jitgrad.ir.axes import Axes, Demands, Index, source_index
from jitgrad.ir.graph import Node, Value

Place = tuple[int, ...]

MERGEABLE = {("map", "map"): "map", ("map", "row"): "row", ("row", "map"): "row", ("row", "row"): "row",
             ("map", "full"): "full", ("full", "map"): "full", ("full", "full"): "full",
             ("map", "column"): "column", ("column", "map"): "column", ("column", "column"): "column"}
"""The template of two groups together."""

LARGEST = 400
"""Nodes of one group: a limit on the time that one kernel takes to compile."""


@dataclass(eq=False)
class Group:
    """`template` is that of the region, or "single" for a primitive that stays alone. `reduced`: its reduced loops.
    `made`: the values that this group is the place of; movement ops in between are copied into every group.
    `opaque`: moved values that this group has to read from memory.
    `claim`: the number of the contraction whose epilogue this is. `taint`: those that it depends on from outside."""

    number: int
    template: str
    demands: Demands
    nodes: dict[Node, None] = field(default_factory=dict)
    made: dict[Value, None] = field(default_factory=dict)
    opaque: set[Value] = field(default_factory=set)
    reduced: Place = ()
    claim: int | None = None
    taint: int = 0
    before: set[int] = field(default_factory=set)
    after: set[int] = field(default_factory=set)
    members: int = 0
    descendants: int = 0

    @property
    def axes(self) -> Axes:
        return self.demands.axes

    @property
    def space(self) -> frozenset[int]:
        return self.demands.space()

    @property
    def kept(self) -> frozenset[int]:
        """The loops that are not reduced."""
        return self.space.difference(self.axes.resolve(self.reduced))

    def place(self, index: Index) -> frozenset[int]:
        return frozenset(self.axes.flat(index))


class Groups:
    """All groups of a graph in the making."""

    def __init__(self, producers: dict[Value, Node]):
        self.axes = Axes()
        self.producers = producers
        self.all: list[Group] = []
        self.merged_into: list[int] = []
        self.readers: dict[Value, list[int]] = {}       # groups that read a value made elsewhere

    def place(self, node: Node, group: Group) -> None:
        """`node` becomes part of `group`, which is the place of its results."""
        group.nodes[node] = None
        group.made.update(dict.fromkeys(node.outputs))

    def new(self, template: str, claim: int | None = None) -> Group:
        number = len(self.all)
        group = Group(number, template, Demands(self.axes), claim=claim, members=1 << number)
        self.all.append(group)
        self.merged_into.append(number)
        return group

    def find(self, number: int) -> Group:
        while self.merged_into[number] != number:
            self.merged_into[number] = self.merged_into[self.merged_into[number]]
            number = self.merged_into[number]
        return self.all[number]

    def living(self) -> list[Group]:
        return [group for group in self.all if self.merged_into[group.number] == group.number]

    def readers_of(self, value: Value) -> list[Group]:
        """The groups that read `value`, the earliest in the program first."""
        numbers = self.readers.get(value, ())
        if not numbers:
            return []
        if len(numbers) == 1:
            return [self.find(numbers[0])]
        found = {group.number: group for group in map(self.find, numbers)}
        return [found[k] for k in sorted(found, reverse=True)]

    # ---- what a group reads

    def demand(self, group: Group, value: Value, index: Index) -> None:
        """`group` reads `value` at `index`: movement ops are followed to what they read, as far as they are affine."""
        stack = [(value, index)]
        while stack:
            value, index = stack.pop()
            if not group.demands.add(value, index):
                continue
            node = self.producers.get(value)
            source = self._source(group, node, value, index) if node and node.op.kind == "movement" else None
            if node is None or source is None:
                self.readers.setdefault(value, []).append(group.number)
            else:
                group.nodes[node] = None
                stack.append((node.inputs[0], source))

    def _source(self, group: Group, node: Node, value: Value, index: Index) -> Index | None:
        """Where `node` reads for `group`; None, once and for all, when that is no affine place at some index."""
        source = None if value in group.opaque else source_index(self.axes, node, index)
        if source is None:
            group.opaque.add(value)
            group.nodes.pop(node, None)
        return source

    # ---- order

    def reaches(self, first: Group, last: Group) -> bool:
        """True when `last` needs something that `first` computes, perhaps through others."""
        return bool(first.descendants & last.members)

    def add_edge(self, first: Group, last: Group) -> None:
        """`last` reads what `first` computes."""
        if first is not last:
            first.after.add(last.number)
            last.before.add(first.number)
            self._extend(first, last.descendants | last.members)

    def _extend(self, group: Group, descendants: int) -> None:
        stack = [group]
        while stack:
            group = stack.pop()
            if group.descendants | descendants != group.descendants:
                group.descendants |= descendants
                stack.extend(map(self.find, group.before))

    def has_detour(self, first: Group, last: Group) -> bool:
        """True when something outside of both must run between them."""
        middle = [g for g in map(self.find, first.after) if g is not last and g is not first]
        return any([self.reaches(g, last) for g in middle])

    def can_precede(self, group: Group, others: Iterable[Group]) -> bool:
        """True when `others` may read a new result of `group`."""
        return not any([self.reaches(other, group) for other in others])

    # ---- merging

    def merge(self, a: Group, b: Group) -> bool:
        """Make `a` and `b` one group (`a`) when a kernel can hold both; otherwise change nothing."""
        template = MERGEABLE.get((a.template, b.template))
        if template is None or a.claim != b.claim or len(a.nodes) + len(b.nodes) > LARGEST:
            return False
        if self.has_detour(a, b) or self.has_detour(b, a):
            return False
        if template in ("full", "column") and any(x.reduced and self.reaches(x, y) for x, y in ((a, b), (b, a))):
            return False
        mark = self.axes.mark()
        if not self._unify(a, b, template):
            self.axes.undo(mark)
            return False
        self._join(a, b, template)
        return True

    def _unify(self, a: Group, b: Group, template: str) -> bool:
        """Make the loops of both groups the same, by the values that both demand."""
        for value, indices in b.demands.of.items():
            known = a.demands.of.get(value)
            if known is not None and not (len(known) == len(indices) == 1
                                          and self.axes.unify(known[0], indices[0])):
                return False
        if a.reduced and b.reduced and not self.axes.unify_atoms(a.reduced, b.reduced):
            return False
        return self._is_consistent(a, b) and self._spaces_fit(a, b, template)

    def _is_consistent(self, a: Group, b: Group) -> bool:
        flats = map(self.axes.resolve, chain(a.demands.places, b.demands.places))
        return all(len(set(flat)) == len(flat) for flat in flats)

    def _spaces_fit(self, a: Group, b: Group, template: str) -> bool:
        if a.space == b.space:
            return a.kept == b.kept or not (a.reduced and b.reduced)
        if template != "row" or (a.reduced and b.reduced):
            return False
        row, other = (a, b) if a.reduced else (b, a)
        return other.space == row.kept

    def _join(self, a: Group, b: Group, template: str) -> None:
        a.template, a.reduced, a.taint = template, a.reduced or b.reduced, a.taint | b.taint
        a.nodes.update(b.nodes)
        a.made.update(b.made)
        a.opaque.update(b.opaque)
        for value in a.opaque:
            a.nodes.pop(self.producers[value], None)
        for value, indices in b.demands.of.items():
            known = a.demands.of.setdefault(value, [])
            known.extend([i for i in indices if not any(self.axes.same(i, k) for k in known)])
        a.demands.places.update(b.demands.places)
        a.demands.reads.update(b.demands.reads)
        self.merged_into[b.number] = a.number
        a.members |= b.members
        for others, mine in ((b.before, a.before), (b.after, a.after)):
            mine.update(others)
        for group in (a, b):
            group.before -= {a.number, b.number}
            group.after -= {a.number, b.number}
        a.descendants = (a.descendants | b.descendants) & ~a.members
        for group in map(self.find, a.before):          # those of either one are now before what comes after the other
            self._extend(group, a.descendants | a.members)
