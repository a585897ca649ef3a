"""`GradScaler`: a loss times a large number, so that the gradients of float16 do not vanish (Micikevicius et al. 2018,
"Mixed precision training").

The scaled loss is what is differentiated; `step` divides the gradients by the scale again and lets the optimizer run
unless one of them is infinite or NaN; `update` makes the scale smaller after such a step, and larger after many good
ones. Eagerly Python decides whether the optimizer runs. While a step is being compiled nothing is decided: the
optimizer's kernel keeps the old values where it has to, and the scale is a Tensor that the plan updates in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from jitgrad import changes, functional
from jitgrad.amp.mode import is_autocast_available
from jitgrad.autograd import eager_state, no_grad
from jitgrad.errors import AutogradError, complain
from jitgrad.functional.foreach import foreach_
from jitgrad.ir import interpreter
from jitgrad.optim.optimizer import Optimizer, kept_if
from jitgrad.runtime.cuda import driver
from jitgrad.tensor import Tensor, tensor_on


@dataclass(slots=True)
class Progress:
    """Between two calls of `update`: what was done for one optimizer, and whether its gradients had overflowed (None:
    there were none)."""

    found_inf: Tensor | None
    stepped: bool = False


class GradScaler:
    """``GradScaler("cpu")``.

    device            "cpu" or "cuda"; "cuda" without a GPU disables it. The scale itself lies where the first loss is
    init_scale        what the loss is multiplied by at first
    growth_factor     what the scale is multiplied by after `growth_interval` steps in a row without overflow; above 1
    backoff_factor    and after a step with one; below 1
    enabled           False: `scale` gives back what it gets, `step` is the optimizer's, the others do nothing

    Gradients may be clipped between ``unscale_(optimizer)`` and ``step(optimizer)``. With several optimizers each has its
    `step`, and one `update` follows. Parameters in float16 are refused: their gradients cannot be unscaled."""

    def __init__(self, device: str = "cuda", init_scale: float = 2.0 ** 16, growth_factor: float = 2.0,
                 backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True):
        if enabled and not is_autocast_available(device):
            warnings.warn(f"GradScaler on {device!r}: no GPU can be used: {driver.why_not()}. It is disabled.",
                          stacklevel=2)
            enabled = False
        self._enabled = bool(enabled)
        self._init_scale, self._init_growth_tracker = float(init_scale), 0
        self._growth_interval = int(growth_interval)
        self._growth_factor = _checked("growth_factor", growth_factor, enabled)
        self._backoff_factor = _checked("backoff_factor", backoff_factor, enabled)
        self._scale: Tensor | None = None             # made by the first `scale`
        self._growth_tracker: Tensor | None = None
        self._progress: dict[int, Progress] = {}      # by id of the optimizer

    # --- a step --------------------------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """A Tensor times the scale, or each Tensor of a list, a tuple or another iterable."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            if self._scale is None:
                self._make_state(outputs.device)
            return outputs * self._scale
        if not hasattr(outputs, "__iter__"):
            raise ValueError(f"GradScaler.scale: outputs is a Tensor or an iterable of Tensors, not a "
                             f"{type(outputs).__name__}")
        scaled = [self.scale(x) for x in outputs]
        return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled

    def _make_state(self, where: Any) -> None:
        """Scale and tracker, where the first loss is, as in PyTorch."""
        scale, tracker = np.array(self._init_scale, np.float32), np.array(self._init_growth_tracker, np.int32)
        self._scale = eager_state(lambda: tensor_on(scale, where))
        self._growth_tracker = eager_state(lambda: tensor_on(tracker, where))
        changes.bump()

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the optimizer's parameters by the scale, in place, and note whether one of them is
        infinite or NaN. Once per optimizer and `update`; `step` does it unless it has been done."""
        if not self._enabled:
            return
        scale, _ = self._state("unscale_")
        done = self._progress.get(id(optimizer))
        if done is not None:
            raise complain(AutogradError, "unscale_", "is called after step()" if done.stepped else
                           "has been called for this optimizer since the last update()")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(g.dtype.short == "f16" for g in gradients):
            raise ValueError("GradScaler.unscale_: cannot unscale gradients in float16. Keep the parameters in float32 and "
                             "let autocast make float16 of them")
        found = None
        with no_grad():
            if gradients:
                found = _not_finite(gradients)
                foreach_(_unscale, [scale.double().reciprocal().float()], [gradients])
        self._note(id(optimizer), Progress(found))

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)`` on unscaled gradients, unless one of them is infinite or NaN: then no
        parameter and no state changes, and the result is None."""
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs or args:
            raise complain(AutogradError, "GradScaler.step", "closures cannot be used with a GradScaler that is enabled")
        self._state("step")
        if id(optimizer) not in self._progress:
            self.unscale_(optimizer)
        done = self._progress[id(optimizer)]
        if done.stepped:
            raise complain(AutogradError, "GradScaler.step", "has been called for this optimizer since the last update()")
        if done.found_inf is None:
            raise AssertionError("GradScaler.step: no parameter of the optimizer has a gradient")
        selects = getattr(interpreter.state.current, "records", False) and optimizer.can_be_skipped
        result = None
        if selects or not done.found_inf:
            with kept_if(done.found_inf) if selects else nullcontext():
                result = optimizer.step(**kwargs)
        self._note(id(optimizer), Progress(done.found_inf, stepped=True))
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """The end of an iteration: the scale shrinks if a gradient overflowed in it, and grows after `growth_interval`
        iterations in which none did. `new_scale` sets it instead."""
        if not self._enabled:
            return
        scale, tracker = self._state("update")
        found = [done.found_inf for done in self._progress.values() if done.found_inf is not None]
        with no_grad():
            if new_scale is not None:
                scale.copy_(_new_scale(new_scale))
            elif not found:
                raise AssertionError("GradScaler.update: no gradients were looked at since the last update(). Call "
                                     "step(optimizer) or unscale_(optimizer) before it")
            else:
                numbers = [self._growth_factor, self._backoff_factor, self._growth_interval]
                foreach_(_next_scale, numbers, [[scale], [tracker]], [[reduce(functional.add, found)]])
        self._progress = {}
        changes.bump()

    def _note(self, optimizer: int, progress: Progress) -> None:
        self._progress[optimizer] = progress
        changes.bump()

    def _state(self, method: str) -> tuple[Tensor, Tensor]:
        if self._scale is None or self._growth_tracker is None:
            raise AssertionError(f"GradScaler.{method}: there is no scale yet. Call scale(loss) before it")
        return self._scale, self._growth_tracker

    # --- looking and setting ---------------------------------------------------------------------------------------

    def is_enabled(self) -> bool:
        """Whether this scaler does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """The scale as a number; 1.0 when disabled. In a compiled function this is a value that Python reads."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else self._scale.item()

    def get_growth_factor(self) -> float:
        """What the scale grows by."""
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set what the scale grows by."""
        self._growth_factor = _checked("growth_factor", new_factor, self._enabled)
        changes.bump()

    def get_backoff_factor(self) -> float:
        """What the scale shrinks by."""
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set what the scale shrinks by."""
        self._backoff_factor = _checked("backoff_factor", new_factor, self._enabled)
        changes.bump()

    def get_growth_interval(self) -> int:
        """After how many good iterations in a row the scale grows."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set after how many good iterations in a row the scale grows."""
        self._growth_interval = int(new_interval)
        changes.bump()

    def _get_growth_tracker(self) -> int:
        if not self._enabled:
            return 0
        return self._init_growth_tracker if self._growth_tracker is None else int(self._growth_tracker)

    def state_dict(self) -> dict[str, Any]:
        """Scale, factors, interval and the number of good iterations in a row, as numbers; nothing when disabled. Call
        it after `update`."""
        if not self._enabled:
            return {}
        return {"scale": self.get_scale(), "growth_factor": self._growth_factor, "backoff_factor": self._backoff_factor,
                "growth_interval": self._growth_interval, "_growth_tracker": self._get_growth_tracker()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. RuntimeError for what a disabled scaler gave; nothing when disabled."""
        if not self._enabled:
            return
        if not state_dict:
            raise complain(AutogradError, "GradScaler.load_state_dict", "the state dict is empty: it is that of a scaler "
                           "that was disabled")
        self._init_scale, self._init_growth_tracker = float(state_dict["scale"]), int(state_dict["_growth_tracker"])
        if self._scale is not None and self._growth_tracker is not None:
            self._scale.fill_(self._init_scale)
            self._growth_tracker.fill_(self._init_growth_tracker)
        self._growth_factor, self._backoff_factor = state_dict["growth_factor"], state_dict["backoff_factor"]
        self._growth_interval = int(state_dict["growth_interval"])
        changes.bump()

    def __getstate__(self) -> dict[str, Any]:
        """Numbers alone: a copy makes its own Tensors. Not between `unscale_` and `update`."""
        if self._progress:
            raise complain(AutogradError, "GradScaler", "it can be copied or pickled only at the beginning of an iteration, "
                           "or after update()")
        return {**self.__dict__, "_init_scale": self.get_scale(), "_init_growth_tracker": self._get_growth_tracker(),
                "_scale": None, "_growth_tracker": None}

    def guarded(self) -> tuple[Any, ...]:
        """What a compiled step takes for granted about this scaler: everything but the values of its Tensors."""
        stages = tuple([(key, done.stepped) for key, done in self._progress.items()])
        return (id(self._scale), id(self._growth_tracker), self._growth_factor, self._backoff_factor,
                self._growth_interval, stages)


def _checked(name: str, factor: float, enabled: bool) -> float:
    good = factor > 1 if name == "growth_factor" else factor < 1
    if enabled and not good:
        raise AssertionError(f"GradScaler: {name} must be {'above' if name == 'growth_factor' else 'below'} 1, got "
                             f"{factor}")
    return float(factor)


def _new_scale(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            raise AssertionError(f"GradScaler.update: new_scale is a number or a Tensor of one element that requires no "
                                 f"gradient, got {value.tensor_type}")
        return value.reshape(())
    if not isinstance(value, (int, float)):
        raise AssertionError(f"GradScaler.update: new_scale is a number or a Tensor, got {type(value).__name__}")
    return functional.core.as_operand(float(value))


def _not_finite(gradients: list[Tensor]) -> Tensor:
    """1.0 if some element is infinite or NaN, otherwise 0.0: float32, 0-d."""
    finite = [functional.all(functional.isfinite(g)) for g in gradients]
    return functional.logical_not(functional.all(functional.stack(finite))).float()


def _unscale(inverse: Any, g: Any) -> Any:
    return g * inverse


def _next_scale(growth: Any, backoff: Any, interval: Any, scale: Any, tracker: Any, found: Any) -> tuple[Any, Any]:
    """Scale and number of good iterations in a row. A scale that would become infinite stays."""
    overflowed, good = found > 0, tracker + 1
    due = good.number() >= interval
    grown = scale * growth
    grown = grown.isfinite().where(grown, scale)
    return overflowed.where(scale * backoff, due.where(grown, scale)), \
        overflowed.where(tracker * 0, due.where(tracker * 0, good))
