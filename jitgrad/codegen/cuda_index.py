"""GPU lowering of index ops: take, index_add, index_update, gather, scatter, scatter_add.

Positions in an index and places that it names are int32 in scratch memory; larger operands are left to the computer."""

from __future__ import annotations

from jitgrad.codegen.call import Call, split
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.cuda_movement import copy_unless_shared, unit_of
from jitgrad.codegen.cuda_sort import MOST_PLACES, Lines, halves, looks_far, scratch_for, sort_long
from jitgrad.codegen.cuda_templates import THREADS, WIDE
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered, Table
from jitgrad.codegen.library_movement import Dimension, merge, strides
from jitgrad.dtypes import DType, int32, int64, uint32
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cuda import index

FEW, MANY = 32, 1 << 14
"""Lines of at most so many elements, and so many lines, are added up line by line; for others positions are sorted."""

UNORDERED = (int32, int64)
"""Types that are added atomically: integers, for which the order makes no difference."""

IN_SHARED, BLOCKS = 8192, 528
"""The most places for which blocks add up int32 in shared memory, and how many blocks."""


@lowers_on_gpu("take", any_type=True)
def lower_take(call: Call, aligned: bool) -> CudaLowered:
    x, places = call.inputs
    outer, size, inner = split(x.shape, call.attrs["axis"])
    unit, wide = unit_of(x.dtype, aligned, [inner]), is_wide(call)
    units = outer * places.size * inner // unit.elements
    source = kernel_text(index.take, wide, T=unit.short, I=places.dtype.short, LANES=str(unit.lanes))
    return CudaLowered((gpu_launch(source, blocks_for(units), call.input(0), call.input(1), call.output(), units, size,
                                   places.size, inner // unit.elements, wide=wide,
                                   alignment=max(unit.nbytes, places.dtype.itemsize)),))


def filled(buffer: Buffer, type: TensorType, value: int) -> CudaLaunch:
    """The launch that writes `value` everywhere."""
    wide = type.size >= WIDE
    return gpu_launch(kernel_text(index.fill, wide, T=type.dtype.short), blocks_for(type.size), buffer, type.size, value,
                      wide=wide, alignment=type.dtype.itemsize)


def nothing_last(last: Buffer, count: int) -> CudaLaunch:
    """No position is the last one of any place yet."""
    return filled(last, TensorType(int32, (count,)), -1)


# ---- rows ------------------------------------------------------------------------------------------------------------


@lowers_on_gpu("index_update", in_place=True, any_type=True)
def lower_index_update(call: Call, aligned: bool) -> CudaLowered | None:
    x, places, source = call.inputs
    _outer, size, inner = split(x.shape, call.attrs["axis"])
    unit, wide, last = unit_of(x.dtype, aligned, [inner]), is_wide(call), call.scratch(0)
    if max(size, places.size) > MOST_PLACES:
        return None
    mark = gpu_launch(kernel_text(index.mark_last, wide, I=places.dtype.short), blocks_for(places.size), call.input(1), last,
                      places.size, size, wide=wide, alignment=places.dtype.itemsize)
    units = source.size // unit.elements
    update = gpu_launch(kernel_text(index.update_rows, wide, T=unit.short, I=places.dtype.short, LANES=str(unit.lanes)),
                        blocks_for(units), call.input(1), call.input(2), last, call.output(), units, size, places.size,
                        inner // unit.elements, wide=wide, alignment=max(unit.nbytes, places.dtype.itemsize))
    return CudaLowered((*copy_unless_shared(call, aligned), nothing_last(last, size), mark, update), (4 * max(size, 1),))


@lowers_on_gpu("index_add", in_place=True)
def lower_index_add(call: Call, aligned: bool) -> CudaLowered | None:
    x, places, source = call.inputs
    _outer, size, inner = split(x.shape, call.attrs["axis"])
    if max(size, places.size) > MOST_PLACES:
        return None
    numbers = (source.size, size, places.size, inner)
    if x.dtype in UNORDERED:
        return counted(call, aligned, call.input(1), places.dtype, numbers)
    wide, keys = is_wide(call), call.scratch(4)
    make = gpu_launch(kernel_text(index.row_keys, wide, I=places.dtype.short), blocks_for(places.size), call.input(1), keys,
                      places.size, size, wide=wide, alignment=places.dtype.itemsize)
    return added(call, aligned, make, places.size, numbers)


@lowers_on_gpu("scatter_add", in_place=True)
def lower_scatter_add(call: Call, aligned: bool) -> CudaLowered | None:
    x, places, _ = call.inputs
    if max(x.size, places.size) > MOST_PLACES:
        return None
    outer, count, inner = split(places.shape, call.attrs["axis"])
    if x.dtype in UNORDERED:
        keys, numbers = call.scratch(0), (places.size, x.size, places.size, 1)
        return counted(call, aligned, keys, uint32, numbers, (element_keys(call, keys),))
    if count > FEW and outer * inner < MANY:
        make = element_keys(call, call.scratch(4))
        return added(call, aligned, make, places.size, (places.size, x.size, places.size, 1))
    wide, keys = is_wide(call), call.scratch(0)
    lines = gpu_launch(kernel_text(index.add_lines, wide, T=x.dtype.short), blocks_for(outer * inner), keys, call.input(2),
                       call.output(), outer * inner, count, inner, x.size, wide=wide, alignment=max(4, x.dtype.itemsize))
    return CudaLowered((*copy_unless_shared(call, aligned), element_keys(call, keys), lines), (4 * max(places.size, 1),))


def added(call: Call, aligned: bool, make: CudaLaunch, count: int, numbers: tuple[int, ...]) -> CudaLowered:
    """Sort the `count` keys that `make` writes to scratch buffer 4, and add what belongs to equal ones. `numbers` are those
    of `add_rows`."""
    x, wide = call.inputs[0], is_wide(call) or looks_far(count, count)
    copied = copy_unless_shared(call, aligned)
    if not numbers[0]:
        return CudaLowered((*copied, make), (8, 8, 8, 8, 4 * max(count, 1)))
    lines, memory = Lines(call.scratch(4), uint32, 1, count, 1, 0, wide), halves(call)
    sorting, half = sort_long(lines, memory)
    add = gpu_launch(kernel_text(index.add_rows, wide, T=x.dtype.short), blocks_for(numbers[0]), *memory.half(half),
                     call.input(2), call.output(), *numbers, wide=wide, alignment=max(4, x.dtype.itemsize))
    return CudaLowered((*copied, make, *sorting, add), (*scratch_for(lines, count), 4 * count))


def counted(call: Call, aligned: bool, places: Buffer, places_dtype: DType, numbers: tuple[int, int, int, int],
            make: tuple[CudaLaunch, ...] = ()) -> CudaLowered:
    """Add integers in any order. `numbers` are those of `count_rows`; `make`: what writes `places` to scratch memory."""
    x, wide, (elements, size, count, _) = call.inputs[0], is_wide(call), numbers
    types, alignment = {"I": places_dtype.short, "T": x.dtype.short}, max(places_dtype.itemsize, x.dtype.itemsize)
    arguments = (places, call.input(2), call.output())
    if x.dtype is int32 and size <= min(IN_SHARED, elements) and elements == count:
        grid = min(blocks_for(count), BLOCKS)
        add = gpu_launch(kernel_text(index.count_few, wide, **types), grid, *arguments, count, size, grid * THREADS,
                         wide=wide, alignment=alignment)
    else:
        add = gpu_launch(kernel_text(index.count_rows, wide, **types), blocks_for(elements), *arguments, *numbers, wide=wide,
                         alignment=alignment)
    return CudaLowered((*copy_unless_shared(call, aligned), *make, add), (4 * max(count, 1),) if make else ())


# ---- elements --------------------------------------------------------------------------------------------------------


def table_of(call: Call) -> tuple[Table, int]:
    """For each dimension of the index, as few as possible, its size and its stride in x, 0 along the axis."""
    (x, places), axis = call.inputs[:2], call.attrs["axis"]
    steps = [0 if k == axis else step for k, step in enumerate(strides(x.shape))]
    dims = merge([Dimension(*d) for d in zip(places.shape, steps, strides(places.shape), strict=True)])
    return Table(tuple([n for d in dims for n in (d.size, d.source)])), len(dims)


@lowers_on_gpu("gather", any_type=True)
def lower_gather(call: Call, aligned: bool) -> CudaLowered:
    (x, places), axis = call.inputs, call.attrs["axis"]
    unit, wide = unit_of(x.dtype, aligned, [1]), is_wide(call)
    table, rank = table_of(call)
    source = kernel_text(index.gather, wide, T=unit.short, I=places.dtype.short, LANES=str(unit.lanes))
    return CudaLowered((gpu_launch(source, blocks_for(places.size), call.input(0), call.input(1), call.output(), table,
                                   places.size, x.shape[axis], strides(x.shape)[axis], rank, wide=wide,
                                   alignment=max(unit.nbytes, places.dtype.itemsize)),))


def element_keys(call: Call, keys: Buffer) -> CudaLaunch:
    """The launch that says for every place of the index where in x it is."""
    (x, places), axis, wide = call.inputs[:2], call.attrs["axis"], is_wide(call)
    table, rank = table_of(call)
    return gpu_launch(kernel_text(index.element_keys, wide, I=places.dtype.short), blocks_for(places.size), call.input(1),
                      table, keys, places.size, x.shape[axis], strides(x.shape)[axis], x.size, rank, wide=wide,
                      alignment=places.dtype.itemsize)


@lowers_on_gpu("scatter", in_place=True, any_type=True)
def lower_scatter(call: Call, aligned: bool) -> CudaLowered | None:
    x, places, _ = call.inputs
    if max(x.size, places.size) > MOST_PLACES:
        return None
    unit, wide = unit_of(x.dtype, aligned, [1]), is_wide(call)
    keys, last = call.scratch(0), call.scratch(1)
    mark = gpu_launch(kernel_text(index.mark_elements, wide), blocks_for(places.size), keys, last, places.size, x.size,
                      wide=wide, alignment=4)
    source = kernel_text(index.update_elements, wide, T=unit.short, LANES=str(unit.lanes))
    update = gpu_launch(source, blocks_for(places.size), keys, call.input(2), last, call.output(), places.size, x.size,
                        wide=wide, alignment=max(4, unit.nbytes))
    return CudaLowered((*copy_unless_shared(call, aligned), element_keys(call, keys), nothing_last(last, x.size), mark,
                        update), (4 * max(places.size, 1), 4 * max(x.size, 1)))
