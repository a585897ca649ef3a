"""Computing nodes a second time, where gradients need their values again.

`Again` is what a backward pass reads by: the values of a block of nodes are those of a second computation, appended when
the first gradient arrives at the block. What goes into it comes through barriers behind that gradient, so that no pass
takes the two computations for one and the second does not start early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value


class Again:
    """`Read` (`jitgrad.ops.gradient`) for a graph with `blocks` of nodes, as positions (first, past the last)."""

    def __init__(self, graph: Graph, blocks: Sequence[tuple[int, int]], builder: GraphBuilder):
        self.builder = builder
        self.producers = graph.producers()
        self.nodes_of: dict[Node, tuple[Node, ...]] = {}          # the block that a node is in, the outermost
        for first, last in sorted(blocks, key=lambda b: b[0] - b[1]):
            block = graph.nodes[first:last]
            if block and block[0] not in self.nodes_of:
                self.nodes_of.update(dict.fromkeys(block, block))
        self.second: dict[tuple[Node, ...], dict[Value, Value]] = {}

    def __call__(self, node: Node, gradients: Sequence[Any]) -> tuple[Sequence[Value], Sequence[Value]]:
        """The operands and results of `node` that gradient rules read."""
        block = self.nodes_of.get(node)
        if block is None:
            return node.inputs, node.outputs
        values = self.second.get(block)
        if values is None:
            after = next(g for g in gradients if g is not None)
            values = self.second[block] = compute_again(block, after, self.builder, self.producers)
        return [values[v] for v in node.inputs], [values[v] for v in node.outputs]


def compute_again(nodes: Sequence[Node], after: Value, builder: GraphBuilder,
                  producers: dict[Value, Node]) -> dict[Value, Value]:
    """Append copies of `nodes`, behind `after`; for all values that they read or make the one of the second time."""
    values: dict[Value, Value] = {}
    for node in nodes:
        builder.where = node.where
        for v in node.inputs:
            if v not in values:
                values[v] = entrance(v, after, builder, producers)
        values.update(zip(node.outputs, builder.copy(node, tuple([values[v] for v in node.inputs])), strict=True))
    return values


def entrance(value: Value, after: Value, builder: GraphBuilder, producers: dict[Value, Node]) -> Value:
    """What a second computation reads for a value from outside of it: constants as they are, others behind `after`."""
    node = producers.get(value)
    if node is not None and node.op.name == "constant":
        return value
    result: Value = builder.run(ops.barrier, (value, after), {})
    return result
