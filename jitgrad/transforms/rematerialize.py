"""Recompute or keep: fewer values wait between the forward and the backward part of a step.

In: a graph and a budget. Out: the same program, in which some values that were made early and read late are computed
again where they are read (`jitgrad.transforms.recompute`), from others that are kept. The place that divides early from
late is the one over which most bytes wait; in a training step that is the end of the forward pass.

The budget is a fraction of the bytes that wait when everything is kept. What is computed again comes in levels:

    0   operators and movement, where their results need not be in memory: it saves memory traffic, so it is done always
    1   elementwise functions and random bits (which are the same again)
    2   reductions, scans, windows, gathers: what one pass over memory computes
    3   contractions too: the forward pass becomes sections at whose borders few bytes wait, only those are kept, and a
        section is computed again when the first of its values is read (Chen et al. 2016)

The lowest level that meets the budget is taken, for as few of the first nodes as will do, and the level below for the
others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.transforms.recompute import cheapest_cut, entrance

LONGEST_CHAIN = 32
SECTIONS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ELEMENTWISE = frozenset({"elementwise", "movement", "source"})
ONE_PASS = ELEMENTWISE | {"reduction", "scan", "window", "index", "sort"}
CONTRACTIONS = ONE_PASS | {"contraction"}
_KINDS = (ELEMENTWISE, ELEMENTWISE, ONE_PASS, CONTRACTIONS)


def rematerialize(graph: Graph, budget: float) -> Graph:
    """`graph` with what it keeps between its forward and backward part reduced to `budget`, a fraction from 0 (as little
    as can be) to below 1; see the module."""
    parts = Parts(graph)
    if not parts.waiting:
        return graph
    return _computed_again(parts, set(_within(parts, budget)))


class Parts:
    """A graph in two: `early` nodes and `late` ones, and the `waiting` values, made early and read late."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.place = _fullest_place(graph)
        self.early, self.late = graph.nodes[:self.place], graph.nodes[self.place:]
        self.made_at = {v: k for k, node in enumerate(self.early) for v in node.outputs}
        read = dict.fromkeys([v for node in self.late for v in node.inputs if v in self.made_at])
        self.waiting = list(read)
        self.given = {*graph.inputs, *graph.results}

    @cached_property
    def in_memory(self) -> set[Value]:
        """Early values that late nodes other than elementwise ones and reductions read: they need them in memory."""
        found = {v for node in self.late if node.op.kind not in (*ELEMENTWISE, "reduction") for v in node.inputs}
        for node in reversed(self.graph.nodes):
            if node.op.kind == "movement" and not found.isdisjoint(node.outputs):
                found.update(node.inputs)
        return found

    @cached_property
    def price(self) -> dict[Value, int]:
        """Bytes, twice where a fused kernel would not store them anyway; what is there in any case is free."""
        price = {v: 1 for v in self.graph.inputs}
        for node in self.early:
            twice = 1 if node.op.kind not in ELEMENTWISE else 2
            price.update({v: 1 if v in self.given else twice * v.type.nbytes + 1 for v in node.outputs})
        return price

    def bytes_of(self, values: Iterable[Value]) -> int:
        """What they take, beyond inputs and results."""
        return sum(v.type.nbytes for v in values if v not in self.given)

    @cached_property
    def everything(self) -> int:
        """The bytes that wait when nothing is computed again but movement."""
        return self.bytes_of(cheapest_cut(self.graph.inputs, self.early, self.waiting, self.price,
                                          lambda node: node.op.kind in ("movement", "source") and not node.op.effects,
                                          LONGEST_CHAIN))


def _fullest_place(graph: Graph) -> int:
    """Before which node most bytes wait that were made earlier and are read at that node or later. Results of the graph
    do not count, nor what only moves: it lies where its operand does."""
    waiting = _waiting(graph.nodes, {*graph.results, *graph.inputs})
    return max(range(len(waiting)), key=waiting.__getitem__, default=0)


def _waiting(nodes: Sequence[Node], given: set[Value]) -> list[int]:
    """For every position the bytes made before it and read at it or later, without those of values that are `given`."""
    last = _last_reads(nodes)
    change = [0] * (len(nodes) + 1)
    for k, node in enumerate(nodes):
        for v in node.outputs:
            if v in last and v not in given and not node.op.view:
                change[k + 1] += v.type.nbytes
                change[last[v] + 1] -= v.type.nbytes
    return list(itertools.accumulate(change[:-1]))


def _last_reads(nodes: Sequence[Node]) -> dict[Value, int]:
    """Where each value is read last, itself or moved: a view is read where its operand lies."""
    last: dict[Value, int] = {}
    for k in reversed(range(len(nodes))):
        node = nodes[k]
        at = max([last.get(v, k) for v in node.outputs]) if node.op.view else k
        for v in node.inputs:
            last[v] = max(last.get(v, 0), at)
    return last


# ---- what is kept -------------------------------------------------------------------------------------------------


def _within(parts: Parts, budget: float) -> list[Value]:
    """The values to keep for `budget`: see the module."""
    limit = budget * parts.everything
    for level in (1, 2):
        if parts.bytes_of(_kept(parts, level, parts.place)) <= limit:
            return _least(parts, level, range(parts.place + 1), limit)
    sections = _sections(parts)
    return _least(parts, 3, sections.borders, limit, sections) if sections else _kept(parts, 2, parts.place)


def _least(parts: Parts, level: int, until: Sequence[int], limit: float, sections: Sections | None = None) -> list[Value]:
    """What is kept when `level` holds for the nodes before a position, the first of `until` with which no more than `limit`
    bytes wait (the last of them when there is none)."""
    low, high = 0, len(until) - 1
    while low < high:
        middle = (low + high) // 2
        if parts.bytes_of(_kept(parts, level, until[middle], sections)) <= limit:
            high = middle
        else:
            low = middle + 1
    return _kept(parts, level, until[low], sections)


def _kept(parts: Parts, level: int, until: int, sections: Sections | None = None) -> list[Value]:
    """The cheapest values to keep when nodes before position `until` are computed again as `level` allows, the others as
    the level below does."""

    def may_repeat(node: Node) -> bool:
        k = parts.made_at[node.outputs[0]]
        allowed = level if k < until else max(0, level - 1)
        if node.op.kind not in _KINDS[allowed] or node.op.effects & {"host", "print", "collective"}:
            return False
        if sections is not None and allowed == 3 and not sections.crossing.isdisjoint(node.outputs):
            return False
        return allowed > 0 or (_is_operator(node) and parts.in_memory.isdisjoint(node.outputs))

    longest = LONGEST_CHAIN if sections is None else len(parts.early)
    return cheapest_cut(parts.graph.inputs, parts.early, parts.waiting, parts.price, may_repeat, longest)


def _is_operator(node: Node) -> bool:
    """Costs less than to read its result from memory: movement, constants, and what is spelled with operators."""
    return not node.op.effects and (node.op.kind != "elementwise" or "{" in (node.op.spell or ""))


@dataclass(frozen=True, slots=True)
class Sections:
    """The forward pass in sections: the positions where those end that may be computed again (0: none), and the values that
    cross the end of any."""

    borders: list[int]
    crossing: set[Value]


def _sections(parts: Parts) -> Sections | None:
    """The division for which the kept values and the largest section take least memory together."""
    wait = _waiting(parts.early, parts.given)
    made = [0] * len(parts.early)
    for v in parts.waiting:
        if v not in parts.given and not parts.early[parts.made_at[v]].op.view:
            made[parts.made_at[v]] += v.type.nbytes
    whole = sum(made)
    choices = [_cut(made, wait, whole / n) for n in SECTIONS]
    cost, borders = min([(_cost(made, wait, c), c) for c in choices], key=lambda pair: pair[0])
    if cost >= whole or not borders:
        return None
    crossing: set[Value] = set()
    last = _last_reads(parts.early)
    for v, k in parts.made_at.items():
        if not parts.early[k].op.view and any(k < border <= last.get(v, -1) for border in borders):
            crossing.add(v)
    return Sections([0, *borders[:-1]], crossing)       # the last section would be computed again at once


def _cut(made: list[int], wait: list[int], target: float) -> list[int]:
    """Borders of sections of some `target` bytes each, where little waits: the best position at which a section has
    between two thirds and four thirds of them."""
    borders: list[int] = []
    inside, best = 0.0, -1
    for k, nbytes in enumerate(made):
        if inside >= target * 2 / 3 and (best < 0 or wait[k] <= wait[best]):
            best = k
        if inside > target * 4 / 3 and best >= 0:
            borders.append(best)
            inside = sum(made[best:k])
            best = -1
        inside += nbytes
    return borders


def _cost(made: list[int], wait: list[int], borders: list[int]) -> int:
    """The bytes that wait at the borders and in the largest section."""
    edges = [0, *borders, len(made)]
    return sum([wait[b] for b in borders]) + max([sum(made[a:b]) for a, b in itertools.pairwise(edges)])


# ---- the new graph -------------------------------------------------------------------------------------------------


def _computed_again(parts: Parts, kept: set[Value]) -> Graph:
    """The graph whose late nodes read nothing early but inputs, results and `kept`."""
    graph = parts.graph
    again = _Again(parts, kept)
    for node in parts.late:
        again.append(node)
    return Graph(graph.inputs, tuple(again.builder.nodes), graph.outputs, graph.name, graph.writes) if again.used else graph


class _Again:
    """Appends late nodes, and before them what they read and was not kept."""

    def __init__(self, parts: Parts, kept: set[Value]):
        self.parts = parts
        self.kept = kept
        self.producers = parts.graph.producers()
        self.builder = GraphBuilder(parts.graph.name)
        self.builder.nodes = list(parts.early)
        self.builder.count = 1 + max([v.id for v in (*parts.graph.inputs, *self.producers)], default=-1)
        self.second: dict[Value, Value] = {}            # of early values, and those that are read through barriers
        self.after: Value | None = None                 # what is there when a contraction begins
        self.used = False

    def append(self, node: Node) -> None:
        """Append a late node."""
        late = [v for v in node.inputs if v in self.producers and v not in self.parts.made_at]
        if late and node.op.kind not in (*ELEMENTWISE, "reduction"):
            self.after = late[0]                        # lies in memory; what follows the contraction may be fused to it
        after = self.after
        inputs = tuple([self._read(v, after) for v in node.inputs])
        if inputs == node.inputs:
            self.builder.nodes.append(node)
            return
        self.builder.nodes.append(Node(node.op, inputs, node.attrs, node.outputs, node.where))
        self.used = True

    def _read(self, value: Value, after: Value | None) -> Value:
        """What a late node reads for `value`."""
        if after is None or self._is_there(value):
            return value
        needed: dict[Value, None] = {}
        stack = [value]
        while stack:
            v = stack.pop()
            if v in self.second or v in needed:
                continue
            if v not in self.parts.made_at or self._has_memory(v):
                self.second[v] = entrance(v, after, self.builder, self.producers)
                continue
            needed[v] = None
            stack.extend(self.producers[v].inputs)
        for v in sorted(needed, key=lambda v: self.parts.made_at[v]):
            if v not in self.second:
                self._repeat(self.producers[v])
        return self.second[value]

    def _has_memory(self, value: Value) -> bool:
        return value in self.kept or value in self.parts.given

    def _is_there(self, value: Value) -> bool:
        """True for what is kept, was made late, or is such a value moved, which costs nothing to read."""
        while value in self.parts.made_at and not self._has_memory(value):
            node = self.producers[value]
            if not node.op.view:
                return False
            value = node.inputs[0]
        return True

    def _repeat(self, node: Node) -> None:
        self.builder.where = node.where
        results = self.builder.copy(node, tuple([self.second[v] for v in node.inputs]))
        self.second.update(zip(node.outputs, results, strict=True))
