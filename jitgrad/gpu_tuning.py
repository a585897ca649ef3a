"""`tuning` for a GPU: what computes a product or a convolution, a kernel of ours or a library, is measured there, once.

In goes a step of a plan, with what is allowed about its products and convolutions; out come answers, found and kept as
`tuning` says. A way is timed without Python: its launches, repeated, are one CUDA graph between two events. Decisions are
kept for each kind of GPU and each library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jitgrad import gpu_linking, plans, tuning
from jitgrad.codegen.choice import answering
from jitgrad.codegen.cuda_product import Products
from jitgrad.runtime.cuda import code, launch, streams
from jitgrad.runtime.cuda.array import DeviceArray, moved
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import Graph, LaunchPlan
from jitgrad.runtime.cuda.plan import Frame, GpuPlan
from jitgrad.runtime.spec import Decision, PlanSpec
from jitgrad.transforms.memory import Assignment, Step


def chooser(decisions: Sequence[Decision]) -> gpu_linking.Choose | None:
    """The answers that were decided on before, if there are any; nothing is measured."""
    known = tuning.chooser(decisions)

    def choose(step: Step, allowed: Products) -> Mapping[str, str]:
        return known(step) if known else {}

    return choose if known else None


@dataclass
class GpuTuner(tuning.Tuner):
    """Decides for the steps of one plan on `gpu`."""

    gpu: Gpu = field(kw_only=True)

    def for_step(self, step: Step, allowed: Products) -> Mapping[str, str]:
        """The answers of a step."""
        return self.decide(GpuBench(step, allowed, self.gpu))


class GpuBench(tuning.Bench):
    """A step by itself on a GPU."""

    def __init__(self, step: Step, allowed: Products, gpu: Gpu):
        super().__init__(step)
        self.allowed, self.gpu = allowed, gpu

    def stored_as(self, key: str) -> str:
        text = f"{key}\0{plans.fingerprint()}\0{self.allowed.key}\0{self.gpu.name}\0{code.architecture(self.gpu)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def ask(self) -> None:
        gpu_linking.lower_step(self.step, code.architecture(self.gpu), self.allowed)

    def lower(self, answers: Mapping[str, str]) -> Any:
        with answering(answers):
            return gpu_linking.lower_step(self.step, code.architecture(self.gpu), self.allowed)

    def _plan(self, answers: Mapping[str, str]) -> tuning.Timed:
        assignment = Assignment([self.step], list(self.step.outputs))
        linked = gpu_linking.link(assignment, code.architecture(self.gpu), self.allowed, lambda step, allowed: answers)
        spec = gpu_linking.plan_spec(self.graph, assignment, linked, self.graph, code.architecture(self.gpu))
        return _Repeated(spec, self.gpu, [moved(array, self.gpu.device) for array in self.memory])


class _Repeated(tuning.Timed):
    """A plan that runs on `memory`, operands and results, over and over."""

    def __init__(self, spec: PlanSpec, gpu: Gpu, memory: list[DeviceArray]):
        self.gpu, self.memory = gpu, memory
        self.stream = streams.current_stream(gpu.index)
        self.frame = Frame(GpuPlan(spec, gpu), self.stream)
        self.graphs: dict[int, Graph] = {}
        inputs = memory[:len(spec.inputs)]
        own: list[DeviceArray | None] = [array if output.source == ("output", k) else None for k, (output, array) in
                                         enumerate(zip(spec.outputs, memory[len(spec.inputs):], strict=True))]
        self.arena = self.frame._arena(False)
        addresses = self.frame._addresses(inputs, list(inputs), own, self.arena)
        self.steps = [step for step in self.frame.steps if isinstance(step, LaunchPlan)]
        for step in self.steps:
            step.bind(addresses)
        self._enqueue(1, self.stream)                       # kernels are loaded at their first launch
        self.stream.synchronize()

    def _enqueue(self, calls: int, stream: streams.Stream) -> None:
        for _ in range(calls):
            for step in self.steps:
                step.run(stream)

    def seconds(self, calls: int) -> float:
        if calls not in self.graphs:
            self.graphs[calls] = launch.capture(partial(self._enqueue, calls), self.gpu)
        begin, end = streams.Event(enable_timing=True), streams.Event(enable_timing=True)
        begin.record(self.stream)
        self.graphs[calls].launch(self.stream)
        end.record(self.stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls
