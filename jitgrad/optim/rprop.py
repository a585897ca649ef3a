"""Rprop (Riedmiller & Braun 1993) and averaged SGD (Polyak & Juditsky 1992)."""

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


def rprop(sign: Any, shrink: Any, grow: Any, least: Any, most: Any, p: Any, before: Any, size: Any,
          g: Any) -> tuple[Any, Any, Any]:
    """`before` is the gradient that was followed last, `size` the element's own step."""
    g = sign * g
    agreement = g * before
    turned = agreement < 0
    factor = (agreement > 0).where(size * grow, turned.where(size * shrink, size))
    size = factor.maximum(least).minimum(most)
    g = turned.where(g * 0, g)
    return p - (g > 0).where(size, (g < 0).where(-size, g)), g, size


class Rprop(Optimizer):
    """Steps of each element's own size in the direction of its gradient's sign: the size grows while the sign stays, and
    shrinks where it turns. For gradients of all data, not of batches."""

    def __init__(self, params: Params, lr: float = 1e-2, etas: tuple[float, float] = (0.5, 1.2),
                 step_sizes: tuple[float, float] = (1e-6, 50), *, maximize: bool = False, **ways: bool | None):
        check_ways("Rprop", ways)
        check_not_negative("Rprop", lr=lr)
        if not 0 < etas[0] < 1 < etas[1]:
            raise ValueError(f"Rprop: etas must be below and above 1, got {etas}")
        super().__init__(params, {"lr": lr, "etas": tuple(etas), "step_sizes": tuple(step_sizes), "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        written = [params, self._states(params, "prev", filled_state()),
                   self._states(params, "step_size", filled_state(float(group["lr"])))]
        shared = [sign(group), option(group, "etas", 0), option(group, "etas", 1), option(group, "step_sizes", 0),
                  option(group, "step_sizes", 1)]
        update(rprop, shared, written, [gradients(params)])
        update(advance, [], [self._states(params, "step", scalar_state())])


def asgd(sign: Any, weight_decay: Any, lambd: Any, p: Any, mean: Any, g: Any, eta: Any, mu: Any) -> tuple[Any, Any]:
    """`eta` is the step size, `mu` how far the mean moves towards the parameter."""
    g = sign * g + weight_decay * p
    p = p * (1 - lambd * eta.number()) - eta.number() * g
    return p, (mu < 1).where(mean + (p - mean) * mu.number(), p)


def asgd_rates(lr: Any, lambd: Any, alpha: Any, t0: Any, eta: Any, mu: Any, step: Any) -> tuple[Any, Any]:
    """What the next step takes, in place of `eta` and `mu`."""
    n = step.number()
    return 0 * eta + lr / (1 + lambd * lr * n) ** alpha, 0 * mu + 1 / (n - t0).maximum(1)


class ASGD(Optimizer):
    """SGD with a step size that falls, and (in the state, as ``ax``) the mean of the parameters since step `t0`."""

    def __init__(self, params: Params, lr: float = 1e-2, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6,
                 weight_decay: float = 0.0, *, maximize: bool = False, **ways: bool | None):
        check_ways("ASGD", ways)
        check_not_negative("ASGD", lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay,
                                  "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        rates = [self._states(params, "eta", scalar_state(float(group["lr"]))),
                 self._states(params, "mu", scalar_state(1.0))]
        steps = self._states(params, "step", scalar_state())
        update(advance, [], [steps])
        shared = [sign(group), option(group, "weight_decay"), option(group, "lambd")]
        update(asgd, shared, [params, self._states(params, "ax", filled_state())], [gradients(params), *rates])
        update(asgd_rates, [option(group, name) for name in ("lr", "lambd", "alpha", "t0")], rates, [steps])
