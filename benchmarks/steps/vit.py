"""A small vision transformer: 6 blocks, 192 wide, 32x32 images in patches of 4x4."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.step import TrainingStep, classification, cross_entropy
from benchmarks.steps.transformer import jax_block, make_block

LAYERS, WIDTH, HEADS, PATCH, SIZE, BATCH, CLASSES = 6, 192, 6, 4, 32, 32, 10


def build(lib: Any) -> tuple[Any, Any]:
    """Patches, positions, the blocks, and a head on the mean over the patches; AdamW."""
    nn = lib.nn

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
            self.positions = nn.Parameter(lib.zeros((SIZE // PATCH) ** 2, WIDTH))
            self.blocks = nn.Sequential(*(make_block(lib, WIDTH, HEADS, causal=False) for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, images: Any) -> Any:
            x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.blocks(x)).mean(1))

    model = ViT()
    return model, lib.optim.AdamW(model.parameters(), lr=3e-4)


def jax_loss(parts: Any, p: Any, images: Any, y: Any) -> Any:
    """The same in JAX."""
    x = parts.convolution(p, "patches", images, stride=PATCH)
    x = x.reshape(len(x), WIDTH, -1).transpose(0, 2, 1) + p["positions"]
    for layer in range(LAYERS):
        x = jax_block(parts, p, f"blocks.{layer}", x, HEADS, causal=False)
    return parts.cross_entropy(parts.linear(p, "head", parts.layer_norm(p, "norm", x).mean(1)), y)


STEP = TrainingStep("ViT 6 layers, 192 wide, batch 32, AdamW", classification((BATCH, 3, SIZE, SIZE), CLASSES), build,
                    cross_entropy, jax_loss, lambda parts: parts.adamw(lr=3e-4))
