"""The first call of a compiled training step on a GPU, each in a new process: cold, where nothing was ever compiled, and
warm, where another process has run the same step. jitgrad beside torch.compile; imports are outside.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any

from benchmarks import fresh
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import COMPILED, OURS, Result, Way
from benchmarks.kernels.run import failures
from benchmarks.report import Table, ratio

WAYS = {"jitgrad": OURS, "torch.compile": COMPILED}
SHARE = 0.25                                    # of torch.compile's cold call that ours may take


@dataclass(frozen=True, slots=True)
class First:
    """The step of that name."""

    name: str
    small: bool
    rank: int

    def run(self, bench: Bench) -> Result:
        """Seconds by contender and state of the cache."""
        result: Result = {"failed": {}, "seconds": {}}
        for name, way in WAYS.items():
            if not bench.takes_part(name, way.package):
                continue
            try:
                with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
                    given = way.package, self.name, bench.device_of(way.package), self.small
                    found = [fresh.run(first_call, *given, cache=cache) for _ in range(2)]
                result["seconds"][name] = dict(zip(("cold", "warm"), found))
            except Exception:
                result["failed"][name] = traceback.format_exc()
        return result


def first_call(package: str, name: str, device: str, small: bool) -> float:
    """In the child: seconds of the first call, until its loss is read."""
    from benchmarks.contenders import equal_start, step_in
    from benchmarks.gpu.steps import cases

    step = next(case.step for case in cases(small) if case.name == name)
    lib = importlib.import_module(package)
    way: Way = next(way for way in WAYS.values() if way.package == package)
    call: Any = step_in(lib, step, *equal_start(step, package), way.compiler(), device)
    if device != "cpu":
        lib.cuda.synchronize()
    begin = time.perf_counter()
    call().item()
    return time.perf_counter() - begin


def cases(small: bool = False) -> list[First]:
    """In the order of the table."""
    return [First("mlp_small", small, 1)] if small else [First("gpt2", False, 1), First("mlp_small", False, 1)]


def table(results: Result) -> Table:
    """Seconds, and jitgrad's share of torch.compile's."""
    rows = []
    for case, r in results.items():
        for state in ("cold", "warm"):
            ours, theirs = (r["seconds"].get(name, {}).get(state) for name in WAYS)
            cells = ["–" if x is None else f"{x:.2f}" for x in (ours, theirs)]
            verdict = "" if state == "warm" or not ours or not theirs else "within" if ours <= SHARE * theirs else "ABOVE"
            rows.append([f"{case}, {state}", *cells, ratio(theirs, ours), verdict])
    return Table("first call in a new process, seconds", ["step", *WAYS, "torch.compile / jitgrad", "a quarter"], rows,
                 failures(results))
