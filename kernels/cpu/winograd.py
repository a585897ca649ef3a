"""Convolutions of 3x3 with stride 1 or 2 by Winograd's maps, and their gradients; `tile_transform` has the maps.

All work is on vectors of channels, so an item first turns its part of the images over: channels last. With stride 1, F(2x2,
3x3), its 4x4 pieces, which overlap by two, become 16 matrices [pieces, channels]; each is multiplied with one of the 16
matrices [channels, outputs] that the weights have become; and the 16 products become 2x2 results, which are turned back.
What an item makes on its way lies in memory that its thread has of its own, small enough for the second cache. Matrices lie
a little apart, for else the same element of all of them would share a few places of the first cache. Many weights that meet
few pieces are mapped by the item that needs them, for some channels at a time, and never leave the cache; the images, which
all of these items need, are then mapped before.

Where there are many pieces and less exact results are allowed, they are larger: F(4x4, 3x3). The kernels are written for
small ones, and `WAYS` has what is different for large ones and with stride 2: the numbers of matrices, and which of them
are multiplied and added up.

The gradient in the image is the same with weights that are swapped and turned around. The gradient in the weights sums
up products [outputs, pieces] @ [pieces, channels] over all pieces, and maps the sums at the end: an item does a block of
outputs and channels for a run of images, and each run has a partial result.

The maps take differences, so they make NaN of infinities, and infinities of large numbers. But what they make of anything
that is not finite is not finite either, wherever the definition has it so. Hence a result that is not finite is made once
more straight from the definition, by `winograd_again` or `winograd_weights_again`; all others stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.math import isfinite, isnan
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import (
    dot_rows,
    invoke,
    make_panel,
    multiply_block,
    tile_transform,
    transpose_block,
    transpose_tile,
    weighted_rows,
)

winograd_input, winograd_output = tile_transform.NAMES["winograd_input"], tile_transform.NAMES["winograd_output"]
winograd_weight, winograd_weight_grad = (tile_transform.NAMES["winograd_weight"],
                                         tile_transform.NAMES["winograd_weight_grad"])
winograd_output_grad = tile_transform.NAMES["winograd_output_grad"]

COLUMNS, TILE, LANES = 32, 14, 16               # of the register tile; `source` puts the machine's in their places
STEP, REACH, RESULTS, AHEAD, SPREAD = 2, 4, 2, 1, 1                             # of a `Way`, as are these:
INPUTS, WEIGHTS, PRODUCTS, SUMS, READS, WEIGHT_READS, ADDS, MORE = 4, 4, 4, 4, 0x3210, 0x3210, 0x3210, 0
OUTPUT_GRADS, IMAGE_READS, GRAD_READS, WEIGHT_ADDS, WEIGHT_MORE = 4, 0x3210, 0x3210, 0x3210, 0


@dataclass(frozen=True, slots=True)
class Way:
    """Along one axis: pieces of `reach` elements, one every `step`, become `inputs` matrices, and taps `weights`. `products`
    products of them make `sums` sums and those `results` results. Hexadecimal digits k of `reads` and `weight_reads` say
    what product k reads, of `adds` to which sum it belongs; bit k of `more`, that it is added to that of product k - 1.

    For the weights' gradient, `output_grads` matrices of the result's gradient are multiplied with those of the image;
    `image_reads` and `grad_reads` say which, and `weight_adds` and `weight_more` to which of `weights` sums they are added.

    ahead    the stride in the image
    spread   the stride of the convolution whose gradient in the image this is"""

    name: str = "winograd"
    step: int = STEP
    reach: int = REACH
    results: int = RESULTS
    ahead: int = AHEAD
    spread: int = SPREAD
    inputs: int = INPUTS
    weights: int = WEIGHTS
    products: int = PRODUCTS
    sums: int = SUMS
    reads: int = READS
    weight_reads: int = WEIGHT_READS
    adds: int = ADDS
    more: int = MORE
    output_grads: int = OUTPUT_GRADS
    image_reads: int = IMAGE_READS
    grad_reads: int = GRAD_READS
    weight_adds: int = WEIGHT_ADDS
    weight_more: int = WEIGHT_MORE

    def numbers(self) -> dict[str, str]:
        """The placeholders of the kernels and what stands in their places."""
        return {name.upper(): str(getattr(self, name)) for name in self.__slots__ if name != "name"}


STRIDED = Way("winograd_strided", step=4, reach=5, ahead=2, inputs=5, products=5, sums=3, reads=0x43210,
              weight_reads=0x31210, adds=0x22100, more=0b10010,
              output_grads=3, image_reads=0x42310, grad_reads=0x21200, weight_adds=0x32110, weight_more=0b00100)
SPREAD_OUT = Way("winograd_spread", step=2, reach=3, results=4, spread=2, products=5, sums=5, reads=0x13210,
                 weight_reads=0x11320, adds=0x43210)
LARGE = Way("winograd_large", step=4, reach=6, results=4, inputs=6, weights=6, products=6, sums=6, reads=0x543210,
            weight_reads=0x543210, adds=0x543210, output_grads=6, image_reads=0x543210, grad_reads=0x543210,
            weight_adds=0x543210)
WAYS = {way.name: way for way in (Way(), LARGE, STRIDED, SPREAD_OUT)}
"""By name: with stride 1, its gradients too, in small pieces and in large ones; with stride 2; the gradient in the image of
the latter, with odd padding."""

GEOMETRY = ("channels", "height", "width", "rows", "out_height", "out_width", "top", "left", "images", "images_per_part",
            "piece_rows_per_part", "parts", "channels_per_item", "channel_blocks", "rows_per_item", "row_blocks")
"""Integers of both kernels: the image; channels and size of the result (`rows` of them); padding; what a part of the
images is (some images, or some rows of pieces of one), and into how many one image is cut; blocks of channels."""

ARGUMENTS = (*GEOMETRY, "result_size", "turned", "own_pieces", "shared_pieces", "products_size", "piece_stride",
             "panel_rows", "depth_block")
"""Those of `winograd`, behind mapped weights, pieces, the thread's own products; the core; and `winograd_again` with what it
takes: image, weights, result, the thread's own result, then these integers. The sizes are those of what the threads have
in elements. Of a part and a block of channels, pieces are so many elements, which either each thread makes for itself or all
share, made before: the other number is 0. `piece_stride` is the distance of two. Behind these follow the kernel that maps
the weights and `winograd_pieces`, with what they take."""

PIECES_ARGUMENTS = (*GEOMETRY, "image_size", "own_pieces", "shared_pieces", "piece_stride")
"""Integers of `winograd_pieces`."""

MAPPING = ("rows", "channels", "panels_at_hand", "channels_at_hand", "weights_size")
"""Integers of `winograd_weights` and `winograd_turned_weights`, behind weights and mapped weights: of these so many panels
and channels are kept at a time, and `weights_size` elements by each thread; 0: all are mapped before, for all threads."""

WEIGHT_ARGUMENTS = (*GEOMETRY, "images_per_item", "image_size", "gradient_size", "pieces_size", "gradients_size",
                    "sums_size")
"""Those of `winograd_weight_gradient`, behind five of the thread's own: image, gradient, pieces of both, sums; the core;
and `winograd_weights_again` with what it takes: image, gradient, partial results, then these integers."""


def source(kernel: str, element: str, way: str = "winograd") -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``, in one of `WAYS`, of which it has the name."""
    tile = element_tile(element)
    return re.sub(r"\bwinograd(?=_|\b)", way, text(
        KERNELS[kernel], T=element, COLUMNS=str(tile.columns), TILE=str(tile.rows), LANES=str(tile.lanes),
        **WAYS[way].numbers()))


def winograd_weights(args, begin, end, thread):
    """w[rows, channels, 3, 3] to panels of [weights, channels, rows]. Arguments: w, panels; `MAPPING`. Items: panels, blocks
    of channels."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, panels_at_hand, channels_at_hand, base = args[3], args[4], args[5], args[6], thread * args[7]
    blocks, apart = channels // LANES, panels_at_hand * channels_at_hand * COLUMNS + LANES
    lines = make_panel(w)
    for item in range(begin, end):
        panel = item // blocks
        channel = item % blocks * LANES
        place = base + (panel % panels_at_hand * channels_at_hand + channel % channels_at_hand) * COLUMNS
        for row in range(0, min(COLUMNS, rows - panel * COLUMNS), LANES):
            for k in range(0, 9 * LANES, LANES):
                transpose_tile(LANES, w, ((panel * COLUMNS + row) * channels + channel) * 9 + k, channels * 9,
                               lines, k * COLUMNS + row, COLUMNS, LANES)
        for c in range(LANES):
            winograd_weight(COLUMNS, lines, c * 9 * COLUMNS, 3 * COLUMNS, COLUMNS, u, place + c * COLUMNS, WEIGHTS * apart,
                            apart, 0, 3, 0, 3, 0)


def winograd_turned_weights(args, begin, end, thread):
    """w[channels, rows, 3, 3] with its taps turned around to panels of [weights, channels, rows]. Arguments and items: as
    above."""
    w, u = pointer(args, 1, T), pointer(args, 2, T)
    rows, channels, panels_at_hand, channels_at_hand, base = args[3], args[4], args[5], args[6], thread * args[7]
    blocks, apart = channels // LANES, panels_at_hand * channels_at_hand * COLUMNS + LANES
    lines = make_panel(w)
    for item in range(begin, end):
        panel = item // blocks
        first = item % blocks * LANES
        place = base + (panel % panels_at_hand * channels_at_hand + first % channels_at_hand) * COLUMNS
        for c in range(LANES):
            start = ((first + c) * rows + panel * COLUMNS) * 9
            back = min(start, max(LANES - 9, 0))                        # blocks wider than 9 taps end with the last one
            for row in range(0, min(COLUMNS, rows - panel * COLUMNS), LANES):
                for k in range(0, 9, LANES):
                    tap = min(k, max(9 - LANES, 0))
                    transpose_tile(LANES, w, start + row * 9 + tap - back, 9, lines, tap * COLUMNS + row, COLUMNS, LANES)
            winograd_weight(COLUMNS, lines, (8 + back) * COLUMNS, -3 * COLUMNS, -COLUMNS, u, place + c * COLUMNS,
                            WEIGHTS * apart, apart, 0, 3, 0, 3, 0)


def winograd_pieces(args, begin, end, thread):
    """The images to pieces of [inputs, pieces, channels]. Arguments: image, one of the thread's own, pieces;
    `PIECES_ARGUMENTS`. Items: parts of the images, blocks of channels, images of a part."""
    x, lasts, v = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    channels, height, width, out_height, out_width = args[4], args[5], args[6], args[8], args[9]
    top, left, images, images_per_part, piece_rows_per_part = args[10], args[11], args[12], args[13], args[14]
    parts, channels_per_item, channel_blocks, image_base = args[15], args[16], args[17], thread * args[20]
    piece_stride = args[23]
    zeros = image_base + args[20] - channels_per_item
    wide, high = (out_width + RESULTS - 1) // RESULTS, (out_height + RESULTS - 1) // RESULTS
    for item in range(begin, end):
        block = item // images_per_part
        first = block % channel_blocks * channels_per_item
        across = min(channels_per_item, channels - first)
        part = block // channel_blocks
        first_y = part % parts * piece_rows_per_part
        last_y = min(first_y + piece_rows_per_part, high)
        number, first_image = item % images_per_part, part // parts * images_per_part
        image, of_part = first_image + number, min(images_per_part, images - first_image)
        v_base = thread * args[21] + block * args[22] + number * (last_y - first_y) * wide * piece_stride
        v_apart = of_part * (last_y - first_y) * wide * piece_stride + LANES
        low = max(STEP * first_y - top, 0)
        positions = max(min(STEP * (last_y - 1) - top + REACH, height) - low, 0) * width
        if number < of_part:
            for c in range(channels_per_item):
                store(lasts, zeros + c, T(0), 1, 3)
            transpose_block(across, positions, x, ((image * channels + first) * height + low) * width, height * width,
                            lasts, image_base, across)
            for y in range(first_y, last_y):
                above = STEP * y - top
                for column in range(wide):
                    before = STEP * column - left
                    winograd_input(across, lasts, image_base + ((above - low) * width + before) * across, width * across,
                                   across, v, v_base + ((y - first_y) * wide + column) * piece_stride, INPUTS * v_apart,
                                   v_apart, -above, height - above, -before, width - before, zeros)


def winograd(args, begin, end, thread):
    """See the module and `ARGUMENTS`. Items: parts of the images, blocks of the result's channels."""
    u, v, products = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    o, result = pointer(args, 8, T), pointer(args, 9, T)
    channels, rows, out_height, out_width, images = args[10], args[13], args[14], args[15], args[18]
    images_per_part, piece_rows_per_part, parts = args[19], args[20], args[21]
    channels_per_item, channel_blocks, rows_per_item, row_blocks = args[22], args[23], args[24], args[25]
    result_base, own_pieces, shared_pieces, product_base = thread * args[26], args[28], args[29], thread * args[30]
    piece_stride, panel_rows, depth_block = args[31], args[32], args[33]
    panels_at_hand, weights_size = args[39], args[41]
    spare = result_base + args[26] - rows_per_item
    out_plane = out_height * out_width
    wide, high = (out_width + RESULTS - 1) // RESULTS, (out_height + RESULTS - 1) // RESULTS
    weights_apart = panels_at_hand * channels_per_item * COLUMNS + LANES
    for item in range(begin, end):
        first_row, part = item % row_blocks * rows_per_item, item // row_blocks
        block = min(rows_per_item, rows - first_row)
        first_y = part % parts * piece_rows_per_part
        last_y = min(first_y + piece_rows_per_part, high)
        first_image = part // parts * images_per_part
        last_image = min(first_image + images_per_part, images)
        pieces = (last_image - first_image) * (last_y - first_y) * wide
        v_apart, product_apart = pieces * piece_stride + LANES, pieces * rows_per_item + LANES
        for first in range(0, channels, channels_per_item):
            across = min(channels_per_item, channels - first)
            of_part = part * channel_blocks + first // channels_per_item
            v_base = thread * own_pieces + of_part * shared_pieces
            if own_pieces != 0:
                invoke(args, 42, of_part * images_per_part, of_part * images_per_part + last_image - first_image, thread)
            if weights_size != 0:
                for panel in range(first_row // COLUMNS, (first_row + block + COLUMNS - 1) // COLUMNS):
                    mapped = (panel * channels + first) // LANES
                    invoke(args, 34, mapped, mapped + across // LANES, thread)
            for p in range(PRODUCTS * PRODUCTS):
                down, right = 4 * (p // PRODUCTS), 4 * (p % PRODUCTS)
                read = (READS >> down) % 16 * INPUTS + (READS >> right) % 16
                weight = (WEIGHT_READS >> down) % 16 * WEIGHTS + (WEIGHT_READS >> right) % 16
                total = (ADDS >> down) % 16 * SUMS + (ADDS >> right) % 16
                more = i64(first > 0) | ((MORE >> p // PRODUCTS) | (MORE >> p % PRODUCTS)) % 2
                multiply_block(args, 4, pieces, block, across, depth_block, panel_rows,
                               v, v_base + read * v_apart, panel_rows * piece_stride, piece_stride, 1,
                               u, thread * weights_size + weight * weights_apart + first_row // COLUMNS % panels_at_hand
                               * channels_per_item * COLUMNS, channels_per_item * COLUMNS, COLUMNS,
                               products, product_base + total * product_apart, rows_per_item, more)
        positions = (min(RESULTS * last_y, out_height) - RESULTS * first_y) * out_width
        odd = 0
        for image in range(first_image, last_image):
            for y in range(first_y, last_y):
                piece = ((image - first_image) * (last_y - first_y) + y - first_y) * wide
                for column in range(wide):
                    odd |= winograd_output(block, products, product_base + (piece + column) * rows_per_item,
                                           SUMS * product_apart, product_apart, result, result_base
                                           + RESULTS * ((y - first_y) * out_width + column) * rows_per_item,
                                           out_width * rows_per_item, rows_per_item, 0, out_height - RESULTS * y, 0,
                                           out_width - RESULTS * column, spare)
            transpose_block(positions, block, result, result_base, rows_per_item,
                            o, (image * rows + first_row) * out_plane + RESULTS * first_y * out_width, out_plane)
        if odd != 0:
            invoke(args, 5, item, item + 1, thread)


def winograd_again(args, begin, end, thread):
    """What is not finite in the result of `winograd`, straight from the definition. Arguments: image, weights, result, the
    thread's own; the first integers of `ARGUMENTS`. Items: as above.

    Padding is zeros that are multiplied, which makes NaN of infinite weights; of the gradient in the image there is nothing
    beyond its edge. `turned` tells them apart."""
    x, w, o, line = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    channels, height, width, rows, out_height, out_width = args[5], args[6], args[7], args[8], args[9], args[10]
    top, left, images, images_per_part = args[11], args[12], args[13], args[14]
    piece_rows_per_part, parts = args[15], args[16]
    rows_per_item, row_blocks, base, turned = args[19], args[20], thread * args[21], args[22]
    top, left = SPREAD * top + SPREAD - 1, SPREAD * left + SPREAD - 1
    row_step, channel_step, tap_step, first_tap = channels * 9, 9, 1, 0
    if turned != 0:
        row_step, channel_step, tap_step, first_tap = 9, rows * 9, -1, 8
    for item in range(begin, end):
        first_row = item % row_blocks * rows_per_item
        first_y = RESULTS * (item // row_blocks % parts * piece_rows_per_part)
        first_image = item // (row_blocks * parts) * images_per_part
        for image in range(first_image, min(first_image + images_per_part, images)):
            for row in range(first_row, min(first_row + rows_per_item, rows)):
                weights = row * row_step + first_tap
                for y in range(first_y, min(first_y + RESULTS * piece_rows_per_part, out_height)):
                    place = ((image * rows + row) * out_height + y) * out_width
                    above, odd = y * AHEAD - top, 0
                    for column in range(out_width):
                        odd |= i64(not isfinite(load(o, place + column, 2, 4)))
                    if odd == 0:
                        continue
                    within = SPREAD == 1 and 0 <= above < height - 2
                    if within:                                      # all taps meet the image but for some columns
                        weighted_rows(1, out_width, 0, AHEAD, channels, height * width, 3, width, 3, 1, left, left + width,
                                      x, (image * channels * height + above) * width - left,
                                      w, weights, channel_step, 3 * tap_step, tap_step, line, base, 0)
                    for column in range(out_width):
                        before = column * AHEAD - left
                        if isfinite(load(o, place + column, 2, 4)):
                            continue
                        total = load(line, base + column, 3, 4)
                        if not within or before < 0 or before >= width - 2:
                            total = T(0)
                            for k in range(channels * 9):
                                channel, tap = k // 9, k % 9
                                down, right = above + tap // 3, before + tap % 3
                                value = T(0)
                                if (0 <= down < height * SPREAD and 0 <= right < width * SPREAD and down % SPREAD == 0
                                        and right % SPREAD == 0):
                                    value = load(x, ((image * channels + channel) * height + down // SPREAD) * width
                                                 + right // SPREAD, 0, 4)
                                elif turned != 0:
                                    continue
                                total = T(total + value * load(w, weights + channel * channel_step + tap * tap_step, 1, 4))
                                if isnan(total):
                                    break
                        store(o, place + column, total, 2, 4)


def winograd_weight_gradient(args, begin, end, thread):
    """See the module and `WEIGHT_ARGUMENTS`. Items: runs of images, blocks of the gradient's channels, blocks of the
    image's."""
    lasts, grads, v, h, sums = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                                pointer(args, 5, T))
    x, g, o = pointer(args, 8, T), pointer(args, 9, T), pointer(args, 10, T)
    channels, height, width, rows, out_height, out_width = args[11], args[12], args[13], args[14], args[15], args[16]
    top, left, images, images_per_part = args[17], args[18], args[19], args[20]
    piece_rows_per_part, parts = args[21], args[22]
    channels_per_item, channel_blocks, rows_per_item, row_blocks, images_per_item = (args[23], args[24], args[25], args[26],
                                                                                     args[27])
    image_base, grad_base, v_base, h_base, sum_base = (thread * args[28], thread * args[29], thread * args[30],
                                                       thread * args[31], thread * args[32])
    zeros, grad_zeros = image_base + args[28] - channels_per_item, grad_base + args[29] - rows_per_item
    plane, out_plane = height * width, out_height * out_width
    wide, high = (out_width + RESULTS - 1) // RESULTS, (out_height + RESULTS - 1) // RESULTS
    taps, lines = make_panel(o), make_panel(o)
    for item in range(begin, end):
        first_channel = item % channel_blocks * channels_per_item
        across = min(channels_per_item, channels - first_channel)
        first_row = item // channel_blocks % row_blocks * rows_per_item
        down = min(rows_per_item, rows - first_row)
        sum_apart = down * across + LANES
        run = item // (channel_blocks * row_blocks)
        end_image = min((run + 1) * images_per_item, images)
        for c in range(across):
            store(lasts, zeros + c, T(0), 0, 8)
        for c in range(down):
            store(grads, grad_zeros + c, T(0), 1, 8)
        more = 0
        for first_image in range(run * images_per_item, end_image, images_per_part):
            last_image = min(first_image + images_per_part, end_image)
            for part in range(parts):
                first_y = part * piece_rows_per_part
                last_y = min(first_y + piece_rows_per_part, high)
                pieces = (last_image - first_image) * (last_y - first_y) * wide
                v_apart, h_apart = pieces * across + LANES, pieces * down + LANES
                low = max(STEP * first_y - top, 0)
                positions = max(min(STEP * (last_y - 1) - top + REACH, height) - low, 0) * width
                out_positions = (min(RESULTS * last_y, out_height) - RESULTS * first_y) * out_width
                for image in range(first_image, last_image):
                    transpose_block(across, positions, x, (image * channels + first_channel) * plane + low * width, plane,
                                    lasts, image_base, across)
                    transpose_block(down, out_positions, g,
                                    (image * rows + first_row) * out_plane + RESULTS * first_y * out_width, out_plane,
                                    grads, grad_base, down)
                    for y in range(first_y, last_y):
                        above = STEP * y - top
                        piece = ((image - first_image) * (last_y - first_y) + y - first_y) * wide
                        for column in range(wide):
                            before = STEP * column - left
                            winograd_input(across, lasts, image_base + ((above - low) * width + before) * across,
                                           width * across, across, v, v_base + (piece + column) * across,
                                           INPUTS * v_apart, v_apart, -above, height - above, -before,
                                           width - before, zeros)
                            winograd_output_grad(down, grads,
                                                 grad_base + RESULTS * ((y - first_y) * out_width + column) * down,
                                                 out_width * down, down, h, h_base + (piece + column) * down,
                                                 OUTPUT_GRADS * h_apart, h_apart, 0, out_height - RESULTS * y,
                                                 0, out_width - RESULTS * column, grad_zeros)
                for p in range(PRODUCTS * PRODUCTS):
                    one, two = 4 * (p // PRODUCTS), 4 * (p % PRODUCTS)
                    image = (IMAGE_READS >> one) % 16 * INPUTS + (IMAGE_READS >> two) % 16
                    gradient = (GRAD_READS >> one) % 16 * OUTPUT_GRADS + (GRAD_READS >> two) % 16
                    total = (WEIGHT_ADDS >> one) % 16 * WEIGHTS + (WEIGHT_ADDS >> two) % 16
                    multiply_block(args, 6, down, across, pieces, pieces, TILE,
                                   h, h_base + gradient * h_apart, TILE, 1, down,
                                   v, v_base + image * v_apart, COLUMNS, across,
                                   sums, sum_base + total * sum_apart, across,
                                   more | ((WEIGHT_MORE >> p // PRODUCTS) | (WEIGHT_MORE >> p % PRODUCTS)) % 2)
                more = 1
        odd = 0
        for r in range(down):
            winograd_weight_grad(across, sums, sum_base + r * across, WEIGHTS * sum_apart, sum_apart,
                                 taps, 0, 3 * across, across, 0, 3, 0, 3, 0)
            for c in range(0, across, LANES):
                for tap in range(8 // LANES * LANES, -1, -LANES):       # what is written too much is written over
                    transpose_tile(min(9 - tap, LANES), taps, tap * across + c, across, lines, c * 9 + tap, 9, LANES)
            place = ((run * rows + first_row + r) * channels + first_channel) * 9
            for k in range(across * 9):
                value = load(lines, k, 5, 8)
                odd |= i64(not isfinite(value))
                store(o, place + k, value, 7, 8)
        if odd != 0:
            invoke(args, 7, item, item + 1, thread)


def winograd_weights_again(args, begin, end, thread):
    """What is not finite in the partial results of `winograd_weight_gradient`, straight from the definition, with padding
    that is zeros. Arguments: image, gradient, partial results; the first integers of `WEIGHT_ARGUMENTS`. Items: as above."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    channels, height, width, rows, out_height, out_width = args[4], args[5], args[6], args[7], args[8], args[9]
    top, left, images = args[10], args[11], args[12]
    channels_per_item, channel_blocks, rows_per_item, row_blocks, images_per_item = (args[16], args[17], args[18], args[19],
                                                                                     args[20])
    for item in range(begin, end):
        first_channel = item % channel_blocks * channels_per_item
        first_row = item // channel_blocks % row_blocks * rows_per_item
        run = item // (channel_blocks * row_blocks)
        first_image, last_image = run * images_per_item, min((run + 1) * images_per_item, images)
        for row in range(first_row, min(first_row + rows_per_item, rows)):
            for channel in range(first_channel, min(first_channel + channels_per_item, channels)):
                for tap in range(9):
                    place = ((run * rows + row) * channels + channel) * 9 + tap
                    if isfinite(load(o, place, 2, 3)):
                        continue
                    down, right = tap // 3 - top, tap % 3 - left
                    first = min(max(-(down // AHEAD), 0), out_height)
                    last = max(min((height - 1 - down) // AHEAD + 1, out_height), first)
                    store(o, place, T(0), 2, 3)
                    for image in range(first_image, last_image):
                        plane = (image * channels + channel) * height * width
                        other = (image * rows + row) * out_height * out_width
                        dot_rows(last - first, out_width, AHEAD * width, AHEAD, 1, 1, -right, width - right,
                                 x, plane + (first * AHEAD + down) * width + right, g, other + first * out_width, out_width,
                                 o, place)
                        total = load(o, place, 2, 3)
                        for y in range(out_height):                 # zeros times what is not finite
                            within = first <= y < last
                            for column in range(out_width):
                                at = column * AHEAD + right
                                if not within or at < 0 or at >= width:
                                    total = T(total + T(0) * load(g, other + y * out_width + column, 1, 3))
                        store(o, place, total, 2, 3)
                        if isnan(total):
                            break


KERNELS = {kernel.__name__: kernel for kernel in (
    winograd_weights, winograd_turned_weights, winograd_pieces, winograd, winograd_again, winograd_weight_gradient,
    winograd_weights_again)}
"""Each by its name."""

KERNELS_OF = {"winograd": tuple(KERNELS), LARGE.name: tuple(KERNELS),
              SPREAD_OUT.name: ("winograd_turned_weights", "winograd_pieces", "winograd", "winograd_again"),
              STRIDED.name: tuple([name for name in KERNELS if name != "winograd_turned_weights"])}
"""Those that each of `WAYS` has."""
