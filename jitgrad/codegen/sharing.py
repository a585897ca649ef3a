"""Which results of a region or foreach may lie in the memory of an operand.

A kernel reads everything at an index before it writes there, so an output can take the memory of an input that is read
at the output's own index and nowhere else. What the memory plan decides from this becomes `shared` of `lower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jitgrad.codegen.region import Region, analyse
from jitgrad.ir.graph import Node, Value
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType

WHOLE = ("attention", "concat", "pool", "pool_grad", "recurrence")
"""Templates whose kernels read all of their operands at any time."""


def shareable(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """All pairs (output, input) that may be one memory; the plan picks at most one for each output and each input."""
    if op.kind == "foreach":
        return _foreach_pairs(inputs, attrs)
    if op.kind != "region" or attrs["template"] in WHOLE:
        return ()
    region = analyse(attrs["body"], ())
    readers = _factors(region)
    return tuple([(k, i) for k in range(len(region.outputs)) for i, v in enumerate(region.body.inputs)
                  if v not in readers and _same_place(region, k, v)])


@lru_cache(maxsize=4096)
def shareable_by(node: Node) -> frozenset[tuple[int, int]]:
    """`shareable` of a node."""
    return frozenset(shareable(node.op, tuple([v.type for v in node.inputs]), node.attrs))


def _same_place(region: Region, output: int, value: Value) -> bool:
    made, index, _ = region.outputs[output]
    read = region.demands.only(value)
    return made.type == value.type and read is not None and region.axes.same(read, index)


def _factors(region: Region) -> set[Value]:
    """Inputs that a contraction reads, or that its factors are made of: whole rows and columns, not one place."""
    found: set[Value] = set()
    for node in reversed(region.body.nodes):
        if node.op.kind == "contraction" or not found.isdisjoint(node.outputs):
            found.update(node.inputs)
    return found


def _foreach_pairs(inputs: tuple[TensorType, ...], attrs: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    body, groups, shared = attrs["body"], attrs["groups"], attrs["shared"]
    first, pairs = inputs[shared:shared + groups], list[tuple[int, int]]()
    for j, parameter in enumerate(body.inputs[shared:]):
        begin = shared + j * groups
        whole = [g for g in range(groups) if inputs[begin + g].shape == first[g].shape]
        for k, v in enumerate(body.outputs):
            if v.dtype is parameter.dtype:
                pairs += [(k * groups + g, begin + g) for g in whole]
    return tuple(pairs)
