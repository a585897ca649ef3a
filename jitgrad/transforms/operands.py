"""Graph of regions -> the same, with attention that reads its operands where they lie.

Query, key and value are mostly parts of one product, moved to [heads, tokens, width]. What would be a kernel that copies
them, because attention is no part of a region, becomes strides: the movement ops, and the number that multiplies the
query, join attention in a region of the template "attention". A copy that nobody else reads is gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from jitgrad import ops
from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ir.strides import read_heads
from jitgrad.ops.region import region
from jitgrad.transforms.dce import eliminate_dead_code


def read_where_they_lie(graph: Graph) -> Graph:
    """See the module's text."""
    producers = graph.producers()
    nodes = [_with_operands(node, producers) for node in graph.nodes]
    return graph if nodes == list(graph.nodes) else eliminate_dead_code(graph.replace(nodes=tuple(nodes)))


def _with_operands(node: Node, producers: Mapping[Value, Node]) -> Node:
    """`node`, or the region of it with what moves its operands."""
    if node.op not in (ops.attention, ops.attention_grad) or node.inputs[0].dtype not in (float32, float64):
        return node
    if not all(v.type.size for v in node.inputs):
        return node
    gradient = node.op is ops.attention_grad
    inner: dict[Node, None] = {}
    for k, value in enumerate(node.inputs[:4 if gradient else 3]):
        moving = _moving(value, producers)
        read = read_heads({v: n for n in moving for v in n.outputs}, value)
        if moving and read is not None and (read.factor is None or k == gradient):
            inner.update(dict.fromkeys(moving))
    if all(n.op.name == "reshape" for n in inner):
        return node
    members = (*inner, node)
    made = {v for n in members for v in n.outputs}
    inputs = tuple(dict.fromkeys([v for n in members for v in n.inputs if v not in made]))
    body = Graph(inputs, members, node.outputs, "attention")
    return Node(region, inputs, {"body": body, "template": "attention"}, node.outputs, node.where)


def _moving(value: Value, producers: Mapping[Value, Node]) -> list[Node]:
    """The nodes of the kernel that makes `value`, and reshapes behind it."""
    behind: list[Node] = []
    node = producers.get(value)
    while node is not None and node.op.name == "reshape":
        behind.insert(0, node)
        value = node.inputs[0]
        node = producers.get(value)
    if node is None or node.op is not region or node.attrs["template"] != "map" or len(node.outputs) > 1:
        return behind
    return [*node.attrs["body"].nodes, *behind]
