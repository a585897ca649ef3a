"""Peak memory of one training step: what the plan predicts, and what a process really holds, compiled and eager.

Every figure comes from a process of its own, with the kernels in a cache. Measured is the growth of resident memory, at
its largest during a step, over what the process held when jitgrad was loaded and a small step had run in it: parameters,
optimizer state, batch, gradients and everything between. Predicted is `fn.plan.memory.peak`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fresh
from benchmarks.report import Table
from benchmarks.steps import STEPS

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CALLS = 3                       # before the measured ones: the first is recorded, the third is sealed
MEASURED = 3
MIB = 2 ** 20


def run(names: Sequence[str] = ()) -> dict[str, Any]:
    """Of every step the predicted peak and the measured ones, in bytes; nothing where the system does not tell."""
    if not RESET.exists():
        return {}
    results = {}
    for name in names or STEPS:
        with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
            for compiled in (True, False):
                fresh.run(peak, name, compiled, cache=cache)           # fills the cache; it has the compiler loaded
            results[name] = {"title": STEPS[name].title, **fresh.run(peak, name, True, cache=cache),
                             "eager": fresh.run(peak, name, False, cache=cache)["measured"]}
    return results


def peak(name: str, compiled: bool) -> dict[str, int]:
    """In the child: the measured peak of the step called `name`, and the predicted one of its plan."""
    jitgrad = importlib.import_module("jitgrad")
    _call(jitgrad, "mlp_small", compiled)                     # loads what is loaded at a first call
    _give_back()
    before = _field("VmRSS")
    step, call = _call(jitgrad, name, compiled)
    _give_back()
    found = 0
    for _ in range(MEASURED):
        RESET.write_text("5")                                 # forgets the largest resident size so far
        call()
        found = max(found, _field("VmHWM"))
    return {"measured": found - before, "predicted": step.plan.memory.peak if compiled else 0}


def _call(jitgrad: Any, name: str, compiled: bool) -> tuple[Any, Callable[[], Any]]:
    """The step called `name`, and a call of it on its batch, after the first few."""
    step = STEPS[name]
    batch = [jitgrad.from_numpy(array) for array in step.batch(sys.modules["numpy"].random.default_rng(0))]
    model, optimizer = step.build(jitgrad)

    def training_step(*batch: Any) -> Any:
        optimizer.zero_grad()
        loss = step.loss(jitgrad, model, *batch)
        loss.backward()
        optimizer.step()
        return loss

    function = jitgrad.compile(training_step) if compiled else training_step
    for _ in range(CALLS):
        function(*batch)
    return function, lambda: function(*batch)


def _give_back() -> None:
    """Let the C library return free memory to the system, so that what building a model took does not count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _field(name: str) -> int:
    """A size in bytes from the description of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def table(results: dict[str, Any]) -> Table:
    """A row per step: MiB, what the prediction misses, and compiled against eager."""
    rows = []
    for r in results.values():
        off = r["measured"] - r["predicted"]
        rows.append([r["title"], *[f"{r[key] / MIB:.1f}" for key in ("predicted", "measured", "eager")],
                     f"{off / MIB:+.1f} MiB, {off / r['predicted']:+.0%}", f"{r['measured'] / r['eager']:.2f}"])
    return Table("peak memory of a training step, MiB (parameters, state and batch included)",
                 ["step", "predicted", "compiled", "eager", "measured - predicted", "compiled / eager"], rows)
