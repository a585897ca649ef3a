"""Reverse mode as a Graph transform, and its division into a forward and a backward graph.

    joint = vjp(graph, wrt=(0, 2))           # which inputs are differentiated
    joint.graph                              # inputs: graph's, then a gradient for each output in joint.seeds
                                             # outputs: graph's, then input gradients; writes: graph's
    joint.gradients                          # per entry of wrt: position in joint.graph.outputs, None: no path to it

    halves = split(joint)
    halves.forward                           # inputs: graph's; outputs: graph's, then saved values; writes: graph's
    halves.backward                          # inputs: saved values, then output gradients; outputs: input gradients
    halves.saved_inputs                      # per saved value: which input of the graph it is, None: a computed one
    halves.gradients                         # per entry of wrt: position in halves.backward.outputs, None: no path

Gradient rules are those of the op records (`jitgrad.ops.gradient`), so the results are ordinary graphs: vjp of a
backward graph gives the next order. Differentiating nodes that are still being recorded needs no graph: call
`jitgrad.ops.gradient.reverse` on them with the recorder current.

What `split` saves is a minimum cut over bytes between what the forward pass has and what the backward pass reads.
Elementwise ops, movement and sources without effects may be computed again; contractions, reductions, random bits and
everything else with effects is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.ops.gradient import continue_graph, depends_on, reverse
from jitgrad.transforms.recompute import Again, cheapest_cut

RECOMPUTED_KINDS = ("elementwise", "movement", "source")
LONGEST_CHAIN = 32          # nodes computed again in a row; also keeps the cut's paths short, hence its time linear


@dataclass(frozen=True)
class Joint:
    """A graph with its backward pass; see the module. `seeds` are positions of the outputs that gradients enter at."""

    graph: Graph
    inputs: int                                 # how many inputs and outputs of joint.graph are the graph's own
    outputs: int
    seeds: tuple[int, ...]
    gradients: tuple[int | None, ...]


@dataclass(frozen=True)
class Halves:
    """A joint graph in two; see the module."""

    forward: Graph
    backward: Graph
    saved_inputs: tuple[int | None, ...]
    seeds: tuple[int, ...]
    gradients: tuple[int | None, ...]


def vjp(graph: Graph, wrt: Sequence[int], of: Sequence[int] | None = None,
        blocks: Sequence[tuple[int, int]] = ()) -> Joint:
    """Outputs and input gradients from inputs and output gradients.

    `wrt` are positions of differentiable inputs; `of` positions of the outputs that gradients come in for (all those
    that depend on `wrt`, unless given). The backward pass computes the nodes in each of `blocks` (positions: first, past
    the last; a block inside of another one counts for nothing) again, from what goes into the block."""
    flowing = depends_on(graph.nodes, {graph.inputs[k] for k in wrt})
    candidates = range(len(graph.outputs)) if of is None else of
    seeds = tuple([k for k in candidates if graph.outputs[k] in flowing])
    builder = continue_graph(graph)
    incoming = [builder.input(graph.outputs[k].type) for k in seeds]
    with builder:
        arriving: dict[Value, Value] = {}
        for k, g in zip(seeds, incoming, strict=True):
            v = graph.outputs[k]
            arriving[v] = ops.add(arriving[v], g) if v in arriving else g
        again = Again(graph, blocks, builder) if blocks else None
        found = reverse(graph.nodes, arriving, [graph.inputs[k] for k in wrt], at=follow_lines(builder), read=again)
    reached = [found.get(graph.inputs[k]) for k in wrt]
    present = [g for g in reached if g is not None]
    joint = builder.build([*graph.outputs, *present], graph.writes)
    return Joint(joint, len(graph.inputs), len(graph.outputs), seeds, _positions(reached, len(graph.outputs)))


def follow_lines(builder: GraphBuilder) -> Callable[[Node], None]:
    """For `reverse`: nodes of the backward pass get the user's line of the node they belong to."""

    def at(node: Node) -> None:
        builder.where = node.where

    return at


def _positions(found: Iterable[Value | None], first: int) -> tuple[int | None, ...]:
    """first, first + 1, … for those that are there, None for the others."""
    count = itertools.count(first)
    return tuple([None if v is None else next(count) for v in found])


# ---- two halves ------------------------------------------------------------------------------------------------


def split(joint: Joint) -> Halves:
    """The forward graph with the values to save, and the backward graph that reads them; see the module."""
    graph = joint.graph
    own, incoming = graph.inputs[:joint.inputs], graph.inputs[joint.inputs:]
    outputs, gradients = graph.outputs[:joint.outputs], graph.outputs[joint.outputs:]
    late = _downstream(graph.nodes, incoming)
    saved = _values_to_save(graph, late, gradients)
    early = [node for node in graph.nodes if node.outputs[0] not in late]
    results = [*outputs, *(v for _, v in graph.writes), *saved]
    forward = Graph(own, _needed(early, results, own, keep_effects=True), (*outputs, *saved), graph.name, graph.writes)
    start = (*saved, *incoming)
    backward = Graph(start, _needed(graph.nodes, gradients, start), gradients, f"{graph.name}_backward")
    position = {v: k for k, v in enumerate(own)}
    shifted = tuple([None if k is None else k - joint.outputs for k in joint.gradients])
    return Halves(forward, backward, tuple([position.get(v) for v in saved]), joint.seeds, shifted)


def _downstream(nodes: Iterable[Node], values: Iterable[Value]) -> set[Value]:
    """`values` and all that is computed from them."""
    found = set(values)
    for node in nodes:
        if not found.isdisjoint(node.inputs):
            found.update(node.outputs)
    return found


def _needed(nodes: Sequence[Node], results: Iterable[Value], given: Iterable[Value],
            keep_effects: bool = False) -> tuple[Node, ...]:
    """The nodes that compute `results` from `given`, in order; with `keep_effects` all nodes with effects, too."""
    have, wanted = set(given), set(results)
    kept = []
    for node in reversed(nodes):
        useful = any(v in wanted and v not in have for v in node.outputs)
        if useful or (keep_effects and node.op.effects):
            kept.append(node)
            wanted.update(node.inputs)
    return tuple(reversed(kept))


def _values_to_save(graph: Graph, late: set[Value], gradients: Iterable[Value]) -> list[Value]:
    """The cheapest set of early values from which the late nodes (and gradients) can be computed, in graph order."""
    early = [node for node in graph.nodes if node.outputs[0] not in late]
    read = {v for node in graph.nodes if node.outputs[0] in late for v in node.inputs}
    inputs = [v for v in graph.inputs if v not in late]
    return cheapest_cut(inputs, early, [v for v in read.union(gradients) if v not in late], _prices(graph, early),
                        lambda node: node.op.kind in RECOMPUTED_KINDS and not node.op.effects, LONGEST_CHAIN)


def _prices(graph: Graph, early: Iterable[Node]) -> dict[Value, int]:
    """What saving a value costs: its bytes, and as many again to write it where a fused kernel would not store it
    anyway (as it does inputs, outputs and what other nodes than elementwise ones make)."""
    stored = {*graph.inputs, *graph.results}
    values = list(graph.inputs)
    for node in early:
        values += node.outputs
        if node.op.kind not in RECOMPUTED_KINDS:
            stored.update(node.outputs)
    return {v: v.type.nbytes * (1 if v in stored else 2) + 1 for v in values}
