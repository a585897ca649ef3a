"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019) and Adamax."""

from __future__ import annotations

from typing import Any

from jitgrad import dtypes
from jitgrad.functional.core import as_operand
from jitgrad.functional.foreach import foreach
from jitgrad.optim.groups import ParamGroup
from jitgrad.optim.optimizer import (
    Optimizer,
    Params,
    advance,
    check_betas,
    check_not_negative,
    filled_state,
    gradients,
    option,
    scalar_state,
    sign,
    update,
)
from jitgrad.tensor import Tensor


def corrections(lr: Any, beta1: Any, beta2: Any, step: Any) -> tuple[Any, Any]:
    """Step size lr / (1 - beta1**n) and sqrt(1 - beta2**n) at step n. All of it is float64: 1 - beta2 is small."""
    n = step.double()
    return lr / (1 - beta1 ** n), (1 - beta2 ** n).sqrt()


def adam(sign: Any, weight_decay: Any, shrink: Any, beta2: Any, fresh1: Any, fresh2: Any, eps: Any,
         p: Any, m: Any, v: Any, g: Any, step_size: Any, correction: Any) -> tuple[Any, Any, Any]:
    """`m` and `v` are the running means of gradient and squared gradient; `fresh1`, `fresh2` are 1 - beta1, 1 - beta2."""
    p, m, v = _moments(sign, weight_decay, shrink, beta2, fresh1, fresh2, p, m, v, g)
    return _stepped(p, m, v, eps, step_size, correction), m, v


def amsgrad(sign: Any, weight_decay: Any, shrink: Any, beta2: Any, fresh1: Any, fresh2: Any, eps: Any,
            p: Any, m: Any, v: Any, largest: Any, g: Any, step_size: Any,
            correction: Any) -> tuple[Any, Any, Any, Any]:
    """As `adam`, divided by the largest `v` so far."""
    p, m, v = _moments(sign, weight_decay, shrink, beta2, fresh1, fresh2, p, m, v, g)
    largest = largest.maximum(v)
    return _stepped(p, m, largest, eps, step_size, correction), m, v, largest


def _moments(sign: Any, weight_decay: Any, shrink: Any, beta2: Any, fresh1: Any, fresh2: Any,
             p: Any, m: Any, v: Any, g: Any) -> tuple[Any, Any, Any]:
    g = sign * g + weight_decay * p
    return p * shrink, m + fresh1 * (g - m), beta2 * v + fresh2 * (g * g)


def _stepped(p: Any, m: Any, v: Any, eps: Any, step_size: Any, correction: Any) -> Any:
    return p - step_size.to(p.dtype) * (m / (v.sqrt() / correction.to(p.dtype) + eps))


class Adam(Optimizer):
    """``p -= lr * m / (sqrt(v) + eps)`` with bias-corrected running means m of the gradient and v of its square."""

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False):
        check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(type(self).__name__, betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "amsgrad": amsgrad, "maximize": maximize})

    def _decay(self, group: ParamGroup) -> tuple[Any, Any]:
        """What of a parameter is added to its gradient, and by what the parameter is multiplied."""
        return option(group, "weight_decay"), 1.0

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        written = [params, *(self._states(params, name, filled_state()) for name in names)]
        beta1, beta2 = option(group, "betas", 0), option(group, "betas", 1)
        shared = [sign(group), *self._decay(group), beta2, 1 - beta1, 1 - beta2, option(group, "eps")]
        read = [gradients(params), *_count_and_correct(self, group, params)]
        update(amsgrad if group["amsgrad"] else adam, shared, written, read)


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters directly: ``p *= 1 - lr * weight_decay``."""

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def _decay(self, group: ParamGroup) -> tuple[Any, Any]:
        return 0.0, 1 - option(group, "lr") * option(group, "weight_decay")


def _count_and_correct(optimizer: Optimizer, group: ParamGroup, params: list[Tensor]) -> list[list[Tensor]]:
    """Count one step of each parameter; its step size and correction, as 0-d Tensors."""
    steps = optimizer._states(params, "step", scalar_state())
    update(advance, [], [steps], [])
    numbers = (option(group, "lr"), option(group, "betas", 0), option(group, "betas", 1))
    return foreach(corrections, [as_operand(x, dtypes.float64) for x in numbers], [steps])


def adamax(sign: Any, weight_decay: Any, beta2: Any, fresh1: Any, eps: Any, p: Any, m: Any, u: Any, g: Any,
           step_size: Any) -> tuple[Any, Any, Any]:
    """`u` is a decaying maximum of the gradient's magnitude."""
    g = sign * g + weight_decay * p
    m = m + fresh1 * (g - m)
    u = (beta2 * u).maximum(g.abs() + eps)
    return p - step_size.to(p.dtype) * (m / u), m, u


class Adamax(Optimizer):
    """Adam with the largest magnitude in place of the mean square (Kingma & Ba 2015, section 7)."""

    def __init__(self, params: Params, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, *, maximize: bool = False):
        check_not_negative("Adamax", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("Adamax", betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        written = [params, *(self._states(params, name, filled_state()) for name in ("exp_avg", "exp_inf"))]
        step_sizes, _ = _count_and_correct(self, group, params)
        shared = [sign(group), option(group, "weight_decay"), option(group, "betas", 1),
                  1 - option(group, "betas", 0), option(group, "eps")]
        update(adamax, shared, written, [gradients(params), step_sizes])
