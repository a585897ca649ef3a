"""What lowerings of primitives with hand-written kernels are written with: the node as a `Call`, the registry of them.

A lowering turns a node's shapes into the few integers that its kernels take: rank and element type choose the text,
sizes never do. `library` collects them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jitgrad.codegen.kernel import Argument, Blocks, Buffer, Function, Launch, Lowered
from jitgrad.ir.graph import Node
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm

BLOCK = 16384                                   # elements of an item where any number would do
LINES = 64                                      # neighbouring lines of one item


@dataclass(frozen=True, slots=True)
class Call:
    """One node to be lowered: its types, its attributes, and the memory of each operand."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    attrs: Mapping[str, Any]
    shared: Mapping[int, int]
    tf32: bool = False
    """Whether a GPU may round float32 factors to TF32."""

    def input(self, i: int) -> Buffer:
        return Buffer(i)

    def output(self, i: int = 0) -> Buffer:
        """The memory of output i: that of an input where both share a slot."""
        return Buffer(self.shared[i] if i in self.shared else len(self.inputs) + i)

    def scratch(self, i: int) -> Buffer:
        return Buffer(len(self.inputs) + len(self.outputs) + i)


Lowering = Callable[[Call], Lowered | None]

LIBRARY: dict[str, Lowering] = {}
"""What lowers each op that has a kernel of its own."""

IN_PLACE: dict[str, tuple[int, int]] = {}
"""Those of which a result had best lie in the memory of an operand: the numbers of both."""


def lowers(name: str, *, in_place: tuple[int, int] | None = None) -> Callable[[Lowering], Lowering]:
    """Enter a function into `LIBRARY` under the name of an op, and `in_place` into `IN_PLACE`."""

    def enter(function: Lowering) -> Lowering:
        LIBRARY[name] = function
        if in_place is not None:
            IN_PLACE[name] = in_place
        return function

    return enter


def lower_call(node: Node) -> Lowered | None:
    """A node by what is in `LIBRARY`, its results in memory of their own."""
    inputs, outputs = [tuple([v.type for v in values]) for values in (node.inputs, node.outputs)]
    return LIBRARY[node.op.name](Call(inputs, outputs, node.attrs, {}))


def launch(source: str, items: int, *arguments: Argument, blocks: Blocks | None = None) -> Launch:
    """A launch of the one function in `source`."""
    return Launch(source[4:source.index("(")], source, items, arguments, blocks)


def product_core(short: str) -> Function:
    """The kernel that multiplies matrices, as an argument of those that call it."""
    return Function(f"gemm_{short}", gemm.source(short))


def split(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """The shape as (outer, size of `axis`, inner)."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1:])
