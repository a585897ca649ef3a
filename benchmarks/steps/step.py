"""What a training step to be measured is made of: data, one definition for PyTorch and jitgrad, one for JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Batch = tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A training step: forward, backward and the optimizer's update.

    title          as it stands in the table
    batch          random generator -> the arrays that every contender trains on
    build          `torch` or `jitgrad` -> the model and its optimizer: the names in both are the same
    loss           (`torch` or `jitgrad`, model, *batch) -> the loss, 0-d
    jax_loss       (`benchmarks.steps.jax_parts`, weights by their names in PyTorch's state dict, *batch) -> the loss,
                   or a pair of it and the buffers that changed; None where JAX does not take part
    jax_optimizer  `jax_parts` -> an optimizer made there
    needs          dotted names in jitgrad without which the step cannot be built
    tokens         how many tokens a step trains on, where it has some
    """

    title: str
    batch: Callable[[np.random.Generator], Batch]
    build: Callable[[Any], tuple[Any, Any]]
    loss: Callable[..., Any]
    jax_loss: Callable[..., Any] | None = None
    jax_optimizer: Callable[[Any], Any] | None = None
    needs: tuple[str, ...] = ()
    tokens: int | None = None


def classification(shape: tuple[int, ...], classes: int) -> Callable[[np.random.Generator], Batch]:
    """Batches of float32 data of `shape` (batch first) with one of `classes` labels each."""
    def batch(rng: np.random.Generator) -> Batch:
        return rng.standard_normal(shape, dtype=np.float32), rng.integers(0, classes, shape[0])
    return batch


def cross_entropy(lib: Any, model: Any, x: Any, y: Any) -> Any:
    """The loss of a classifier."""
    return lib.nn.functional.cross_entropy(model(x), y)
