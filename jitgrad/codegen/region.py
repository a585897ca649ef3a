"""A fused region, ready for code generation: its body, where each value is demanded, and which memory holds what.

What goes in: the body of a `region` node and the (output, input) pairs that share memory. What comes out: `Region`, and
from an order of loops the fewest `Axis` that run along them: neighbours that are neighbours in every operand collapse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jitgrad.codegen.kernel import Buffer
from jitgrad.codegen.writer import Writer
from jitgrad.ir.axes import Axes, Demands, Index, Strided, atoms_of, is_plain
from jitgrad.ir.graph import Graph, Node, Value

BLOCK = 8192
"""Elements of one work item."""

Place = tuple[int, ...]


@dataclass
class Region:
    """`reduced`: the loops that reductions run along. `scratch`: sizes in bytes of memory between phases."""

    body: Graph
    demands: Demands
    producers: dict[Value, Node]
    buffers: dict[Value, Buffer]
    outputs: list[tuple[Value, Index, Buffer]]
    reductions: list[Node]
    reduced: Place
    scratch: list[int]

    @property
    def axes(self) -> Axes:
        return self.demands.axes

    def writer(self) -> Writer:
        return Writer(self.axes, self.producers, self.buffers)

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(max(nbytes, 8))
        return Buffer(len(self.body.inputs) + len(self.body.outputs) + len(self.scratch) - 1)

    def index_of(self, value: Value) -> Index:
        """Where a computed value is demanded."""
        index = self.demands.only(value)
        assert index is not None, f"%{value.id} is demanded at several places"
        return index

    def order(self) -> Place:
        """All loops, outermost first: as a full result lies in memory, otherwise as a full operand does."""
        count = len(self.demands.space())
        places = [self.axes.flat(index) for _, index, _ in self.outputs]
        places += [self.axes.flat(index) for v in self.body.inputs for index in self.demands.of.get(v, [])]
        return next((p for p in places if len(p) == count), None) or self.demands.full_order()


def analyse(body: Graph, shared: Sequence[tuple[int, int]]) -> Region:
    """The region of `body`; output i lies in the memory of input j for each pair (i, j) of `shared`."""
    demands = Demands(Axes())
    seeds = [demands.axes.fresh_index(v.shape) for v in body.outputs]
    for v, seed in zip(body.outputs, seeds, strict=True):
        demands.add(v, seed)
    reduced: Place = ()
    for node in reversed(body.nodes):
        for index in [i for v in node.outputs for i in demands.of.get(v, [])]:
            new = demands.take_node(node, index)
            if node.op.kind == "reduction":
                reduced = _join(demands, reduced, new)
    outputs = [(v, seed, _output_buffer(body, k, shared))
               for k, (v, seed) in enumerate(zip(body.outputs, seeds, strict=True))]
    return Region(body, demands, body.producers(), {v: Buffer(k) for k, v in enumerate(body.inputs)}, outputs,
                  [n for n in body.nodes if n.op.kind == "reduction"], demands.axes.resolve(reduced), [])


def _join(demands: Demands, reduced: Place, new: Place) -> Place:
    """All reductions of a region run along the same loops."""
    if reduced and new:
        demands.try_unify(lambda: demands.axes.unify_atoms(reduced, new))
    return demands.axes.resolve(reduced or new)


def _output_buffer(body: Graph, position: int, shared: Sequence[tuple[int, int]]) -> Buffer:
    return Buffer(dict(shared).get(position, len(body.inputs) + position))


def accesses(region: Region) -> list[tuple[Place, ...]]:
    """For every place that memory or an element number is computed from: runs of loops, each contiguous."""
    found = [runs_of(region.axes, index) for v in region.body.inputs for index in region.demands.of.get(v, [])]
    found += [runs_of(region.axes, index) for _, index, _ in region.outputs]
    for node in region.body.nodes:
        if node.op.kind == "source":
            for index in region.demands.of.get(node.output, []):
                found.append(tuple([region.axes.resolve(atoms_of(dim)) for dim in index])
                             if node.op.name == "iota" else runs_of(region.axes, index))
    return found


def runs_of(axes: Axes, index: Index) -> tuple[Place, ...]:
    """Runs of loops that are contiguous in an array read at `index`."""
    if is_plain(index):
        return (axes.flat(index),)
    return tuple([axes.resolve(dim.atoms if isinstance(dim, Strided) else dim) for dim in index])


def collapse(order: Sequence[int], runs: list[tuple[Place, ...]]) -> list[Place]:
    """Group neighbours of `order` that every run holds next to each other, or holds neither of."""
    groups: list[Place] = []
    for atom in order:
        if groups and all(_are_neighbours(groups[-1][-1], atom, run) for access in runs for run in access):
            groups[-1] = (*groups[-1], atom)
        else:
            groups.append((atom,))
    return groups


def _are_neighbours(outer: int, inner: int, run: Place) -> bool:
    if outer not in run and inner not in run:
        return True
    return outer in run and inner in run and run.index(inner) == run.index(outer) + 1
