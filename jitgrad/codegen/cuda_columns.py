"""Factors of the matrix product that a convolution is, on a GPU: where their pieces lie, computed on the fly.

What goes in: names of sizes that the kernel knows. What comes out: sides of `cuda_gemm.Loops`. A convolution multiplies
the weights with *columns*: a column belongs to a pixel (of all images) and has an element for every tap of every channel.
No column is ever in memory. A thread fetches neighbours of a column of one pixel; threads beside each other have pixels
beside each other, so that they read neighbours of a row of an image. Taps are counted up, not divided out (`gather`).
Where tensor cores multiply, operands are turned and read otherwise (`cuda_taps`), unless there are very few channels.

In here a tap is a number of digits, one for each of `axes`, the last ones of "zyx"; ``kernel_z, kernel_y, kernel_x`` are
their bounds, ``taps`` their product. Element (channel, tap) of a line lies at

    base + channel * plane + sum over axes of (at + digit * tap) * pitch

where ``base`` and ``at`` belong to the line; it is 0 where the sum in brackets, the place along an axis, is not below
``size``, or where there is no such channel. Sizes have the name of the side in front: ``b_plane``, ``b_tap_y`` ….
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jitgrad.codegen.cuda_gemm import Side, Tile
from jitgrad.codegen.kernel import Let
from jitgrad.codegen.writer import Writer
from jitgrad.dtypes import DType

AXES = ("z", "y", "x")

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """One convolution: shapes of its image, its weights and its result, in whatever direction it is computed."""

    image: Ints
    weights: Ints
    result: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @staticmethod
    def of(image: Ints, weights: Ints, result: Ints, attrs: Mapping[str, Any]) -> Geometry:
        return Geometry(image, weights, result, attrs["stride"], tuple([low for low, _ in attrs["padding"]]),
                        attrs["dilation"], attrs["groups"])

    @property
    def axes(self) -> tuple[str, ...]:
        return AXES[5 - len(self.image):]

    @property
    def rows(self) -> int:
        """Channels of the result in a group."""
        return self.result[1] // self.groups

    @property
    def channels(self) -> int:
        """Channels of the image in a group."""
        return self.image[1] // self.groups

    @property
    def taps(self) -> int:
        return math.prod(self.weights[2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether pixels of image and result are the same, and each meets only itself."""
        return self.taps == 1 and self.image[2:] == self.result[2:] and max(self.stride) == 1 and not any(self.padding)

    @property
    def shapes(self) -> tuple[Ints, ...]:
        return self.image, self.weights, self.result


@dataclass(frozen=True)
class Planes(Side):
    """Images [count, channels, positions] whose pixels, ``positions`` in each, are numbered through by the depth, or else by
    the outer dimension. Positions are a multiple of what is read at once. ``name_image``: from image to image."""

    def pixel(self, number: str) -> str:
        return f"{number} // positions * {self.name}_image + {number} % positions"

    def base(self, tag: str) -> str:
        outer = f"({self.first} + outer_{tag})"
        if self.along_depth:
            return f"{outer} * {self.name}_outer"
        return f"{self.pixel(outer)} + step_{tag} * {self.name}_step"

    def advance(self, tag: str) -> str:
        return self.pixel(f"(ahead + step_{tag})") if self.along_depth else super().advance(tag)


@dataclass(frozen=True)
class Gathered(Side):
    """Lines whose elements are channels and taps. `along_depth`: lines are numbered by the outer dimension; else by the
    depth."""

    axes: tuple[str, ...] = ()

    def line(self, writer: Writer, number: str, limit: str) -> None:
        """``base``, ``at`` and the number of channels, ``limit``, of a line: 0 where `number` is not below `limit`."""
        raise NotImplementedError

    def locate(self, writer: Writer, tile: Tile) -> None:
        """All pieces of a thread lie behind each other in one line."""
        name, count = self.name, tile.lanes * len(tile.chunks(self.name))
        lines = tile.extent(self.name) if self.along_depth else tile.depth
        line, start = ("outer", "step") if self.along_depth else ("step", "outer")
        writer.let(f"{line}_{name}", f"thread() % {lines}")
        writer.let(f"{start}_{name}", f"thread() // {lines} * {count}")
        for c in tile.chunks(name):
            writer.let(f"{line}_{name}{c}", f"{line}_{name}")
            writer.let(f"{start}_{name}{c}", f"{start}_{name} + {c * tile.lanes}")
        if self.along_depth:
            self.line(writer, f"{self.first} + outer_{name}", self.limit)

    def load(self, writer: Writer, tile: Tile, c: int, names: list[str], pointer: str, dtype: DType) -> None:
        if c == 0 and not self.along_depth:
            self.line(writer, f"ahead + step_{self.name}", "k")
        if c == 0:
            self.start(writer, f"(ahead + step_{self.name})" if self.along_depth else f"({self.first} + outer_{self.name})")
        fixed = [f"{self.name}_at_{axis}, {self.name}_tap_{axis}, {self.name}_end_{axis}, {self.name}_size_{axis}, "
                 f"{self.name}_pitch_{axis}" for axis in self.axes] or ["k,"]
        element = ", ".join([f"{self.name}_channel", *[f"{self.name}_i_{axis}" for axis in self.axes]])
        line = f"{self.name}_base, {self.name}_plane, {self.name}_limit"
        writer.emit(Let(f"{', '.join(names)}, {element}", None,
                        f"gather({pointer}, {len(names)}, ({line}), ({element},), ({', '.join(fixed)}))"))

    def start(self, writer: Writer, number: str) -> None:
        """The channel of element `number` of a line, its places along the axes, and where those end."""
        name = self.name
        writer.let(f"{name}_channel", f"{number} // taps" if self.axes else number)
        rest = f"({number} % taps)"
        for k, axis in reversed(list(enumerate(self.axes))):
            digit = f"({rest} % kernel_{axis})" if k else rest
            writer.let(f"{name}_i_{axis}", f"{name}_at_{axis} + {digit} * {name}_tap_{axis}")
            writer.let(f"{name}_end_{axis}", f"{name}_at_{axis} + kernel_{axis} * {name}_tap_{axis}")
            rest = f"{rest} // kernel_{axis}"


@dataclass(frozen=True)
class Pixels(Gathered):
    """A line is a pixel: ``positions`` of an image, ``out`` along an axis; the first tap meets place ``out * jump + shift``.
    Without axes a pixel meets itself, in each channel."""

    def line(self, writer: Writer, number: str, limit: str) -> None:
        name = self.name
        pixel = writer.let(f"{name}_pixel", number)
        writer.let(f"{name}_base", f"{name}_start + {pixel} // positions * {name}_image"
                                   + ("" if self.axes else f" + {pixel} % positions"))
        rest = f"({pixel} % positions)"
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"{name}_at_{axis}", (f"{rest} % out_{axis}" if k else rest) + f" * jump_{axis} + shift_{axis}")
            rest = f"{rest} // out_{axis}"
        writer.let(f"{name}_limit", f"{name}_channels if {pixel} < {limit} else 0")


@dataclass(frozen=True)
class Weights(Gathered):
    """A line is an input channel of the weights [channels, lines, taps]; ``a_at`` is the first tap that is met."""

    def line(self, writer: Writer, number: str, limit: str) -> None:
        name = self.name
        row = writer.let(f"{name}_row", number)
        writer.let(f"{name}_base", f"{name}_start + {row} * {name}_outer")
        writer.let(f"{name}_limit", f"{name}_channels if {row} < {limit} else 0")
