"""Convolutions of images in groups of few channels, and their gradients in the weights, on planes with zeros around them;
without groups, those from few channels or to few.

A group's product has few rows, or a shallow depth: too few to pay for gathering the columns that they are multiplied with
(`kernels.cpu.conv`). So an item copies the channels of a group into planes of its own, wide enough for what any tap meets.
There a tap meets a row of the result at one distance: the row of the column matrix that belongs to a channel and a tap is a
piece of memory as it lies, and a table says where it begins. Where rows do not fill vectors, all positions are done at once:
between rows of the result are positions that do not exist; they are computed, too, and left behind.

For the weights' gradient, each column of taps has planes of its own, as wide as the result: then a tap meets all positions,
row behind row, and the gradient is multiplied as it lies. Planes have several small images one below the other, so that
sums are long, or a part of the rows of a large one.

A stride is divided into phases: each row and column modulo the stride has a plane of its own. How positions and taps meet is
said in `kernels.cpu.conv`; as there, the gradient in the image is such a convolution, phase by phase.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.math import maximum, minimum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import gather_rows, gather_run, multiply_placed
from jitgrad.kernels.cpu.tile_lines import HIGHEST as LINES, multiply_lines

COLUMNS, LANES = 32, 16                         # of the register tile; `source` puts the machine's in their place
STEPS = 144                                     # of one sum, which is then added to the others: else they are less exact

GEOMETRY = ("channels", "height", "width", "rows", "out_height", "out_width", "kernel_height", "kernel_width", "stride_y",
            "stride_x", "tap_y", "tap_x", "groups", "low_y", "low_x", "plane_height", "plane_width", "planes_size")
"""Integers of both kernels: the image and the result, with `channels` and `rows` of one group; steps as in
`kernels.cpu.conv`, where the first row and column of the image that any tap meets are `low_y` and `low_x`; the size of a
plane; elements of all planes of a group."""

ARGUMENTS = (*GEOMETRY, "table_size", "result_size", "whole_height", "whole_width", "first_y", "first_x", "spread_y",
             "spread_x", "blocks", "rows_at_once")
"""Those of `convolve_planes`, behind weights, image, result, and three of the thread's own: planes, table, result. What is
made are every so many-th row and column of a result that is larger, or all of it. Without memory for a result, rows are made
where they belong, `rows_at_once` in each of `blocks`."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "images", "images_per_item", "images_at_once", "line_size", "lines_size", "sums_size",
                    "rows_at_once")
"""Those of `planes_weight_gradient`, behind image, gradient, partial results, and three of the thread's own: planes, the
gradient in lines, `line_size` elements for each channel, and sums. Planes have `images_at_once`, or `rows_at_once` of one;
`plane_height` is that of these, and `plane_width` that of the result."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    tile = element_tile(element)
    return text(KERNELS[kernel], T=element, COLUMNS=str(tile.columns), LANES=str(tile.lanes), LINES=str(LINES),
                STEPS=str(STEPS))


def convolve_planes(args, begin, end, thread):
    """See the module and `ARGUMENTS`. Items: images, groups, blocks of rows."""
    w, x, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    planes, table, result = pointer(args, 4, T), pointer(args, 5, i64), pointer(args, 6, T)
    channels, height, width, rows, out_height, out_width = args[7], args[8], args[9], args[10], args[11], args[12]
    kernel_height, kernel_width, stride_y, stride_x, tap_y = args[13], args[14], args[15], args[16], args[17]
    tap_x, groups, low_y, low_x, plane_height, plane_width = args[18], args[19], args[20], args[21], args[22], args[23]
    whole_height, whole_width, phase_y, phase_x = args[27], args[28], args[29], args[30]
    spread_y, spread_x, blocks, at_once = args[31], args[32], args[33], args[34]
    plane_base, table_base, result_base = thread * args[24], thread * args[25], thread * args[26]
    plane, taps, phases = plane_height * plane_width, kernel_height * kernel_width, stride_y * stride_x
    depth, positions = channels * taps, (out_height - 1) * plane_width + out_width
    first_y, first_x = minimum(i64(0), (kernel_height - 1) * tap_y), minimum(i64(0), (kernel_width - 1) * tap_x)
    for d in range(depth):
        down, across = d % taps // kernel_width * tap_y - first_y, d % kernel_width * tap_x - first_x
        phase = d // taps * phases + down % stride_y * stride_x + across % stride_x
        store(table, table_base + d, i64(phase * plane + down // stride_y * plane_width + across // stride_x), 4, 6)
    for block in range(begin, end):
        item, start = block // blocks, block % blocks * at_once
        stop_row = minimum(i64(start + at_once), out_height)
        for number in range(channels * phases):
            line, column = low_y + start * stride_y + number % phases // stride_x, low_x + number % stride_x
            first = maximum(i64(-(column // stride_x)), i64(0))
            last = maximum(minimum(i64((width - 1 - column) // stride_x + 1), plane_width), first)
            top = maximum(i64(-(line // stride_y)), i64(0))
            bottom = maximum(i64((height - 1 - line) // stride_y + 1), i64(0))
            place = plane_base + number * plane
            source = ((item * channels + number // phases) * height + line + top * stride_y) * width + column
            source += first * stride_x
            gather_rows(plane_height - at_once + stop_row - start, top, bottom, plane_width, first, last,
                        x, source, stride_y * width, stride_x, planes, place, plane_width)
        if args[26] == 0:
            for y in range(start, stop_row):
                for column in range(0, out_width, COLUMNS):
                    place = plane_base + (y - start) * plane_width + column
                    for d in range(0, depth, STEPS):
                        multiply_placed(rows, min(COLUMNS, out_width - column), min(STEPS, depth - d),
                                        w, item % groups * rows * depth + d, depth, 1, planes, place, table, table_base + d,
                                        o, (item * rows * out_height + y) * out_width + column, out_height * out_width,
                                        i64(d > 0))
            continue
        for column in range(0, positions, COLUMNS):
            for d in range(0, depth, STEPS):
                multiply_placed(rows, min(COLUMNS, positions - column), min(STEPS, depth - d),
                                w, item % groups * rows * depth + d, depth, 1, planes, plane_base + column,
                                table, table_base + d, result, result_base + column, positions, i64(d > 0))
        for r in range(rows):
            place = result_base + r * positions
            target = ((item * rows + r) * whole_height + phase_y) * whole_width + phase_x
            if spread_x == 1:
                gather_rows(out_height, 0, out_height, out_width, 0, out_width, result, place, plane_width, 1,
                            o, target, spread_y * whole_width)
            else:
                for y in range(out_height):
                    for k in range(out_width):
                        store(o, target + y * spread_y * whole_width + k * spread_x,
                              load(result, place + y * plane_width + k, 5, 6), 2, 6)


def planes_weight_gradient(args, begin, end, thread):
    """See the module and `WEIGHT_ARGUMENTS`. Items: runs of images, groups."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    planes, lines, sums = pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T)
    channels, height, width, rows, out_height, out_width = args[7], args[8], args[9], args[10], args[11], args[12]
    kernel_height, kernel_width, stride_y, stride_x, tap_y = args[13], args[14], args[15], args[16], args[17]
    tap_x, groups, low_y, low_x, plane_height = args[18], args[19], args[20], args[21], args[22]
    images, images_per_item, at_once, line_size, rows_at_once = args[25], args[26], args[27], args[28], args[31]
    plane_base, line_base, sum_base = thread * args[24], thread * args[29], thread * args[30]
    plane, columns = plane_height * out_width, channels * kernel_width
    first_y, first_x = minimum(i64(0), (kernel_height - 1) * tap_y), minimum(i64(0), (kernel_width - 1) * tap_x)
    for item in range(begin, end):
        start_image = item // groups * images_per_item
        stop_image = min(start_image + images_per_item, images)
        more = i64(0)
        for first_image in range(start_image, stop_image, at_once):
            count = min(at_once, stop_image - first_image)
            for start in range(0, out_height, rows_at_once):
                high = min(rows_at_once, out_height - start)
                for number in range(columns * stride_y * count):
                    image, one = number % count, number // count
                    channel, tap, phase = one // stride_y // kernel_width, one // stride_y % kernel_width, one % stride_y
                    line, column = low_y + start * stride_y + phase, low_x + tap * tap_x - first_x
                    first = maximum(i64(-(column // stride_x)), i64(0))
                    last = maximum(minimum(i64((width - 1 - column) // stride_x + 1), out_width), first)
                    place = plane_base + ((phase * columns + channel * kernel_width + tap) * at_once + image) * plane
                    source = ((first_image + image) * groups + item % groups) * channels + channel
                    source = (source * height + line) * width
                    tall = plane_height - rows_at_once + high
                    if stride_y == 1 and stride_x == 1 and width == out_width:      # all rows are one run of the image
                        before, behind = maximum(i64(-column), i64(0)), maximum(i64(column), i64(0))
                        first = maximum(i64(-line), i64(0)) * width + before
                        last = maximum(minimum(i64(height - line), tall) * width - behind, first)
                        gather_run(tall * width, first, last, x, source + column + first, 1, planes, place)
                        for k in range(min(before + behind, width)):                # but for what is beside it
                            edge = place + k
                            if behind > 0:
                                edge = place + width - 1 - k
                            for y in range(tall):
                                store(planes, edge + y * width, T(0), 3, 6)
                        continue
                    top = maximum(i64(-(line // stride_y)), i64(0))
                    bottom = maximum(i64((height - 1 - line) // stride_y + 1), i64(0))
                    gather_rows(tall, top, bottom, out_width, first, last,
                                x, source + top * stride_y * width + column + first * stride_x, stride_y * width, stride_x,
                                planes, place, out_width)
                left, left_base, left_row = g, i64(0), i64(out_height * out_width)
                left_base = ((first_image * groups + item % groups) * rows * out_height + start) * out_width
                if count > 1 or high * out_width % LANES != 0:
                    left, left_base, left_row = lines, i64(line_base), i64(line_size)
                    for number in range(count * rows):
                        image, r = number // rows, number % rows
                        source = ((((first_image + image) * groups + item % groups) * rows + r) * out_height + start)
                        room = plane
                        if image == count - 1:              # up to a whole number of vectors
                            room = line_size - image * plane
                        gather_run(room, 0, high * out_width, g, source * out_width, 1,
                                   lines, line_base + r * line_size + image * plane)
                for r in range(0, rows, LINES):
                    for tap in range(kernel_height):
                        down = tap * tap_y - first_y
                        place = plane_base + down % stride_y * columns * at_once * plane + down // stride_y * out_width
                        multiply_lines(min(LINES, rows - r), columns, (count - 1) * plane + high * out_width,
                                       left, left_base + r * left_row, left_row, planes, place, at_once * plane,
                                       sums, sum_base + (tap * rows + r) * columns, columns, more)
                more = i64(1)
        for r in range(rows):
            for c in range(channels):
                for tap in range(kernel_height * kernel_width):
                    place = (tap // kernel_width * rows + r) * columns + c * kernel_width + tap % kernel_width
                    store(o, ((item * rows + r) * channels + c) * kernel_height * kernel_width + tap,
                          load(sums, sum_base + place, 5, 6), 2, 6)


KERNELS = {kernel.__name__: kernel for kernel in (convolve_planes, planes_weight_gradient)}
"""Each by its name."""
