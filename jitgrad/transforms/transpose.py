"""Products that are read only transposed are computed transposed: ``permute(x @ y)`` becomes ``yᵀ @ xᵀ``.

Gradients of weights end like this (the layer multiplies by the transposed weight), and the transposition of an operand
costs a matmul nothing, while that of a result is a kernel of its own.
"""

from __future__ import annotations

from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, rebuild


def turn_products(graph: Graph) -> Graph:
    """`graph` with every matmul turned whose only reader swaps its last two axes."""
    makers = {node.output: node for node in graph.nodes if node.op is ops.matmul}
    if not makers:
        return graph
    uses, results = graph.uses(), set(graph.results)
    turned = {node for node in graph.nodes if _swaps_last_two(node) and node.inputs[0] in makers
              and len(uses[node.inputs[0]]) == 1 and node.inputs[0] not in results}
    mapped: dict[Value, tuple[Value, ...]] = {}

    def visit(node: Node, inputs: tuple[Value, ...], builder: GraphBuilder) -> Any:
        if node.op is ops.matmul:
            mapped[node.output] = inputs
        if node not in turned:
            return None
        x, y = mapped[node.inputs[0]]
        axes = node.attrs["axes"]
        return ops.matmul(ops.permute(y, axes=axes), ops.permute(x, axes=axes))

    return rebuild(graph, visit) if turned else graph


def _swaps_last_two(node: Node) -> bool:
    if node.op is not ops.permute:
        return False
    axes = node.attrs["axes"]
    n = len(axes)
    return n >= 2 and axes == (*range(n - 2), n - 1, n - 2)
