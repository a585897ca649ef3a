"""Convolutions on a GPU by a library: what `cuda_product` is for matrix products.

In goes a convolution, or one of its gradients, by itself or in a region with what follows it; out comes the `Convolved` that
the library is asked for, and with its consent the launches: the library computes the convolution, a kernel behind it what
follows. Unless it is measured, large convolutions by themselves go to the library; a kernel of ours takes those that it can
spare a pass over memory, and all that the library does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jitgrad.codegen.cuda_convolution import what_follows
from jitgrad.codegen.cuda_product import OWN, Products, choose
from jitgrad.codegen.cuda_templates import WIDE, lower_map
from jitgrad.codegen.epilogue import Shared
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLibraryCall, CudaLowered
from jitgrad.ir.graph import Graph, GraphBuilder, Node
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.products import CONVOLVED_DTYPES, KINDS, SLACK, Attended, Convolved

Asked = TypeVar("Asked", Convolved, Attended)


def lower_alone_by_library(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any], aligned: bool,
                           allowed: Products) -> CudaLowered | None:
    """A convolution or gradient by itself; None where a kernel of ours computes it."""
    if op.name not in KINDS or allowed.convolving is None:
        return None
    builder = GraphBuilder(op.name)
    made = builder.run(op, tuple([builder.input(t) for t in inputs]), dict(attrs))
    return lower_by_library(builder.build([made]), (), aligned, allowed)


def lower_by_library(body: Graph, shared: Shared, aligned: bool, allowed: Products) -> CudaLowered | None:
    """A region around a convolution; None where a kernel of ours computes it. No output may share the memory of an operand
    of it."""
    if allowed.convolving is None or not aligned:
        return None
    (node,) = [n for n in body.nodes if n.op.name in KINDS]
    asked, whole = question(node, allowed.tf32), body.outputs == (node.output,)
    planned = choose_plan("convolution", asked, whole, allowed.convolving, allowed.always) if asked is not None else None
    if planned is None:
        return None
    operands = [Buffer(body.inputs.index(v)) for v in node.inputs]
    scratch = Buffer(len(body.inputs) + len(body.outputs))
    if whole:
        result = Buffer(len(body.inputs))
        return CudaLowered((call(planned, *operands, result, scratch),), (planned.workspace + SLACK,))
    region, made, workspace = what_follows(body, node, shared), scratch, Buffer(scratch.index + 1)
    region.buffers[region.body.inputs[0]] = made
    launches: list[CudaLaunch | CudaLibraryCall] = [call(planned, *operands, made, workspace), *lower_map(region, aligned)]
    return CudaLowered(tuple(launches), (node.output.type.nbytes, planned.workspace + SLACK))


def call(planned: Convolved | Attended, *arguments: Buffer) -> CudaLibraryCall:
    return CudaLibraryCall(f"cudnn_{planned.kind}", planned, arguments)


def choose_plan(choice: str, asked: Asked, whole: bool, accepts: Callable[[Asked], Asked | None],
                always: bool) -> Asked | None:
    """What the library computes, with the memory that it needs; None where a kernel of ours does. `whole`: that is all that
    is to be done; `always`: nothing is chosen."""
    if always:
        return accepts(asked)
    found: list[Asked | None] = [None]

    def can() -> bool:
        found[0] = accepts(asked)
        return found[0] is not None

    return None if choose(choice, asked.work, whole, can) == OWN else found[0]


def question(node: Node, tf32: bool) -> Convolved | None:
    """What the library would be asked for; None where it cannot be."""
    (first, second), made, attrs = [v.type for v in node.inputs], node.output.type, node.attrs
    sizes = [first.size, second.size, made.size]
    if made.dtype.short not in CONVOLVED_DTYPES or not all(0 < size < WIDE for size in sizes):
        return None
    by_kind = {KINDS[0]: (first, second, made), KINDS[1]: (made, second, first), KINDS[2]: (first, made, second)}
    image, weights, result = [t.shape for t in by_kind[node.op.name]]
    low, high = [tuple([side[k] for side in attrs["padding"]]) for k in (0, 1)]
    return Convolved(node.op.name, made.dtype.short, tf32 and made.dtype.short == "f32", image, weights, result,
                     attrs["stride"], low, high, attrs["dilation"])
