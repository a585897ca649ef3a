"""The training steps that are measured, one file each."""

from benchmarks.steps import cnn, gpt, lstm, mlp, mlp_small, pointwise, resnet, vit
from benchmarks.steps.step import TrainingStep

STEPS: dict[str, TrainingStep] = {module.__name__.rpartition(".")[2]: module.STEP
                                  for module in (mlp_small, mlp, pointwise, cnn, lstm, gpt, vit, resnet)}

__all__ = ["STEPS", "TrainingStep"]
