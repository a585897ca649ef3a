"""A classifier of the size of MNIST's: three matrix products and what they leave to fuse."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.step import TrainingStep, classification, cross_entropy


def build(lib: Any) -> tuple[Any, Any]:
    """Three Linear layers with ReLU between them; SGD with momentum."""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, lib.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def jax_loss(parts: Any, p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    for layer in ("0", "2"):
        x = parts.relu(parts.linear(p, layer, x))
    return parts.cross_entropy(parts.linear(p, "4", x), y)


STEP = TrainingStep("MLP 784-512-512-10, batch 128, SGD momentum", classification((128, 784), 10), build,
                    cross_entropy, jax_loss, lambda parts: parts.sgd(lr=0.01, momentum=0.9))
