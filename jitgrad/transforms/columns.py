"""Graph of regions -> the same, with sums over the rows of a product in the region of that product.

The gradient of a bias is the sum of a gradient's rows, which the product before (and the derivative of an activation
behind it) has just made. Its kernel adds them up while a block is in the cache, so that no other pass over the gradient
is needed: what was a region of the template "column" over a result of a "matmul" becomes one more output of the latter.
Likewise the gradient of a recurrent layer adds up the gradients of its gates over steps and sequences.
"""

from __future__ import annotations

from jitgrad import ops
from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, run_node
from jitgrad.ops.contraction import PRODUCTS
from jitgrad.ops.recurrence import GRADIENTS
from jitgrad.ops.region import region, region_of


def fuse_column_sums(graph: Graph) -> Graph:
    """See the module's text."""
    sums = _find_sums(graph)
    if not sums:
        return graph
    gone = {node for found in sums.values() for node, _ in found}
    nodes = [_with_sums(node, sums[node]) if node in sums else node for node in graph.nodes if node not in gone]
    return graph.replace(nodes=tuple(nodes))


def _find_sums(graph: Graph) -> dict[Node, list[tuple[Node, Value]]]:
    """For products the regions that sum up rows of a result, and that result."""
    producers = graph.producers()
    found: dict[Node, list[tuple[Node, Value]]] = {}
    for node in graph.nodes:
        value = _summed(node)
        while value in producers and producers[value].op.name == "reshape":
            (value,) = producers[value].inputs
        product = producers.get(value) if value is not None else None
        if value is not None and product is not None and (
                _are_gates_of(product, value, node.output) or _are_rows_of(product, value, node.output)):
            found.setdefault(product, []).append((node, value))
    return found


def _summed(node: Node) -> Value | None:
    """What a region adds up over all dimensions but the last, if that is all it does."""
    if node.op is not region or node.attrs["template"] != "column":
        return None
    body: Graph = node.attrs["body"]
    *before, last = body.nodes
    alone = last.op is ops.sum and last.attrs["axes"] == tuple(range(len(last.inputs[0].shape) - 1))
    return node.inputs[0] if alone and len(node.inputs) == 1 and all([n.op.name == "reshape" for n in before]) else None


def _are_gates_of(node: Node, value: Value, total: Value) -> bool:
    """True when `value` are gradients of gates, made by the gradient of a recurrent layer, and `total` their sums."""
    recurrent = node.op in GRADIENTS or (node.op is region and node.attrs["template"] == "recurrence")
    return (recurrent and value.dtype in (float32, float64) and len(value.shape) == 3 and value.type.size > 0
            and value.shape[-1:] == total.shape)


def _are_rows_of(node: Node, value: Value, total: Value) -> bool:
    """True when `value` is a result of a product's region with the columns of the product, and `total` their sums."""
    if node.op is not region or node.attrs["template"] != "matmul" or value.dtype not in (float32, float64):
        return False
    body: Graph = node.attrs["body"]
    (product,) = [inner.output for inner in body.nodes if inner.op in PRODUCTS]
    return (value.shape[-1:] == total.shape == product.shape[-1:] and value.type.size == product.type.size > 0
            and _is_in_order(body, product))


def _is_in_order(body: Graph, product: Value) -> bool:
    """True when no element that is made of the product has another place than in the product."""
    made = {product}
    for node in body.nodes:
        if not made.isdisjoint(node.inputs):
            if node.op.kind == "movement" and node.op.name != "reshape":
                return False
            made.update(node.outputs)
    return True


def _with_sums(product: Node, sums: list[tuple[Node, Value]]) -> Node:
    """The region of the product, or of a gradient that is none yet, with more outputs."""
    if product.op is not region:
        product = region_of((product,), product.outputs, "recurrence", product)
    inner: Graph = product.attrs["body"]
    builder = GraphBuilder(inner.name)
    known = {v: builder.input(v.type) for v in inner.inputs}
    with builder:
        for node in inner.nodes:
            builder.where = node.where
            run_node(node, known)
        made = dict(zip(product.outputs, [known[v] for v in inner.outputs], strict=True))
        totals = []
        for node, value in sums:
            builder.where = node.where
            totals.append(ops.sum(made[value], axes=tuple(range(len(value.shape) - 1))))
    body = builder.build([*[known[v] for v in inner.outputs], *totals])
    outputs = (*product.outputs, *[node.output for node, _ in sums])
    return Node(product.op, product.inputs, {**product.attrs, "body": body}, outputs, product.where)
