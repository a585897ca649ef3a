"""Learning curves: every training step many times over, compiled by jitgrad and in PyTorch, from the same start.

    python -m benchmarks curves --steps 200

Both train on the same batch from equal weights, so the losses should be the same but for rounding, which training
magnifies. How much it does is measured, too: PyTorch trains again from weights that are perturbed in the seventh figure,
and once more on one thread, where sums are taken in another order. jitgrad passes if its last loss, and the mean of its
last losses, are as close to PyTorch's as those runs are to each other. Where there is no PyTorch, jitgrad's eager mode
stands for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, Contender, Weights, equal_start
from benchmarks.report import Table
from benchmarks.steps import chosen
from benchmarks.steps.step import Batch, TrainingStep
from benchmarks.training import REFERENCE

PERTURBATION = 1e-6                     # relative, of every weight: some ten times its rounding
LAST = 20                               # losses whose mean is compared
ALLOWED = 2.0                           # times the distance between any two runs of the reference
ROUNDING = 1e-6                         # of the largest loss; closer than this are losses that are computed in float32

Curve = list[float]


def run(names: Sequence[str] = (), steps: int = 200, perturbed: int = 2,
        tell: Callable[[str], None] = print) -> dict[str, Any]:
    """For the steps called `names` (all without names) what `measure` returns; `perturbed` weights to measure noise."""
    results = {}
    for name, step in chosen(names).items():
        tell(f"  {step.title}, {steps} steps ...")
        results[name] = measure(step, steps, perturbed)
    return results


def measure(step: TrainingStep, steps: int, perturbed: int) -> dict[str, Any]:
    """The losses of jitgrad and of the reference, and `compare`'s verdict on them."""
    reference = next(c for name in REFERENCE for c in CONTENDERS if c.name == name and c.installed)
    compiled = next(c for c in CONTENDERS if c.name == "jitgrad")
    weights, batch = equal_start(step)
    curves = {c.name: train(c, step, weights, batch, steps) for c in (compiled, reference)}
    others = [train(reference, step, perturb(weights, seed), batch, steps) for seed in range(perturbed)]
    if reference.package == "torch":
        with one_thread():
            others.append(train(reference, step, weights, batch, steps))
    return {"title": step.title, "reference": reference.name, "curves": curves,
            **compare(curves["jitgrad"], curves[reference.name], others)}


def train(contender: Contender, step: TrainingStep, weights: Weights, batch: Batch, steps: int) -> Curve:
    """The loss of every step."""
    call = contender.make(step, weights, batch)
    return [float(f"{call().item():.7g}") for _ in range(steps)]


def perturb(weights: Weights, seed: int) -> Weights:
    """Every number of floating point times 1 plus noise of `PERTURBATION`; counters stay as they are."""
    random = np.random.default_rng(seed)

    def moved(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return array
        factor = 1 + PERTURBATION * random.standard_normal(array.shape)
        return np.asarray(array * factor, array.dtype)

    return {name: moved(array) for name, array in weights.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread."""
    torch = importlib.import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(ours: Curve, reference: Curve, others: Sequence[Curve]) -> dict[str, Any]:
    """For the last loss and the mean of the last `LAST`: both values, their difference, the noise (the largest distance
    between any two of the reference's runs) and what is allowed; and whether both are within it."""
    figures = {"final": lambda curve: curve[-1], "mean": lambda curve: float(np.mean(curve[-LAST:]))}
    result: dict[str, Any] = {}
    for name, figure in figures.items():
        runs = [figure(curve) for curve in (reference, *others)]
        noise = max(runs) - min(runs)
        result[name] = {"jitgrad": figure(ours), "reference": runs[0], "difference": abs(figure(ours) - runs[0]),
                        "noise": noise, "allowed": ALLOWED * noise + ROUNDING * max(map(abs, reference))}
    result["passed"] = all(r["difference"] <= r["allowed"] for r in result.values())       # NaN never is
    return result


def table(results: Mapping[str, Any]) -> Table:
    """One row per step."""
    def cells(figure: Mapping[str, float]) -> list[str]:
        return [f"{figure['jitgrad']:.6g}", f"{figure['reference']:.6g}", f"{figure['difference']:.1e}",
                f"{figure['allowed']:.1e}"]

    rows = [[r["title"], f"{r['curves']['jitgrad'][0]:.6g}", *cells(r["final"]), *cells(r["mean"])[2:],
             "pass" if r["passed"] else "FAIL"] for r in results.values()]
    one = next(iter(results.values()))
    return Table(f"learning curves of {len(one['curves']['jitgrad'])} steps",
                 ["step", "first loss", "jitgrad's last", f"{one['reference']}'s", "apart", "allowed",
                  f"mean of {LAST}: apart", "allowed", "within noise"], rows)
