"""Convolutions of float32: every distinct layer of ResNet-18 and of the small CNN as in the training steps, ViT's
patches, depthwise ones, groups as in ResNeXt-50 and ShuffleNet, and sizes that are multiples of nothing; forward and the
gradients of input and weight, each on its own.

PyTorch's gradients are calls of the function that its autograd calls; jitgrad and JAX compile the gradient of a
convolution, of which nothing but the gradient is asked for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.kernels.case import Arrays, Call, Case, Maker, makers
from benchmarks.steps import resnet, vit


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution of `inputs` channels of `height` x `width` to `outputs`, with a square `kernel`."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return (f"{self.batch} of {self.inputs}x{self.height}x{self.width} to {self.outputs}, "
                f"{self.kernel}x{self.kernel}{stride}{groups}")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the input, the weight and the result."""
        size = [(n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (self.height, self.width)]
        return ((self.batch, self.inputs, self.height, self.width),
                (self.outputs, self.inputs // self.groups, self.kernel, self.kernel), (self.batch, self.outputs, *size))

    def cases(self) -> list[Case]:
        """Forward, gradient of the input, gradient of the weight: each as many operations."""
        _, weight, result = self.shapes
        operations = 2 * math.prod(result) * math.prod(weight[1:])
        parts: list[tuple[str, int, Mapping[str, Maker]]] = [
            ("forward", 2, makers(self.forward, self.jax)),
            ("input gradient", 3, self.gradient(0)),
            ("weight gradient", 3, self.gradient(1))]
        return [Case(f"{self.name}, {what}", partial(self.operands, count), made, operations)
                for what, count, made in parts]

    def operands(self, count: int, random: np.random.Generator) -> list[np.ndarray]:
        """The first `count` of input, weight, and the result's gradient."""
        return [random.standard_normal(shape, dtype=np.float32) for shape in self.shapes[:count]]

    def forward(self, lib: Any, x: Any, weight: Any) -> Any:
        return lib.nn.functional.conv2d(x, weight, stride=self.stride, padding=self.padding, groups=self.groups)

    def jax(self, jax: Any, x: Any, weight: Any) -> Any:
        return jax.lax.conv_general_dilated(x, weight, (self.stride,) * 2, [(self.padding,) * 2] * 2,
                                            feature_group_count=self.groups)

    def gradient(self, wanted: int) -> dict[str, Maker]:
        """Of the input (0) or the weight (1)."""
        made = makers(self.forward, self.jax, wanted=(wanted,), result=False)
        return {**made, "PyTorch": lambda arrays: self.torch_gradient(wanted, arrays)}

    def torch_gradient(self, wanted: int, arrays: Arrays) -> Call:
        torch = importlib.import_module("torch")
        x, weight, g = [torch.from_numpy(array) for array in arrays]
        mask = [wanted == 0, wanted == 1, False]
        return lambda: torch.ops.aten.convolution_backward(
            g, x, weight, None, [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], self.groups, mask)[wanted]


def resnet_layers() -> list[Layer]:
    """The distinct convolutions of the step `resnet`."""
    inputs, size = 64, 32
    layers = [Layer(32, 3, inputs, size, size)]
    for outputs, stride in resnet.STAGES:
        if stride > 1:
            first = Layer(32, inputs, outputs, size, size, stride=stride)
            layers += [first, replace(first, kernel=1, padding=0)]
        inputs, size = outputs, size // stride
        layers.append(Layer(32, inputs, outputs, size, size))
    return layers


def cases() -> list[Case]:
    """In the order of the table."""
    small = [Layer(64, 1, 32, 28, 28), Layer(64, 32, 64, 14, 14)]
    patches = Layer(vit.BATCH, 3, vit.WIDTH, vit.SIZE, vit.SIZE, vit.PATCH, vit.PATCH, 0)
    depthwise = [Layer(8, 128, 128, 56, 56, groups=128), Layer(8, 256, 256, 28, 28, groups=256),
                 Layer(8, 128, 128, 56, 56, stride=2, groups=128)]
    groups = [Layer(8, 128, 128, 56, 56, groups=32), Layer(8, 256, 256, 28, 28, groups=32),
              Layer(8, 256, 256, 56, 56, stride=2, groups=32), Layer(8, 512, 512, 14, 14, groups=32),
              Layer(8, 240, 60, 28, 28, kernel=1, padding=0, groups=3)]
    odd = [Layer(7, 13, 29, 31, 37), Layer(5, 19, 23, 27, 25, kernel=5, stride=2, padding=2)]
    return [case for layer in (*resnet_layers(), *small, patches, *depthwise, *groups, *odd) for case in layer.cases()]
