"""Helpers over many parameters at once: clipping gradients, and parameters as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from jitgrad import functional
from jitgrad.autograd import no_grad
from jitgrad.nn.utils import rnn as rnn
from jitgrad.tensor import Tensor


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    members = [parameters] if isinstance(parameters, Tensor) else parameters
    return [param.grad for param in members if param.grad is not None]


def get_total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all Tensors together, as if they were one vector."""
    members = list(tensors)
    if not members:
        return Tensor(np.zeros((), np.float32))
    norms = [functional.norm(x.reshape(-1), norm_type) for x in members]
    return functional.norm(functional.stack(norms), norm_type)


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0,
                    error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients in place so that their common norm is at most `max_norm`; returns what it was."""
    gradients = _gradients(parameters)
    with no_grad():
        total = get_total_norm(gradients, float(norm_type))
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(f"clip_grad_norm_: the gradients have the norm {total.item()} and cannot be scaled")
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clamp all gradients in place to [-clip_value, clip_value]."""
    with no_grad():
        for gradient in _gradients(parameters):
            gradient.clamp_(-clip_value, clip_value)


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters one after the other as one vector."""
    return functional.cat([param.reshape(-1) for param in parameters])


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy the parts of a vector into the parameters."""
    start = 0
    with no_grad():
        for param in parameters:
            size = math.prod(param.shape)
            param.copy_(vec[start:start + size].reshape(param.shape))
            start += size
