"""The training steps that are measured, one file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.steps import cnn, gpt, gpt2, lstm, mlp, mlp_small, pointwise, resnet, vit
from benchmarks.steps.step import TrainingStep

STEPS: dict[str, TrainingStep] = {module.__name__.rpartition(".")[2]: module.STEP
                                  for module in (mlp_small, mlp, pointwise, cnn, lstm, gpt, vit, resnet)}

GPU_STEPS: dict[str, TrainingStep] = {"gpt2": gpt2.STEP, **STEPS}
"""Those of a GPU: one of them would take a CPU minutes."""

__all__ = ["GPU_STEPS", "STEPS", "TrainingStep", "chosen"]


def chosen(names: Sequence[str] = (), steps: Mapping[str, TrainingStep] = STEPS) -> dict[str, TrainingStep]:
    """The `steps` called `names`, all without names; SystemExit for a name that none has."""
    unknown = set(names) - set(steps)
    if unknown:
        raise SystemExit(f"no step is called {', '.join(sorted(unknown))}; there are {', '.join(steps)}")
    return {name: steps[name] for name in names or steps}
