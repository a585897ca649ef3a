"""Attention with several heads (Vaswani et al. 2017).

Sequences are [length, batch, width], or [batch, length, width] with ``batch_first``; without the batch they are
[length, width]. In a boolean mask True means: not to be attended to; a float mask is added to the scores.
"""

from __future__ import annotations

import math
from typing import Any

from jitgrad import dtypes, functional
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import nn as F
from jitgrad.nn import init
from jitgrad.nn.linear import Linear
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.tensor import Tensor


class MultiheadAttention(Module):
    """Attention with `num_heads` heads of width embed_dim / num_heads; keys and values may have widths of their own. Behind
    the keys and values that are given, `add_bias_kv` puts a learned one, and `add_zero_attn` one of zeros."""

    in_proj_weight: Parameter | None
    in_proj_bias: Parameter | None
    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
                 add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
                 device: Any = None, dtype: DType | None = None):
        super().__init__()
        if num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: embed_dim={embed_dim} must be divisible by num_heads={num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        self._packed = self.kdim == self.vdim == embed_dim
        self._make_projections(dtype, device)
        self.in_proj_bias = new_parameter((3 * embed_dim,), dtype, device) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.bias_k = new_parameter((1, 1, embed_dim), dtype, device) if add_bias_kv else None
        self.bias_v = new_parameter((1, 1, embed_dim), dtype, device) if add_bias_kv else None
        self.add_zero_attn = add_zero_attn
        self._reset_parameters()

    def _make_projections(self, dtype: DType | None, device: Any) -> None:
        width = self.embed_dim
        shapes = {"in_proj_weight": (3 * width, width) if self._packed else None,
                  "q_proj_weight": None if self._packed else (width, width),
                  "k_proj_weight": None if self._packed else (width, self.kdim),
                  "v_proj_weight": None if self._packed else (width, self.vdim)}
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else new_parameter(shape, dtype, device))

    def _reset_parameters(self) -> None:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            init.zeros_(self.in_proj_bias)
            init.zeros_(self.out_proj.bias)                                   # type: ignore[arg-type]
        for behind in (self.bias_k, self.bias_v):
            if behind is not None:
                init.xavier_normal_(behind)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the attention weights [batch, (heads,) length, source length] if asked for.

        `attn_mask` is [length, source length] or [batch * heads, length, source length], `key_padding_mask`
        [batch, source length]. `is_causal` says that `attn_mask` is the causal mask, which it must be given with."""
        if is_causal and attn_mask is None:
            raise complain(ShapeError, "MultiheadAttention", "is_causal needs the causal mask as attn_mask")
        batched = len(query.shape) == 3
        q, k, v = (self._batch_first(x, batched) for x in (query, key, value))
        padding = key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(q, k, v)
        given = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (functional.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        causal = is_causal and not need_weights and k.shape[1] == given       # then the mask need not be read
        mask = self._merged_mask(None if causal else attn_mask, padding, q, given)
        if mask is not None and k.shape[1] > given:
            mask = F.pad(mask, (0, k.shape[1] - given))                       # what was put behind may be attended to
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        attended, weights = self._attend(q, k, v, mask, need_weights, causal)
        n, _, length, _ = q.shape
        result = self.out_proj(attended.transpose(1, 2).reshape(n, length, self.embed_dim))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None and q is k and k is v:             # self-attention: one matrix product
            return tuple(F.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if self.in_proj_weight is None \
            else self.in_proj_weight.chunk(3, 0)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3, 0)
        return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        return x.reshape(n, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _merged_mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, source: int) -> Tensor | None:
        """Both masks as one float mask that broadcasts to [batch, heads, length, source length]; q is not split yet."""
        n, length, _ = q.shape
        heads, parts = self.num_heads, []
        if mask is not None:
            shape = (1, 1, length, source) if len(mask.shape) == 2 else (n, heads, length, source)
            parts.append(_as_scores(mask, q.dtype).reshape(shape))
        if padding is not None:
            parts.append(_as_scores(padding, q.dtype).reshape(n, 1, 1, source))
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool,
                causal: bool) -> tuple[Tensor, Tensor | None]:
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p, causal), None
        scores = (q * (1 / math.sqrt(self.head_dim))) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, p, True) if p else weights
        return weights @ v, weights


def _as_scores(mask: Tensor, dtype: DType) -> Tensor:
    """A boolean mask as 0 and -inf; a float mask in the scores' dtype."""
    if mask.dtype is dtypes.bool_:
        return functional.where(mask, -math.inf, 0.0).to(dtype)
    return mask.to(dtype)
