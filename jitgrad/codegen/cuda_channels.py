"""Convolutions on a GPU whose operands are brought into an order that tensor cores can be fed from: channels last.

What goes in is what `cuda_implicit` takes. What comes out: launches that turn image and weights (`turn`), then one product
whose depth runs tap by tap (`cuda_taps`). Channels of a group are filled up to a multiple of 16 bytes with zeros. An image
becomes [images, places, groups, channels], weights [rows, taps, channels], for the gradient in the image [channels, taps,
rows]. What is made is as it was, rows first.

`product_of` decides. A product on tensor cores has its operands turned unless they can be copied 16 bytes at a time as they
lie (1x1, over planes that are a multiple of that), or channels are so few that slices would be empty for the most part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar, cast

from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_call import gpu_launch, kernel_text
from jitgrad.codegen.cuda_columns import Geometry, Ints
from jitgrad.codegen.cuda_gemm import SLICE, Side, Tile, flat_tile
from jitgrad.codegen.cuda_implicit import Convolution, Forward, InImage, InWeights, Scratch, pitches
from jitgrad.codegen.cuda_taps import FewChannels, TapColumns, TapPixels, TapWeights
from jitgrad.codegen.kernel import Buffer, CudaLaunch
from jitgrad.codegen.region import Region
from jitgrad.codegen.writer import Writer
from jitgrad.dtypes import DType, float32
from jitgrad.kernels.cuda import movement

Kind = TypeVar("Kind", bound=Convolution)

POSITIONS = 64, 16
"""Of a tile that is turned; the smaller one where a plane is smaller (taps of weights, mostly)."""


@dataclass(frozen=True)
class Turn:
    """[count, planes, positions] to [count, positions, planes filled up to `wanted`]; of every `groups` of `count` the
    planes of a position come behind each other."""

    count: int
    planes: int
    positions: int
    wanted: int
    groups: int = 1

    @property
    def is_nothing(self) -> bool:
        """Whether both are the same memory."""
        return self.positions == 1 and self.wanted == self.planes

    @property
    def elements(self) -> int:
        return self.count * self.positions * self.wanted

    def launch(self, x: Buffer, made: Buffer, dtype: DType, aligned: bool) -> CudaLaunch:
        """The launch that turns what is in `x`."""
        piece = 16 // dtype.itemsize
        across = POSITIONS[self.positions <= POSITIONS[1]]
        lanes = math.gcd(piece, self.positions) if aligned and across > POSITIONS[1] else 1
        bands, strips = -(-self.wanted // (8 * piece)), -(-self.positions // across)
        wide = self.elements >= cuda_templates.WIDE
        source = kernel_text(movement.turn_planes, wide, T=f"i{8 * dtype.itemsize}", LANES=str(lanes), PIECE=str(piece),
                             ACROSS=str(across))
        sizes = self.planes, self.positions, self.wanted, self.groups, bands, strips
        return gpu_launch(source, self.count * bands * strips, x, made, *sizes, wide=wide,
                          alignment=16 if aligned else dtype.itemsize)


def digits(number: int, sizes: Ints) -> list[int]:
    """The digits of a number, of which all but the first are below their `sizes`."""
    return [number // pitch % (size if k else number + 1)
            for k, (pitch, size) in enumerate(zip(pitches(sizes), sizes, strict=True))]


@dataclass
class Turned(Convolution):
    """What convolutions in this order have in common."""

    @property
    def lanes(self) -> int:
        return 16 // self.dtype.itemsize

    def filled(self, channels: int) -> int:
        """As many channels as are stored for so many."""
        return -(-channels // self.lanes) * self.lanes

    def steps(self, channels: int) -> int:
        """Steps of the depth that a tap has for so many channels: whole slices."""
        depth = SLICE // self.dtype.itemsize
        return -(-channels // depth) * depth

    def choose_tile(self) -> Tile:
        """A flat one where a large one would be half empty, and every multiprocessor has two of them."""
        chosen, flat = super().choose_tile(), flat_tile(self.dtype)
        is_better = chosen.size == flat.size and self.wastes_little(flat, chosen) and self.fills(self.tiles(flat) // 2)
        return flat if is_better else chosen

    def images(self, shape: Ints) -> Turn:
        """How images of that shape are turned."""
        groups, channels = self.geometry.groups, shape[1] // self.geometry.groups
        return Turn(shape[0] * groups, channels, math.prod(shape[2:]), self.filled(channels), groups)

    def turns(self) -> tuple[Turn | None, Turn | None]:
        """How the two factors are turned, if they are."""
        raise NotImplementedError

    def launches(self, region: Region, a: Buffer, b: Buffer, scratch: Scratch) -> list[CudaLaunch]:
        made, places = list[CudaLaunch](), [a, b]
        for k, turn in enumerate(self.turns()):
            if turn is not None and not (turn.is_nothing and self.aligned):
                place = scratch.new(turn.elements * self.dtype.itemsize)
                made.append(turn.launch(places[k], place, self.dtype, self.aligned))
                places[k] = place
        return [*made, self.launch(region, *places)]

    @property
    def elements(self) -> int:
        return max(super().elements, *[turn.elements for turn in self.turns() if turn is not None])

    def place_sizes(self, writer: Writer, shape: Ints, sizes: dict[str, Ints]) -> None:
        """Sizes of turned images of that shape, along each axis; `sizes`: others."""
        apart = self.geometry.groups * self.filled(shape[1] // self.geometry.groups)
        writer.size("positions", math.prod(sizes["out"]))
        places = [apart * pitch for pitch in pitches(shape[2:])]
        self.axis_sizes(writer, {"b_size": shape[2:], "b_pitch": places, **sizes})

    def turned_images(self, writer: Writer, name: str, buffer: Buffer, shape: Ints) -> str:
        """The pointer to turned images."""
        channels = self.filled(shape[1] // self.geometry.groups)
        whole = math.prod(shape[2:]) * self.geometry.groups * channels
        return self.operand(writer, name, buffer, channels, image=whole)

    def turned_weights(self, writer: Writer, buffer: Buffer, rows: int, channels: int) -> Side:
        """The first factor: `rows` of a group, for each tap so many channels."""
        taps, filled = max(1, self.geometry.taps), self.filled(channels)
        pointer = self.operand(writer, "a", buffer, rows * taps * filled, outer=taps * filled)
        kernel = self.geometry.weights[2:]
        self.axis_sizes(writer, {"a_pitch": [filled * pitch for pitch in pitches(kernel)]})
        return TapWeights("a", pointer, self.dtype, True, True)

    def forward_sizes(self) -> dict[str, Ints]:
        """Sizes of each axis by which the pixels of a result walk over an image."""
        geometry = self.geometry
        return {"out": geometry.result[2:], "jump": geometry.stride, "shift": tuple([-low for low in geometry.padding]),
                "b_tap": geometry.dilation}


class TurnedForward(Turned, Forward):
    """The convolution. Where channels do not fill slices, these run on over the next taps."""

    @property
    def fills_slices(self) -> bool:
        channels = self.filled(self.geometry.channels)
        return 8 * self.steps(channels) <= 9 * channels

    def product_sizes(self) -> tuple[int, int, int]:
        m, n, _ = Forward.product_sizes(self)
        channels = self.geometry.channels
        return m, n, self.geometry.taps * (self.steps(channels) if self.fills_slices else self.filled(channels))

    def turns(self) -> tuple[Turn | None, Turn | None]:
        geometry = self.geometry
        weights = Turn(geometry.weights[0], geometry.channels, geometry.taps, self.filled(geometry.channels))
        return weights, self.images(geometry.image)

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        axes, (m, _, k) = len(self.geometry.axes), self.sizes
        if not self.fills_slices:
            return Side("a", self.operand(writer, "a", buffer, m * k, outer=k, step=1), self.dtype, True, True)
        self.axis_sizes(writer, {"a_at": (0,) * axes, "a_tap": (1,) * axes})
        return self.turned_weights(writer, buffer, self.geometry.rows, self.geometry.channels)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        pointer, axes = self.turned_images(writer, "b", buffer, self.geometry.image), self.geometry.axes
        channels, kernel = self.filled(self.geometry.channels), self.geometry.weights[2:]
        writer.size("channels", channels)
        self.count_taps(writer)
        self.place_sizes(writer, self.geometry.image, self.forward_sizes())
        if self.fills_slices:
            return TapPixels("b", pointer, self.dtype, True, True, axes)
        taps = self.tile.depth // channels
        writer.size("chan_move", self.tile.depth % channels)
        self.axis_sizes(writer, {"digit_move": digits(taps, kernel)})
        return FewChannels("b", pointer, self.dtype, True, True, axes)


class TurnedInImage(Turned, InImage):
    """The gradient in the image."""

    def product_sizes(self) -> tuple[int, int, int]:
        m, n, _ = InImage.product_sizes(self)
        return m, n, self.geometry.taps * self.steps(self.geometry.rows)

    @property
    def deep(self) -> str:
        return "tap_steps"

    def turns(self) -> tuple[Turn | None, Turn | None]:
        geometry = self.geometry
        weights = Turn(geometry.groups, geometry.rows, geometry.channels * geometry.taps, self.filled(geometry.rows))
        return weights, self.images(geometry.result)

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        self.axis_sizes(writer, {"a_tap": self.every})
        if not self.has_phases:
            self.axis_sizes(writer, {"a_at": (0,) * len(self.every)})
        return self.turned_weights(writer, buffer, self.geometry.channels, self.geometry.rows)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        rows = self.geometry.rows
        pointer = self.turned_images(writer, "b", buffer, self.geometry.result)
        sizes = self.walked(writer, self.filled(rows))
        writer.size("channels", self.filled(rows))
        if self.has_phases:
            writer.size("tap_steps", self.steps(rows))
        self.place_sizes(writer, self.geometry.result, sizes)
        return TapPixels("b", pointer, self.dtype, True, True, self.geometry.axes)


class TurnedInWeights(Turned, InWeights):
    """The gradient in the weights, as [rows, taps, channels]. The gradient of the result stays as it is where its pixels can
    be read 16 bytes at a time."""

    columns_are_turned = True

    def product_sizes(self) -> tuple[int, int, int]:
        m, _, k = InWeights.product_sizes(self)
        return m, self.geometry.taps * self.filled(self.geometry.channels), k

    def turns(self) -> tuple[Turn | None, Turn | None]:
        gradient = None if self.reads_planes(self.geometry.result) else self.images(self.geometry.result)
        return gradient, self.images(self.geometry.image)

    def reads_planes(self, shape: Ints) -> bool:
        return self.aligned and math.prod(shape[2:]) % self.lanes == 0

    def first_side(self, writer: Writer, buffer: Buffer) -> Side:
        if self.reads_planes(self.geometry.result):
            return super().first_side(writer, buffer)
        if self.origin:
            writer.size("length", self.part)
        pointer, rows = self.turned_images(writer, "a", buffer, self.geometry.result), self.filled(self.geometry.rows)
        writer.size("a_outer", 1)
        writer.size("a_step", self.geometry.groups * rows)
        return Side("a", pointer, self.dtype, False, True)

    def second_side(self, writer: Writer, buffer: Buffer) -> Side:
        geometry, depth = self.geometry, self.tile.depth
        pointer = self.turned_images(writer, "b", buffer, geometry.image)
        writer.size("channels", self.filled(geometry.channels))
        self.count_taps(writer)
        sizes, out = self.forward_sizes(), geometry.result[2:]
        self.place_sizes(writer, geometry.image, sizes)
        self.axis_sizes(writer, {
            "move": [move * jump for move, jump in zip(digits(depth % math.prod(out), out), sizes["jump"], strict=True)],
            "span": [size * jump for size, jump in zip(out, sizes["jump"], strict=True)],
            "stop": [size * jump + shift for size, jump, shift in zip(out, sizes["jump"], sizes["shift"], strict=True)]})
        writer.size("move_image", depth // math.prod(out) * self.image_elements)
        return TapColumns("b", pointer, self.dtype, False, True, geometry.axes, self.origin)

    @property
    def image_elements(self) -> int:
        """Of one turned image."""
        turn = self.images(self.geometry.image)
        return turn.positions * turn.groups * turn.wanted


TURNED: dict[type[Convolution], type[Turned]] = {
    Forward: TurnedForward, InImage: TurnedInImage, InWeights: TurnedInWeights}


def product_of(kind: type[Kind], name: str, geometry: Geometry, dtype: DType, aligned: bool, tf32: bool) -> Kind:
    """The convolution of that kind, with its operands turned where that is better. `tf32`: float32 may be rounded to
    TF32."""
    tf32 = tf32 and dtype is float32
    made = cast(type[Kind], TURNED[kind]) if suits(kind, geometry, dtype, aligned, tf32) else kind
    return made(name, geometry, dtype, aligned, tf32)


def suits(kind: type[Convolution], geometry: Geometry, dtype: DType, aligned: bool, tf32: bool) -> bool:
    """Whether operands are turned: at most two thirds of what is multiplied then would be zeros that fill up channels, and a
    third in the gradient in the image, where they fill up slices."""
    if not (tf32 or dtype.itemsize == 2):
        return False
    planes = math.prod(geometry.result[2:])
    if geometry.is_pointwise and aligned and planes * dtype.itemsize % 16 == 0:
        return False
    if kind is InImage:
        step = SLICE // dtype.itemsize
        return 2 * -(-geometry.rows // step) * step <= 3 * geometry.rows
    lanes = 16 // dtype.itemsize
    return -(-geometry.channels // lanes) * lanes <= 3 * geometry.channels
