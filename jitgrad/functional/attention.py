"""Embedding and attention.

Attention is one primitive that never holds the matrix of scores, dropout included. Half precision is widened to float32
for it and rounded once. Where a mask wants a gradient, or batches broadcast, it is written out: matmul, scale, mask,
softmax, dropout, matmul.
"""

from __future__ import annotations

import math
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional import random
from jitgrad.functional.activation import check_probability, dropout, softmax
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import Operand, Tensor, as_operand, cast, describe, read, require_shape, widened
from jitgrad.functional.elementwise import add, mul
from jitgrad.functional.index import _index_like
from jitgrad.functional.linalg import matmul
from jitgrad.functional.reduce import amax, detached
from jitgrad.functional.shape import diagonal_distance, repeat_interleave
from jitgrad.ops.attention import mask_by_head, sum_dtype
from jitgrad.ops.builders import broadcast, expand_dims, full, zeros_like

__all__ = [
    "embedding", "one_hot", "scaled_dot_product_attention",
]


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
              norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """The rows of `weight` [count, width] that `input` names: [*, width]. The row `padding_idx` gets no gradient."""
    require_shape("embedding", max_norm is None and not scale_grad_by_freq and not sparse,
                  "max_norm, scale_grad_by_freq and sparse are not supported")
    index = _index_like("embedding", weight, input, same_rank=False)
    rows = ops.take(weight, index, axis=0)
    if padding_idx is None:
        return rows
    padding = padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
    padded = ops.eq(index, full(index.shape, padding, index.dtype))
    mask = broadcast(ops.reshape(padded, shape=(*index.shape, 1)), rows.shape)
    return ops.where(mask, detached(rows), rows)


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
    `attn_mask` says what takes part, a float one is added; `is_causal` lets position i see 0 … i. `scale` defaults to
    ``1 / sqrt(E)``. With `enable_gqa` each key head serves several query heads. A weight is set to 0 with probability
    `dropout_p`, the others are scaled by ``1 / (1 - dropout_p)``."""
    check_probability("scaled_dot_product_attention", dropout_p)
    if is_causal:
        require_shape("scaled_dot_product_attention", attn_mask is None, "give either attn_mask or is_causal")
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if _is_blockwise(query, key, value, attn_mask, enable_gqa):
        return _blockwise(query, key, value, attn_mask, factor, dropout_p, is_causal)
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(key, times, -3), repeat_interleave(value, times, -3)
    scores = mul(matmul(query, ops.transposed(key)), factor)
    scores = _masked(scores, attn_mask, is_causal)
    weights = softmax(scores, -1)
    if attn_mask is not None and attn_mask.dtype is dtypes.bool_:
        weights = _without_nan(weights, attn_mask)
    return matmul(dropout(weights, dropout_p), value)


def _is_blockwise(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """Whether the primitive takes these operands: floats of one dtype, batches that need no broadcasting."""
    own, other = tuple(query.shape[:-2]), tuple(key.shape[:-2])
    if query.dtype.category != "f" or not query.dtype is key.dtype is value.dtype \
            or len(query.shape) < 2 or tuple(value.shape[:-1]) != tuple(key.shape[:-1]) or query.shape[-1] != key.shape[-1]:
        return False
    same = own == other or (enable_gqa and len(own) == len(other) > 0 and own[:-1] == other[:-1] and other[-1] > 0
                            and own[-1] % other[-1] == 0)
    if mask is None or not same:
        return same
    return not getattr(mask, "requires_grad", True) and mask.dtype in (dtypes.bool_, query.dtype)


def _blockwise(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Operand, p: float,
               is_causal: bool) -> Tensor:
    """By the primitive: on a GPU half precision is what its kernels take, elsewhere they take float32."""
    on_gpu = str(getattr(query, "device", "cpu")).startswith("cuda")
    attend = _flat if on_gpu else widened(_flat)
    return attend(query, key, value, mask, factor, p, is_causal)


def _flat(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Operand, p: float,
          is_causal: bool) -> Tensor:
    query = mul(query, factor)
    flat = [ops.reshape(x, shape=(math.prod(x.shape[:-2]), *x.shape[-2:])) for x in (query, key, value)]
    if mask is not None:
        flat.append(_mask_by_head(mask, tuple(query.shape[:-2]), query.shape[-2], key.shape[-2], query.dtype))
    if p:
        flat += _draw(p, sum_dtype(query.dtype))
    zero = mask is not None and mask.dtype is dtypes.bool_
    out, _ = ops.attention(*flat, causal=is_causal, zero=zero)
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
    if is_causal:
        distance = diagonal_distance(*scores.shape[-2:])
        visible = ops.le(distance, zeros_like(distance))
    elif mask is None:
        return scores
    elif mask.dtype is not dtypes.bool_:
        return add(scores, mask)
    else:
        visible = mask
    hidden = full(scores.shape, -math.inf, scores.dtype)
    return ops.where(broadcast(visible, scores.shape), scores, hidden)


def _without_nan(weights: Tensor, mask: Tensor) -> Tensor:
    """0 for positions that see nothing at all."""
    visible = broadcast(mask, weights.shape)
    return ops.where(visible, weights, zeros_like(weights))


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, **options: Any) -> Tensor:
    """Attention of [N, L, E] operands, their features cut into `heads` parts; [N, L, E] again."""
    parts = [_split_heads(x, heads) for x in (query, key, value)]
    result = ops.permute(scaled_dot_product_attention(*parts, **options), axes=(0, 2, 1, 3))
    return ops.reshape(result, shape=(*result.shape[:2], result.shape[2] * result.shape[3]))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    n, length, width = x.shape
    return ops.permute(ops.reshape(x, shape=(n, length, heads, width // heads)), axes=(0, 2, 1, 3))
