"""NAdam (Dozat 2016) and RAdam (Liu et al. 2020): Adam with Nesterov's look ahead, and with a step that starts slowly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jitgrad.functional.foreach import foreach
from jitgrad.optim.adam import coupled_decay, decoupled_decay
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

Decay = Callable[..., tuple[Any, Any]]


class _Decaying(Optimizer):
    """What both share: moments, counted steps, and weight decay of either kind."""

    def __init__(self, params: Params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                 decoupled_weight_decay: bool, maximize: bool, ways: dict[str, bool | None], **others: float):
        name = type(self).__name__
        check_ways(name, ways)
        check_not_negative(name, lr=lr, eps=eps, weight_decay=weight_decay, **others)
        check_betas(name, betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, **others,
                                  "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize})

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        steps = self._states(params, "step", scalar_state())
        update(advance, [], [steps])
        decay = decoupled_decay if group["decoupled_weight_decay"] else coupled_decay
        shared = [sign(group), option(group, "lr"), option(group, "weight_decay"), option(group, "betas", 0),
                  option(group, "betas", 1), option(group, "eps")]
        written = [params, *(self._states(params, name, filled_state()) for name in ("exp_avg", "exp_avg_sq"))]
        update(self._formula(decay), shared, written, [gradients(params), *self._sizes(group, params, steps)])

    def _formula(self, decay: Decay) -> Callable[..., Any]:
        raise NotImplementedError

    def _sizes(self, group: ParamGroup, params: list[Tensor], steps: list[Tensor]) -> list[list[Tensor]]:
        """What depends on the number of the step alone, for each parameter, as 0-d Tensors."""
        raise NotImplementedError


def _moments(sign: Any, lr: Any, weight_decay: Any, beta1: Any, beta2: Any, decay: Decay, p: Any, m: Any, v: Any,
             g: Any) -> tuple[Any, Any, Any, Any]:
    p, g = decay(lr, weight_decay, p, sign * g)
    return p, g, m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * (g * g)


# ---- NAdam -------------------------------------------------------------------------------------------------------


def _momentum(beta1: Any, momentum_decay: Any, step: Any) -> Any:
    """beta1 (1 - 0.96 ** (n momentum_decay) / 2), which grows from about a half of beta1 to beta1."""
    return beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))


def nadam_product(beta1: Any, momentum_decay: Any, product: Any, step: Any) -> Any:
    """The product of all momenta up to step n."""
    return product * _momentum(beta1, momentum_decay, step.number())


def nadam_sizes(lr: Any, beta1: Any, beta2: Any, momentum_decay: Any, step: Any, product: Any) -> tuple[Any, Any, Any]:
    """The factors of gradient and momentum, and sqrt(1 - beta2**n)."""
    now, ahead = [_momentum(beta1, momentum_decay, step.number() + k) for k in (0, 1)]
    product = product.number()
    return (lr * (1 - now) / (1 - product), lr * ahead / (1 - product * ahead),
            (1 - beta2.integer_power(step)).sqrt())


@functools.cache
def nadam_formula(decay: Decay) -> Callable[..., tuple[Any, Any, Any]]:
    """The update of one element."""

    def nadam(sign: Any, lr: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Any, m: Any, v: Any, g: Any,
              of_gradient: Any, of_momentum: Any, correction: Any) -> tuple[Any, Any, Any]:
        p, g, m, v = _moments(sign, lr, weight_decay, beta1, beta2, decay, p, m, v, g)
        scale = v.sqrt() / correction.number() + eps
        return p - (of_gradient.number() * g + of_momentum.number() * m) / scale, m, v

    return nadam


class NAdam(_Decaying):
    """Adam that takes the next step's momentum into account; momentum grows from `betas[0]` / 2 to `betas[0]`, the more
    quickly the larger `momentum_decay` is."""

    def __init__(self, params: Params, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum_decay: float = 4e-3, decoupled_weight_decay: bool = False, *,
                 maximize: bool = False, **ways: bool | None):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, ways,
                         momentum_decay=momentum_decay)

    def _formula(self, decay: Decay) -> Callable[..., Any]:
        return nadam_formula(decay)

    def _sizes(self, group: ParamGroup, params: list[Tensor], steps: list[Tensor]) -> list[list[Tensor]]:
        products = self._states(params, "mu_product", scalar_state(1.0))
        momentum = [option(group, "betas", 0), option(group, "momentum_decay")]
        update(nadam_product, momentum, [products], [steps])
        shared = [option(group, "lr"), momentum[0], option(group, "betas", 1), momentum[1]]
        return foreach(nadam_sizes, shared, [steps, products])


# ---- RAdam -------------------------------------------------------------------------------------------------------


def radam_sizes(lr: Any, beta1: Any, beta2: Any, step: Any) -> tuple[Any, Any]:
    """Step size, and by what it is multiplied where the variance of the adaptive step is known (else 0)."""
    n = step.number()
    power = beta2.integer_power(step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * n * power / (1 - power)
    squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectified = squared.sqrt() * (1 - power).sqrt()
    return lr / (1 - beta1.integer_power(step)), (length > 5).where(rectified, rectified * 0)


@functools.cache
def radam_formula(decay: Decay) -> Callable[..., tuple[Any, Any, Any]]:
    """The update of one element."""

    def radam(sign: Any, lr: Any, weight_decay: Any, beta1: Any, beta2: Any, eps: Any, p: Any, m: Any, v: Any, g: Any,
              step_size: Any, rectified: Any) -> tuple[Any, Any, Any]:
        p, g, m, v = _moments(sign, lr, weight_decay, beta1, beta2, decay, p, m, v, g)
        adaptive = (rectified > 0).where(rectified.number() / (v.sqrt() + eps), m * 0 + 1)
        return p - step_size.number() * (m * adaptive), m, v

    return radam


class RAdam(_Decaying):
    """Adam whose first steps are those of SGD with momentum, until enough gradients were seen for an adaptive step."""

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, decoupled_weight_decay: bool = False, *, maximize: bool = False,
                 **ways: bool | None):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, ways)

    def _formula(self, decay: Decay) -> Callable[..., Any]:
        return radam_formula(decay)

    def _sizes(self, group: ParamGroup, params: list[Tensor], steps: list[Tensor]) -> list[list[Tensor]]:
        return foreach(radam_sizes, [option(group, "lr"), option(group, "betas", 0), option(group, "betas", 1)], [steps])
