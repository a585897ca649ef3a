"""Attention without its matrix of scores: softmax(q k^T + mask) v, block by block.

Operands: q[N, L, E], k[G, S, E], v[G, S, V] and, at will, a mask that is added to the scores; N is a multiple of G (every
head of k and v serves N / G heads of q). A mask[M, L or 1, S] serves N / M heads in a row with each of its matrices, a
mask[M, R, L or 1, S] every R-th of such a run. q comes scaled. With `causal` position i of q sees 0 … i
of k. Where the mask is -inf a score is -inf, whatever it was. A query that sees nothing gives NaN, as the softmax of
nothing does, or zeros with `zero`.

Dropout of the weights has four operands more, all 0-d: key and offset of the random draw (int64), the probability p
(float32), and the scale of what is kept, in the dtype of sums: q's, float32 for 16-bit floats. Its random bits are those of
`random_bits` of shape [N, L, S], of which only a block is made at a time: a weight is dropped or kept by its position alone.

The second result is the logarithm of each softmax's denominator, [N, L], in the dtype of sums: with it the gradient makes
the weights again instead of keeping them (Dao et al., "FlashAttention", 2022). That result and `out` are no variables of the
gradient, so gradients of higher order are those of the composition in primitives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType, float32, int64, uint32
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.ir.op import Op, register
from jitgrad.ir.replay import replay
from jitgrad.ir.strides import Heads, follow, heads_through
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import broadcast, full
from jitgrad.ops.gradient import continue_graph, reverse
from jitgrad.ops.philox import philox_run
from jitgrad.ops.record import NARROW, in_float32, require_category

__all__ = ["attention", "attention_grad"]

ROWS = 512                              # queries at a time in NumPy
DRAW = 4                                # operands of dropout


def operands(xs: Sequence[Any]) -> tuple[Any, Any, Any, Any, tuple[Any, ...]]:
    """q, k, v, mask or None, and dropout's key, offset, p and scale, or nothing."""
    behind = tuple(xs[3:])
    draw = behind[-DRAW:] if len(behind) >= DRAW else ()
    return xs[0], xs[1], xs[2], behind[0] if len(behind) % DRAW else None, draw


def sum_dtype(dtype: DType) -> DType:
    """What sums of values of `dtype` are computed in."""
    return float32 if dtype.itemsize == 2 else dtype


def _check(name: str, xs: tuple[TensorType, ...]) -> tuple[int, int, int, int]:
    """(N, L, E, V) of q, k, v, perhaps a mask, and perhaps a draw."""
    shown = ", ".join(map(str, xs))
    if len(xs) not in (3, 4, 3 + DRAW, 4 + DRAW):
        raise complain(ShapeError, name, f"takes q, k, v, perhaps a mask, perhaps the four of dropout, got {shown}")
    *_, draw = operands(xs)
    given = xs[:-DRAW] if draw else xs
    if any(x.dtype is not xs[0].dtype for x in given):
        raise complain(DTypeError, name, f"operands differ in dtype: {shown}")
    if draw and list(draw) != [TensorType(dtype, ()) for dtype in (int64, int64, float32, sum_dtype(xs[0].dtype))]:
        raise complain(DTypeError, name, f"dropout takes key i64[], offset i64[], p f32[] and a scale: {shown}")
    require_category(name, xs[0].dtype, "f")
    q, k, v, *mask = [x.shape for x in given]
    fits = len(q) == len(k) == len(v) == 3 and q[2] == k[2] and k[:2] == v[:2] and (q[0] % k[0] == 0 if k[0] else not q[0])
    if not fits:
        raise complain(ShapeError, name, f"needs q[N, L, E], k[G, S, E], v[G, S, V] with N a multiple of G: {shown}")
    for shape in mask:
        matrices = math.prod(shape[:-2])
        if len(shape) not in (3, 4) or not matrices or q[0] % matrices or shape[-2] not in (1, q[1]) or shape[-1] != k[1]:
            raise complain(ShapeError, name, f"the mask is [M, {q[1]} or 1, {k[1]}] or [M, R, …], {q[0]} a multiple of M "
                                             f"and M * R: {shown}")
    return q[0], q[1], q[2], v[2]


def mask_by_head(mask: Any, batch: tuple[int, ...], keys: int) -> Any:
    """A mask that broadcasts to scores [*batch, L, S], of as many dimensions, as the operand: nothing is repeated that
    the primitive can repeat itself, which is what lies in between dimensions of the mask, before or behind them."""
    own, rows, count = tuple(mask.shape[:-2]), mask.shape[-2], len(batch)
    apart = [k for k in range(count) if own[k] != batch[k]]                          # there it is repeated
    first, past = (apart[0], apart[-1] + 1) if apart else (count, count)
    if any(size > 1 for size in own[first:past]):
        first = past = max(k + 1 for k, size in enumerate(own) if size > 1)
    wanted = (*batch[:first], *own[first:past], *(batch if past > first else own)[past:], rows, keys)
    runs, period = math.prod(wanted[:first]), math.prod(wanted[first:-2])
    return ops.reshape(broadcast(mask, wanted), shape=(runs, *([period] if period > 1 else []), rows, keys))


def mask_runs(shape: tuple[int, ...]) -> tuple[int, int]:
    """M and R of a mask."""
    return shape[0], shape[1] if len(shape) == 4 else 1


def _infer(*xs: TensorType, causal: bool, zero: bool) -> tuple[TensorType, ...]:
    n, queries, _, values = _check("attention", xs)
    return xs[0].with_shape((n, queries, values)), TensorType(sum_dtype(xs[0].dtype), (n, queries))


def _infer_grad(*xs: TensorType, causal: bool, zero: bool) -> tuple[TensorType, ...]:
    if len(xs) < 6:
        raise complain(ShapeError, "attention_grad", "takes g, the operands of attention, and its two results")
    n, queries, _, values = _check("attention_grad", xs[1:-2])
    if xs[-1].dtype is not sum_dtype(xs[1].dtype) or any(x.dtype is not xs[1].dtype for x in (xs[0], xs[-2])):
        raise complain(DTypeError, "attention_grad", f"gradient and results do not fit: {xs[0]}, {xs[-2]}, {xs[-1]}")
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
                runs, period = mask_runs(mask.shape)
                own = mask.reshape(-1, *mask.shape[-2:])[n * runs // q.shape[0] * period + n % period]
                own = own if len(own) == 1 else own[rows]
                scores = np.where(own > -np.inf, scores + own, own)
            if causal:
                seen = np.arange(first, rows.stop)[:, None] >= np.arange(keys)
                scores = np.where(seen, scores, scores.dtype.type(-np.inf))
            yield n, group, rows, scores


def _drop(x: np.ndarray, draw: tuple[Any, ...], n: int, rows: slice, shape: tuple[int, ...]) -> np.ndarray:
    """`x`, of the scores of those queries of head n, times 0 or the scale of dropout."""
    if not draw:
        return x
    key, offset, p, scale = draw
    _, queries, keys = shape
    count = (rows.stop - rows.start) * keys
    bits = philox_run(int(key), int(offset), (n * queries + rows.start) * keys, count).reshape(x.shape)
    unit = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0 ** -24)
    product: np.ndarray = x * np.where(unit >= p, scale, scale.dtype.type(0))
    return product


def _attention(q: np.ndarray, *xs: np.ndarray, causal: bool, zero: bool) -> tuple[np.ndarray, ...]:
    out, total = _attention_in_float32(q, *xs, causal=causal, zero=zero)
    return out.astype(q.dtype, copy=False), total


def _attention_in_float32(*xs: np.ndarray, causal: bool, zero: bool) -> tuple[np.ndarray, ...]:
    xs = tuple([x.astype(np.float32) if x.dtype in NARROW else x for x in xs])
    q, k, v, mask, draw = operands(xs)
    shape = (*q.shape[:2], k.shape[1])
    out, total = np.empty((*q.shape[:2], v.shape[2]), q.dtype), np.empty(q.shape[:2], q.dtype)
    for n, group, rows, scores in _blocks(q, k, mask, causal):
        top = scores.max(1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(top > -np.inf, top, 0))
        sums = weights.sum(1, keepdims=True)
        out[n, rows] = _drop(weights, draw, n, rows, shape) @ v[group] / (np.where(sums > 0, sums, 1) if zero else sums)
        total[n, rows] = (np.log(sums) + top)[:, 0]
    return out, total


@in_float32
def _attention_grad(g: np.ndarray, *xs: np.ndarray, causal: bool, zero: bool) -> tuple[np.ndarray, ...]:
    q, k, v, mask, draw = operands(xs[:-2])
    out, total = xs[-2:]
    shape = (*q.shape[:2], k.shape[1])
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for n, group, rows, scores in _blocks(q, k, mask, causal):
        shift = total[n, rows, None]
        weights = np.exp(scores - np.where(shift > -np.inf, shift, 0))
        if not zero:
            weights = np.where(shift > -np.inf, weights, scores.dtype.type(np.nan))
        slopes = _drop(g[n, rows] @ v[group].T, draw, n, rows, shape)
        slopes -= (g[n, rows] * out[n, rows]).sum(1, keepdims=True)
        slopes *= weights
        dq[n, rows] = slopes @ k[group]
        dk[group] += slopes.T @ q[n, rows]
        dv[group] += _drop(weights, draw, n, rows, shape).T @ g[n, rows]
    return dq, dk, dv


def _composed(causal: bool, zero: bool, *xs: Any) -> Any:
    """The same in primitives."""
    q, k, v, mask, draw = operands(xs)
    n, queries, _ = q.shape
    k, v = _repeated(k, n), _repeated(v, n)
    scores = ops.matmul(q, ops.permute(k, axes=(0, 2, 1)))
    shape = tuple(scores.shape)
    hidden = full(shape, -math.inf, scores.dtype)
    if mask is not None:
        m, r = mask_runs(mask.shape)
        rows = broadcast(ops.reshape(mask, shape=(m, 1, r, *mask.shape[-2:])), (m, n // (m * r), r, *shape[1:]))
        added = ops.reshape(rows, shape=shape)
        scores = ops.where(ops.ne(added, hidden), ops.add(scores, added), hidden)
    if causal:
        row, column = [ops.iota(shape=shape, axis=axis, dtype=int64) for axis in (1, 2)]
        scores = ops.where(ops.ge(row, column), scores, hidden)
    top = ops.max(scores, axes=(2,))
    top = ops.where(ops.isfinite(top), top, ops.zeros_like(top))
    weights = ops.exp(ops.sub(scores, broadcast(ops.reshape(top, shape=(n, queries, 1)), shape)))
    sums = ops.sum(weights, axes=(2,))
    if zero:
        sums = ops.where(ops.gt(sums, ops.zeros_like(sums)), sums, ops.ones_like(sums))
    out = ops.matmul(_dropped(weights, *draw) if draw else weights, v)
    return ops.div(out, broadcast(ops.reshape(sums, shape=(n, queries, 1)), tuple(out.shape)))


def _dropped(weights: Any, key: Any, offset: Any, p: Any, scale: Any) -> Any:
    shape = tuple(weights.shape)
    bits = ops.random_bits(key, offset, shape=shape)
    fine = ops.cast(ops.shift_right(bits, full(shape, 8, uint32)), dtype=float32)
    kept = ops.ge(ops.mul(fine, full(shape, 2.0 ** -24, float32)), broadcast(p, shape))
    factor = ops.cast(scale, dtype=weights.dtype) if scale.dtype is not weights.dtype else scale
    return ops.where(kept, ops.mul(weights, broadcast(factor, shape)), ops.zeros_like(weights))


def _repeated(x: Any, n: int) -> Any:
    """Each head as often as it is used."""
    groups, *rest = x.shape
    if groups == n:
        return x
    wide = broadcast(ops.reshape(x, shape=(groups, 1, *rest)), (groups, n // groups, *rest))
    return ops.reshape(wide, shape=(n, *rest))


@lru_cache(maxsize=64)
def _second_order(causal: bool, zero: bool, types: tuple[TensorType, ...]) -> Graph:
    """g and all operands, then a gradient for each result of the gradient -> a gradient for g, q, k, v."""
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


def moved_back(chain: Sequence[Node], moved: Any) -> Any:
    """What `moved` was before the permutes and reshapes of `chain`, last one first."""
    for node in chain:
        if node.op is ops.permute:
            moved = ops.permute(moved, axes=tuple(np.argsort(node.attrs["axes"]).tolist()))
        else:
            moved = ops.reshape(moved, shape=node.inputs[0].shape)
    return moved


def heads_of_moved(chain: Sequence[Node], before: TensorType, after: TensorType) -> Heads | None:
    """Where a result lies in memory that holds it as `chain` moves it."""
    builder = GraphBuilder("moved")
    whole = builder.input(after)
    with builder:
        x = moved_back(chain, whole)
    back, _ = follow(builder.build([x]).producers(), x)
    return heads_through(back, after, before)


@dataclass(frozen=True, slots=True)
class Piece:
    """Where in a result a gradient lies, and whether it is multiplied on the way there."""

    heads: Heads
    multiplied: bool


def pieces(body: Graph) -> dict[Value, Piece] | None:
    """For a graph that ends with a concat of the three gradients, each moved, multiplied by a number or added to zero, and
    perhaps a permute of it: how they lie in its one result; None where that cannot be said."""
    producers = body.producers()
    last = producers[body.outputs[0]]
    turns, joined = ([last], producers[last.inputs[0]]) if last.op is ops.permute else ([], last)
    (node,) = [n for n in body.nodes if n.op is attention_grad]
    origin: dict[Value, tuple[Value, bool, list[Node]]] = {v: (v, False, []) for v in node.outputs}
    for n in body.nodes:
        for v in n.inputs:
            if v in origin and n not in (joined, last):
                gradient, multiplied, moves = origin[v]
                origin[n.output] = (gradient, multiplied or n.op is ops.mul,
                                    [n, *moves] if n.op in (ops.permute, ops.reshape) else moves)
    found: dict[Value, Piece] = {}
    axis, begin = joined.attrs["axis"], 0
    for v in joined.inputs:
        gradient, multiplied, moves = origin[v]
        end = begin + v.shape[axis]
        heads = _heads_of_part(turns, joined.output, axis, begin, end, moves, gradient.type)
        if heads is None:
            return None
        found[gradient], begin = Piece(heads, multiplied), end
    return found


def _heads_of_part(turns: Sequence[Node], joined: Value, axis: int, begin: int, end: int, moves: Sequence[Node],
                   type: TensorType) -> Heads | None:
    """Where a value of `type`, moved by `moves` to be ``joined[begin:end]`` along the axis, lies in what `turns` make of
    that."""
    builder = GraphBuilder("part")
    whole = builder.input(turns[0].output.type if turns else joined.type)
    rank = len(joined.shape)
    with builder:
        x = ops.slice(moved_back(turns, whole), start=tuple([begin if k == axis else 0 for k in range(rank)]),
                      stop=tuple([end if k == axis else n for k, n in enumerate(joined.shape)]), step=(1,) * rank)
        x = moved_back(moves, x)
    chain, _ = follow(builder.build([x]).producers(), x)
    return heads_through(chain, whole.type, type)


attention: Op = register(Op(
    "attention", ("xs",), _infer, _attention, "contraction", vjp=_rule, variadic=True, outputs=2,
    doc="q, k, v, perhaps a mask, perhaps dropout -> softmax(q k^T + mask) v, and the logarithm of its denominators."))
attention_grad: Op = register(Op(
    "attention_grad", ("xs",), _infer_grad, _attention_grad, "contraction", vjp=_rule_of_gradient, variadic=True, outputs=3,
    doc="g, operands and results of attention -> gradients of q, k and v."))
