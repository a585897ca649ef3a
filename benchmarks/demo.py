"""The demo: two classifiers of handwritten digits, trained with the whole training step compiled.

    python -m benchmarks.demo [--output demo.png]

The images are the 1,797 digits of 8x8 pixels that come with scikit-learn; a fifth of them is kept for the test. An MLP
and a small CNN are trained, their accuracy is asked for at the end (97 % at least, or the demo fails), and
`jitgrad.compare` shows what compiling gained. The plot has the loss curves, and the time that a number of steps takes
in both modes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jitgrad
from jitgrad import nn
from jitgrad.data import DataLoader, TensorDataset

BATCH_SIZE, LEARNING_RATE, REQUIRED_ACCURACY = 64, 2e-3, 0.97


@dataclass
class Run:
    """A model that was trained: its loss at every step, seconds, accuracy on the test images, and its receipt."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0
    receipt: Any = None


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images f32[n, 1, 8, 8] between 0 and 1 and labels i64[n], for training and for the test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels.astype(np.int64), test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (jitgrad.from_numpy(part) for part in parts)
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def make_mlp() -> nn.Module:
    """64 to 256 to 10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def make_cnn() -> nn.Module:
    """Two convolutions of 3x3, with pooling between them."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def make_step(model: nn.Module) -> Callable[..., Any]:
    """The training step: forward, backward and Adam's update, as one compiled function."""
    optimizer = jitgrad.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()

    @jitgrad.compile
    def training_step(images: jitgrad.Tensor, labels: jitgrad.Tensor) -> jitgrad.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return training_step


def train(name: str, model: nn.Module, epochs: int, training: TensorDataset, test: TensorDataset) -> Run:
    """Train `model` with a progress bar, test it, and compare its step with the same step run eagerly."""
    run, step = Run(name), make_step(model)
    loader = DataLoader(training, batch_size=BATCH_SIZE, shuffle=True)
    begin = time.perf_counter()
    with tqdm(total=epochs * len(loader), desc=name, unit="step") as bar:
        for _ in range(epochs):
            for images, labels in loader:
                run.losses.append(step(images, labels).item())
                bar.update()
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
    run.seconds = time.perf_counter() - begin
    run.accuracy = accuracy(model, test)
    run.receipt = jitgrad.compare(step, *next(iter(loader)))
    return run


@jitgrad.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of test images that are classified correctly."""
    images, labels = test.tensors
    return float((model(images).argmax(1) == labels).float().mean().item())


def plot(runs: list[Run], path: Path) -> None:
    """Loss curves, and per model the time of n steps in eager mode and compiled, first call included."""
    figure, axes = pyplot.subplots(1, 1 + len(runs), figsize=(5 * (1 + len(runs)), 4), layout="constrained")
    for run in runs:
        axes[0].semilogy(np.convolve(run.losses, np.ones(10) / 10, "valid"), label=f"{run.name}, {run.accuracy:.1%}")
    axes[0].set(title="training loss and test accuracy", xlabel="step", ylabel="loss, mean of 10 steps")
    for axis, run in zip(axes[1:], runs):
        receipt, steps = run.receipt, np.geomspace(1, 100_000, 100)
        axis.loglog(steps, receipt.eager * steps, label="eager")
        axis.loglog(steps, receipt.first_cold + receipt.compiled * steps, label="compiled, cold cache")
        axis.loglog(steps, receipt.first_warm + receipt.compiled * steps, label="compiled, warm cache")
        axis.set(title=f"{run.name}: {receipt.speedup:.1f}x per step", xlabel="steps", ylabel="seconds")
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Train both models, print their receipts, save the plot."""
    parser = argparse.ArgumentParser(description="Train two digit classifiers with compiled training steps.")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the plot")
    output = parser.parse_args().output
    jitgrad.manual_seed(0)
    training, test = digits()
    runs = [train("MLP", make_mlp(), 40, training, test), train("CNN", make_cnn(), 20, training, test)]
    for run in runs:
        print(f"\n{run.name}: {len(run.losses)} steps in {run.seconds:.1f} s, test accuracy {run.accuracy:.1%}")
        print(run.receipt)
    plot(runs, output)
    print(f"\nplot: {output}")
    if min(run.accuracy for run in runs) < REQUIRED_ACCURACY:
        sys.exit(f"accuracy is below {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
