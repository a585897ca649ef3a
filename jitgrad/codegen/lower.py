"""A region node -> the launches of its kernels.

`lower` picks the template that fusion chose; each template opens the loops and asks the `Writer` for values:

    map      every element of one space by itself
    row      reductions along the inner loops, with what feeds and follows them: one row at a time
    column   reductions along the outer loops: partial sums per block of rows, then their sum
    foreach  one body over the elements of many tensors (the op of that name)
    full     one result, or few: partial results per block, then their combination
    matmul, convolution   a contraction with what follows it, in modules of their own
    pool     a convolution with what pools its result
    pool_grad   the gradient in a convolution's weights, of the gradient of a pool
    attention   attention, or its gradient, with the movement ops that feed it
    concat   pieces that are read where they lie
    recurrence  the gradient of a recurrent layer, with sums of its results
    update   a matmul where an optimizer's update follows a gradient: items are whole rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jitgrad.codegen.convolution import lower_convolution
from jitgrad.codegen.foreach import lower_foreach
from jitgrad.codegen.kernel import Launch, Lowered
from jitgrad.codegen.library_attention import lower_in_place
from jitgrad.codegen.library_movement import lower_concat_in_place, lower_turned
from jitgrad.codegen.library_recurrence import lower_with_sums
from jitgrad.codegen.matmul import lower_matmul, lower_update
from jitgrad.codegen.pooled import lower_pool_gradient
from jitgrad.codegen.reduce import lower_column, lower_full, lower_row
from jitgrad.codegen.region import Region, analyse
from jitgrad.codegen.templates import lower_map
from jitgrad.ir.graph import Graph, Where
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType


def lower(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any], shared: tuple[tuple[int, int], ...],
          where: Where) -> Lowered | None:
    """The kernels of a region or foreach node. `shared` holds pairs (output, input) that are one memory."""
    if op.kind == "foreach":
        return lower_foreach(inputs, attrs, shared)
    return lower_body(attrs["body"], attrs["template"], shared)


def lower_body(body: Graph, template: str, shared: tuple[tuple[int, int], ...] = ()) -> Lowered | None:
    """The kernels of a region with this body."""
    if template in CONTRACTIONS:
        return CONTRACTIONS[template](body, shared)
    if template == "map" and not shared and (copied := lower_turned(body)):
        return copied
    region = analyse(body, shared)
    launches = TEMPLATES[template](region)
    return Lowered(tuple(launches), tuple(region.scratch))


CONTRACTIONS: dict[str, Callable[[Graph, tuple[tuple[int, int], ...]], Lowered | None]] = {
    "matmul": lower_matmul, "update": lower_update, "convolution": lower_convolution, "pool": lower_convolution,
    "pool_grad": lower_pool_gradient,
    "attention": lower_in_place, "recurrence": lower_with_sums, "concat": lower_concat_in_place}
TEMPLATES: dict[str, Callable[[Region], list[Launch]]] = {
    "map": lower_map, "row": lower_row, "column": lower_column, "full": lower_full}
