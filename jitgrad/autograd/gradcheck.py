"""Gradients against differences: whether what a backward pass gives is what a small step of an input does to the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad.autograd.walk import grad


class GradcheckError(RuntimeError):
    """A gradient is not what differences say."""


def gradcheck(func: Callable[..., Any], inputs: Any, *, eps: float = 1e-6, atol: float = 1e-5, rtol: float = 1e-3,
              raise_exception: bool = True, nondet_tol: float = 0.0) -> bool:
    """True when for each input that requires gradients (float64, or the differences are all rounding) and each output the
    Jacobian by the backward pass is the one by central differences of `eps`, up to ``atol + rtol * |difference|``, and the
    backward pass gives it twice, up to `nondet_tol`. Otherwise a GradcheckError, or False without `raise_exception`."""
    try:
        _check(func, _as_tuple(inputs), eps, atol, rtol, nondet_tol)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def gradgradcheck(func: Callable[..., Any], inputs: Any, grad_outputs: Any = None, *, eps: float = 1e-6, atol: float = 1e-5,
                  rtol: float = 1e-3, raise_exception: bool = True, nondet_tol: float = 0.0) -> bool:
    """`gradcheck` of the gradients themselves: of their products with `grad_outputs` (random ones, unless given)."""
    inputs = _as_tuple(inputs)
    outputs = _as_tuple(func(*inputs))
    if grad_outputs is None:
        rng = np.random.default_rng(0)
        made = [_filled_like(o, rng.standard_normal(o.shape)).requires_grad_() for o in outputs]
    else:
        made = list(_as_tuple(grad_outputs))
    wanted = [k for k, x in enumerate(inputs) if _is_checked(x)]

    def gradients(*operands: Any) -> tuple[Any, ...]:
        xs, gs = operands[:len(inputs)], operands[len(inputs):]
        found = grad([o for o in _as_tuple(func(*xs)) if o.requires_grad], [xs[k] for k in wanted],
                     [g for o, g in zip(outputs, gs) if o.requires_grad], create_graph=True, allow_unused=True)
        return tuple([g for g in found if g is not None])

    return gradcheck(gradients, (*inputs, *made), eps=eps, atol=atol, rtol=rtol, raise_exception=raise_exception,
                     nondet_tol=nondet_tol)


def _check(func: Callable[..., Any], inputs: tuple[Any, ...], eps: float, atol: float, rtol: float,
           nondet_tol: float) -> None:
    wanted = [k for k, x in enumerate(inputs) if _is_checked(x)]
    if not wanted:
        raise ValueError("gradcheck: no input is a float tensor that requires gradients")
    outputs = [o for o in _as_tuple(func(*inputs)) if o.dtype.is_differentiable]
    for j, output in enumerate(outputs):
        ours = _by_backward(output, [inputs[k] for k in wanted])
        again = _by_backward([o for o in _as_tuple(func(*inputs)) if o.dtype.is_differentiable][j],
                             [inputs[k] for k in wanted])
        for k, jacobian, other in zip(wanted, ours, again):
            where = f"gradcheck: output {j} in input {k}"
            if np.abs(jacobian - other).max(initial=0) > nondet_tol:
                raise GradcheckError(f"{where}: two backward passes differ by {np.abs(jacobian - other).max():.3g}")
            expected = _by_differences(func, inputs, k, j, eps)
            wrong = ~np.isclose(jacobian, expected, rtol, atol)
            if wrong.any():
                i, o = (int(n) for n in np.argwhere(wrong)[0])
                raise GradcheckError(f"{where}: the gradient of element {o} in element {i} is {jacobian[i, o]:.6g}, "
                                     f"differences say {expected[i, o]:.6g}; {int(wrong.sum())} of {wrong.size} differ")


def _by_backward(output: Any, wanted: Sequence[Any]) -> list[np.ndarray]:
    """For each of `wanted` the Jacobian [its elements, elements of `output`]."""
    found = [np.zeros((x.numel(), output.numel())) for x in wanted]
    for o in range(output.numel() if output.requires_grad else 0):
        seed = np.zeros(output.numel())
        seed[o] = 1
        gradients = grad([output], list(wanted), [_filled_like(output, seed.reshape(output.shape))], retain_graph=True,
                         allow_unused=True)
        for jacobian, g in zip(found, gradients):
            if g is not None:
                jacobian[:, o] = np.asarray(g.detach().numpy(), np.float64).reshape(-1)
    return found


def _by_differences(func: Callable[..., Any], inputs: tuple[Any, ...], k: int, j: int, eps: float) -> np.ndarray:
    base = inputs[k].detach().numpy().copy()

    def output(i: int, step: float) -> np.ndarray:
        moved = base.copy()
        moved.reshape(-1)[i] += step
        xs = [_filled_like(x, moved).requires_grad_() if n == k else x for n, x in enumerate(inputs)]
        found = [o for o in _as_tuple(func(*xs)) if o.dtype.is_differentiable][j]
        return np.asarray(found.detach().numpy(), np.float64).ravel()

    rows = [(output(i, eps) - output(i, -eps)) / (2 * eps) for i in range(base.size)]
    return np.array(rows).reshape(base.size, -1)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_checked(x: Any) -> bool:
    return getattr(x, "requires_grad", False) and x.dtype.is_floating_point


def _filled_like(x: Any, values: np.ndarray) -> Any:
    made = type(x.detach())(np.asarray(values, x.dtype.numpy))
    return made if x.device.type == "cpu" else made.to(x.device)
