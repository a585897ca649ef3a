"""Reductions and scans: sums, extremes, moments, norms, cumulative sums, with PyTorch's names and meaning.

`dim` is one dimension, several, or None for all; `keepdim` leaves size 1 in place of what was reduced. Functions of one
dimension that also say *where* (max, min, median, …) return a named tuple ``(values, indices)``.
"""

from __future__ import annotations

import builtins
import math
from typing import Any, NamedTuple

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Dims,
    Operand,
    Tensor,
    as_float,
    cast,
    describe,
    many_dims,
    matched,
    one_dim,
    require_floating,
    require_shape,
    size,
    widened,
)
from jitgrad.functional.elementwise import maximum, minimum
from jitgrad.functional.logic import isclose
from jitgrad.ir.op import Op
from jitgrad.ops.builders import broadcast, expand_dims, full, full_like, ones_like, zeros_like

__all__ = [
    "all", "allclose", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "cumprod",
    "cumsum", "diff", "dist", "equal", "kthvalue", "logsumexp", "max", "mean", "median", "min", "nanmean",
    "nansum", "norm", "prod", "std", "std_mean", "sum", "trace", "var", "var_mean",
]


class Extremes(NamedTuple):
    """Values along one dimension, and where they stand in it (int64)."""

    values: Any
    indices: Any


def _finish(result: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return expand_dims(result, axes) if keepdim and axes else result


# sums and moments

@casts(cuda="total")
def sum(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    """The sum over `dim`. Integers and bools are added in int64."""
    axes = many_dims("sum", dim, len(input.shape))
    return _finish(ops.sum(_accumulated(input, dtype), axes=axes), axes, keepdim)


def _accumulated(x: Tensor, dtype: DType | None) -> Tensor:
    if dtype is not None:
        return cast(x, dtype)
    return x if x.dtype.category in "fc" else cast(x, dtypes.int64)


def nansum(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    """The sum over `dim`, with NaN counted as 0."""
    if input.dtype.category == "f":
        input = ops.where(ops.isnan(input), zeros_like(input), input)
    return sum(input, dim, keepdim, dtype=dtype)


@casts(cpu="full", cuda="total")
def prod(input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    """The product over `dim`. Integers and bools are multiplied in int64."""
    axes = many_dims("prod", dim, len(input.shape))
    return _finish(ops.prod(_accumulated(input, dtype), axes=axes), axes, keepdim)


def mean(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    """The mean over `dim`, of floating-point tensors. The mean of nothing is NaN."""
    input = require_floating("mean", input if dtype is None else cast(input, dtype))
    axes = many_dims("mean", dim, len(input.shape))
    return _finish(_mean(input, axes), axes, keepdim)


@widened
def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    total = ops.sum(x, axes=axes)
    return ops.div(total, full(total.shape, float(_count(x, axes)), x.dtype))


def nanmean(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The mean over `dim` of what is not NaN."""
    present = cast(ops.logical_not(ops.isnan(input)), input.dtype)
    return ops.div(nansum(input, dim, keepdim), sum(present, dim, keepdim))


def _count(x: Tensor, axes: tuple[int, ...]) -> int:
    return size([x.shape[a] for a in axes])


def var(input: Tensor, dim: Dims = None, unbiased: bool = True, keepdim: bool = False, *,
        correction: float | None = None) -> Tensor:
    """The variance over `dim`: squared distances from the mean, divided by ``n - correction`` (by default 1, or 0 with
    ``unbiased=False``). Two passes, so a large mean costs no accuracy."""
    return var_mean(input, dim, unbiased, keepdim, correction=correction)[0]


def std(input: Tensor, dim: Dims = None, unbiased: bool = True, keepdim: bool = False, *,
        correction: float | None = None) -> Tensor:
    """The square root of `var`; its gradient is 0 where the deviation is."""
    return safe_sqrt(var(input, dim, unbiased, keepdim, correction=correction))


def var_mean(input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *,
             correction: float | None = None) -> tuple[Tensor, Tensor]:
    """`var` and `mean`."""
    if isinstance(dim, bool):                          # var(x, unbiased), as PyTorch has it
        dim, unbiased = None, dim
    require_floating("var", input)
    axes = many_dims("var", dim, len(input.shape))
    taken_off = (1 if unbiased else 0) if correction is None else correction
    average = expand_dims(_mean(input, axes), axes)
    spread = _spread(input, average, axes, taken_off)
    if not keepdim:
        average = ops.reshape(average, shape=spread.shape)
    return _finish(spread, axes, keepdim), average


@widened
def _spread(x: Tensor, average: Tensor, axes: tuple[int, ...], correction: float) -> Tensor:
    distance = ops.sub(*matched("var", x, average))
    total = ops.sum(ops.mul(distance, distance), axes=axes)
    left = _count(x, axes) - correction
    return ops.div(total, full(total.shape, float(left if left > 0 else 0), x.dtype))


def std_mean(input: Tensor, dim: Dims = None, unbiased: bool = True, keepdim: bool = False, *,
             correction: float | None = None) -> tuple[Tensor, Tensor]:
    """`std` and `mean`."""
    spread, average = var_mean(input, dim, unbiased, keepdim, correction=correction)
    return safe_sqrt(spread), average


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with gradient 0 (not infinity) at 0."""
    zero = ops.eq(x, zeros_like(x))
    return ops.where(zero, x, ops.sqrt(ops.where(zero, ones_like(x), x)))


# extremes

def amax(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The largest value over `dim`; its gradient is shared evenly among ties."""
    axes = many_dims("amax", dim, len(input.shape))
    return _finish(ops.max(_nonempty("amax", input, axes), axes=axes), axes, keepdim)


def amin(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The smallest value over `dim`; its gradient is shared evenly among ties."""
    axes = many_dims("amin", dim, len(input.shape))
    return _finish(ops.min(_nonempty("amin", input, axes), axes=axes), axes, keepdim)


def aminmax(input: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """`amin` and `amax`."""
    return amin(input, dim, keepdim), amax(input, dim, keepdim)


def _nonempty(op: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    require_shape(op, _count(x, axes) > 0, f"there is no extreme over nothing: {describe(x)}, dim={axes}")
    return x


def max(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Without `dim` the largest element; with a dimension ``(values, indices)`` along it (the first of equals); with a
    second tensor `maximum`. NaN is larger than everything."""
    return _extreme("max", ops.argmax, amax, maximum, input, dim, keepdim)


def min(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Without `dim` the smallest element; with a dimension ``(values, indices)`` along it (the first of equals); with a
    second tensor `minimum`. NaN is smaller than everything."""
    return _extreme("min", ops.argmin, amin, minimum, input, dim, keepdim)


def _extreme(name: str, where: Op, over_all: Any, pairwise: Any, x: Tensor, dim: Any, keepdim: bool) -> Any:
    if dim is None:
        return over_all(x)
    if hasattr(dim, "shape"):
        return pairwise(x, dim)
    axis = one_dim(name, dim, len(x.shape))
    if not x.shape:
        return Extremes(x, full((), 0, dtypes.int64))
    indices = where(_nonempty(name, x, (axis,)), axis=axis)
    return _picked(x, indices, axis, keepdim)


def _picked(x: Tensor, indices: Tensor, axis: int, keepdim: bool) -> Extremes:
    """The elements of `x` at `indices` along `axis`: the gradient goes to them alone."""
    kept = expand_dims(indices, (axis,))
    values = ops.gather(x, kept, axis=axis)
    if keepdim:
        return Extremes(values, kept)
    return Extremes(ops.reshape(values, shape=indices.shape), indices)


def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the largest element stands (int64, the first of equals): in the flattened tensor, or along `dim`."""
    return _argument("argmax", ops.argmax, input, dim, keepdim)


def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the smallest element stands (int64, the first of equals): in the flattened tensor, or along `dim`."""
    return _argument("argmin", ops.argmin, input, dim, keepdim)


def _argument(name: str, op: Op, x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    ndim = len(x.shape)
    if dim is None or ndim == 0:
        flat = ops.reshape(_nonempty(name, x, tuple(range(ndim))), shape=(size(x.shape),))
        return _finish(op(flat, axis=0), tuple(range(ndim)), keepdim)
    axis = one_dim(name, dim, ndim)
    return _finish(op(_nonempty(name, x, (axis,)), axis=axis), (axis,), keepdim)


def median(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The middle element (of an even number the lower one): of all elements, or ``(values, indices)`` along `dim`. NaN, and
    where the first one stands, if there is one. The gradient of the median of all goes evenly to all that equal it."""
    return middle("median", input, dim, keepdim)


def middle(name: str, input: Tensor, dim: int | None, keepdim: bool) -> Any:
    """`median`, or by name `nanmedian`."""
    if dim is None:
        x = ops.reshape(input, shape=(size(input.shape),))
        return _shared(x, _middle(name, _nonempty(name, x, (0,)), 0, False).values)
    return _middle(name, input, one_dim(name, dim, len(input.shape)), keepdim)


def _middle(name: str, x: Tensor, axis: int, keepdim: bool) -> Extremes:
    if not x.shape:
        return Extremes(x, full((), 0, dtypes.int64))
    _nonempty(name, x, (axis,))
    if x.dtype.category != "f":
        return kthvalue(x, (x.shape[axis] + 1) // 2, axis, keepdim)
    order = ops.sort(detached(x), axis=axis, descending=False, stable=True)[1]               # NaNs stand last
    count = expand_dims(ops.sum(ops.cast(ops.logical_not(ops.isnan(x)), dtype=dtypes.int64), axes=(axis,)), (axis,))
    if name == "nanmedian":
        below = ops.maximum(ops.sub(count, ones_like(count)), zeros_like(count))
        rank = ops.floor_divide(below, full_like(count, 2))
    else:
        extent = x.shape[axis]
        rank = ops.where(ops.lt(count, full_like(count, extent)), count, full_like(count, (extent - 1) // 2))
    return picked_at(x, ops.gather(order, rank, axis=axis), axis, keepdim)


def picked_at(x: Tensor, kept: Tensor, axis: int, keepdim: bool) -> Extremes:
    """The elements of `x` at `kept`, which has size 1 along `axis`."""
    values = ops.gather(x, kept, axis=axis)
    if keepdim:
        return Extremes(values, kept)
    shape = tuple(x.shape[:axis]) + tuple(x.shape[axis + 1:])
    return Extremes(ops.reshape(values, shape=shape), ops.reshape(kept, shape=shape))


def _shared(x: Tensor, value: Tensor) -> Tensor:
    """`value`, an element of the vector `x`, with a gradient that goes evenly to all elements that equal it. (NaN: to one
    of them; -inf: less than all of it.)"""
    if x.dtype.category != "f":
        return value
    equals = ops.eq(x, broadcast(value, x.shape))
    largest = ops.max(ops.where(equals, x, full_like(x, -math.inf)), axes=(0,))
    return ops.where(ops.isnan(value), value, largest)


def kthvalue(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Extremes:
    """The `k`-th smallest (counted from 1) along `dim`, as ``(values, indices)``."""
    axis = one_dim("kthvalue", dim, len(input.shape))
    require_shape("kthvalue", 1 <= k <= input.shape[axis], f"k={k} is not in [1, {input.shape[axis]}]")
    _, order = ops.sort(input, axis=axis, descending=False, stable=True)
    start = tuple([k - 1 if d == axis else 0 for d in range(len(input.shape))])
    stop = tuple([k if d == axis else n for d, n in enumerate(order.shape)])
    one = ops.slice(order, start=start, stop=stop, step=(1,) * len(start))
    shape = tuple([n for d, n in enumerate(input.shape) if d != axis])
    return _picked(input, ops.reshape(one, shape=shape), axis, keepdim)


# logic and counts

def any(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """Whether any element over `dim` is nonzero; False for none."""
    return _logical("any", ops.max, False, input, dim, keepdim)


def all(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """Whether all elements over `dim` are nonzero; True for none."""
    return _logical("all", ops.min, True, input, dim, keepdim)


def _logical(name: str, op: Op, of_nothing: bool, x: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    axes = many_dims(name, dim, len(x.shape))
    if _count(x, axes) == 0:
        left = tuple([n for d, n in enumerate(x.shape) if d not in axes])
        return _finish(full(left, of_nothing, dtypes.bool_), axes, keepdim)
    return _finish(op(cast(x, dtypes.bool_), axes=axes), axes, keepdim)


def count_nonzero(input: Tensor, dim: Dims = None) -> Tensor:
    """How many elements over `dim` are not zero (int64)."""
    return sum(cast(input, dtypes.bool_), dim)


# norms

@casts(cuda="total")
def norm(input: Tensor, p: float | str | None = 2, dim: Dims = None, keepdim: bool = False, *,
         dtype: DType | None = None) -> Tensor:
    """The `p`-norm over `dim`: any real p, inf, -inf or 0 (the number of nonzeros); "fro" is 2. Its gradient is 0 at
    0."""
    x = require_floating("norm", input if dtype is None else cast(input, dtype))
    order = 2.0 if p is None or p == "fro" else float(p)
    return _norm(x, order, dim, keepdim)


@widened
def _norm(x: Tensor, p: float, dim: Dims, keepdim: bool) -> Tensor:
    magnitude = ops.abs(x)
    if p == math.inf:
        return amax(magnitude, dim, keepdim)
    if p == -math.inf:
        return amin(magnitude, dim, keepdim)
    if p == 0:
        return sum(cast(ops.ne(x, zeros_like(x)), x.dtype), dim, keepdim)
    if p == 1:
        return sum(magnitude, dim, keepdim)
    if p == 2:
        return safe_sqrt(sum(ops.mul(x, x), dim, keepdim))
    return _general_norm(magnitude, p, dim, keepdim)


def _general_norm(magnitude: Tensor, p: float, dim: Dims, keepdim: bool) -> Tensor:
    zero = zeros_like(magnitude)
    safe = ops.where(ops.eq(magnitude, zero), ones_like(magnitude), magnitude)
    powers = ops.pow(safe, full(safe.shape, p, safe.dtype))
    at_zero = zero if p > 0 else full(zero.shape, math.inf, zero.dtype)
    total = sum(ops.where(ops.eq(magnitude, zero), at_zero, powers), dim, keepdim)
    empty = ops.eq(total, zeros_like(total))
    root = ops.pow(ops.where(empty, ones_like(total), total), full(total.shape, 1.0 / p, total.dtype))
    return ops.where(empty, total, root)


vector_norm = norm


@casts(cuda="full")
def logsumexp(input: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """``log(sum(exp(input)))`` over `dim`, without overflow."""
    axes = many_dims("logsumexp", dim, len(input.shape))
    x = as_float(input)
    return _finish(_logsumexp(x, axes), axes, keepdim)


@widened
def _logsumexp(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    if _count(x, axes) == 0:
        return ops.log(ops.sum(x, axes=axes))
    largest = ops.max(x, axes=axes)
    shift = detached(ops.where(ops.isinf(largest), zeros_like(largest), largest))
    scaled = ops.exp(ops.sub(*matched("logsumexp", x, expand_dims(shift, axes))))
    return ops.add(ops.log(ops.sum(scaled, axes=axes)), shift)


def detached(x: Tensor) -> Tensor:
    """`x` without its history, where it has one. The shift of a softmax needs no gradient: it cancels."""
    detach = getattr(x, "detach", None)
    return x if detach is None else detach()


# scans

@casts(cuda="total")
def cumsum(input: Tensor, dim: int, *, dtype: DType | None = None) -> Tensor:
    """Running sums along `dim`. Integers and bools are added in int64."""
    return _scan("cumsum", ops.cumsum, input, dim, dtype)


@casts(cuda="total")
def cumprod(input: Tensor, dim: int, *, dtype: DType | None = None) -> Tensor:
    """Running products along `dim`. Integers and bools are multiplied in int64."""
    return _scan("cumprod", ops.cumprod, input, dim, dtype)


def _scan(name: str, op: Op, input: Tensor, dim: int, dtype: DType | None) -> Tensor:
    axis = one_dim(name, dim, len(input.shape))
    x = _accumulated(input, dtype)
    return op(x, axis=axis) if x.shape else x


def diff(input: Tensor, n: int = 1, dim: int = -1) -> Tensor:
    """Differences of neighbours along `dim`, taken `n` times."""
    axis = one_dim("diff", dim, len(input.shape))
    for _ in builtins.range(n):
        length = input.shape[axis]
        low = _part(input, axis, 0, builtins.max(length - 1, 0))
        high = _part(input, axis, builtins.min(1, length), length)
        input = ops.bitwise_xor(high, low) if input.dtype is dtypes.bool_ else ops.sub(high, low)
    return input


def _part(x: Tensor, axis: int, begin: int, end: int) -> Tensor:
    start = tuple([begin if d == axis else 0 for d in builtins.range(len(x.shape))])
    stop = tuple([end if d == axis else n for d, n in enumerate(x.shape)])
    return ops.slice(x, start=start, stop=stop, step=(1,) * len(start))


@casts(cpu="full")
def trace(input: Tensor) -> Tensor:
    """The sum of the diagonal of a matrix."""
    require_shape("trace", len(input.shape) == 2, f"expected a matrix, got {describe(input)}")
    rows, columns = input.shape
    diagonal = ops.eq(ops.iota(shape=(rows, columns), axis=0, dtype=dtypes.int64),
                      ops.iota(shape=(rows, columns), axis=1, dtype=dtypes.int64))
    return sum(ops.where(diagonal, input, zeros_like(input)))


@casts(cuda="full")
def dist(input: Operand, other: Operand, p: float = 2) -> Tensor:
    """The `p`-norm of ``input - other``."""
    return norm(ops.sub(*matched("dist", input, other, to_float=True)), p)


def equal(input: Tensor, other: Tensor) -> bool:
    """Whether both have the same shape and elements. Reads the value."""
    if tuple(input.shape) != tuple(other.shape):
        return False
    return bool(all(ops.eq(*matched("equal", input, other))))


def allclose(input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Whether `isclose` holds everywhere. Reads the value."""
    if input.dtype is not other.dtype:
        raise complain(DTypeError, "allclose", f"operands differ in dtype: {describe(input)} and {describe(other)}")
    return bool(all(isclose(input, other, rtol, atol, equal_nan)))
