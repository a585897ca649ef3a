"""A transposed product is the product of the transposed factors in the other order: no pass over memory for it.

The gradient of a linear layer's weight is written as the transpose of ``x.T @ g``; kernels for matmul read factors of
any orientation, so the transpose moves to them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, rebuild
from jitgrad.ops.contraction import PRODUCTS
from jitgrad.transforms.epilogue import is_contraction


def turn_products(graph: Graph) -> Graph:
    """``permute(matmul(x, y))`` as ``matmul(permute(y), permute(x))``, where nothing else reads the product."""
    producers = graph.producers()
    turned = {node: product for node in graph.nodes if (product := _turned_product(node, producers))}
    if not turned:
        return graph
    reads = Counter([v for node in graph.nodes for v in node.inputs] + list(graph.results))
    factors: dict[Value, tuple[Value, ...]] = {}        # of every product, in the new graph

    def visit(node: Node, inputs: tuple[Value, ...], builder: GraphBuilder) -> Any:
        if node.op in PRODUCTS:
            factors[node.output] = inputs
        product = turned.get(node)
        if product is None or reads[product] > 1:
            return None
        x, y = factors[product]
        axes = node.attrs["axes"]
        return producers[product].op(ops.permute(y, axes=axes), ops.permute(x, axes=axes))

    return _without_unread_products(rebuild(graph, visit))


def _turned_product(node: Node, producers: dict[Value, Node]) -> Value | None:
    """The product that `node` transposes, batch dimensions staying what they are."""
    if node.op.name != "permute":
        return None
    n, maker = len(node.attrs["axes"]), producers.get(node.inputs[0])
    swap = (*range(n - 2), n - 1, n - 2)
    is_product = maker is not None and maker.op in PRODUCTS and is_contraction(maker)
    return node.inputs[0] if is_product and node.attrs["axes"] == swap else None


def _without_unread_products(graph: Graph) -> Graph:
    read = {v for node in graph.nodes for v in node.inputs}.union(graph.results)
    return graph.replace(nodes=tuple([node for node in graph.nodes if node.op not in PRODUCTS or node.output in read]))
