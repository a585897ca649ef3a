"""Convolutions of one to three dimensions, of any kernel, stride and dilation, tap by tap, with channels last.

An item turns its part of the images over, so that the channels of a position lie side by side. Then, for one tap after
the other, it lines up what that tap meets at each position of the result, as a matrix [positions, channels], and adds the
product with the tap's weights, [channels, outputs], to the result. Positions of several small images stand in one matrix.
A volume is one image for each of its planes; a tap meets one plane of it. `kernels.cpu.conv` says where positions and taps
meet; its `convolve` makes the same results out of planes as they are, for channels that do not fill vectors.

The gradient in the image is the same with weights that are swapped and taps that go the other way. That of a strided
convolution is spread out: position p and tap t meet at (p + shift + t * tap) / spread, where that is a whole number. The
positions that are equal modulo the spread meet the same taps, so they are done together, phase by phase.

The gradient in the weights adds up products [outputs, positions] @ [positions, channels] for each tap; each run of images
has a partial result.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK, gather_rows, make_panel, multiply_block, transpose_block

COLUMNS, TILE = 32, 14                          # of the register tile; `source` puts the machine's in their places
DEPTH = DEPTH_BLOCK                             # steps that a panel on the stack has room for

GEOMETRY = ("depth", "out_depth", "kernel_depth", "stride_z", "shift_z", "tap_z", "channels", "height", "width",
            "rows", "out_height", "out_width", "kernel_height", "kernel_width", "stride_y", "stride_x", "shift_y", "shift_x",
            "tap_y", "tap_x", "images", "images_per_part", "out_rows_per_part", "parts", "channels_per_item",
            "channel_blocks", "rows_per_item", "row_blocks")
"""Integers of both kernels: the image; the result, of `rows` channels; steps as in `kernels.cpu.conv`; how many images the
result has, volumes plane by plane; what a part of them is (some images, or some rows of one), and into how many one image is
cut; blocks of channels."""

ARGUMENTS = (*GEOMETRY, "panel_rows", "depth_block", "spread_z", "spread_y", "spread_x", "image_size", "lined_size",
             "result_size")
"""Those of `add_taps`, behind image, weights, result, three of the thread's own: image, what a tap meets, result; and the
core. The sizes are these in elements; the spreads are 1, or the stride of the convolution whose gradient this is."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "images_per_item", "image_size", "gradient_size", "lined_size", "sums_size")
"""Those of `taps_weight_gradient`, behind image, gradient, partial results, four of the thread's own: image, gradient,
what a tap meets, sums; and the core."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    tile = element_tile(element)
    return text(KERNELS[kernel], T=element, COLUMNS=str(tile.columns), TILE=str(tile.rows), DEPTH=str(DEPTH))


def tap_weights(args, begin, end, thread):
    """w[rows, channels, taps] to panels of [taps, channels, rows]. Arguments: w, panels; rows, channels, taps, panels.
    Items: panels."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, taps, panels = args[3], args[4], args[5], args[6]
    lines = make_panel(w)
    block = DEPTH // taps
    for panel in range(begin, end):
        count = min(COLUMNS, rows - panel * COLUMNS)
        for first in range(0, channels, block):
            some = min(block, channels - first)
            transpose_block(count, some * taps, w, (panel * COLUMNS * channels + first) * taps, channels * taps,
                            lines, 0, COLUMNS)
            for c in range(some):
                gather_rows(taps, 0, taps, COLUMNS, 0, count, lines, c * taps * COLUMNS, COLUMNS, 1,
                            u, (panel * channels + first + c) * COLUMNS, panels * channels * COLUMNS)


def tap_turned_weights(args, begin, end, thread):
    """w[channels, rows, taps] to panels of [taps, channels, rows]. Arguments and items: as above."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, taps, panels = args[3], args[4], args[5], args[6]
    for panel in range(begin, end):
        count = min(COLUMNS, rows - panel * COLUMNS)
        for channel in range(channels):
            gather_rows(taps, 0, taps, COLUMNS, 0, count, w, (channel * rows + panel * COLUMNS) * taps, 1, taps,
                        u, (panel * channels + channel) * COLUMNS, panels * channels * COLUMNS)


def add_taps(args, begin, end, thread):
    """See the module and `ARGUMENTS`. Items: parts of the images, blocks of the result's channels."""
    x, u, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    lasts, lined, result = pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T)
    depth, out_depth, kernel_depth, stride_z, shift_z, tap_z = args[8], args[9], args[10], args[11], args[12], args[13]
    channels, height, width, rows, out_height, out_width = args[14], args[15], args[16], args[17], args[18], args[19]
    kernel_height, kernel_width, stride_y, stride_x = args[20], args[21], args[22], args[23]
    shift_y, shift_x, tap_y, tap_x = args[24], args[25], args[26], args[27]
    images, images_per_part, out_rows_per_part, parts = args[28], args[29], args[30], args[31]
    rows_per_item, row_blocks, panel_rows, depth_block = args[34], args[35], args[36], args[37]
    spread_z, spread_y, spread_x = args[38], args[39], args[40]
    image_base, lined_base, result_base = thread * args[41], thread * args[42], thread * args[43]
    plane, out_plane, taps = height * width, out_height * out_width, kernel_height * kernel_width
    panels = (rows + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first_row = item % row_blocks * rows_per_item
        block = min(rows_per_item, rows - first_row)
        first_y = item // row_blocks % parts * out_rows_per_part
        last_y = min(first_y + out_rows_per_part, out_height)
        first_image = item // (row_blocks * parts) * images_per_part
        last_image = min(first_image + images_per_part, images)
        reach = (kernel_height - 1) * tap_y
        low = max((first_y * stride_y + shift_y + min(reach, 0)) // spread_y, 0)
        inside = max(min(((last_y - 1) * stride_y + shift_y + max(reach, 0)) // spread_y + 1, height) - low, 0) * width
        at_hand = i64(-1)
        for phase in range(spread_y * spread_x):
            phase_y, phase_x = first_y + phase // spread_x, phase % spread_x
            high, wide = (last_y - phase_y + spread_y - 1) // spread_y, (out_width - phase_x + spread_x - 1) // spread_x
            per_image = max(high, 0) * max(wide, 0)
            positions = (last_image - first_image) * per_image
            more = 0
            for tap in range(kernel_depth * taps * (positions > 0)):
                ahead = tap // taps * tap_z + shift_z
                line_0 = phase_y * stride_y + tap % taps // kernel_width * tap_y + shift_y
                column_0 = phase_x * stride_x + tap % kernel_width * tap_x + shift_x
                left = max(-(column_0 // spread_x // stride_x), 0)
                right = max(-((column_0 // spread_x - width) // stride_x), left)
                meets = 0
                for image in range(first_image, last_image):
                    z = image % out_depth * stride_z + ahead
                    if z >= 0 and z < depth * spread_z and z % spread_z == 0:
                        meets = 1
                if meets == 0 or line_0 % spread_y != 0 or column_0 % spread_x != 0:
                    continue
                if at_hand != tap // taps:
                    at_hand = i64(tap // taps)
                    for image in range(first_image, last_image):
                        z = image % out_depth * stride_z + ahead
                        if z >= 0 and z < depth * spread_z and z % spread_z == 0:
                            transpose_block(channels, inside, x, (image // out_depth * channels * depth + z // spread_z)
                                            * plane + low * width, depth * plane,
                                            lasts, image_base + (image - first_image) * inside * channels, channels)
                for image in range(first_image, last_image):
                    place = lined_base + (image - first_image) * per_image * channels
                    corner = image_base + ((image - first_image) * inside - low * width) * channels
                    z = image % out_depth * stride_z + ahead
                    there = z >= 0 and z < depth * spread_z and z % spread_z == 0
                    for y in range(high):
                        line = line_0 // spread_y + y * stride_y
                        stop = left
                        if there and line >= 0 and line < height:
                            stop = right
                        gather_rows(wide, left, stop, channels, 0, channels,
                                    lasts, corner + (line * width + column_0 // spread_x + left * stride_x) * channels,
                                    stride_x * channels, 1, lined, place, channels)
                        place += wide * channels
                multiply_block(args, 7, positions, block, channels, depth_block, panel_rows,
                               lined, lined_base, panel_rows * channels, channels, 1,
                               u, (tap * panels + first_row // COLUMNS) * channels * COLUMNS, channels * COLUMNS, COLUMNS,
                               result, result_base, rows_per_item, more)
                more = 1
            for image in range(first_image, last_image):
                place = ((image // out_depth * rows + first_row) * out_depth + image % out_depth) * out_plane
                source = result_base + (image - first_image) * per_image * rows_per_item
                if spread_x == 1 and spread_y == 1 and more == 1:
                    transpose_block(per_image, block, result, source, rows_per_item,
                                    o, place + first_y * out_width, out_depth * out_plane)
                else:
                    if more == 1:
                        transpose_block(per_image, block, result, source, rows_per_item, lined, lined_base, per_image)
                    for r in range(block):
                        for y in range(high):
                            target = place + r * out_depth * out_plane + (phase_y + y * spread_y) * out_width + phase_x
                            for column in range(wide):
                                value = T(0)
                                if more == 1:
                                    value = load(lined, lined_base + (r * high + y) * wide + column, 4, 6)
                                store(o, target + column * spread_x, value, 2, 6)


def taps_weight_gradient(args, begin, end, thread):
    """See the module and `WEIGHT_ARGUMENTS`. Items: runs of images, blocks of the gradient's channels, blocks of the
    image's."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    lasts, grads, lined, sums = pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T)
    depth, out_depth, kernel_depth, stride_z, shift_z, tap_z = args[9], args[10], args[11], args[12], args[13], args[14]
    channels, height, width, rows, out_height, out_width = args[15], args[16], args[17], args[18], args[19], args[20]
    kernel_height, kernel_width, stride_y, stride_x = args[21], args[22], args[23], args[24]
    shift_y, shift_x, tap_y, tap_x = args[25], args[26], args[27], args[28]
    images, images_per_part, out_rows_per_part, parts = args[29], args[30], args[31], args[32]
    channels_per_item, channel_blocks, rows_per_item, row_blocks = args[33], args[34], args[35], args[36]
    images_per_item = args[37]
    image_base, grad_base, lined_base, sum_base = (thread * args[38], thread * args[39], thread * args[40],
                                                   thread * args[41])
    plane, out_plane, taps = height * width, out_height * out_width, kernel_height * kernel_width
    for item in range(begin, end):
        first_channel = item % channel_blocks * channels_per_item
        across = min(channels_per_item, channels - first_channel)
        first_row = item // channel_blocks % row_blocks * rows_per_item
        down = min(rows_per_item, rows - first_row)
        run = item // (channel_blocks * row_blocks)
        end_image = min((run + 1) * images_per_item, images)
        more = 0
        for first_image in range(run * images_per_item, end_image, images_per_part):
            last_image = min(first_image + images_per_part, end_image)
            for part in range(parts):
                first_y = part * out_rows_per_part
                last_y = min(first_y + out_rows_per_part, out_height)
                per_image = (last_y - first_y) * out_width
                positions = (last_image - first_image) * per_image
                reach = (kernel_height - 1) * tap_y
                low = max(first_y * stride_y + shift_y + min(reach, 0), 0)
                inside = max(min((last_y - 1) * stride_y + shift_y + max(reach, 0) + 1, height) - low, 0) * width
                for image in range(first_image, last_image):
                    transpose_block(down, per_image, g,
                                    ((image // out_depth * rows + first_row) * out_depth + image % out_depth) * out_plane
                                    + first_y * out_width, out_depth * out_plane,
                                    grads, grad_base + (image - first_image) * per_image * down, down)
                for tap in range(kernel_depth * taps):
                    ahead = tap // taps * tap_z + shift_z
                    if tap % taps == 0:
                        for image in range(first_image, last_image):
                            z = image % out_depth * stride_z + ahead
                            if z >= 0 and z < depth:
                                transpose_block(across, inside, x,
                                                ((image // out_depth * channels + first_channel) * depth + z) * plane
                                                + low * width, depth * plane,
                                                lasts, image_base + (image - first_image) * inside * across, across)
                    below = tap % taps // kernel_width * tap_y + shift_y
                    beside = tap % kernel_width * tap_x + shift_x
                    left = max(-(beside // stride_x), 0)
                    right = max(-((beside - width) // stride_x), left)
                    for image in range(first_image, last_image):
                        place = lined_base + (image - first_image) * per_image * across
                        corner = image_base + ((image - first_image) * inside - low * width) * across
                        z = image % out_depth * stride_z + ahead
                        for y in range(first_y, last_y):
                            line = y * stride_y + below
                            stop = left
                            if z >= 0 and z < depth and line >= 0 and line < height:
                                stop = right
                            gather_rows(out_width, left, stop, across, 0, across,
                                        lasts, corner + (line * width + left * stride_x + beside) * across,
                                        stride_x * across, 1, lined, place, across)
                            place += out_width * across
                    multiply_block(args, 8, down, across, positions, positions, TILE, grads, grad_base, TILE, 1, down,
                                   lined, lined_base, COLUMNS, across,
                                   sums, sum_base + tap * down * across, across, more)
                more = 1
        for r in range(down):
            place = ((run * rows + first_row + r) * channels + first_channel) * kernel_depth * taps
            transpose_block(kernel_depth * taps, across, sums, sum_base + r * across, down * across,
                            o, place, kernel_depth * taps)


KERNELS = {kernel.__name__: kernel for kernel in (tap_weights, tap_turned_weights, add_taps, taps_weight_gradient)}
"""Each by its name."""
