"""The first call of a compiled training step, cold and warm, and the import of jitgrad: each in a new process.

Cold: nothing was ever compiled. Warm: another process has run the same step; then no kernel is compiled and Numba is
not imported. NumPy's import is outside of all figures, jitgrad's and llvmlite's are inside; its modules are bytecode, as pip
installs them.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import fresh
from benchmarks.report import Table, target

STEPS = ("mlp_small", "mlp", "cnn")
COLD_LIMIT, WARM_LIMIT, IMPORT_LIMIT = 2.0, 0.15, 0.3         # seconds; of the MLP step


def run(names: Sequence[str] = (), repeats: int = 3) -> dict[str, Any]:
    """Of every step the cold and the warm first call (its parts in seconds; medians of `repeats` processes)."""
    fresh.compile_modules()
    results = {}
    for name in names or STEPS:
        cold, warm = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
                cold.append(fresh.run(first_call, name, cache=cache))
                warm.append(fresh.run(first_call, name, cache=cache))
        results[name] = {"cold": _medians(cold), "warm": _medians(warm)}
        _check_warm(name, results[name]["warm"])
    return results


def first_call(name: str) -> dict[str, Any]:
    """In the child: seconds for import, model and optimizer, first call; and what they loaded and compiled."""
    step = importlib.import_module("benchmarks.steps").STEPS[name]
    batch = step.batch(sys.modules["numpy"].random.default_rng(0))
    watch = fresh.Stopwatch()
    jitgrad = importlib.import_module("jitgrad")
    record = {"import": watch.lap(), "numba_after_import": "numba" in sys.modules}
    training_step = compiled_step(jitgrad, step)
    arguments = [jitgrad.from_numpy(array) for array in batch]
    record["model"] = watch.lap()
    training_step(*arguments).item()
    record["first_call"] = watch.lap()
    record["kernels"], record["numba"] = fresh.kernels_compiled(), "numba" in sys.modules
    return record


def compiled_step(jitgrad: Any, step: Any) -> Any:
    """The training step as a compiled function of a batch, with a new model."""
    model, optimizer = step.build(jitgrad)

    @jitgrad.compile
    def training_step(*batch: Any) -> Any:
        optimizer.zero_grad()
        loss = step.loss(jitgrad, model, *batch)
        loss.backward()
        optimizer.step()
        return loss

    return training_step


def _medians(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(r[key] for r in records) for key in records[0]}


def _check_warm(name: str, warm: dict[str, Any]) -> None:
    if warm["kernels"] or warm["numba"]:
        raise AssertionError(f"{name}: a warm process compiled {warm['kernels']} kernels "
                             f"and {'imported' if warm['numba'] else 'did not import'} Numba")


def table(results: dict[str, Any]) -> Table:
    """A row per step and state of the cache."""
    rows = []
    for name, states in results.items():
        for state, r in states.items():
            limit = COLD_LIMIT if state == "cold" else WARM_LIMIT
            rows.append([f"{name}, {state}", target(r["import"], IMPORT_LIMIT, "s"), f"{r['model']:.3f}",
                         target(r["first_call"], limit, "s"), f"{r['import'] + r['first_call']:.3f}",
                         str(round(r["kernels"])), "yes" if r["numba"] else "no"])
    return Table("first call in a new process, seconds (NumPy imported before)",
                 ["step", "import jitgrad", "model, optimizer", "first call", "import + first call", "kernels compiled",
                  "Numba imported"], rows)
