"""Training steps on a GPU, by jitgrad and PyTorch, eager and compiled, in turns: seconds per step where steps follow each
other, until Python has a step back, memory at its peak, first calls, and whether all compute the same.

All contenders begin with equal weights and have one batch. The peak is that of a contender's first steps beyond what was
there before it: parameters, state, gradients, activations.
"""

from __future__ import annotations

import importlib
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.contenders import equal_start, step_in
from benchmarks.gpu.bench import Bench, Timed, precision
from benchmarks.gpu.case import USUAL, Result, Way
from benchmarks.kernels.run import best_peer, failures
from benchmarks.report import Table, milliseconds, ratio
from benchmarks.steps import GPU_STEPS, TrainingStep, gpt2

LOSSES = 5
SMALL = gpt2.Sizes(layers=1, width=16, heads=2, vocabulary=32, batch=2, tokens=8)


@dataclass(frozen=True, slots=True)
class Step:
    """One of the training steps."""

    name: str
    step: TrainingStep
    rank: int

    def run(self, bench: Bench) -> Result:
        """`seconds`, `host`, `memory` (bytes), `first` and `losses` by contender, and what `failed`."""
        with precision(False, [package for package in ("jitgrad", "torch") if bench.has(package)]):
            return self._measure(bench)

    def _measure(self, bench: Bench) -> Result:
        start = equal_start(self.step, "torch" if bench.has("torch") else "jitgrad")
        result: Result = {"title": self.step.title, "tokens": self.step.tokens, "failed": {}, "first": {}, "losses": {},
                          "memory": {}}
        calls: dict[str, Timed] = {}
        for name, way in USUAL.items():
            if not bench.takes_part(name, way.package):
                continue
            try:
                calls[name] = self._first_steps(name, way, start, bench, result)
            except Exception:
                result["failed"][name] = traceback.format_exc()
        longer = replace(bench, seconds=4 * bench.seconds, calls=-(-bench.calls // 4))
        for key, clock in (("seconds", bench.steady), ("host", bench.host)):
            result[key] = {name: record["median"] for name, record in longer.compare(calls, clock).items()}
        return result

    def _first_steps(self, name: str, way: Way, start: Any, bench: Bench, result: Result) -> Timed:
        lib, device = importlib.import_module(way.package), bench.device_of(way.package)
        before = lib.cuda.memory_allocated() if device != "cpu" else 0
        if device != "cpu":
            lib.cuda.reset_peak_memory_stats()
        call = bench.timed(step_in(lib, self.step, *start, way.compiler(), device), way.package)
        begin = time.perf_counter()
        losses = [call().item()]
        result["first"][name] = time.perf_counter() - begin
        result["losses"][name] = losses + [call().item() for _ in range(LOSSES - 1)]
        if device != "cpu":
            result["memory"][name] = lib.cuda.max_memory_allocated() - before
        return call


def cases(small: bool = False) -> list[Step]:
    """GPT-2 first."""
    steps = {"gpt2": gpt2.make_step(SMALL), "mlp_small": GPU_STEPS["mlp_small"]} if small else GPU_STEPS
    return [Step(name, step, 0 if name in ("gpt2", "mlp") else 1) for name, step in steps.items()]


def table(results: Result) -> Table:
    """One row per step: milliseconds, and what follows from them."""
    rows = []
    for r in results.values():
        cells = [milliseconds(r["seconds"].get(name)) for name in USUAL]
        ours, compiled = r["seconds"].get("jitgrad"), r["seconds"].get("torch.compile")
        losses = list(zip(*r["losses"].values()))
        apart = max((max(together) - min(together) for together in losses), default=0.0)
        rows.append([r["title"], *cells, ratio(compiled, ours), ratio(best_peer(r), ours), f"{apart:.0e}"])
    return Table("training steps, milliseconds", ["step", *USUAL, "torch.compile / jitgrad", "best peer / jitgrad",
                                                  "difference of losses"], rows, failures(results))


def more(results: Result) -> Table:
    """Tokens per second, memory, the computer's time, and first calls in this process."""
    rows = []
    for r in results.values():
        for name in r["seconds"]:
            tokens = f"{r['tokens'] / r['seconds'][name]:,.0f}" if r["tokens"] else "–"
            memory = f"{r['memory'][name] / 2**20:,.0f}" if name in r["memory"] else "–"
            rows.append([f"{r['title']}: {name}", tokens, memory, f"{1e6 * r['host'][name]:.1f}", f"{r['first'][name]:.2f}"])
    return Table("the same: more about it", ["step and contender", "tokens/s", "peak MiB", "computer's time, us",
                                             "first call, s"], rows)
