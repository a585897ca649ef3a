"""Learning-rate schedules: each writes ``group["lr"]`` of an optimizer, step by step, with PyTorch's sequences.

A scheduler takes its first step when it is made. `get_lr` computes the next values from the present ones (so several
schedulers can be chained); a traced step reads the number anew, so a schedule never causes a recompile.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jitgrad.optim.optimizer import Optimizer


class LRScheduler:
    """Base: subclasses define `get_lr`, which gives the learning rate of every group at ``self.last_epoch``."""

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1):
        self.optimizer = optimizer
        for k, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(f"{type(self).__name__}: param_groups[{k}] has no 'initial_lr', which resuming at "
                               f"last_epoch={last_epoch} needs. Load the optimizer's state dict first")
        self.base_lrs: list[float] = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._last_lr: list[float] = []
        self.step()

    def get_lr(self) -> list[float]:
        raise NotImplementedError(f"{type(self).__name__}: define get_lr")

    def get_last_lr(self) -> list[float]:
        """The learning rates that the last step set, one per group."""
        return self._last_lr

    def step(self) -> None:
        """Go on by one."""
        self.last_epoch += 1
        self._set(self.get_lr())

    def _set(self, values: Sequence[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values):
            group["lr"] = value
        self._last_lr = self._current()

    def _current(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _scaled(self, factor: float) -> list[float]:
        return [lr * factor for lr in self._current()]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as plain values; functions (of LambdaLR) are left out."""
        return {name: value for name, value in self.__dict__.items()
                if name != "optimizer" and not name.startswith("_function")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the optimizer's learning rates come with its own state."""
        self.__dict__.update(state_dict)


class LambdaLR(LRScheduler):
    """The initial rate times ``lr_lambda(epoch)``; one function, or one per group."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
                 last_epoch: int = -1):
        count = len(optimizer.param_groups)
        self._functions = [lr_lambda] * count if callable(lr_lambda) else list(lr_lambda)
        if len(self._functions) != count:
            raise ValueError(f"LambdaLR: {len(self._functions)} functions for {count} param groups")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [base * function(self.last_epoch) for base, function in zip(self.base_lrs, self._functions)]


class MultiplicativeLR(LambdaLR):
    """The present rate times ``lr_lambda(epoch)``."""

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return self._current()
        return [lr * function(self.last_epoch) for lr, function in zip(self._current(), self._functions)]


class StepLR(LRScheduler):
    """Times `gamma` every `step_size` epochs."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1):
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        due = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return self._scaled(self.gamma if due else 1.0)


class MultiStepLR(LRScheduler):
    """Times `gamma` at each milestone."""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1, last_epoch: int = -1):
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return self._scaled(self.gamma ** Counter(self.milestones)[self.last_epoch])


class ExponentialLR(LRScheduler):
    """Times `gamma` every epoch."""

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1):
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return self._scaled(self.gamma if self.last_epoch else 1.0)


class ConstantLR(LRScheduler):
    """Times `factor` until `total_iters` epochs have gone by."""

    def __init__(self, optimizer: Optimizer, factor: float = 1 / 3, total_iters: int = 5, last_epoch: int = -1):
        self.factor, self.total_iters = factor, total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return self._scaled(self.factor)
        return self._scaled(1 / self.factor if self.last_epoch == self.total_iters else 1.0)


class LinearLR(LRScheduler):
    """From `start_factor` to `end_factor` of the initial rate in a straight line over `total_iters` epochs."""

    def __init__(self, optimizer: Optimizer, start_factor: float = 1 / 3, end_factor: float = 1.0,
                 total_iters: int = 5, last_epoch: int = -1):
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError(f"LinearLR: factors lie in (0, 1] and [0, 1], got {start_factor} and {end_factor}")
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return self._scaled(self.start_factor)
        if self.last_epoch > self.total_iters:
            return self._current()
        rise = self.end_factor - self.start_factor
        before = self.total_iters * self.start_factor + (self.last_epoch - 1) * rise
        return self._scaled(1 + rise / before)


class PolynomialLR(LRScheduler):
    """Down to zero over `total_iters` epochs along ``(1 - t)**power``."""

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1):
        self.total_iters, self.power = total_iters, power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0 or self.last_epoch > self.total_iters:
            return self._current()
        left, left_before = (1 - epoch / self.total_iters for epoch in (self.last_epoch, self.last_epoch - 1))
        return self._scaled((left / left_before) ** self.power)


class CosineAnnealingLR(LRScheduler):
    """Half a cosine from the initial rate to `eta_min` over `T_max` epochs, and back (Loshchilov & Hutter 2017)."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1):
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        epoch, period, low = self.last_epoch, self.T_max, self.eta_min
        if epoch == 0:
            return self._current()
        if (epoch - 1 - period) % (2 * period) == 0:          # the low point: the ratio below would divide by zero
            rise = (1 - math.cos(math.pi / period)) / 2
            return [lr + (base - low) * rise for base, lr in zip(self.base_lrs, self._current())]
        ratio = (1 + math.cos(math.pi * epoch / period)) / (1 + math.cos(math.pi * (epoch - 1) / period))
        return [ratio * (lr - low) + low for lr in self._current()]


class CosineAnnealingWarmRestarts(LRScheduler):
    """A falling half cosine that starts anew after `T_0` epochs, each time `T_mult` times as long."""

    def __init__(self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1):
        if T_0 <= 0 or T_mult < 1:
            raise ValueError(f"CosineAnnealingWarmRestarts: T_0 and T_mult must be at least 1, got {T_0} and {T_mult}")
        self.T_0, self.T_i, self.T_mult, self.eta_min = T_0, T_0, T_mult, eta_min
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        height = (1 + math.cos(math.pi * self.T_cur / self.T_i)) / 2
        return [self.eta_min + (base - self.eta_min) * height for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go on by one, or to `epoch`, which may be fractional (epoch + batch / batches)."""
        place = self.last_epoch + 1 if epoch is None else epoch
        if place < 0:
            raise ValueError(f"CosineAnnealingWarmRestarts: the epoch must not be negative, got {place}")
        self.T_cur, self.T_i = self._place(place)
        self.last_epoch = math.floor(place)
        self._set(self.get_lr())

    def _place(self, epoch: float) -> tuple[float, int]:
        """How far into its cycle `epoch` is, and how long that cycle is."""
        length = self.T_0
        if self.T_mult == 1:
            return epoch % length, length
        while epoch >= length:
            epoch, length = epoch - length, length * self.T_mult
        return epoch, length


class OneCycleLR(LRScheduler):
    """Up to `max_lr` and far down again within one run, momentum the other way round (Smith & Topin 2018)."""

    def __init__(self, optimizer: Optimizer, max_lr: float | Sequence[float], total_steps: int | None = None,
                 epochs: int | None = None, steps_per_epoch: int | None = None, pct_start: float = 0.3,
                 anneal_strategy: Literal["cos", "linear"] = "cos", cycle_momentum: bool = True,
                 base_momentum: float = 0.85, max_momentum: float = 0.95, div_factor: float = 25.0,
                 final_div_factor: float = 1e4, three_phase: bool = False, last_epoch: int = -1):
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("OneCycleLR: give total_steps, or epochs and steps_per_epoch")
            total_steps = epochs * steps_per_epoch
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"OneCycleLR: anneal_strategy must be 'cos' or 'linear', got {anneal_strategy!r}")
        self.total_steps, self.anneal_strategy, self.cycle_momentum = total_steps, anneal_strategy, cycle_momentum
        self.phases = _one_cycle_phases(total_steps, pct_start, three_phase)
        groups = optimizer.param_groups
        if cycle_momentum and not all("momentum" in group or "betas" in group for group in groups):
            raise ValueError("OneCycleLR: cycle_momentum needs an optimizer with momentum or betas")
        highest = [max_lr] * len(groups) if isinstance(max_lr, (int, float)) else list(max_lr)
        if last_epoch == -1:
            for group, high in zip(groups, highest):
                group.update(initial_lr=high / div_factor, max_lr=high, min_lr=high / div_factor / final_div_factor)
                if cycle_momentum:
                    group.update(base_momentum=base_momentum, max_momentum=max_momentum)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch >= self.total_steps:
            raise ValueError(f"OneCycleLR: step {self.last_epoch + 1} of {self.total_steps}; the cycle is over")
        start, end, names, momenta = next(p for p in self.phases if self.last_epoch <= p[1] or p is self.phases[-1])
        done = (self.last_epoch - start) / (end - start)
        values = []
        for group in self.optimizer.param_groups:
            values.append(self._between(group[names[0]], group[names[1]], done))
            if self.cycle_momentum:
                _set_momentum(group, self._between(group[momenta[0]], group[momenta[1]], done))
        return values

    def _between(self, begin: float, end: float, done: float) -> float:
        if self.anneal_strategy == "linear":
            return (end - begin) * done + begin
        return end + (begin - end) / 2 * (1 + math.cos(math.pi * done))


def _one_cycle_phases(total: int, pct_start: float, three_phase: bool) -> list[Any]:
    """(first step, last step, names of the rates between which it goes, names of the momenta)."""
    top = pct_start * total - 1
    rise = [0, top, ["initial_lr", "max_lr"], ["max_momentum", "base_momentum"]]
    if not three_phase:
        return [rise, [top, total - 1, ["max_lr", "min_lr"], ["base_momentum", "max_momentum"]]]
    bottom = 2 * pct_start * total - 2
    return [rise, [top, bottom, ["max_lr", "initial_lr"], ["base_momentum", "max_momentum"]],
            [bottom, total - 1, ["initial_lr", "min_lr"], ["max_momentum", "max_momentum"]]]


def _set_momentum(group: dict[str, Any], value: float) -> None:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value


class CyclicLR(LRScheduler):
    """Up and down between `base_lr` and `max_lr`, `step_size_up` steps up and `step_size_down` down, momentum the other way
    round (Smith 2017). In the mode "triangular2" each cycle is half as high as the last, in "exp_range" by ``gamma **
    step``; or by ``scale_fn`` of the number of the cycle, or (`scale_mode` "iterations") of the step."""

    def __init__(self, optimizer: Optimizer, base_lr: float | Sequence[float], max_lr: float | Sequence[float],
                 step_size_up: int = 2000, step_size_down: int | None = None,
                 mode: Literal["triangular", "triangular2", "exp_range"] = "triangular", gamma: float = 1.0,
                 scale_fn: Callable[[float], float] | None = None,
                 scale_mode: Literal["cycle", "iterations"] = "cycle", cycle_momentum: bool = True,
                 base_momentum: float = 0.8, max_momentum: float = 0.9, last_epoch: int = -1):
        if mode not in ("triangular", "triangular2", "exp_range"):
            raise ValueError(f"CyclicLR: mode must be triangular, triangular2 or exp_range, got {mode!r}")
        groups = optimizer.param_groups
        if cycle_momentum and not all("momentum" in group or "betas" in group for group in groups):
            raise ValueError("CyclicLR: cycle_momentum needs an optimizer with momentum or betas")
        lowest, self.max_lrs = [[rate] * len(groups) if isinstance(rate, (int, float)) else list(rate)
                                for rate in (base_lr, max_lr)]
        if last_epoch == -1:
            for group, rate in zip(groups, lowest, strict=True):
                group.update(lr=rate, initial_lr=rate)
        self.up, self.length = step_size_up, step_size_up + (step_size_down or step_size_up)
        self.mode, self.gamma, self.scale_mode = mode, gamma, scale_mode
        self._function = scale_fn
        self.cycle_momentum, self.base_momentum, self.max_momentum = cycle_momentum, base_momentum, max_momentum
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        cycle, within = divmod(self.last_epoch, self.length)
        height = within / self.up if within <= self.up else (self.length - within) / (self.length - self.up)
        height *= self._scale(cycle + 1)
        for group in self.optimizer.param_groups if self.cycle_momentum else ():
            _set_momentum(group, self.max_momentum - (self.max_momentum - self.base_momentum) * height)
        return [base + (high - base) * height for base, high in zip(self.base_lrs, self.max_lrs)]

    def _scale(self, cycle: int) -> float:
        if self._function is not None:
            return self._function(cycle if self.scale_mode == "cycle" else self.last_epoch)
        return {"triangular": 1.0, "triangular2": 0.5 ** (cycle - 1), "exp_range": self.gamma ** self.last_epoch}[self.mode]


class ChainedScheduler(LRScheduler):
    """Several schedulers that all take every step."""

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None):
        if not schedulers:
            raise ValueError("ChainedScheduler: give at least one scheduler")
        self.optimizer = optimizer or schedulers[0].optimizer
        if any(scheduler.optimizer is not self.optimizer for scheduler in schedulers):
            raise ValueError("ChainedScheduler: every scheduler must belong to one optimizer")
        self.schedulers = list(schedulers)
        self._last_lr = self._current()

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()
        self._last_lr = self._current()

    def state_dict(self) -> dict[str, Any]:
        return _state_of_all(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_load_all(self, state_dict))


def _state_of_all(scheduler: Any, own: dict[str, Any]) -> dict[str, Any]:
    return {**own, "schedulers": [part.state_dict() for part in scheduler.schedulers]}


def _load_all(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Load the parts; what is left of `state`."""
    for part, saved in zip(scheduler.schedulers, state["schedulers"]):
        part.load_state_dict(saved)
    return {k: v for k, v in state.items() if k != "schedulers"}


class SequentialLR(LRScheduler):
    """Several schedulers one after the other; the next one takes over at each milestone."""

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int],
                 last_epoch: int = -1):
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(f"SequentialLR: {len(schedulers)} schedulers need {len(schedulers) - 1} milestones, "
                             f"got {len(milestones)}")
        if any(scheduler.optimizer is not optimizer for scheduler in schedulers):
            raise ValueError("SequentialLR: every scheduler must belong to the optimizer that is given")
        self.optimizer = optimizer
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        self.last_epoch = last_epoch + 1
        for group in optimizer.param_groups:                  # undo the first steps that all of them took
            group["lr"] = group["initial_lr"]
        for scheduler in self.schedulers:
            scheduler.last_epoch -= 1
        self.schedulers[0].step()
        self._last_lr = self.schedulers[0].get_last_lr()

    def step(self) -> None:
        self.last_epoch += 1
        active = bisect.bisect_right(self.milestones, self.last_epoch)
        scheduler = self.schedulers[active]
        if active > 0 and self.milestones[active - 1] == self.last_epoch:
            _restart(scheduler)
        else:
            scheduler.step()
        self._last_lr = scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return _state_of_all(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_load_all(self, state_dict))


def _restart(scheduler: LRScheduler) -> None:
    """The value of a scheduler at its epoch 0, whatever the rate is now."""
    for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
        group["lr"] = base
    scheduler.last_epoch = -1
    scheduler.step()


class ReduceLROnPlateau(LRScheduler):
    """Times `factor` when a metric has not improved for more than `patience` epochs."""

    def __init__(self, optimizer: Optimizer, mode: Literal["min", "max"] = "min", factor: float = 0.1,
                 patience: int = 10, threshold: float = 1e-4, threshold_mode: Literal["rel", "abs"] = "rel",
                 cooldown: int = 0, min_lr: float | Sequence[float] = 0.0, eps: float = 1e-8):
        if factor >= 1:
            raise ValueError(f"ReduceLROnPlateau: factor must be below 1, got {factor}")
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(f"ReduceLROnPlateau: mode {mode!r} or threshold_mode {threshold_mode!r} is unknown; "
                             f"they are min, max and rel, abs")
        self.optimizer, self.mode, self.factor, self.patience = optimizer, mode, factor, patience
        self.threshold, self.threshold_mode, self.cooldown, self.eps = threshold, threshold_mode, cooldown, eps
        count = len(optimizer.param_groups)
        self.min_lrs = [min_lr] * count if isinstance(min_lr, (int, float)) else list(min_lr)
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = self.last_epoch = 0
        self._last_lr = self._current()

    def step(self, metrics: Any) -> None:  # type: ignore[override]
        """Note this epoch's metric, a number or a Tensor of one element."""
        value = float(metrics)
        self.last_epoch += 1
        improved = self._is_better(value)
        self.best = value if improved else self.best
        self.num_bad_epochs = 0 if improved else self.num_bad_epochs + 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
        self._last_lr = self._current()

    def _is_better(self, value: float) -> bool:
        sign = -1 if self.mode == "min" else 1
        if self.threshold_mode == "rel":
            return sign * value > sign * self.best * (1 + sign * self.threshold)
        return sign * value > sign * self.best + self.threshold

    def _reduce(self) -> None:
        for group, low in zip(self.optimizer.param_groups, self.min_lrs):
            reduced = max(group["lr"] * self.factor, low)
            if group["lr"] - reduced > self.eps:
                group["lr"] = reduced
