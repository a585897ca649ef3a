"""Layers of ResNet-50 (He et al. 2015) for images of 224x224, in bfloat16 and as TF32: forward, and both ways.

Contenders: jitgrad as it is and with its own kernels alone (without cuDNN); PyTorch, whose convolutions are cuDNN's, on
images as they are and with channels last. Rates are TFLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jitgrad as jg
from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.case import EAGER, OURS, Case, Compiler, Maker, Way, applied
from benchmarks.kernels.convolutions import Layer

OWN = Way("jitgrad", True, settings={"cudnn": "never"})


def layers(batch: int) -> list[tuple[Layer, int]]:
    """Some of every stage, and their ranks."""
    return [(Layer(batch, 64, 64, 56, 56), 0), (Layer(batch, 256, 256, 14, 14), 1),
            (Layer(batch, 64, 256, 56, 56, kernel=1, padding=0), 1), (Layer(batch, 128, 128, 28, 28), 2),
            (Layer(batch, 512, 512, 7, 7), 2), (Layer(batch, 3, 64, 224, 224, kernel=7, stride=2, padding=3), 2),
            (Layer(batch, 256, 512, 56, 56, kernel=1, stride=2, padding=0), 2),
            (Layer(batch, 1024, 256, 14, 14, kernel=1, padding=0), 2)]


def operands(layer: Layer, dtype: Any, count: int, bench: Bench) -> list[Any]:
    """Images, weights, and a gradient of the result."""
    scales = (1.0, math.prod(layer.shapes[1][1:]) ** -0.5, 1.0)
    return [bench.normal(*shape, dtype=dtype, scale=scale) for shape, scale in zip(layer.shapes[:count], scales)]


def channels_last(make: Maker) -> Maker:
    """The same on operands that lie with channels last."""
    def turned(torch: Any, compiler: Compiler, given: Sequence[Any]) -> Call:
        return make(torch, compiler, [x.to(memory_format=torch.channels_last) for x in given])
    return turned


def layer_cases(layer: Layer, kind: str, rank: int) -> list[Case]:
    """Forward; with the gradients of images and weights."""
    dtype = jg.bfloat16 if kind == "bfloat16" else jg.float32
    _, weight, result = layer.shapes
    work = 2 * math.prod(result) * math.prod(weight[1:])
    found = []
    for what, make, count, factor in (("", applied(layer.forward), 2, 1),
                                      (", both ways", applied(layer.forward, (0, 1)), 3, 3)):
        ways = {"jitgrad": OURS, "jitgrad, own kernels": OWN, "PyTorch": EAGER,
                "PyTorch, channels last": Way("torch", make=channels_last(make))}
        found.append(Case(f"{layer.name} {kind}{what}", partial(operands, layer, dtype, count), make, factor * work,
                          ways=ways, kind=kind, rank=rank))
    return found


def cases(small: bool = False) -> list[Case]:
    """In the order of the table."""
    if small:
        return [case for kind in ("bfloat16", "tf32") for case in layer_cases(Layer(2, 8, 8, 5, 5), kind, 1)]
    return [case for kind, later in (("bfloat16", 0), ("tf32", 1)) for layer, rank in layers(64)
            for case in layer_cases(layer, kind, min(rank + later, 2))]
