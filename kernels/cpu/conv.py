"""Convolutions as matrix products whose right operand is gathered from the image while it is packed (implicit GEMM).

The column matrix (im2col) is never in memory: a kernel gathers one panel of it, at most as deep as a block of the
core, into a buffer on its stack, calls the GEMM core for it, and goes on. `convolve` makes [channels, positions] of
each image and group; with its steps turned around it is the gradient in the image too. `convolve_weight` makes the
gradient in the weights: the panel's columns are taps, its depth are positions. The left operands come packed, by
`gemm_pack.pack_source`.

A position (y, x) and a tap (i, j) meet in the image at row ``y * stride + shift + i * tap``, if that is inside of it,
and likewise for columns; elsewhere is zero. A convolution has shift -padding and tap = dilation. Its gradient in the
image is one such product for each phase, that is for positions that are equal modulo the stride: only every so many-th
tap meets them. `interleave` puts a phase in its places.
"""

from __future__ import annotations

from textwrap import indent

from jitgrad.kernels.cpu.gemm import element_tile, unpack
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK

GEOMETRY = ("channels", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width",
            "stride_y", "stride_x", "shift_y", "shift_x", "tap_y", "tap_x")
"""What both kernels know of a convolution; `channels` of one group of the image that is gathered from."""

ARGUMENTS = (*GEOMETRY, "groups", "rows", "panel_rows", "panels", "blocks", "columns_per_item", "channels_per_step",
             "images", "images_per_item")
"""The integers of `convolve`; before them: packed weights, image, result, the core."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "groups", "rows", "panel_rows", "blocks", "columns_per_item", "images", "images_per_item",
                    "rows_at_once", "panels_size")
"""The integers of `convolve_weight`; before them: gradient, image, partial results, panels of the thread's own, of
`panels_size` elements, the core. A block of the depth has `rows_at_once` rows of the result, or a part of one."""

# Which columns of the result meet the image at the tap's column, which is `edge` columns from theirs: from `from_x` to
# `to_x`.
_FIND_COLUMNS = """\
edge = shift_x + j * tap_x
from_x = max(-(edge // stride_x), 0)
to_x = max(-((edge - width) // stride_x), 0)
"""

_CONVOLVE = """\
def convolve_{short}(args, begin, end, thread):
    a = pointer(args, 1, {short})
    x = pointer(args, 2, {short})
    o = pointer(args, 3, {short})
{unpack}
    positions = out_height * out_width
    taps = kernel_height * kernel_width
    depth, plane = channels * taps, height * width
    panel = make_panel(o)
    for item in range(begin, end):
        first_column = item % blocks * columns_per_item
        last_column = min(first_column + columns_per_item, positions)
        group = item // blocks % groups
        first_image = item // (blocks * groups) * images_per_item
        last_image = min(first_image + images_per_item, images)
        for first_channel in range(0, channels, channels_per_step):
            some = min(channels_per_step, channels - first_channel)
            for image in range(first_image, last_image):
                part = image * groups + group
                first = (part * channels + first_channel) * plane
                for column in range(first_column, last_column, {columns}):
                    end_column = min(column + {columns}, last_column)
                    for y in range(column // out_width, (end_column - 1) // out_width + 1):
                        start = max(column, y * out_width)
                        run = min(end_column, (y + 1) * out_width) - start
                        first_x = start - y * out_width
                        for j in range(kernel_width):
{find_columns}
                            low = max(from_x - first_x, 0)
                            high = max(to_x - first_x, 0)
                            source = (first_x + low) * stride_x + edge
                            place = start - column + j * {columns}
                            line = y * stride_y + shift_y
                            if taps == 1:
                                bottom = some if line >= 0 and line < height else 0
                                gather_rows(some, 0, bottom, run, low, high, x, first + line * width + source, plane,
                                            stride_x, panel, place, {columns})
                                continue
                            for i in range(kernel_height):
                                row = line + i * tap_y
                                stop = high if row >= 0 and row < height else low
                                for channel in range(some):
                                    gather_run(run, low, stop, x, first + channel * plane + row * width + source, stride_x,
                                               panel, place + (i * kernel_width + channel * taps) * {columns})
                    steps = some * taps
                    multiply_block(args, 4, rows, end_column - column, steps, steps, panel_rows,
                                   a, (group * panels * depth + first_channel * taps) * {packed}, {packed} * depth, 1,
                                   {packed}, panel, 0, 0, {columns},
                                   o, part * rows * positions + column, positions, first_channel)
"""

_WEIGHT = """\
def convolve_weight_{short}(args, begin, end, thread):
    a = pointer(args, 1, {short})
    x = pointer(args, 2, {short})
    o = pointer(args, 3, {short})
    panels = pointer(args, 4, {short})
{unpack}
    positions = out_height * out_width
    taps = kernel_height * kernel_width
    columns = channels * taps
    panels_base = thread * panels_size
    lines = make_panel(o)
    for item in range(begin, end):
        column = item % blocks * columns_per_item
        end_column = min(column + columns_per_item, columns)
        several = 1 if end_column - column > {columns} else 0
        part = item // blocks
        group = part % groups
        first_image = part // groups * images_per_item
        for image in range(first_image, min(first_image + images_per_item, images)):
            for first_y in range(0, out_height, rows_at_once):
                down = min(rows_at_once, out_height - first_y)
                for first_x in range(0, out_width, {depth}):
                    across = min({depth}, out_width - first_x)
                    first, steps = first_y * out_width + first_x, down * across
                    for some in range(column, end_column, {lanes}):
                        for k in range(some, min(some + {lanes}, end_column)):
                            plane = ((image * groups + group) * channels + k // taps) * height * width
                            line = shift_y + k % taps // kernel_width * tap_y
                            top = max(-(line // stride_y) - first_y, 0)
                            bottom = max(-((line - height) // stride_y) - first_y, 0)
                            j = k % kernel_width
{find_columns}
                            low = max(from_x - first_x, 0)
                            high = max(to_x - first_x, 0)
                            source = ((first_y + top) * stride_y + line) * width + (first_x + low) * stride_x + edge
                            gather_rows(down, top, bottom, across, low, high, x, plane + source, stride_y * width, stride_x,
                                        lines, (k - some) * {depth}, across)
                        place = panels_base + (some - column) // {columns} * {columns} * steps + (some - column) % {columns}
                        for d in range(0, steps, {lanes}):
                            transpose_tile({lanes}, lines, d, {depth}, panels, place + d * {columns}, {columns}, {lanes})
                    multiply_block(args, 5, rows, end_column - column, steps, steps, panel_rows,
                                   a, (image * groups + group) * rows * positions + first, panel_rows * positions,
                                   positions, 1, panels, panels_base, several * {columns} * steps, {columns},
                                   o, part * rows * columns + column, columns, image - first_image + first)
"""

_ADD_PARTS = """\
def add_parts_{short}(args, begin, end, thread):
    x = pointer(args, 1, {short})
    o = pointer(args, 2, {short})
    size = args[3]
    parts = args[4]
    block = args[5]
    for item in range(begin, end):
        for i in range(item * block, min(item * block + block, size)):
            total = load(x, i, 0, 2)
            for part in range(1, parts):
                total = {short}(total + load(x, part * size + i, 0, 2))
            store(o, i, total, 1, 2)
"""


_INTERLEAVE = """\
def interleave_{short}(args, begin, end, thread):
    x = pointer(args, 1, {short})
    o = pointer(args, 2, {short})
    phase_height = args[3]
    phase_width = args[4]
    height = args[5]
    width = args[6]
    phase_y = args[7]
    phase_x = args[8]
    stride_y = args[9]
    stride_x = args[10]
    exists = args[11]
    for item in range(begin, end):
        for y in range(phase_height):
            place = (item * height + phase_y + y * stride_y) * width + phase_x
            source = (item * phase_height + y) * phase_width
            for i in range(phase_width):
                value = {short}(0)
                if exists:
                    value = load(x, source + i, 0, 2)
                store(o, place + i * stride_x, value, 1, 2)
"""


def convolve_source(short: str) -> str:
    """The text of `convolve` for ``f32`` or ``f64``. Items: blocks of images, groups, blocks of positions."""
    return _fill(_CONVOLVE, short, ARGUMENTS)


def weight_source(short: str) -> str:
    """The text of `convolve_weight`. Items: runs of `images_per_item` images, groups, panels of taps; each run makes a
    partial result."""
    return _fill(_WEIGHT, short, WEIGHT_ARGUMENTS, 6)


def add_parts_source(short: str) -> str:
    """The text that adds up partial results: parts, result, its size, the number of parts, elements per item."""
    return _ADD_PARTS.format(short=short)


def interleave_source(short: str) -> str:
    """The text that copies a phase, [planes, phase_height, phase_width], to every so many-th row and column of
    [planes, height, width]; zeros where it does not exist. Items: planes."""
    return _INTERLEAVE.format(short=short)


def _fill(text: str, short: str, names: tuple[str, ...], first: int = 5) -> str:
    """A template with the piece that both have, the geometry of the register tile and the names of its integers, from
    argument `first` on."""
    tile = element_tile(short)
    return text.format(short=short, unpack=unpack(names, first), find_columns=indent(_FIND_COLUMNS, " " * 28).rstrip(),
                       columns=tile.columns, packed=tile.packed_rows, lanes=tile.lanes, depth=DEPTH_BLOCK)
