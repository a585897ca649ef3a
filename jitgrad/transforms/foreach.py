"""Constants in the body of a foreach become shared operands: kernel text holds no number of the user's, so another
learning rate is another operand and never another kernel."""

from __future__ import annotations

from jitgrad.ir.graph import Graph, Node


def lift_constants(graph: Graph) -> Graph:
    """`graph` with the constants of every foreach's body as constant nodes in front of it."""
    if not any(node.op.kind == "foreach" for node in graph.nodes):
        return graph
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.extend(_lifted(node) if node.op.kind == "foreach" else (node,))
    return graph.replace(nodes=tuple(nodes))


def _lifted(node: Node) -> list[Node]:
    """The constants of a foreach's body, then the foreach. Values are never changed, so body and graph share them."""
    body: Graph = node.attrs["body"]
    constants = [inner for inner in body.nodes if inner.op.name == "constant"]
    if not constants:
        return [node]
    values = tuple([inner.output for inner in constants])
    rest = tuple([inner for inner in body.nodes if inner.op.name != "constant"])
    attrs = {**node.attrs, "body": body.replace(inputs=(*values, *body.inputs), nodes=rest),
             "shared": node.attrs["shared"] + len(values)}
    # Two foreach nodes may have one body: each gets its own constants.
    own = tuple([type(v)(v.id, v.type) for v in values])
    lifted = [Node(inner.op, (), inner.attrs, (v,), node.where) for inner, v in zip(constants, own, strict=True)]
    return [*lifted, Node(node.op, (*own, *node.inputs), attrs, node.outputs, node.where)]
