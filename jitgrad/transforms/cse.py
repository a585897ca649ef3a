"""Common subexpressions: nodes that compute the same from the same are computed once.

Every node is numbered by its content (op, numbers of its operands, attributes), so one pass over the nodes is enough.
Nodes with effects (random bits, callbacks, what may fail) are never merged.
"""

from __future__ import annotations

from typing import Any

from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, attrs_key, rebuild


def eliminate_common_subexpressions(graph: Graph) -> Graph:
    """`graph` with each node that repeats an earlier one replaced by it."""
    seen: dict[tuple[Any, ...], tuple[Value, ...]] = {}

    def visit(node: Node, inputs: tuple[Value, ...], builder: GraphBuilder) -> tuple[Value, ...] | None:
        if node.op.effects:
            return None
        operands = tuple(sorted(inputs, key=id)) if node.op.commutative else inputs
        key = (node.op.name, operands, attrs_key(node.attrs))
        if key not in seen:
            seen[key] = builder.keep(node, inputs)
        return seen[key]

    return rebuild(graph, visit)
