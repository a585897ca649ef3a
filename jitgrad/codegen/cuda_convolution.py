"""Convolutions on a GPU: the template "convolution" (a convolution, or its gradient in the image, with the elementwise ops
that follow it), and the gradient in the weights.

What goes in is what `codegen.convolution` takes, images of one, two or three dimensions. What comes out: one launch, a
matrix product whose second factor has no memory of its own (`cuda_columns`); from shared memory the elementwise part takes
it row by row, a row being a channel. Where a group has so few channels that most of a tile would be empty, threads compute
elements one by one instead (`cuda_elements`).

    convolution     [rows, channels * taps] @ [channels * taps, pixels]     per group
    in the image    [channels, rows * taps] @ [rows * taps, pixels]         per group, and per phase of a stride
    in the weights  [rows, pixels] @ [pixels, channels * taps]              per group, and per part of the pixels

With a stride the pixels of an image fall into phases, which meet different taps: a block belongs to one phase, so that none
multiplies with zeros. The sum over all pixels is cut into parts where there are too few tiles for all multiprocessors; a
second launch adds up the parts in order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jitgrad import ops
from jitgrad.codegen import cuda_elements, cuda_templates
from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import lowers_on_gpu
from jitgrad.codegen.cuda_columns import Geometry, Ints, Pixels, Planes, Weights
from jitgrad.codegen.cuda_gemm import Scalar, Side, Tensor, Tile, tile_of, write_place
from jitgrad.codegen.cuda_matmul import ENOUGH, Epilogue, is_wide
from jitgrad.codegen.cuda_reduce import lower_row
from jitgrad.codegen.cuda_templates import pack
from jitgrad.codegen.epilogue import Shared, locate, split_epilogue
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered, When
from jitgrad.codegen.region import Region, analyse
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Axis, Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.errors import CompileError, complain
from jitgrad.ir.axes import Index
from jitgrad.ir.graph import Graph, GraphBuilder, Node
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu.gemm import Matrices

FEW = 8
"""With fewer rows than this in a group, a tile would be empty for the most part."""

SLICES = 16
"""A part of the pixels has so many slices, at least."""


def pitches(sizes: Ints) -> list[int]:
    """Strides of a dense array."""
    return [math.prod(sizes[k + 1:]) for k in range(len(sizes))]


# ---- what is launched --------------------------------------------------------------------------------------------------


@lowers_on_gpu("convolution")
@lowers_on_gpu("convolution_input_grad")
def lower_alone(call: Call, aligned: bool) -> CudaLowered:
    """One of the two by itself."""
    name = "convolution_input_grad" if "input_shape" in call.attrs else "convolution"
    require_floats(name, call.inputs[0].dtype)
    if min(t.size for t in call.inputs) == 0:
        return zeros(call.outputs[0], aligned)
    builder = GraphBuilder(name)
    operands = tuple([builder.input(t) for t in call.inputs])
    return lower_convolution(builder.build([builder.run(REGISTRY[name], operands, dict(call.attrs))]), (), aligned)


def lower_convolution(body: Graph, shared: Shared, aligned: bool) -> CudaLowered:
    """The launch of a region around a convolution, or its gradient in the image. No output may share the memory of an
    operand of it. CompileError where the operands are no floats."""
    if any(v.type.size == 0 for v in body.outputs):
        return CudaLowered(())
    (node,) = [n for n in body.nodes if n.op.epilogue]
    forward, (source, weights), result = node.op.name == "convolution", node.inputs, node.output
    require_floats(node.op.name, result.dtype)
    if min(v.type.size for v in node.inputs) == 0:
        raise complain(CompileError, node.op.name, "there is no GPU kernel for a sum of nothing with what follows it")
    image, made = (source, result) if forward else (result, source)
    geometry = Geometry.of(image.shape, weights.shape, made.shape, node.attrs)
    region = what_follows(body, node, shared)
    buffers = [Buffer(body.inputs.index(v)) for v in node.inputs]
    if min(result.shape[1] // geometry.groups, geometry.rows if forward else FEW) < FEW:
        launch = cuda_elements.lower_elements(region, geometry, node.op.name, buffers, aligned)
    else:
        product = (Forward if forward else InImage)(node.op.name, geometry, node.inputs[0].dtype, aligned)
        launch = product.launch(region, buffers[1], buffers[0])
    return CudaLowered((launch,))


def what_follows(body: Graph, node: Node, shared: Shared) -> Region:
    """The elementwise part of a region around a convolution, without memory for its first operand, what `node` makes."""
    epilogue, home = split_epilogue(body, node), dict(shared)
    region = analyse(epilogue, [])
    region.buffers = {v: Buffer(k) for k, v in enumerate(epilogue.inputs[1:])}
    region.outputs = [(v, index, Buffer(home.get(k, len(body.inputs) + k)))
                      for k, (v, index, _) in enumerate(region.outputs)]
    return region


@lowers_on_gpu("convolution_weight_grad")
def lower_weights(call: Call, aligned: bool) -> CudaLowered:
    """The gradient in the weights: of all pixels at once, or of parts of them and then their sum."""
    (image, gradient), result = call.inputs, call.outputs[0]
    require_floats("convolution_weight_grad", image.dtype)
    if min(t.size for t in call.inputs) == 0:
        return zeros(result, aligned)
    if result.size == 0:
        return CudaLowered(())
    geometry = Geometry.of(image.shape, result.shape, gradient.shape, call.attrs)
    if geometry.rows < FEW:
        operands = [Buffer(0), Buffer(1)]
        return CudaLowered((cuda_elements.lower_weights(geometry, result.dtype, operands, Buffer(2), aligned),))
    product = InWeights("convolution_weight_grad", geometry, image.dtype, aligned)
    if product.parts == 1:
        return CudaLowered((product.launch(stored(result, Buffer(2)), Buffer(1), Buffer(0)),))
    partial = TensorType(product.tile.sum_dtype, (product.parts, result.shape[0], result.size // result.shape[0]))
    return CudaLowered((product.launch(stored(partial, Buffer(3)), Buffer(1), Buffer(0)),
                        add_parts(partial, Buffer(3), result, Buffer(2), aligned)), (partial.nbytes,))


def require_floats(name: str, dtype: DType) -> None:
    if not dtype.is_floating_point:
        raise complain(CompileError, name, f"there is no GPU kernel for {dtype.name}", fix="keep this part on the CPU")


def zeros(result: TensorType, aligned: bool) -> CudaLowered:
    """A sum of no parts, behind two operands."""
    if result.size == 0:
        return CudaLowered(())
    nothing = TensorType(compute_dtype(result.dtype), (0, result.size))
    return CudaLowered((add_parts(nothing, Buffer(0), result, Buffer(2), aligned),))


def stored(type: TensorType, buffer: Buffer) -> Region:
    """A region that stores a product as it is."""
    builder = GraphBuilder("store")
    region = analyse(builder.build([builder.input(type)]), [])
    region.buffers = {}
    region.outputs = [(v, index, buffer) for v, index, _ in region.outputs]
    return region


def add_parts(partial: TensorType, parts: Buffer, result: TensorType, buffer: Buffer, aligned: bool) -> CudaLaunch:
    """The sum over the first dimension of `partial`, by a thread per element."""
    builder = GraphBuilder("sum")
    flat = TensorType(partial.dtype, (partial.shape[0], result.size))
    with builder:
        total = ops.sum(builder.input(flat), axes=(0,))
        total = total if total.dtype is result.dtype else ops.cast(total, dtype=result.dtype)
    region = analyse(builder.build([total]), [])
    region.buffers = dict.fromkeys(region.buffers, parts)
    region.outputs = [(v, index, buffer) for v, index, _ in region.outputs]
    (launch,) = lower_row(region, aligned)
    return launch


# ---- one product -------------------------------------------------------------------------------------------------------


@dataclass
class Convolution:
    """One convolution as a matrix product [m, k] @ [k, n] per group, and whatever else blocks are told apart by: `batch`, of
    sizes by name. ``origin`` is the name of the first step of the depth where that is not 0."""

    name: str
    geometry: Geometry
    dtype: DType
    aligned: bool
    origin = ""

    def __post_init__(self) -> None:
        self.sizes = self.product_sizes()
        self.batch = [(name, size) for name, size in (*self.cuts(), ("group", self.geometry.groups)) if size > 1]
        self.tile = self.choose_tile()

    def product_sizes(self) -> tuple[int, int, int]:
        """m, n and k."""
        raise NotImplementedError

    def cuts(self) -> list[tuple[str, int]]:
        """What blocks are told apart by besides group and tile, and how many there are of it."""
        return []

    def choose_tile(self) -> Tile:
        """A large one where there are enough of them, and it is not empty for the most part."""
        large, small = tile_of(self.dtype, True), tile_of(self.dtype, False)
        (m, n, _), many = self.sizes, math.prod([size for _, size in self.batch])
        covered = [many * math.prod([-(-size // tile.size) * tile.size for size in (m, n)]) for tile in (large, small)]
        return large if self.fills(covered[0] // large.size ** 2) and 3 * covered[0] <= 4 * covered[1] else small

    def fills(self, tiles: int) -> bool:
        """Whether so many tiles give every multiprocessor one."""
        return tiles >= ENOUGH

    def launch(self, region: Region, a: Buffer, b: Buffer) -> CudaLaunch:
        """The launch that makes all outputs of `region`, whose first value is the product of what is in `a` and `b`."""
        writer, tile, (m, n, k) = region.writer(), self.tile, self.sizes
        counts = -(-m // tile.size), -(-n // tile.size)
        sides = self.first_side(writer, a), self.second_side(writer, b)
        named = {"m": m, "n": n, self.depth: k, "row_tiles": counts[0], "column_tiles": counts[1],
                 **{f"size_{d}": size for d, (_, size) in enumerate(self.batch)}}
        for name, value in named.items():
            writer.size(name, value)
        write_place(writer, tile, len(self.batch))
        self.prepare(writer)
        made = (Tensor if tile.on_tensor_cores else Scalar)(writer, tile, *sides, self.origin)
        made.write()
        self.epilogue(writer, region, made).write()
        kernel, arguments = writer.kernel(f"{self.name}_{kernel_name(region.body).removeprefix('fused_')}")
        wide = max(map(math.prod, self.geometry.shapes)) >= cuda_templates.WIDE
        wide = wide or any(v.type.size >= cuda_templates.WIDE for v in (*region.body.inputs, *region.body.outputs))
        grid = math.prod([*counts, *[size for _, size in self.batch]])
        return pack(kernel, arguments, grid, tile.threads, self.aligned, wide)

    @property
    def depth(self) -> str:
        """The name of the size of the depth."""
        return "k"

    def prepare(self, writer: Writer) -> None:
        """What the sides need to know besides sizes."""

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        raise NotImplementedError

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        raise NotImplementedError

    def epilogue(self, writer: Writer, region: Region, made: Scalar | Tensor) -> Epilogue:
        """A row is a channel; the numbers of images and the places in them are columns."""
        index = region.index_of(region.body.inputs[0])
        return Epilogue(writer, region, made, region.body.inputs[0], [(*self.channel(), (index[1],))],
                        (index[0], *index[2:]), self.aligned)

    def channel(self) -> tuple[str, str]:
        """The name of the number of a row among all groups, and what it is."""
        numbers = {name: k for k, (name, _) in enumerate(self.batch)}
        return ("channel", f"batch_{numbers['group']} * m + row") if "group" in numbers else ("row", "")

    # ---- what sides have in common

    def operand(self, writer: Writer, name: str, buffer: Buffer, group: int, **sizes: int) -> str:
        """The name of the pointer to a factor, whose groups are `group` elements apart; its sizes."""
        pointer = writer.operand(buffer, self.dtype, self.dtype.short)
        for k, (cut, _) in enumerate(self.batch):
            writer.size(f"{name}_{k}", group if cut == "group" else 0)
        for key, size in {"first": 0, **sizes}.items():
            writer.size(f"{name}_{key}", size)
        return pointer

    def strided(self, writer: Writer, buffer: Buffer, matrices: Matrices, along_depth: bool) -> Side:
        """The weights as a matrix, the first factor."""
        pointer = self.operand(writer, "a", buffer, matrices.batch[0], outer=matrices.row, step=matrices.column)
        wide = self.aligned and is_wide(self.tile, along_depth, matrices, (self.sizes[0], self.sizes[2]))
        return Side("a", pointer, self.dtype, along_depth, wide)

    def planes(self, writer: Writer, name: str, buffer: Buffer, shape: Ints, pixels_deep: bool) -> Side:
        """Images of that shape as a factor in which a pixel meets itself; `pixels_deep`: the depth numbers pixels."""
        positions, channels = math.prod(shape[2:]), shape[1] // self.geometry.groups
        pointer = self.operand(writer, name, buffer, channels * positions, image=shape[1] * positions)
        writer.size("positions", positions)
        if self.aligned and positions % self.tile.lanes == 0:
            writer.size(f"{name}_{'outer' if pixels_deep else 'step'}", positions)
            return Planes(name, pointer, self.dtype, pixels_deep, True)
        writer.size(f"{name}_plane", positions)
        writer.size(f"{name}_channels", channels)
        return Pixels(name, pointer, self.dtype, not pixels_deep, False)

    def pixels(self, writer: Writer, buffer: Buffer, shape: Ints, taps: Mapping[str, Ints], pixels_deep: bool) -> Side:
        """Images of that shape as the second factor; `taps`: sizes that each axis has one of."""
        plane, channels = math.prod(shape[2:]), shape[1] // self.geometry.groups
        pointer = self.operand(writer, "b", buffer, channels * plane, image=shape[1] * plane, plane=plane, channels=channels)
        writer.size("positions", math.prod(taps["out"]))
        self.axis_sizes(writer, {"b_size": shape[2:], "b_pitch": pitches(shape[2:]), **taps})
        return Pixels("b", pointer, self.dtype, not pixels_deep, False, self.geometry.axes)

    def axis_sizes(self, writer: Writer, sizes: Mapping[str, Ints | list[int]]) -> None:
        for name, values in sizes.items():
            for axis, value in zip(self.geometry.axes, values, strict=True):
                writer.size(f"{name}_{axis}", value)

    def count_taps(self, writer: Writer) -> None:
        """The bounds of the digits of a tap."""
        writer.size("taps", max(1, self.geometry.taps))
        self.axis_sizes(writer, {"kernel": [max(1, size) for size in self.geometry.weights[2:]]})

    def columns(self, writer: Writer, buffer: Buffer, pixels_deep: bool) -> Side:
        """The second factor of the convolution itself."""
        geometry = self.geometry
        if geometry.is_pointwise:
            return self.planes(writer, "b", buffer, geometry.image, pixels_deep)
        self.count_taps(writer)
        return self.pixels(writer, buffer, geometry.image, {
            "out": geometry.result[2:], "jump": geometry.stride, "shift": tuple([-low for low in geometry.padding]),
            "b_tap": geometry.dilation}, pixels_deep)


class Forward(Convolution):
    """The convolution."""

    def product_sizes(self) -> tuple[int, int, int]:
        geometry = self.geometry
        return (geometry.rows, geometry.result[0] * math.prod(geometry.result[2:]), geometry.channels * geometry.taps)

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        m, _, k = self.sizes
        return self.strided(writer, buffer, Matrices((m * k,), k, 1), True)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        return self.columns(writer, buffer, False)


# ---- the gradient in the image -----------------------------------------------------------------------------------------


class InImage(Convolution):
    """The gradient in the image: pixel q meets tap t at place (q + padding - t * dilation) / stride, where that is whole.
    With a stride, phase number r has the pixels q = r + stride * i; of its taps each `every`th can be met."""

    @property
    def has_phases(self) -> bool:
        return max(self.geometry.stride) > 1

    @property
    def counts(self) -> Ints:
        """Pixels of a phase along each axis, at most."""
        geometry = self.geometry
        return tuple([-(-size // stride) for size, stride in zip(geometry.image[2:], geometry.stride, strict=True)])

    @property
    def every(self) -> Ints:
        geometry = self.geometry
        return tuple([stride // math.gcd(stride, dilation)
                      for stride, dilation in zip(geometry.stride, geometry.dilation, strict=True)])

    def product_sizes(self) -> tuple[int, int, int]:
        geometry = self.geometry
        return geometry.channels, geometry.image[0] * math.prod(self.counts), geometry.rows * geometry.taps

    def cuts(self) -> list[tuple[str, int]]:
        return [("phase", math.prod(self.geometry.stride))]

    @property
    def depth(self) -> str:
        return "steps" if self.has_phases else "k"

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        geometry = self.geometry
        if geometry.taps == 1:
            return self.strided(writer, buffer, Matrices((geometry.rows * geometry.channels,), 1, geometry.channels), False)
        sizes = {"outer": geometry.taps, "plane": geometry.channels * geometry.taps, "channels": geometry.rows}
        pointer = self.operand(writer, "a", buffer, geometry.rows * geometry.channels * geometry.taps, **sizes)
        kernel = geometry.weights[2:]
        self.axis_sizes(writer, {"a_size": kernel, "a_pitch": pitches(kernel), "a_tap": self.every})
        if not self.has_phases:
            self.axis_sizes(writer, {"a_at": (0,) * len(kernel)})
        return Weights("a", pointer, self.dtype, True, False, geometry.axes)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        geometry = self.geometry
        if geometry.is_pointwise:
            return self.planes(writer, "b", buffer, geometry.result, False)
        taps = [-every * dilation // stride for every, dilation, stride in zip(
            self.every, geometry.dilation, geometry.stride, strict=True)]
        sizes = {"out": self.counts, "jump": (1,) * len(taps), "b_tap": tuple(taps)}
        if self.has_phases:
            whole = [max(1, size) for size in geometry.weights[2:]]
            self.axis_sizes(writer, {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation,
                                     "every": self.every, "whole": whole, "image": geometry.image[2:]})
            writer.size("channels", geometry.rows)
        else:
            sizes["shift"] = geometry.padding
            self.count_taps(writer)
        return self.pixels(writer, buffer, geometry.result, sizes, False)

    def prepare(self, writer: Writer) -> None:
        """Of the block's phase: which taps it meets, and where. Division is of numbers that are not negative: a multiple of
        the stride is added."""
        if not self.has_phases:
            return
        rest = "batch_0"
        for k, axis in reversed(list(enumerate(self.geometry.axes))):
            writer.let(f"number_{axis}", f"{rest} % stride_{axis}" if k else rest)
            rest = f"{rest} // stride_{axis}"
            for name in ("found", "a_at", "shift"):
                writer.let(f"{name}_{axis}", "0")
            writer.open("tap", "0", f"min(every_{axis}, whole_{axis})")
            writer.let("reach", f"number_{axis} + padding_{axis} + tap * dilation_{axis} * (stride_{axis} - 1)")
            writer.let("left", f"reach % stride_{axis}")
            writer.enter(When("left == 0"))
            writer.let(f"found_{axis}", f"(whole_{axis} - tap + every_{axis} - 1) // every_{axis}")
            writer.let(f"a_at_{axis}", "tap")
            writer.let(f"shift_{axis}", f"reach // stride_{axis} - tap * dilation_{axis}")
            writer.close(2)
            writer.let(f"kernel_{axis}", f"max(1, found_{axis})")
        axes = self.geometry.axes
        writer.let("k", " * ".join(["channels", *[f"found_{axis}" for axis in axes]]))
        writer.let("taps", " * ".join([f"kernel_{axis}" for axis in axes]))

    def epilogue(self, writer: Writer, region: Region, made: Scalar | Tensor) -> Epilogue:
        if not self.has_phases:
            return super().epilogue(writer, region, made)
        index = region.index_of(region.body.inputs[0])
        return PhaseEpilogue(writer, region, made, region.body.inputs[0], [(*self.channel(), (index[1],))], (), self.aligned,
                             self.geometry.axes, (index[0], *index[2:]))


@dataclass
class PhaseEpilogue(Epilogue):
    """What follows, where the pixels of a phase lie a stride apart. `index`: of the image, and along each axis."""

    axes: tuple[str, ...]
    index: Index

    def locate_columns(self, axes: list[Axis]) -> Axis | None:
        writer, rest = self.writer, "start"
        for axis in reversed(self.axes):
            writer.let(f"place_{axis}", f"{rest} % out_{axis} * stride_{axis} + number_{axis}")
            rest = f"{rest} // out_{axis}"
        writer.let("picture", rest)
        writer.enter(When(" and ".join([f"place_{axis} < image_{axis}" for axis in self.axes])))
        for name, place in zip(("picture", *[f"place_{axis}" for axis in self.axes]), self.index, strict=True):
            if atoms := self.region.axes.flat((place,)):
                locate(writer, self.region, name, atoms)
        return None


# ---- the gradient in the weights ---------------------------------------------------------------------------------------


class InWeights(Convolution):
    """The gradient in the weights. A part has the pixels from ``begin`` on, up to the next part's."""

    def __post_init__(self) -> None:
        self.parts = 1
        super().__post_init__()
        m, n, k = self.sizes
        tiles = math.prod([-(-m // self.tile.size), -(-n // self.tile.size), self.geometry.groups])
        slices = -(-k // self.tile.depth)
        wanted = max(1, min(-(-2 * ENOUGH // tiles), slices // SLICES))
        self.part = -(-slices // wanted) * self.tile.depth
        self.parts = max(1, -(-k // self.part))
        if self.parts > 1:
            self.origin = "begin"
            self.batch = [("part", self.parts), *self.batch]

    def product_sizes(self) -> tuple[int, int, int]:
        geometry = self.geometry
        return geometry.rows, geometry.channels * geometry.taps, geometry.result[0] * math.prod(geometry.result[2:])

    def fills(self, tiles: int) -> bool:
        """There are as many blocks as there are parts of the pixels for."""
        return True

    @property
    def depth(self) -> str:
        return "pixels" if self.origin else "k"

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        if self.origin:
            writer.size("length", self.part)
        return self.planes(writer, "a", buffer, self.geometry.result, True)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        return self.columns(writer, buffer, True)

    def prepare(self, writer: Writer) -> None:
        if self.origin:
            writer.let("begin", "batch_0 * length")
            writer.let("k", "min(pixels, begin + length)")

    def epilogue(self, writer: Writer, region: Region, made: Scalar | Tensor) -> Epilogue:
        index = region.index_of(region.body.inputs[0])
        before = [("batch_0", "", (index[0],))] if self.origin else []
        row, *columns = index[1:] if self.origin else index
        return Epilogue(writer, region, made, region.body.inputs[0], [*before, (*self.channel(), (row,))], tuple(columns),
                        self.aligned)

