"""`foreach`: one elementwise program over many groups of tensors, as a single node.

This is how an optimizer updates all parameters at once: its rule is written once, over 0-d values with ordinary operators,
and traced once for each combination of dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional.core import Operand, Tensor, as_operand, is_number
from jitgrad.functional.methods import TensorMethods
from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.interpreter import interpret
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType


class Symbol(TensorMethods):
    """A 0-d value of the program that is being traced; it has the operators and methods of a Tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Value):
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> DType:
        return self.value.dtype


class _BodyTracer:
    """The interpreter that appends what is done with Symbols to a graph."""

    def __init__(self, builder: GraphBuilder):
        self.builder = builder

    def run(self, op: Op, inputs: tuple[Symbol, ...], attrs: dict[str, Any]) -> Any:
        result = self.builder.run(op, tuple([x.value for x in inputs]), attrs)
        return tuple(map(Symbol, result)) if isinstance(result, tuple) else Symbol(result)


@functools.lru_cache(maxsize=256)
def _trace(body: Callable[..., Any], types: tuple[DType, ...]) -> Graph:
    """`body` as a graph over 0-d values of those dtypes."""
    builder = GraphBuilder(body.__name__.strip("_<>"))
    symbols = [Symbol(builder.input(TensorType(t, ()))) for t in types]
    with interpret(_BodyTracer(builder)):
        result = body(*symbols)
    results = result if isinstance(result, (tuple, list)) else (result,)
    return builder.build([r.value for r in results])


def foreach(body: Callable[..., Any], shared: Sequence[Operand], lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """``body(*shared, *operands)`` for each group of operands: ``lists[j][i]`` is operand j of group i. `body` takes 0-d
    values and returns one or several; the result has one list for each of them, with an entry per group, of the shape
    of operand 0. Another operand has that shape or is 0-d. Shared numbers take the dtype of operand 0 (float32 for half
    precision). `body` is traced once per combination of dtypes, so it must be a function that depends on nothing else."""
    groups = len(lists[0])
    if any(len(other) != groups for other in lists):
        raise complain(ShapeError, "foreach", f"lists differ in length: {[len(other) for other in lists]}")
    kinds: dict[tuple[DType, ...], list[int]] = {}
    for i in range(groups):
        kinds.setdefault(tuple([operands[i].dtype for operands in lists]), []).append(i)
    results: list[list[Tensor]] = []
    for types, members in kinds.items():
        outputs = _same_dtypes(body, shared, types, [[operands[i] for i in members] for operands in lists])
        results = results or [[None] * groups for _ in outputs]
        for column, values in zip(results, outputs):
            for i, value in zip(members, values):
                column[i] = value
    return results


def _same_dtypes(body: Callable[..., Any], shared: Sequence[Operand], types: tuple[DType, ...],
                 lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """One node, for groups that agree in the dtypes of their operands."""
    number_type = dtypes.float32 if types[0] in (dtypes.float16, dtypes.bfloat16) else types[0]
    scalars = [as_operand(s, number_type) if is_number(s) else s for s in shared]
    graph = _trace(body, (*[s.dtype for s in scalars], *types))
    groups = len(lists[0])
    flat = ops.foreach(*scalars, *[x for operands in lists for x in operands], body=graph, groups=groups,
                       shared=len(scalars))
    return [list(flat[k:k + groups]) for k in range(0, len(flat), groups)]
