"""Convolutions of volumes in groups, which have no kernels of their own on the CPU, as sums of convolutions of images.

Every step of the kernel's depth meets some layers of the volume: the images of all these layers, in the groups that there
are, are convolved with the taps of that step, by the kernels for images. The gradients are those of this sum.
"""

from __future__ import annotations

from typing import Any

from jitgrad import ops
from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, rebuild
from jitgrad.ops.gradient import reverse

CONVOLUTIONS = (ops.convolution, ops.convolution_input_grad, ops.convolution_weight_grad)


def split_grouped_volumes(graph: Graph) -> Graph:
    """`graph` without convolutions of volumes in groups, of float32 or float64."""
    return rebuild(graph, _visit) if any(map(_is_grouped_volume, graph.nodes)) else graph


def _is_grouped_volume(node: Node) -> bool:
    return node.op in CONVOLUTIONS and len(node.output.shape) == 5 and node.attrs["groups"] > 1 \
        and node.output.dtype in (float32, float64) and min(node.attrs["padding"][0]) >= 0 \
        and all(v.type.size for v in (*node.inputs, *node.outputs))


def _visit(node: Node, inputs: tuple[Value, ...], builder: GraphBuilder) -> Value | None:
    if not _is_grouped_volume(node):
        return None
    attrs = {name: node.attrs[name] for name in ("stride", "padding", "dilation", "groups")}
    if node.op is ops.convolution:
        made: Value = _sum_of_layers(*inputs, **attrs)
        return made
    zeros: Value = ops.zeros_like(node.output)                   # a gradient does not depend on what it is taken in
    x, w, wrt = (zeros, inputs[1], 0) if node.op is ops.convolution_input_grad else (inputs[0], zeros, 1)
    gradient = inputs[0] if wrt == 0 else inputs[1]
    begin = len(builder.nodes)
    made = _sum_of_layers(x, w, **attrs)
    found: Value = reverse(builder.nodes[begin:], {made: gradient}, [zeros])[zeros]
    return found


def _sum_of_layers(x: Any, w: Any, *, stride: tuple[int, ...], padding: tuple[tuple[int, int], ...],
                   dilation: tuple[int, ...], groups: int) -> Any:
    """The convolution of x[N, C, D, H, W] with w[O, C / groups, *kernel]."""
    (low, high), (images, channels, _, *sizes), (rows, _, depth, *kernel) = padding[0], x.shape, w.shape
    padded = ops.pad(x, low=(0, 0, low, 0, 0), high=(0, 0, high, 0, 0))
    layers = (padded.shape[2] - (depth - 1) * dilation[0] - 1) // stride[0] + 1
    total = None
    for k in range(depth):
        first = k * dilation[0]
        met = _layers(padded, first, first + (layers - 1) * stride[0] + 1, stride[0])
        flat = ops.reshape(ops.permute(met, axes=(0, 2, 1, 3, 4)), shape=(images * layers, channels, *sizes))
        taps = ops.reshape(_layers(w, k, k + 1, 1), shape=(rows, w.shape[1], *kernel))
        part = ops.convolution(flat, taps, stride=stride[1:], padding=padding[1:], dilation=dilation[1:], groups=groups)
        total = part if total is None else ops.add(total, part)
    assert total is not None
    return ops.permute(ops.reshape(total, shape=(images, layers, *total.shape[1:])), axes=(0, 2, 1, 3, 4))


def _layers(x: Any, start: int, stop: int, step: int) -> Any:
    return ops.slice(x, start=(0, 0, start, 0, 0), stop=(*x.shape[:2], stop, *x.shape[3:]), step=(1, 1, step, 1, 1))
