"""Statistics over one dimension or two: quantiles, the commonest value, running extremes, covariances, histograms.

`dim` counts from either end; functions of one dimension that also say *where* return a named tuple ``(values,
indices)``. A running extreme takes one step for each doubling of what it has seen: log2(n) passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    as_operand,
    cast,
    describe,
    is_number,
    one_dim,
    read,
    require_floating,
    require_shape,
    size,
    unknown_choice,
    widened,
)
from jitgrad.functional.elementwise import clamp, div, logaddexp, mul, sub, where
from jitgrad.functional.linalg import matmul
from jitgrad.functional.logic import lt
from jitgrad.functional.reduce import Extremes, detached, mean, middle, picked_at, sum
from jitgrad.functional.shape import diagonal, ravel, section
from jitgrad.functional.sorting import searchsorted, sort
from jitgrad.ops.builders import broadcast, expand_dims, full, full_like, ones_like, zeros_like

__all__ = ["corrcoef", "cov", "cummax", "cummin", "histogram", "logcumsumexp", "mode", "msort", "nanmedian", "nanquantile",
           "quantile"]


# running

def running(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All elements up to and with each one along `axis`, put together by an associative function."""
    extent, step = x.shape[axis] if x.shape else 0, 1
    while step < extent:
        joined = combine(section(x, axis, 0, extent - step), section(x, axis, step, extent))
        x = ops.concat(section(x, axis, 0, step), joined, axis=axis)
        step *= 2
    return x


def cummax(input: Tensor, dim: int) -> Extremes:
    """``(values, indices)`` of the largest element up to each one along `dim`, of equals the last. NaN is the largest."""
    return _running_extreme("cummax", input, dim, ops.maximum)


def cummin(input: Tensor, dim: int) -> Extremes:
    """``(values, indices)`` of the smallest element up to each one along `dim`, of equals the last. NaN is the smallest."""
    return _running_extreme("cummin", input, dim, ops.minimum)


def _running_extreme(op: str, x: Tensor, dim: int, combine: Any) -> Extremes:
    axis = one_dim(op, dim, len(x.shape))
    if not x.shape or not size(x.shape):
        return Extremes(x, full(tuple(x.shape), 0, dtypes.int64))
    known = detached(x)
    extreme = running(known, axis, combine)
    holds = ops.eq(known, extreme)
    if x.dtype.category == "f":
        holds = ops.bitwise_or(holds, ops.isnan(known))
    place = ops.iota(shape=tuple(x.shape), axis=axis, dtype=dtypes.int64)
    indices = running(ops.where(holds, place, zeros_like(place)), axis, ops.maximum)
    return Extremes(ops.gather(x, indices, axis=axis), indices)


@widened
def logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """``log(cumsum(exp(input)))`` along `dim`, without overflow."""
    axis = one_dim("logcumsumexp", dim, len(input.shape))
    return running(require_floating("logcumsumexp", input), axis, logaddexp)


# in order

def msort(input: Tensor) -> Tensor:
    """The elements in order along the first dimension."""
    return sort(input, 0).values


_BETWEEN = ("linear", "lower", "higher", "midpoint", "nearest")


@casts(cpu="full")
def quantile(input: Tensor, q: Operand, dim: int | None = None, keepdim: bool = False, *,
             interpolation: str = "linear") -> Tensor:
    """The value below which the share `q` (0 … 1, a number or a 1-d tensor) of the elements lies: of all, or along `dim`.
    Between two elements `interpolation` decides: "linear", "lower", "higher", "midpoint" or "nearest". Several `q` come
    first in the result. NaN where there is a NaN."""
    return _quantile("quantile", input, q, dim, keepdim, interpolation)


@casts(cpu="full")
def nanquantile(input: Tensor, q: Operand, dim: int | None = None, keepdim: bool = False, *,
                interpolation: str = "linear") -> Tensor:
    """`quantile` of what is not NaN."""
    return _quantile("nanquantile", input, q, dim, keepdim, interpolation)


def _quantile(op: str, input: Tensor, q: Operand, dim: int | None, keepdim: bool, interpolation: str) -> Tensor:
    if interpolation not in _BETWEEN:
        raise unknown_choice(op, "interpolation", interpolation, _BETWEEN)
    lines, axis = _lines(op, input, dim)
    shares = _shares(op, q, input)
    ordered = ops.sort(lines, axis=len(lines.shape) - 1, descending=False, stable=True)[0]
    found = _between(ordered, _ranks(op, ordered, ravel(shares)), interpolation)
    found = ops.permute(found, axes=(len(found.shape) - 1, *range(len(found.shape) - 1)))
    kept = _kept_shape(tuple(input.shape), axis, keepdim)
    return ops.reshape(found, shape=(*shares.shape, *kept))


def _lines(op: str, input: Tensor, dim: int | None) -> tuple[Tensor, int | None]:
    """`input` with the dimension to go through as the last one, and which one that was (None: all as one)."""
    if input.dtype not in (dtypes.float32, dtypes.float64):
        raise complain(DTypeError, op, f"needs float32 or float64, got {describe(input)}", fix="Did you mean x.float()?")
    axis = None if dim is None else one_dim(op, dim, len(input.shape))
    if axis is None or not input.shape:
        lines = ravel(input)
    else:
        order = [d for d in range(len(input.shape)) if d != axis] + [axis]
        lines = ops.permute(input, axes=tuple(order))
    require_shape(op, lines.shape[-1] > 0, f"there is no quantile of nothing: {describe(input)}")
    return lines, axis


def _shares(op: str, q: Operand, input: Tensor) -> Tensor:
    if is_number(q):
        require_shape(op, 0 <= q <= 1, f"q must be in [0, 1], got {q}")
        return as_operand(float(q), input.dtype)
    require_shape(op, len(q.shape) <= 1, f"q must be a number or a 1-d tensor, got {describe(q)}")
    if q.dtype is not input.dtype:
        raise complain(DTypeError, op, f"q must have the dtype of the tensor: {describe(input)}, q {describe(q)}")
    return q


def _ranks(op: str, ordered: Tensor, shares: Tensor) -> Tensor:
    """Where the quantiles stand in each line, between which elements: a last dimension with one for each share."""
    last = len(ordered.shape) - 1
    counted = expand_dims(ops.sum(cast(ops.logical_not(ops.isnan(ordered)), dtypes.int64), axes=(last,)), (last,))
    if op == "nanquantile":
        return mul(cast(clamp(sub(counted, 1), 0, None), ordered.dtype), shares)
    places = mul(full((*counted.shape[:-1], 1), float(ordered.shape[-1] - 1), ordered.dtype), shares)
    return where(lt(counted, ordered.shape[-1]), full_like(places, ordered.shape[-1] - 1), places)   # NaNs stand last


def _between(ordered: Tensor, rank: Tensor, interpolation: str) -> Tensor:
    """The elements of each line at `rank`, which may lie between two."""
    if interpolation == "nearest":
        return _at(ordered, ops.round(rank))
    low, high = ops.floor(rank), ops.ceil(rank)
    if interpolation in ("lower", "higher"):
        return _at(ordered, low if interpolation == "lower" else high)
    weight = ops.sub(rank, low) if interpolation == "linear" else full_like(rank, 0.5)
    first, last = _at(ordered, low), _at(ordered, high)
    way, rest = ops.sub(last, first), ops.sub(ones_like(weight), weight)
    # from the nearer one: where only the other is infinite, that is the result, as in PyTorch
    return ops.where(ops.lt(weight, full_like(weight, 0.5)), ops.add(first, ops.mul(weight, way)),
                     ops.sub(last, ops.mul(way, rest)))


def _at(ordered: Tensor, rank: Tensor) -> Tensor:
    return ops.gather(ordered, cast(rank, dtypes.int64), axis=len(ordered.shape) - 1)


def _kept_shape(shape: tuple[int, ...], axis: int | None, keepdim: bool) -> tuple[int, ...]:
    if axis is None or not shape:
        return (1,) * len(shape) if keepdim else ()
    return (*shape[:axis], *((1,) if keepdim else ()), *shape[axis + 1:])


def nanmedian(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The middle one (of an even number the lower one) of what is not NaN: of all elements, or ``(values, indices)`` along
    `dim`. NaN where there is nothing else."""
    return middle("nanmedian", input, dim, keepdim)


def mode(input: Tensor, dim: int = -1, keepdim: bool = False) -> Extremes:
    """``(values, indices)`` of the commonest element along `dim`: of equally common ones the smallest, where it stands
    last."""
    axis = one_dim("mode", dim, len(input.shape))
    if not input.shape:
        return Extremes(input, full((), 0, dtypes.int64))
    extent = input.shape[axis]
    require_shape("mode", extent > 0, f"there is no commonest element of nothing: {describe(input)}")
    ordered, order = ops.sort(detached(input), axis=axis, descending=False, stable=True)
    place = ops.iota(shape=tuple(order.shape), axis=axis, dtype=dtypes.int64)
    begins = ops.concat(full(tuple(section(order, axis, 0, 1).shape), True, dtypes.bool_),
                        ops.ne(section(ordered, axis, 1, extent), section(ordered, axis, 0, extent - 1)), axis=axis)
    first = running(ops.where(begins, place, zeros_like(place)), axis, ops.maximum)
    longest = expand_dims(ops.argmax(ops.sub(place, first), axis=axis), (axis,))
    return picked_at(input, ops.gather(order, longest, axis=axis), axis, keepdim)


# of two variables

def cov(input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """The covariances of the rows of a matrix (of a vector its variance); columns are observations, which may be repeated
    (`fweights`, integers) or weighted (`aweights`). Divided by the number of observations less `correction`."""
    require_shape("cov", len(input.shape) <= 2, f"expected at most 2 dimensions, got {describe(input)}")
    x = as_float(input)
    rows = x if len(x.shape) == 2 else ops.reshape(x, shape=(1, size(x.shape)))
    weights = _observation_weights(rows, fweights, aweights)
    divisor: Operand = rows.shape[1] - correction
    if weights is None:
        centred = weighted = sub(rows, mean(rows, 1, True)) if rows.shape[1] else rows
        divisor = max(divisor, 0)
    else:
        total = sum(weights)
        centred = sub(rows, div(sum(mul(rows, weights), 1, True), total))
        weighted = mul(centred, weights)
        if aweights is None or not correction:
            taken_off: Operand = correction
        else:
            taken_off = mul(div(sum(mul(weights, aweights)), total), correction)
        divisor = clamp(sub(total, taken_off), 0, None)
    found = div(matmul(weighted, ops.permute(centred, axes=(1, 0))), divisor)
    return found if len(x.shape) == 2 else ops.reshape(found, shape=())


def _observation_weights(rows: Tensor, fweights: Tensor | None, aweights: Tensor | None) -> Tensor | None:
    given = [w for w in (fweights, aweights) if w is not None]
    for w in given:
        require_shape("cov", tuple(w.shape) == (rows.shape[1],),
                      f"expected a weight for each of the {rows.shape[1]} observations, got {describe(w)}")
    if fweights is not None and not fweights.dtype.is_integer:
        raise complain(DTypeError, "cov", f"fweights count repetitions, they must be integers, got {describe(fweights)}")
    product = mul(*given) if len(given) == 2 else given[0] if given else None
    return None if product is None else cast(product, rows.dtype)


def corrcoef(input: Tensor) -> Tensor:
    """The correlation coefficients of the rows of a matrix, whose columns are observations; between -1 and 1."""
    covariances = cov(input)
    if not covariances.shape:
        return div(covariances, covariances)
    deviation = ops.sqrt(diagonal(covariances))
    scaled = div(div(covariances, expand_dims(deviation, (1,))), expand_dims(deviation, (0,)))
    return clamp(scaled, -1, 1)


# histograms

class Histogram(NamedTuple):
    """How much fell into each interval, and the limits of the intervals, one more."""

    hist: Any
    bin_edges: Any


def histogram(input: Tensor, bins: int | Tensor, *, range: Sequence[float] | None = None, weight: Tensor | None = None,
              density: bool = False) -> Histogram:
    """``(hist, bin_edges)``: how many elements (or what sum of `weight`) fall into each interval, limits included on the
    left, and on the right too in the last. `bins` are the limits (ascending, 1-d), or how many equal ones there are in
    `range`; without one, the smallest and the largest element are the limits, and are read. With `density` the integral is
    1."""
    x = detached(require_floating("histogram", ravel(input)))
    edges = _equal_bins(x, bins, range) if isinstance(bins, int) else cast(bins, x.dtype)
    require_shape("histogram", len(edges.shape) == 1 and edges.shape[0] > 1, f"expected limits, got {describe(edges)}")
    count = edges.shape[0] - 1
    amounts = ones_like(x) if weight is None else cast(detached(ravel(weight)), x.dtype)
    require_shape("histogram", amounts.shape == x.shape, f"weight {describe(amounts)} must be as large as {describe(x)}")
    first, last = [broadcast(section(edges, 0, k, k + 1), x.shape) for k in (0, count)]
    inside = ops.bitwise_and(ops.ge(x, first), ops.le(x, last))
    place = clamp(sub(searchsorted(edges, x, right=True), 1), 0, count - 1)
    amounts = ops.where(inside, amounts, zeros_like(amounts))
    found = ops.index_add(full((count,), 0.0, x.dtype), place, amounts, axis=0)
    if density:
        found = div(found, mul(sum(found), sub(section(edges, 0, 1, count + 1), section(edges, 0, 0, count))))
    return Histogram(found, edges)


def _equal_bins(x: Tensor, bins: int, limits: Sequence[float] | None) -> Tensor:
    require_shape("histogram", bins > 0, f"bins must be positive, got {bins}")
    if limits is None and x.shape[0]:
        limits = [float(read(extreme(x, axes=(0,)))) for extreme in (ops.min, ops.max)]
    low, high = (0.0, 0.0) if limits is None else (float(v) for v in limits)
    require_shape("histogram", low <= high and math.isfinite(low) and math.isfinite(high), f"[{low}, {high}] is no range")
    if low == high:
        low, high = low - 0.5, high + 0.5
    steps = ops.iota(shape=(bins + 1,), axis=0, dtype=dtypes.float64)
    rising = ops.add(mul(steps, (high - low) / bins), full_like(steps, low))
    return cast(ops.where(ops.eq(steps, full_like(steps, bins)), full_like(steps, high), rising), x.dtype)
