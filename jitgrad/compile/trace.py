"""What a `Recorder` keeps: memory and lazy Tensors as the graph sees them, and the course of the call so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.compile.location import ON_CPU, Location
from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.op import Op
from jitgrad.tensor import Tensor


class Unit:
    """One piece of memory as the graph sees it: its current value, and where it came from."""

    __slots__ = ("array", "dirty", "initial", "tensor", "value", "writes")

    def __init__(self, value: Value, tensor: Any = None):
        self.value = value
        self.initial = value            # of a captured unit: the graph's input
        self.tensor = tensor            # captured: the real Tensor; None of one that is still lazy
        self.array: Any = None          # of a lazy unit: its memory, when the graph has run
        self.dirty = False
        self.writes = 0


class Pending:
    """What a lazy Tensor is: a view (`chain` of movement ops) of a unit, with its value as of `seen` writes."""

    __slots__ = ("chain", "seen", "unit", "value")

    def __init__(self, unit: Unit, chain: tuple[tuple[Op, dict[str, Any]], ...] = ()):
        self.unit = unit
        self.chain = chain
        self.value: Value | None = None
        self.seen = -1


@dataclass(frozen=True, slots=True)
class Made:
    """Memory that a segment of the call made: which of all outputs so far, and the movement from there."""

    output: int
    chain: tuple[tuple[Op, dict[str, Any]], ...] = ()


@dataclass(slots=True)
class Segment:
    """What one flush ran: the graph, where its inputs come from, whether all of them were dense, and the inputs and
    outputs that gradients go between, with the blocks of nodes that are then computed again. A value that several
    Tensors have, or that was an input's before the graph ran, is copied: inputs before, outputs after; the copies count
    as outputs behind those of the graph."""

    graph: Graph
    inputs: list[Tensor | Made]
    dense: bool
    edge: tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]] | None
    copied_inputs: list[int]
    copied_outputs: list[int]
    location: Location = ON_CPU

    @property
    def count(self) -> int:
        """Outputs with copies."""
        return len(self.graph.outputs) + len(self.copied_inputs) + len(self.copied_outputs)


@dataclass(slots=True)
class Outcome:
    """What Python learned about a Tensor: a bool or an int, of what, and how many guards had been noted by then. With no
    `kind` Python learned nothing: the call goes on with a graph for another device."""

    kind: type | None
    value: Any
    source: Tensor | Made | None
    guards: int


@dataclass(slots=True)
class Given:
    """The part of a call that was carried out before its body runs: graphs (their keys) with their outputs, and
    outcomes. The recorder does none of it again."""

    segments: list[tuple[Any, list[np.ndarray]]]
    outcomes: list[Any]


class Fence:
    """Values of one graph that were there before a second computation, and their barriers. Numbers of one element stay
    what they are."""

    def __init__(self, builder: GraphBuilder, after: Value):
        self.builder = builder
        self.after = after
        self.first = builder.count
        self.behind: dict[Value, Value] = {}

    def pass_through(self, builder: GraphBuilder, value: Value) -> Value:
        """What the second computation reads for `value`."""
        if builder is not self.builder or value.id >= self.first or value.type.size < 2:
            return value
        if value not in self.behind:
            self.behind[value] = builder.run(ops.barrier, (value, self.after), {})
        return self.behind[value]
