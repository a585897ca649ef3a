"""`compare`: the receipt of compiling a function. What it costs, what it saves, and whether results are the same."""

from __future__ import annotations

import html
import math
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from jitgrad import config, gpu_plans, plans
from jitgrad.compile.api import CompiledFunction
from jitgrad.compile.location import bare
from jitgrad.compile.state import State
from jitgrad.runtime import build as kernels
from jitgrad.runtime.cuda import code, driver, memory, streams
from jitgrad.tensor import Tensor
from jitgrad.tree import flatten


@dataclass(frozen=True)
class Receipt:
    """Seconds, bytes and differences of one function, eager and compiled. Prints as a table."""

    name: str
    eager: float                    # seconds per call, median
    compiled: float
    first_cold: float               # first call with an empty cache
    first_warm: float               # first call with a filled one, kernels not yet loaded
    memory_eager: int               # peak of one call, bytes
    memory_compiled: int
    difference: float               # largest, in units in the last place of the larger value
    difference_absolute: float
    sealed: bool
    note: str = ""

    @property
    def speedup(self) -> float:
        return self.eager / self.compiled

    @property
    def calls_to_pay(self) -> float:
        """After how many calls the first one (cold) has paid; infinite when compiled is not faster."""
        gain = self.eager - self.compiled
        return math.ceil(max(self.first_cold - self.compiled, 0) / gain) if gain > 0 else math.inf

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, as printed."""
        return [
            ("eager", f"{_time(self.eager)} per call"),
            ("compiled", f"{_time(self.compiled)} per call, {self.speedup:.1f}x{'' if self.sealed else ', replayed'}"),
            ("first call, cold", _time(self.first_cold)),
            ("first call, warm", _time(self.first_warm)),
            ("paid after", "never" if math.isinf(self.calls_to_pay) else f"{self.calls_to_pay:,.0f} calls"),
            ("peak memory", f"eager {_bytes(self.memory_eager)}, compiled {_bytes(self.memory_compiled)}"),
            ("largest difference", f"{self.difference:.3g} ulp ({self.difference_absolute:.2g})"),
        ]

    def __str__(self) -> str:
        lines = [f"{self.name}: eager against compiled"]
        lines += [f"  {label:<20}{value}" for label, value in self.rows()]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in self.rows())
        return f"<b>{html.escape(self.name)}</b><table>{rows}</table>{html.escape(self.note)}"


def compare(function: Any, *args: Any, seconds: float = 1.0, **kwargs: Any) -> Receipt:
    """Run `function` eagerly and compiled on the same arguments and starting from the same state, which is restored
    afterwards (Tensors, gradients, optimizer state, random streams). About `seconds` are spent on each side.

    What Python does besides (printing, counters) happens in every run and cannot be undone."""
    plain = function.function if isinstance(function, CompiledFunction) else function
    given = function if isinstance(function, CompiledFunction) else CompiledFunction(plain)
    options: dict[str, Any] = {"memory_budget": given.memory_budget, "mode": given.mode}
    name = getattr(plain, "__name__", type(plain).__name__)
    state = State(plain, (args, kwargs))
    try:
        with config.scope(disable=True):
            expected = _observed(plain, state, args, kwargs)
            memory_eager = _allocated(lambda: plain(*args, **kwargs))
            eager = _median(lambda: plain(*args, **kwargs), seconds)
        state.restore()
        with tempfile.TemporaryDirectory() as folder, config.scope(cache=folder):
            first_cold = _first_call(plain, options, state, args, kwargs)
            first_warm = _first_call(plain, options, state, args, kwargs)
            compiled = CompiledFunction(plain, name=name, **options)
            got = _observed(compiled, state, args, kwargs)
            per_call = _median(lambda: compiled(*args, **kwargs), seconds)
        look: Any = import_module("jitgrad.inspect")
        views = [look.PlanView(c.graph, bare(c.plan), memory_budget=given.memory_budget)
                 for c in compiled.statistics.compilations]
        memory = max([view.memory.peak for view in views], default=0)
        ulps, absolute = _difference(expected, got)
        sealed = compiled.statistics.sealed_calls > 0
        why = compiled.statistics.replayed_because or "it was called too rarely"
        notes = [] if sealed else [f"replayed because {why}"]
        notes += [line for view in views for line in look.show_choices(view.choices) if line]
        return Receipt(name, eager, per_call, first_cold, first_warm, memory_eager, memory, ulps, absolute, sealed,
                       "\n  ".join(notes))
    finally:
        state.restore()


def _observed(function: Callable[..., Any], state: State, args: Any, kwargs: Any) -> list[np.ndarray]:
    """The results of one call from the starting state, and all that it changed."""
    state.restore()
    leaves: list[Any] = []
    flatten(function(*args, **kwargs), leaves)
    results = [np.array(t.numpy(force=True)) for t in leaves if isinstance(t, Tensor)]
    return results + list(state.observe().values())


def _first_call(function: Any, options: dict[str, Any], state: State, args: Any, kwargs: Any) -> float:
    """Seconds of a first call, with nothing but the cache folder to draw on."""
    state.restore()
    plans.clear_plans()
    kernels.forget()
    gpu_plans.clear_plans()
    code.forget()
    begin = time.perf_counter()
    CompiledFunction(function, **options)(*args, **kwargs)
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    """Until all GPUs in use are done."""
    for index in driver.in_use():
        streams.synchronize(index)


def _allocated(function: Callable[[], Any]) -> int:
    """The most bytes that one call holds beyond what was there before, on the CPU and on GPUs together."""
    pools = [memory.pool(index) for index in driver.in_use()]
    before = sum(pool.allocated.current for pool in pools)
    for pool in pools:
        pool.reset_peaks()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] + sum(pool.allocated.peak for pool in pools) - before
    finally:
        tracemalloc.stop()


def _median(function: Callable[[], Any], seconds: float) -> float:
    """The median of as many calls as fit into `seconds`, three at least; a call on a GPU ends when that is done."""
    for _ in range(3):
        function()
    _wait()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 10_000):
        begin = time.perf_counter()
        function()
        _wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _difference(expected: list[np.ndarray], got: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference: relative to the largest value of its array in units in the last place, and absolute."""
    ulps = absolute = 0.0
    for a, b in zip(expected, got):
        if a.shape != b.shape or a.dtype.kind not in "fV" or not a.size:
            continue
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        gaps = np.abs(a64 - b64)
        gap = float(np.max(gaps[np.isfinite(gaps)], initial=0.0))
        scale = float(np.max(np.abs(a64[np.isfinite(a64)]), initial=0.0))
        precision = float(np.finfo(a.dtype).eps) if a.dtype.kind == "f" else 2.0 ** -7
        absolute = max(absolute, gap)
        ulps = max(ulps, gap / (precision * scale) if scale else 0.0)
    return ulps, absolute


def _bytes(n: int) -> str:
    shown: str = import_module("jitgrad.inspect").show_bytes(n)
    return shown


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
