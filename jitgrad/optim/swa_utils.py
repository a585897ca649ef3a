"""Averages of a model's weights: over the last part of a run (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima
and Better Generalization"), or exponentially decaying ones (EMA); and the schedule that goes with the former."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jitgrad import dtypes
from jitgrad.autograd import no_grad
from jitgrad.functional.foreach import foreach_
from jitgrad.nn.module import Module
from jitgrad.nn.normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d
from jitgrad.optim.lr_scheduler import LRScheduler
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor

__all__ = ["SWALR", "AveragedModel", "get_ema_avg_fn", "get_ema_multi_avg_fn", "get_swa_avg_fn", "get_swa_multi_avg_fn",
           "update_bn"]

AverageAll = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]
AverageOne = Callable[[Tensor, Tensor, Any], Tensor]


def ema(decay: Any, count: Any, mean: Any, value: Any) -> Any:
    """decay mean + (1 - decay) value; the first value itself."""
    return (count > 0).where(value + (mean - value) * decay, value)


def equal(decay: Any, count: Any, mean: Any, value: Any) -> Any:
    """The mean of `count` values, and one more."""
    return mean + (value - mean) / (count + 1)


class _All:
    """A formula of this module for all parameters at once, without asking for the count."""

    def __init__(self, formula: Callable[..., Any], decay: float = 0.0):
        self.formula, self.decay = formula, decay

    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
        floats = [k for k, mean in enumerate(averaged) if mean.dtype.is_floating_point]
        if floats:
            foreach_(self.formula, [self.decay, count], [[averaged[k] for k in floats]],
                     [[current[k].detach().to(averaged[k].device, averaged[k].dtype) for k in floats]])
        for mean, value in zip(averaged, current):
            if not mean.dtype.is_floating_point:
                mean.copy_(value)


def get_ema_multi_avg_fn(decay: float = 0.999) -> AverageAll:
    """For `AveragedModel`: exponentially decaying means."""
    return _All(ema, _checked(decay))


def get_swa_multi_avg_fn() -> AverageAll:
    """For `AveragedModel`: means of all that came, with equal weights."""
    return _All(equal)


def get_ema_avg_fn(decay: float = 0.999) -> AverageOne:
    """The same for one parameter at a time: the new mean of an old one and a value."""
    _checked(decay)
    return lambda mean, value, count: decay * mean + (1 - decay) * value


def get_swa_avg_fn() -> AverageOne:
    """The same for one parameter at a time: the new mean of an old one and a value."""
    return lambda mean, value, count: equal(0.0, count, mean, value)


def _checked(decay: float) -> float:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    return decay


class AveragedModel(Module):
    """A copy of `model` (on `device`, if given) whose parameters are means of those that `update_parameters` has been shown,
    with `use_buffers` its buffers, too; otherwise they are copied. By default all count equally."""

    n_averaged: Tensor

    def __init__(self, model: Module, device: Any = None, avg_fn: AverageOne | None = None,
                 multi_avg_fn: AverageAll | None = None, use_buffers: bool = False):
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("AveragedModel: give avg_fn or multi_avg_fn, not both")
        self.module = copy.deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", Tensor(np.array(0, dtypes.int64.numpy)))
        self.avg_fn, self.use_buffers = avg_fn, use_buffers
        self.multi_avg_fn = multi_avg_fn or (get_swa_multi_avg_fn() if avg_fn is None else None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @no_grad()
    def update_parameters(self, model: Module) -> None:
        """Take the present weights of `model` into the means."""
        averaged, current = _weights(self.module, self.use_buffers), _weights(model, self.use_buffers)
        if isinstance(self.multi_avg_fn, _All):
            self.multi_avg_fn(averaged, current, self.n_averaged)
        elif int(self.n_averaged) == 0:
            for mean, value in zip(averaged, current):
                mean.copy_(value.detach())
        elif self.multi_avg_fn is not None:
            self.multi_avg_fn(averaged, [value.detach() for value in current], self.n_averaged)
        else:
            assert self.avg_fn is not None
            for mean, value in zip(averaged, current):
                mean.copy_(self.avg_fn(mean.detach(), value.detach().to(mean.device), self.n_averaged))
        if not self.use_buffers:
            for kept, value in zip(self.module.buffers(), model.buffers()):
                kept.copy_(value.detach())
        self.n_averaged.add_(1)


def _weights(model: Module, buffers: bool) -> list[Tensor]:
    return [*model.parameters(), *(model.buffers() if buffers else ())]


@no_grad()
def update_bn(loader: Iterable[Any], model: Module, device: Any = None) -> None:
    """Make the running statistics of all batch norms of `model` those of the data in `loader`, whose batches are inputs or
    begin with them."""
    norms = [module for module in model.modules() if isinstance(module, (BatchNorm1d, BatchNorm2d, BatchNorm3d))]
    if not norms:
        return
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                        # every batch counts equally
    model.train()
    try:
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(inputs if device is None else inputs.to(device))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.train(was_training)


class SWALR(LRScheduler):
    """From the rate that it finds to `swa_lr` within `anneal_epochs` epochs; then it stays there."""

    def __init__(self, optimizer: Optimizer, swa_lr: float | Sequence[float], anneal_epochs: int = 10,
                 anneal_strategy: Literal["cos", "linear"] = "cos", last_epoch: int = -1):
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"SWALR: anneal_strategy must be 'cos' or 'linear', got {anneal_strategy!r}")
        if anneal_epochs < 0:
            raise ValueError(f"SWALR: anneal_epochs must not be negative, got {anneal_epochs}")
        count = len(optimizer.param_groups)
        rates = [swa_lr] * count if isinstance(swa_lr, (int, float)) else list(swa_lr)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["swa_lr"] = rate
        self.anneal_epochs, self.anneal_strategy = anneal_epochs, anneal_strategy
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        step = self.last_epoch if self.anneal_epochs else max(1, self.last_epoch)
        before, now = self._done(step - 1), self._done(step)
        values = []
        for group in self.optimizer.param_groups:
            end = group["swa_lr"]
            begin = end if before == 1 else (group["lr"] - before * end) / (1 - before)
            values.append(end * now + begin * (1 - now))
        return values

    def _done(self, step: int) -> float:
        part = max(0.0, min(1.0, step / max(1, self.anneal_epochs)))
        return part if self.anneal_strategy == "linear" else (1 - math.cos(math.pi * part)) / 2
