"""Which elementwise nodes follow a contraction closely enough to be computed while its result is still in cache.

A contraction is a matrix product, a convolution or a convolution's gradient in its image. A forward walk over the graph: a
node is *claimed* by a contraction when it reads the contraction's result (through claimed nodes and reshapes) at the
result's own shape, and nothing else that it reads depends on that contraction. Then a backward walk
gives up claims whose results no claimed node and nothing outside of elementwise arithmetic needs: what a backward pass
recomputes from an activation belongs to the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jitgrad.dtypes import bfloat16, float16, float32, float64
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ops.contraction import PRODUCTS


def is_elementwise(node: Node) -> bool:
    """True when a kernel can compute the node per element."""
    return node.op.kind == "elementwise" and node.op.spell is not None and not has_complex(node)


def has_complex(node: Node) -> bool:
    return any([v.type.dtype.is_complex for v in (*node.inputs, *node.outputs)])


def is_contraction(node: Node, narrow: bool = False) -> bool:
    """True for contractions that have a kernel with an epilogue. `narrow`: convolutions of 16-bit floats have one, too."""
    if not node.op.epilogue or not all(n > 0 for v in (*node.inputs, node.output) for n in v.shape):
        return False
    floats = (float32, float64, bfloat16, float16) if narrow else (float32, float64)
    return not node.output.dtype.is_complex if node.op in PRODUCTS else node.output.dtype in floats


@dataclass
class Claims:
    """`of`: the contraction's number for claimed nodes and for contractions. `taint`: contractions (as bits) that a value
    depends on by a way that leaves their epilogues."""

    of: dict[Node, int] = field(default_factory=dict)
    taint: dict[Value, int] = field(default_factory=dict)


def claim_epilogues(graph: Graph, narrow: bool = False) -> Claims:
    """The claims of all contractions of `graph`. `narrow`: see `is_contraction`."""
    claims = Claims()
    holder: dict[Value, int] = {}                   # values in an epilogue, and the number of their contraction
    shapes: list[int] = []
    for node in graph.nodes:
        taint = 0
        for v in node.inputs:
            taint |= claims.taint.get(v, 0)
        held = {holder[v] for v in node.inputs if v in holder}
        claim = _claim(node, held, taint, shapes, narrow)
        for number in held:
            taint |= 0 if number == claim else 1 << number
        for v in node.outputs:
            claims.taint[v] = taint
            if claim is not None:
                holder[v] = claim
        if claim is not None and node.op.name != "reshape":
            claims.of[node] = claim
    _give_up_side_branches(graph, claims)
    return claims


def _claim(node: Node, held: set[int], taint: int, sizes: list[int], narrow: bool) -> int | None:
    if is_contraction(node, narrow):
        sizes.append(node.output.type.size)
        return len(sizes) - 1
    if node.op.name == "reshape" and held:
        return next(iter(held))
    if not held or not is_elementwise(node):
        return None
    return max([k for k in held if not taint >> k & 1 and sizes[k] == node.output.type.size], default=None)


def _give_up_side_branches(graph: Graph, claims: Claims) -> None:
    """What is claimed by a convolution must be wanted in memory as it is. A row program that reads it computes it as well,
    without a pass over memory: the gradients of activation and batch norm are one kernel."""
    needed = set(graph.results)
    whole = set(graph.results)                      # values that are wanted in memory
    within: dict[Value, int] = {}                   # values that a claimed node reads, and its claim (as a bit)
    convolutions = {claims.of[node] for node in claims.of if node.op.epilogue == "convolution"}
    for node in reversed(graph.nodes):
        claim = claims.of.get(node)
        plain = is_elementwise(node)
        if claim is not None and plain:
            wanted = whole if claim in convolutions else needed
            if node.output not in wanted and not within.get(node.output, 0) >> claim & 1:
                del claims.of[node]
                claim = None
        in_loops = plain or node.op.kind == "reduction" or (node.op.view and whole.isdisjoint(node.outputs))
        for v in node.inputs:
            # An unclaimed elementwise reader computes from v elsewhere: that alone does not keep v's node claimed.
            if not plain:
                needed.add(v)
            elif claim is not None:
                within[v] = within.get(v, 0) | 1 << claim
            if not in_loops:
                whole.add(v)
