"""Lowering of convolution and its two gradients to the kernels of `jitgrad.kernels.cpu.conv` on the GEMM core.

Each is: pack the left operand (weights, or the gradient for the weights' gradient), then multiply it with columns
that are gathered from the image. The weights' gradient of few taps is summed up per run of images first, so that there
are items enough; the runs depend on shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jitgrad import dtypes
from jitgrad.codegen.call import BLOCK, Call, launch, lowers
from jitgrad.codegen.kernel import Argument, Buffer, Function, Launch, Lowered
from jitgrad.codegen.region import analyse
from jitgrad.codegen.templates import lower_map
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.op import REGISTRY
from jitgrad.kernels.cpu import conv, gemm
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK

ITEMS = 8
ITEM_COLUMNS = 256


@dataclass
class _Lowering:
    """One node on its way. `image` is the shape that columns are gathered from, `out` the shape of positions."""

    call: Call
    launches: list[Launch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.type = self.call.outputs[0]
        self.short = self.type.dtype.short
        self.tile = gemm.element_tile(self.short)
        self.groups: int = self.call.attrs["groups"]
        self.core = Function(f"gemm_{self.short}", gemm.source(self.short))

    def lowered(self) -> Lowered:
        return Lowered(tuple(self.launches), tuple(self.scratch))

    def add(self, source: str, items: int, *arguments: Argument) -> None:
        self.launches.append(launch(source, items, *arguments))

    def memory(self, elements: int) -> Buffer:
        self.scratch.append(max(elements, 1) * self.type.dtype.itemsize)
        return self.call.scratch(len(self.scratch) - 1)

    def pack(self, operand: Buffer, batch: tuple[int, ...], rows: int, depth: int) -> tuple[Buffer, int, int]:
        """Panels of the contiguous [*batch, rows, depth]; the height of a panel and the number of them."""
        high = gemm.panel_height(rows, self.tile)
        strides = [math.prod(batch[k + 1:]) * rows * depth for k in range(len(batch))]
        packing, _, _ = gemm.pack(Matrices(tuple(strides), depth, 1), batch, rows, depth, high, self.tile.packed_rows,
                                  depth, 1)
        panels = self.memory(packing.elements)
        self.add(gemm.pack_source(self.short, packing.kind), packing.items, operand, panels, *packing.integers)
        return panels, high, -(-rows // high)

    def convolve(self, weights: Buffer, source: Buffer, image: tuple[int, ...], out: tuple[int, ...],
                 steps: dict[str, int]) -> Lowered:
        """`weights`, contiguous [groups, rows, channels * taps], times columns of `source`."""
        rows, channels = out[1] // self.groups, image[1] // self.groups
        taps, positions = steps["kernel_height"] * steps["kernel_width"], out[2] * out[3]
        packed, high, panels = self.pack(weights, (self.groups,), rows, channels * taps)
        parts = out[0] * self.groups
        per_item = columns_per_item(parts, positions, self.tile.columns)
        blocks = -(-positions // per_item)
        numbers = {**steps, "channels": channels, "height": image[2], "width": image[3], "out_height": out[2],
                   "out_width": out[3], "groups": self.groups, "rows": rows, "panel_rows": high, "panels": panels,
                   "blocks": blocks, "columns_per_item": per_item, "channels_per_step": DEPTH_BLOCK // taps}
        text = conv.convolve_source(self.short, max(steps["spread_y"], steps["spread_x"]) > 1)
        self.add(text, parts * blocks, packed, source, self.call.output(), self.core,
                 *[numbers[name] for name in conv.ARGUMENTS])
        return self.lowered()

    def weight_gradient(self, steps: dict[str, int]) -> Lowered:
        image, gradient = [t.shape for t in self.call.inputs]
        rows, channels = gradient[1] // self.groups, image[1] // self.groups
        columns = channels * steps["kernel_height"] * steps["kernel_width"]
        packed, high, panels = self.pack(self.call.input(1), (image[0], self.groups), rows, gradient[2] * gradient[3])
        blocks = -(-columns // self.tile.columns)
        per_item = -(-image[0] // min(image[0], -(-ITEMS // (blocks * self.groups))))
        runs = -(-image[0] // per_item)
        partial = self.call.output() if runs == 1 else self.memory(runs * self.type.size)
        numbers = {**steps, "channels": channels, "height": image[2], "width": image[3], "out_height": gradient[2],
                   "out_width": gradient[3], "groups": self.groups, "rows": rows, "panel_rows": high, "panels": panels,
                   "blocks": blocks, "images": image[0], "images_per_item": per_item}
        self.add(conv.weight_source(self.short), runs * self.groups * blocks, packed, self.call.input(0), partial,
                 self.core, *[numbers[name] for name in conv.WEIGHT_ARGUMENTS])
        if runs > 1:
            self.add(conv.add_parts_source(self.short), -(-self.type.size // BLOCK), partial, self.call.output(),
                     self.type.size, runs, BLOCK)
        return self.lowered()

    def swapped_weights(self) -> Buffer:
        """The weights as [groups, channels, rows, taps]: the left operand of the gradient in the image."""
        w = self.call.inputs[1]
        shape = (self.groups, w.shape[0] // self.groups, *w.shape[1:])
        builder = GraphBuilder("swap_weights")
        with builder:
            grouped = REGISTRY["reshape"](builder.input(w), shape=shape)
            body = builder.build([REGISTRY["permute"](grouped, axes=(0, 2, 1, 3, 4))])
        place = self.memory(w.size)
        region = analyse(body, [])
        region.buffers = dict.fromkeys(region.buffers, self.call.input(1))
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region)
        return place


def columns_per_item(parts: int, positions: int, panel: int) -> int:
    """Columns of one item: many, but so that there are items enough."""
    wanted = max(min(ITEM_COLUMNS, positions * parts // ITEMS), panel)
    blocks = -(-positions // wanted)
    panels = -(-positions // (blocks * panel))
    return panels * panel


def geometry(call: Call, kernel: tuple[int, ...]) -> dict[str, int]:
    """The steps of a convolution, as integers of the kernels."""
    stride, dilation, padding = (call.attrs[name] for name in ("stride", "dilation", "padding"))
    return {"kernel_height": kernel[0], "kernel_width": kernel[1], "stride_y": stride[0], "stride_x": stride[1],
            "shift_y": -padding[0][0], "shift_x": -padding[1][0], "tap_y": dilation[0], "tap_x": dilation[1],
            "spread_y": 1, "spread_x": 1}


def turned(steps: dict[str, int]) -> dict[str, int]:
    """The steps from an image's position back to the results that it took part in."""
    return {**steps, "stride_y": 1, "stride_x": 1, "shift_y": -steps["shift_y"], "shift_x": -steps["shift_x"],
            "tap_y": -steps["tap_y"], "tap_x": -steps["tap_x"], "spread_y": steps["stride_y"],
            "spread_x": steps["stride_x"]}


def supported(call: Call, kernel: tuple[int, ...]) -> bool:
    """float32 and float64, nothing empty, and one channel's taps fit into a panel."""
    types = (*call.inputs, *call.outputs)
    return (all(t.dtype in (dtypes.float32, dtypes.float64) and t.size for t in types)
            and math.prod(kernel) <= DEPTH_BLOCK)


def _enter(name: str, lower: Callable[[Call, dict[str, int]], Lowered], kernel: Callable[[Call], Any]) -> None:
    @lowers(name)
    def lower_node(call: Call) -> Lowered | None:
        return lower(call, geometry(call, kernel(call))) if supported(call, kernel(call)) else None


def _forward(call: Call, steps: dict[str, int]) -> Lowered:
    return _Lowering(call).convolve(call.input(1), call.input(0), call.inputs[0].shape, call.outputs[0].shape, steps)


def _input_gradient(call: Call, steps: dict[str, int]) -> Lowered:
    lowering = _Lowering(call)
    weights = lowering.swapped_weights()
    return lowering.convolve(weights, call.input(0), call.inputs[0].shape, call.outputs[0].shape, turned(steps))


def _weight_gradient(call: Call, steps: dict[str, int]) -> Lowered:
    return _Lowering(call).weight_gradient(steps)


_enter("convolution", _forward, lambda call: call.inputs[1].shape[2:])
_enter("convolution_input_grad", _input_gradient, lambda call: call.inputs[1].shape[2:])
_enter("convolution_weight_grad", _weight_gradient, lambda call: call.outputs[0].shape[2:])
