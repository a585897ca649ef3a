"""Lowering of convolutions to the kernels of `jitgrad.kernels.cpu.taps`: what those kernels are told.

As with `codegen.winograd`, an item is a part of the images and a block of channels, so that what it makes fits into the
second cache and there are items enough. It follows from shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgrad.codegen.kernel import Blocks
from jitgrad.codegen.winograd import CACHE, ITEMS, cut_images, cut_result, even_block, even_depth, result_blocks
from jitgrad.kernels.cpu import gemm, taps
from jitgrad.kernels.cpu.tile import DEPTH_BLOCK

CHANNELS = 128                                  # of an image and of a gradient, in an item that sums up products
LEAST = 32                                      # channels on either side from which it is done this way
POSITIONS = 64                                  # of an item from which it pays to read all weights, if the cache has room

Steps = dict[str, int]


@dataclass(frozen=True, slots=True)
class Work:
    """How a kernel is launched: items, integers, the elements that each thread has of its own, and what an item makes."""

    items: int
    integers: tuple[int, ...]
    private: tuple[int, ...]
    blocks: Blocks | None = None


def suits(short: str, channels: int, rows: int, groups: int) -> bool:
    """Whether this is the fastest way for a convolution of images of so many channels into so many, in `groups`."""
    lanes = gemm.element_tile(short).lanes
    return groups == 1 and channels % lanes == 0 and rows % lanes == 0 and min(channels, rows) >= LEAST


def convolve(short: str, image: tuple[int, ...], out: tuple[int, ...], steps: Steps,
             spread: tuple[int, int, int] = (1, 1, 1)) -> Work:
    """The convolution of an image [N, C, D, H, W] to `out`, by `taps.add_taps`."""
    tile, itemsize = gemm.element_tile(short), 8 if short == "f64" else 4
    n, (_, channels, _, height, width), rows = out[0] * out[2], image, out[1]
    area = steps["stride_y"] * steps["stride_x"]
    _, down, across = spread
    phase = -(-out[3] // down), -(-out[4] // across)            # positions of one phase
    fitting = CACHE // itemsize
    weights = channels * rows * steps["kernel_depth"] * steps["kernel_height"] * steps["kernel_width"]
    per_item, (images, phase_rows, parts) = cut_result(
        n, rows, phase, tile, lambda block: fitting // ((area + 1) * channels + 2 * block),
        POSITIONS if weights <= fitting else 0)
    blocks, positions = -(-rows // per_item), images * phase_rows * phase[1]
    out_rows = phase_rows * down
    private = {"image_size": images * rows_met(steps, out_rows, height, down) * width * channels,
               "lined_size": positions * max(channels, per_item), "result_size": positions * per_item}
    numbers = {**steps, **sizes(image, out), "images_per_part": images, "out_rows_per_part": out_rows, "parts": parts,
               "channels_per_item": channels, "channel_blocks": 1, "rows_per_item": per_item, "row_blocks": blocks,
               "panel_rows": gemm.panel_height(positions, tile), "depth_block": even_depth(channels, DEPTH_BLOCK),
               "spread_z": spread[0], "spread_y": down, "spread_x": across, **private}
    return Work(-(-n // images) * parts * blocks, tuple([numbers[name] for name in taps.ARGUMENTS]),
                tuple(private.values()), result_blocks(numbers, out_rows) if out[2] == 1 else None)


def weight_gradient(short: str, image: tuple[int, ...], gradient: tuple[int, ...], steps: Steps) -> tuple[Work, int]:
    """The gradient in the weights, by `taps.taps_weight_gradient`; and how many partial results it makes."""
    tile, itemsize = gemm.element_tile(short), 8 if short == "f64" else 4
    n, (_, channels, _, height, width), rows = gradient[0] * gradient[2], image, gradient[1]
    kernel = steps["kernel_depth"] * steps["kernel_height"] * steps["kernel_width"]
    across, down = [even_block(count, CHANNELS if kernel <= 16 else CHANNELS // 2, tile.lanes) for count in (channels, rows)]
    blocks = -(-channels // across) * -(-rows // down)
    per_run = -(-n // min(-(-ITEMS // blocks), n))
    area = steps["stride_y"] * steps["stride_x"]
    images, out_rows, parts = cut_images(per_run, gradient[3:], CACHE // 2 // itemsize // ((area + 1) * across + down))
    positions = images * out_rows * gradient[4]
    private = {"image_size": images * rows_met(steps, out_rows, height) * width * across, "gradient_size": positions * down,
               "lined_size": positions * across, "sums_size": kernel * across * down}
    numbers = {**steps, **sizes(image, gradient), "images_per_part": images, "out_rows_per_part": out_rows, "parts": parts,
               "channels_per_item": across, "channel_blocks": -(-channels // across), "rows_per_item": down,
               "row_blocks": -(-rows // down), "images_per_item": per_run, **private}
    runs = -(-n // per_run)
    return Work(runs * blocks, tuple([numbers[name] for name in taps.WEIGHT_ARGUMENTS]), tuple(private.values())), runs


def sizes(image: tuple[int, ...], out: tuple[int, ...]) -> Steps:
    return {"images": out[0] * out[2], "channels": image[1], "depth": image[2], "height": image[3], "width": image[4],
            "rows": out[1], "out_depth": out[2], "out_height": out[3], "out_width": out[4]}


def rows_met(steps: Steps, out_rows: int, height: int, spread: int = 1) -> int:
    """At most so many rows of an image meet so many rows of the result."""
    reach = (out_rows - 1) * steps["stride_y"] + (steps["kernel_height"] - 1) * abs(steps["tap_y"])
    return min(-(-reach // spread) + 1, height)
