"""Copies between strided places: transposes, slices, flips, broadcasts, padding, concatenation.

A copy is described by an offset in both operands and, for each dimension, a size and two strides in elements.
`copy_rows` goes through the last dimension in one loop; `copy_tiles` is for two dimensions that are each contiguous on
one side only, and does squares of them, so that every cache line that it touches is used up before it is gone;
`turn_tiles` is the same for floats, of which smaller squares are turned in registers.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import minimum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import transpose_block

TILE = 32
"""Rows and columns of a square of `copy_tiles`."""


def source(kernel: str, element: str) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``."""
    return text(KERNELS[kernel], T=element, TILE=str(TILE))


def fill_zero(args, begin, end, thread):
    """An item is a block of `width` elements. Arguments: o[count]; count, width."""
    o = pointer(args, 1, T)
    count, width = args[2], args[3]
    for item in range(begin, end):
        for i in range(item * width, minimum((item + 1) * width, count)):
            store(o, i, T(0), 0, 1)


def copy_rows(args, begin, end, thread):
    """An item is a part of a row, at most `width` elements. Arguments: x, o; offsets in x and o; count, stride in x,
    stride in o of the last dimension; parts per row, width, rank; then for each other dimension its size and strides
    in x and o."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    count, x_step, o_step, parts, width, rank = args[5], args[6], args[7], args[8], args[9], args[10]
    lines, down, across = i64(1), i64(0), i64(0)
    if rank > 0 and parts == 1:                 # whole rows one after the other: divisions take longer than a short row
        d = 8 + 3 * rank
        lines, down, across = i64(args[d]), i64(args[d + 1]), i64(args[d + 2])
    item = i64(begin)
    while item < end:
        first = item % parts * width
        length = minimum(width, count - first)
        start, target, rest = i64(args[3] + first * x_step), i64(args[4] + first * o_step), i64(item // parts)
        together = minimum(i64(lines - rest % lines), end - item)
        for k in range(rank):
            d = 11 + 3 * (rank - 1 - k)
            start = i64(start + rest % args[d] * args[d + 1])
            target = i64(target + rest % args[d] * args[d + 2])
            rest = i64(rest // args[d])
        for _ in range(together):
            if o_step == 1 and x_step == 1:
                for j in range(length):
                    store(o, target + j, load(x, start + j, 0, 2), 1, 2)
            elif o_step == 1:
                for j in range(length):
                    store(o, target + j, load(x, start + j * x_step, 0, 2), 1, 2)
            else:
                for j in range(length):
                    store(o, target + j * o_step, load(x, start + j * x_step, 0, 2), 1, 2)
            start = i64(start + down)
            target = i64(target + across)
        item = i64(item + together)


def copy_tiles(args, begin, end, thread):
    """An item is a square of rows (contiguous in x) and columns (contiguous in o). Arguments: x, o; offsets in x and
    o; rows, columns, stride of columns in x, stride of rows in o; rank; then for each other dimension its size and
    strides in x, o."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    rows, columns, x_step, o_step, rank = args[5], args[6], args[7], args[8], args[9]
    down, across = (rows + TILE - 1) // TILE, (columns + TILE - 1) // TILE
    for item in range(begin, end):
        first_row, first_column = item // across % down * TILE, item % across * TILE
        last_row, last_column = minimum(first_row + TILE, rows), minimum(first_column + TILE, columns)
        start, target, rest = i64(args[3]), i64(args[4]), i64(item // (across * down))
        for k in range(rank):
            d = 10 + 3 * (rank - 1 - k)
            start = i64(start + rest % args[d] * args[d + 1])
            target = i64(target + rest % args[d] * args[d + 2])
            rest = i64(rest // args[d])
        for i in range(first_row, last_row):
            for j in range(first_column, last_column):
                store(o, target + i * o_step + j, load(x, start + i + j * x_step, 0, 2), 1, 2)


def turn_tiles(args, begin, end, thread):
    """`copy_tiles`, with the same arguments, for float32 and float64."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    rows, columns, x_step, o_step, rank = args[5], args[6], args[7], args[8], args[9]
    down, across = (rows + TILE - 1) // TILE, (columns + TILE - 1) // TILE
    for item in range(begin, end):
        first_row, first_column = item // across % down * TILE, item % across * TILE
        last_row, last_column = minimum(first_row + TILE, rows), minimum(first_column + TILE, columns)
        start, target, rest = i64(args[3]), i64(args[4]), i64(item // (across * down))
        for k in range(rank):
            d = 10 + 3 * (rank - 1 - k)
            start = i64(start + rest % args[d] * args[d + 1])
            target = i64(target + rest % args[d] * args[d + 2])
            rest = i64(rest // args[d])
        transpose_block(last_column - first_column, last_row - first_row,
                        x, i64(start + first_row + first_column * x_step), x_step,
                        o, i64(target + first_row * o_step + first_column), o_step)


KERNELS = {k.__name__: k for k in (fill_zero, copy_rows, copy_tiles, turn_tiles)}
