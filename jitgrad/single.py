"""What eager execution on the CPU and on GPUs shares: one op on given types as a graph, and questions by which it is kept.

In: an op, its attributes, the types of operands that lie in one piece, the movement that makes the operands of them, and
which of them results replace. Out: a graph of that op alone, for `native_ops` and `gpu_ops` to make a plan of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.movement import Chain, moved
from jitgrad.ops.derived import Derived


class Question:
    """An op with attributes. Two are equal if the ops are: the attributes' key is compared beside them."""

    __slots__ = ("attrs", "op")

    def __init__(self, op: Op, attrs: dict[str, Any]):
        self.op, self.attrs = op, attrs

    def __hash__(self) -> int:
        return hash(self.op.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and self.op is other.op

    def graph(self, types: Sequence[TensorType], chains: Sequence[Chain], written: tuple[int, ...]) -> Graph:
        """The op on inputs of `types`, each moved by its chain. `written`: the inputs that results replace; with none,
        they are outputs."""
        builder = GraphBuilder(self.op.name)
        inputs = [builder.input(t) for t in types]
        with builder:
            operands: list[Value] = [moved(v, chain) for v, chain in zip(inputs, chains, strict=True)]
            if isinstance(self.op, Derived):
                made = self.op.definition(*operands, **self.attrs)
            else:
                made = builder.run(self.op, tuple(operands), self.attrs)
        results = list(made) if isinstance(made, tuple) else [made]
        return builder.build([], list(zip(written, results, strict=True))) if written else builder.build(results)


def overlap(spans: Iterable[tuple[int, int]]) -> bool:
    """Whether any two pieces of memory, each given by its address and its bytes, have a byte in common."""
    return any([place + nbytes > following for (place, nbytes), (following, _) in pairwise(sorted(spans))])
