"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019) and Adamax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jitgrad.functional.foreach import Scalar, foreach
from jitgrad.optim.groups import ParamGroup
from jitgrad.optim.optimizer import (
    Optimizer,
    Params,
    check_betas,
    check_not_negative,
    filled_state,
    gradients,
    option,
    scalar_state,
    sign,
    store,
)
from jitgrad.tensor import Tensor


def next_step(lr: Any, beta1: Any, beta2: Any, step: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The new step count n, the step size lr / (1 - beta1**n), and sqrt(1 - beta2**n)."""
    step = step + 1
    n = step.number()
    return step, lr / (1 - beta1 ** n), (1 - beta2 ** n).sqrt()


@functools.cache
def adam_formula(decoupled: bool, amsgrad: bool) -> Callable[..., tuple[Scalar, ...]]:
    """The update of one element. `m` and `v` are the running means of gradient and squared gradient; weight decay is
    part of the gradient, or `decoupled` from it."""

    def adam(sign: Any, lr: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Scalar, g: Scalar, m: Scalar,
             v: Scalar, step_size: Scalar, correction: Scalar, largest: Any = None) -> tuple[Scalar, ...]:
        g = sign * g
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * (g * g)
        top = largest.maximum(v) if amsgrad else v
        p = p - step_size.number() * (m / (top.sqrt() / correction.number() + eps))
        return (p, m, v, top) if amsgrad else (p, m, v)

    return adam


class Adam(Optimizer):
    """``p -= lr * m / (sqrt(v) + eps)`` with bias-corrected running means m of the gradient and v of its square."""

    _decoupled = False

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False):
        check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(type(self).__name__, betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "amsgrad": amsgrad, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        lr, beta1, beta2 = option(group, "lr"), option(group, "betas", 0), option(group, "betas", 1)
        steps = self._states(params, "step", scalar_state())
        states = [self._states(params, name, filled_state()) for name in ("exp_avg", "exp_avg_sq")]
        if group["amsgrad"]:
            states.append(self._states(params, "max_exp_avg_sq", filled_state()))
        counts, step_sizes, corrections = foreach(next_step, [lr, beta1, beta2], [steps])
        shared = [sign(group), lr, option(group, "weight_decay"), beta1, beta2, option(group, "eps")]
        lists = [params, gradients(params), *states[:2], step_sizes, corrections, *states[2:]]
        results = foreach(adam_formula(self._decoupled, bool(group["amsgrad"])), shared, lists)
        store([counts, *results], [steps, params, *states])


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters directly: ``p *= 1 - lr * weight_decay``."""

    _decoupled = True

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


def adamax_formula(sign: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Scalar, g: Scalar, m: Scalar,
                   u: Scalar, step_size: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """`u` is a decaying maximum of the gradient's magnitude."""
    g = sign * g + weight_decay * p
    m = m + (1 - beta1) * (g - m)
    u = (beta2 * u).maximum(abs(g) + eps)
    return p - step_size.number() * (m / u), m, u


class Adamax(Optimizer):
    """Adam with the largest magnitude in place of the mean square (Kingma & Ba 2015, section 7)."""

    def __init__(self, params: Params, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, *, maximize: bool = False):
        check_not_negative("Adamax", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("Adamax", betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        beta1, beta2 = option(group, "betas", 0), option(group, "betas", 1)
        steps = self._states(params, "step", scalar_state())
        states = [self._states(params, name, filled_state()) for name in ("exp_avg", "exp_inf")]
        counts, step_sizes, _ = foreach(next_step, [option(group, "lr"), beta1, beta2], [steps])
        shared = [sign(group), option(group, "weight_decay"), beta1, beta2, option(group, "eps")]
        results = foreach(adamax_formula, shared, [params, gradients(params), *states, step_sizes])
        store([counts, *results], [steps, params, *states])
