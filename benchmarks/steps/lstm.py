"""A recurrent layer: 64 small steps that depend on each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.steps.step import Batch, TrainingStep

STEPS, BATCH, INPUTS, HIDDEN = 64, 16, 128, 256


def batch(rng: np.random.Generator) -> Batch:
    """A sequence, and what its last hidden state should be."""
    return (rng.standard_normal((STEPS, BATCH, INPUTS), dtype=np.float32),
            rng.standard_normal((BATCH, HIDDEN), dtype=np.float32))


def build(lib: Any) -> tuple[Any, Any]:
    """One LSTM layer; SGD."""
    model = lib.nn.LSTM(INPUTS, HIDDEN)
    return model, lib.optim.SGD(model.parameters(), lr=0.01)


def loss(lib: Any, model: Any, x: Any, target: Any) -> Any:
    """Mean squared error of the last hidden state."""
    outputs, _ = model(x)
    return lib.nn.functional.mse_loss(outputs[-1], target)


def jax_loss(parts: Any, p: Any, x: Any, target: Any) -> Any:
    """The same in JAX: the input's product for all steps at once, the recurrence as a scan."""
    inputs = x @ p["weight_ih_l0"].T + p["bias_ih_l0"] + p["bias_hh_l0"]
    last = parts.lstm(inputs, p["weight_hh_l0"])
    return ((last - target) ** 2).mean()


STEP = TrainingStep("LSTM 128 to 256, 64 steps, batch 16", batch, build, loss, jax_loss,
                    lambda parts: parts.sgd(lr=0.01), needs=("nn.LSTM",))
