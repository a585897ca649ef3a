"""Convolutions as matrix products whose right operand is gathered from the image while it is packed (implicit GEMM).

The column matrix (im2col) is never in memory: a kernel gathers one panel of it, at most as deep as a block of the
core, into a buffer on its stack, calls the GEMM core for it, and goes on. `convolve` makes [channels, positions] of each
image and group; with its steps turned around it is the gradient in the image too. `convolve_weight` makes the gradient
in the weights: the panel's columns are taps, its depth are positions. Left operands arrive packed by `gemm.pack_source`.

A position (y, x) and a tap (i, j) meet in the image at row ``(y * stride + shift + i * tap) / spread``, if that is a
whole number inside of it, and likewise for columns; elsewhere is zero. A convolution has spread 1, shift -padding and
tap = dilation; its gradient in the image has stride 1, shift padding, tap = -dilation, spread = the stride.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile, unpack
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK

GEOMETRY = ("channels", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width",
            "stride_y", "stride_x", "shift_y", "shift_x", "tap_y", "tap_x", "spread_y", "spread_x")
"""What both kernels know of a convolution; `channels` of one group of the image that is gathered from."""

ARGUMENTS = (*GEOMETRY, "groups", "rows", "panel_rows", "panels", "blocks", "columns_per_item", "channels_per_step")
"""The integers of `convolve`; before them: packed weights, image, result, the core."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "groups", "rows", "panel_rows", "panels", "blocks", "images", "images_per_item")
"""The integers of `convolve_weight`; before them: packed gradient, image, partial results, the core."""

# One run of positions in a row of the result, for one tap: `run` elements from `place` on.
_GATHER = {
    False: """\
line = row >= 0 and row < height
left = first_x * stride_x + shift_x + j * tap_x
for r in range(run):
    s = left + r * stride_x
    value = {short}(0)
    if line and s >= 0 and s < width:
        value = load(x, plane + row * width + s, 1, 3)
    store({buffer}, {place} + r, value, 2, 3)
""",
    True: """\
line = row >= 0 and row % spread_y == 0 and row // spread_y < height
left = first_x * stride_x + shift_x + j * tap_x
for r in range(run):
    s = left + r * stride_x
    value = {short}(0)
    if line and s >= 0 and s % spread_x == 0 and s // spread_x < width:
        value = load(x, plane + row // spread_y * width + s // spread_x, 1, 3)
    store({buffer}, {place} + r, value, 2, 3)
"""}

_CONVOLVE = """\
def convolve{suffix}_{short}(args, begin, end, thread):
    a = pointer(args, 1, {short})
    x = pointer(args, 2, {short})
    o = pointer(args, 3, {short})
{unpack}
    positions = out_height * out_width
    taps = kernel_height * kernel_width
    depth = channels * taps
    panel = make_panel(o)
    for item in range(begin, end):
        first_column = item % blocks * columns_per_item
        last_column = min(first_column + columns_per_item, positions)
        part = item // blocks
        for column in range(first_column, last_column, {columns}):
            end_column = min(column + {columns}, last_column)
            for first_channel in range(0, channels, channels_per_step):
                last_channel = min(first_channel + channels_per_step, channels)
                for y in range(column // out_width, (end_column - 1) // out_width + 1):
                    start = max(column, y * out_width)
                    run = min(end_column, (y + 1) * out_width) - start
                    first_x = start - y * out_width
                    place = start - column
                    for channel in range(first_channel, last_channel):
                        plane = (part * channels + channel) * height * width
                        for i in range(kernel_height):
                            row = y * stride_y + shift_y + i * tap_y
                            for j in range(kernel_width):
{gather}
                                place += {columns}
                multiply_panel(args, 4, rows, end_column - column, (last_channel - first_channel) * taps, panel_rows,
                               a, part % groups * panels * {packed} * depth + first_channel * taps * {packed},
                               {packed} * depth, {packed}, panel, {columns},
                               o, part * rows * positions + column, positions, first_channel)
"""

_WEIGHT = """\
def convolve_weight_{short}(args, begin, end, thread):
    a = pointer(args, 1, {short})
    x = pointer(args, 2, {short})
    o = pointer(args, 3, {short})
{unpack}
    positions = out_height * out_width
    taps = kernel_height * kernel_width
    columns = channels * taps
    panel = make_panel(o)
    lines = make_panel(o)
    for item in range(begin, end):
        column = item % blocks * {columns}
        end_column = min(column + {columns}, columns)
        part = item // blocks
        group = part % groups
        first_image = part // groups * images_per_item
        for image in range(first_image, min(first_image + images_per_item, images)):
            for first in range(0, positions, {depth}):
                last = min(first + {depth}, positions)
                for k in range(column, end_column):
                    plane = ((image * groups + group) * channels + k // taps) * height * width
                    i = k % taps // kernel_width
                    j = k % kernel_width
                    for y in range(first // out_width, (last - 1) // out_width + 1):
                        start = max(first, y * out_width)
                        run = min(last, (y + 1) * out_width) - start
                        first_x = start - y * out_width
                        row = y * stride_y + shift_y + i * tap_y
{gather}
                for d in range(0, last - first, {lanes}):
                    for k in range(0, end_column - column, {lanes}):
                        transpose_tile({lanes}, lines, k * {depth} + d, {depth}, panel, d * {columns} + k, {columns},
                                       {lanes})
                multiply_panel(args, 4, rows, end_column - column, last - first, panel_rows,
                               a, (image * groups + group) * panels * {packed} * positions + first * {packed},
                               {packed} * positions, {packed}, panel, {columns},
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


def convolve_source(short: str, spread: bool) -> str:
    """The text of `convolve` for ``f32`` or ``f64``; `spread`: some spread is above 1. Items: images, groups, blocks of
    positions."""
    return _fill(_CONVOLVE, short, ARGUMENTS, 32, spread, buffer="panel", place="place",
                 suffix="_spread" if spread else "")


def weight_source(short: str) -> str:
    """The text of `convolve_weight`. Items: runs of `images_per_item` images, groups, panels of taps; each run makes a
    partial result."""
    return _fill(_WEIGHT, short, WEIGHT_ARGUMENTS, 24, False, buffer="lines",
                 place=f"(k - column) * {DEPTH_BLOCK} + start - first")


def add_parts_source(short: str) -> str:
    """The text that adds up partial results: parts, result, its size, the number of parts, elements per item."""
    return _ADD_PARTS.format(short=short)


def _fill(text: str, short: str, names: tuple[str, ...], indent: int, spread: bool, **words: str) -> str:
    """A template with the loops of its gather, the geometry of the register tile and the names of its integers."""
    tile = element_tile(short)
    lines = _GATHER[spread].format(short=short, **words).splitlines()
    return text.format(short=short, unpack=unpack(names, 5), gather="\n".join(" " * indent + line for line in lines),
                       columns=tile.columns, packed=tile.packed_rows, lanes=tile.lanes, depth=DEPTH_BLOCK, **words)
