"""Looking inside: what became of a function, as objects that print as text and show themselves in Jupyter.

    Explanation     one decorated function: sealed or replayed and why, recompiles with their reasons, its plans
    PlanView        one graph and its plan: the graph after every pass, steps, kernels, memory
    StepView        one node of the fused graph: its kernels, bytes, arithmetic, time, and why it stands alone

A PlanView is made from the graph as traced: passes are run again when something is asked for, so a plan from the cache
can be looked at like one made now.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jitgrad import gpu_tuning, pipeline, plans, tuning
from jitgrad.codegen.kernel import CudaLaunch, CudaLibraryCall
from jitgrad.errors import describe_location
from jitgrad.gpu_linking import GpuLinked, GpuStep
from jitgrad.ir.graph import Graph
from jitgrad.ir.printer import highlight, print_graph
from jitgrad.limits import machine_bandwidth, machine_flops
from jitgrad.linking import Linked, LinkedStep
from jitgrad.ops.work import flops
from jitgrad.runtime import threads
from jitgrad.runtime.build import kernel_key
from jitgrad.runtime.cuda import code, timing
from jitgrad.runtime.cuda.plan import GpuPlan
from jitgrad.runtime.plan import Plan
from jitgrad.runtime.spec import Decision
from jitgrad.runtime.timing import time_entries

_MUCH = 16                                   # operations per byte
IN_CACHE = 16 << 20
"""Bytes that may still lie in the cache of a processor."""


@dataclass(frozen=True)
class KernelView:
    """One kernel of a step: its text, the number of work items, and the seconds that compiling it took (None: it came
    from the cache)."""

    name: str
    source: str
    items: int
    compile_seconds: float | None = None

    def __str__(self) -> str:
        return self.source

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return highlight_python(self.source)


@dataclass(frozen=True)
class StepView:
    """One node as it runs. `name` is that of its last kernel, but for one that adds up partial results, or the op's;
    `kind` the region's template or the op's name; `note` says why no more is fused with it. `seconds` is measured by
    `PlanView.time`, of all its kernels together."""

    name: str
    kind: str
    note: str
    where: str
    kernels: tuple[KernelView, ...]
    bytes_read: int
    bytes_written: int
    flops: int
    in_place: bool
    seconds: float | None = None
    bandwidth: float | None = None

    @property
    def share_of_peak(self) -> float | None:
        """Measured against what this machine's memory and arithmetic could do at best; 1.0 is perfect. What fits into
        the cache is not held against memory. On a GPU, which has a `bandwidth` of its own, against a copy of as many
        bytes there."""
        if not self.seconds:
            return None
        moved = self.bytes_read + self.bytes_written
        if self.bandwidth is not None:
            return moved / self.bandwidth / self.seconds
        memory = moved / machine_bandwidth() if moved > IN_CACHE else 0.0
        return max(memory, self.flops / machine_flops()) / self.seconds


@dataclass(frozen=True)
class MemoryView:
    """Bytes of one call. `slots` are the places in the arena: (first step, last step, offset, bytes)."""

    inputs: int
    outputs: int
    constants: int
    arena: int
    slots: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def peak(self) -> int:
        """The most memory that a call needs at one time, inputs included."""
        return self.inputs + self.outputs + self.constants + self.arena

    def __str__(self) -> str:
        parts = ("inputs", "outputs", "constants", "arena")
        lines = [f"{name:<10}{show_bytes(getattr(self, name)):>10}  {bar(getattr(self, name), self.peak)}"
                 for name in parts]
        return "\n".join([*lines, f"{'peak':<10}{show_bytes(self.peak):>10}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class PlanView:
    """A graph and what it is carried out by. `measured` holds seconds per entry, when `time` has been called; on a GPU
    `call` the seconds of a call until Python has it back, and until it is done."""

    graph: Graph
    plan: Plan | GpuPlan
    measured: tuple[float, ...] = ()
    memory_budget: float = 1.0
    call: tuple[float, float] | None = None

    @cached_property
    def build(self) -> pipeline.Build | pipeline.GpuBuild:
        if isinstance(self.plan, GpuPlan):
            arch, allowed = code.architecture(self.plan.gpu), self.plan.allowed
            choose = gpu_tuning.chooser(self.choices)
            return pipeline.build_for_gpu(self.graph, arch, self.memory_budget, allowed, choose)
        return pipeline.build(self.graph, self.memory_budget, tuning.chooser(self.choices))

    @property
    def choices(self) -> tuple[Decision, ...]:
        """What was measured for this plan, in the mode "max-autotune"."""
        return self.plan.spec.choices

    @property
    def stages(self) -> tuple[pipeline.Stage, ...]:
        """The graph as traced and after every pass."""
        return self.build.stages

    @cached_property
    def steps(self) -> tuple[StepView, ...]:
        """What runs, in order."""
        linked = self.build.linked
        bandwidth = timing.bandwidth(self.plan.gpu) if self.measured and isinstance(self.plan, GpuPlan) else None
        seconds: dict[LinkedStep | GpuStep, list[float]] = {step: [] for step in linked.steps}
        for step, measured in zip(_order(linked), self.measured, strict=False):
            seconds[step].append(measured)
        return tuple([_step_view(step, seconds[step], bandwidth) for step in linked.steps])

    @property
    def kernels(self) -> tuple[KernelView, ...]:
        """The kernels, each once."""
        return tuple({k.source: k for step in self.steps for k in step.kernels}.values())

    @cached_property
    def memory(self) -> MemoryView:
        spec = self.build.spec
        outputs = sum(o.type.nbytes for k, o in enumerate(spec.outputs) if o.source == ("output", k))
        slots = self.build.assignment.temporaries
        return MemoryView(sum(t.nbytes for t in spec.inputs), outputs, len(spec.constants),
                          spec.arena + spec.private * threads.limit(),
                          tuple([(s.first, s.last, s.index, s.nbytes) for s in slots]))

    def time(self, inputs: Sequence[np.ndarray], repeats: int = 5) -> PlanView:
        """The same view with the time of every step: the least of `repeats` runs on copies of `inputs`; on a GPU by its
        own clock."""
        if isinstance(self.plan, GpuPlan):
            arrays = timing.on_gpu(inputs, self.plan.gpu)
            runs = [timing.time_entries(self.plan, arrays) for _ in range(repeats)]
            return PlanView(self.graph, self.plan, tuple(np.min(runs, axis=0).tolist()), self.memory_budget,
                            timing.time_call(self.plan, arrays))
        runs = [time_entries(self.plan, [np.array(x, order="C") for x in inputs]) for _ in range(repeats)]
        return PlanView(self.graph, self.plan, tuple(np.min(runs, axis=0).tolist()), self.memory_budget)

    def print_stages(self) -> str:
        """The graph after every pass that changed it."""
        texts, last = [], ""
        for stage in self.stages:
            text = print_graph(stage.graph)
            if text != last:
                texts.append(f"# {_title(stage)}\n{text}")
            last = text
        return "\n\n".join(texts)

    def __str__(self) -> str:
        longest = max([step.seconds or 0.0 for step in self.steps], default=0.0)
        header = _GPU_HEADER if isinstance(self.plan, GpuPlan) else _HEADER
        return "\n".join([header, *[_row(step, longest) for step in self.steps], "", *show_choices(self.choices),
                          *self._show_groups(), *self._show_call(), str(self.memory)])

    def _show_groups(self) -> list[str]:
        """Which kernels run side by side; times are those of each by itself."""
        found: dict[int, list[str]] = {}
        for entry in self.build.spec.entries:
            if entry.group:
                found.setdefault(entry.group, []).append(entry.name)
        lines = [", ".join(f"{name} x {count}" if count > 1 else name for name, count in Counter(names).items())
                 for names in found.values()]
        return [*[f"side by side: {line}" for line in lines], ""] if lines else []

    def _show_call(self) -> list[str]:
        """What a call on a GPU costs beside its kernels."""
        if self.call is None or not isinstance(self.plan, GpuPlan):
            return []
        entries = self.plan.spec.entries
        launched = sum(entry.host is None for entry in entries)
        how = " as CUDA graphs" if self.plan.is_captured else ""
        started, done = (f"{1e6 * seconds:.1f} us" for seconds in self.call)
        copy = f"a copy moves {show_bytes(timing.bandwidth(self.plan.gpu))} per second"
        return [f"{self.plan.gpu.device}, {self.plan.gpu.name}: {copy}",
                f"a call: {launched} launches{how}, {len(entries) - launched} steps of NumPy's; Python has it back after "
                f"{started}, it is done after {done}", ""]

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sections = [_details(_title(stage), highlight(print_graph(stage.graph))) for stage in self.stages]
        sources = [_details(kernel.name, kernel._repr_html_()) for kernel in self.kernels]
        return f"<pre>{html.escape(str(self))}</pre>{''.join(sections)}{''.join(sources)}"


@dataclass(frozen=True)
class Recompile:
    """Why a plan was made: the reason names what changed; `seconds` is what it cost."""

    reason: str
    where: str
    seconds: float

    def __str__(self) -> str:
        place = f"  ({self.where})" if self.where else ""
        return f"{self.reason}{place}: {1000 * self.seconds:.0f} ms"


@dataclass(frozen=True)
class Explanation:
    """What became of a decorated function. `mode` is "sealed", "replayed" or "eager"; `reasons` say why it is not
    sealed, each with the user's line; `calls` counts calls by how they were carried out."""

    name: str
    mode: str
    reasons: tuple[str, ...] = ()
    plans: tuple[PlanView, ...] = ()
    recompiles: tuple[Recompile, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs as traced."""
        return tuple([plan.graph for plan in self.plans])

    @property
    def kernels(self) -> tuple[KernelView, ...]:
        return tuple([kernel for plan in self.plans for kernel in plan.kernels])

    def summary(self) -> str:
        """Everything but the plans."""
        calls = ", ".join(f"{count} {how}" for how, count in self.calls.items())
        lines = [f"{self.name}: {self.mode}" + (f"; calls: {calls}" if calls else "")]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f"  compiled: {recompile}" for recompile in self.recompiles]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n\n".join([self.summary(), *map(str, self.plans)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        plans = [plan._repr_html_() for plan in self.plans]
        return f"<pre>{html.escape(self.summary())}</pre>{'<hr>'.join(plans)}"


# ---- one step ---------------------------------------------------------------------------------------------------


def _order(linked: Linked | GpuLinked) -> list[LinkedStep | GpuStep]:
    """The step of each entry of the plan."""
    if isinstance(linked, Linked):
        return [turn.step for group in linked.turns for turn in group]
    return [step for step in linked.steps for _ in (step.lowered.launches if step.lowered else [None])]


def _step_view(linked: LinkedStep | GpuStep, seconds: Sequence[float], bandwidth: float | None = None) -> StepView:
    node = linked.step.node
    launches = linked.lowered.launches if linked.lowered else ()
    kernels = [KernelView(k.name, str(k.asked), 1, None) if isinstance(k, CudaLibraryCall) else
               KernelView(k.name, k.source, k.grid, None) if isinstance(k, CudaLaunch) else
               KernelView(k.name, k.source, k.items, plans.compile_seconds.get(kernel_key(k.source))) for k in launches]
    named = [k for k in kernels if not k.name.startswith("add_parts")]
    return StepView(name=named[-1].name if named else node.op.name,
                    kind=node.attrs.get("template", node.op.name), note=_note(linked),
                    where=describe_location(node.where), kernels=tuple(kernels),
                    bytes_read=sum({v: v.type.nbytes for v in node.inputs}.values()),
                    bytes_written=sum(v.type.nbytes for v in node.outputs), flops=flops(node),
                    in_place=bool(linked.step.shared), seconds=sum(seconds) if seconds else None, bandwidth=bandwidth)


def _note(linked: LinkedStep | GpuStep) -> str:
    """Why a node is a step of its own."""
    node = linked.step.node
    if linked.lowered is None:
        return "no GPU kernel for it: NumPy, by way of the host" if isinstance(linked, GpuStep) else \
            "no kernel for it: NumPy"
    if node.op.kind == "region":
        return f"{len(node.attrs['body'].nodes)} nodes fused" if node.attrs["body"].nodes else "a copy"
    if node.op.kind == "foreach":
        return f"{node.attrs['groups']} tensors in one kernel"
    if node.op.kind in ("elementwise", "movement", "reduction"):
        return "its result is needed whole before it is read"
    return "has a kernel of its own"


# ---- text -------------------------------------------------------------------------------------------------------

_HEADER = f"{'kernel':<36}{'kind':<10}{'bytes':>10}{'flops':>10}{'time':>10}{'of peak':>9}  line, note"
_GPU_HEADER = f"{'kernel':<36}{'kind':<10}{'bytes':>10}{'flops':>10}{'time':>10}{'rate':>13}{'of copy':>9}  line, note"


def _row(step: StepView, longest: float) -> str:
    moved = step.bytes_read + step.bytes_written
    seconds = f"{1e6 * step.seconds:.1f} us" if step.seconds is not None else ""
    share = step.share_of_peak
    where = f"{step.where}, " if step.where else ""
    note = f"{where}{step.note}{', in place' if step.in_place else ''}"
    length = bar(step.seconds, longest) + " " if step.seconds is not None and longest else ""
    rate = f"{_rate(step):>13}" if step.bandwidth is not None else ""
    return (f"{step.name[:35]:<36}{step.kind[:9]:<10}{show_bytes(moved):>10}{show_count(step.flops):>10}"
            f"{seconds:>10}{rate}{'' if share is None else f'{share:.0%}':>9}  {length}{note}")


def _rate(step: StepView) -> str:
    """Arithmetic per second where there is much of it for each byte, else bytes per second."""
    moved = step.bytes_read + step.bytes_written
    if not step.seconds:
        return ""
    much = step.flops > _MUCH * moved
    return f"{show_count(step.flops / step.seconds)}FLOP/s" if much else f"{moved / step.seconds / 1e9:.3g} GB/s"


def show_choices(choices: Sequence[Decision]) -> list[str]:
    """What was measured, and where something else than the usual way has won; an empty line behind it."""
    if not choices:
        return []
    chosen = [decision for decision in choices if decision.answers]
    candidates, seconds = sum(d.candidates for d in choices), sum(d.seconds for d in choices)
    return [f"measured: {len(choices)} kinds of steps, {candidates} candidates, in {seconds:.1f} s; "
            f"{len(chosen)} not as usual", *[f"  {decision}" for decision in chosen], ""]


def bar(value: float, whole: float, width: int = 20) -> str:
    """``value / whole`` as a bar of at most `width` blocks."""
    return "█" * round(width * value / whole) if whole else ""


def show_bytes(n: float) -> str:
    """``1.5 MiB``"""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"


def show_count(n: float) -> str:
    """``1.5M``"""
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def highlight_python(text: str) -> str:
    """HTML of Python text, by Pygments where that is installed."""
    try:
        from pygments import highlight as paint
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
    except ImportError:
        return highlight(text)
    return str(paint(text, PythonLexer(), HtmlFormatter(noclasses=True)))


def _title(stage: pipeline.Stage) -> str:
    return f"after {stage.name}: {len(stage.graph.nodes)} nodes, {1000 * stage.seconds:.1f} ms"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
