"""The training steps that are measured, one file each."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.steps import cnn, gpt, lstm, mlp, mlp_small, pointwise, resnet, vit
from benchmarks.steps.step import TrainingStep

STEPS: dict[str, TrainingStep] = {module.__name__.rpartition(".")[2]: module.STEP
                                  for module in (mlp_small, mlp, pointwise, cnn, lstm, gpt, vit, resnet)}

__all__ = ["STEPS", "TrainingStep", "chosen"]


def chosen(names: Sequence[str] = ()) -> dict[str, TrainingStep]:
    """The steps called `names`, all without names; SystemExit for a name that none has."""
    unknown = set(names) - set(STEPS)
    if unknown:
        raise SystemExit(f"no step is called {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    return {name: STEPS[name] for name in names or STEPS}
