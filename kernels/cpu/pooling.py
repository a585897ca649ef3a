"""Pooling windows over planes ``[planes, depth, height, width]``: maxima with their places, averages, and the gradients
of both. An image has depth 1, a sequence also height 1.

A place is the number ``(layer * height + row) * width + column`` within the input plane. Padding is never read: maxima
ignore it, averages count it when asked to. A NaN in a window is its maximum.
"""

from __future__ import annotations

import itertools

from jitgrad.kernels.cpu.math import maximum, minimum, select
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import fail, i64, load, pointer, store
from jitgrad.kernels.cpu.template import text

WRITTEN_OUT = 27                                # taps of a window up to which it has a kernel of its own

Triple = tuple[int, int, int]


def source(kernel: str, element: str) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``."""
    return text(KERNELS[kernel], T=element)


# Windows inside of the plane are a loop without branches, in which neighbours are one vector; those that stick out are
# done one by one.
_WINDOWS = """\
def {name}(args, begin, end, thread):
    x, o, index = pointer(args, 1, {T}), pointer(args, 2, {T}), pointer(args, 3, i64)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    front, top, left = args[16], args[17], args[18]
    line = begin // rows
    number, at_layer, at_row = line // layers, line % layers, begin - line * rows
    for item in range(begin, end):
        plane, out = number * depth * height * width, item * columns
        layer, row = at_layer * {onward} - front, at_row * {down} - top
        first = i64(columns)
        after = i64(columns)
        if layer >= 0 and layer + {last_layer} < depth and row >= 0 and row + {last_row} < height and width > {last_column}:
            first = minimum(i64((left + {across} - 1) // {across}), columns)
            after = maximum(minimum(i64((width - 1 - {last_column} + left) // {across} + 1), columns), first)
            corner = (layer * height + row) * width - left
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
                for tap in range({count}):
                    w = layer + tap // {area} * {behind}
                    y = row + tap // {wide} % {tall} * {apart}
                    z = c * {across} - left + tap % {wide} * {beside}
                    if w >= 0 and w < depth and y >= 0 and y < height and z >= 0 and z < width:
                        place = (w * height + y) * width + z
                        value = load(x, plane + place, 0, 3)
                        better = (at < 0) | (value > best) | (value != value)
                        best = select(better, value, best)
                        at = select(better, i64(place), at)
                store(o, out + c, best, 1, 3)
                store(index, out + c, at, 2, 3)
        at_row += 1
        if at_row == rows:
            at_row = i64(0)
            at_layer += 1
            if at_layer == layers:
                at_layer = i64(0)
                number += 1
"""
_TAP = """\
                place_{k} = place + {place}
                value_{k} = load(x, plane + place_{k}, 0, 3)
                better_{k} = (value_{k} > best) | (value_{k} != value_{k})
                best = select(better_{k}, value_{k}, best)
                at = select(better_{k}, i64(place_{k}), at)
"""


def windows_source(element: str, kernel: Triple, stride: Triple, dilation: Triple) -> str:
    """`max_pool`, with the same arguments, for windows of this form and of at most `WRITTEN_OUT` taps."""
    (_, tall, wide), (onward, down, across), (behind, apart, beside) = kernel, stride, dilation
    offsets = [tuple(i * d for i, d in zip(tap, dilation)) for tap in itertools.product(*map(range, kernel))]
    taps = "".join(_TAP.format(k=k, place=_distance(*offset)) for k, offset in enumerate(offsets) if k).rstrip()
    last_layer, last_row, last_column = offsets[-1]
    form = "_".join("x".join(map(str, numbers)) for numbers in (kernel, stride, dilation))
    return _WINDOWS.format(name=f"max_pool_{form}_{element}", T=element, taps=taps, count=len(offsets), area=tall * wide,
                           tall=tall, wide=wide, onward=onward, down=down, across=across, behind=behind, apart=apart,
                           beside=beside, last_layer=last_layer, last_row=last_row, last_column=last_column)


def _distance(layer: int, row: int, column: int) -> str:
    """How far an element of the window is from its corner, as text."""
    parts = ((layer, f"{layer} * height * width"), (row, f"{row} * width"), (column, f"{column}"))
    return " + ".join(part for number, part in parts if number)


def max_pool(args, begin, end, thread):
    """An item is a row of the result. Arguments: x, o, index; depth, height, width; the same of the result; then along
    depth, height and width the kernel, the stride, the padding before, the dilation."""
    x, o, index = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    deep, tall, wide, onward, down, across = args[10], args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    for item in range(begin, end):
        line = item // rows
        number = line // layers
        plane, out = number * depth * height * width, item * columns
        for c in range(columns):
            store(index, out + c, -1, 2, 3)
        for tap in range(deep * tall):
            layer = (line - number * layers) * onward - front + tap // tall * behind
            row = (item - line * rows) * down - top + tap % tall * apart
            if layer >= 0 and layer < depth and row >= 0 and row < height:
                for j in range(wide):
                    shift = j * beside - left
                    first = maximum(i64(-(shift // across)), i64(0))
                    last = minimum(i64((width - 1 - shift) // across + 1), columns)
                    for c in range(first, last):
                        place = i64((layer * height + row) * width + shift + c * across)
                        value, best = load(x, plane + place, 0, 3), load(o, out + c, 1, 3)
                        old = load(index, out + c, 2, 3)
                        better = (old < 0) | (value > best) | (value != value)
                        store(o, out + c, select(better, value, best), 1, 3)
                        store(index, out + c, select(better, place, old), 2, 3)


def max_pool_grad(args, begin, end, thread):
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


def max_pool_gather(args, begin, end, thread):
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


def avg_pool(args, begin, end, thread):
    """An item is a row of the result. Arguments: x, o; depth, height, width; the same of the result; then along depth,
    height and width the kernel, the stride, the padding before, the padding behind; whether padding counts; the number
    to divide by, or 0."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    depth, height, width, layers, rows, columns = args[3], args[4], args[5], args[6], args[7], args[8]
    deep, tall, wide, onward, down, across = args[9], args[10], args[11], args[12], args[13], args[14]
    front, top, left, rear, bottom, right = args[15], args[16], args[17], args[18], args[19], args[20]
    count_padding, divisor = args[21], args[22]
    line = begin // rows
    number, at_layer, at_row = line // layers, line % layers, begin - line * rows
    for item in range(begin, end):
        plane = number * depth
        layer, row = at_layer * onward - front, at_row * down - top
        first_layer, last_layer = maximum(i64(layer), i64(0)), minimum(i64(layer + deep), depth)
        first_row, last_row = maximum(i64(row), i64(0)), minimum(i64(row + tall), height)
        padded_area = ((minimum(i64(layer + deep), i64(depth + rear)) - layer)
                       * (minimum(i64(row + tall), i64(height + bottom)) - row))
        area = (last_layer - first_layer) * (last_row - first_row)
        for c in range(columns):
            column = c * across - left
            padded_columns = minimum(i64(column + wide), i64(width + right)) - column
            first, last = maximum(i64(column), i64(0)), minimum(i64(column + wide), width)
            total = T(0)
            for h in range(first_layer, last_layer):
                for i in range(first_row, last_row):
                    for j in range(first, last):
                        value = load(x, ((plane + h) * height + i) * width + j, 0, 2)
                        total = T(total + value)
            size = padded_area * padded_columns if count_padding != 0 else area * (last - first)
            size = divisor if divisor != 0 else size
            store(o, item * columns + c, T(total / T(size)), 1, 2)
        at_row += 1
        if at_row == rows:
            at_row = i64(0)
            at_layer += 1
            if at_layer == layers:
                at_layer = i64(0)
                number += 1


def avg_pool_grad(args, begin, end, thread):
    """An item is a plane of the input's gradient. Arguments as for `avg_pool`, g in place of x."""
    g, o = pointer(args, 1, T), pointer(args, 2, T)
    depth, height, width, layers, rows, columns = args[3], args[4], args[5], args[6], args[7], args[8]
    deep, tall, wide, onward, down, across = args[9], args[10], args[11], args[12], args[13], args[14]
    front, top, left, rear, bottom, right = args[15], args[16], args[17], args[18], args[19], args[20]
    count_padding, divisor = args[21], args[22]
    for item in range(begin, end):
        plane = item * depth * height * width
        for i in range(plane, plane + depth * height * width):
            store(o, i, T(0), 1, 2)
        at_layer, at_row = i64(0), i64(0)
        for line in range(layers * rows):
            layer, row = at_layer * onward - front, at_row * down - top
            first_layer, last_layer = maximum(i64(layer), i64(0)), minimum(i64(layer + deep), depth)
            first_row, last_row = maximum(i64(row), i64(0)), minimum(i64(row + tall), height)
            padded_area = ((minimum(i64(layer + deep), i64(depth + rear)) - layer)
                           * (minimum(i64(row + tall), i64(height + bottom)) - row))
            area = (last_layer - first_layer) * (last_row - first_row)
            for c in range(columns):
                column = c * across - left
                padded_columns = minimum(i64(column + wide), i64(width + right)) - column
                first, last = maximum(i64(column), i64(0)), minimum(i64(column + wide), width)
                size = padded_area * padded_columns if count_padding != 0 else area * (last - first)
                size = divisor if divisor != 0 else size
                share = T(load(g, (item * layers * rows + line) * columns + c, 0, 2) / T(size))
                for h in range(first_layer, last_layer):
                    for i in range(first_row, last_row):
                        corner = plane + (h * height + i) * width
                        for j in range(corner + first, corner + last):
                            store(o, j, T(load(o, j, 1, 2) + share), 1, 2)
            at_row += 1
            if at_row == rows:
                at_row = i64(0)
                at_layer += 1


KERNELS = {k.__name__: k for k in (max_pool, max_pool_grad, max_pool_gather, avg_pool, avg_pool_grad)}
