"""Convolutions of 3x3 with stride 1 by Winograd's F(2x2, 3x3), and their gradients; `tile_transform` has the maps.

All work is on vectors of channels, so an item first turns its part of the images over: channels last. Then its 4x4
pieces, which overlap by two, become 16 matrices [pieces, channels]; each is multiplied with one of the 16 matrices
[channels, outputs] that the weights have become; and the 16 products become 2x2 results, which are turned back. What an
item makes on its way lies in memory that its thread has of its own, small enough for the second cache. A NaN stays in
reach of its taps, as it does without the maps; an infinity may become one there, for differences are taken.

The gradient in the image is the same with weights that are swapped and turned around. The gradient in the weights sums
up products [outputs, pieces] @ [pieces, channels] over all pieces, and maps the sums at the end: an item does a block of
outputs and channels for a run of images, and each run has a partial result.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import (
    gather_run,
    make_panel,
    multiply_block,
    tile_transform,
    transpose_block,
    transpose_tile,
)

winograd_input, winograd_output = tile_transform.NAMES["winograd_input"], tile_transform.NAMES["winograd_output"]
winograd_weight, winograd_weight_grad = (tile_transform.NAMES["winograd_weight"],
                                         tile_transform.NAMES["winograd_weight_grad"])
winograd_output_grad = tile_transform.NAMES["winograd_output_grad"]

COLUMNS, TILE, LANES = 32, 14, 16               # of the register tile; `source` puts the machine's in their places

GEOMETRY = ("channels", "height", "width", "rows", "out_height", "out_width", "top", "left", "images", "images_per_part",
            "piece_rows_per_part", "parts", "channels_per_item", "channel_blocks", "rows_per_item", "row_blocks")
"""Integers of both kernels: the image; channels and size of the result (`rows` of them); padding; what a part of the
images is (some images, or some rows of pieces of one), and into how many one image is cut; blocks of channels."""

ARGUMENTS = (*GEOMETRY, "piece_stride", "panel_rows", "depth_block", "image_size", "pieces_size", "products_size",
             "result_size")
"""Those of `winograd`, behind image, weights, result, four of the thread's own: image, pieces, products, result; and the
core. The sizes are these in elements; `piece_stride` is the distance of two pieces."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "images_per_item", "image_size", "gradient_size", "pieces_size", "gradients_size",
                    "sums_size")
"""Those of `winograd_weight_gradient`, behind image, gradient, partial results, five of the thread's own: image,
gradient, pieces of both, sums; and the core."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    tile = element_tile(element)
    return text(KERNELS[kernel], T=element, COLUMNS=str(tile.columns), TILE=str(tile.rows), LANES=str(tile.lanes))


def winograd_weights(args, begin, end, thread):
    """w[rows, channels, 3, 3] to panels of [16, channels, rows]. Arguments: w, panels; rows, channels, panels. Items:
    panels, blocks of channels."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, panels = args[3], args[4], args[5]
    blocks = channels // LANES
    lines = make_panel(w)
    for item in range(begin, end):
        panel = item // blocks
        channel = item % blocks * LANES
        for row in range(0, min(COLUMNS, rows - panel * COLUMNS), LANES):
            for k in range(0, 9 * LANES, LANES):
                transpose_tile(LANES, w, ((panel * COLUMNS + row) * channels + channel) * 9 + k, channels * 9,
                               lines, k * COLUMNS + row, COLUMNS, LANES)
        for c in range(LANES):
            winograd_weight(COLUMNS, lines, c * 9 * COLUMNS, 3 * COLUMNS, COLUMNS,
                            u, (panel * channels + channel + c) * COLUMNS, 4 * panels * channels * COLUMNS,
                            panels * channels * COLUMNS, 0, 3, 0, 3, 0)


def winograd_turned_weights(args, begin, end, thread):
    """w[channels, rows, 3, 3] with its taps turned around to panels of [16, channels, rows]. Arguments and items: as
    above."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, panels = args[3], args[4], args[5]
    blocks = channels // LANES
    lines = make_panel(w)
    for item in range(begin, end):
        panel = item // blocks
        count = min(COLUMNS, rows - panel * COLUMNS)
        for channel in range(item % blocks * LANES, item % blocks * LANES + LANES):
            for tap in range(9):
                gather_run(count, 0, count, w, (channel * rows + panel * COLUMNS) * 9 + tap, 9, lines, tap * COLUMNS)
            winograd_weight(COLUMNS, lines, 8 * COLUMNS, -3 * COLUMNS, -COLUMNS,
                            u, (panel * channels + channel) * COLUMNS, 4 * panels * channels * COLUMNS,
                            panels * channels * COLUMNS, 0, 3, 0, 3, 0)


def winograd(args, begin, end, thread):
    """See the module and `ARGUMENTS`. Items: parts of the images, blocks of the result's channels."""
    x, u, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    lasts, v, products, result = pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T)
    channels, height, width, rows, out_height, out_width = args[9], args[10], args[11], args[12], args[13], args[14]
    top, left, images, images_per_part = args[15], args[16], args[17], args[18]
    piece_rows_per_part, parts = args[19], args[20]
    rows_per_item, row_blocks, piece_stride, panel_rows, depth_block = args[23], args[24], args[25], args[26], args[27]
    image_base, v_base, product_base, result_base = (thread * args[28], thread * args[29], thread * args[30],
                                                     thread * args[31])
    zeros, spare = image_base + args[28] - channels, result_base + args[31] - rows_per_item
    plane, out_plane = height * width, out_height * out_width
    wide, high = (out_width + 1) // 2, (out_height + 1) // 2
    panels = (rows + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first_row = item % row_blocks * rows_per_item
        block = min(rows_per_item, rows - first_row)
        first_y = item // row_blocks % parts * piece_rows_per_part
        last_y = min(first_y + piece_rows_per_part, high)
        first_image = item // (row_blocks * parts) * images_per_part
        last_image = min(first_image + images_per_part, images)
        pieces = (last_image - first_image) * (last_y - first_y) * wide
        low = max(2 * first_y - top, 0)
        positions = max(min(2 * last_y - top + 2, height) - low, 0) * width
        for c in range(channels):
            store(lasts, zeros + c, T(0), 3, 7)
        for image in range(first_image, last_image):
            transpose_block(channels, positions, x, image * channels * plane + low * width, plane,
                            lasts, image_base, channels)
            for y in range(first_y, last_y):
                above = 2 * y - top
                piece = ((image - first_image) * (last_y - first_y) + y - first_y) * wide
                for column in range(wide):
                    before = 2 * column - left
                    winograd_input(channels, lasts, image_base + ((above - low) * width + before) * channels,
                                   width * channels, channels, v, v_base + (piece + column) * piece_stride,
                                   4 * pieces * piece_stride, pieces * piece_stride, -above, height - above, -before,
                                   width - before, zeros)
        for p in range(16):
            multiply_block(args, 8, pieces, block, channels, depth_block, panel_rows,
                           v, v_base + p * pieces * piece_stride, panel_rows * piece_stride, piece_stride, 1,
                           u, (p * panels + first_row // COLUMNS) * channels * COLUMNS, channels * COLUMNS, COLUMNS,
                           products, product_base + p * pieces * rows_per_item, rows_per_item, 0)
        positions = (min(2 * last_y, out_height) - 2 * first_y) * out_width
        for image in range(first_image, last_image):
            for y in range(first_y, last_y):
                piece = ((image - first_image) * (last_y - first_y) + y - first_y) * wide
                for column in range(wide):
                    winograd_output(block, products, product_base + (piece + column) * rows_per_item,
                                    4 * pieces * rows_per_item, pieces * rows_per_item, result,
                                    result_base + (2 * (y - first_y) * out_width + 2 * column) * rows_per_item,
                                    out_width * rows_per_item, rows_per_item, 0, out_height - 2 * y, 0,
                                    out_width - 2 * column, spare)
            transpose_block(positions, block, result, result_base, rows_per_item,
                            o, (image * rows + first_row) * out_plane + 2 * first_y * out_width, out_plane)


def winograd_weight_gradient(args, begin, end, thread):
    """See the module and `WEIGHT_ARGUMENTS`. Items: runs of images, blocks of the gradient's channels, blocks of the
    image's."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    lasts, grads, v, h, sums = (pointer(args, 4, T), pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T),
                                pointer(args, 8, T))
    channels, height, width, rows, out_height, out_width = args[10], args[11], args[12], args[13], args[14], args[15]
    top, left, images, images_per_part = args[16], args[17], args[18], args[19]
    piece_rows_per_part, parts = args[20], args[21]
    channels_per_item, channel_blocks, rows_per_item, row_blocks, images_per_item = (args[22], args[23], args[24], args[25],
                                                                                     args[26])
    image_base, grad_base, v_base, h_base, sum_base = (thread * args[27], thread * args[28], thread * args[29],
                                                       thread * args[30], thread * args[31])
    zeros, grad_zeros = image_base + args[27] - channels_per_item, grad_base + args[28] - rows_per_item
    plane, out_plane = height * width, out_height * out_width
    wide, high = (out_width + 1) // 2, (out_height + 1) // 2
    taps, lines = make_panel(o), make_panel(o)
    for item in range(begin, end):
        first_channel = item % channel_blocks * channels_per_item
        across = min(channels_per_item, channels - first_channel)
        first_row = item // channel_blocks % row_blocks * rows_per_item
        down = min(rows_per_item, rows - first_row)
        run = item // (channel_blocks * row_blocks)
        end_image = min((run + 1) * images_per_item, images)
        for c in range(across):
            store(lasts, zeros + c, T(0), 3, 8)
        for c in range(down):
            store(grads, grad_zeros + c, T(0), 4, 8)
        more = 0
        for first_image in range(run * images_per_item, end_image, images_per_part):
            last_image = min(first_image + images_per_part, end_image)
            for part in range(parts):
                first_y = part * piece_rows_per_part
                last_y = min(first_y + piece_rows_per_part, high)
                pieces = (last_image - first_image) * (last_y - first_y) * wide
                low = max(2 * first_y - top, 0)
                positions = max(min(2 * last_y - top + 2, height) - low, 0) * width
                out_positions = (min(2 * last_y, out_height) - 2 * first_y) * out_width
                for image in range(first_image, last_image):
                    transpose_block(across, positions, x, (image * channels + first_channel) * plane + low * width, plane,
                                    lasts, image_base, across)
                    transpose_block(down, out_positions, g,
                                    (image * rows + first_row) * out_plane + 2 * first_y * out_width, out_plane,
                                    grads, grad_base, down)
                    for y in range(first_y, last_y):
                        above = 2 * y - top
                        piece = ((image - first_image) * (last_y - first_y) + y - first_y) * wide
                        for column in range(wide):
                            before = 2 * column - left
                            winograd_input(across, lasts, image_base + ((above - low) * width + before) * across,
                                           width * across, across, v, v_base + (piece + column) * across,
                                           4 * pieces * across, pieces * across, -above, height - above, -before,
                                           width - before, zeros)
                            winograd_output_grad(down, grads,
                                                 grad_base + (2 * (y - first_y) * out_width + 2 * column) * down,
                                                 out_width * down, down, h, h_base + (piece + column) * down,
                                                 4 * pieces * down, pieces * down, 0, out_height - 2 * y, 0,
                                                 out_width - 2 * column, grad_zeros)
                for p in range(16):
                    multiply_block(args, 9, down, across, pieces, pieces, TILE,
                                   h, h_base + p * pieces * down, TILE, 1, down,
                                   v, v_base + p * pieces * across, COLUMNS, across,
                                   sums, sum_base + p * down * across, across, more)
                more = 1
        for r in range(down):
            winograd_weight_grad(across, sums, sum_base + r * across, 4 * down * across, down * across,
                                 taps, 0, 3 * across, across, 0, 3, 0, 3, 0)
            for c in range(0, across, LANES):
                for tap in range(8 // LANES * LANES, -1, -LANES):       # what is written too much is written over
                    transpose_tile(min(9 - tap, LANES), taps, tap * across + c, across, lines, c * 9 + tap, 9, LANES)
            place = ((run * rows + first_row + r) * channels + first_channel) * 9
            for k in range(across * 9):
                store(o, place + k, load(lines, k, 7, 8), 2, 8)


KERNELS = {kernel.__name__: kernel for kernel in (winograd_weights, winograd_turned_weights, winograd,
                                                  winograd_weight_gradient)}
"""Each by its name."""
