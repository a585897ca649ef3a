"""Convolutions on a GPU: the template "convolution" (a convolution, or its gradient in the image, with the elementwise ops
that follow it), and the gradient in the weights.

What goes in is what `codegen.convolution` takes, images of one, two or three dimensions. What comes out: one launch, a
matrix product whose second factor has no memory of its own (`cuda_implicit`); from shared memory the elementwise part takes
it row by row, a row being a channel. For tensor cores operands are turned in front of it, so that channels come last and
the depth runs tap by tap (`cuda_channels`), and float32 goes there if it may be rounded to TF32. Where a group has so few
channels that most of a tile would be empty, threads compute elements one by one instead (`cuda_elements`).

    convolution     [rows, channels * taps] @ [channels * taps, pixels]     per group
    in the image    [channels, rows * taps] @ [rows * taps, pixels]         per group, and per phase of a stride
    in the weights  [rows, pixels] @ [pixels, channels * taps]              per group, and per part of the pixels

With a stride the pixels of an image fall into phases, which meet different taps: a block belongs to one phase, so that none
multiplies with zeros. The sum over all pixels is cut into parts where there are too few tiles for all multiprocessors; a
second launch adds up the parts in order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import math

from jitgrad import ops
from jitgrad.codegen import cuda_elements
from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import lowers_on_gpu
from jitgrad.codegen.cuda_channels import product_of
from jitgrad.codegen.cuda_columns import Geometry
from jitgrad.codegen.cuda_implicit import Forward, InImage, InWeights, Scratch
from jitgrad.codegen.cuda_reduce import lower_row
from jitgrad.codegen.epilogue import Shared, split_epilogue
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.codegen.region import Region, analyse
from jitgrad.codegen.writer import compute_dtype
from jitgrad.dtypes import DType
from jitgrad.errors import CompileError, complain
from jitgrad.ir.graph import Graph, GraphBuilder, Node
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType

FEW = 8
"""With fewer rows than this in a group, a tile would be empty for the most part."""


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
    body = builder.build([builder.run(REGISTRY[name], operands, dict(call.attrs))])
    return lower_convolution(body, (), aligned, call.tf32)


def lower_convolution(body: Graph, shared: Shared, aligned: bool, tf32: bool = False) -> CudaLowered:
    """The launches of a region around a convolution, or its gradient in the image. No output may share the memory of an
    operand of it. `tf32`: float32 may be rounded to TF32. CompileError where the operands are no floats."""
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
        return CudaLowered((cuda_elements.lower_elements(region, geometry, node.op.name, buffers, aligned),))
    product = product_of(Forward if forward else InImage, node.op.name, geometry, node.inputs[0].dtype, aligned, tf32)
    scratch = Scratch(len(body.inputs) + len(body.outputs))
    launches = product.launches(region, buffers[1], buffers[0], scratch)
    return CudaLowered(tuple(launches), tuple(scratch.sizes))


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
        launch = cuda_elements.lower_weights(geometry, result.dtype, (Buffer(0), Buffer(1)), Buffer(2), aligned)
        return CudaLowered((launch,))
    product = product_of(InWeights, "convolution_weight_grad", geometry, image.dtype, aligned, call.tf32)
    parts, turned = product.parts, product.columns_are_turned
    scratch, operands = Scratch(3), (Buffer(1), Buffer(0))
    if parts == 1 and not turned:
        return CudaLowered(tuple(product.launches(stored(result, Buffer(2)), *operands, scratch)), tuple(scratch.sizes))
    rows, columns, _ = product.sizes
    partial = TensorType(product.tile.sum_dtype, (parts, rows * geometry.groups, columns))
    made = scratch.new(partial.nbytes)
    sums = partial if parts > 1 else partial.with_shape(partial.shape[1:])
    launches = [*product.launches(stored(sums, made), *operands, scratch),
                add_parts(partial, made, result, Buffer(2), aligned, turned)]
    return CudaLowered(tuple(launches), tuple(scratch.sizes))


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


def add_parts(partial: TensorType, parts: Buffer, result: TensorType, buffer: Buffer, aligned: bool,
              turned: bool = False) -> CudaLaunch:
    """The sum over the first dimension of `partial`, by a thread per element; the others are those of `result`, or if it is
    `turned`, rows, taps, and channels and more."""
    builder = GraphBuilder("sum")
    with builder:
        if turned:
            count, rows, columns = partial.shape
            channels, taps = result.shape[1], math.prod(result.shape[2:])
            apart = TensorType(partial.dtype, (count, rows, taps, columns // taps))
            found = ops.slice(builder.input(apart), start=(0,) * 4, stop=(*apart.shape[:3], channels), step=(1,) * 4)
            total = ops.reshape(ops.sum(ops.permute(found, axes=(0, 1, 3, 2)), axes=(0,)), shape=(result.size,))
        else:
            total = ops.sum(builder.input(TensorType(partial.dtype, (partial.shape[0], result.size))), axes=(0,))
        total = total if total.dtype is result.dtype else ops.cast(total, dtype=result.dtype)
    region = analyse(builder.build([total]), [])
    region.buffers = dict.fromkeys(region.buffers, parts)
    region.outputs = [(v, index, buffer) for v, index, _ in region.outputs]
    (launch,) = lower_row(region, aligned)
    return launch
