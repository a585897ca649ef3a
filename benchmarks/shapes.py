"""The first call of a compiled training step with a new size of its batch, in a process that has run another size.

    python -m benchmarks shapes [step …]

Of the time of such a call that of a steady call of the same size is taken off. What remains is what a new shape costs:
the step is recorded and differentiated, every pass runs, and the plan meets memory that is not in any cache of the
processor. Kernels are no part of it: another process has compiled them before. Its plans are removed.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import fresh
from benchmarks.report import Table, target

STEPS = ("gpt", "vit", "mlp")
LIMITS = {"gpt": 0.150}                                     # seconds
WARM_UP, STEADY = 6, 4                                      # calls with the first size, and with each of the others


def run(names: Sequence[str] = ()) -> dict[str, dict[int, float]]:
    """Of every step what its new sizes cost, in seconds."""
    results = {}
    for name in names or STEPS:
        with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
            fresh.run(new_sizes, name, cache=cache)
            shutil.rmtree(Path(cache, "plans"))
            found = fresh.run(new_sizes, name, cache=cache)
            if found["kernels"]:
                raise AssertionError(f"{name}: a process that had all kernels compiled {found['kernels']}")
            results[name] = dict(found["sizes"])
    return results


def new_sizes(name: str) -> dict[str, Any]:
    """In the child: pairs of a size and its seconds, for seven sizes below that of the step and, where there are not so
    many, above it; and how many kernels were compiled."""
    numpy, jitgrad = sys.modules["numpy"], importlib.import_module("jitgrad")
    first_call = importlib.import_module("benchmarks.first_call")
    step = importlib.import_module("benchmarks.steps").STEPS[name]
    batch = step.batch(numpy.random.default_rng(0))
    full = len(batch[0])
    training_step = first_call.compiled_step(jitgrad, step)

    def call(size: int, count: int) -> list[float]:
        arguments = [jitgrad.from_numpy(numpy.resize(array, (size, *array.shape[1:]))) for array in batch]
        return [_seconds(training_step, arguments) for _ in range(count)]

    call(full, WARM_UP)
    found = []
    for size in [*range(full - 1, 1, -1), *range(full + 1, full + 8)][:7]:
        new, *steady = call(size, 1 + STEADY)
        found.append((size, new - min(steady)))
    return {"sizes": found, "kernels": fresh.kernels_compiled()}


def _seconds(function: Any, arguments: Sequence[Any]) -> float:
    start = time.perf_counter()
    function(*arguments).item()
    return time.perf_counter() - start


def table(results: dict[str, dict[int, float]]) -> Table:
    """A row per step."""
    rows = []
    for name, sizes in results.items():
        median = statistics.median(sizes.values())
        shown = target(median, LIMITS[name], "s") if name in LIMITS else f"{median:.3g} s"
        rows.append([name, ", ".join(map(str, sizes)), shown, f"{min(sizes.values()):.3g}", f"{max(sizes.values()):.3g}"])
    return Table("first call of a new size of the batch, less a steady call, seconds",
                 ["step", "sizes", "median", "least", "most"], rows)
