"""Lowering of pooling: max_pool2d, avg_pool2d and their gradients."""

from __future__ import annotations

import math
from typing import Any

from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.kernel import Lowered
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import pooling


def planes(x: TensorType) -> int:
    """How many planes of height and width x has."""
    return math.prod(x.shape[:-2])


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def sides(padding: Any) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a padding given as one number, two, or two pairs."""
    (top, bottom), (left, right) = (pair(side) for side in pair(padding))
    return top, left, bottom, right


@lowers("max_pool2d")
def lower_max_pool2d(call: Call) -> Lowered:
    (x,), (out, _), a = call.inputs, call.outputs, call.attrs
    top, left, _, _ = sides(a["padding"])
    kernel, stride, dilation = pair(a["kernel"]), pair(a["stride"]), pair(a["dilation"])
    source = pooling.source("max_pool2d", x.dtype.short)
    if math.prod(kernel) <= pooling.WRITTEN_OUT:
        source = pooling.windows_source(x.dtype.short, kernel, stride, dilation)
    return Lowered((launch(source, planes(out) * out.shape[-2], call.input(0), call.output(0), call.output(1),
                           *x.shape[-2:], *out.shape[-2:], *kernel, *stride, top, left, *dilation),))


@lowers("max_pool2d_grad")
def lower_max_pool2d_grad(call: Call) -> Lowered:
    (g, _), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("max_pool2d_grad", g.dtype.short), planes(out), call.input(0), call.input(1),
                           call.output(), math.prod(out.shape[-2:]), math.prod(g.shape[-2:])),))


@lowers("max_pool2d_gather")
def lower_max_pool2d_gather(call: Call) -> Lowered:
    (x, _), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("max_pool2d_gather", x.dtype.short), planes(out), call.input(0),
                           call.input(1), call.output(), math.prod(x.shape[-2:]), math.prod(out.shape[-2:])),))


def window(call: Call, x: TensorType, out: TensorType) -> tuple[int, ...]:
    """The integers that both kernels of average pooling take."""
    a = call.attrs
    return (*x.shape[-2:], *out.shape[-2:], *pair(a["kernel"]), *pair(a["stride"]), *sides(a["padding"]),
            int(a["count_include_pad"]))


@lowers("avg_pool2d")
def lower_avg_pool2d(call: Call) -> Lowered:
    (x,), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("avg_pool2d", x.dtype.short), planes(out) * out.shape[-2], call.input(0),
                           call.output(), *window(call, x, out)),))


@lowers("avg_pool2d_grad")
def lower_avg_pool2d_grad(call: Call) -> Lowered:
    (g,), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("avg_pool2d_grad", g.dtype.short), planes(out), call.input(0), call.output(),
                           *window(call, out, g)),))
