"""Embedding and attention, as compositions of primitives.

Attention is written as matmul, scale, mask, softmax, matmul: compiled, the whole of it is one region that never
materializes the scores.
"""

from __future__ import annotations

import math
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.activation import dropout, softmax
from jitgrad.functional.core import Tensor, cast, describe, read, require_shape
from jitgrad.functional.elementwise import add, mul
from jitgrad.functional.index import _index_like
from jitgrad.functional.linalg import matmul
from jitgrad.functional.reduce import detached
from jitgrad.functional.shape import diagonal_distance, repeat_interleave
from jitgrad.functional.window import one_hot_positions
from jitgrad.ops.builders import broadcast, full, zeros_like

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
    count = int(read(tensor).max()) + 1 if num_classes == -1 else num_classes
    return cast(one_hot_positions(tensor, count), dtypes.int64)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False) -> Tensor:
    """``softmax(query @ key.mT * scale + mask) @ value``: query [*, L, E], key [*, S, E], value [*, S, V]. A bool
    `attn_mask` says what takes part, a float one is added; `is_causal` lets position i see 0 … i. `scale` defaults to
    ``1 / sqrt(E)``. With `enable_gqa` each key head serves several query heads."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(key, times, -3), repeat_interleave(value, times, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = mul(matmul(query, ops.transposed(key)), factor)
    scores = _masked(scores, attn_mask, is_causal)
    weights = softmax(scores, -1)
    if attn_mask is not None and attn_mask.dtype is dtypes.bool_:
        weights = _without_nan(weights, attn_mask)
    return matmul(dropout(weights, dropout_p), value)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        require_shape("scaled_dot_product_attention", mask is None, "give either attn_mask or is_causal")
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
