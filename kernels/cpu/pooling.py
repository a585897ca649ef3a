"""Pooling windows over planes ``[planes, depth, height, width]``: maxima with their taps, averages, and the gradients
of both. An image has depth 1, a sequence also height 1.

The tap of a maximum is the number ``(i * tall + j) * wide + k`` of its place within the window. Padding is never read:
maxima ignore it, averages count it when asked to. A NaN in a window is its maximum.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from jitgrad.kernels.cpu.math import maximum, minimum, select
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store, u8 as K
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import WIDEST, largest_grad_row, largest_rows, spread_rows

WRITTEN_OUT = 27                                # taps of a window up to which it has a kernel of its own
WINDOW = 10                                     # the argument with which the numbers of the windows of a maximum begin

Triple = tuple[int, int, int]


def source(kernel: str, element: str, tap: str = "u8", *window: Triple) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``, and that of numbers of taps. `window`: of
    maxima, the kernel, stride, padding and dilation that are to stand in the text instead of arguments."""
    made = text(KERNELS[kernel], T=element, K=tap)
    for place, number in enumerate(itertools.chain(*window), WINDOW):
        made = made.replace(f"args[{place}]", str(number))
    spelled = "_".join("x".join(map(str, triple)) for triple in window)
    return made.replace(f"def {kernel}_", f"def {kernel}_{spelled}_", 1) if window else made


# Windows that lie inside of the plane are a loop without branches, in which neighbours are one vector; those that stick out
# are done one by one. `{inside}` is the loop, `{outside}` what is done with one of the others.
_ROWS = """\
def {name}(args, begin, end, thread):
    {pointers}
    depth, height, width, layers, rows, columns = args[3], args[4], args[5], args[6], args[7], args[8]
    front, top, left = args[15], args[16], args[17]
{before}
    opening, closing = begin * {per_item}, end * {per_item}
    line = opening // rows
    number, at_layer, at_row = line // layers, line % layers, opening - line * rows
    for item in range(opening, closing):
        plane, out = number * depth * height * width, item * columns
        layer, row = at_layer * {onward} - front, at_row * {down} - top
        first = i64(columns)
        after = i64(columns)
        if layer >= 0 and layer + {last_layer} < depth and row >= 0 and row + {last_row} < height and width > {last_column}:
            first = minimum(i64((left + {across} - 1) // {across}), columns)
            after = maximum(minimum(i64((width - 1 - {last_column} + left) // {across} + 1), columns), first)
            corner = plane + (layer * height + row) * width - left
{inside}
        for side in range(2):
            start = i64(0)
            stop = first
            if side == 1:
                start = after
                stop = i64(columns)
            for c in range(start, stop):
{outside}
        at_row += 1
        if at_row == rows:
            at_row = i64(0)
            at_layer += 1
            if at_layer == layers:
                at_layer = i64(0)
                number += 1
"""
_INSIDE = """\
            for c in range(first, after):
                place = corner + c * {across}
"""
_BOUNDS = """\
                column = c * {across} - left
                w_0, w_1 = maximum(i64(layer), i64(0)), minimum(i64(layer + {deep}), depth)
                y_0, y_1 = maximum(i64(row), i64(0)), minimum(i64(row + {tall}), height)
                z_0, z_1 = maximum(i64(column), i64(0)), minimum(i64(column + {wide}), width)
                size = (w_1 - w_0) * (y_1 - y_0) * (z_1 - z_0)
                if args[21] != 0:
                    size = ((minimum(i64(layer + {deep}), i64(depth + args[18])) - layer)
                            * (minimum(i64(row + {tall}), i64(height + args[19])) - row)
                            * (minimum(i64(column + {wide}), i64(width + args[20])) - column))
                if args[22] != 0:
                    size = i64(args[22])
"""
_OVER_BOUNDS = """\
                for w in range(w_0, w_1):
                    for y in range(y_0, y_1):
                        for z in range(z_0, z_1):
                            place = plane + (w * height + y) * width + z
"""
_MEAN = _BOUNDS + """\
                total = {T}(0)
""" + _OVER_BOUNDS + """\
                            value = load(x, place, 0, 2)
                            total = {T}(total + value)
                store(o, out + c, {T}(total / {T}(size)), 1, 2)
"""
_SHARES = _BOUNDS + """\
                share = {T}(load(g, out + c, 0, 2) / {T}(size))
""" + _OVER_BOUNDS + """\
                            store(o, place, {T}(load(o, place, 1, 2) + share), 1, 2)
"""
_WHOLE = "    whole = i64(args[22]) if args[22] != 0 else i64({count})"
_ZEROS = """\
    for i in range(begin * depth * height * width, end * depth * height * width):
        store(o, i, {T}(0), 1, 2)
"""


def tiles(kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> bool:
    """Whether windows lie beside each other and nowhere else, and are narrow enough for `max_pool_grad_tiles`."""
    return stride == kernel and padding == (0, 0, 0) and dilation == (1, 1, 1) and kernel[2] <= WIDEST


def mean_windows_source(element: str, kernel: Triple, stride: Triple) -> str:
    """`avg_pool`, with the same arguments, for windows of this form and of at most `WRITTEN_OUT` taps."""
    inside = _INSIDE + "                total = load(x, place, 0, 2)\n"
    for k, distance in enumerate(_distances(kernel)):
        if k:
            inside += (f"                value_{k} = load(x, place + {distance}, 0, 2)\n"
                       f"                total = {{T}}(total + value_{k})\n")
    inside += "                store(o, out + c, {T}(total / {T}(whole)), 1, 2)\n"
    pointers = "x, o = pointer(args, 1, {T}), pointer(args, 2, {T})"
    return _rows_source("avg_pool", element, kernel, stride, inside, _MEAN, pointers=pointers, before=_WHOLE)


def mean_gradient_source(element: str, kernel: Triple, stride: Triple) -> str:
    """`avg_pool_grad`, with the same arguments, for windows of this form and of at most `WRITTEN_OUT` taps."""
    inside = _INSIDE + "                share = {T}(load(g, out + c, 0, 2) / {T}(whole))\n"
    for distance in _distances(kernel):
        inside += (f"                store(o, place + {distance}, {{T}}(load(o, place + {distance}, 1, 2) + share), 1, 2)\n")
    pointers = "g, o = pointer(args, 1, {T}), pointer(args, 2, {T})"
    return _rows_source("avg_pool_grad", element, kernel, stride, inside, _SHARES, pointers=pointers,
                        before=_WHOLE + "\n" + _ZEROS, per_item="layers * rows")


def _rows_source(name: str, element: str, kernel: Triple, stride: Triple, inside: str, outside: str, *,
                 pointers: str, before: str, per_item: str = "1") -> str:
    """`before` is what comes before the rows, of which an item has `per_item`."""
    numbers: dict[str, Any] = dict(zip(("deep", "tall", "wide", "onward", "down", "across"), (*kernel, *stride)))
    numbers.update(T=element, count=math.prod(kernel), per_item=per_item)
    numbers.update({f"last_{part}": k - 1 for part, k in zip(("layer", "row", "column"), kernel)})
    parts = {"pointers": pointers, "inside": inside, "outside": outside, "before": before}
    numbers.update({part: spelling.format(**numbers).rstrip() for part, spelling in parts.items()})
    spelled = "_".join("x".join(map(str, triple)) for triple in (kernel, stride))
    return _ROWS.format(name=f"{name}_{spelled}_{element}", **numbers)


def _distances(kernel: Triple) -> list[str]:
    """How far each element of a window is from its corner, as text."""
    return [" + ".join(f"{number}{unit}" for number, unit in zip(tap, (" * height * width", " * width", "")) if number)
            or "0" for tap in itertools.product(*map(range, kernel))]


def max_pool_rows(args, begin, end, thread):
    """`max_pool`, with the same arguments, for float32 and float64 and rows of less than 2**31 elements."""
    x, o, taps = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, K)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    deep, tall, wide, onward, down, across = args[10], args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    x_end, o_end = ((end - 1) // rows // layers + 1) * depth * height * width, end * columns
    for line in range(begin // rows, (end - 1) // rows + 1):
        number, layer = line // layers, line % layers * onward - front
        start, stop = maximum(i64(begin - line * rows), i64(0)), minimum(i64(end - line * rows), rows)
        inner, outer = i64(stop), i64(stop)                         # rows of windows that do not stick out
        if layer >= 0 and layer + (deep - 1) * behind < depth:
            inner = minimum(maximum(i64((top + down - 1) // down), start), stop)
            outer = maximum(minimum(i64((height - 1 - (tall - 1) * apart + top) // down + 1), stop), inner)
        before = inner - start
        for part in range(before + 1 + stop - outer):               # one by one, these together, one by one
            r = start + part if part <= before else outer + part - before - 1
            row, out = r * down - top, (line * rows + r) * columns
            if part == before:
                largest_rows(outer - inner, columns, down * width, across, deep, behind * height * width, tall,
                             apart * width, wide, beside, left, left + width, x,
                             ((number * depth + layer) * height + row) * width - left, x_end, 0, tall * wide, o, out, o_end,
                             taps, out)
            else:
                first_layer = maximum(i64(-(layer // behind)), i64(0))
                last_layer = minimum(i64((depth - 1 - layer) // behind + 1), deep)
                first_row = maximum(i64(-(row // apart)), i64(0))
                last_row = minimum(i64((height - 1 - row) // apart + 1), tall)
                corner = (number * depth + layer + first_layer * behind) * height + row + first_row * apart
                largest_rows(1, columns, 0, across, last_layer - first_layer, behind * height * width,
                             last_row - first_row, apart * width, wide, beside, left, left + width, x,
                             corner * width - left, x_end, (first_layer * tall + first_row) * wide, tall * wide, o, out,
                             o_end, taps, out)


def max_pool_grad_rows(args, begin, end, thread):
    """`max_pool_grad`, with the same arguments, for float32 and float64, windows one column or two from each other, and rows
    of less than 2**31 elements."""
    g, taps, o = pointer(args, 1, T), pointer(args, 2, K), pointer(args, 3, T)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    deep, tall, wide, onward, down, across = args[10], args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    o_end = end * depth * height * width
    for line in range(begin * depth, end * depth):
        number = line // depth
        source = number * layers * rows * columns
        for y in range(height):
            largest_grad_row(line - number * depth + front, y + top, layers, rows, columns, deep, tall, wide, onward, down,
                             across, behind, apart, beside, left, width, g, source, taps, source, o,
                             (line * height + y) * width, o_end)


def max_pool_grad_tiles(args, begin, end, thread):
    """`max_pool_grad`, with the same arguments, for float32 and float64, windows that tile the plane (`tiles`), and rows of
    less than 2**31 elements."""
    g, taps, o = pointer(args, 1, T), pointer(args, 2, K), pointer(args, 3, T)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    deep, tall, wide = args[10], args[11], args[12]
    g_end, o_end = end * layers * rows * columns, end * depth * height * width
    for line in range(begin * depth, end * depth):
        number, z = line // depth, line % depth
        layer = z // deep
        many = rows if layer < layers else i64(0)
        source, target = (number * layers + layer) * rows * columns, line * height * width
        spread_rows(many, height, width, columns, tall, wide, g, source, g_end, taps, source,
                    (z - layer * deep) * tall * wide, o, target, o_end)
        for c in range(target + minimum(i64(many * tall), height) * width, target + height * width):
            store(o, c, T(0), 2, 3)


def max_pool(args, begin, end, thread):
    """An item is a row of the result. Arguments: x, o, taps; depth, height, width; the same of the result; then along
    depth, height and width the kernel, the stride, the padding before, the dilation."""
    x, o, taps = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, K)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    deep, tall, wide, onward, down, across = args[10], args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    for item in range(begin, end):
        line = item // rows
        number = line // layers
        plane, out = number * depth * height * width, item * columns
        unknown = i64(1)                                            # no line of taps has been there yet
        for c in range(columns):
            store(taps, out + c, K(0), 2, 3)
        for tap in range(deep * tall):
            layer = (line - number * layers) * onward - front + tap // tall * behind
            row = (item - line * rows) * down - top + tap % tall * apart
            if layer >= 0 and layer < depth and row >= 0 and row < height:
                for j in range(wide):
                    shift = j * beside - left
                    first = maximum(i64(-(shift // across)), i64(0))
                    last = minimum(i64((width - 1 - shift) // across + 1), columns)
                    for c in range(first, last):
                        value = load(x, plane + (layer * height + row) * width + shift + c * across, 0, 3)
                        best, old = load(o, out + c, 1, 3), load(taps, out + c, 2, 3)
                        none = (unknown != 0) & ((j == 0) | (c * across + shift < beside))
                        better = none | (value > best) | (value != value)
                        store(o, out + c, select(better, value, best), 1, 3)
                        store(taps, out + c, select(better, K(tap * wide + j), old), 2, 3)
                unknown = i64(0)


def max_pool_grad(args, begin, end, thread):
    """An item is a plane of the input's gradient. Arguments: g, taps, o; then those of `max_pool`."""
    g, taps, o = pointer(args, 1, T), pointer(args, 2, K), pointer(args, 3, T)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    tall, wide, onward, down, across = args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    for item in range(begin, end):
        for i in range(item * depth * height * width, (item + 1) * depth * height * width):
            store(o, i, T(0), 2, 3)
        for line in range(layers * rows):
            layer, row = line // rows * onward - front, line % rows * down - top
            for c in range(columns):
                window = (item * layers * rows + line) * columns + c
                tap = i64(load(taps, window, 1, 3))
                z = layer + tap // (tall * wide) * behind
                y = row + tap // wide % tall * apart
                x = c * across - left + tap % wide * beside
                if z >= 0 and z < depth and y >= 0 and y < height and x >= 0 and x < width:
                    place = ((item * depth + z) * height + y) * width + x
                    store(o, place, T(load(o, place, 2, 3) + load(g, window, 0, 3)), 2, 3)


def max_pool_gather(args, begin, end, thread):
    """An item is a plane of the result. Arguments: x, taps, o; then those of `max_pool`."""
    x, taps, o = pointer(args, 1, T), pointer(args, 2, K), pointer(args, 3, T)
    depth, height, width, layers, rows, columns = args[4], args[5], args[6], args[7], args[8], args[9]
    tall, wide, onward, down, across = args[11], args[12], args[13], args[14], args[15]
    front, top, left, behind, apart, beside = args[16], args[17], args[18], args[19], args[20], args[21]
    for item in range(begin, end):
        for line in range(layers * rows):
            layer, row = line // rows * onward - front, line % rows * down - top
            for c in range(columns):
                window = (item * layers * rows + line) * columns + c
                tap = i64(load(taps, window, 1, 3))
                z = layer + tap // (tall * wide) * behind
                y = row + tap // wide % tall * apart
                column = c * across - left + tap % wide * beside
                value = T(0)
                if z >= 0 and z < depth and y >= 0 and y < height and column >= 0 and column < width:
                    value = load(x, ((item * depth + z) * height + y) * width + column, 0, 3)
                store(o, window, value, 2, 3)


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


KERNELS = {k.__name__: k for k in (max_pool, max_pool_rows, max_pool_grad, max_pool_grad_rows, max_pool_grad_tiles,
                                   max_pool_gather, avg_pool, avg_pool_grad)}
