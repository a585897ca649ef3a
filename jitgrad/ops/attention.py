"""Attention without its matrix of scores: softmax(q k^T + mask) v, block by block.

Operands: q[N, L, E], k[G, S, E], v[G, S, V] and, at will, mask[M, L or 1, S], which is added to the scores; N is a multiple
of G (every head of k and v serves N / G heads of q) and of M. q comes scaled. With `causal` position i of q sees 0 … i
of k. A query that sees nothing gives NaN, as the softmax of nothing does, or zeros with `zero`.

The second result is the logarithm of each softmax's denominator, [N, L]: with it the gradient makes the weights again
instead of keeping them (Dao et al., "FlashAttention", 2022). That result and `out` are no variables of the gradient, so
gradients of higher order are those of the composition in primitives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import int64
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.graph import Graph, GraphBuilder
from jitgrad.ir.op import Op, register
from jitgrad.ir.replay import replay
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import broadcast, full
from jitgrad.ops.gradient import continue_graph, reverse
from jitgrad.ops.record import in_float32, require_category

__all__ = ["attention", "attention_grad"]

ROWS = 512                              # queries at a time in NumPy


def _check(name: str, xs: tuple[TensorType, ...]) -> tuple[int, int, int, int]:
    """(N, L, E, V) of q, k, v and perhaps a mask."""
    shown = ", ".join(map(str, xs))
    if len(xs) not in (3, 4):
        raise complain(ShapeError, name, f"takes q, k, v and perhaps a mask, got {shown}")
    if any(x.dtype is not xs[0].dtype for x in xs):
        raise complain(DTypeError, name, f"operands differ in dtype: {shown}")
    require_category(name, xs[0].dtype, "f")
    q, k, v, *mask = [x.shape for x in xs]
    fits = len(q) == len(k) == len(v) == 3 and q[2] == k[2] and k[:2] == v[:2] and (q[0] % k[0] == 0 if k[0] else not q[0])
    if not fits:
        raise complain(ShapeError, name, f"needs q[N, L, E], k[G, S, E], v[G, S, V] with N a multiple of G: {shown}")
    for shape in mask:
        if len(shape) != 3 or not shape[0] or q[0] % shape[0] or shape[1] not in (1, q[1]) or shape[2] != k[1]:
            raise complain(ShapeError, name, f"the mask is [M, {q[1]} or 1, {k[1]}], {q[0]} a multiple of M: {shown}")
    return q[0], q[1], q[2], v[2]


def _infer(*xs: TensorType, causal: bool, zero: bool) -> tuple[TensorType, ...]:
    if causal and len(xs) == 4:
        raise complain(ShapeError, "attention", "takes a mask or is causal, not both")
    n, queries, _, values = _check("attention", xs)
    return xs[0].with_shape((n, queries, values)), xs[0].with_shape((n, queries))


def _infer_grad(*xs: TensorType, causal: bool, zero: bool) -> tuple[TensorType, ...]:
    if len(xs) < 6:
        raise complain(ShapeError, "attention_grad", "takes g, the operands of attention, and its two results")
    n, queries, _, values = _check("attention_grad", xs[1:-2])
    if (xs[0].shape, xs[-2].shape, xs[-1].shape) != ((n, queries, values), (n, queries, values), (n, queries)):
        raise complain(ShapeError, "attention_grad", f"gradient and results do not fit: {xs[0]}, {xs[-2]}, {xs[-1]}")
    return xs[1], xs[2], xs[3]


def _blocks(q: np.ndarray, k: np.ndarray, mask: np.ndarray | None,
            causal: bool) -> Iterator[tuple[int, int, slice, np.ndarray]]:
    """(n, group, queries, scores) for some queries at a time."""
    count, keys = q.shape[1], k.shape[1]
    for n in range(q.shape[0]):
        group = n * k.shape[0] // q.shape[0]
        for first in range(0, count, ROWS):
            rows = slice(first, min(first + ROWS, count))
            scores = q[n, rows] @ k[group].T
            if mask is not None:
                own = mask[n * mask.shape[0] // q.shape[0]]
                scores = scores + (own if len(own) == 1 else own[rows])
            if causal:
                seen = np.arange(first, rows.stop)[:, None] >= np.arange(keys)
                scores = np.where(seen, scores, scores.dtype.type(-np.inf))
            yield n, group, rows, scores


@in_float32
def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, *, causal: bool,
               zero: bool) -> tuple[np.ndarray, ...]:
    out, total = np.empty((*q.shape[:2], v.shape[2]), q.dtype), np.empty(q.shape[:2], q.dtype)
    for n, group, rows, scores in _blocks(q, k, mask, causal):
        top = scores.max(1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(top > -np.inf, top, 0))
        sums = weights.sum(1, keepdims=True)
        out[n, rows] = weights @ v[group] / (np.where(sums > 0, sums, 1) if zero else sums)
        total[n, rows] = (np.log(sums) + top)[:, 0]
    return out, total


@in_float32
def _attention_grad(g: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: np.ndarray, causal: bool,
                    zero: bool) -> tuple[np.ndarray, ...]:
    *mask, out, total = rest
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for n, group, rows, scores in _blocks(q, k, mask[0] if mask else None, causal):
        shift = total[n, rows, None]
        weights = np.exp(scores - np.where(shift > -np.inf, shift, 0))
        if not zero:
            weights = np.where(shift > -np.inf, weights, scores.dtype.type(np.nan))
        slopes = weights * (g[n, rows] @ v[group].T - (g[n, rows] * out[n, rows]).sum(1, keepdims=True))
        dq[n, rows] = slopes @ k[group]
        dk[group] += slopes.T @ q[n, rows]
        dv[group] += weights.T @ g[n, rows]
    return dq, dk, dv


def _composed(causal: bool, zero: bool, q: Any, k: Any, v: Any, *mask: Any) -> Any:
    """The same in primitives."""
    n, queries, _ = q.shape
    k, v = _repeated(k, n), _repeated(v, n)
    scores = ops.matmul(q, ops.permute(k, axes=(0, 2, 1)))
    shape = tuple(scores.shape)
    for m in mask:
        rows = broadcast(ops.reshape(m, shape=(m.shape[0], 1, *m.shape[1:])), (m.shape[0], n // m.shape[0], *shape[1:]))
        scores = ops.add(scores, ops.reshape(rows, shape=shape))
    if causal:
        row, column = [ops.iota(shape=shape, axis=axis, dtype=int64) for axis in (1, 2)]
        scores = ops.where(ops.ge(row, column), scores, full(shape, -math.inf, scores.dtype))
    top = ops.max(scores, axes=(2,))
    top = ops.where(ops.isfinite(top), top, ops.zeros_like(top))
    weights = ops.exp(ops.sub(scores, broadcast(ops.reshape(top, shape=(n, queries, 1)), shape)))
    sums = ops.sum(weights, axes=(2,))
    if zero:
        sums = ops.where(ops.gt(sums, ops.zeros_like(sums)), sums, ops.ones_like(sums))
    out = ops.matmul(weights, v)
    return ops.div(out, broadcast(ops.reshape(sums, shape=(n, queries, 1)), tuple(out.shape)))


def _repeated(x: Any, n: int) -> Any:
    """Each head as often as it is used."""
    groups, *rest = x.shape
    if groups == n:
        return x
    wide = broadcast(ops.reshape(x, shape=(groups, 1, *rest)), (groups, n // groups, *rest))
    return ops.reshape(wide, shape=(n, *rest))


@lru_cache(maxsize=64)
def _second_order(causal: bool, zero: bool, types: tuple[TensorType, ...]) -> Graph:
    """g, q, k, v and perhaps a mask, then a gradient for each result of the gradient -> a gradient for g, q, k, v."""
    builder = GraphBuilder("attention_grad")
    g, *xs = [builder.input(t) for t in types]
    with builder:
        out = _composed(causal, zero, *xs)
    forward = builder.build([out])
    builder = continue_graph(forward)
    with builder:
        found = reverse(forward.nodes, {out: g}, xs[:3])
        first = [found[x] for x in xs[:3]]
    backward = builder.build(first)
    builder = continue_graph(backward)
    with builder:
        gs = [builder.input(v.type) for v in backward.outputs]
        wanted = [g, *xs[:3]]
        second = reverse(backward.nodes, dict(zip(backward.outputs, gs)), wanted)
        return builder.build([second.get(v, ops.zeros_like(v)) for v in wanted])


def _rule(gs: Any, xs: Any, outs: Any, causal: bool, zero: bool) -> tuple[Any, ...]:
    found = ops.attention_grad(gs[0], *xs, *outs, causal=causal, zero=zero)
    return (*found, *[None] * (len(xs) - 3))


def _rule_of_gradient(gs: Any, xs: Any, xs_types: Any, causal: bool, zero: bool) -> tuple[Any, ...]:
    graph = _second_order(causal, zero, tuple(xs_types[:-2]))
    return (*replay(graph, [*xs[:-2], *gs]), *[None] * (len(xs) - 4))


attention: Op = register(Op(
    "attention", ("xs",), _infer, _attention, "contraction", vjp=_rule, variadic=True, outputs=2,
    doc="q, k, v and perhaps a mask -> softmax(q k^T + mask) v, and the logarithm of the softmax's denominators."))
attention_grad: Op = register(Op(
    "attention_grad", ("xs",), _infer_grad, _attention_grad, "contraction", vjp=_rule_of_gradient, variadic=True, outputs=3,
    doc="g, operands and results of attention -> gradients of q, k and v."))
