"""Convolutions of few channels per group on a GPU, depthwise ones above all: no matrix product.

A thread computes one element of the result, of a convolution or of its gradient in the image, and what follows it; threads
beside each other have pixels beside each other, and all read the same weights. For the gradient in the weights a block of
threads computes one element: each thread adds up pixels, and what threads have found is joined in an order that shapes alone
decide. 16-bit floats are summed up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jitgrad import ops
from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_columns import Geometry
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


def write_sizes(writer: Writer, geometry: Geometry) -> None:
    """The sizes of a convolution: ``rows`` and ``channels`` of a group, and along each axis."""
    writer.size("rows", geometry.rows)
    writer.size("channels", geometry.channels)
    writer.size("all_rows", geometry.result[1])
    writer.size("all_channels", geometry.image[1])
    for k, axis in enumerate(geometry.axes):
        values = {"size": geometry.image[2 + k], "kernel": geometry.weights[2 + k], "out": geometry.result[2 + k],
                  "stride": geometry.stride[k], "padding": geometry.padding[k], "dilation": geometry.dilation[k]}
        for name, value in values.items():
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


def lower_elements(region: Region, geometry: Geometry, name: str, buffers: Sequence[Buffer], aligned: bool) -> CudaLaunch:
    """The launch of a convolution or of its gradient in the image (by `name`) with what follows it. `buffers`: of what the
    weights are multiplied with, and of the weights."""
    writer, product = region.writer(), region.body.inputs[0]
    writer.let("unit", f"block() * {THREADS} + thread()")
    writer.enter(When(f"unit < {writer.size('units', product.type.size)}"))
    add_up(writer, geometry, name == "convolution", product.dtype, buffers)
    index = region.index_of(product)
    if atoms := region.axes.flat(index):
        locate(writer, region, "unit", atoms)
    writer.bind(product, index, "total")
    for value, at, buffer in region.outputs:
        writer.store(buffer, value.type, at, writer.evaluate(value, at))
    writer.flush()
    writer.close()
    kernel, arguments = writer.kernel(f"{name}_direct_{kernel_name(region.body).removeprefix('fused_')}")
    wide = is_wide(geometry) or cuda_templates.is_wide(region.body)
    return pack(kernel, arguments, -(-product.type.size // THREADS), THREADS, aligned, wide)


def add_up(writer: Writer, geometry: Geometry, forward: bool, dtype: DType, buffers: Sequence[Buffer]) -> None:
    """``total``, the element number ``unit`` of a convolution, or else of its gradient in the image."""
    kind, axes = compute_dtype(dtype), geometry.axes
    source, weights = [writer.operand(buffer, dtype, dtype.short) for buffer in buffers]
    write_sizes(writer, geometry)
    made, size, read, limit = ("rows", "out", "channels", "size") if forward else ("channels", "size", "rows", "out")
    digits(writer, "unit", [("channel", f"all_{made}"), *[(f"at_{axis}", f"{size}_{axis}") for axis in axes]], "image")
    writer.let("group", f"channel // {made}")
    writer.emit(Let("total", kind, "0"))
    outside = len(writer.levels)
    writer.open("depth", "0", read)
    for axis in axes:
        open_taps(writer, axis, forward, max(geometry.stride) > 1)
    row, channel = ("channel", "depth") if forward else ("group * rows + depth", "channel % channels")
    multiply(writer, kind, (source, flat(f"image * all_{read} + group * {read} + depth",
                                         [(f"i_{axis}", f"{limit}_{axis}") for axis in axes])),
             (weights, flat(f"({row}) * channels + {channel}", [(f"t_{axis}", f"kernel_{axis}") for axis in axes])))
    writer.close(len(writer.levels) - outside)


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


def is_wide(geometry: Geometry) -> bool:
    return max(map(math.prod, geometry.shapes)) >= cuda_templates.WIDE


def lower_weights(geometry: Geometry, dtype: DType, buffers: Sequence[Buffer], result: Buffer, aligned: bool) -> CudaLaunch:
    """The launch of the gradient in the weights, of image and gradient in `buffers`."""
    kind = compute_dtype(dtype)
    builder = GraphBuilder("weights")
    pixels, weights = geometry.result[0] * math.prod(geometry.result[2:]), math.prod(geometry.weights)
    with builder:
        total = ops.sum(builder.input(TensorType(kind, (weights, pixels))), axes=(1,))
    region = analyse(builder.build([total]), [])
    writer, (node,) = region.writer(), region.body.nodes
    image, gradient = [writer.operand(buffer, dtype, dtype.short) for buffer in buffers]
    made = writer.operand(result, dtype, str(TensorType(dtype, geometry.weights)))
    write_sizes(writer, geometry)
    writer.size("pixels", pixels)
    writer.let("lane", "thread()")
    digits(writer, "block()", [("channel", "channels"), *[(f"t_{axis}", f"kernel_{axis}") for axis in geometry.axes]], "row")
    writer.emit(Let("total", kind, "0"))
    outside = len(writer.levels)
    writer.open("round", "0", f"(pixels + {THREADS - 1}) // {THREADS}")
    writer.let("pixel", f"round * {THREADS} + lane")
    writer.enter(When("pixel < pixels"))
    digits(writer, "pixel", [(f"at_{axis}", f"out_{axis}") for axis in geometry.axes], "picture")
    for axis in geometry.axes:
        writer.let(f"i_{axis}", f"at_{axis} * stride_{axis} + t_{axis} * dilation_{axis} - padding_{axis}")
    writer.enter(When(" and ".join([f"u32(i_{axis}) < u32(size_{axis})" for axis in geometry.axes])))
    multiply(writer, kind, (image, flat("picture * all_channels + row // rows * channels + channel",
                                        [(f"i_{axis}", f"size_{axis}") for axis in geometry.axes])),
             (gradient, flat("picture * all_rows + row", [(f"at_{axis}", f"out_{axis}") for axis in geometry.axes])))
    writer.close(len(writer.levels) - outside)
    join(writer, node, ("total",), THREADS)
    writer.enter(When("lane == 0"))
    writer.emit(Store(made, "block()", "total"))
    writer.close()
    kernel, arguments = writer.kernel(f"convolution_weight_grad_direct_{dtype.short}")
    return pack(kernel, arguments, weights, THREADS, aligned, is_wide(geometry))
