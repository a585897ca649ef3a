"""The op that a fused group of primitives becomes: one kernel, or the few phases of one."""

from __future__ import annotations

import numpy as np

from jitgrad.errors import ShapeError, complain
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ir.op import Op, register
from jitgrad.ir.replay import evaluate
from jitgrad.ir.types import TensorType

__all__ = ["region"]


def _infer_region(*xs: TensorType, body: Graph, template: str) -> tuple[TensorType, ...]:
    wanted = tuple([v.type for v in body.inputs])
    if xs != wanted:
        raise complain(ShapeError, "region", f"operands are {xs}, its body takes {wanted}")
    return tuple([v.type for v in body.outputs])


def _evaluate(*xs: np.ndarray, body: Graph, template: str) -> tuple[np.ndarray, ...]:
    return evaluate(body, xs)


region = register(Op(
    "region", ("xs",), _infer_region, _evaluate, "region", variadic=True, outputs=-1,
    doc="The outputs of `body`, as one kernel of the form `template`, see `jitgrad.codegen.lower`."))


def region_of(members: tuple[Node, ...], outputs: tuple[Value, ...], template: str, like: Node) -> Node:
    """A region of these nodes."""
    made = {v for n in members for v in n.outputs}
    inputs = tuple(dict.fromkeys([v for n in members for v in n.inputs if v not in made]))
    return Node(region, inputs, {"body": Graph(inputs, members, outputs, template), "template": template}, outputs,
                like.where)
