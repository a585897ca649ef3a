"""A small GPT: 4 blocks, 256 wide, 8 sequences of 128 tokens out of 1,024."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.steps.step import Batch, TrainingStep
from benchmarks.steps.transformer import jax_block, make_block

LAYERS, WIDTH, HEADS, VOCABULARY, BATCH, TOKENS = 4, 256, 8, 1024, 8, 128


def batch(rng: np.random.Generator) -> Batch:
    """Tokens, and the tokens that follow them."""
    text = rng.integers(0, VOCABULARY, (BATCH, TOKENS + 1))
    return text[:, :-1].copy(), text[:, 1:].copy()


def build(lib: Any) -> tuple[Any, Any]:
    """Token and position embeddings, the blocks, a last layer norm and the head; AdamW."""
    nn = lib.nn

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
            self.blocks = nn.Sequential(*(make_block(lib, WIDTH, HEADS, causal=True) for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens) + self.positions.weight
            return self.head(self.norm(self.blocks(x)))

    model = GPT()
    return model, lib.optim.AdamW(model.parameters(), lr=3e-4)


def loss(lib: Any, model: Any, tokens: Any, following: Any) -> Any:
    """Cross-entropy of every next token."""
    return lib.nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def jax_loss(parts: Any, p: Any, tokens: Any, following: Any) -> Any:
    """The same in JAX."""
    x = p["tokens.weight"][tokens] + p["positions.weight"]
    for layer in range(LAYERS):
        x = jax_block(parts, p, f"blocks.{layer}", x, HEADS, causal=True)
    logits = parts.layer_norm(p, "norm", x) @ p["head.weight"].T
    return parts.cross_entropy(logits.reshape(-1, VOCABULARY), following.reshape(-1))


STEP = TrainingStep("GPT 4 layers, 256 wide, 8x128 tokens, AdamW", batch, build, loss, jax_loss,
                    lambda parts: parts.adamw(lr=3e-4))
