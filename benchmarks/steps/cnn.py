"""A small convolutional classifier of 28x28 images."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.step import TrainingStep, classification, cross_entropy


def build(lib: Any) -> tuple[Any, Any]:
    """Two convolutions of 3x3, each with ReLU and 2x2 max pooling, and a Linear layer; Adam."""
    nn = lib.nn
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 10))
    return model, lib.optim.Adam(model.parameters(), lr=1e-3)


def jax_loss(parts: Any, p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    for layer in ("0", "3"):
        x = parts.max_pool(parts.relu(parts.convolution(p, layer, x, padding=1)))
    return parts.cross_entropy(parts.linear(p, "7", x.reshape(len(x), -1)), y)


STEP = TrainingStep("small CNN on 28x28, batch 64, Adam", classification((64, 1, 28, 28), 10), build, cross_entropy,
                    jax_loss, lambda parts: parts.adam(lr=1e-3))
