"""Embedding and attention.

Attention is one primitive that never holds the matrix of scores, dropout included. Half precision is widened to float32
for it and rounded once. Where a mask wants a gradient it is written out: matmul, scale, mask, softmax, dropout, matmul.
"""

from __future__ import annotations

import math
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional import random
from jitgrad.functional.activation import check_probability, dropout, softmax
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_operand,
    broadcast_shape,
    cast,
    describe,
    describe_all,
    is_on_gpu,
    read,
    require_shape,
    size,
    widened,
)
from jitgrad.functional.elementwise import add, div, mul, where
from jitgrad.functional.index import _index_like
from jitgrad.functional.linalg import matmul
from jitgrad.functional.logic import gt
from jitgrad.functional.reduce import amax, detached, norm
from jitgrad.functional.shape import diagonal_distance, repeat_interleave
from jitgrad.ops.attention import mask_by_head, sum_dtype
from jitgrad.ops.builders import broadcast, expand_dims, full, zeros_like

__all__ = [
    "embedding", "one_hot", "scaled_dot_product_attention",
]


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
              norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """The rows of `weight` [count, width] that `input` names: [*, width]. The row `padding_idx` gets no gradient. With
    `max_norm`, named rows whose `norm_type`-norm is larger are made that long first, in `weight` itself. With
    `scale_grad_by_freq` the gradient of a row is divided by how often `input` names it. Gradients are dense: `sparse` is
    refused."""
    require_shape("embedding", not sparse, "sparse=True asks for sparse gradients, and they are dense here",
                  "Leave it out: the gradient has the same values")
    index = _index_like("embedding", weight, input, same_rank=False)
    if max_norm is not None:
        _shorten_rows(detached(weight), index, max_norm, norm_type)
    rows = ops.take(weight, index, axis=0)
    if scale_grad_by_freq:
        none, one = full(weight.shape[:1], 0.0, dtypes.float32), full(index.shape, 1.0, dtypes.float32)
        times = ops.take(ops.index_add(none, index, one, axis=0), index, axis=0)
        share = expand_dims(cast(ops.reciprocal(times), rows.dtype), (len(index.shape),))
        nothing = ops.sub(rows, detached(rows))           # zeros, and a part of the gradient
        rows = ops.add(detached(rows), ops.mul(nothing, broadcast(share, rows.shape)))
    if padding_idx is None:
        return rows
    padding = padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
    padded = ops.eq(index, full(index.shape, padding, index.dtype))
    mask = broadcast(ops.reshape(padded, shape=(*index.shape, 1)), rows.shape)
    return ops.where(mask, detached(rows), rows)


def _shorten_rows(weight: Tensor, index: Tensor, max_norm: float, norm_type: float) -> None:
    """The rows that `index` names brought to a norm of at most `max_norm`, in place; 1e-7 keeps the quotient below it."""
    flat = ops.reshape(index, shape=(size(index.shape),))
    rows = ops.take(weight, flat, axis=0)
    length = norm(rows, norm_type, -1, keepdim=True)
    shorter = mul(rows, div(max_norm, add(length, 1e-7)))
    kept = where(gt(length, max_norm), shorter, rows)
    weight._assign(ops.index_update(weight, flat, kept, axis=0))


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """1 at the class, 0 elsewhere: int64 [*, num_classes]. Without a number of classes the largest value is read."""
    if not tensor.dtype.is_integer:
        raise complain(DTypeError, "one_hot", f"expected class indices (int64), got {describe(tensor)}",
                       fix="Did you mean x.long()?")
    count = int(read(amax(tensor))) + 1 if num_classes == -1 else num_classes
    return cast(_one_hot_positions(tensor, count), dtypes.int64)


def _one_hot_positions(indices: Tensor, count: int) -> Tensor:
    """True where the number of the new last dimension is the index: bool [*, count]."""
    shape = (*indices.shape, count)
    numbers = ops.iota(shape=shape, axis=len(indices.shape), dtype=dtypes.int64)
    return ops.eq(numbers, broadcast(expand_dims(cast(indices, dtypes.int64), (len(indices.shape),)), shape))


@casts(cpu="lower", cuda="lower")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False) -> Tensor:
    """``softmax(query @ key.mT * scale + mask) @ value``: query [*, L, E], key [*, S, E], value [*, S, V]. A bool
    `attn_mask` says what takes part, a float one is added; `is_causal` lets position i see 0 … i, of what a mask leaves. A
    position that sees nothing gets zeros. `scale` defaults to ``1 / sqrt(E)``. With `enable_gqa` each key head serves
    several query heads. A weight is set to 0 with probability `dropout_p`, the others are scaled by
    ``1 / (1 - dropout_p)``."""
    check_probability("scaled_dot_product_attention", dropout_p)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    query, key, value = _one_batch(query, key, value, enable_gqa)
    if _is_blockwise(query, key, value, attn_mask):
        return _blockwise(query, key, value, attn_mask, factor, dropout_p, is_causal)
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(key, times, -3), repeat_interleave(value, times, -3)
    scores = _masked(mul(matmul(query, ops.transposed(key)), factor), attn_mask, is_causal)
    return matmul(dropout(_weights(scores, attn_mask is not None), dropout_p), value)


def _one_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three with the same dimensions in front, those of size 1 expanded; heads that share keys stay."""
    op, last = "scaled_dot_product_attention", 3 if enable_gqa else 2
    given = query, key, value
    require_shape(op, min(len(x.shape) for x in given) >= last,
                  f"expected at least {last} dimensions, got {describe_all(*given)}")
    if enable_gqa:
        heads = key.shape[-3]
        require_shape(op, value.shape[-3] == heads > 0 and query.shape[-3] % heads == 0,
                      "keys and values must have the same heads, whose number divides that of the query: "
                      f"{describe_all(*given)}")
    shapes = [tuple(x.shape[:len(x.shape) - last]) for x in given]
    batch = broadcast_shape(op, *shapes)
    query, key, value = [broadcast(x, (*batch, *x.shape[len(shape):])) for x, shape in zip(given, shapes, strict=True)]
    return query, key, value


def _is_blockwise(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the primitive takes these operands: floats of one dtype, keys, and a mask that wants no gradient."""
    if query.dtype.category != "f" or not query.dtype is key.dtype is value.dtype or not key.shape[-2] \
            or value.shape[-2] != key.shape[-2] or query.shape[-1] != key.shape[-1]:
        return False
    return mask is None or (not getattr(mask, "requires_grad", True) and mask.dtype in (dtypes.bool_, query.dtype))


def _blockwise(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Operand, p: float,
               is_causal: bool) -> Tensor:
    """By the primitive: on a GPU half precision is what its kernels take, elsewhere they take float32."""
    attend = _flat if is_on_gpu(query) else widened(_flat)
    return attend(query, key, value, mask, factor, p, is_causal)


def _flat(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Operand, p: float,
          is_causal: bool) -> Tensor:
    query = mul(query, factor)
    flat = [ops.reshape(x, shape=(math.prod(x.shape[:-2]), *x.shape[-2:])) for x in (query, key, value)]
    if mask is not None:
        flat.append(_mask_by_head(mask, tuple(query.shape[:-2]), query.shape[-2], key.shape[-2], query.dtype))
    if p:
        flat += _draw(p, sum_dtype(query.dtype))
    out, _ = ops.attention(*flat, causal=is_causal, zero=mask is not None)
    return ops.reshape(out, shape=(*query.shape[:-1], value.shape[-1]))


def _draw(p: float, dtype: dtypes.DType) -> list[Tensor]:
    """The operands of dropout: a draw of its own, the probability, and the scale of what is kept, if anything is."""
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return [*random.next_offset(1), cast(as_operand(p, dtypes.float32), dtypes.float32),
            cast(as_operand(scale, dtype), dtype)]


def _mask_by_head(mask: Tensor, batch: tuple[int, ...], queries: int, keys: int, dtype: dtypes.DType) -> Tensor:
    """What is added to the scores, [M, queries or 1, keys]: one for all heads, for each, or for runs of them."""
    if mask.dtype is dtypes.bool_:
        mask = ops.where(mask, full(mask.shape, 0.0, dtype), full(mask.shape, -math.inf, dtype))
    shape = (1,) * (len(batch) + 2 - len(mask.shape)) + tuple(mask.shape)
    require_shape("scaled_dot_product_attention", len(shape) == len(batch) + 2 and all(
        size in (1, wanted) for size, wanted in zip(shape, (*batch, queries, keys), strict=True)),
        f"the mask {describe(mask)} does not fit scores {[*batch, queries, keys]}")
    return mask_by_head(ops.reshape(mask, shape=shape), batch, keys)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """-inf where nothing is seen."""
    if mask is not None and mask.dtype is not dtypes.bool_:
        scores, mask = add(scores, mask), None
    seen = [] if mask is None else [broadcast(mask, scores.shape)]
    if is_causal:
        distance = broadcast(diagonal_distance(*scores.shape[-2:]), scores.shape)
        seen.append(ops.le(distance, zeros_like(distance)))
    for visible in seen:
        scores = ops.where(visible, scores, full(scores.shape, -math.inf, scores.dtype))
    return scores


def _weights(scores: Tensor, masked: bool) -> Tensor:
    """The softmax; 0 for positions that a mask lets see nothing, with gradients of 0."""
    if not masked or not scores.shape[-1]:
        return softmax(scores, -1)
    nothing = ops.eq(amax(detached(scores), -1, keepdim=True), full((*scores.shape[:-1], 1), -math.inf, scores.dtype))
    hidden, zeros = broadcast(nothing, scores.shape), zeros_like(scores)
    return ops.where(hidden, zeros, softmax(ops.where(hidden, zeros, scores), -1))


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, **options: Any) -> Tensor:
    """Attention of [N, L, E] operands, their features cut into `heads` parts; [N, L, E] again."""
    parts = [_split_heads(x, heads) for x in (query, key, value)]
    result = ops.permute(scaled_dot_product_attention(*parts, **options), axes=(0, 2, 1, 3))
    return ops.reshape(result, shape=(*result.shape[:2], result.shape[2] * result.shape[3]))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    n, length, width = x.shape
    return ops.permute(ops.reshape(x, shape=(n, length, heads, width // heads)), axes=(0, 2, 1, 3))
