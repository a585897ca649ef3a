"""Convolutions of images in groups of few channels, and their gradients in the weights, on planes with zeros around them.

A group's product has few rows, too few to pay for gathering the columns that they are multiplied with (`kernels.cpu.conv`).
So nothing is gathered: an item copies the channels of a group into planes of its own, wide enough for what any tap meets.
There a tap meets all positions of the result, row behind row, at one distance: the row of the column matrix that belongs to
a channel and a tap is a piece of memory as it lies, and a table says where it begins. Between rows of the result are
positions that do not exist; they are computed, too, and left behind. For the weights' gradient, planes have several small
images one below the other, so that its sums are long.

A stride is divided into phases: each row and column modulo the stride has a plane of its own. How positions and taps meet is
said in `kernels.cpu.conv`; as there, the gradient in the image is such a convolution, phase by phase.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.math import maximum, minimum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import gather_run, multiply_placed
from jitgrad.kernels.cpu.tile_lines import HIGHEST as LINES, multiply_lines

COLUMNS = 32                                    # of the register tile; `source` puts the machine's in its place

GEOMETRY = ("channels", "height", "width", "rows", "out_height", "out_width", "kernel_height", "kernel_width", "stride_y",
            "stride_x", "tap_y", "tap_x", "groups", "low_y", "low_x", "plane_height", "plane_width", "planes_size")
"""Integers of both kernels: the image and the result, with `channels` and `rows` of one group; steps as in
`kernels.cpu.conv`, where the first row and column of the image that any tap meets are `low_y` and `low_x`; the size of a
plane; elements of all planes of a group."""

ARGUMENTS = (*GEOMETRY, "panel_rows", "table_size", "result_size", "whole_height", "whole_width", "first_y", "first_x",
             "spread_y", "spread_x")
"""Those of `convolve_planes`, behind weights, image, result, and three of the thread's own: planes, table, result. What is
made are every so many-th row and column of a result that is larger, or all of it."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "images", "images_per_item", "images_at_once", "line_size", "lines_size", "sums_size")
"""Those of `planes_weight_gradient`, behind image, gradient, partial results, and three of the thread's own: planes, the
gradient in rows as wide as the planes', `line_size` elements for each channel, and sums. Planes have `images_at_once`."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    return text(KERNELS[kernel], T=element, COLUMNS=str(element_tile(element).columns), LINES=str(LINES))


def convolve_planes(args, begin, end, thread):
    """See the module and `ARGUMENTS`. Items: images, groups."""
    w, x, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    planes, table, result = pointer(args, 4, T), pointer(args, 5, i64), pointer(args, 6, T)
    channels, height, width, rows, out_height, out_width = args[7], args[8], args[9], args[10], args[11], args[12]
    kernel_height, kernel_width, stride_y, stride_x, tap_y = args[13], args[14], args[15], args[16], args[17]
    tap_x, groups, low_y, low_x, plane_height, plane_width = args[18], args[19], args[20], args[21], args[22], args[23]
    panel_rows, whole_height, whole_width, phase_y, phase_x = args[25], args[28], args[29], args[30], args[31]
    spread_y, spread_x = args[32], args[33]
    plane_base, table_base, result_base = thread * args[24], thread * args[26], thread * args[27]
    plane, taps, phases = plane_height * plane_width, kernel_height * kernel_width, stride_y * stride_x
    depth, positions = channels * taps, (out_height - 1) * plane_width + out_width
    first_y, first_x = minimum(i64(0), (kernel_height - 1) * tap_y), minimum(i64(0), (kernel_width - 1) * tap_x)
    for d in range(depth):
        down, across = d % taps // kernel_width * tap_y - first_y, d % kernel_width * tap_x - first_x
        phase = d // taps * phases + down % stride_y * stride_x + across % stride_x
        store(table, table_base + d, i64(phase * plane + down // stride_y * plane_width + across // stride_x), 4, 6)
    for item in range(begin, end):
        for number in range(channels * phases):
            line, column = low_y + number % phases // stride_x, low_x + number % stride_x
            first = maximum(i64(-(column // stride_x)), i64(0))
            last = maximum(minimum(i64((width - 1 - column) // stride_x + 1), plane_width), first)
            place = plane_base + number * plane
            source = ((item * channels + number // phases) * height + line) * width + column + first * stride_x
            for y in range(plane_height):
                row = line + y * stride_y
                stop = first
                if row >= 0 and row < height:
                    stop = last
                gather_run(plane_width, first, stop, x, source + y * stride_y * width, stride_x,
                           planes, place + y * plane_width)
        for column in range(0, positions, COLUMNS):
            for r in range(0, rows, panel_rows):
                multiply_placed(min(panel_rows, rows - r), min(COLUMNS, positions - column), depth,
                                w, (item % groups * rows + r) * depth, depth, 1, planes, plane_base + column,
                                table, table_base, result, result_base + r * positions + column, positions, 0)
        for r in range(rows):
            for y in range(out_height):
                place = result_base + r * positions + y * plane_width
                target = ((item * rows + r) * whole_height + phase_y + y * spread_y) * whole_width + phase_x
                if spread_x == 1:
                    gather_run(out_width, 0, out_width, result, place, 1, o, target)
                else:
                    for k in range(out_width):
                        store(o, target + k * spread_x, load(result, place + k, 5, 6), 2, 6)


def planes_weight_gradient(args, begin, end, thread):
    """See the module and `WEIGHT_ARGUMENTS`. Items: runs of images, groups."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    planes, lines, sums = pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T)
    channels, height, width, rows, out_height, out_width = args[7], args[8], args[9], args[10], args[11], args[12]
    kernel_height, kernel_width, stride_y, stride_x, tap_y = args[13], args[14], args[15], args[16], args[17]
    tap_x, groups, low_y, low_x, plane_height, plane_width = args[18], args[19], args[20], args[21], args[22], args[23]
    images, images_per_item, at_once, line_size = args[25], args[26], args[27], args[28]
    plane_base, line_base, sum_base = thread * args[24], thread * args[29], thread * args[30]
    plane, taps, phases = plane_height * plane_width, kernel_height * kernel_width, stride_y * stride_x
    first_y, first_x = minimum(i64(0), (kernel_height - 1) * tap_y), minimum(i64(0), (kernel_width - 1) * tap_x)
    for item in range(begin, end):
        start = item // groups * images_per_item
        stop_image = min(start + images_per_item, images)
        for first_image in range(start, stop_image, at_once):
            count = min(at_once, stop_image - first_image)
            positions = (count - 1) * plane + (out_height - 1) * plane_width + out_width
            for number in range(channels * phases * count):
                part = (first_image + number % count) * groups + item % groups
                channel, phase = number // count // phases, number // count % phases
                line, column = low_y + phase // stride_x, low_x + phase % stride_x
                first = maximum(i64(-(column // stride_x)), i64(0))
                last = maximum(minimum(i64((width - 1 - column) // stride_x + 1), plane_width), first)
                place = plane_base + (number // count * at_once + number % count) * plane
                source = ((part * channels + channel) * height + line) * width + column + first * stride_x
                for y in range(plane_height):
                    row = line + y * stride_y
                    stop = first
                    if row >= 0 and row < height:
                        stop = last
                    gather_run(plane_width, first, stop, x, source + y * stride_y * width, stride_x,
                               planes, place + y * plane_width)
            for number in range(count * rows):
                part = (first_image + number // rows) * groups + item % groups
                place = line_base + number % rows * line_size + number // rows * plane
                for y in range(out_height):
                    ends = plane_width
                    if y == out_height - 1:                 # with what is between images, and behind the last one
                        ends = plane - y * plane_width
                    gather_run(ends, 0, out_width, g, ((part * rows + number % rows) * out_height + y) * out_width, 1,
                               lines, place + y * plane_width)
            for r in range(rows):
                gather_run(line_size - count * plane, 0, 0, g, 0, 1, lines, line_base + r * line_size + count * plane)
            for tap in range(taps):
                down, across = tap // kernel_width * tap_y - first_y, tap % kernel_width * tap_x - first_x
                phase = down % stride_y * stride_x + across % stride_x
                place = plane_base + phase * at_once * plane + down // stride_y * plane_width + across // stride_x
                for r in range(0, rows, LINES):
                    multiply_lines(min(LINES, rows - r), channels, positions, lines, line_base + r * line_size, line_size,
                                   planes, place, phases * at_once * plane,
                                   sums, sum_base + (tap * rows + r) * channels, channels, first_image - start)
        for r in range(rows):
            for c in range(channels):
                for tap in range(taps):
                    value = load(sums, sum_base + (tap * rows + r) * channels + c, 5, 6)
                    store(o, ((item * rows + r) * channels + c) * taps + tap, value, 2, 6)


KERNELS = {kernel.__name__: kernel for kernel in (convolve_planes, planes_weight_gradient)}
"""Each by its name."""
