"""GPT-2 (Radford et al. 2019) with 124 M parameters, in mixed precision: what a GPU is measured with; a step takes a CPU
minutes.

Weights are float32; products and attention compute in bfloat16 under autocast. The head is the embedding of tokens. The
vocabulary of 50,257 is rounded up to a multiple of 64, for all contenders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.steps.step import Batch, TrainingStep
from benchmarks.steps.transformer import make_block

DEVIATION = 0.02                     # of weights at the beginning


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model and its batches."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_304
    batch: int = 8
    tokens: int = 1024


def make_batch(sizes: Sizes, rng: np.random.Generator) -> Batch:
    """Tokens, and the tokens that follow them."""
    text = rng.integers(0, sizes.vocabulary, (sizes.batch, sizes.tokens + 1))
    return text[:, :-1].copy(), text[:, 1:].copy()


def build(sizes: Sizes, lib: Any) -> tuple[Any, Any]:
    """The model and AdamW. Projections into the sum of the blocks begin smaller, as in the paper."""
    nn = lib.nn

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
            self.positions = nn.Embedding(sizes.tokens, sizes.width)
            self.blocks = nn.Sequential(*(make_block(lib, sizes.width, sizes.heads, causal=True, gelu="tanh")
                                          for _ in range(sizes.layers)))
            self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens) + self.positions.weight
            return self.head(self.norm(self.blocks(x)))

    model = GPT2()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            inner = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=DEVIATION / ((2 * sizes.layers) ** 0.5 if inner else 1))
    return model, lib.optim.AdamW(model.parameters(), lr=3e-4)


def loss(lib: Any, model: Any, tokens: Any, following: Any) -> Any:
    """Cross-entropy of every next token."""
    with lib.autocast(tokens.device.type, dtype=lib.bfloat16):
        return lib.nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def make_step(sizes: Sizes) -> TrainingStep:
    """The step for a model of other sizes."""
    title = f"GPT-2 {sizes.layers} layers, {sizes.width} wide, {sizes.batch}x{sizes.tokens} tokens, bfloat16, AdamW"
    return TrainingStep(title, lambda rng: make_batch(sizes, rng), lambda lib: build(sizes, lib), loss,
                        tokens=sizes.batch * sizes.tokens)


STEP = make_step(Sizes())
