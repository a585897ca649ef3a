"""GPU lowering of pooling: maxima and means of windows, and their gradients.

The kernels (`kernels.cuda.pooling`) pool volumes, and take all numbers as arguments. Of the usual, small windows the numbers
that loops run over are known in the text, and so are those of dimensions that there are not: such loops are written out and
divisions by them are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.kernel import CudaLowered
from jitgrad.codegen.library_window import Triple, sides, triple, volume
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu.pooling import WRITTEN_OUT
from jitgrad.kernels.cuda import pooling
from jitgrad.ops.window import tap_dtype

SIZES, POOLED = ("depth", "height", "width"), ("layers", "rows", "columns")
WINDOW, STRIDE = ("deep", "tall", "wide"), ("onward", "down", "across")
PADDING, DILATION = ("front", "top", "left"), ("behind", "apart", "beside")
SPANS = ("layer_spans", "row_spans", "column_spans")
BEGIN, END = ("begin_layer", "begin_row", "begin_column"), ("end_layer", "end_row", "end_column")

MAXIMA = (pooling.max_pool, pooling.max_pool_grad, pooling.max_pool_gather)     # the kernels that know numbers of taps

Numbers = dict[str, int]


def named(names: tuple[str, ...], numbers: Sequence[int]) -> Numbers:
    return dict(zip(names, numbers, strict=True))


def spans(last: Triple, stride: Triple) -> Triple:
    """How many windows may contain an element; `last`: how far a window's last element is from its first."""
    layers, rows, columns = [distance // step + 1 for distance, step in zip(last, stride, strict=True)]
    return layers, rows, columns


def lower(call: Call, kernel: Callable[..., Any], numbers: Numbers, loops: tuple[str, ...]) -> CudaLowered | None:
    """The launch of `kernel`, a thread for each element of the first result. `loops` are the numbers that loops run over, or
    that are divided by."""
    out = call.outputs[0]
    if 0 in (x.size for x in call.inputs) and out.size:
        return None                                   # windows that see nothing but padding, sums of nothing
    missing = 3 - (out.ndim - 2)
    known = {name for names in (SIZES, POOLED, WINDOW, STRIDE, PADDING, DILATION, SPANS) for name in names[:missing]}
    if math.prod([numbers[name] for name in (SPANS if SPANS[0] in loops else WINDOW)]) <= WRITTEN_OUT:
        known.update(loops)
    wide = is_wide(call)
    taps = {"K": tap_dtype(call.attrs["kernel"]).short} if kernel in MAXIMA else {}
    source = kernel_text(kernel, wide, T=out.dtype.short, **taps)
    known_numbers = {name: number for name, number in numbers.items() if name in known}
    if known_numbers:
        source = pooling.pinned(source, known_numbers)
    buffers = [*[call.input(k) for k in range(len(call.inputs))], *[call.output(k) for k in range(len(call.outputs))]]
    return CudaLowered((gpu_launch(source, blocks_for(out.size), *buffers, out.size, *numbers.values(), wide=wide,
                                   alignment=max(t.dtype.itemsize for t in (*call.inputs, *call.outputs))),))


def windows(call: Call, x: TensorType, out: TensorType) -> Numbers:
    """The numbers that all kernels begin with; `x` is what is pooled."""
    attrs = call.attrs
    return {**named(SIZES, volume(x)), **named(POOLED, volume(out)), **named(WINDOW, triple(attrs["kernel"], 1)),
            **named(STRIDE, triple(attrs["stride"], 1)), **named(PADDING, sides(call)[0])}


# ---- maximum


def dilated_windows(call: Call, x: TensorType, out: TensorType) -> Numbers:
    return {**windows(call, x, out), **named(DILATION, triple(call.attrs["dilation"], 1))}


@lowers_on_gpu("max_pool")
def lower_max_pool(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, pooling.max_pool, dilated_windows(call, call.inputs[0], call.outputs[0]), WINDOW)


@lowers_on_gpu("max_pool_grad")
def lower_max_pool_grad(call: Call, aligned: bool) -> CudaLowered | None:
    numbers = dilated_windows(call, call.outputs[0], call.inputs[0])
    last = triple([(k - 1) * d for k, d in zip(call.attrs["kernel"], call.attrs["dilation"], strict=True)], 0)
    many = named(SPANS, spans(last, triple(call.attrs["stride"], 1)))
    return lower(call, pooling.max_pool_grad, {**numbers, **many}, (*WINDOW, *STRIDE, *DILATION, *SPANS))


@lowers_on_gpu("max_pool_gather")
def lower_max_pool_gather(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, pooling.max_pool_gather, dilated_windows(call, call.inputs[0], call.outputs[0]), WINDOW)


# ---- mean


def mean_windows(call: Call, x: TensorType, out: TensorType) -> Numbers:
    """`windows`, then from where to where elements count, and what sums are divided by: 0 where windows differ in it."""
    numbers = windows(call, x, out)
    low, high = sides(call)
    padded = call.attrs["count_include_pad"]
    begin = [-p if padded else 0 for p in low]
    end = [n + p if padded else n for n, p in zip(volume(x), high, strict=True)]
    kernel, stride = triple(call.attrs["kernel"], 1), triple(call.attrs["stride"], 1)
    whole = all(-p >= first and (count - 1) * step - p + k <= limit for p, first, count, step, k, limit in zip(
        low, begin, volume(out), stride, kernel, end, strict=True))
    divisor = call.attrs["divisor"] or (math.prod(kernel) if whole else 0)
    return {**numbers, **named(BEGIN, begin), **named(END, end), "divisor": divisor}


@lowers_on_gpu("avg_pool")
def lower_avg_pool(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, pooling.avg_pool, mean_windows(call, call.inputs[0], call.outputs[0]), WINDOW)


@lowers_on_gpu("avg_pool_grad")
def lower_avg_pool_grad(call: Call, aligned: bool) -> CudaLowered | None:
    numbers = mean_windows(call, call.outputs[0], call.inputs[0])
    last = triple([k - 1 for k in triple(call.attrs["kernel"], 1)], 0)
    many = named(SPANS, spans(last, triple(call.attrs["stride"], 1)))
    return lower(call, pooling.avg_pool_grad, {**numbers, **many}, (*STRIDE, *SPANS))
