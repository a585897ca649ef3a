"""Weights that are kept as narrow numbers and become float32 for one product: which nodes the product's kernel takes over.

``x @ (w.float() * scale).T`` with w of int8 or of 16-bit floats needs no float32 copy of w in memory: where x has few rows,
the kernel widens each number as it reads it. What goes in is a product; what comes out are the nodes between memory and
its second factor. The kernel does what they say, element by element, so that no bit differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from jitgrad import ops
from jitgrad.dtypes import bfloat16, float16, float32, int8
from jitgrad.ir.graph import Node, Value

FEW_ROWS = 24
"""Rows of the first factor up to which there is such a kernel: with more, weights are better made wide once."""

NARROW = (int8, bfloat16, float16)


def widening_nodes(product: Node, producers: Mapping[Value, Node], reads: Mapping[Value, int]) -> list[Node] | None:
    """The nodes that make the second factor of `product` from narrow numbers and, with a product of their own, a factor for
    each column or for all; None where it is made otherwise. `reads`: how often each value is read; what something else
    reads, too, has to be in memory anyway."""
    x, y = product.inputs
    if product.op is not ops.matmul or y.dtype is not float32 or len(y.shape) != 2 or x.shape[0] > FEW_ROWS:
        return None
    nodes, wide = _moves(y, producers)
    moves_of_scale: list[Node] = []
    node = producers.get(wide)
    if node is not None and node.op is ops.mul:
        for weight, scale in (node.inputs, node.inputs[::-1]):
            moves, wide = _moves(weight, producers)
            moves_of_scale, factors = _moves(scale, producers)
            if _widens(wide, producers) and factors.type.size in (1, y.shape[1]):
                nodes += [node, *moves]
                break
        else:
            return None
    if not _widens(wide, producers):
        return None
    nodes.append(producers[wide])
    if any([reads[node.output] > 1 for node in nodes]):
        return None
    return [*nodes, *_moves(producers[wide].inputs[0], producers)[0], *moves_of_scale]


def _widens(value: Value, producers: Mapping[Value, Node]) -> bool:
    """True when `value` is made of narrow numbers, with no other change."""
    node = producers.get(value)
    return node is not None and node.op is ops.cast and node.inputs[0].dtype in NARROW


def _moves(value: Value, producers: Mapping[Value, Node]) -> tuple[list[Node], Value]:
    """The movement ops that read memory in another order on the way to `value`, and where they begin."""
    nodes = []
    while (node := producers.get(value)) is not None and node.op.name in ("permute", "broadcast_to", "reshape", "slice"):
        nodes.append(node)
        value = node.inputs[0]
    return nodes, value
