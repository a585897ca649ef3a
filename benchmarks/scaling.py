"""What compiling costs as programs grow: in depth, in parameters, in shapes. Each in a new process with an empty cache.

Kernels must not become more with depth or with the number of parameters, and a new batch size costs a trace and at most
one more variant of a kernel.
"""

from __future__ import annotations

import importlib
import random
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import fresh
from benchmarks.report import Table, target

DEPTHS, PARAMETERS, BATCH_SIZES = (2, 24), (10, 1000), range(1, 65)
NEW_SHAPE_LIMIT, PARAMETERS_LIMIT = 0.020, 1.5        # seconds


def run() -> dict[str, Any]:
    """Depth, parameter count and batch sizes."""
    return {"depth": {str(n): _cold(depth, n) for n in DEPTHS},
            "parameters": {str(n): _cold(parameters, n) for n in PARAMETERS},
            "batch_sizes": _cold(batch_sizes)}


def _cold(function: Callable[..., Any], *arguments: object) -> Any:
    with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
        return fresh.run(function, *arguments, cache=cache)


def depth(layers: int) -> dict[str, Any]:
    """A training step of a network of `layers` residual blocks (layer norm, two Linear, GELU); AdamW."""
    jitgrad = importlib.import_module("jitgrad")
    nn = jitgrad.nn

    class Block(nn.Module):                                  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

        def forward(self, x: Any) -> Any:
            return x + self.inner(x)

    model = nn.Sequential(*(Block() for _ in range(layers)), nn.Linear(64, 10))
    optimizer = jitgrad.optim.AdamW(model.parameters(), lr=1e-3)
    return _first_calls(_classifier_step(jitgrad, model, optimizer), *_batch(jitgrad, 32))


def _first_calls(step: Callable[..., Any], *batch: Any) -> dict[str, Any]:
    """Seconds of the first and of the fifth call, and the kernels compiled until then."""
    watch = fresh.Stopwatch()
    step(*batch)
    record = {"first_call": watch.lap(), "kernels": fresh.kernels_compiled()}
    for _ in range(3):
        step(*batch)
    watch.lap()
    step(*batch)
    return {**record, "later_call": watch.lap(), "kernels_later": fresh.kernels_compiled()}


def parameters(count: int) -> dict[str, Any]:
    """The update of AdamW for `count` parameters of 64 numbers, whose gradients are there."""
    jitgrad = importlib.import_module("jitgrad")
    weights = [jitgrad.nn.Parameter(jitgrad.full((64,), 1.0 + k / count)) for k in range(count)]
    for weight in weights:
        weight.grad = weight.detach() * 0.5
    optimizer = jitgrad.optim.AdamW(weights, lr=1e-3)

    @jitgrad.compile
    def step() -> None:
        optimizer.step()

    return _first_calls(step)


def batch_sizes() -> dict[str, Any]:
    """An MLP's training step for every batch size from 1 to 64 in random order."""
    jitgrad = importlib.import_module("jitgrad")
    nn = jitgrad.nn
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    step = _classifier_step(jitgrad, model, jitgrad.optim.Adam(model.parameters(), lr=1e-3))
    sizes = random.Random(0).sample(list(BATCH_SIZES), len(BATCH_SIZES))
    first, kernels = [], []
    for size in sizes:
        batch = _batch(jitgrad, size)
        watch = fresh.Stopwatch()
        step(*batch)
        first.append(watch.lap())
        kernels.append(fresh.kernels_compiled())
    return {"sizes": sizes, "first_call": first, "kernels": kernels}


def _classifier_step(jitgrad: Any, model: Any, optimizer: Any) -> Any:
    @jitgrad.compile
    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = jitgrad.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _batch(jitgrad: Any, size: int) -> tuple[Any, Any]:
    return jitgrad.randn(size, 64), jitgrad.randint(0, 10, (size,))


def table(results: dict[str, Any]) -> Table:
    """Depths and parameter counts in rows; batch sizes in notes."""
    rows = [[f"{count} {title}", f"{r['first_call']:.2f}", f"{1000 * r['later_call']:.3g}", str(r["kernels"]),
             str(r["kernels_later"])]
            for title, key in (("layers", "depth"), ("parameters, AdamW", "parameters"))
            for count, r in results[key].items()]
    return Table("cold compile time against size", ["program", "first call, s", "later call, ms", "kernels compiled",
                                                    "after 5 calls"], rows, _notes(results))


def _notes(results: dict[str, Any]) -> list[str]:
    shapes, many = results["batch_sizes"], results["parameters"][str(max(PARAMETERS))]
    later = sorted(shapes["first_call"][1:])
    first, last = shapes["kernels"][0], shapes["kernels"][-1]
    return [f"AdamW over {max(PARAMETERS)} parameters, first call: {target(many['first_call'], PARAMETERS_LIMIT, 's')}",
            f"batch sizes 1 to 64 in random order: {first} kernels compiled for the first, {last} in all "
            f"({'within' if last <= 2 * first else 'ABOVE'} twice each)",
            f"a new batch size: median {target(statistics.median(later), NEW_SHAPE_LIMIT, 's')}, "
            f"longest {1000 * later[-1]:.0f} ms"]
