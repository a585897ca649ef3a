"""Who takes part: jitgrad eager and compiled, PyTorch eager and compiled, JAX, as far as they are installed.

In goes a training step and equal starting weights; out comes, per contender, a function without arguments that does one
training step and returns the loss. A framework is imported when its first contender is made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.steps import TrainingStep
from benchmarks.steps.step import Batch

Weights = dict[str, np.ndarray]
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """A framework and a way of using it."""

    name: str
    package: str
    make: Callable[[TrainingStep, Weights, Batch], Call]

    @property
    def installed(self) -> bool:
        """Whether it can take part here."""
        return importlib.util.find_spec(self.package) is not None


def taking_part(only: Sequence[str] = (), mode: str = "default") -> list[Contender]:
    """The contenders that are installed, of those named in `only` (of all without names); jitgrad in another `mode` of
    compiling takes part beside itself."""
    unknown = set(only) - {contender.name for contender in CONTENDERS}
    if unknown:
        raise SystemExit(f"no contender is called {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(contender.name for contender in CONTENDERS)}")
    found = [c for c in CONTENDERS if c.installed and (not only or c.name in only)]
    more = Contender(f"jitgrad {mode}", "jitgrad", partial(_jitgrad_compiled, mode=mode))
    return found if mode == "default" else [*found, more]


def in_order(names: Iterable[str]) -> list[str]:
    """The names of contenders that took part, in the order of tables, those in another mode of compiling last."""
    usual = [contender.name for contender in CONTENDERS]
    return sorted(dict.fromkeys(names), key=lambda name: usual.index(name) if name in usual else len(usual))


def equal_start(step: TrainingStep, package: str = "jitgrad", seed: int = 0) -> tuple[Weights, Batch]:
    """The weights, as `package` (jitgrad or torch) initializes them, and the batch that all contenders train on."""
    lib = importlib.import_module(package)
    lib.manual_seed(seed)
    model, _ = step.build(lib)
    weights = {name: np.array(value.numpy()) for name, value in model.state_dict().items()}
    return weights, step.batch(np.random.default_rng(seed))


def missing(step: TrainingStep) -> str:
    """Why jitgrad cannot run the step; an empty string when it can."""
    for dotted in step.needs:
        value: Any = importlib.import_module("jitgrad")
        for name in dotted.split("."):
            value = getattr(value, name, None)
        if value is None:
            return f"jitgrad.{dotted} does not exist yet"
    return ""


def step_in(lib: Any, step: TrainingStep, weights: Weights, batch: Batch, compiler: Callable[..., Any],
            device: str = "cpu") -> Call:
    """The step in PyTorch or jitgrad, whose names are the same, on a device."""
    model, optimizer = step.build(lib)
    model.load_state_dict({name: lib.from_numpy(value.copy()) for name, value in weights.items()})
    model.to(device)                                # in place: the optimizer has these very parameters
    loss, arguments = step.loss, [lib.from_numpy(array.copy()).to(device) for array in batch]

    def training_step(*batch: Any) -> Any:
        optimizer.zero_grad()
        value = loss(lib, model, *batch)
        value.backward()
        optimizer.step()
        return value

    compiled = compiler(training_step)
    return lambda: compiled(*arguments)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _jitgrad_eager(step: TrainingStep, weights: Weights, batch: Batch) -> Call:
    return step_in(importlib.import_module("jitgrad"), step, weights, batch, _as_it_is)


def _jitgrad_compiled(step: TrainingStep, weights: Weights, batch: Batch, mode: str = "default") -> Call:
    jitgrad = importlib.import_module("jitgrad")
    return step_in(jitgrad, step, weights, batch, partial(jitgrad.compile, mode=mode))


def _torch_eager(step: TrainingStep, weights: Weights, batch: Batch) -> Call:
    return step_in(importlib.import_module("torch"), step, weights, batch, _as_it_is)


def _torch_compiled(step: TrainingStep, weights: Weights, batch: Batch) -> Call:
    torch = importlib.import_module("torch")
    torch.compiler.reset()
    return step_in(torch, step, weights, batch, torch.compile)


def _jax(step: TrainingStep, weights: Weights, batch: Batch) -> Call:
    parts = importlib.import_module("benchmarks.steps.jax_parts")
    arrays = {name: parts.numpy.array(value) for name, value in weights.items()}
    buffers = {name: arrays.pop(name) for name in weights if "running" in name or "num_batches" in name}
    call: Call = parts.training_step(lambda p, *batch: step.jax_loss(parts, p, *batch), step.jax_optimizer(parts),
                                     arrays, buffers, [parts.numpy.array(array) for array in batch])
    return call


CONTENDERS = (
    Contender("jitgrad eager", "jitgrad", _jitgrad_eager),
    Contender("jitgrad", "jitgrad", _jitgrad_compiled),
    Contender("PyTorch", "torch", _torch_eager),
    Contender("torch.compile", "torch", _torch_compiled),
    Contender("JAX", "jax", _jax),
)
