"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019) and Adamax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jitgrad.functional.foreach import foreach
from jitgrad.optim.groups import ParamGroup
from jitgrad.optim.optimizer import (
    Optimizer,
    Params,
    advance,
    check_betas,
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


def corrections(lr: Any, beta1: Any, beta2: Any, step: Any) -> tuple[Any, Any]:
    """Step size lr / (1 - beta1**n) and 1 / sqrt(1 - beta2**n) at step n, in float64, since 1 - beta2 is small."""
    return lr / (1 - beta1.integer_power(step)), (1 - beta2.integer_power(step)).rsqrt()


def coupled_decay(lr: Any, weight_decay: Any, p: Any, g: Any) -> tuple[Any, Any]:
    """Adam's weight decay: a part of the gradient."""
    return p, g + weight_decay * p


def decoupled_decay(lr: Any, weight_decay: Any, p: Any, g: Any) -> tuple[Any, Any]:
    """AdamW's: the parameter shrinks."""
    return p * (1 - lr * weight_decay), g


@functools.cache
def adam_formula(decay: Callable[..., tuple[Any, Any]], amsgrad: bool) -> Callable[..., tuple[Any, ...]]:
    """The update of one element. `m` and `v` are the running means of gradient and squared gradient; with `amsgrad`,
    the largest `v` so far comes behind them and takes its place."""

    def adam(sign: Any, lr: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Any, m: Any, v: Any,
             *others: Any) -> tuple[Any, ...]:
        *largest, g, step_size, correction = others
        p, g = decay(lr, weight_decay, p, sign * g)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * (g * g)
        largest = [largest[0].maximum(v)] if amsgrad else []
        scale = (largest[0] if amsgrad else v).sqrt() * correction.number() + eps
        return p - step_size.number() * (m / scale), m, v, *largest

    return adam


class Adam(Optimizer):
    """``p -= lr * m / (sqrt(v) + eps)`` with bias-corrected running means m of the gradient and v of its square. With
    `decoupled_weight_decay` the parameters themselves shrink, as in AdamW."""

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False,
                 decoupled_weight_decay: bool = False, **ways: bool | None):
        check_ways(type(self).__name__, ways)
        check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(type(self).__name__, betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "amsgrad": amsgrad, "maximize": maximize,
                                  "decoupled_weight_decay": decoupled_weight_decay})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        written = [params, *(self._states(params, name, filled_state()) for name in names)]
        shared = [sign(group), option(group, "lr"), option(group, "weight_decay"), option(group, "betas", 0),
                  option(group, "betas", 1), option(group, "eps")]
        read = [gradients(params), *_count_and_correct(self, group, params)]
        decay = decoupled_decay if group["decoupled_weight_decay"] else coupled_decay
        update(adam_formula(decay, bool(group["amsgrad"])), shared, written, read)


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters directly: ``p *= 1 - lr * weight_decay``."""

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, **ways: bool | None):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True,
                         **ways)


def _count_and_correct(optimizer: Optimizer, group: ParamGroup, params: list[Tensor]) -> list[list[Tensor]]:
    """Count one step of each parameter; its step size and correction, as 0-d Tensors."""
    steps = optimizer._states(params, "step", scalar_state())
    update(advance, [], [steps])
    return foreach(corrections, [option(group, "lr"), option(group, "betas", 0), option(group, "betas", 1)], [steps])


def adamax(sign: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Any, m: Any, u: Any, g: Any,
           step_size: Any) -> tuple[Any, Any, Any]:
    """`u` is a decaying maximum of the gradient's magnitude."""
    g = sign * g + weight_decay * p
    m = m + (1 - beta1) * (g - m)
    u = (beta2 * u).maximum(g.abs() + eps)
    return p - step_size.number() * (m / u), m, u


class Adamax(Optimizer):
    """Adam with the largest magnitude in place of the mean square (Kingma & Ba 2015, section 7)."""

    def __init__(self, params: Params, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, *, maximize: bool = False, **ways: bool | None):
        check_ways("Adamax", ways)
        check_not_negative("Adamax", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("Adamax", betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        written = [params, *(self._states(params, name, filled_state()) for name in ("exp_avg", "exp_inf"))]
        step_sizes, _ = _count_and_correct(self, group, params)
        shared = [sign(group), option(group, "weight_decay"), option(group, "betas", 0),
                  option(group, "betas", 1), option(group, "eps")]
        update(adamax, shared, written, [gradients(params), step_sizes])
