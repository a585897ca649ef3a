"""L-BFGS (Liu & Nocedal 1989), as PyTorch has it: steps along an approximate Newton direction, each of up to `max_iter`
evaluations of a closure, with a line search for the strong Wolfe conditions (Nocedal & Wright, Numerical Optimization, 2006,
algorithms 3.5 and 3.6) or without one.

What it does next depends on values, so it runs eagerly; the closure may be a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jitgrad import creation, functional
from jitgrad.autograd import enable_grad, no_grad
from jitgrad.optim.optimizer import Optimizer, Params, check_not_negative
from jitgrad.tensor import Tensor

SEARCHES = (None, "strong_wolfe")
CURVATURE = 1e-10                               # of a step, above which it tells something about the Hessian
DECREASE, FLATTENING = 1e-4, 0.9                # the constants c1 and c2 of the Wolfe conditions
TRIALS = 25                                     # of a line search, at the most


@dataclass(frozen=True)
class Point:
    """A place on the line of a search: how far, the loss, its gradient (flat), and its slope along the line."""

    at: float
    loss: float
    gradient: Tensor
    slope: float


Evaluate = Callable[[float], Point]


class LBFGS(Optimizer):
    """One group of parameters, whose whole gradient is one vector. ``step(closure)`` calls `closure`, which computes loss
    and gradients, several times."""

    def __init__(self, params: Params, lr: float = 1.0, max_iter: int = 20, max_eval: int | None = None,
                 tolerance_grad: float = 1e-7, tolerance_change: float = 1e-9, history_size: int = 100,
                 line_search_fn: str | None = None):
        check_not_negative("LBFGS", lr=lr, max_iter=max_iter, history_size=history_size)
        if line_search_fn not in SEARCHES:
            raise ValueError(f"LBFGS: line_search_fn must be None or 'strong_wolfe', got {line_search_fn!r}")
        super().__init__(params, {"lr": lr, "max_iter": max_iter,
                                  "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
                                  "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change,
                                  "history_size": history_size, "line_search_fn": line_search_fn})
        if len(self.param_groups) != 1:
            raise ValueError("LBFGS: all parameters must be in one group")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Up to `max_iter` steps; the loss before the first one."""
        if closure is None:
            raise ValueError("LBFGS: step needs a closure that computes the loss and the gradients")
        group = self.param_groups[0]
        params = group["params"]
        state = self.state[params[0]]

        def evaluate() -> Any:
            with enable_grad():
                loss = closure()
            state["func_evals"] = state.get("func_evals", 0) + 1
            return loss

        first = evaluate()
        loss, gradient = float(first), _flat_gradient(params)
        with no_grad():
            if _largest(gradient) > group["tolerance_grad"]:
                self._iterate(group, state, lambda: float(evaluate()), loss, gradient)
        return first

    def _iterate(self, group: Any, state: dict[str, Any], evaluate: Callable[[], float], loss: float,
                 gradient: Tensor) -> None:
        params, small = group["params"], group["tolerance_change"]
        evaluations = 1
        for _ in range(group["max_iter"]):
            direction = _direction(state, gradient, group["history_size"])
            state.update(d=direction, prev_flat_grad=gradient, prev_loss=loss)
            slope = _dot(gradient, direction)
            if slope > -small:
                return
            length = group["lr"] if state["n_iter"] > 1 else min(1.0, 1.0 / float(gradient.abs().sum())) * group["lr"]
            if group["line_search_fn"] is None:
                _move(params, direction, length)
                if state["n_iter"] != group["max_iter"]:
                    loss, gradient = evaluate(), _flat_gradient(params)
                    evaluations += 1
            else:
                found, trials = _search(params, evaluate, direction, length, Point(0.0, loss, gradient, slope), small)
                _move(params, direction, found.at)
                length, loss, gradient = found.at, found.loss, found.gradient
                evaluations += trials
            state["t"] = length
            done = (evaluations >= group["max_eval"] or _largest(gradient) <= group["tolerance_grad"]
                    or _largest(direction) * abs(length) <= small or abs(loss - state["prev_loss"]) < small)
            if done:
                return


def _direction(state: dict[str, Any], gradient: Tensor, history: int) -> Tensor:
    """The direction of the next step: the gradient, turned and scaled by what earlier steps told of the Hessian."""
    state["n_iter"] = state.get("n_iter", 0) + 1
    if state["n_iter"] == 1:
        state.update(old_dirs=[], old_stps=[], H_diag=1.0)
        return -gradient
    change, step = gradient - state["prev_flat_grad"], state["d"] * state["t"]
    curvature = _dot(change, step)
    changes, steps = state["old_dirs"], state["old_stps"]
    if curvature > CURVATURE:
        if len(changes) == history:
            del changes[0], steps[0]
        changes.append(change)
        steps.append(step)
        state["H_diag"] = curvature / _dot(change, change)
    weights = [1.0 / _dot(y, s) for y, s in zip(changes, steps)]
    direction, shares = -gradient, []
    for y, s, weight in reversed(list(zip(changes, steps, weights))):
        shares.append(_dot(s, direction) * weight)
        direction = direction - y * shares[-1]
    direction = direction * state["H_diag"]
    for y, s, weight, share in zip(changes, steps, weights, reversed(shares)):
        direction = direction + s * (share - _dot(y, direction) * weight)
    return direction


# ---- the line search -----------------------------------------------------------------------------------------------


def _search(params: list[Tensor], evaluate: Callable[[], float], direction: Tensor, length: float, start: Point,
            small: float) -> tuple[Point, int]:
    """A place that meets the strong Wolfe conditions, or the best that was found; and how many were looked at. The
    parameters are where they were before."""
    before = [p.detach().clone() for p in params]

    def look(at: float) -> Point:
        _move(params, direction, at)
        loss, gradient = evaluate(), _flat_gradient(params)
        for p, old in zip(params, before):
            p.copy_(old)
        return Point(at, loss, gradient, _dot(gradient, direction))

    bracket, trials = _bracket(look, length, start)
    size = _largest(direction)
    slow = False                                    # whether the last interval hardly became smaller
    while len(bracket) == 2 and trials < TRIALS:
        low, high = sorted(bracket, key=lambda point: point.loss)
        if abs(high.at - low.at) * size < small:
            break
        at, slow = _inside(low, high, slow)
        point = look(at)
        trials += 1
        if point.loss > start.loss + DECREASE * at * start.slope or point.loss >= low.loss:
            bracket = [low, point]
        elif abs(point.slope) <= -FLATTENING * start.slope:
            bracket = [point]
        else:
            bracket = [point, low if point.slope * (high.at - low.at) >= 0 else high]
    return min(bracket, key=lambda point: point.loss), trials


def _bracket(look: Evaluate, length: float, start: Point) -> tuple[list[Point], int]:
    """One place that will do, or two with one in between; and how many were looked at."""
    before, point = start, look(length)
    for trials in range(1, TRIALS + 1):
        if point.loss > start.loss + DECREASE * point.at * start.slope or (trials > 1 and point.loss >= before.loss):
            return [before, point], trials
        if abs(point.slope) <= -FLATTENING * start.slope:
            return [point], trials
        if point.slope >= 0:
            return [before, point], trials
        nearest, furthest = point.at + 0.01 * (point.at - before.at), 10 * point.at
        before, point = point, look(_cubic_minimum(before, point, nearest, furthest))
    return [start, point], TRIALS


def _inside(low: Point, high: Point, slow: bool) -> tuple[float, bool]:
    """Where to look between two places; twice in a row no nearer to an end than a tenth of the interval."""
    least, most = sorted((low.at, high.at))
    at = _cubic_minimum(low, high, least, most)
    margin = 0.1 * (most - least)
    if min(most - at, at - least) >= margin:
        return at, False
    if slow or at >= most or at <= least:
        return (most - margin if abs(at - most) < abs(at - least) else least + margin), False
    return at, True


def _cubic_minimum(one: Point, other: Point, least: float, most: float) -> float:
    """Where the cubic through two places with their slopes is lowest, within bounds; else the middle."""
    if one.at > other.at:
        one, other = other, one
    across = other.at - one.at
    d = one.slope + other.slope - 3 * (one.loss - other.loss) / (one.at - other.at) if across else math.nan
    squared = d * d - one.slope * other.slope
    if not squared >= 0:
        return (least + most) / 2
    root = math.sqrt(squared)
    bottom = other.slope - one.slope + 2 * root
    at = other.at - across * ((other.slope + root - d) / bottom) if bottom else math.nan
    return min(max(at, least), most) if at == at else (least + most) / 2


# ---- all parameters as one vector ----------------------------------------------------------------------------------


def _flat_gradient(params: list[Tensor]) -> Tensor:
    parts = [creation.zeros_like(p).reshape(-1) if p.grad is None else p.grad.detach().reshape(-1) for p in params]
    return functional.cat(parts, 0)


def _move(params: list[Tensor], direction: Tensor, length: float) -> None:
    begin = 0
    for p in params:
        p.add_(direction[begin:begin + p.numel()].reshape(p.shape), alpha=length)
        begin += p.numel()


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum())


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
