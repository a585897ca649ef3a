"""A chain of elementwise operations over 4 M elements, backward through it, and an update in place: memory traffic."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.steps.step import Batch, TrainingStep

SIZE = 4_000_000


def batch(rng: np.random.Generator) -> Batch:
    """What the chain is compared with."""
    return (rng.standard_normal(SIZE, dtype=np.float32),)


def build(lib: Any) -> tuple[Any, Any]:
    """One parameter of 4 M elements; plain SGD."""
    model = lib.nn.ParameterList([lib.nn.Parameter(lib.linspace(-2.0, 2.0, SIZE))])
    return model, lib.optim.SGD(model.parameters(), lr=0.1)


def loss(lib: Any, model: Any, target: Any) -> Any:
    """Ten elementwise operations, and a sum so that there is something to differentiate."""
    return _chain(lib, model[0], lib.sigmoid, target).sum()


def jax_loss(parts: Any, p: Any, target: Any) -> Any:
    """The same in JAX."""
    return _chain(parts.numpy, p["0"], parts.sigmoid, target).sum()


def _chain(lib: Any, x: Any, sigmoid: Any, target: Any) -> Any:
    gelu = 0.5 * x * (1.0 + lib.tanh(0.797885 * (x + 0.044715 * x * x * x)))
    return (gelu * sigmoid(x) - target) * lib.exp(-x * x)


STEP = TrainingStep("pointwise chain, 4 M elements", batch, build, loss, jax_loss, lambda parts: parts.sgd(lr=0.1))
