"""Lowering of what runs along lines: cumsum, cumprod, sort, topk; and of random bits."""

from __future__ import annotations

import math

from jitgrad.codegen.call import BLOCK, LINES, Call, launch, lowers, split
from jitgrad.codegen.kernel import Lowered, Private
from jitgrad.kernels.cpu import random, scan, sort


def lower_scan(call: Call, suffix: str) -> Lowered:
    x = call.inputs[0]
    outer, size, inner = split(x.shape, call.attrs["axis"])
    if not x.size:
        return Lowered(())
    if inner == 1:
        source = scan.source("scan_lines" + suffix, x.dtype.short)
        return Lowered((launch(source, outer, call.input(0), call.output(), size),))
    source, parts = scan.source("scan_columns" + suffix, x.dtype.short), -(-inner // LINES)
    return Lowered((launch(source, outer * parts, call.input(0), call.output(), size, inner, parts, LINES),))


@lowers("cumsum")
def lower_cumsum(call: Call) -> Lowered:
    return lower_scan(call, "")


@lowers("cumprod")
def lower_cumprod(call: Call) -> Lowered:
    return lower_scan(call, "_product")


@lowers("sort")
def lower_sort(call: Call) -> Lowered:
    """Always stable: what `stable=False` promises is less."""
    x = call.inputs[0]
    if not x.size:
        return Lowered(())
    outer, size, inner = split(x.shape, call.attrs["axis"])
    if LEAST_BY_DIGIT * sort.digits(x.dtype.short) <= size < 1 << 31:
        return sort_by_digits(call, outer, size, inner)
    sorting = launch(sort.source("sort_lines", x.dtype.short), outer * inner, call.input(0), call.output(0),
                     call.output(1), call.scratch(0), call.scratch(1), outer * inner, size, inner,
                     int(call.attrs["descending"]))
    return Lowered((sorting,), (2 * x.nbytes, 16 * x.size))


LEAST_BY_DIGIT = 8
"""Numbers of a line for each of their digits from which counting is faster than comparing."""


def sort_by_digits(call: Call, outer: int, size: int, inner: int) -> Lowered:
    x = call.inputs[0]
    count = sort.digits(x.dtype.short)
    signed = x.dtype.is_floating_point or x.dtype.short[0] == "i"
    sign = -1 << (8 * count - 1) if signed else 0
    launched = launch(sort.source("digit_lines", x.dtype.short), outer * inner, call.input(0), call.output(0),
                      call.output(1), Private(0), Private(1), Private(2), size, inner,
                      ~sign if call.attrs["descending"] else sign)
    return Lowered((launched,), (), (2 * size * (8 if count == 8 else 4), 8 * size, 4 * count * sort.VALUES))


@lowers("topk")
def lower_topk(call: Call) -> Lowered:
    x, kept = call.inputs[0], call.attrs["k"]
    if not x.size or not kept:
        return Lowered(())
    outer, size, inner = split(x.shape, call.attrs["axis"])
    return Lowered((launch(sort.source("top_lines", x.dtype.short), outer * inner, call.input(0), call.output(0),
                           call.output(1), size, inner, kept, int(call.attrs["descending"])),))


@lowers("random_bits")
def lower_random_bits(call: Call) -> Lowered:
    count = math.prod(call.attrs["shape"])
    return Lowered((launch(random.source("random_bits"), -(-count // BLOCK), call.input(0), call.input(1),
                           call.output(), count, BLOCK),))
