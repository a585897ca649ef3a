"""Attention on a GPU by a library: what `cuda_product` is for matrix products.

In goes attention or its gradient, by itself or in a region of the template "attention", with the movement ops that feed it
and that its result goes through (`jitgrad.transforms.operands`); out comes the `Attended` that the library is asked for,
and with its consent one call, which reads and writes where things lie. Unless it is measured, large ones of whole tiles go
to the library. Without its consent a region becomes kernels that move operands, ours for attention, and one that moves the
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jitgrad import ops
from jitgrad.codegen import cuda_product
from jitgrad.codegen.choice import is_measured
from jitgrad.codegen.cuda_call import lower_library
from jitgrad.codegen.cuda_convolved import call, choose_plan
from jitgrad.codegen.cuda_product import Products
from jitgrad.codegen.cuda_templates import WIDE, lower_map
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.codegen.region import analyse
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ir.op import Op
from jitgrad.ir.strides import Heads, follow, heads_in, read_heads
from jitgrad.ir.types import TensorType
from jitgrad.ops.attention import heads_of_moved
from jitgrad.products import ATTENDED, ATTENDED_DTYPES, SLACK, Attended

LANES = 8
"""Elements of 16 bytes: where rows, heads and batches begin."""

TILE = 64
"""Queries and keys are multiples of it, if they go to the library without a measurement. It compiles a kernel for every new
length, and lengths that are anything may be another one in every step."""


def lower_alone_by_library(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any], aligned: bool,
                           allowed: Products) -> CudaLowered | None:
    """Attention or its gradient by itself; None where kernels of ours compute it."""
    if op.name not in ATTENDED or allowed.attending is None or not aligned:
        return None
    asked = attended(op, inputs, attrs)
    return lower_question(asked, [Buffer(k) for k in range(len(asked.shapes) + 1)], allowed) if asked else None


def lower_question(asked: Attended, buffers: Sequence[Buffer], allowed: Products) -> CudaLowered | None:
    """The library's call for what is asked, on operands, results and its memory."""
    if allowed.attending is None or not (allowed.always or is_measured() or is_of_tiles(asked)):
        return None
    planned = choose_plan("attention", asked, True, allowed.attending, allowed.always)
    return CudaLowered((call(planned, *buffers),), (planned.workspace + SLACK,)) if planned else None


def is_of_tiles(asked: Attended) -> bool:
    return asked.queries % TILE == 0 == asked.keys % TILE


def attended(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any]) -> Attended | None:
    """What the library would be asked for; None where it cannot be: it has neither our masks nor our dropout."""
    operands = inputs if op.name == ATTENDED[0] else inputs[1:-2]
    sizes = [t.size for t in (*inputs, *op.result_types(inputs, dict(attrs)))]
    if len(operands) != 3 or operands[0].dtype.short not in ATTENDED_DTYPES or not all(0 < size < WIDE for size in sizes):
        return None
    q, k, v = [t.shape for t in operands]
    return Attended(op.name, operands[0].dtype.short, attrs["causal"], q[0], k[0], q[1], k[1], q[2], v[2])


# ---- with what moves operands and the result -------------------------------------------------------------------------


def is_the_librarys(body: Graph, allowed: Products) -> bool:
    """Whether the library would be asked for this region, unless a measurement says otherwise."""
    asked = attended_in(body)
    if asked is None or allowed.attending is None:
        return False
    return allowed.always or (asked.work >= cuda_product.LARGE and is_of_tiles(asked))


def lower_attention(body: Graph, aligned: bool, allowed: Products) -> CudaLowered | None:
    """The template "attention"; None where there is no kernel for it."""
    asked, node = attended_in(body), attention_in(body)
    lowered = None
    if asked is not None and aligned:
        producers = body.producers()
        operands = [body.inputs.index(follow(producers, v)[1]) for v in node.inputs]
        last = len(body.inputs) + len(body.outputs) + 1
        lowered = lower_question(asked, [Buffer(k) for k in (*operands, *range(len(body.inputs), last))], allowed)
    return lowered or _lower_apart(body, node, aligned, allowed)


def attention_in(body: Graph) -> Node:
    (node,) = [n for n in body.nodes if n.op in (ops.attention, ops.attention_grad)]
    return node


def attended_in(body: Graph) -> Attended | None:
    """What the library would be asked for; None where it cannot be, or where things do not lie as it reads them."""
    node, producers = attention_in(body), body.producers()
    asked = attended(node.op, tuple([v.type for v in node.inputs]), node.attrs)
    heads = [_where(producers, v) for v in node.inputs if len(v.shape) == 3]
    heads += [_where_to(body, k, v) for k, v in enumerate(node.outputs) if len(v.shape) == 3]
    known = [place.integers for place in heads if place is not None]
    steps = [x for first, _, outer, within, row in known for x in (first, outer, within, row)]
    if asked is None or len(known) < len(heads) or any(x % LANES for x in steps):
        return None
    laid = replace(asked, laid=tuple([x for place in known for x in place]))
    return laid if laid.together and _are_apart(laid) else None


def _where(producers: Mapping[Value, Node], value: Value) -> Heads | None:
    """Where an operand lies, if it is moved and nothing else."""
    if value not in producers:
        return heads_in(value.shape)
    read = read_heads(producers, value)
    return read.heads if read is not None and read.factor is None else None


def _where_to(body: Graph, number: int, value: Value) -> Heads | None:
    """Where a result of the primitive is written."""
    made = body.outputs[number]
    if made is value:
        return heads_in(value.shape)
    return heads_of_moved(follow(body.producers(), made)[0], value.type, made.type)


def _are_apart(asked: Attended) -> bool:
    """Whether no two rows of an operand or result are one place in memory."""
    return all(row >= shape[2] and (inner == 1 or within > 0) and (outer > 0 or shape[0] == inner)
               for shape, (_, inner, outer, within, row) in zip(asked.shapes, asked.places, strict=True) if len(shape) == 3)


def _lower_apart(body: Graph, node: Node, aligned: bool, allowed: Products) -> CudaLowered | None:
    """Copies of what is moved, kernels of ours for the primitive, a copy of the result where that is moved."""
    producers, scratch = body.producers(), list[int]()
    launches: list[CudaLaunch] = []

    def fresh(nbytes: int) -> Buffer:
        scratch.append(max(8, nbytes))
        return Buffer(len(body.inputs) + len(body.outputs) + len(scratch) - 1)

    places = {v: Buffer(k) for k, v in enumerate((*body.inputs, *body.outputs))}
    for value in dict.fromkeys(node.inputs):
        if value not in places:
            places[value] = fresh(value.type.nbytes)
            launches += _copy(producers, value, places, aligned)
    for value in node.outputs:
        if value not in places:
            places[value] = fresh(value.type.nbytes)
    own = lower_library(node.op, tuple([v.type for v in node.inputs]), node.attrs, (), aligned, allowed.tf32)
    if own is None:
        return None
    buffers = [places[v] for v in (*node.inputs, *node.outputs)] + [fresh(nbytes) for nbytes in own.scratch]
    for launch in own.launches:
        assert isinstance(launch, CudaLaunch)
        arguments = tuple([buffers[x.index] if isinstance(x, Buffer) else x for x in launch.arguments])
        launches.append(replace(launch, arguments=arguments))
    for value in body.outputs:
        if value not in node.outputs:
            launches += _copy(producers, value, places, aligned)
    return CudaLowered(tuple(launches), tuple(scratch))


def _copy(producers: Mapping[Value, Node], value: Value, places: Mapping[Value, Buffer], aligned: bool) -> list[CudaLaunch]:
    """What moves `value` out of the nearest one that has a place."""
    nodes: list[Node] = []
    source = value
    while source not in places or source is value:
        nodes.insert(0, producers[source])
        (source,) = nodes[0].inputs
    region = analyse(Graph((source,), tuple(nodes), (value,), "moved"), ())
    region.buffers = {source: places[source]}
    region.outputs = [(v, index, places[value]) for v, index, _ in region.outputs]
    return lower_map(region, aligned)
