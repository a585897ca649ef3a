"""Lowering of index ops: take, index_add, index_update, gather, scatter, scatter_add."""

from __future__ import annotations

import math

from jitgrad.codegen.call import Call, launch, lowers, split
from jitgrad.codegen.kernel import Launch, Lowered
from jitgrad.codegen.library_movement import copy_unless_shared, strides
from jitgrad.kernels.cpu import index


@lowers("take")
def lower_take(call: Call) -> Lowered:
    x, places = call.inputs
    outer, size, inner = split(x.shape, call.attrs["axis"])
    source = index.source("take", x.dtype.short, places.dtype.short)
    return Lowered((launch(source, outer * places.size, call.input(0), call.input(1), call.output(), size, places.size,
                           inner),))


def lower_rows(call: Call, kernel: str) -> Lowered:
    """Group the index by rows, then let every row of the result take what is meant for it."""
    x, places, _ = call.inputs
    outer, size, inner = split(x.shape, call.attrs["axis"])
    ends, order = call.scratch(0), call.scratch(1)
    group = launch(index.source("group_rows", x.dtype.short, places.dtype.short), 1, call.input(1), ends, order, size,
                   places.size)
    rows = launch(index.source(kernel, x.dtype.short), outer * size, call.output(), call.input(2), ends, order, size,
                  places.size, inner)
    return Lowered((*copy_unless_shared(call), group, rows), (8 * max(size, 1), 8 * max(places.size, 1)))


@lowers("index_add", in_place=(0, 0))
def lower_index_add(call: Call) -> Lowered:
    return lower_rows(call, "add_rows")


@lowers("index_update", in_place=(0, 0))
def lower_index_update(call: Call) -> Lowered:
    return lower_rows(call, "update_rows")


@lowers("gather")
def lower_gather(call: Call) -> Lowered:
    (x, places), axis = call.inputs, call.attrs["axis"]
    steps = strides(x.shape)
    table = [n for k, size in enumerate(places.shape) for n in (size, 0 if k == axis else steps[k])]
    source = index.source("gather", x.dtype.short, places.dtype.short)
    return Lowered((launch(source, places.size, call.input(0), call.input(1), call.output(), x.shape[axis], steps[axis],
                           places.ndim, *table),))


def scatter_lines(call: Call, kernel: str) -> Launch:
    """One item per line of the index along the axis."""
    (x, places, source), axis = call.inputs, call.attrs["axis"]
    steps, place_steps, source_steps = strides(x.shape), strides(places.shape), strides(source.shape)
    others = [k for k in range(x.ndim) if k != axis]
    table = [n for k in others for n in (places.shape[k], steps[k], place_steps[k], source_steps[k])]
    return launch(index.source(kernel, x.dtype.short, places.dtype.short),
                  math.prod(places.shape[k] for k in others), call.output(), call.input(1), call.input(2),
                  x.shape[axis], steps[axis], places.shape[axis], place_steps[axis], source_steps[axis], len(others),
                  *table)


@lowers("scatter", in_place=(0, 0))
def lower_scatter(call: Call) -> Lowered:
    return Lowered((*copy_unless_shared(call), scatter_lines(call, "scatter")))


@lowers("scatter_add", in_place=(0, 0))
def lower_scatter_add(call: Call) -> Lowered:
    return Lowered((*copy_unless_shared(call), scatter_lines(call, "scatter_add")))
