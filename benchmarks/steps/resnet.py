"""ResNet-18 (He et al. 2015) for 32x32 images: a first convolution of 3x3, and no pooling before the blocks."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.step import TrainingStep, classification, cross_entropy

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))          # width and stride; two blocks each


def build(lib: Any) -> tuple[Any, Any]:
    """SGD with momentum on eight residual blocks."""
    nn, functional = lib.nn, lib.nn.functional

    def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> Any:
        return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
            self.conv2, self.norm2 = convolution(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
            self.short = nn.Sequential() if inputs == outputs else \
                nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            inner = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
            return functional.relu(inner + self.short(x))

    blocks, inputs = [], 64
    for outputs, stride in STAGES:
        blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    model = nn.Sequential(convolution(3, 64, 3, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Sequential(*blocks),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, lib.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def jax_loss(parts: Any, p: Any, x: Any, y: Any) -> Any:
    """The same in JAX, and the new statistics of its batch norms."""
    changed: dict[str, Any] = {}

    def unit(conv: str, norm: str, x: Any, stride: int = 1, padding: int = 1) -> Any:
        return parts.batch_norm(p, norm, parts.convolution(p, conv, x, stride, padding), changed)

    x = parts.relu(unit("0", "1", x))
    for index in range(2 * len(STAGES)):
        name, stride = f"3.{index}", STAGES[index // 2][1] if index % 2 == 0 else 1
        inner = unit(f"{name}.conv2", f"{name}.norm2",
                     parts.relu(unit(f"{name}.conv1", f"{name}.norm1", x, stride)))
        short = f"{name}.short.0.weight" in p
        x = parts.relu(inner + (unit(f"{name}.short.0", f"{name}.short.1", x, stride, 0) if short else x))
    return parts.cross_entropy(parts.linear(p, "6", x.mean((2, 3))), y), changed


STEP = TrainingStep("ResNet-18 on 32x32, batch 32, SGD", classification((32, 3, 32, 32), 10), build, cross_entropy,
                    jax_loss, lambda parts: parts.sgd(lr=0.01, momentum=0.9))
