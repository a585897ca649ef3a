"""How much arithmetic a node is: from its op, its operands and its attributes to a number of operations."""

from __future__ import annotations

import math
from collections.abc import Callable

from jitgrad.ir.graph import Node, inner_graphs
from jitgrad.ops import recurrence


def flops(node: Node) -> int:
    """Additions, multiplications and calls of functions that a node needs, those inside of it included."""
    inner = sum(flops(n) for _, graph in inner_graphs(node) for n in graph.nodes)
    if node.op.kind == "foreach":
        return inner * sum(v.type.size for v in node.outputs) // max(1, len(node.attrs["body"].outputs))
    return inner + (_FLOPS[node.op.kind](node) if node.op.kind in _FLOPS else 0)


def _contraction(node: Node) -> int:
    """Two per product. The terms of one sum are all dimensions of the weight but its first; of a matmul, its rows."""
    if node.op.name.startswith("attention"):
        return _attention(node)
    x, y = node.inputs
    if node.op.name in ("matmul", "int_matmul"):
        return 2 * node.output.type.size * x.shape[-1]
    weight: tuple[int, ...] = node.attrs.get("weight_shape", y.shape)
    rows = {"convolution": node.output, "convolution_input_grad": x, "convolution_weight_grad": y}[node.op.name]
    return 2 * rows.type.size * math.prod(weight[1:])


def _attention(node: Node) -> int:
    """Two products, or five backward, of which a causal one needs half."""
    gradient = node.op.name == "attention_grad"
    q, k, v = node.inputs[1:4] if gradient else node.inputs[:3]
    pairs = q.shape[0] * q.shape[1] * k.shape[1] // (2 if node.attrs["causal"] else 1)
    return 2 * pairs * ((3 * q.shape[2] + 2 * v.shape[2]) if gradient else (q.shape[2] + v.shape[2]))


def _scan(node: Node) -> int:
    """One per element; of a recurrent layer the products with its weights."""
    name = node.op.name
    if name.removesuffix("_grad") not in recurrence.GATES:
        return node.inputs[0].type.size
    gates = node.outputs[0] if name.endswith("_grad") else node.inputs[0]
    states = node.inputs[0] if name.endswith("_grad") else node.outputs[0]
    return 2 * gates.type.size * states.shape[2]


_FLOPS: dict[str, Callable[[Node], int]] = {
    "elementwise": lambda n: n.output.type.size,
    "reduction": lambda n: n.inputs[0].type.size,
    "scan": _scan,
    "window": lambda n: n.inputs[0].type.size,
    "contraction": _contraction,
}
