"""The block that GPT and ViT are made of: attention and a feed-forward network, each after a layer norm."""

from __future__ import annotations

from typing import Any


def make_block(lib: Any, width: int, heads: int, causal: bool, gelu: str = "none") -> Any:
    """One block for `torch` or `jitgrad`: [batch, tokens, width] to the same. `gelu`: the form of GELU, exact or "tanh"."""
    nn, functional = lib.nn, lib.nn.functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate=gelu))

        def attention(self, x: Any) -> Any:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))

    return Block()


def jax_block(parts: Any, p: Any, name: str, x: Any, heads: int, causal: bool) -> Any:
    """The same in JAX, with the weights whose names begin with `name`."""
    batch, tokens, width = x.shape
    qkv = parts.linear(p, f"{name}.qkv", parts.layer_norm(p, f"{name}.norm1", x))
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 1, 3, 4)
    mixed = parts.attention(q, k, v, causal).reshape(batch, tokens, width)
    x = x + parts.linear(p, f"{name}.out", mixed)
    hidden = parts.gelu(parts.linear(p, f"{name}.up", parts.layer_norm(p, f"{name}.norm2", x)))
    return x + parts.linear(p, f"{name}.down", hidden)
