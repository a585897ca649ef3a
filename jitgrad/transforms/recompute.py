"""Computing nodes a second time, where gradients need their values again.

`Again` is what a backward pass reads by: the values of a block of nodes are those of a second computation, appended when
the first gradient arrives at the block. What goes into it comes through barriers behind that gradient, so that no pass
takes the two computations for one and the second does not start early. `cheapest_cut` chooses what is best kept when
some nodes may be computed again and others not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.transforms.mincut import Network


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


# ---- what to keep -----------------------------------------------------------------------------------------------


def cheapest_cut(inputs: Iterable[Value], nodes: Sequence[Node], read: Iterable[Value], price: Mapping[Value, int],
                 may_repeat: Callable[[Node], bool], longest_chain: int) -> list[Value]:
    """The set of `inputs` and results of `nodes`, in order, that costs least (`price`) and from which the nodes that
    `may_repeat` can make all that is `read`: a minimum cut. No more than `longest_chain` nodes are repeated in a row, which
    also keeps the network's paths short and so its time linear."""
    network = Network()
    entrance: dict[Value, int] = {}
    for v in inputs:
        entrance[v] = _split_vertex(network, price[v])
        network.connect(Network.SOURCE, entrance[v])
    length: dict[Value, int] = {}
    for node in nodes:
        chain = 1 + max([length.get(v, 0) for v in node.inputs], default=0)
        again = chain <= longest_chain and may_repeat(node)
        for v in node.outputs:
            entrance[v] = _split_vertex(network, price[v])
            length[v] = chain if again else 0
            for tail in [entrance[x] + 1 for x in node.inputs] if again else [Network.SOURCE]:
                network.connect(tail, entrance[v])
    for v in read:
        network.connect(entrance[v] + 1, Network.SINK)
    reached = network.source_side()
    return [v for v, vertex in entrance.items() if vertex in reached and vertex + 1 not in reached]


def _split_vertex(network: Network, price: int) -> int:
    """Two vertices for a value, n before and n + 1 behind the edge that a cut pays for."""
    before, behind = network.vertex(), network.vertex()
    network.connect(before, behind, price)
    return before
