"""One elementwise program over many groups of tensors: an optimizer's step over all parameters as one node.

`body` is a Graph over 0-d values, made of elementwise ops. Its inputs are `shared` scalars, then k operands. Operands
of the op: the shared scalars, then operand 0 of all groups, operand 1 of all groups, and so on. Within a group
operand 0 has the shape of the group; any other has that shape or is 0-d. Results: output 0 of the body for all
groups, then output 1, and so on, each in its group's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.graph import Graph
from jitgrad.ir.op import Op, register
from jitgrad.ir.replay import evaluate
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import full, sum_to, zero_of
from jitgrad.ops.gradient import continue_graph, reverse

__all__ = ["foreach"]


def group_operands(xs: Sequence[Any], groups: int, shared: int) -> list[list[Any]]:
    """For each group its operands, in the order of the body's inputs behind the shared ones."""
    own = xs[shared:]
    return [list(own[group::groups]) for group in range(groups)]


def _infer_foreach(*xs: TensorType, body: Graph, groups: int, shared: int) -> tuple[TensorType, ...]:
    count = len(body.inputs) - shared
    if groups < 1 or count < 1 or len(xs) != shared + groups * count:
        raise complain(ShapeError, "foreach", f"{len(xs)} operands for {groups} group(s) of {count}, {shared} shared")
    if any(x.shape for x in xs[:shared]):
        raise complain(ShapeError, "foreach", "shared operands are 0-d")
    members = group_operands(xs, groups, shared)
    for operands in members:
        for given, parameter in zip([*xs[:shared], *operands], body.inputs, strict=True):
            if given.dtype is not parameter.dtype:
                raise complain(DTypeError, "foreach", f"the body takes {parameter.dtype.short}, got {given}")
        for x in operands[1:]:
            if x.shape not in ((), operands[0].shape):
                raise complain(ShapeError, "foreach", f"{x} in a group of {operands[0]}")
    return tuple([operands[0].with_dtype(v.dtype) for v in body.outputs for operands in members])


def _foreach(*xs: np.ndarray, body: Graph, groups: int, shared: int) -> tuple[np.ndarray, ...]:
    results = []
    for operands in group_operands(xs, groups, shared):
        outputs = evaluate(body, [*xs[:shared], *operands])
        shape = operands[0].shape
        # A result that reads only scalars, or hands an operand on, still has to be an array of its own.
        results.append([np.array(np.broadcast_to(r, shape)) if r.shape != shape or any(r is x for x in xs) else r
                        for r in outputs])
    return tuple([result[k] for k in range(len(body.outputs)) for result in results])


def _body_gradient(body: Graph) -> Graph:
    """Over 0-d values: the inputs of `body` and a gradient for each of its outputs -> a gradient for each input."""
    builder = continue_graph(body)
    with builder:
        seeds: dict[Any, Any] = {}
        for v in body.outputs:
            g = builder.input(v.type)
            seeds[v] = ops.add(seeds[v], g) if v in seeds else g
        found = reverse(body.nodes, seeds, body.inputs)
        gradients = [found[v] if v in found else full((), zero_of(v.dtype), v.dtype) for v in body.inputs]
    return builder.build(gradients)


def _foreach_gradient(gs: tuple[Any, ...], xs: tuple[Any, ...], body: Graph, groups: int,
                      shared: int) -> tuple[Any, ...]:
    """One foreach over the body's backward pass; what was 0-d gets the sum over where it was used."""
    spread = ops.foreach(*xs, *gs, body=_body_gradient(body), groups=groups, shared=shared)
    totals = []
    for k in range(shared):
        total, *others = [sum_to(g, ()) for g in spread[k * groups:(k + 1) * groups]]
        for g in others:
            total = ops.add(total, g)
        totals.append(total)
    own = [sum_to(g, x.shape) for g, x in zip(spread[shared * groups:], xs[shared:], strict=True)]
    return (*totals, *own)


foreach: Op = register(Op(
    "foreach", ("xs",), _infer_foreach, _foreach, "foreach", vjp=_foreach_gradient, variadic=True, outputs=0,
    doc="`body` carried out for each of `groups` groups of operands; as many results as body outputs times groups."))
