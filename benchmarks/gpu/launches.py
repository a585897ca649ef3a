"""What a compiled step of 10 and of 100 kernels costs the computer: seconds until Python has the call back, and until the
GPU is done, per call. The kernels are small products that depend on each other, so that nothing joins them.

jitgrad's step is one launch of a CUDA graph; PyTorch takes part eagerly, compiled, and compiled into a CUDA graph.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.bench import Bench, Timed
from benchmarks.gpu.case import COMPILED, EAGER, OURS, WARM, Result, Way
from benchmarks.kernels.run import failures
from benchmarks.report import Table

LIMIT = 10e-6                                   # seconds of the computer's time for 100 kernels
SIZE = 64
WAYS = {"jitgrad": OURS, "PyTorch": EAGER, "torch.compile": COMPILED,
        "torch.compile, graph": Way("torch", True, mode="reduce-overhead")}


def chain_of(count: int) -> Callable[[Any, Any], Any]:
    """A function of `count` products."""
    def products(x: Any, weight: Any) -> Any:
        for _ in range(count):
            x = x @ weight
        return x
    return products


@dataclass(frozen=True, slots=True)
class Chain:
    """A step of `count` kernels."""

    count: int
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.count} kernels"

    def run(self, bench: Bench) -> Result:
        """Of every contender the seconds until Python has a call back (`seconds`), and until it is done (`done`); how many
        launches jitgrad's plan has, and whether it became a CUDA graph."""
        result: Result = {"work": self.count, "failed": {}}
        calls: dict[str, Timed] = {}
        for name, way in WAYS.items():
            if not bench.takes_part(name, way.package):
                continue
            try:
                calls[name] = self._call(way, bench, result)
            except Exception:
                result["failed"][name] = traceback.format_exc()
        for key, clock in (("seconds", bench.host), ("done", bench.steady)):
            result[key] = {name: record["median"] for name, record in bench.compare(calls, clock).items()}
        return result

    def _call(self, way: Way, bench: Bench, result: Result) -> Timed:
        operands = [bench.for_package(bench.normal(SIZE, SIZE, scale=SIZE ** -0.5), way.package) for _ in range(2)]
        step = way.compiler()(chain_of(self.count))
        call = bench.timed(lambda: step(*operands), way.package)
        for _ in range(WARM):
            call()
        call.wait()
        if way is OURS:
            plan = step.plan.plan
            result["launches"], result["captured"] = len(plan.spec.entries), plan.is_captured
        return call


def cases(small: bool = False) -> list[Chain]:
    """In the order of the table."""
    return [Chain(3)] if small else [Chain(100), Chain(10)]


def table(results: Result) -> Table:
    """A row per step: microseconds."""
    names = [name for name in WAYS if any(name in r["seconds"] for r in results.values())]
    rows = []
    for case, r in results.items():
        cells = [f"{1e6 * r['seconds'][n]:.1f} ({1e6 * r['done'][n]:.1f})" if n in r["seconds"] else "–" for n in names]
        within = r["seconds"].get("jitgrad", LIMIT) < LIMIT
        rows.append([case, f"{r.get('launches', '–')}{', one graph' * r.get('captured', False)}", *cells,
                     "within" if within else "ABOVE"])
    return Table("a compiled step: microseconds of the computer's time (until the GPU is done)",
                 ["step", "jitgrad's launches", *names, f"{1e6 * LIMIT:.0f} us"], rows, failures(results))
