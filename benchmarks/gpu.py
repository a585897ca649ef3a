"""The training steps on a GPU, by jitgrad and PyTorch, eager and compiled, in turns; nothing where there is no GPU.

A call is one step and the wait for its end. PyTorch takes part where it is installed and can use the GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jitgrad
from benchmarks import measure, prerequisites
from benchmarks.contenders import equal_start, step_in
from benchmarks.report import Table, milliseconds
from benchmarks.steps import TrainingStep, chosen
from jitgrad.runtime.cuda import driver

WAYS = {"jitgrad eager": ("jitgrad", False), "jitgrad": ("jitgrad", True), "PyTorch": ("torch", False),
        "torch.compile": ("torch", True)}
LOSSES = 5
Result = dict[str, Any]


def run(names: Sequence[str] = (), *, budget: float, repeats: int | None = None,
        tell: Callable[[str], None] = print) -> Result:
    """Per step the timings and first losses of every contender; or ``{"why": …}``: why nothing can be measured."""
    for finding in prerequisites.findings():
        tell(f"  {finding}")
    if not driver.available():
        tell(f"  nothing is measured: {driver.why_not()}")
        return {"why": driver.why_not(), "steps": {}}
    found = {}
    for name, step in chosen(names).items():
        tell(f"  {step.title} ...")
        found[name] = measure_step(step, budget, repeats)
    return {"gpu": jitgrad.cuda.get_device_name(), "steps": found}


def measure_step(step: TrainingStep, budget: float, repeats: int | None, device: str = "cuda",
                 ways: Sequence[str] = tuple(WAYS)) -> Result:
    """One step by all contenders that can take part."""
    weights, batch = equal_start(step)
    calls, contenders = {}, {}
    for name in ways:
        package, compiled = WAYS[name]
        if package == "torch" and not _torch_has(device):
            continue
        lib = importlib.import_module(package)
        call = step_in(lib, step, weights, batch, lib.compile if compiled else lambda f: f, device)
        contenders[name] = {"losses": [call().item() for _ in range(LOSSES)]}
        calls[name] = _waiting(call, lib, device)
    for name, times in measure.interleave(calls, budget=budget, repeats=repeats).items():
        contenders[name].update(measure.summary(times))
    return {"title": step.title, "contenders": contenders}


def _torch_has(device: str) -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    torch = importlib.import_module("torch")
    return device == "cpu" or bool(torch.cuda.is_available())


def _waiting(call: Callable[[], Any], lib: Any, device: str) -> Callable[[], Any]:
    def one_step() -> None:
        call()
        if device != "cpu":
            lib.cuda.synchronize()
    return one_step


def table(results: Result) -> Table:
    """One row per step: milliseconds, and the largest difference between the losses of two contenders."""
    rows = []
    for result in results["steps"].values():
        records = result["contenders"]
        cells = [milliseconds(records[name]["median"]) if name in records else "–" for name in WAYS]
        spread = max(max(losses) - min(losses) for losses in zip(*[r["losses"] for r in records.values()]))
        rows.append([result["title"], *cells, f"{spread:.0e}"])
    notes = [f"nothing was measured: {results['why']}"] if "why" in results else [results["gpu"]]
    return Table("training steps on a GPU, milliseconds", ["step", *WAYS, "difference"], rows, notes)
