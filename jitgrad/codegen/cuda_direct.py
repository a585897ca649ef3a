"""Convolutions of few channels per group on a GPU, depthwise ones above all: no matrix product.

A thread computes one element of the result, of a convolution or of its gradient in the image, and what follows it; threads
beside each other have pixels beside each other, and all read the same weights. For the gradient in the weights a block of
threads computes one element: each thread adds up pixels, and what threads have found is joined in an order that shapes alone
decide. 16-bit floats are summed up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from jitgrad import ops
from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_reduce import join
from jitgrad.codegen.cuda_templates import THREADS, pack
from jitgrad.codegen.epilogue import locate
from jitgrad.codegen.kernel import Buffer, CudaLaunch, Let, Load, Store, When
from jitgrad.codegen.region import Region, analyse
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.types import TensorType

Ints = tuple[int, ...]


class Shapes(Protocol):
    """What is read of a `cuda_convolution.Geometry`."""

    image: Ints
    weights: Ints
    result: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def channels(self) -> int: ...


def write_sizes(writer: Writer, shapes: Shapes) -> None:
    """The sizes of a convolution: ``rows`` and ``channels`` of a group, and along each axis."""
    writer.size("rows", shapes.rows)
    writer.size("channels", shapes.channels)
    writer.size("all_rows", shapes.result[1])
    writer.size("all_channels", shapes.image[1])
    for k, axis in enumerate(shapes.axes):
        for name, value in (("size", shapes.image[2 + k]), ("kernel", shapes.weights[2 + k]), ("out", shapes.result[2 + k]),
                            ("stride", shapes.stride[k]), ("padding", shapes.padding[k]), ("dilation", shapes.dilation[k])):
            writer.size(f"{name}_{axis}", value)


def digits(writer: Writer, number: str, names: Sequence[tuple[str, str]], first: str) -> None:
    """`number` as digits, of which all but the `first` have bounds: pairs of a name and a bound."""
    rest = number
    for name, bound in reversed(names):
        writer.let(name, f"{rest} % {bound}")
        rest = f"{rest} // {bound}"
    writer.let(first, rest)


def flat(first: str, places: Sequence[tuple[str, str]]) -> str:
    """The number whose digits these are."""
    text = first
    for name, bound in places:
        text = f"({text}) * {bound} + {name}"
    return text


def multiply(writer: Writer, dtype: DType, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Add the product of two elements, each a pointer and a place, to ``total``."""
    writer.emit(Load("one", *one))
    writer.emit(Load("other", *other))
    writer.emit(Let("total", dtype, "multiply_add(one, other, total)"))


def lower_elements(region: Region, shapes: Shapes, name: str, buffers: Sequence[Buffer], aligned: bool) -> CudaLaunch:
    """The launch of a convolution or of its gradient in the image (by `name`) with what follows it. `buffers`: of what the
    weights are multiplied with, and of the weights."""
    writer, product = region.writer(), region.body.inputs[0]
    forward, dtype = name == "convolution", compute_dtype(product.dtype)
    sum_over = "channels" if forward else "rows"
    source, weights = [writer.operand(buffer, product.dtype, product.dtype.short) for buffer in buffers]
    write_sizes(writer, shapes)
    made, size = ("rows", "out") if forward else ("channels", "size")
    writer.let("unit", f"block() * {THREADS} + thread()")
    writer.enter(When(f"unit < {writer.size('units', product.type.size)}"))
    digits(writer, "unit", [("channel", f"all_{made}"), *[(f"at_{axis}", f"{size}_{axis}") for axis in shapes.axes]], "image")
    writer.let("group", f"channel // {made}")
    writer.emit(Let("total", dtype, "0"))
    outside = len(writer.levels)
    writer.open("depth", "0", sum_over)
    for axis in shapes.axes:
        open_taps(writer, axis, forward, max(shapes.stride) > 1)
    row, channel = ("channel", "depth") if forward else ("group * rows + depth", "channel % channels")
    read, limit = f"all_{sum_over}", "size" if forward else "out"
    places = [(f"i_{axis}", f"{limit}_{axis}") for axis in shapes.axes]
    taps = [(f"t_{axis}", f"kernel_{axis}") for axis in shapes.axes]
    multiply(writer, dtype, (source, flat(f"image * {read} + group * {sum_over} + depth", places)),
             (weights, flat(f"({row}) * channels + {channel}", taps)))
    writer.close(len(writer.levels) - outside)
    index = region.index_of(product)
    if atoms := region.axes.flat(index):
        locate(writer, region, "unit", atoms)
    writer.bind(product, index, "total")
    for value, at, buffer in region.outputs:
        writer.store(buffer, value.type, at, writer.evaluate(value, at))
    writer.flush()
    writer.close()
    kernel, arguments = writer.kernel(f"{name}_direct_{kernel_name(region.body).removeprefix('fused_')}")
    wide = is_wide(shapes) or any(v.type.size >= cuda_templates.WIDE for v in (*region.body.inputs, *region.body.outputs))
    return pack(kernel, arguments, -(-product.type.size // THREADS), THREADS, aligned, wide)


def open_taps(writer: Writer, axis: str, forward: bool, strided: bool) -> None:
    """The loop over the taps along an axis, and the condition that the tap meets place ``i``."""
    writer.open(f"t_{axis}", "0", f"kernel_{axis}")
    if forward:
        writer.let(f"i_{axis}", f"at_{axis} * stride_{axis} + t_{axis} * dilation_{axis} - padding_{axis}")
        writer.enter(When(f"u32(i_{axis}) < u32(size_{axis})"))
        return
    reach = writer.let(f"i_{axis}", f"at_{axis} + padding_{axis} - t_{axis} * dilation_{axis}")
    if strided:
        reach = writer.let(f"reach_{axis}", reach)
        writer.enter(When(f"{reach} >= 0"))
        writer.let(f"i_{axis}", f"{reach} // stride_{axis}")
        writer.let(f"met_{axis}", f"i_{axis} * stride_{axis}")
        writer.enter(When(f"met_{axis} == {reach} and i_{axis} < out_{axis}"))
        return
    writer.enter(When(f"u32(i_{axis}) < u32(out_{axis})"))


def is_wide(shapes: Shapes) -> bool:
    return max(map(math.prod, (shapes.image, shapes.weights, shapes.result))) >= cuda_templates.WIDE


def lower_weights(shapes: Shapes, dtype: DType, buffers: Sequence[Buffer], result: Buffer, aligned: bool) -> CudaLaunch:
    """The launch of the gradient in the weights, of image and gradient in `buffers`."""
    kind = compute_dtype(dtype)
    builder = GraphBuilder("weights")
    pixels, weights = shapes.result[0] * math.prod(shapes.result[2:]), math.prod(shapes.weights)
    with builder:
        total = ops.sum(builder.input(TensorType(kind, (weights, pixels))), axes=(1,))
    region = analyse(builder.build([total]), [])
    writer, (node,) = region.writer(), region.body.nodes
    image, gradient = [writer.operand(buffer, dtype, dtype.short) for buffer in buffers]
    made = writer.operand(result, dtype, str(TensorType(dtype, shapes.weights)))
    write_sizes(writer, shapes)
    writer.size("pixels", pixels)
    writer.let("lane", "thread()")
    digits(writer, "block()", [("channel", "channels"), *[(f"t_{axis}", f"kernel_{axis}") for axis in shapes.axes]], "row")
    writer.emit(Let("total", kind, "0"))
    outside = len(writer.levels)
    writer.open("round", "0", f"(pixels + {THREADS - 1}) // {THREADS}")
    writer.let("pixel", f"round * {THREADS} + lane")
    writer.enter(When("pixel < pixels"))
    digits(writer, "pixel", [(f"at_{axis}", f"out_{axis}") for axis in shapes.axes], "picture")
    for axis in shapes.axes:
        writer.let(f"i_{axis}", f"at_{axis} * stride_{axis} + t_{axis} * dilation_{axis} - padding_{axis}")
    writer.enter(When(" and ".join([f"u32(i_{axis}) < u32(size_{axis})" for axis in shapes.axes])))
    multiply(writer, kind, (image, flat("picture * all_channels + row // rows * channels + channel",
                                        [(f"i_{axis}", f"size_{axis}") for axis in shapes.axes])),
             (gradient, flat("picture * all_rows + row", [(f"at_{axis}", f"out_{axis}") for axis in shapes.axes])))
    writer.close(len(writer.levels) - outside)
    join(writer, node, ("total",), THREADS)
    writer.enter(When("lane == 0"))
    writer.emit(Store(made, "block()", "total"))
    writer.close()
    kernel, arguments = writer.kernel(f"convolution_weight_grad_direct_{dtype.short}")
    return pack(kernel, arguments, weights, THREADS, aligned, is_wide(shapes))
