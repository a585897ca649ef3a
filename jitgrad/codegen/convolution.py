"""Lowering of convolution and its two gradients to the kernels of `jitgrad.kernels.cpu.conv` on the GEMM core.

The fastest way is chosen from shapes: Winograd's maps, tap by tap with channels last, for groups planes with zeros around
them, or, where channels do not fill vectors, this: pack the left operand (weights, or the gradient for the weights'
gradient), then multiply it with columns that are gathered from the image. The weights' gradient of few taps is summed up
per run of images first, so that there are items enough; the runs depend on shapes alone. Shapes are those of volumes in
here, [N, C, D, H, W]; images have a depth of 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jitgrad import dtypes
from jitgrad.codegen import depthwise, planes, taps, winograd
from jitgrad.codegen.call import BLOCK, Call, launch, lower_call, lowers, product_core
from jitgrad.codegen.choice import Choice, usual_first
from jitgrad.codegen.epilogue import Shared, WithEpilogue
from jitgrad.codegen.kernel import Argument, Blocks, Buffer, Launch, Lowered, Private
from jitgrad.codegen.phases import (
    ALONE,
    AXES,
    Phase,
    geometry,
    meets_once,
    phase_steps,
    phases,
    scattered,
    taps_of,
    volume,
)
from jitgrad.codegen.pooled import with_memory
from jitgrad.codegen.region import analyse
from jitgrad.codegen.templates import lower_map
from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import conv, gemm, gemm_pack, planes as conv_planes, taps as conv_taps
from jitgrad.kernels.cpu.gemm import Matrices, Packing
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK

ITEMS = 8
ITEM_COLUMNS = 256
ALGORITHM = "algorithm"                         # the question, asked of a node or of each of its phases
FEW_CHANNELS = planes.FEW_CHANNELS              # below it, going tap by tap takes 1.7 times as long and more
MANY, MANY_OF_PATCHES = 1 << 15, 1 << 18        # weights from which the gradient of 1x1, or of patches, is one product
PANELS = 1 << 16                                # elements of the panels of an item, which stay in the second cache
SHORT = 4                                       # positions side by side are not worth a loop if so many times as many fill a
                                                # vector
LARGE = 128                                     # positions of an image from which a product of 1x1 takes planes as they are


@dataclass
class _Lowering:
    """One node on its way. `image` is the shape that columns are gathered from, `out` the shape of positions. Volumes are
    always done tap by tap."""

    call: Call
    launches: list[Launch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    private: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.type = self.call.outputs[0]
        self.short = self.type.dtype.short
        self.tile = gemm.element_tile(self.short)
        self.groups: int = self.call.attrs["groups"]
        self.volumes = self.type.ndim == 5
        self.core = product_core(self.short)

    def lowered(self) -> Lowered:
        return Lowered(tuple(self.launches), tuple(self.scratch), tuple(self.private))

    def add(self, source: str, items: int, *arguments: Argument, blocks: Blocks | None = None) -> None:
        self.launches.append(launch(source, items, *arguments, blocks=blocks))

    def add_work(self, source: str, work: taps.Work, *operands: Argument, core: bool = True) -> None:
        """A launch whose threads have memory of their own. Launches follow each other, so they can have the same. `core`:
        it calls the core of products."""
        for k, elements in enumerate(work.private):
            nbytes = elements * self.type.dtype.itemsize
            self.private[k:k + 1] = [max(nbytes, *self.private[k:k + 1], 8)]
        self.add(source, work.items, *operands, *[Private(k) for k in range(len(work.private))], *[self.core] * core,
                 *work.integers, blocks=work.blocks)

    def by_taps(self, usual: bool) -> bool:
        """Whether it is done tap by tap, or by an implicit product; `usual`: which is the usual way."""
        if self.volumes or self.groups > 1 or self.few_channels():
            return self.volumes
        return Choice(ALGORITHM, usual_first({"tap by tap": True, "implicit product": False}, usual)).take()

    def few_channels(self) -> bool:
        return min(t.shape[1] for t in (*self.call.inputs, *self.call.outputs)) < FEW_CHANNELS

    def memory(self, elements: int) -> Buffer:
        self.scratch.append(max(elements, 1) * self.type.dtype.itemsize)
        return self.call.scratch(len(self.scratch) - 1)

    def pack(self, operand: Buffer, batch: tuple[int, ...], rows: int, depth: int) -> tuple[Buffer, int, int]:
        """Panels of the contiguous [*batch, rows, depth], as the left operand has them; the height of a panel and the number
        of them."""
        high, wide = gemm.panel_height(rows, self.tile), self.tile.packed_rows
        strides = [math.prod(batch[k + 1:]) * rows * depth for k in range(len(batch))]
        packing, _, _ = gemm.pack(Matrices(tuple(strides), depth, 1), batch, rows, depth, high, wide, depth, 1)
        return self.packed(packing, operand), high, -(-rows // high)

    def packed(self, packing: Packing | None, operand: Buffer) -> Buffer:
        """The panels that `packing` makes of `operand`, or this itself."""
        if packing is None:
            return operand
        panels = self.memory(packing.elements)
        self.add(gemm_pack.pack_source(self.short, packing.kind), packing.items, operand, panels, *packing.integers)
        return panels

    def convolve(self, weights: Buffer, source: Buffer, image: tuple[int, ...], result: Buffer, out: tuple[int, ...],
                 steps: dict[str, int], spread: planes.Spread | None = None) -> None:
        """`weights`, contiguous [groups, rows, channels * kernel], times columns of `source`, to `result`. Only planes can
        spread it."""
        rows, channels = out[1] // self.groups, image[1] // self.groups
        kernel, positions = taps_of(steps), out[3] * out[4]
        if self.by_taps(taps.suits(self.short, channels, rows, self.groups) and not scattered(out, steps)
                        and (max(kernel, steps["stride_y"], steps["stride_x"]) > 1 or positions < LARGE)):
            self.add_taps("tap_weights", weights, source, result, kernel, taps.convolve(self.short, image, out, steps),
                          rows, channels)
            return
        if planes.suits(self.short, image, out, self.groups, steps, spread):
            self.add_work(conv_planes.source("convolve_planes", self.short), planes.convolve(
                self.short, image, out, self.groups, steps, result_blocks, spread), weights, source, result, core=False)
            return
        packed, high, panels = self.pack(weights, (self.groups,), rows, channels * kernel)
        per_item = columns_per_item(out[0] * self.groups, positions, self.tile.columns)
        blocks = -(-positions // per_item)
        images = images_per_item(out[0], self.groups * blocks, per_item)
        numbers = {**steps, "channels": channels, "height": image[3], "width": image[4], "out_height": out[3],
                   "out_width": out[4], "groups": self.groups, "rows": rows, "panel_rows": high, "panels": panels,
                   "blocks": blocks, "columns_per_item": per_item, "channels_per_step": DEPTH_BLOCK // kernel,
                   "images": out[0], "images_per_item": images}
        self.add(conv.convolve_source(self.short), -(-out[0] // images) * self.groups * blocks, packed, source, result,
                 self.core, *[numbers[name] for name in conv.ARGUMENTS], blocks=result_blocks(numbers))

    def add_taps(self, kernel: str, weights: Buffer, source: Buffer, result: Buffer, count: int, work: taps.Work, rows: int,
                 channels: int) -> None:
        """Panels of the weights, made by `kernel`, times what their taps meet."""
        panels = -(-rows // self.tile.columns)
        packed = self.memory(count * panels * channels * self.tile.columns)
        self.add(conv_taps.source(kernel, self.short), panels, weights, packed, rows, channels, count, panels)
        self.add_work(conv_taps.source("add_taps", self.short), work, source, packed, result)

    def weight_gradient(self, steps: dict[str, int]) -> None:
        image, gradient = [volume(t.shape) for t in self.call.inputs]
        if self.is_product(image, gradient, steps):
            self.product(steps)
            return
        if self.by_taps(taps.suits(self.short, image[1], gradient[1], self.groups) and not scattered(gradient, steps)):
            work, runs = taps.weight_gradient(self.short, image, gradient, steps)
            self.sum_up(runs, lambda partial: self.add_work(
                conv_taps.source("taps_weight_gradient", self.short), work, self.call.input(0), self.call.input(1), partial))
            return
        rows, channels = gradient[1] // self.groups, image[1] // self.groups
        columns = channels * taps_of(steps)
        if planes.suits_weights(image, gradient, self.groups, steps):
            per_item = planes.images_of_run(images_of_run(image[0], self.groups), gradient, self.type)
            runs = -(-image[0] // per_item)
            self.sum_up(runs, lambda partial: self.add_work(
                conv_planes.source("planes_weight_gradient", self.short), planes.weight_gradient(
                    self.short, image, gradient, self.groups, steps, per_item), self.call.input(0), self.call.input(1),
                partial, core=False))
            return
        wide = self.panels_of_item(image[0], rows, columns, gradient[3] * gradient[4])
        blocks = -(-columns // (wide * self.tile.columns))
        per_item = images_of_run(image[0], self.groups * blocks)
        numbers = {**steps, "channels": channels, "height": image[3], "width": image[4], "out_height": gradient[3],
                   "out_width": gradient[4], "groups": self.groups, "rows": rows,
                   "panel_rows": gemm.panel_height(rows, self.tile), "blocks": blocks,
                   "columns_per_item": wide * self.tile.columns, "images": image[0], "images_per_item": per_item}
        high, line = gradient[3], min(gradient[4], DEPTH_BLOCK)
        numbers["rows_at_once"] = -(-high // -(-high // (DEPTH_BLOCK // line)))
        numbers["panels_size"] = (wide * numbers["rows_at_once"] * line + self.tile.lanes) * self.tile.columns
        runs = -(-image[0] // per_item)
        work = taps.Work(runs * self.groups * blocks, tuple([numbers[name] for name in conv.WEIGHT_ARGUMENTS]),
                         (numbers["panels_size"],))
        self.sum_up(runs, lambda partial: self.add_work(
            conv.weight_source(self.short), work, self.call.input(1), self.call.input(0), partial))

    def panels_of_item(self, images: int, rows: int, columns: int, positions: int) -> int:
        """How many panels of columns an item of the weights' gradient has: what is read least, of the gradient for each
        block of columns, and of partial results."""
        panels: int = -(-columns // self.tile.columns)
        most = max(PANELS // (self.tile.columns * min(positions, DEPTH_BLOCK)), 1)

        def moved(wide: int) -> int:
            blocks = -(-panels // wide)
            runs = -(-images // images_of_run(images, self.groups * blocks))
            return rows * (blocks * positions * images + 2 * runs * columns * (runs > 1))

        return min((-(-panels // blocks) for blocks in range(-(-panels // most), panels + 1)), key=moved)

    def is_product(self, image: tuple[int, ...], gradient: tuple[int, ...], steps: dict[str, int]) -> bool:
        """Whether the weights' gradient is one product: of patches or of one tap that meets no padding, where so many sums
        are made that copies of both operands cost little, or patches are few."""
        patches = meets_once(image, gradient, steps)
        inside = taps_of(steps) == 1 and all(
            steps[f"shift_{axis}"] == 0 and (count - 1) * steps[f"stride_{axis}"] < size
            for axis, count, size in zip(AXES, gradient[2:], image[2:], strict=True))
        if self.volumes or self.groups > 1 or not (patches or inside):
            return False
        ways = {"product": True, "tap by tap": False, "implicit product": False}
        if self.few_channels():
            del ways["tap by tap"]
        few = (math.prod(image) + math.prod(gradient)) * self.type.dtype.itemsize <= 2 * winograd.CACHE
        usual = (few or self.type.size >= MANY_OF_PATCHES if patches
                 else self.type.size >= MANY and not scattered(gradient, steps))
        return Choice(ALGORITHM, usual_first(ways, usual)).take()

    def product(self, steps: dict[str, int]) -> None:
        """The weights' gradient of one tap, or of patches: the gradient, [rows, positions of all images], times what it
        meets of the image, [channels and taps, positions], turned over; where only short lines of it are met, that is
        [positions, channels]."""
        image, gradient = self.call.inputs
        rows, columns, positions = gradient.shape[1], image.shape[1] * taps_of(steps), gradient.size // gradient.shape[1]
        axes = AXES[5 - len(image.shape):]
        stride = [steps[f"stride_{axis}"] for axis in axes]
        lines = taps_of(steps) > 1 or max(stride) == 1 or SHORT * gradient.shape[-1] > self.tile.lanes

        def meet(x: Value) -> Value:
            if taps_of(steps) > 1:
                around = [size for pair in zip(gradient.shape[2:], stride, strict=True) for size in pair]
                places = range(2, 2 + len(around), 2)
                return permuted(x, (*x.shape[:2], *around), (1, *[k + 1 for k in places], 0, *places))
            stop = [(size - 1) * step + 1 for size, step in zip(gradient.shape[2:], stride, strict=True)]
            inside: Value = REGISTRY["slice"](x, start=(0,) * len(x.shape), stop=(*x.shape[:2], *stop), step=(1, 1, *stride))
            return channels_first(inside) if lines else channels_last(inside)

        met = self.moved(self.call.input(0), image, meet)
        wanted = self.moved(self.call.input(1), gradient, channels_first)
        made = gemm.arrange(gemm.form_for(self.short, self.short), (), rows, columns, positions,
                            Matrices((), positions, 1), Matrices((), 1, positions) if lines else Matrices((), columns, 1))
        left, right = self.packed(made.pack_a, wanted), self.packed(made.pack_b, met)
        self.add(gemm.source(self.short), made.items, left, right, self.call.output(), *made.integers)

    def sum_up(self, runs: int, make: Callable[[Buffer], None]) -> None:
        """The output as the sum of what `runs` runs of images give; `make` launches what makes it."""
        partial = self.call.output() if runs == 1 else self.memory(runs * self.type.size)
        make(partial)
        if runs > 1:
            self.add(conv.add_parts_source(self.short), -(-self.type.size // BLOCK), partial, self.call.output(),
                     self.type.size, runs, BLOCK)

    def input_gradient(self, steps: dict[str, int]) -> None:
        """All at once where channels fill vectors, else phase by phase. The only phase of stride 1 is the result itself."""
        shape, gradient, kernel = volume(self.type.shape), volume(self.call.inputs[0].shape), taps_of(steps)
        strides = steps["stride_z"], steps["stride_y"], steps["stride_x"]
        if self.by_taps(taps.suits(self.short, gradient[1], shape[1], self.groups)
                        and (max(kernel, *strides) > 1 or shape[3] * shape[4] < LARGE)):
            back = {**steps, **{f"{name}_{axis}": value for axis in AXES for name, value in (
                ("stride", 1), ("shift", -steps[f"shift_{axis}"]), ("tap", -steps[f"tap_{axis}"]))}}
            self.add_taps("tap_turned_weights", self.call.input(1), self.call.input(0), self.call.output(), kernel,
                          taps.convolve(self.short, gradient, shape, back, strides), shape[1], gradient[1])
            return
        if meets_once(shape, gradient, steps):
            self.patches(shape, gradient, steps)
            return
        all_phases = list(itertools.product(phases(shape[3], steps, "y"), phases(shape[4], steps, "x")))
        for y, x in all_phases:
            size, exists = (*shape[:3], y.size, x.size), bool(y.taps and x.taps)
            if len(all_phases) == 1 and exists:
                self.phase(y, x, self.call.output(), size)
                continue
            spread = planes.Spread((shape[3], shape[4]), (y.number, x.number), strides[1:])
            if exists and planes.suits(self.short, gradient, size, self.groups, phase_steps(y, x), spread):
                self.phase(y, x, self.call.output(), size, spread)
                continue
            part = self.memory(math.prod(size)) if exists else self.call.input(0)
            if exists:
                self.phase(y, x, part, size)
            self.add(conv.interleave_source(self.short), size[0] * size[1], part, self.call.output(), y.size, x.size,
                     *shape[3:], y.number, x.number, *strides[1:], int(exists))

    def phase(self, y: Phase, x: Phase, result: Buffer, shape: tuple[int, ...], spread: planes.Spread | None = None) -> None:
        self.convolve(self.swapped_weights(y, x), self.call.input(0), volume(self.call.inputs[0].shape), result, shape,
                      phase_steps(y, x), spread)

    def swapped_weights(self, *places: Phase) -> Buffer:
        """The weights of the taps of a phase as [groups, channels, rows, taps]: the left operand of its product."""
        def swap(w: Value) -> Value:
            axes = places[4 - len(w.shape):]
            taps = REGISTRY["slice"](w, start=(0, 0, *[p.first for p in axes]), stop=w.shape,
                                     step=(1, 1, *[p.every for p in axes]))
            shape = (self.groups, w.shape[0] // self.groups, *volume(taps.shape)[1:])
            return permuted(taps, shape, (0, 2, 1, 3, 4, 5))

        return self.moved(self.call.input(1), self.call.inputs[1], swap)

    def patches(self, shape: tuple[int, ...], gradient: tuple[int, ...], steps: dict[str, int]) -> None:
        """The gradient in an image whose positions each meet one tap, as those of patches do: all phases are one product, of
        which the rows are channels and taps, and its results then lie patch by patch."""
        kernel, out, count = (steps["kernel_height"], steps["kernel_width"]), gradient[3:], taps_of(steps)
        weights = self.moved(self.call.input(1), self.call.inputs[1], lambda w: permuted(
            w, (self.groups, w.shape[0] // self.groups, w.shape[1] * count), (0, 2, 1)))
        product = (shape[0], shape[1] * count, 1, *out)
        result = self.memory(math.prod(product))
        self.convolve(weights, self.call.input(0), gradient, result, product, phase_steps(*[ALONE] * 2))
        self.moved(result, self.type.with_shape((*shape[:2], *kernel, *out)),
                   lambda x: permuted(x, x.shape, (0, 1, 4, 2, 5, 3)), self.call.output())

    def moved(self, source: Buffer, type: TensorType, move: Callable[[Value], Value],
              target: Buffer | None = None) -> Buffer:
        """What `move` makes of the elements of `source`, of this type, in `target` or else in memory of its own."""
        builder = GraphBuilder("move")
        with builder:
            body = builder.build([move(builder.input(type))])
        place = target if target is not None else self.memory(body.outputs[0].type.size)
        region = analyse(body, [])
        region.buffers = dict.fromkeys(region.buffers, source)
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region)
        return place


def channels_first(x: Value) -> Value:
    """[N, C, …] as [C, N, …]."""
    return permuted(x, x.shape, (1, 0, *range(2, len(x.shape))))


def channels_last(x: Value) -> Value:
    """[N, C, …] as [N, …, C]."""
    return permuted(x, x.shape, (0, *range(2, len(x.shape)), 1))


def permuted(x: Value, shape: tuple[int, ...], axes: tuple[int, ...]) -> Value:
    """`x` in another shape, and then with other axes."""
    moved: Value = REGISTRY["permute"](REGISTRY["reshape"](x, shape=shape), axes=axes)
    return moved


def result_blocks(numbers: dict[str, int]) -> Blocks:
    """What an item of `conv.convolve` makes of the result, [images, groups * rows, out_height, out_width]."""
    names = ("rows", "groups", "blocks", "columns_per_item", "images", "images_per_item", "out_height", "out_width")
    return Blocks({name: numbers[name] for name in names}, (
        ("first_batch", "item // (blocks * groups) * images_per_item"),
        ("last_batch", "min(first_batch + images_per_item, images)"),
        ("first_row", "item // blocks % groups * rows"),
        ("last_row", "first_row + rows"),
        ("first_column", "item % blocks * columns_per_item"),
        ("last_column", "min(first_column + columns_per_item, out_height * out_width)")), (1, 2),
        planes=(numbers["images_per_item"], numbers["rows"]) if numbers["blocks"] == 1 else None)


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


def images_of_run(images: int, others: int) -> int:
    """Images of one partial result, where there are so many other items for each of them."""
    return -(-images // min(images, -(-ITEMS // others)))


def start(call: Call, kernel: tuple[int, ...]) -> tuple[_Lowering, dict[str, int]] | None:
    """A lowering to be filled, for float32 and float64, if nothing is empty, one channel's taps fit into a panel, and
    volumes are of one group."""
    types = (*call.inputs, *call.outputs)
    fits = math.prod(kernel) <= DEPTH_BLOCK and (len(kernel) < 3 or call.attrs["groups"] == 1)
    if fits and all(t.dtype in (dtypes.float32, dtypes.float64) and t.size for t in types):
        return _Lowering(call), geometry(call, kernel)
    return None


def by_maps(call: Call, kernel: tuple[int, ...], channels: int, rows: int, *, turned: bool = False) -> bool:
    """Whether a convolution of so many channels into so many, or its gradient in the image, is done by Winograd's maps."""
    if not winograd.fits(call, kernel, channels, rows, turned=turned):
        return False
    ways = {"Winograd's maps": True, "tap by tap": False, "implicit product": False}
    if not winograd.suits(call.outputs[0].dtype.short, channels, rows):
        ways = dict(sorted(ways.items(), key=lambda way: way[1]))
    return Choice(ALGORITHM, ways).take()


def lower_convolution(body: Graph, shared: Shared = ()) -> Lowered | None:
    """The launches of a region around a convolution, or its gradient in the image; None when that has no kernel. No output
    may share the memory of an operand of it."""
    if any(v.type.size == 0 for v in body.outputs):
        return Lowered(())
    alone = lower_alone(body)
    return _Region(body, dict(shared), alone=alone).lower() if alone else None


def pools_in_cache(body: Graph) -> bool:
    """Whether the kernel of a region of template "pool" pools planes that are in the cache."""
    alone = lower_alone(body)
    return alone is not None and _Region(body, {}, alone=alone).place_planes() is not None


def lower_alone(body: Graph) -> Lowered | None:
    """The launches of the convolution in there."""
    (node,) = [n for n in body.nodes if n.op.epilogue]
    return lower_call(node)


@dataclass
class _Region(WithEpilogue):
    """A convolution with what follows it. `alone`: the convolution's own launches."""

    alone: Lowered = field(default_factory=lambda: Lowered(()))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.private = self.alone.private

    def made_blocks(self) -> Blocks | None:
        return self.alone.launches[-1].blocks

    def make(self, target: Buffer) -> Launch:
        memory = [*[self.memory[v] for v in self.node.inputs], target]
        memory += [self.new_scratch(nbytes) for nbytes in self.alone.scratch]
        moved = [with_memory(made, memory) for made in self.alone.launches]
        self.launches += moved[:-1]
        return moved[-1]


@lowers("convolution")
def lower_forward(call: Call) -> Lowered | None:
    begun = start(call, call.inputs[1].shape[2:])
    if begun is None:
        return None
    image, weights = call.inputs
    if depthwise.suits(call, image, weights):
        return depthwise.lower(call, "depthwise", image, weights, call.outputs[0])
    if by_maps(call, weights.shape[2:], image.shape[1], weights.shape[0]):
        return winograd.forward(call, 0, winograd.sizes(call, image, call.outputs[0]), turned=False)
    lowering, steps = begun
    lowering.convolve(call.input(1), call.input(0), volume(image.shape), call.output(), volume(call.outputs[0].shape), steps)
    return lowering.lowered()


@lowers("convolution_input_grad")
def lower_input_gradient(call: Call) -> Lowered | None:
    begun = start(call, call.inputs[1].shape[2:])
    if begun is None:
        return None
    gradient, weights = call.inputs
    if depthwise.suits(call, call.outputs[0], weights):
        return depthwise.lower(call, "depthwise_input_gradient", call.outputs[0], weights, gradient)
    if by_maps(call, weights.shape[2:], *weights.shape[:2], turned=True):
        return winograd.forward(call, 0, winograd.sizes(call, gradient, call.outputs[0], turned=True), turned=True)
    lowering, steps = begun
    lowering.input_gradient(steps)
    return lowering.lowered()


@lowers("convolution_weight_grad")
def lower_weight_gradient(call: Call) -> Lowered | None:
    begun = start(call, call.outputs[0].shape[2:])
    if begun is None:
        return None
    image, gradient = call.inputs
    if depthwise.suits(call, image, call.outputs[0]):
        return depthwise.lower(call, "depthwise_weight_gradient", image, call.outputs[0], gradient)
    if by_maps(call, call.outputs[0].shape[2:], image.shape[1], gradient.shape[1]):
        return winograd.weight_gradient(call, winograd.sizes(call, image, gradient))
    lowering, steps = begun
    lowering.weight_gradient(steps)
    return lowering.lowered()
