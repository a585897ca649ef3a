"""Pooling windows over planes ``[planes, height, width]``: maxima with their places, averages, and the gradients of
both.

A place is the number ``row * width + column`` within the input plane. Padding is never read: maxima ignore it,
averages count it when asked to. A NaN in a window is its maximum.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import maximum, minimum, select
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import fail, i64, load, pointer, store
from jitgrad.kernels.cpu.template import text

WRITTEN_OUT = 16                                # taps of a window up to which it has a kernel of its own


def source(kernel: str, element: str) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``."""
    return text(KERNELS[kernel], T=element)


# Windows inside of the plane are a loop without branches, in which neighbours are one vector; those that stick out are
# done one by one.
_WINDOWS = """\
def {name}(args, begin, end, thread):
    x, o, index = pointer(args, 1, {T}), pointer(args, 2, {T}), pointer(args, 3, i64)
    height, width, rows, columns = args[4], args[5], args[6], args[7]
    top, left = args[12], args[13]
    for item in range(begin, end):
        plane, out = item // rows * height * width, item * columns
        row = item % rows * {down} - top
        first = i64(columns)
        after = i64(columns)
        if row >= 0 and row + {last_row} < height and width > {last_column}:
            first = minimum(i64((left + {across} - 1) // {across}), columns)
            after = maximum(minimum(i64((width - 1 - {last_column} + left) // {across} + 1), columns), first)
            corner = row * width - left
            for c in range(first, after):
                place = corner + c * {across}
                at = i64(place)
                best = load(x, plane + place, 0, 3)
{taps}
                store(o, out + c, best, 1, 3)
                store(index, out + c, at, 2, 3)
        for side in range(2):
            start = i64(0)
            stop = first
            if side == 1:
                start = after
                stop = i64(columns)
            for c in range(start, stop):
                best = {T}(0)
                at = i64(-1)
                for i in range({tall}):
                    for j in range({wide}):
                        y = row + i * {apart}
                        z = c * {across} - left + j * {beside}
                        if y >= 0 and y < height and z >= 0 and z < width:
                            value = load(x, plane + y * width + z, 0, 3)
                            better = (at < 0) | (value > best) | (value != value)
                            best = select(better, value, best)
                            at = select(better, i64(y * width + z), at)
                store(o, out + c, best, 1, 3)
                store(index, out + c, at, 2, 3)
"""
_TAP = """\
                value_{k} = load(x, plane + place + {i} * width + {j}, 0, 3)
                better_{k} = (value_{k} > best) | (value_{k} != value_{k})
                best = select(better_{k}, value_{k}, best)
                at = select(better_{k}, i64(place + {i} * width + {j}), at)
"""


def windows_source(element: str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> str:
    """`max_pool2d`, with the same arguments, for windows of this form and of at most `WRITTEN_OUT` taps."""
    (tall, wide), (apart, beside) = kernel, dilation
    offsets = [(i * apart, j * beside) for i in range(tall) for j in range(wide)]
    taps = "".join(_TAP.format(k=k, i=i, j=j) for k, (i, j) in enumerate(offsets) if k).rstrip()
    return _WINDOWS.format(name=f"max_pool2d_{tall}x{wide}_{stride[0]}x{stride[1]}_{apart}x{beside}_{element}", T=element,
                           tall=tall, wide=wide, apart=apart, beside=beside, down=stride[0], across=stride[1],
                           last_row=offsets[-1][0], last_column=offsets[-1][1], taps=taps)


def max_pool2d(args, begin, end, thread):
    """An item is a row of the result. Arguments: x, o, index; height, width, out height, out width; then vertical and
    horizontal kernel, stride, padding before, dilation."""
    x, o, index = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    height, width, rows, columns = args[4], args[5], args[6], args[7]
    tall, wide, down, across, top, left, apart, beside = (
        args[8], args[9], args[10], args[11], args[12], args[13], args[14], args[15])
    for item in range(begin, end):
        plane, out = item // rows * height * width, item * columns
        for c in range(columns):
            store(index, out + c, -1, 2, 3)
        for i in range(tall):
            row = item % rows * down - top + i * apart
            if row >= 0 and row < height:
                for j in range(wide):
                    shift = j * beside - left
                    first = maximum(i64(-(shift // across)), i64(0))
                    last = minimum(i64((width - 1 - shift) // across + 1), columns)
                    for c in range(first, last):
                        place = i64(row * width + shift + c * across)
                        value, best = load(x, plane + place, 0, 3), load(o, out + c, 1, 3)
                        old = load(index, out + c, 2, 3)
                        better = (old < 0) | (value > best) | (value != value)
                        store(o, out + c, select(better, value, best), 1, 3)
                        store(index, out + c, select(better, place, old), 2, 3)


def max_pool2d_grad(args, begin, end, thread):
    """An item is a plane of the input's gradient. Arguments: g, index, o; size of an input plane, of an output
    plane."""
    g, index, o = pointer(args, 1, T), pointer(args, 2, i64), pointer(args, 3, T)
    inner, count = args[4], args[5]
    for item in range(begin, end):
        for i in range(item * inner, (item + 1) * inner):
            store(o, i, T(0), 2, 3)
        for k in range(item * count, (item + 1) * count):
            place = load(index, k, 1, 3)
            if place < 0 or place >= inner:
                fail(args, 1, item, place)
            else:
                total = T(load(o, item * inner + place, 2, 3) + load(g, k, 0, 3))
                store(o, item * inner + place, total, 2, 3)


def max_pool2d_gather(args, begin, end, thread):
    """An item is a plane of the result. Arguments: x, index, o; size of an input plane, of an output plane."""
    x, index, o = pointer(args, 1, T), pointer(args, 2, i64), pointer(args, 3, T)
    inner, count = args[4], args[5]
    for item in range(begin, end):
        for k in range(item * count, (item + 1) * count):
            place = load(index, k, 1, 3)
            if place < 0 or place >= inner:
                fail(args, 1, item, place)
            else:
                store(o, k, load(x, item * inner + place, 0, 3), 2, 3)


def avg_pool2d(args, begin, end, thread):
    """An item is a row of the result. Arguments: x, o; height, width, out height, out width; vertical and horizontal
    kernel, stride, padding before, padding behind; whether padding counts."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    height, width, rows, columns = args[3], args[4], args[5], args[6]
    tall, wide, down, across, top, left, bottom, right = (
        args[7], args[8], args[9], args[10], args[11], args[12], args[13], args[14])
    count_padding = args[15]
    for item in range(begin, end):
        plane, row = item // rows * height * width, item % rows * down - top
        padded_rows = minimum(i64(row + tall), i64(height + bottom)) - row
        first_row, last_row = maximum(i64(row), i64(0)), minimum(i64(row + tall), height)
        for c in range(columns):
            column = c * across - left
            padded_columns = minimum(i64(column + wide), i64(width + right)) - column
            first, last = maximum(i64(column), i64(0)), minimum(i64(column + wide), width)
            total = T(0)
            for i in range(first_row, last_row):
                for j in range(first, last):
                    value = load(x, plane + i * width + j, 0, 2)
                    total = T(total + value)
            size = padded_rows * padded_columns if count_padding != 0 else (last_row - first_row) * (last - first)
            store(o, item * columns + c, T(total / T(size)), 1, 2)


def avg_pool2d_grad(args, begin, end, thread):
    """An item is a plane of the input's gradient. Arguments as for `avg_pool2d`, g in place of x."""
    g, o = pointer(args, 1, T), pointer(args, 2, T)
    height, width, rows, columns = args[3], args[4], args[5], args[6]
    tall, wide, down, across, top, left, bottom, right = (
        args[7], args[8], args[9], args[10], args[11], args[12], args[13], args[14])
    count_padding = args[15]
    for item in range(begin, end):
        plane = item * height * width
        for i in range(plane, plane + height * width):
            store(o, i, T(0), 1, 2)
        for r in range(rows):
            row = r * down - top
            padded_rows = minimum(i64(row + tall), i64(height + bottom)) - row
            first_row, last_row = maximum(i64(row), i64(0)), minimum(i64(row + tall), height)
            for c in range(columns):
                column = c * across - left
                padded_columns = minimum(i64(column + wide), i64(width + right)) - column
                first, last = maximum(i64(column), i64(0)), minimum(i64(column + wide), width)
                size = padded_rows * padded_columns if count_padding != 0 else (last_row - first_row) * (last - first)
                share = T(load(g, (item * rows + r) * columns + c, 0, 2) / T(size))
                for i in range(first_row, last_row):
                    for j in range(plane + i * width + first, plane + i * width + last):
                        store(o, j, T(load(o, j, 1, 2) + share), 1, 2)


KERNELS = {k.__name__: k for k in (max_pool2d, max_pool2d_grad, max_pool2d_gather, avg_pool2d, avg_pool2d_grad)}
