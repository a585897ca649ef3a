"""Lowering of movement: reshape, permute, broadcast_to, slice, flip, pad, concat, slice_update as copies.

All are one description: an offset, and for each dimension a size and two strides. Dimensions that lie together in both
operands are merged, so that most copies end as a few long rows, or as squares where rows and columns change places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jitgrad.codegen.call import BLOCK, Call, launch, lowers
from jitgrad.codegen.kernel import Buffer, Launch, Lowered
from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import Graph
from jitgrad.ir.strides import follow, steps_through
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import movement

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of a copy: its size and its strides in the source and in the target."""

    size: int
    source: int
    target: int


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple([math.prod(shape[k + 1:]) for k in range(len(shape))])


def merge(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The same copy with as few dimensions as possible, at least one."""
    merged: list[Dimension] = []
    for d in dimensions:
        last = merged[-1] if merged else None
        if last and last.source == d.source * d.size and last.target == d.target * d.size:
            merged[-1] = Dimension(last.size * d.size, d.source, d.target)
        elif d.size != 1:
            merged.append(d)
    return merged or [Dimension(1, 1, 1)]


def copy(x: Buffer, o: Buffer, element: str, dimensions: Sequence[Dimension], x_offset: int = 0,
         o_offset: int = 0) -> Launch:
    """A launch that copies between strided places."""
    rest = merge(dimensions)
    tall, last = turned(rest), rest[-1]
    if tall:
        others = [d for d in rest[:-1] if d is not tall]
        squares = -(-tall.size // movement.TILE) * -(-last.size // movement.TILE)
        kernel = "turn_tiles" if element in ("f32", "f64") else "copy_tiles"
        return launch(movement.source(kernel, element), squares * math.prod(d.size for d in others), x, o,
                      x_offset, o_offset, tall.size, last.size, last.source, tall.target, len(others), *flat(others))
    width = min(last.size, BLOCK)
    parts = -(-last.size // width) if width else 0
    return launch(movement.source("copy_rows", element), parts * math.prod(d.size for d in rest[:-1]), x, o, x_offset,
                  o_offset, last.size, last.source, last.target, parts, width, len(rest) - 1, *flat(rest[:-1]))


def turned(merged: Sequence[Dimension]) -> Dimension | None:
    """The dimension that changes places with the last one, if squares of the two are to be copied."""
    *rest, last = merged
    if last.target != 1 or last.source == 1 or last.size < movement.TILE // 4:
        return None
    return next((d for d in rest if d.source == 1 and d.size >= movement.TILE // 4), None)


def flat(dimensions: Sequence[Dimension]) -> list[int]:
    return [n for d in dimensions for n in (d.size, d.source, d.target)]


def copy_all(x: Buffer, o: Buffer, type: TensorType) -> Launch:
    """A launch that copies a whole contiguous array."""
    return copy(x, o, type.dtype.short, [Dimension(type.size, 1, 1)])


# ---- views that have to be copied -----------------------------------------------------------------------------------


def lower_view(call: Call, offset: int, steps: Sequence[int]) -> Lowered:
    """The result's elements, read from x at `offset` in `steps`."""
    (x,), (out,) = call.inputs, call.outputs
    dimensions = [Dimension(*d) for d in zip(out.shape, steps, strides(out.shape), strict=True)]
    return Lowered((copy(call.input(0), call.output(), x.dtype.short, dimensions, offset),))


@lowers("reshape")
def lower_reshape(call: Call) -> Lowered:
    return Lowered((copy_all(call.input(0), call.output(), call.inputs[0]),))


@lowers("permute")
def lower_permute(call: Call) -> Lowered:
    return lower_view(call, 0, permuted(call))


def permuted(call: Call) -> list[int]:
    steps = strides(call.inputs[0].shape)
    return [steps[a] for a in call.attrs["axes"]]


def lower_turned(body: Graph) -> Lowered | None:
    """The region that does nothing but let dimensions of floats change places: in registers, which a loop cannot say. None
    for any other."""
    if len(body.nodes) != 1 or body.nodes[0].op.name != "permute" or body.outputs[0].dtype not in (float32, float64):
        return None
    node = body.nodes[0]
    call = Call((node.inputs[0].type,), (node.output.type,), node.attrs, {})
    dimensions = zip(node.output.shape, permuted(call), strides(node.output.shape), strict=True)
    return lower_permute(call) if turned(merge([Dimension(*d) for d in dimensions])) else None


@lowers("broadcast_to")
def lower_broadcast_to(call: Call) -> Lowered:
    x = call.inputs[0]
    sizes = zip(x.shape, call.outputs[0].shape, strides(x.shape), strict=True)
    return lower_view(call, 0, [step if have == want else 0 for have, want, step in sizes])


@lowers("slice")
def lower_slice(call: Call) -> Lowered:
    steps = strides(call.inputs[0].shape)
    return lower_view(call, offset_of(call.attrs["start"], steps), products(steps, call.attrs["step"]))


@lowers("flip")
def lower_flip(call: Call) -> Lowered:
    x, axes = call.inputs[0], call.attrs["axes"]
    steps = strides(x.shape)
    offset = sum((x.shape[a] - 1) * steps[a] for a in axes)
    return lower_view(call, offset, [-step if k in axes else step for k, step in enumerate(steps)])


# ---- copies into a part of the result -------------------------------------------------------------------------------


def offset_of(start: Sequence[int], steps: Sequence[int]) -> int:
    return sum(products(start, steps))


def products(x: Sequence[int], y: Sequence[int]) -> list[int]:
    return [a * b for a, b in zip(x, y, strict=True)]


def place(x: Buffer, type: TensorType, o: Buffer, shape: Shape, start: Shape, step: Shape,
          read: tuple[int, Shape] | None = None) -> Launch:
    """A launch that copies all of x into a result of `shape`, from `start` on in steps of `step`. `read`: where the elements
    of x begin, and how far apart they are, if it is not contiguous."""
    target, (first, source) = strides(shape), read or (0, strides(type.shape))
    dimensions = [Dimension(*d) for d in zip(type.shape, source, products(target, step), strict=True)]
    return copy(x, o, type.dtype.short, dimensions, first, offset_of(start, target))


@lowers("pad")
def lower_pad(call: Call) -> Lowered:
    (x,), (out,) = call.inputs, call.outputs
    zero = launch(movement.source("fill_zero", x.dtype.short), -(-out.size // BLOCK), call.output(), out.size, BLOCK)
    return Lowered((zero, place(call.input(0), x, call.output(), out.shape, call.attrs["low"], (1,) * x.ndim)))


@lowers("concat")
def lower_concat(call: Call) -> Lowered:
    pieces = [(call.input(i), x, (0, strides(x.shape))) for i, x in enumerate(call.inputs)]
    return place_pieces(pieces, call.output(), call.outputs[0], call.attrs["axis"])


def lower_concat_in_place(body: Graph, shared: tuple[tuple[int, int], ...]) -> Lowered:
    """The template "concat": some pieces are read where they lie."""
    concat, producers = body.nodes[-1], body.producers()
    pieces = []
    for v in concat.inputs:
        chain, source = follow(producers, v)
        read = steps_through(chain, source.type, v.type)
        assert read is not None
        pieces.append((Buffer(body.inputs.index(source)), v.type, read))
    return place_pieces(pieces, Buffer(len(body.inputs)), concat.output.type, concat.attrs["axis"])


def place_pieces(pieces: Sequence[tuple[Buffer, TensorType, tuple[int, Shape]]], o: Buffer, type: TensorType,
                 axis: int) -> Lowered:
    """Copies of all pieces, each with its `read` (see `place`), one behind the other along `axis`."""
    launches, first = [], 0
    for x, piece, read in pieces:
        start = tuple([first if k == axis else 0 for k in range(piece.ndim)])
        if piece.size:
            launches.append(place(x, piece, o, type.shape, start, (1,) * piece.ndim, read))
        first += piece.shape[axis]
    return Lowered(tuple(launches))


@lowers("slice_update", in_place=(0, 0))
def lower_slice_update(call: Call) -> Lowered:
    x, update = call.inputs
    inside = place(call.input(1), update, call.output(), x.shape, call.attrs["start"], call.attrs["step"])
    return Lowered((*copy_unless_shared(call), inside))


def copy_unless_shared(call: Call) -> tuple[Launch, ...]:
    """The launch that copies operand 0 to the result; none where both are one slot."""
    return () if 0 in call.shared else (copy_all(call.input(0), call.output(), call.inputs[0]),)
