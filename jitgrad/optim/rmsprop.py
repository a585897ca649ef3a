"""RMSprop (Hinton 2012), plain, centered, and with momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


@functools.cache
def rmsprop_formula(centered: bool, with_momentum: bool) -> Callable[..., tuple[Any, ...]]:
    """The update of one element. Behind the running mean `v` of the squared gradient stand, as asked for, the running
    mean of the gradient and the momentum buffer."""

    def rmsprop(sign: Any, lr: Any, weight_decay: Any, alpha: Any, eps: Any, momentum: Any,
                p: Any, v: Any, *others: Any) -> tuple[Any, ...]:
        *states, g = others
        g = sign * g + weight_decay * p
        v = alpha * v + (1 - alpha) * (g * g)
        spread = v
        if centered:
            states[0] = states[0] + (1 - alpha) * (g - states[0])
            spread = v - states[0] * states[0]
        direction = g / (spread.sqrt() + eps)
        if with_momentum:
            states[-1] = direction = momentum * states[-1] + direction
        return p - lr * direction, v, *states

    return rmsprop


class RMSprop(Optimizer):
    """``p -= lr * grad / (sqrt(v) + eps)`` with v the running mean of grad², or if `centered` the variance."""

    def __init__(self, params: Params, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False, *, maximize: bool = False,
                 **ways: bool | None):
        check_ways("RMSprop", ways)
        check_not_negative("RMSprop", lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
                                  "weight_decay": weight_decay, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        centered, with_momentum = bool(group["centered"]), bool(group["momentum"])
        names = ["square_avg"] + ["grad_avg"] * centered + ["momentum_buffer"] * with_momentum
        written = [params, *(self._states(params, name, filled_state()) for name in names)]
        shared = [sign(group), *(option(group, name) for name in ("lr", "weight_decay", "alpha", "eps", "momentum"))]
        update(rmsprop_formula(centered, with_momentum), shared, written, [gradients(params)])
        update(advance, [], [self._states(params, "step", scalar_state())])
