"""Lowering of 3x3 convolutions with stride 1 or 2 to the kernels of `jitgrad.kernels.cpu.winograd`.

Here is what those kernels are told: into which parts the images are cut, and which blocks of channels an item does, so
that what an item makes fits into the second cache and there are items enough. It follows from shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jitgrad import precision
from jitgrad.codegen.call import BLOCK, Call, launch, product_core
from jitgrad.codegen.kernel import Blocks, Buffer, Function, Lowered, Private
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import conv, gemm, winograd
from jitgrad.kernels.cpu.tile import Tile

ITEMS = 8                                       # at least, for balance
CACHE = 1280 * 1024                             # bytes that an item may make
CHANNELS = 96, 96                               # of an image and of a gradient, in an item that sums up products: the
STRIDED_CHANNELS = 32, 128                      # sums of all matrices nearly fit into the second cache. With stride 2 the
                                                # image takes longer to be mapped: to 25 matrices against 9
BALANCED = 4                                    # items of equal size are best a multiple of it
FROM_AFAR, OVERFLOW = 6, 13 / 12                # costs, in cycles and as a factor: see `images_at_once`
DEPTH = 48                                      # steps of one sum; then it is added to the others: what mapping back takes
                                                # differences of must be as exact as sums can be
STRIDED_DEPTH = 64                              # of one with stride 2, which takes few differences
OWN_ROWS, OWN_CHANNELS = 32, 1024               # of an item that maps weights itself; the latter in bytes
NEAR_ROWS, NEAR_CHANNELS = 64, 192              # the same, of one that maps its images, too
OWN_PIECES = 2                                  # items that map the same images rather than share what one phase maps
MAPPED = 32                                     # rows of a product that cost as much as its weights: mapped and read
LEAST = {"f32": 16, "f64": 32}                  # channels on either side from which mapping costs less than it saves

Geometry = dict[str, int]
Cut = tuple[int, int, int]                      # images of a part, rows of pieces of a part, parts of an image


@dataclass(frozen=True, slots=True)
class Sizes:
    """A convolution of 3x3: `image` and `result` are [N, C, H, W], of one group; the first piece begins `top` rows above the
    image and `left` columns before it."""

    short: str
    image: tuple[int, ...]
    result: tuple[int, ...]
    top: int
    left: int
    way: winograd.Way

    @property
    def pieces(self) -> tuple[int, int]:
        """How many pieces the result has, down and across."""
        return -(-self.result[2] // self.way.results), -(-self.result[3] // self.way.results)

    @property
    def itemsize(self) -> int:
        return 8 if self.short == "f64" else 4


def fits(call: Call, kernel: tuple[int, ...], channels: int, rows: int, *, turned: bool) -> bool:
    """Whether a convolution of so many channels into so many can be done this way; `turned`: its gradient in the image,
    which with stride 2 begins with a position that meets one tap."""
    lanes, attrs = gemm.element_tile(call.outputs[0].dtype.short).lanes, call.attrs
    odd = all(before % 2 for before, _ in attrs["padding"])
    return (kernel == (3, 3) and attrs["stride"] in ((1, 1), (2, 2)) and (odd or not turned or attrs["stride"] == (1, 1))
            and attrs["dilation"] == (1, 1) and attrs["groups"] == 1 and channels % lanes == 0 and rows % lanes == 0)


def sizes(call: Call, image: TensorType, result: TensorType, *, turned: bool = False) -> Sizes:
    """What `fits`. `turned`: the gradient in the image, which takes the taps the other way around; with stride 2 its pieces
    begin at an odd place, as the padding does."""
    (top, _), (left, _) = call.attrs["padding"]
    if call.attrs["stride"] == (2, 2):
        way = winograd.SPREAD_OUT if turned else winograd.STRIDED
    else:
        ways = (winograd.Way(), winograd.LARGE) if precision.allows_less() else (winograd.Way(),)
        way = min(ways, key=lambda way: effort(way, result.shape))
    if turned:
        top, left = [(1 - padding) // 2 if way == winograd.SPREAD_OUT else 2 - padding for padding in (top, left)]
    return Sizes(image.dtype.short, image.shape, result.shape, top, left, way)


def effort(way: winograd.Way, result: tuple[int, ...]) -> int:
    """What decides between ways for a `result` [N, C, H, W]: their products, and mapping the weights and reading them."""
    n, _, height, width = result
    pieces: int = -(-height // way.results) * -(-width // way.results)
    matrices: int = way.products ** 2
    return matrices * (n * pieces + MAPPED)


def suits(short: str, channels: int, rows: int) -> bool:
    """Whether this is usually the fastest way, where it `fits`."""
    return min(channels, rows) >= LEAST[short]


def forward(call: Call, image: int, sizes: Sizes, *, turned: bool) -> Lowered:
    """The convolution of input number `image` with weights, which are input 1. `turned`: with weights [channels, rows],
    and their taps turned around. What several items need of mapped weights or of mapped images is made before."""
    tile, (n, channels, _, width), rows = gemm.element_tile(sizes.short), sizes.image, sizes.result[1]
    itemsize, way = sizes.itemsize, sizes.way
    at_once, per_item, (images, piece_rows, parts) = cut_item(n, channels, rows, sizes, tile)
    blocks, runs = -(-rows // per_item), -(-n // images) * parts
    own_weights, own_pieces = runs == 1 and blocks >= ITEMS, blocks <= OWN_PIECES or not shares(tile)
    chunks, panels = -(-channels // at_once), -(-(per_item if own_weights else rows) // tile.columns)
    pieces = images * piece_rows * sizes.pieces[1]
    stride = at_once + (tile.lanes if at_once * itemsize % 1024 == 0 else 0)        # else its rows share lines of the cache
    mapped = way.weights ** 2 * (panels * tile.columns * at_once + tile.lanes)
    of_part = way.inputs ** 2 * (pieces * stride + tile.lanes)
    memory = _Memory(call, itemsize)
    numbers = {**geometry(sizes, images, piece_rows, parts), "channels_per_item": at_once, "channel_blocks": chunks,
               "rows_per_item": per_item, "row_blocks": blocks, "piece_stride": stride, "turned": int(turned),
               "panel_rows": gemm.panel_height(pieces, tile), "panels_at_hand": panels, "channels_at_hand": at_once,
               "depth_block": even_depth(at_once, most_steps(at_once, way)),
               "image_size": (rows_met(way, piece_rows) * width + 1) * at_once,
               "products_size": way.sums ** 2 * (pieces * per_item + tile.lanes),
               "result_size": (way.results * piece_rows * sizes.result[3] + 1) * per_item,
               "weights_size": mapped * own_weights, "own_pieces": of_part * own_pieces,
               "shared_pieces": of_part * (not own_pieces)}
    own_image, products, result = [memory.own(numbers[f"{name}_size"]) for name in ("image", "products", "result")]
    weights = memory.own(mapped) if own_weights else memory.shared(mapped)
    made = memory.own(of_part) if own_pieces else memory.shared(runs * chunks * of_part)
    map_weights = companion("winograd_turned_weights" if turned else "winograd_weights", sizes)
    map_images = companion("winograd_pieces", sizes)
    of_weights = (call.input(1), weights, *[numbers[name] for name in winograd.MAPPING])
    of_images = (call.input(image), own_image, made, *[numbers[name] for name in winograd.PIECES_ARGUMENTS])
    before = []
    if not own_weights:
        before.append(launch(map_weights.source, panels * (channels // tile.lanes), *of_weights))
    if not own_pieces:
        before.append(launch(map_images.source, runs * chunks * images, *of_images))
    run = launch(winograd.source("winograd", sizes.short, way.name), runs * blocks, weights, made, products,
                 product_core(sizes.short), companion("winograd_again", sizes), call.input(image), call.input(1),
                 call.output(), result, *[numbers[name] for name in winograd.ARGUMENTS], map_weights, *of_weights,
                 map_images, *of_images, blocks=result_blocks(numbers, way.results * piece_rows))
    return Lowered((*before, run), tuple(memory.scratch), tuple(memory.private))


@dataclass
class _Memory:
    """What a lowering has beside operands, so far, in bytes."""

    call: Call
    itemsize: int
    scratch: list[int] = field(default_factory=list)
    private: list[int] = field(default_factory=list)

    def own(self, elements: int) -> Private:
        """Memory of which each thread has a piece."""
        self.private.append(elements * self.itemsize)
        return Private(len(self.private) - 1)

    def shared(self, elements: int) -> Buffer:
        """Memory for all threads."""
        self.scratch.append(elements * self.itemsize)
        return self.call.scratch(len(self.scratch) - 1)


def cut_item(n: int, channels: int, rows: int, sizes: Sizes, tile: Tile) -> tuple[int, int, Cut]:
    """How many channels of the image an item takes at a time, how many of the result it makes, and its part of the images.
    Where mapped images are less than mapped weights, an item has a few channels of all images: then it maps the weights that
    it needs itself, and they never leave the cache, nor do its products. Else it takes all channels of a part."""
    way, fitting, pieces = sizes.way, CACHE // sizes.itemsize, n * math.prod(sizes.pieces)
    most_rows, most_bytes = (OWN_ROWS, OWN_CHANNELS) if shares(tile) else (NEAR_ROWS, NEAR_CHANNELS)
    per_item = even_block(rows, most_rows, tile.columns)
    at_once = even_block(channels, most_bytes // sizes.itemsize, tile.lanes)
    needed = way.weights ** 2 * at_once * per_item + way.sums ** 2 * pieces * per_item
    if not shares(tile):
        needed += way.inputs ** 2 * pieces * at_once
    if (way.inputs ** 2 * pieces <= way.weights ** 2 * rows and needed <= fitting and -(-rows // per_item) >= ITEMS):
        return at_once, per_item, (n, sizes.pieces[0], 1)
    return channels, *cut_result(n, rows, sizes.pieces, tile, lambda block: fitting // (
        way.inputs ** 2 * channels + way.sums ** 2 * block))


def shares(tile: Tile) -> bool:
    """Whether items may share mapped images, which are then read from afar: tiles that embed A's elements fetch ahead; for
    others it takes longer than mapping images once more."""
    embeds: bool = tile.embeds
    return embeds


def weight_gradient(call: Call, sizes: Sizes) -> Lowered:
    """The gradient in the weights, of the image, input 0, and the result's gradient, input 1."""
    tile, itemsize, rows, way = gemm.element_tile(sizes.short), sizes.itemsize, sizes.result[1], sizes.way
    n, channels, _, width = sizes.image
    most = STRIDED_CHANNELS if way.ahead > 1 else CHANNELS
    across, down = even_block(channels, most[0], tile.lanes), even_block(rows, most[1], tile.lanes)
    blocks = -(-channels // across) * -(-rows // down)
    per_run = -(-n // min(-(-ITEMS // blocks), n))
    images, piece_rows, parts = cut_images(per_run, sizes.pieces, CACHE // itemsize // (
        way.inputs ** 2 * across + way.output_grads ** 2 * down))
    runs = -(-n // per_run)
    pieces = images * piece_rows * sizes.pieces[1]
    private = {"image_size": (rows_met(way, piece_rows) * width + 1) * across,
               "gradient_size": (way.results * piece_rows * sizes.result[3] + 1) * down,
               "pieces_size": way.inputs ** 2 * (pieces * across + tile.lanes),
               "gradients_size": way.output_grads ** 2 * (pieces * down + tile.lanes),
               "sums_size": way.weights ** 2 * (across * down + tile.lanes)}
    numbers = {**geometry(sizes, images, piece_rows, parts), "channels_per_item": across,
               "channel_blocks": -(-channels // across), "rows_per_item": down, "row_blocks": -(-rows // down),
               "images_per_item": per_run, **private}
    size = call.outputs[0].size
    partial: Buffer = call.output() if runs == 1 else call.scratch(0)
    run = launch(winograd.source("winograd_weight_gradient", sizes.short, way.name), runs * blocks,
                 *[Private(k) for k in range(len(private))], product_core(sizes.short),
                 companion("winograd_weights_again", sizes), call.input(0), call.input(1), partial,
                 *[numbers[name] for name in winograd.WEIGHT_ARGUMENTS])
    own = tuple([count * itemsize for count in private.values()])
    if runs == 1:
        return Lowered((run,), (), own)
    add = launch(conv.add_parts_source(sizes.short), -(-size // BLOCK), partial, call.output(), size, runs, BLOCK)
    return Lowered((run, add), (runs * size * itemsize,), own)


def most_steps(channels: int, way: winograd.Way) -> int:
    """Steps of one sum. With stride 2 the gradient in an image sums up a quarter as many terms as the result."""
    if way.spread > 1:
        return max(min(2 * STRIDED_DEPTH, channels // 2), DEPTH)
    return STRIDED_DEPTH if way.ahead > 1 else DEPTH


def companion(kernel: str, sizes: Sizes) -> Function:
    """A kernel of the same way, as an argument of the one that calls it."""
    name = kernel.replace("winograd", sizes.way.name, 1)
    return Function(f"{name}_{sizes.short}", winograd.source(kernel, sizes.short, sizes.way.name))


def rows_met(way: winograd.Way, piece_rows: int) -> int:
    """So many rows of the image are met by rows of pieces."""
    rows: int = way.step * (piece_rows - 1) + way.reach
    return rows


def result_blocks(numbers: Geometry, out_rows_per_part: int) -> Blocks:
    """What an item makes of the result, [images, rows, out_height, out_width], of which a part has so many lines."""
    names = ("rows", "rows_per_item", "row_blocks", "images", "images_per_part", "parts", "out_height", "out_width")
    return Blocks({"out_rows_per_part": out_rows_per_part, **{name: numbers[name] for name in names}}, (
        ("first_y", "item // row_blocks % parts * out_rows_per_part"),
        ("last_y", "min(first_y + out_rows_per_part, out_height)"),
        ("first_batch", "item // (row_blocks * parts) * images_per_part"),
        ("last_batch", "min(first_batch + images_per_part, images)"),
        ("first_row", "item % row_blocks * rows_per_item"),
        ("last_row", "min(first_row + rows_per_item, rows)"),
        ("first_column", "first_y * out_width"),
        ("last_column", "last_y * out_width")), (1, 2),
        planes=(numbers["images_per_part"], numbers["rows_per_item"]) if numbers["parts"] == 1 else None)


def geometry(sizes: Sizes, images: int, piece_rows: int, parts: int) -> Geometry:
    """Those of `winograd.GEOMETRY` that are not blocks of channels."""
    n, channels, height, width = sizes.image
    return {"channels": channels, "height": height, "width": width, "rows": sizes.result[1],
            "out_height": sizes.result[2], "out_width": sizes.result[3], "top": sizes.top, "left": sizes.left, "images": n,
            "images_per_part": images, "piece_rows_per_part": piece_rows, "parts": parts}


def cut_images(n: int, pieces_of_image: tuple[int, ...], pieces: int) -> Cut:
    """`n` images, each of so many pieces down and across, in parts of about `pieces`."""
    high, wide = pieces_of_image
    if high * wide <= pieces:
        return min(n, pieces // (high * wide)), high, 1
    parts = -(-high // max(1, pieces // wide))
    piece_rows = -(-high // parts)
    return 1, piece_rows, -(-high // piece_rows)


def cut_result(n: int, rows: int, pieces_of_image: tuple[int, ...], tile: Tile,
               fitting: Callable[[int], int], least: int = 0) -> tuple[int, Cut]:
    """How many of the result's channels, `rows`, an item makes, and its part of the images; `fitting`: the pieces that
    fit into the cache with so many channels. Fewer channels, if too few items would be left else: then the same pieces are
    made several times, which costs less than an idle thread. But where images of `least` pieces together make items enough,
    an item has all channels of few images."""
    per_item = rows
    images, piece_rows, parts = cut_images(n, pieces_of_image, max(fitting(rows), 28))
    enough = -(-least // math.prod(pieces_of_image))
    if parts == 1 and 0 < enough <= n // ITEMS:
        return rows, (min(images, n // ITEMS), piece_rows, 1)
    while True:
        images, piece_rows, parts = cut_images(n, pieces_of_image, max(fitting(per_item), 28))
        items = -(-n // images) * parts * -(-rows // per_item)
        if items >= ITEMS or per_item <= 2 * tile.columns:
            break
        per_item = even_block(rows, per_item // 2, tile.columns)
    while items < ITEMS and images > 1:
        images = -(-images // 2)
        items = -(-n // images) * parts * -(-rows // per_item)
    if parts == 1 and items >= ITEMS:
        images = images_at_once(n, math.prod(pieces_of_image), max(fitting(per_item), 28), -(-rows // per_item), tile)
    return per_item, (images, piece_rows, parts)


def images_at_once(n: int, pieces_of_image: int, fitting: int, blocks: int, tile: Tile) -> int:
    """Of how many images, of `n`, an item makes one of `blocks` blocks of channels, if so many pieces fit into the cache:
    what leaves little of tiles and threads idle. A little more than fits costs less than either."""
    def cost(images: int) -> float:
        pieces, items = images * pieces_of_image, -(-n // images) * blocks
        return tile_cost(pieces, tile) * -(-items // BALANCED) * (1 if pieces <= fitting else OVERFLOW)

    most = max(3 * fitting // (2 * pieces_of_image), 1)
    return min((images for images in range(1, min(most, n) + 1) if -(-n // images) * blocks >= ITEMS), key=cost)


def tile_cost(rows: int, tile: Tile) -> int:
    """About how many cycles a step of the depth takes of a product of so many rows, two vectors wide: as many as it loads
    pairs of vectors, and some for weights that come from afar."""
    height, cost = gemm.panel_height(rows, tile), FROM_AFAR
    for first in range(0, rows, height):
        left = min(height, rows - first)
        for piece in tile.forms[-1][2]:
            cost += left // piece * (piece + 1)
            left %= piece
    return cost


def even_block(count: int, most: int, unit: int) -> int:
    """A multiple of `unit`, about `most`, that cuts `count` into blocks of equal size."""
    blocks = -(-count // max(most, unit))
    return -(-count // (blocks * unit)) * unit


def even_depth(channels: int, most: int) -> int:
    """Steps of the depth that are summed up at once: at most `most`, evenly."""
    return -(-channels // -(-channels // most))
