"""Lowering of depthwise convolutions of sequences and images to the kernels of `jitgrad.kernels.cpu.depthwise`."""

from __future__ import annotations

import math

from jitgrad.codegen.call import Call, launch
from jitgrad.codegen.kernel import Blocks, Lowered
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import depthwise
from jitgrad.kernels.cpu.tile import PANEL_BYTES

LEAST = 4                                       # channels from which this is faster than products with one row
ROWS = 32                                       # of the gradient in the image, made at once where they are spread


def suits(call: Call, image: TensorType, weights: TensorType) -> bool:
    """Whether every channel of the result sees one channel of the image, and a row of it fits the kernels."""
    return (weights.ndim < 5 and weights.shape[1] == 1 and call.attrs["groups"] >= LEAST
            and spread_rows(image, call.attrs["stride"][-1]) > 0)


def spread_rows(image: TensorType, stride: int) -> int:
    """How many rows of an image fit into a panel when each is in `stride` pieces of equal size."""
    width, panel = image.shape[-1], PANEL_BYTES // image.dtype.itemsize
    rows: int = panel // (min(stride, width) * -(-width // stride))
    return rows


def lower(call: Call, kernel: str, image: TensorType, weights: TensorType, result: TensorType) -> Lowered:
    """One of the kernels for the convolution of `image` with `weights` to `result`, or a gradient of it."""
    (high, wide), (out_high, out_wide), (tall, taps) = [(1, *t.shape[2:])[-2:] for t in (image, result, weights)]
    stride, dilation = [(1, *call.attrs[name])[-2:] for name in ("stride", "dilation")]
    top, left = (0, *[low for low, _ in call.attrs["padding"]])[-2:]
    numbers = (*image.shape[:2], high, wide, result.shape[1] // image.shape[1], out_high, out_wide, tall, taps, *stride,
               top, left, *dilation)
    every = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    items = {"depthwise": math.prod(result.shape[:2]), "depthwise_input_gradient": math.prod(image.shape[:2]),
             "depthwise_weight_gradient": result.shape[1]}[kernel]
    rows = min(spread_rows(image, stride[1]), ROWS) if stride[1] > 1 else high
    blocks = None if kernel == "depthwise_weight_gradient" else plane_blocks(call.outputs[0])
    return Lowered((launch(depthwise.source(kernel, image.dtype.short), items, call.input(0), call.input(1), call.output(),
                           *numbers, *every, rows, blocks=blocks),))


def plane_blocks(result: TensorType) -> Blocks:
    """An item is a plane of the result."""
    return Blocks({"rows": result.shape[1], "positions": math.prod(result.shape[2:])}, (
        ("batch", "item // rows"), ("first_row", "item % rows"), ("last_row", "first_row + 1"),
        ("first_column", "0"), ("last_column", "positions")), (1, 2), planes=(1, 1))
