"""Dead code: nodes whose results nobody reads are dropped, in one pass from the end.

A node with an effect stays, read or not, but for random bits: their offsets were given out while tracing, so leaving
some out changes no others.
"""

from __future__ import annotations

from jitgrad.ir.graph import Graph, Node, Value, inner_graphs

_REMOVABLE = frozenset({"random"})


def eliminate_dead_code(graph: Graph) -> Graph:
    """`graph` without dead nodes; graphs in attributes likewise. A graph without any comes back as it is."""
    live: set[Value] = set(graph.results)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op.effects - _REMOVABLE or not live.isdisjoint(node.outputs):
            live.update(node.inputs)
            kept.append(_without_dead_inside(node))
    nodes = tuple(reversed(kept))
    return graph if nodes == graph.nodes else graph.replace(nodes=nodes)


def _without_dead_inside(node: Node) -> Node:
    graphs = inner_graphs(node)
    cleaned = {name: eliminate_dead_code(inner) for name, inner in graphs}
    if all([cleaned[name] is inner for name, inner in graphs]):
        return node
    return Node(node.op, node.inputs, {**node.attrs, **cleaned}, node.outputs, node.where)
