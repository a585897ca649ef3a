"""Lowering of pooling: max_pool, avg_pool and their gradients.

The kernels pool volumes: an image is a volume of depth 1, a sequence also of height 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.kernel import Lowered
from jitgrad.dtypes import float32, float64
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import pooling
from jitgrad.ops.window import tap_dtype

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


def lower_maxima(call: Call, kernel: str, items: int, x: TensorType, out: TensorType) -> Lowered:
    """Kernels of maxima; `x` is what is pooled. Rows of windows are done at once where there is a kernel for it."""
    element, tap = x.dtype, tap_dtype(call.attrs["kernel"]).short
    numbers = (*[triple(call.attrs[name], 1) for name in ("kernel", "stride")], sides(call)[0],
               triple(call.attrs["dilation"], 1))
    fits = element in (float32, float64) and x.shape[-1] < 1 << 31
    if fits and kernel == "max_pool_grad" and pooling.tiles(*numbers):
        kernel += "_tiles"
    elif fits and (kernel == "max_pool" or (kernel == "max_pool_grad" and numbers[1][2] <= 2)):
        kernel += "_rows"
    written_out = numbers if math.prod(numbers[0]) <= pooling.WRITTEN_OUT else ()
    source = pooling.source(kernel, element.short, tap, *written_out)
    operands = [*[call.input(k) for k in range(len(call.inputs))], *[call.output(k) for k in range(len(call.outputs))]]
    return Lowered((launch(source, items, *operands, *volume(x), *volume(out), *itertools.chain(*numbers)),))


@lowers("max_pool")
def lower_max_pool(call: Call) -> Lowered:
    return lower_maxima(call, "max_pool", rows(call.outputs[0]), call.inputs[0], call.outputs[0])


@lowers("max_pool_grad")
def lower_max_pool_grad(call: Call) -> Lowered:
    return lower_maxima(call, "max_pool_grad", planes(call.outputs[0]), call.outputs[0], call.inputs[0])


@lowers("max_pool_gather")
def lower_max_pool_gather(call: Call) -> Lowered:
    return lower_maxima(call, "max_pool_gather", planes(call.outputs[0]), call.inputs[0], call.outputs[0])


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
