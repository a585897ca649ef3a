"""Losses: between predictions and targets, reduced to a mean, a sum, or not at all.

`reduction` is "mean", "sum" or "none". Class indices are int64; classes stand in dimension 1 (dimension 0 of unbatched
input).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.activation import log_softmax, logsigmoid
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    cast,
    describe,
    matched,
    require_shape,
    size,
    unknown_choice,
    widened,
)
from jitgrad.functional.elementwise import add, clamp_min, mul, sub, where, xlogy
from jitgrad.functional.logic import gt, lt
from jitgrad.functional.reduce import mean, norm, safe_sqrt, sum
from jitgrad.ops.builders import broadcast, expand_dims, full, ones_like, zeros_like
from jitgrad.ops.derived import derived
from jitgrad.ops.index import check_range

__all__ = [
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "cosine_similarity",
    "cross_entropy", "gaussian_nll_loss", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss",
    "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_soft_margin_loss", "nll_loss",
    "pairwise_distance", "poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss", "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]

_REDUCTIONS = ("mean", "sum", "none")


def _reduced(op: str, loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean(loss)
    if reduction == "sum":
        return sum(loss)
    if reduction == "none":
        return loss
    raise unknown_choice(op, "reduction", reduction, _REDUCTIONS)


def _pair(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return matched(op, x, y, to_float=True)


# regression

@casts(cpu="full", cuda="full")
def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", *, weight: Tensor | None = None) -> Tensor:
    """``(input - target) ** 2``."""
    difference = ops.sub(*_pair("mse_loss", input, target))
    loss = ops.mul(difference, difference)
    return _reduced("mse_loss", loss if weight is None else mul(loss, weight), reduction)


@casts(cpu="full", cuda="full")
def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``|input - target|``."""
    return _reduced("l1_loss", ops.abs(ops.sub(*_pair("l1_loss", input, target))), reduction)


@casts(cpu="full", cuda="full")
def smooth_l1_loss(input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    """``0.5 * d ** 2 / beta`` where the distance d is below `beta`, ``d - 0.5 * beta`` elsewhere."""
    if beta == 0:
        return l1_loss(input, target, reduction)
    distance = ops.abs(ops.sub(*_pair("smooth_l1_loss", input, target)))
    near = mul(ops.mul(distance, distance), 0.5 / beta)
    return _reduced("smooth_l1_loss", where(lt(distance, beta), near, sub(distance, 0.5 * beta)), reduction)


@casts(cpu="full", cuda="full")
def huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    """``0.5 * d ** 2`` where the distance d is at most `delta`, ``delta * (d - 0.5 * delta)`` elsewhere."""
    distance = ops.abs(ops.sub(*_pair("huber_loss", input, target)))
    near, far = mul(ops.mul(distance, distance), 0.5), mul(sub(distance, 0.5 * delta), delta)
    return _reduced("huber_loss", where(gt(distance, delta), far, near), reduction)


@casts(cpu="full", cuda="full")
def poisson_nll_loss(input: Tensor, target: Tensor, log_input: bool = True, full: bool = False, eps: float = 1e-8,
                     reduction: str = "mean") -> Tensor:
    """Negative log likelihood of counts under Poisson rates ``exp(input)`` (or `input`)."""
    input = as_float(input)
    rate, log_rate = (ops.exp(input), input) if log_input else (input, ops.log(add(input, eps)))
    loss = sub(rate, mul(target, log_rate))
    if full:
        stirling = add(sub(xlogy(target, target), target), mul(ops.log(clamp_min(mul(target, 2 * math.pi), eps)), 0.5))
        loss = where(gt(target, 1), add(loss, stirling), loss)
    return _reduced("poisson_nll_loss", loss, reduction)


def gaussian_nll_loss(input: Tensor, target: Tensor, var: Tensor, full: bool = False, eps: float = 1e-6,
                      reduction: str = "mean") -> Tensor:
    """Negative log likelihood under normal distributions of means `input` and variances `var`."""
    variance = clamp_min(var, eps)
    difference = sub(input, target)
    distance = ops.div(*matched("gaussian_nll_loss", mul(difference, difference), variance))
    loss = mul(add(ops.log(variance), distance), 0.5)
    return _reduced("gaussian_nll_loss", add(loss, 0.5 * math.log(2 * math.pi)) if full else loss, reduction)


# classes

@casts(cpu="full")
def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """Negative log probability of the target class under ``softmax(input)``. `input` [N, C, ...]; `target` class
    indices [N, ...] (of which `ignore_index` counts for nothing) or class probabilities of the shape of `input`;
    `weight` [C]."""
    axis = _class_axis("cross_entropy", input)
    if target.dtype.category == "f":
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing, axis)
    logs = log_softmax(input, axis)
    if type(label_smoothing) in (int, float) and label_smoothing == 0:
        return nll_loss(logs, target, weight, ignore_index, reduction)
    _check_classes("cross_entropy", input, target, axis)
    valid, safe = _valid_classes(target, ignore_index)
    terms = logs if weight is None else ops.mul(logs, _along(weight, logs, axis))
    uniform = ops.neg(sum(terms, axis))                        # against equal probabilities
    nll = _picked(logs, safe, weight, axis)
    loss = add(mul(nll, 1.0 - label_smoothing), mul(uniform, label_smoothing / input.shape[axis]))
    return _over_valid("cross_entropy", loss, valid, safe, weight, reduction)


def _class_axis(op: str, x: Tensor) -> int:
    require_shape(op, len(x.shape) > 0, "expected at least one dimension, of classes")
    return 0 if len(x.shape) == 1 else 1


def _soft_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float,
                        axis: int) -> Tensor:
    require_shape("cross_entropy", tuple(target.shape) == tuple(x.shape),
                  f"class probabilities must have the shape of the input: {describe(x)}, target {describe(target)}")
    if label_smoothing:
        target = add(mul(target, 1.0 - label_smoothing), label_smoothing / x.shape[axis])
    terms = ops.mul(log_softmax(x, axis), cast(target, x.dtype))
    if weight is not None:
        terms = ops.mul(terms, _along(weight, terms, axis))
    loss = ops.neg(sum(terms, axis))
    if reduction == "mean":
        return mul(sum(loss), 1.0 / max(size(loss.shape), 1))
    return _reduced("cross_entropy", loss, reduction)


def _along(weight: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = tuple([n if d == axis else 1 for d, n in enumerate(x.shape)])
    return broadcast(ops.reshape(weight, shape=shape), x.shape)


@casts(cpu="full", cuda="full")
def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
             reduction: str = "mean") -> Tensor:
    """``-input[n, target[n]]`` for log probabilities `input` [N, C, ...] and class indices `target` [N, ...]; the
    mean is weighted by ``weight[target]``, and `ignore_index` counts for nothing."""
    axis = _class_axis("nll_loss", input)
    _check_classes("nll_loss", input, target, axis)
    if len(input.shape) == 2 and weight is None and reduction == "mean":
        return _mean_nll(input, cast(target, dtypes.int64), ignore_index=ignore_index)
    valid, safe = _valid_classes(target, ignore_index)
    return _over_valid("nll_loss", _picked(input, safe, weight, axis), valid, safe, weight, reduction)


def _counted(target: Any, ignore_index: int) -> tuple[Any, Any]:
    """The rows whose target counts, and their classes."""
    rows = np.flatnonzero(target != ignore_index)
    return rows, target[rows]


def _mean_nll_arrays(logs: Any, target: Any, *, ignore_index: int) -> Any:
    rows, classes = _counted(target, ignore_index)
    check_range("nll_loss", classes, logs.shape[1])
    return -logs[rows, classes].sum() / logs.dtype.type(len(rows))


def _mean_nll_gradient_arrays(g: Any, target: Any, *, shape: tuple[int, ...], ignore_index: int) -> Any:
    out = np.zeros(shape, g.dtype)
    rows, classes = _counted(target, ignore_index)
    out[rows, classes] = -g / g.dtype.type(len(rows))
    return out


@derived(_mean_nll_gradient_arrays)
def _mean_nll_gradient(g: Tensor, target: Tensor, *, shape: tuple[int, ...], ignore_index: int) -> Tensor:
    """``-g / count`` at the class of each row that counts, else 0."""
    valid, safe = _valid_classes(target, ignore_index)
    share = ops.neg(ops.div(g, sum(ops.cast(valid, dtype=g.dtype))))
    marked = ops.eq(ops.iota(shape=shape, axis=1, dtype=dtypes.int64), broadcast(expand_dims(safe, (1,)), shape))
    marked = ops.bitwise_and(marked, broadcast(expand_dims(valid, (1,)), shape))
    spread = broadcast(share, shape)
    return ops.where(marked, spread, zeros_like(spread))


@derived(_mean_nll_arrays, vjp=(lambda g, logs_type, target, ignore_index: _mean_nll_gradient(
    g, target, shape=logs_type.shape, ignore_index=ignore_index), None))
def _mean_nll(logs: Tensor, target: Tensor, *, ignore_index: int) -> Tensor:
    """The usual case of `nll_loss`: a matrix, without weights, to a mean."""
    valid, safe = _valid_classes(target, ignore_index)
    return _over_valid("nll_loss", _picked(logs, safe, None, 1), valid, safe, None, "mean")


def _picked(logs: Tensor, classes: Tensor, weight: Tensor | None, axis: int) -> Tensor:
    """The negative log probability of each class, times its weight."""
    picked = ops.gather(logs, expand_dims(classes, (axis,)), axis=axis)
    loss = ops.neg(ops.reshape(picked, shape=tuple(classes.shape)))
    return loss if weight is None else mul(loss, ops.take(weight, classes, axis=0))


def _over_valid(op: str, loss: Tensor, valid: Tensor, classes: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The reduction of a loss over targets that count; the mean is weighted like the loss."""
    loss = ops.where(valid, loss, zeros_like(loss))
    if reduction != "mean":
        return _reduced(op, loss, reduction)
    counted = ops.cast(valid, dtype=loss.dtype)
    if weight is not None:
        counted = ops.mul(counted, cast(ops.take(weight, classes, axis=0), loss.dtype))
    return ops.div(sum(loss), sum(counted))


def _check_classes(op: str, x: Tensor, target: Tensor, axis: int) -> None:
    expected = x.shape[:axis] + x.shape[axis + 1:]
    if tuple(target.shape) != tuple(expected):
        require_shape(op, False, f"class indices of {describe(x)} must have shape {list(expected)}, got "
                                 f"{describe(target)}")
    if not target.dtype.is_integer:
        raise complain(DTypeError, op, f"the target must be class indices (int64), got {describe(target)}",
                       fix="Did you mean target.long()?")


def _valid_classes(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where the target counts, and the target with 0 in place of what does not, so that every index is in range."""
    target = cast(target, dtypes.int64)
    valid = ops.ne(target, full(target.shape, ignore_index, dtypes.int64))
    return valid, ops.where(valid, target, zeros_like(target))


@casts(cpu="full", cuda="refused")
def binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None,
                         reduction: str = "mean") -> Tensor:
    """``-(t * log(p) + (1 - t) * log(1 - p))`` with logarithms not below -100."""
    p, t = _pair("binary_cross_entropy", input, target)
    one = ones_like(p)
    positive = ops.mul(t, clamp_min(ops.log(p), -100.0))
    negative = ops.mul(ops.sub(one, t), clamp_min(ops.log1p(ops.neg(p)), -100.0))
    loss = ops.neg(ops.add(positive, negative))
    return _reduced("binary_cross_entropy", loss if weight is None else mul(loss, weight), reduction)


@casts(cpu="full", cuda="full")
def binary_cross_entropy_with_logits(input: Tensor, target: Tensor, weight: Tensor | None = None,
                                     reduction: str = "mean", pos_weight: Tensor | None = None) -> Tensor:
    """`binary_cross_entropy` of ``sigmoid(input)``, without overflow; positives count `pos_weight` times."""
    x, t = _pair("binary_cross_entropy_with_logits", input, target)
    tail = ops.neg(logsigmoid(x))                              # log(1 + exp(-x))
    negatives = ops.mul(ops.sub(ones_like(t), t), x)
    if pos_weight is not None:
        tail = mul(tail, add(mul(sub(pos_weight, 1), t), 1))
    loss = ops.add(negatives, tail)
    return _reduced("binary_cross_entropy_with_logits", loss if weight is None else mul(loss, weight), reduction)


@casts(cpu="full", cuda="full")
def kl_div(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """``target * (log(target) - input)`` for log probabilities `input`; "batchmean" divides by the batch size."""
    x, t = _pair("kl_div", input, target)
    loss = ops.mul(ops.exp(t), ops.sub(t, x)) if log_target else ops.sub(xlogy(t, t), ops.mul(t, x))
    if reduction == "batchmean":
        return mul(sum(loss), 1.0 / input.shape[0])
    return _reduced("kl_div", loss, reduction)


# margins and similarities

@casts(cpu="full", cuda="full")
def hinge_embedding_loss(input: Tensor, target: Tensor, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """`input` where `target` is 1, ``max(0, margin - input)`` where it is -1."""
    apart = clamp_min(sub(margin, input), 0)
    return _reduced("hinge_embedding_loss", where(ops.eq(target, ones_like(target)), input, apart), reduction)


@casts(cpu="full", cuda="full")
def margin_ranking_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0,
                        reduction: str = "mean") -> Tensor:
    """``max(0, -target * (input1 - input2) + margin)``."""
    loss = clamp_min(add(mul(sub(input2, input1), target), margin), 0)
    return _reduced("margin_ranking_loss", loss, reduction)


@casts(cpu="full", cuda="full")
def soft_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``log(1 + exp(-target * input))``."""
    return _reduced("soft_margin_loss", ops.neg(logsigmoid(mul(input, target))), reduction)


@casts(cuda="full")
@widened
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between vectors along `dim`; each length is taken as at least `eps`."""
    x, y = _pair("cosine_similarity", x1, x2)
    product = sum(ops.mul(x, y), dim)
    lengths = [clamp_min(safe_sqrt(sum(ops.mul(v, v), dim)), eps) for v in (x, y)]
    return ops.div(product, ops.mul(*lengths))


@casts(cpu="full", cuda="full")
def cosine_embedding_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0,
                          reduction: str = "mean") -> Tensor:
    """``1 - cos`` where `target` is 1, ``max(0, cos - margin)`` where it is -1."""
    cosine = cosine_similarity(input1, input2, -1)
    loss = where(ops.eq(target, ones_like(target)), sub(1.0, cosine), clamp_min(sub(cosine, margin), 0))
    return _reduced("cosine_embedding_loss", loss, reduction)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The `p`-norm of ``x1 - x2 + eps`` over the last dimension."""
    return norm(add(sub(x1, x2), eps), p, -1, keepdim)


@casts(cpu="full", cuda="full")
def triplet_margin_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: Operand = 1.0, p: float = 2.0,
                        eps: float = 1e-6, swap: bool = False, reduction: str = "mean") -> Tensor:
    """``max(0, d(anchor, positive) - d(anchor, negative) + margin)``."""
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return pairwise_distance(x, y, p, eps)

    return _triplet_loss("triplet_margin_loss", (anchor, positive, negative), distance, margin, swap, reduction)


@casts(cpu="full", cuda="full")
def triplet_margin_with_distance_loss(anchor: Tensor, positive: Tensor, negative: Tensor, *,
                                      distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
                                      margin: float = 1.0, swap: bool = False, reduction: str = "mean") -> Tensor:
    """`triplet_margin_loss` with a distance of your own; `pairwise_distance`, unless given."""
    return _triplet_loss("triplet_margin_with_distance_loss", (anchor, positive, negative),
                         distance_function or pairwise_distance, margin, swap, reduction)


def _triplet_loss(op: str, points: tuple[Tensor, Tensor, Tensor], distance: Callable[[Tensor, Tensor], Tensor],
                  margin: Operand, swap: bool, reduction: str) -> Tensor:
    anchor, positive, negative = points
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = ops.minimum(far, distance(positive, negative))
    return _reduced(op, clamp_min(add(sub(near, far), margin), 0), reduction)


@casts(cpu="full", cuda="full")
def multilabel_soft_margin_loss(input: Tensor, target: Tensor, weight: Tensor | None = None,
                                reduction: str = "mean") -> Tensor:
    """Binary cross-entropy of logits [..., C], times `weight` [C], averaged over the classes."""
    loss = binary_cross_entropy_with_logits(input, target, weight, "none")
    return _reduced("multilabel_soft_margin_loss", mean(loss, -1), reduction)


@casts(cpu="full", cuda="full")
def multi_margin_loss(input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None,
                      reduction: str = "mean") -> Tensor:
    """``sum over j != target of max(0, margin - input[target] + input[j]) ** p / C`` of scores [N, C] (or [C]) and classes
    [N], times the `weight` [C] of the target."""
    if p not in (1, 2):
        raise unknown_choice("multi_margin_loss", "p", p, (1, 2))
    _check_classes("multi_margin_loss", input, target, len(input.shape) - 1)
    axis = len(input.shape) - 1
    classes = expand_dims(target, (axis,))
    beyond = clamp_min(add(sub(input, ops.gather(input, classes, axis=axis)), margin), 0)
    beyond = ops.mul(beyond, beyond) if p == 2 else beyond
    if weight is not None:
        beyond = mul(beyond, ops.take(weight, classes, axis=0))
    numbers = ops.iota(shape=tuple(input.shape), axis=axis, dtype=dtypes.int64)
    others = ops.ne(numbers, broadcast(cast(classes, dtypes.int64), input.shape))
    return _reduced("multi_margin_loss", mean(ops.where(others, beyond, zeros_like(beyond)), -1), reduction)
