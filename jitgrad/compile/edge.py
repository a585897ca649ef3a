"""Gradients across the edge of a compiled call: the whole call is one node on the eager tape.

When a call returns Tensors whose gradients are still to be computed, its graph is differentiated and divided: the
forward plan also returns the values that the backward plan reads, and those belong to the call. `backward` runs the
backward plan, compiled at first use. Under ``create_graph``, or while another function is being compiled, the backward
pass is carried out op by op under the current interpreter, so that it has a history of its own.

A graph knows nothing of ``detach`` and ``no_grad``; the recorder says (`Recorder.is_plain`) when the history of a
result is just the graph's. When it is not, the tape that the recording left stays, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import autograd, ops
from jitgrad.compile.location import CPU
from jitgrad.errors import AutogradError, complain
from jitgrad.ir import interpreter, replay
from jitgrad.ir.graph import Graph
from jitgrad.ir.types import TensorType
from jitgrad.tensor import Tensor, _wrap
from jitgrad.transforms.attention import recognize_attention
from jitgrad.transforms.autodiff import split, vjp

Run = Callable[[Graph, list[np.ndarray]], list[np.ndarray]]


class Edge:
    """How gradients of outputs `of` of a graph reach its inputs `wrt`: the two halves, shared by all calls. `blocks` of
    nodes are computed again in the backward half."""

    def __init__(self, graph: Graph, wrt: tuple[int, ...], of: tuple[int, ...], blocks: tuple[tuple[int, int], ...] = ()):
        if not blocks:                          # they are counted in nodes of this very graph
            graph = recognize_attention(graph)  # before its parts become two graphs
        self.graph = graph
        self.wrt = wrt
        self.of = of
        self.halves = split(vjp(graph, wrt, of, blocks))
        self.computed = [k for k, source in enumerate(self.halves.saved_inputs) if source is None]
        count = len(graph.outputs)
        saved = [self.halves.forward.outputs[count + k] for k in self.computed]
        self.forward = self.halves.forward.replace(outputs=(*graph.outputs, *saved))
        self.types = tuple([graph.outputs[k].type for k in self.halves.seeds])

    def node(self, tensors: Sequence[Tensor], saved: list[np.ndarray], run: Run, device: str) -> EdgeNode:
        """The tape node of one call on `tensors` whose forward plan, which ran on `device`, gave `saved`."""
        return EdgeNode(self, tensors, saved, run, device)


class EdgeNode(autograd.TapeNode):
    """One compiled call on the tape."""

    __slots__ = ("device", "edge", "run", "saved", "versions")

    def __init__(self, edge: Edge, tensors: Sequence[Tensor], saved: list[np.ndarray], run: Run, device: str):
        super().__init__(tuple([autograd.edge_of(tensors[k]) for k in edge.wrt]))
        self.edge = edge
        self.run = run
        self.device = device                    # of the graph; its inputs, outputs and gradients may be elsewhere
        # Kept: inputs that the backward plan reads, those that a second order would start from, and what was saved.
        kept = (*tensors, *[_wrap(a) for a in saved])
        edges = [*[autograd.edge_of(t) for t in tensors], *[None] * len(saved)]
        self.saved: Any = autograd.keep(self.name, kept, edges, may_end=False)
        read = {source for source in edge.halves.saved_inputs if source is not None}
        self.versions = {k: tensors[k]._count() for k in read}

    @property
    def name(self) -> str:
        return "CompiledBackward"

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return self.edge.types

    def free(self) -> None:
        self.freed = True
        self.saved = None

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        if self.saved is None:
            raise complain(AutogradError, self.edge.graph.name, "backward through this compiled call a second time, "
                           "but what it saved was freed by the first",
                           fix="Pass retain_graph=True to the first backward() or grad()")
        if type(self.saved) is tuple:
            kept = self.saved
            self._check_versions(kept)
        else:
            kept = self.saved.fetch(gradients)
        inputs, saved = kept[:len(self.edge.graph.inputs)], kept[len(self.edge.graph.inputs):]
        seeds = [ops.zeros_like(t) if g is None else g for g, t in zip(gradients, self.edge.types)]
        return self._again(inputs, seeds) if autograd.mode.enabled else self._pull(inputs, saved, seeds)

    def _check_versions(self, inputs: Sequence[Tensor]) -> None:
        for k, version in self.versions.items():
            if inputs[k]._count() != version:
                raise complain(AutogradError, self.edge.graph.name, f"a value needed for its gradient "
                               f"({inputs[k].tensor_type}) was changed in place after the call",
                               fix="Call backward() before the change, or clone() the value before the call")

    def _pull(self, inputs: Sequence[Tensor], computed: Sequence[Tensor], seeds: list[Any]) -> list[Any]:
        halves = self.edge.halves
        rest = iter(computed)
        saved = [next(rest) if source is None else inputs[source] for source in halves.saved_inputs]
        if isinstance(interpreter.state.current, type(interpreter._State.current)):
            results = [_wrap(a) for a in self.run(halves.backward, [t._array for t in (*saved, *seeds)])]
        else:                                         # inside of another compiled function: recorded there
            results = list(replay(halves.backward, self._here([*saved, *seeds])))
        return [None if k is None else results[k].to(inputs[of].device) for k, of in zip(halves.gradients, self.edge.wrt)]

    def _again(self, inputs: Sequence[Tensor], seeds: list[Any]) -> list[Any]:
        """The gradient with a history: forward once more, op by op, and back with ``create_graph``."""
        edge = self.edge
        results = replay(edge.graph, self._here(inputs))
        outputs = [results[k] for k in edge.halves.seeds]
        wanted = [inputs[k] for k in edge.wrt]
        found = autograd.grad(outputs, wanted, self._here(seeds), retain_graph=True, create_graph=True, allow_unused=True)
        return list(found)

    def _here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of a GPU's graph on that GPU."""
        return list(tensors) if self.device == CPU else [t.to(self.device) for t in tensors]
