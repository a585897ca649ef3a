"""Reading and writing at places given by integers: take, index_add, index_update, gather, scatter, scatter_add.

Operands are seen as ``[outer, axis, inner]``, C-contiguous. An index outside of its dimension is an error of the item
that meets it; its element is left out. Writing is deterministic: an item owns places of the *result* and goes through
the index in order. So `index_add` first groups the positions in the index by the row that they name (`group_rows`, a
counting sort).
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import maximum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import fail, i64, i64 as I, load, pointer, store
from jitgrad.kernels.cpu.template import text


def source(kernel: str, element: str, index: str = "i64") -> str:
    """The text of the kernel of this name for short dtype names such as ``f32``."""
    return text(KERNELS[kernel], T=element, I=index)


def take(args, begin, end, thread):
    """An item is a row of the result. Arguments: x[outer, size, inner], index[count], o[outer, count, inner]; size,
    count, inner."""
    x, index, o = pointer(args, 1, T), pointer(args, 2, I), pointer(args, 3, T)
    size, count, inner = args[4], args[5], args[6]
    row, k = begin // maximum(count, 1), begin % maximum(count, 1)     # of no rows there are none
    for item in range(begin, end):
        place = i64(load(index, k, 1, 3))
        if place < 0 or place >= size:
            fail(args, 1, item, place)
        else:
            start = (row * size + place) * inner
            for j in range(inner):
                store(o, item * inner + j, load(x, start + j, 0, 3), 2, 3)
        k = i64(k + 1)
        if k == count:
            row, k = i64(row + 1), i64(0)


def group_rows(args, begin, end, thread):
    """One item: positions of the index, grouped by the row that they name. Arguments: index[count], ends[size],
    order[count]; size, count. The positions that name row r are order[ends[r - 1]] … order[ends[r] - 1], ascending."""
    index, ends, order = pointer(args, 1, I), pointer(args, 2, i64), pointer(args, 3, i64)
    size, count = args[4], args[5]
    for _ in range(begin, end):
        for r in range(size):
            store(ends, r, 0, 1, 3)
        for k in range(count):
            place = i64(load(index, k, 0, 3))
            if place < 0 or place >= size:
                fail(args, 1, k, place)
            else:
                store(ends, place, load(ends, place, 1, 3) + 1, 1, 3)
        total = i64(0)
        for r in range(size):
            found = load(ends, r, 1, 3)
            store(ends, r, total, 1, 3)
            total = i64(total + found)
        for k in range(count):
            place = i64(load(index, k, 0, 3))
            if place >= 0 and place < size:
                slot = load(ends, place, 1, 3)
                store(order, slot, k, 2, 3)
                store(ends, place, slot + 1, 1, 3)


def add_rows(args, begin, end, thread):
    """An item is a row of the result, which holds x already. Arguments: o[outer, size, inner], source[outer, count,
    inner], ends, order (of `group_rows`); size, count, inner."""
    o, source, ends, order = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64), pointer(args, 4, i64)
    size, count, inner = args[5], args[6], args[7]
    for item in range(begin, end):
        outer, row = item // size, item % size
        first = load(ends, row - 1, 2, 4) if row > 0 else i64(0)
        for slot in range(first, load(ends, row, 2, 4)):
            start = (outer * count + load(order, slot, 3, 4)) * inner
            for j in range(inner):
                total = T(load(o, item * inner + j, 0, 4) + load(source, start + j, 1, 4))
                store(o, item * inner + j, total, 0, 4)


def update_rows(args, begin, end, thread):
    """As `add_rows`, but the last row of the source that names a place is copied to it."""
    o, source, ends, order = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64), pointer(args, 4, i64)
    size, count, inner = args[5], args[6], args[7]
    for item in range(begin, end):
        outer, row = item // size, item % size
        first = load(ends, row - 1, 2, 4) if row > 0 else i64(0)
        last = load(ends, row, 2, 4)
        if last > first:
            start = (outer * count + load(order, last - 1, 3, 4)) * inner
            for j in range(inner):
                store(o, item * inner + j, load(source, start + j, 1, 4), 0, 4)


def gather(args, begin, end, thread):
    """An item is an element of the result. Arguments: x, index, o; size and stride of the axis in x, rank; then for
    each dimension its size in the index and its stride in x (0 for the axis)."""
    x, index, o = pointer(args, 1, T), pointer(args, 2, I), pointer(args, 3, T)
    size, stride, rank = args[4], args[5], args[6]
    for item in range(begin, end):
        place = i64(load(index, item, 1, 3))
        start, rest = i64(0), i64(item)
        for k in range(rank):
            d = rank - 1 - k
            start = i64(start + rest % args[7 + 2 * d] * args[8 + 2 * d])
            rest = i64(rest // args[7 + 2 * d])
        if place < 0 or place >= size:
            fail(args, 1, item, place)
        else:
            store(o, item, load(x, start + place * stride, 0, 3), 2, 3)


def scatter(args, begin, end, thread):
    """An item is a line along the axis of the result, which holds x already; of several writers the last stays.
    Arguments: o, index, source; size and stride of the axis in o, its size and stride in the index, its stride in the
    source, rank; then for each other dimension its size in the index and its strides in o, index and source."""
    o, index, source = pointer(args, 1, T), pointer(args, 2, I), pointer(args, 3, T)
    size, stride, count, index_stride, source_stride, rank = args[4], args[5], args[6], args[7], args[8], args[9]
    for item in range(begin, end):
        start, index_start, source_start, rest = i64(0), i64(0), i64(0), i64(item)
        for k in range(rank):
            d = 10 + 4 * (rank - 1 - k)
            here = rest % args[d]
            start = i64(start + here * args[d + 1])
            index_start = i64(index_start + here * args[d + 2])
            source_start = i64(source_start + here * args[d + 3])
            rest = i64(rest // args[d])
        for k in range(count):
            place = i64(load(index, index_start + k * index_stride, 1, 3))
            if place < 0 or place >= size:
                fail(args, 1, item, place)
            else:
                value = load(source, source_start + k * source_stride, 2, 3)
                store(o, start + place * stride, value, 0, 3)


def scatter_add(args, begin, end, thread):
    """As `scatter`, but values are added, in the order of the index."""
    o, index, source = pointer(args, 1, T), pointer(args, 2, I), pointer(args, 3, T)
    size, stride, count, index_stride, source_stride, rank = args[4], args[5], args[6], args[7], args[8], args[9]
    for item in range(begin, end):
        start, index_start, source_start, rest = i64(0), i64(0), i64(0), i64(item)
        for k in range(rank):
            d = 10 + 4 * (rank - 1 - k)
            here = rest % args[d]
            start = i64(start + here * args[d + 1])
            index_start = i64(index_start + here * args[d + 2])
            source_start = i64(source_start + here * args[d + 3])
            rest = i64(rest // args[d])
        for k in range(count):
            place = i64(load(index, index_start + k * index_stride, 1, 3))
            if place < 0 or place >= size:
                fail(args, 1, item, place)
            else:
                target = start + place * stride
                value = load(source, source_start + k * source_stride, 2, 3)
                store(o, target, T(load(o, target, 0, 3) + value), 0, 3)


KERNELS = {k.__name__: k for k in (take, group_rows, add_rows, update_rows, gather, scatter, scatter_add)}
