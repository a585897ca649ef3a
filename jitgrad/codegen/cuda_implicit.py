"""A convolution on a GPU as one matrix product, whose second factor has no memory of its own (`cuda_columns`).

What goes in: the `Geometry` and the type of the operands. What comes out: one launch, made by `Forward`, `InImage` or
`InWeights`; from shared memory the elementwise part takes the product row by row, a row being a channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_columns import Geometry, Ints, Pixels, Planes, Weights
from jitgrad.codegen.cuda_gemm import Scalar, Side, Tensor, Tile, tile_of, write_place
from jitgrad.codegen.cuda_matmul import ENOUGH, Epilogue, is_wide
from jitgrad.codegen.cuda_templates import pack
from jitgrad.codegen.epilogue import locate
from jitgrad.codegen.kernel import Buffer, CudaLaunch, When
from jitgrad.codegen.region import Region
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Axis, Writer
from jitgrad.dtypes import DType
from jitgrad.ir.axes import Index
from jitgrad.kernels.cpu.gemm import Matrices

SLICES = 16
"""A part of the pixels has so many slices, at least."""


@dataclass
class Scratch:
    """Memory that a kernel leaves to the next one: the number of the first such buffer, and their sizes in bytes."""

    first: int
    sizes: list[int] = field(default_factory=list)

    def new(self, nbytes: int) -> Buffer:
        self.sizes.append(max(nbytes, 8))
        return Buffer(self.first + len(self.sizes) - 1)


def pitches(sizes: Ints) -> list[int]:
    """Strides of a dense array."""
    return [math.prod(sizes[k + 1:]) for k in range(len(sizes))]


# ---- one product -------------------------------------------------------------------------------------------------------


@dataclass
class Convolution:
    """One convolution as a matrix product [m, k] @ [k, n] per group, and whatever else blocks are told apart by: `batch`, of
    sizes by name. ``origin`` is the name of the first step of the depth where that is not 0."""

    name: str
    geometry: Geometry
    dtype: DType
    aligned: bool
    tf32: bool = False
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
        large, small = [tile_of(self.dtype, is_large, self.tf32) for is_large in (True, False)]
        return large if self.fills(self.tiles(large)) and self.wastes_little(large, small) else small

    def tiles(self, tile: Tile) -> int:
        """How many of them there are."""
        m, n, _ = self.sizes
        return -(-m // tile.size) * -(-n // tile.columns) * math.prod([size for _, size in self.batch])

    def wastes_little(self, tile: Tile, small: Tile) -> bool:
        """Whether all of these tiles have little more elements than all of the small ones."""
        covered = [self.tiles(tile) * tile.size * tile.columns for tile in (tile, small)]
        return 3 * covered[0] <= 4 * covered[1]

    def fills(self, tiles: int) -> bool:
        """Whether so many tiles give every multiprocessor one."""
        return tiles >= ENOUGH

    def launches(self, region: Region, a: Buffer, b: Buffer, scratch: Scratch) -> list[CudaLaunch]:
        """What makes all outputs of `region`, whose first value is the product of what is in `a` and `b`, weights first
        where there are any; memory that it needs comes from `scratch`."""
        return [self.launch(region, a, b)]

    def launch(self, region: Region, a: Buffer, b: Buffer) -> CudaLaunch:
        """The launch that makes all outputs of `region`, whose first value is the product of what is in `a` and `b`."""
        writer, tile, (m, n, k) = region.writer(), self.tile, self.sizes
        counts = -(-m // tile.size), -(-n // tile.columns)
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
        wide = self.elements >= cuda_templates.WIDE or cuda_templates.is_wide(region.body)
        grid = math.prod([*counts, *[size for _, size in self.batch]])
        return pack(kernel, arguments, grid, tile.threads, self.aligned, wide)

    @property
    def elements(self) -> int:
        """Of the largest operand."""
        return max(map(math.prod, self.geometry.shapes))

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
    def deep(self) -> str:
        """How many steps of the depth a tap has, by name."""
        return "channels"

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
        if self.geometry.is_pointwise:
            return self.planes(writer, "b", buffer, self.geometry.result, False)
        return self.pixels(writer, buffer, self.geometry.result, self.walked(writer, self.geometry.rows), False)

    def walked(self, writer: Writer, channels: int) -> dict[str, Ints]:
        """Sizes of each axis that pixels of the gradient walk by; those that tell which taps a phase meets."""
        geometry = self.geometry
        taps = [-every * dilation // stride for every, dilation, stride in zip(
            self.every, geometry.dilation, geometry.stride, strict=True)]
        sizes = {"out": self.counts, "jump": (1,) * len(taps), "b_tap": tuple(taps)}
        if self.has_phases:
            whole = [max(1, size) for size in geometry.weights[2:]]
            self.axis_sizes(writer, {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation,
                                     "every": self.every, "whole": whole, "image": geometry.image[2:]})
            writer.size("channels", channels)
        else:
            sizes["shift"] = geometry.padding
            self.count_taps(writer)
        return sizes

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
        writer.let("k", " * ".join([self.deep, *[f"found_{axis}" for axis in axes]]))
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

    columns_are_turned = False
    """Whether a column is a tap and a channel, in this order."""

    def __post_init__(self) -> None:
        self.parts = 1
        super().__post_init__()
        m, n, k = self.sizes
        tiles = math.prod([-(-m // self.tile.size), -(-n // self.tile.columns), self.geometry.groups])
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

