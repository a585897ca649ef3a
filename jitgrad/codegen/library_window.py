"""Lowering of pooling: max_pool, avg_pool and their gradients.

The kernels pool volumes: an image is a volume of depth 1, a sequence also of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.kernel import Lowered
from jitgrad.dtypes import float32, float64
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import pooling

Triple = tuple[int, int, int]


def triple(numbers: Sequence[int], missing: int) -> Triple:
    """Along depth, height and width; `missing` for those that there are not."""
    depth, height, width = (*(missing,) * (3 - len(numbers)), *numbers)
    return depth, height, width


def volume(x: TensorType) -> Triple:
    return triple(x.shape[2:], 1)


def planes(x: TensorType) -> int:
    """How many channels of all samples there are."""
    return math.prod(x.shape[:2])


def rows(x: TensorType) -> int:
    return math.prod(x.shape[:-1])


def sides(call: Call) -> tuple[Triple, Triple]:
    """The padding before and behind."""
    padding = call.attrs["padding"]
    return triple([low for low, _ in padding], 0), triple([high for _, high in padding], 0)


@lowers("max_pool")
def lower_max_pool(call: Call) -> Lowered:
    (x,), (out, _) = call.inputs, call.outputs
    kernel, stride, dilation = (triple(call.attrs[name], 1) for name in ("kernel", "stride", "dilation"))
    vectors = x.dtype in (float32, float64) and math.prod(x.shape[2:]) < 1 << 31
    source = pooling.source("max_pool_rows" if vectors else "max_pool", x.dtype.short)
    return Lowered((launch(source, rows(out), call.input(0), call.output(0), call.output(1), *volume(x), *volume(out),
                           *kernel, *stride, *sides(call)[0], *dilation),))


@lowers("max_pool_grad")
def lower_max_pool_grad(call: Call) -> Lowered:
    (g, _), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("max_pool_grad", g.dtype.short), planes(out), call.input(0), call.input(1),
                           call.output(), math.prod(out.shape[2:]), math.prod(g.shape[2:])),))


@lowers("max_pool_gather")
def lower_max_pool_gather(call: Call) -> Lowered:
    (x, _), (out,) = call.inputs, call.outputs
    return Lowered((launch(pooling.source("max_pool_gather", x.dtype.short), planes(out), call.input(0),
                           call.input(1), call.output(), math.prod(x.shape[2:]), math.prod(out.shape[2:])),))


def window(call: Call, x: TensorType, out: TensorType) -> tuple[int, ...]:
    """The integers that both kernels of average pooling take."""
    a, (before, behind) = call.attrs, sides(call)
    return (*volume(x), *volume(out), *triple(a["kernel"], 1), *triple(a["stride"], 1), *before, *behind,
            int(a["count_include_pad"]), a["divisor"])


@lowers("avg_pool")
def lower_avg_pool(call: Call) -> Lowered:
    (x,), (out,) = call.inputs, call.outputs
    kernel, stride = triple(call.attrs["kernel"], 1), triple(call.attrs["stride"], 1)
    source = pooling.source("avg_pool", x.dtype.short)
    if math.prod(kernel) <= pooling.WRITTEN_OUT:
        source = pooling.mean_windows_source(x.dtype.short, kernel, stride)
    return Lowered((launch(source, rows(out), call.input(0), call.output(), *window(call, x, out)),))


@lowers("avg_pool_grad")
def lower_avg_pool_grad(call: Call) -> Lowered:
    (g,), (out,) = call.inputs, call.outputs
    kernel, stride = triple(call.attrs["kernel"], 1), triple(call.attrs["stride"], 1)
    source = pooling.source("avg_pool_grad", g.dtype.short)
    if math.prod(kernel) <= pooling.WRITTEN_OUT:
        source = pooling.mean_gradient_source(g.dtype.short, kernel, stride)
    return Lowered((launch(source, planes(out), call.input(0), call.output(), *window(call, out, g)),))
