"""Adagrad (Duchi et al. 2011) and Adadelta (Zeiler 2012)."""

from __future__ import annotations

from typing import Any

from jitgrad.functional.foreach import foreach
from jitgrad.optim.groups import ParamGroup
from jitgrad.optim.optimizer import (
    Optimizer,
    Params,
    advance,
    check_not_negative,
    check_ways,
    filled_state,
    gradients,
    option,
    scalar_state,
    sign,
    update,
)
from jitgrad.tensor import Tensor


def decayed_rate(lr: Any, lr_decay: Any, step: Any) -> Any:
    """lr / (1 + (n - 1) lr_decay) at step n."""
    return lr / (1 + (step.number() - 1) * lr_decay)


def adagrad(sign: Any, weight_decay: Any, eps: Any, p: Any, total: Any, g: Any, rate: Any) -> tuple[Any, Any]:
    """`total` is the sum of all squared gradients."""
    g = sign * g + weight_decay * p
    total = total + g * g
    return p - rate.number() * (g / (total.sqrt() + eps)), total


class Adagrad(Optimizer):
    """``p -= lr * grad / (sqrt(sum of grad²) + eps)``."""

    def __init__(self, params: Params, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
                 initial_accumulator_value: float = 0.0, eps: float = 1e-10, *, maximize: bool = False,
                 **ways: bool | None):
        check_ways("Adagrad", ways)
        check_not_negative("Adagrad", lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps,
                           initial_accumulator_value=initial_accumulator_value)
        super().__init__(params, {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
                                  "initial_accumulator_value": initial_accumulator_value, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        steps = self._states(params, "step", scalar_state())
        update(advance, [], [steps])
        (rates,) = foreach(decayed_rate, [option(group, "lr"), option(group, "lr_decay")], [steps])
        totals = self._states(params, "sum", filled_state(group["initial_accumulator_value"]))
        shared = [sign(group), option(group, "weight_decay"), option(group, "eps")]
        update(adagrad, shared, [params, totals], [gradients(params), rates])


def adadelta(sign: Any, lr: Any, weight_decay: Any, rho: Any, eps: Any, p: Any, v: Any, d: Any,
             g: Any) -> tuple[Any, Any, Any]:
    """`v` and `d` are the running means of the squared gradient and of the squared change."""
    g = sign * g + weight_decay * p
    v = rho * v + (1 - rho) * (g * g)
    change = (d + eps).sqrt() / (v + eps).sqrt() * g
    return p - lr * change, v, rho * d + (1 - rho) * (change * change)


class Adadelta(Optimizer):
    """Steps in proportion to the root mean square of earlier changes over that of the gradients."""

    def __init__(self, params: Params, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6,
                 weight_decay: float = 0.0, *, maximize: bool = False, **ways: bool | None):
        check_ways("Adadelta", ways)
        check_not_negative("Adadelta", lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay,
                                  "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        states = [self._states(params, name, filled_state()) for name in ("square_avg", "acc_delta")]
        shared = [sign(group), *(option(group, name) for name in ("lr", "weight_decay", "rho", "eps"))]
        update(adadelta, shared, [params, *states], [gradients(params)])
        update(advance, [], [self._states(params, "step", scalar_state())])
