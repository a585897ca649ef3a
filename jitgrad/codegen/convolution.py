"""Lowering of convolution and its two gradients to the kernels of `jitgrad.kernels.cpu.conv` on the GEMM core.

Each is: pack the left operand (weights, or the gradient for the weights' gradient), then multiply it with columns
that are gathered from the image. The weights' gradient of few taps is summed up per run of images first, so that there
are items enough; the runs depend on shapes alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from jitgrad import dtypes
from jitgrad.codegen import winograd
from jitgrad.codegen.call import BLOCK, Call, launch, lowers
from jitgrad.codegen.kernel import Argument, Buffer, Function, Launch, Lowered
from jitgrad.codegen.region import analyse
from jitgrad.codegen.templates import lower_map
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
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

    def convolve(self, weights: Buffer, source: Buffer, image: tuple[int, ...], result: Buffer, out: tuple[int, ...],
                 steps: dict[str, int]) -> None:
        """`weights`, contiguous [groups, rows, channels * taps], times columns of `source`, to `result`."""
        rows, channels = out[1] // self.groups, image[1] // self.groups
        taps, positions = steps["kernel_height"] * steps["kernel_width"], out[2] * out[3]
        packed, high, panels = self.pack(weights, (self.groups,), rows, channels * taps)
        per_item = columns_per_item(out[0] * self.groups, positions, self.tile.columns)
        blocks = -(-positions // per_item)
        images = images_per_item(out[0], self.groups * blocks, per_item)
        numbers = {**steps, "channels": channels, "height": image[2], "width": image[3], "out_height": out[2],
                   "out_width": out[3], "groups": self.groups, "rows": rows, "panel_rows": high, "panels": panels,
                   "blocks": blocks, "columns_per_item": per_item, "channels_per_step": DEPTH_BLOCK // taps,
                   "images": out[0], "images_per_item": images}
        self.add(conv.convolve_source(self.short), -(-out[0] // images) * self.groups * blocks, packed, source, result,
                 self.core, *[numbers[name] for name in conv.ARGUMENTS])

    def weight_gradient(self, steps: dict[str, int]) -> None:
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

    def input_gradient(self, steps: dict[str, int]) -> None:
        """Phase by phase. The only phase of stride 1 is the result itself."""
        vertical, horizontal = [phases(self.type.shape[k], steps, axis) for k, axis in ((2, "y"), (3, "x"))]
        for y, x in itertools.product(vertical, horizontal):
            shape = (*self.type.shape[:2], y.size, x.size)
            if len(vertical) * len(horizontal) == 1 and y.taps and x.taps:
                self.phase(y, x, self.call.output(), shape)
            else:
                self.interleave(y, x, shape, steps)

    def interleave(self, y: Phase, x: Phase, shape: tuple[int, ...], steps: dict[str, int]) -> None:
        part, exists = self.call.input(0), int(y.taps > 0 and x.taps > 0)
        if exists:
            part = self.memory(math.prod(shape))
            self.phase(y, x, part, shape)
        self.add(conv.interleave_source(self.short), shape[0] * shape[1], part, self.call.output(), y.size, x.size,
                 *self.type.shape[2:], y.number, x.number, steps["stride_y"], steps["stride_x"], exists)

    def phase(self, y: Phase, x: Phase, result: Buffer, shape: tuple[int, ...]) -> None:
        steps = {"kernel_height": y.taps, "kernel_width": x.taps, "stride_y": 1, "stride_x": 1, "shift_y": y.shift,
                 "shift_x": x.shift, "tap_y": y.tap, "tap_x": x.tap}
        self.convolve(self.swapped_weights(y, x), self.call.input(0), self.call.inputs[0].shape, result, shape, steps)

    def swapped_weights(self, y: Phase, x: Phase) -> Buffer:
        """The weights of the taps of a phase as [groups, channels, rows, taps]: the left operand of its product."""
        w = self.call.inputs[1]
        builder = GraphBuilder("swap_weights")
        with builder:
            taps = REGISTRY["slice"](builder.input(w), start=(0, 0, y.first, x.first), stop=w.shape,
                                     step=(1, 1, y.every, x.every))
            shape = (self.groups, w.shape[0] // self.groups, *taps.shape[1:])
            body = builder.build([REGISTRY["permute"](REGISTRY["reshape"](taps, shape=shape), axes=(0, 2, 1, 3, 4))])
        place = self.memory(body.outputs[0].type.size)
        region = analyse(body, [])
        region.buffers = dict.fromkeys(region.buffers, self.call.input(1))
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region)
        return place


@dataclass(frozen=True, slots=True)
class Phase:
    """Along one axis, the positions of an image that are `number` modulo the stride: `size` of them. `taps` taps meet
    them, each `every`th from `first` on; position p and tap t come from place ``p + shift + t * tap``."""

    number: int
    size: int
    first: int
    every: int
    taps: int
    shift: int
    tap: int


def phases(size: int, steps: dict[str, int], axis: str) -> list[Phase]:
    """The phases of an axis of `size` positions."""
    stride, padding, dilation = steps[f"stride_{axis}"], -steps[f"shift_{axis}"], steps[f"tap_{axis}"]
    kernel = steps["kernel_height" if axis == "y" else "kernel_width"]
    every = stride // math.gcd(stride, dilation)
    found = []
    for number in range(min(stride, size)):
        meeting = [i for i in range(kernel) if (number + padding - i * dilation) % stride == 0]
        first = meeting[0] if meeting else 0
        found.append(Phase(number, -(-(size - number) // stride), first, every, len(meeting),
                           (number + padding - first * dilation) // stride, -(every * dilation // stride)))
    return found


def columns_per_item(parts: int, positions: int, panel: int) -> int:
    """Columns of one item: many, but so that there are items enough."""
    wanted = max(min(ITEM_COLUMNS, positions * parts // ITEMS), panel)
    blocks = -(-positions // wanted)
    panels = -(-positions // (blocks * panel))
    return panels * panel


def images_per_item(images: int, others: int, columns: int) -> int:
    """Images of one item, where one alone has few columns: a block of weights is used for all of them while it is in
    cache."""
    return max(1, min(ITEM_COLUMNS // columns, images * others // ITEMS))


def geometry(call: Call, kernel: tuple[int, ...]) -> dict[str, int]:
    """The steps of a convolution, as integers of the kernels."""
    stride, dilation, padding = (call.attrs[name] for name in ("stride", "dilation", "padding"))
    return {"kernel_height": kernel[0], "kernel_width": kernel[1], "stride_y": stride[0], "stride_x": stride[1],
            "shift_y": -padding[0][0], "shift_x": -padding[1][0], "tap_y": dilation[0], "tap_x": dilation[1]}


def start(call: Call, kernel: tuple[int, ...]) -> tuple[_Lowering, dict[str, int]] | None:
    """A lowering to be filled, for float32 and float64, if nothing is empty and one channel's taps fit into a panel."""
    types = (*call.inputs, *call.outputs)
    fits = math.prod(kernel) <= DEPTH_BLOCK
    if fits and all(t.dtype in (dtypes.float32, dtypes.float64) and t.size for t in types):
        return _Lowering(call), geometry(call, kernel)
    return None


def sizes(call: Call, image: TensorType, result: TensorType, *, turned: bool = False) -> winograd.Sizes:
    """A convolution of 3x3. `turned`: the gradient in the image, which takes the taps the other way around."""
    (top, _), (left, _) = call.attrs["padding"]
    if turned:
        top, left = 2 - top, 2 - left
    return winograd.Sizes(image.dtype.short, image.shape, result.shape, top, left)


@lowers("convolution")
def lower_forward(call: Call) -> Lowered | None:
    begun = start(call, call.inputs[1].shape[2:])
    if begun is None:
        return None
    image, weights = call.inputs
    if winograd.suits(call, weights.shape[2:], image.shape[1], weights.shape[0]):
        return winograd.forward(call, 0, sizes(call, image, call.outputs[0]), turned=False)
    lowering, steps = begun
    lowering.convolve(call.input(1), call.input(0), call.inputs[0].shape, call.output(), call.outputs[0].shape, steps)
    return lowering.lowered()


@lowers("convolution_input_grad")
def lower_input_gradient(call: Call) -> Lowered | None:
    begun = start(call, call.inputs[1].shape[2:])
    if begun is None:
        return None
    gradient, weights = call.inputs
    if winograd.suits(call, weights.shape[2:], *weights.shape[:2]):
        return winograd.forward(call, 0, sizes(call, gradient, call.outputs[0], turned=True), turned=True)
    lowering, steps = begun
    lowering.input_gradient(steps)
    return lowering.lowered()


@lowers("convolution_weight_grad")
def lower_weight_gradient(call: Call) -> Lowered | None:
    begun = start(call, call.outputs[0].shape[2:])
    if begun is None:
        return None
    image, gradient = call.inputs
    if winograd.suits(call, call.outputs[0].shape[2:], image.shape[1], gradient.shape[1]):
        return winograd.weight_gradient(call, sizes(call, image, gradient))
    lowering, steps = begun
    lowering.weight_gradient(steps)
    return lowering.lowered()
