"""Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's form of it (Sutskever et al. 2013)."""

from __future__ import annotations

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


def descend(sign: Any, lr: Any, weight_decay: Any, p: Any, g: Any) -> Any:
    """Without momentum."""
    return p - lr * (sign * g + weight_decay * p)


def descend_with_momentum(sign: Any, lr: Any, weight_decay: Any, momentum: Any, p: Any, buffer: Any,
                          g: Any) -> tuple[Any, Any]:
    """`buffer` is the running direction, zero before the first step."""
    buffer = momentum * buffer + (sign * g + weight_decay * p)
    return p - lr * buffer, buffer


def descend_with_dampening(sign: Any, lr: Any, weight_decay: Any, momentum: Any, dampening: Any, p: Any,
                           buffer: Any, g: Any, step: Any) -> tuple[Any, Any]:
    """Of a gradient only the share 1 - dampening enters the direction, but all of the first one."""
    g = sign * g + weight_decay * p
    buffer = momentum * buffer + (step > 1).where((1 - dampening) * g, g)
    return p - lr * buffer, buffer


def descend_with_nesterov(sign: Any, lr: Any, weight_decay: Any, momentum: Any, p: Any, buffer: Any,
                          g: Any) -> tuple[Any, Any]:
    """The direction looks one step of the momentum ahead."""
    g = sign * g + weight_decay * p
    buffer = momentum * buffer + g
    return p - lr * (g + momentum * buffer), buffer


class SGD(Optimizer):
    """``p -= lr * buffer`` with ``buffer = momentum * buffer + (1 - dampening) * (grad + weight_decay * p)``."""

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False,
                 **ways: bool | None):
        check_ways("SGD", ways)
        check_not_negative("SGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening = 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                                  "nesterov": nesterov, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        shared = [sign(group), option(group, "lr"), option(group, "weight_decay")]
        if not group["momentum"]:
            update(descend, shared, [params], [gradients(params)])
            return
        shared.append(option(group, "momentum"))
        steps = self._states(params, "step", self._steps_so_far) if group["dampening"] else []
        written, read = [params, self._states(params, "momentum_buffer", filled_state())], [gradients(params)]
        if group["nesterov"]:
            update(descend_with_nesterov, shared, written, read)
        elif not group["dampening"]:
            update(descend_with_momentum, shared, written, read)
        else:
            update(advance, [], [steps])
            update(descend_with_dampening, [*shared, option(group, "dampening")], written, [*read, steps])

    def _steps_so_far(self, param: Tensor) -> Tensor:
        """Where counting begins: a buffer that is there (PyTorch saves no count) has had its first step."""
        return scalar_state(1.0 if "momentum_buffer" in self.state[param] else 0.0)(param)
