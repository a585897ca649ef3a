"""What a call costs when there is next to nothing to compute: the addition of two 2x2 matrices, called from Python."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.contenders import taking_part
from benchmarks.report import Table, microseconds, target

LIMIT = 5.0                                                  # microseconds, for jitgrad compiled
Call = Callable[[], Any]


def run(repeats: int = 15, only: Sequence[str] = ()) -> dict[str, float]:
    """Seconds per call: the median of `repeats` turns of 1,000 calls each."""
    calls = {c.name: _ADDITIONS[c.name]() for c in taking_part(only)}
    for call in calls.values():
        measure.per_call(call, 100)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            turns[name].append(measure.per_call(call))
    return {name: statistics.median(times) for name, times in turns.items()}


def _add(x: Any, y: Any) -> Any:
    return x + y


def _addition(package: str, create: str, compiler: str) -> Callable[[], Call]:
    """Makes the call with the array type of `package` (a dotted module), made by `create`, and with its compiler."""
    def make() -> Call:
        library = importlib.import_module(package)
        top = importlib.import_module(package.partition(".")[0])
        function = getattr(top, compiler)(_add) if compiler else _add
        x, y = (getattr(library, create)(np.full((2, 2), value, np.float32)) for value in (1.0, 2.0))
        return lambda: function(x, y)
    return make


_ADDITIONS: dict[str, Callable[[], Call]] = {
    "jitgrad eager": _addition("jitgrad", "from_numpy", ""),
    "jitgrad": _addition("jitgrad", "from_numpy", "compile"),
    "PyTorch": _addition("torch", "from_numpy", ""),
    "torch.compile": _addition("torch", "from_numpy", "compile"),
    "JAX": _addition("jax.numpy", "asarray", "jit"),
}


def table(results: dict[str, float]) -> Table:
    """One row per contender."""
    notes = [f"compiled: {target(1e6 * results['jitgrad'], LIMIT, 'us')}"] if "jitgrad" in results else []
    return Table("call overhead: 2x2 add from Python", ["contender", "us per call"],
                 [[name, microseconds(value)] for name, value in results.items()], notes)
