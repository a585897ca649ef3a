"""Factors of a convolution on a GPU whose depth runs tap by tap, over operands that lie channels-last.

What goes in: names of sizes that the kernel knows. What comes out: sides of `cuda_gemm.Loops`. An image is [images, places,
groups, channels]: all channels of a place lie behind each other, so that a piece of 16 bytes has one tap and some channels,
and is copied into shared memory without registers in between. (NVIDIA's CUTLASS orders implicit GEMM so, too.)

A slice has one tap, if channels fill it: all threads share the walk over the depth (`Walk`), which goes from tap to tap
once in a while, and a slice adds the same number to all addresses of a thread. In the gradient in the weights the depth
numbers pixels; pieces keep tap and channels for good, and all pieces of a thread have the same pixel, which moves on by as
many places as a slice has steps (`Columns`). Digits of taps are those of `cuda_columns`; the first tap meets place
``out * jump + shift`` of an axis, digit d of the others ``d * b_tap`` places further on.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgrad.codegen.cuda_gemm import Side, Tile
from jitgrad.codegen.kernel import When
from jitgrad.codegen.writer import Writer

FAR = 1 << 30
"""What is added to a place so that it is none, whatever the tap."""


@dataclass(frozen=True)
class Walk:
    """The walk along the depth of both factors: ``chan``, the first channel of a slice, and the digit of its tap along each
    axis. What follows from them: where the tap begins in the weights, ``walk_a``, and beside the first one in images,
    ``walk_b``, and ``reach``, its distance along each axis."""

    axes: tuple[str, ...]

    def begin(self, writer: Writer) -> None:
        writer.let("chan", "0")
        for axis in self.axes:
            writer.let(f"digit_{axis}", "0")
        self.place(writer)

    def place(self, writer: Writer) -> None:
        for axis in self.axes:
            writer.let(f"reach_{axis}", f"digit_{axis} * b_tap_{axis}")
        writer.let("walk_a", " + ".join([f"(a_at_{axis} + digit_{axis} * a_tap_{axis}) * a_pitch_{axis}"
                                         for axis in self.axes]))
        writer.let("walk_b", " + ".join([f"reach_{axis} * b_pitch_{axis}" for axis in self.axes]))

    def go_on(self, writer: Writer, tile: Tile) -> None:
        """To the next slice: other channels of the tap, or the next tap."""
        outside = len(writer.levels)
        writer.let("chan", f"chan + {tile.depth}")
        writer.enter(When("chan >= channels"))
        writer.let("chan", "0")
        inside = len(writer.levels)
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"digit_{axis}", f"digit_{axis} + 1")
            if k:
                writer.enter(When(f"digit_{axis} == kernel_{axis}"))
                writer.let(f"digit_{axis}", "0")
        writer.close(len(writer.levels) - inside)
        self.place(writer)
        writer.close(len(writer.levels) - outside)


@dataclass(frozen=True)
class TapWeights(Side):
    """The weights [rows, taps, channels], the first factor: ``walk_a`` is where a tap begins."""

    def base(self, tag: str) -> str:
        return f"({self.first} + outer_{tag}) * a_outer + step_{tag}"

    def find(self, writer: Writer, tile: Tile, tag: str) -> None:
        writer.let("from_", f"place_{tag} + (walk_a + chan)")
        writer.let("there", f"{tile.lanes} if (room_{tag} > 0) & (chan + step_{tag} < channels) else 0")


@dataclass(frozen=True)
class TapPixels(Side):
    """Images as the second factor, a pixel being a line; the walk is this side's."""

    axes: tuple[str, ...] = ()

    def locate(self, writer: Writer, tile: Tile) -> None:
        super().locate(writer, tile)
        for c in tile.chunks(self.name):
            self.locate_pixel(writer, f"{self.name}{c}")
        Walk(self.axes).begin(writer)

    def base(self, tag: str) -> str:
        return f"step_{tag}"

    def locate_pixel(self, writer: Writer, tag: str) -> None:
        """Where the first tap of a pixel is, as a place and along each axis: far away where there is no such pixel."""
        writer.let("pixel", f"first_column + outer_{tag}")
        rest, terms = "(pixel % positions)", [f"place_{tag} + pixel // positions * b_image"]
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"at_{axis}_{tag}", (f"{rest} % out_{axis}" if k else rest) + f" * jump_{axis} + shift_{axis}")
            terms.append(f"at_{axis}_{tag} * b_pitch_{axis}")
            rest = f"{rest} // out_{axis}"
        writer.let(f"place_{tag}", " + ".join(terms))
        last = self.axes[-1]
        writer.let(f"at_{last}_{tag}", f"at_{last}_{tag} if room_{tag} > 0 else 0 - {FAR}")

    def inside(self, tag: str) -> str:
        """Whether the tap of a slice meets a place of the image."""
        return " & ".join([f"(u32(at_{axis}_{tag} + reach_{axis}) < u32(b_size_{axis}))" for axis in self.axes])

    def find(self, writer: Writer, tile: Tile, tag: str) -> None:
        writer.let("from_", f"place_{tag} + (walk_b + chan)")
        writer.let("there", f"{tile.lanes} if {self.inside(tag)} & (chan + step_{tag} < channels) else 0")

    def go_on(self, writer: Writer, tile: Tile) -> None:
        Walk(self.axes).go_on(writer, tile)


@dataclass(frozen=True)
class FewChannels(TapPixels):
    """The same where a slice would have more steps than a tap has channels: its steps run on over the next taps, so that
    each thread walks by itself. ``chan`` and the digits are those of a thread's pieces, which are at the same step; a slice
    moves them on by ``chan_move`` and ``digit_move``."""

    def locate(self, writer: Writer, tile: Tile) -> None:
        Side.locate(self, writer, tile)
        for c in tile.chunks(self.name):
            self.locate_pixel(writer, f"{self.name}{c}")
        step = f"step_{self.name}0"
        writer.let("chan", f"{step} % channels")
        rest = f"({step} // channels)"
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"digit_{axis}", f"{rest} % kernel_{axis}" if k else rest)
            rest = f"{rest} // kernel_{axis}"
        self.place(writer)

    def base(self, tag: str) -> str:
        return "0"

    def place(self, writer: Writer) -> None:
        for axis in self.axes:
            writer.let(f"reach_{axis}", f"digit_{axis} * b_tap_{axis}")
        writer.let("walk_b", " + ".join(["chan", *[f"reach_{axis} * b_pitch_{axis}" for axis in self.axes]]))

    def find(self, writer: Writer, tile: Tile, tag: str) -> None:
        writer.let("from_", f"place_{tag} + walk_b")
        first = self.axes[0]
        writer.let("there", f"{tile.lanes} if {self.inside(tag)} & (digit_{first} < kernel_{first}) else 0")

    def go_on(self, writer: Writer, tile: Tile) -> None:
        writer.let("chan", "chan + chan_move")
        carry = writer.let("over", "1 if chan >= channels else 0")
        writer.let("chan", f"chan - {carry} * channels")
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"digit_{axis}", f"digit_{axis} + digit_move_{axis} + {carry}")
            if k:
                carry = writer.let(f"over_{axis}", f"1 if digit_{axis} >= kernel_{axis} else 0")
                writer.let(f"digit_{axis}", f"digit_{axis} - {carry} * kernel_{axis}")
        self.place(writer)


@dataclass(frozen=True)
class TapColumns(Side):
    """Images as the second factor, a pixel being a step of the depth and a column a channel of a tap, ``channels`` to a
    tap. `origin`: the name of the first pixel, if that is not 0."""

    axes: tuple[str, ...] = ()
    origin: str = ""

    def locate(self, writer: Writer, tile: Tile) -> None:
        """Pieces of a thread are of one pixel, and equally far apart."""
        across = tile.columns // tile.lanes // len(tile.chunks(self.name))
        for c in tile.chunks(self.name):
            tag = f"{self.name}{c}"
            writer.let(f"step_{tag}", f"thread() // {across}")
            writer.let(f"outer_{tag}", f"thread() % {across} * {tile.lanes} + {c * across * tile.lanes}")
            writer.let("column", f"first_column + outer_{tag}")
            rest, terms = "(column // channels)", ["b_start + column % channels"]
            for k, axis in reversed(list(enumerate(self.axes))):
                writer.let(f"reach_{axis}_{tag}", (f"{rest} % kernel_{axis}" if k else rest) + f" * b_tap_{axis}")
                terms.append(f"reach_{axis}_{tag} * b_pitch_{axis}")
                rest = f"{rest} // kernel_{axis}"
            writer.let(f"place_{tag}", " + ".join(terms))
            last = self.axes[-1]
            writer.let(f"reach_{last}_{tag}", f"reach_{last}_{tag} if column < n else 0 - {FAR}")
        self.begin(writer)

    def begin(self, writer: Writer) -> None:
        """The first pixel of this thread: where its image begins, and the place of its first tap along each axis."""
        writer.let("pixel", (f"{self.origin} + " if self.origin else "") + f"step_{self.name}0")
        writer.let("image", "pixel // positions * b_image")
        rest = "(pixel % positions)"
        for k, axis in reversed(list(enumerate(self.axes))):
            writer.let(f"at_{axis}", (f"{rest} % out_{axis}" if k else rest) + f" * jump_{axis} + shift_{axis}")
            rest = f"{rest} // out_{axis}"
        self.place(writer)

    def place(self, writer: Writer) -> None:
        writer.let("here", " + ".join(["image", *[f"at_{axis} * b_pitch_{axis}" for axis in self.axes]]))

    def find(self, writer: Writer, tile: Tile, tag: str) -> None:
        inside = " & ".join([f"(u32(at_{axis} + reach_{axis}_{tag}) < u32(b_size_{axis}))" for axis in self.axes])
        writer.let("from_", f"place_{tag} + here")
        writer.let("there", f"{tile.lanes} if {inside} & (pixel < k) else 0")

    def go_on(self, writer: Writer, tile: Tile) -> None:
        """So many pixels on as a slice has: ``move`` places along each axis, beyond the end of which (``stop``) the next
        row begins, ``span`` places back."""
        writer.let("pixel", f"pixel + {tile.depth}")
        carry = ""
        for axis in reversed(self.axes):
            writer.let(f"at_{axis}", f"at_{axis} + move_{axis}" + (f" + {carry} * jump_{axis}" if carry else ""))
            carry = writer.let(f"over_{axis}", f"1 if at_{axis} >= stop_{axis} else 0")
            writer.let(f"at_{axis}", f"at_{axis} - {carry} * span_{axis}")
        writer.let("image", f"image + move_image + {carry} * b_image")
        self.place(writer)
