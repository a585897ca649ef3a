"""A small classifier, where a step is little arithmetic and much overhead."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.step import TrainingStep, classification, cross_entropy


def build(lib: Any) -> tuple[Any, Any]:
    """Linear, ReLU, Linear; Adam."""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, lib.optim.Adam(model.parameters(), lr=1e-3)


def jax_loss(parts: Any, p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    hidden = parts.relu(parts.linear(p, "0", x))
    return parts.cross_entropy(parts.linear(p, "2", hidden), y)


STEP = TrainingStep("MLP 64-32-10, batch 32, Adam", classification((32, 64), 10), build, cross_entropy,
                    jax_loss, lambda parts: parts.adam(lr=1e-3))
