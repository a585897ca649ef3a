"""Elementwise ops in front of a product: which nodes its kernels take over, so that what they make is in no memory.

``x @ (w.float() * scale).T`` with w of int8 or of 16-bit floats needs no float32 copy of w. Where x has many rows, the
factors of a product are copied into panels; what elementwise ops make of the program's inputs is computed on that way
(`packed_nodes`). Where x has few rows, the product reads its second factor where it lies, and the kernel widens each number
as it reads it (`widening_nodes`). What goes in is a product; what comes out are the nodes between memory and its factors.
The kernels do what they say, element by element, so that no bit differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jitgrad import ops
from jitgrad.dtypes import bfloat16, float16, float32, int8
from jitgrad.ir.axes import Axes, source_index
from jitgrad.ir.graph import Node, Value
from jitgrad.transforms.epilogue import is_elementwise

FEW_ROWS = 24
"""Rows of the first factor up to which products read the second one where it lies: with more, factors are packed."""

NARROW = (int8, bfloat16, float16)

Producers = Mapping[Value, Node]


def prologue_nodes(product: Node, producers: Producers, reads: Mapping[Value, int], packs: bool) -> list[Node]:
    """The nodes in front of `product` that its kernels take over. `reads`: how often each value is read; what something
    else reads, too, has to be in memory anyway. `packs`: whether the machine's kernels pack factors."""
    x, y = product.inputs
    if product.op is not ops.matmul:
        return []
    if math.prod(x.shape[:-1]) <= FEW_ROWS:
        return widening_nodes(product, producers, reads) or []
    if not packs:
        return []
    return [node for factor, size in ((x, x.type.size), (y, math.prod(y.shape[-2:])))
            for node in packed_nodes(factor, size, producers, reads)]


def packed_nodes(factor: Value, size: int, producers: Producers, reads: Mapping[Value, int]) -> list[Node]:
    """The nodes that make `factor` of the program's inputs element by element, in any order; none where it is made
    otherwise, or holds another number of different elements than `size`."""
    if _moves(factor, producers)[1].type.size != size:
        return []
    axes = Axes()
    found, pending = dict[Node, None](), [(factor, axes.fresh_index(factor.shape))]
    while pending:
        value, index = pending.pop()
        node = producers.get(value)
        if node is None or not node.inputs:
            continue
        found[node] = None
        if reads[value] > 1 or not (_only_moves(node) or (is_elementwise(node) and not node.op.effects)):
            return []
        source = source_index(axes, node, index) if _only_moves(node) else index
        if source is None:
            return []
        pending += [(v, source if v.shape else ()) for v in node.inputs]
    return list(found) if any(map(is_elementwise, found)) else []


def widening_nodes(product: Node, producers: Producers, reads: Mapping[Value, int]) -> list[Node] | None:
    """The nodes that make the second factor of `product` from narrow numbers and, with a product of their own, a factor for
    each column or for all; None where it is made otherwise."""
    y = product.inputs[1]
    if y.dtype is not float32 or len(y.shape) != 2:
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


def _widens(value: Value, producers: Producers) -> bool:
    """True when `value` is made of narrow numbers, with no other change."""
    node = producers.get(value)
    return node is not None and node.op is ops.cast and node.inputs[0].dtype in NARROW


def _moves(value: Value, producers: Producers) -> tuple[list[Node], Value]:
    """The movement ops that read memory in another order on the way to `value`, and where they begin."""
    nodes = []
    while (node := producers.get(value)) is not None and _only_moves(node):
        nodes.append(node)
        value = node.inputs[0]
    return nodes, value


def _only_moves(node: Node) -> bool:
    return node.op.name in ("permute", "broadcast_to", "reshape", "slice")
