"""Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's form of it (Sutskever et al. 2013)."""

from __future__ import annotations

from typing import Any

from jitgrad.functional.foreach import Scalar, foreach
from jitgrad.optim.groups import ParamGroup
from jitgrad.optim.optimizer import (
    Optimizer,
    Params,
    advance,
    check_not_negative,
    filled_state,
    gradients,
    option,
    scalar_state,
    sign,
    store,
)
from jitgrad.tensor import Tensor


def descend(sign: Any, lr: Any, weight_decay: Any, p: Scalar, g: Scalar) -> Scalar:
    """Without momentum."""
    return p - lr * (sign * g + weight_decay * p)


def descend_with_momentum(sign: Any, lr: Any, weight_decay: Any, momentum: Any, p: Scalar, g: Scalar,
                          buffer: Scalar) -> tuple[Scalar, Scalar]:
    """`buffer` is the running direction, zero before the first step."""
    buffer = momentum * buffer + (sign * g + weight_decay * p)
    return p - lr * buffer, buffer


def descend_with_dampening(sign: Any, lr: Any, weight_decay: Any, momentum: Any, dampening: Any, p: Scalar, g: Scalar,
                          buffer: Scalar, step: Scalar) -> tuple[Scalar, Scalar]:
    """`buffer` is the running direction, zero before the first step; the first gradient is not dampened."""
    g = sign * g + weight_decay * p
    buffer = momentum * buffer + (step > 1).where((1 - dampening) * g, g)
    return p - lr * buffer, buffer


def descend_with_nesterov(sign: Any, lr: Any, weight_decay: Any, momentum: Any, p: Scalar, g: Scalar,
                          buffer: Scalar) -> tuple[Scalar, Scalar]:
    """The direction looks one step of the momentum ahead."""
    g = sign * g + weight_decay * p
    buffer = momentum * buffer + g
    return p - lr * (g + momentum * buffer), buffer


class SGD(Optimizer):
    """``p -= lr * buffer`` with ``buffer = momentum * buffer + (1 - dampening) * (grad + weight_decay * p)``."""

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False):
        check_not_negative("SGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening = 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                                  "nesterov": nesterov, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        shared = [sign(group), option(group, "lr"), option(group, "weight_decay")]
        lists = [params, gradients(params)]
        if not group["momentum"]:
            store(foreach(descend, shared, lists), [params])
            return
        buffers = self._states(params, "momentum_buffer", filled_state())
        shared.append(option(group, "momentum"))
        if group["nesterov"]:
            results = foreach(descend_with_nesterov, shared, [*lists, buffers])
        elif not group["dampening"]:
            results = foreach(descend_with_momentum, shared, [*lists, buffers])
        else:
            steps = self._states(params, "step", scalar_state())
            store(foreach(advance, [], [steps]), [steps])
            results = foreach(descend_with_dampening, [*shared, option(group, "dampening")], [*lists, buffers, steps])
        store(results, [params, buffers])
