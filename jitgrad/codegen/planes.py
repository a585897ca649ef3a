"""Lowering of convolutions from few channels, or to few, to the kernels of `jitgrad.kernels.cpu.planes`: what they are
told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jitgrad.codegen.kernel import Blocks
from jitgrad.codegen.phases import taps_of
from jitgrad.codegen.taps import Steps, Work
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm, planes

MOST = 1 << 18                                  # elements of a group's planes, and of its result: the second cache has room
ITEMS = 8                                       # of a convolution, at least, where it has as many rows
LONG = 1 << 9                                   # positions of planes up to which they have several images
RUN, LITTLE = 1 << 16, 32                       # elements of a gradient that an item reads, if whole images have so few; and
                                                # so many, at least, for each that it makes
PART = 1 << 16                                  # elements of planes, or of a result, from which they have a part of the rows
FEW = 64                                        # channels of a group on either side, up to which it is done this way
FEW_CHANNELS = 8                                # those of images without groups, below which it is; and of results


@dataclass(frozen=True, slots=True)
class Spread:
    """Where a result goes: to every `step`th row and column, from `first` on, of planes of a `size`."""

    size: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)


def suits(short: str, image: tuple[int, ...], out: tuple[int, ...], groups: int, steps: Steps,
          spread: Spread | None = None) -> bool:
    """Whether this is the fastest way for a convolution of `image`, [N, C, 1, H, W], to `out`. A column of the image that is
    gathered for few rows of a product costs more than they do; of one tap nothing is gathered twice."""
    numbers = geometry(image, out, groups, steps)
    few_rows = groups == 1 and out[1] < FEW_CHANNELS and taps_of(steps) > 1
    if by_rows(short, numbers, spread) and (few_rows or few(image, out, groups)):
        return in_parts(numbers, 1)["planes_size"] <= MOST
    if not few(image, out, groups):
        return False
    result = numbers["rows"] * numbers["plane_height"] * numbers["plane_width"]
    return groups > 1 and max(numbers["planes_size"], result) <= MOST


def suits_weights(image: tuple[int, ...], gradient: tuple[int, ...], groups: int, steps: Steps) -> bool:
    """Whether this is the fastest way for the gradient in the weights."""
    return few(image, gradient, groups) and in_parts(lined(image, gradient, groups, steps), 1)["planes_size"] <= MOST


def few(image: tuple[int, ...], out: tuple[int, ...], groups: int) -> bool:
    """Whether there are so few channels that this way is worth a look."""
    return image[1] < FEW_CHANNELS if groups == 1 else max(image[1], out[1]) <= FEW * groups


def by_rows(short: str, numbers: dict[str, int], spread: Spread | None) -> bool:
    """Whether rows of a result are made where they belong: they fill several vectors nearly as well as all positions do."""
    lanes, width = gemm.element_tile(short).lanes, numbers["out_width"]
    return spread is None and width > lanes and 4 * -(-width // lanes) * lanes <= 5 * numbers["plane_width"]


def geometry(image: tuple[int, ...], out: tuple[int, ...], groups: int, steps: Steps) -> dict[str, int]:
    """`planes.GEOMETRY` and the steps."""
    found = {**steps, "channels": image[1] // groups, "height": image[3], "width": image[4], "rows": out[1] // groups,
             "out_height": out[3], "out_width": out[4], "groups": groups}
    for axis, name, size in (("y", "height", out[3]), ("x", "width", out[4])):
        reach = (steps[f"kernel_{name}"] - 1) * steps[f"tap_{axis}"]
        found[f"low_{axis}"] = steps[f"shift_{axis}"] + min(reach, 0)
        found[f"plane_{name}"] = size + abs(reach) // steps[f"stride_{axis}"]
    found["planes_size"] = (found["channels"] * steps["stride_y"] * steps["stride_x"] * found["plane_height"]
                            * found["plane_width"])
    return found


def lined(image: tuple[int, ...], gradient: tuple[int, ...], groups: int, steps: Steps) -> dict[str, int]:
    """`geometry` for the gradient in the weights: planes for each column of taps, as wide as the gradient."""
    numbers = geometry(image, gradient, groups, steps)
    line = numbers["channels"] * steps["kernel_width"] * steps["stride_y"] * gradient[4]
    return {**numbers, "plane_width": gradient[4], "planes_size": line * numbers["plane_height"]}


def in_parts(numbers: dict[str, int], wanted: int) -> dict[str, int]:
    """For about so many rows of the result at once, all parts the same: how many these are, and the planes for them."""
    height = numbers["out_height"]
    rows = -(-height // -(-height // min(max(wanted, 1), height)))
    tall = numbers["plane_height"] - height + rows
    line = numbers["planes_size"] // numbers["plane_height"]
    return {"rows_at_once": rows, "plane_height": tall, "planes_size": line * tall}


def convolve(short: str, image: tuple[int, ...], out: tuple[int, ...], groups: int, steps: Steps,
             blocks: Callable[[dict[str, int]], Blocks], spread: Spread | None) -> Work:
    """The convolution of `image` to `out`, which is all of the result or spread over it; `blocks` says what items like those
    of `conv.convolve` make."""
    numbers = geometry(image, out, groups, steps)
    whole = spread or Spread((out[3], out[4]))
    for axis, name, size, first, step in zip("yx", ("height", "width"), whole.size, whole.first, whole.step, strict=True):
        numbers |= {f"whole_{name}": size, f"first_{axis}": first, f"spread_{axis}": step}
    table = numbers["channels"] * steps["kernel_height"] * steps["kernel_width"]
    numbers |= {"table_size": table, "result_size": numbers["rows"] * numbers["plane_height"] * numbers["plane_width"],
                "blocks": 1, "columns_per_item": out[3] * out[4], "images": out[0], "images_per_item": 1,
                "rows_at_once": out[3]}
    if by_rows(short, numbers, spread):
        wanted = min(max(PART // (numbers["rows"] * out[4]), 1), -(-out[3] * out[0] * groups // ITEMS))
        numbers |= in_parts(numbers, wanted)
        numbers |= {"result_size": 0, "blocks": -(-out[3] // numbers["rows_at_once"]),
                    "columns_per_item": numbers["rows_at_once"] * out[4]}
    private = numbers["planes_size"], table * 8 // gemm.ITEMSIZES[short], numbers["result_size"]
    return Work(out[0] * groups * numbers["blocks"], tuple([numbers[name] for name in planes.ARGUMENTS]), private,
                blocks(numbers) if spread is None else None)


def images_of_run(most: int, gradient: tuple[int, ...], weights: TensorType) -> int:
    """Images of one partial result, `most` at most: so few that what an item reads stays in the second cache, where it reads
    much more than it adds up."""
    size = math.prod(gradient[1:])
    while most > 1 and most * size > RUN and LITTLE * weights.size <= most // 2 * size:
        most //= 2
    return most


def weight_gradient(short: str, image: tuple[int, ...], gradient: tuple[int, ...], groups: int, steps: Steps,
                    images_per_item: int) -> Work:
    """The gradient in the weights; an item has so many images."""
    numbers, lanes = lined(image, gradient, groups, steps), gemm.element_tile(short).lanes
    line = numbers["planes_size"] // numbers["plane_height"]
    numbers |= in_parts(numbers, PART // line - numbers["plane_height"] + gradient[3])
    at_once = 1
    if numbers["rows_at_once"] == gradient[3]:
        at_once = max(min(images_per_item, LONG // (numbers["plane_height"] * gradient[4])), 1)
        at_once = -(-images_per_item // -(-images_per_item // at_once))             # evenly
    line = at_once * numbers["plane_height"] * gradient[4]
    line += -line % lanes
    numbers |= {"images": image[0], "images_per_item": images_per_item, "images_at_once": at_once,
                "planes_size": at_once * numbers["planes_size"], "line_size": line, "lines_size": numbers["rows"] * line,
                "sums_size": numbers["rows"] * numbers["channels"] * steps["kernel_height"] * steps["kernel_width"]}
    private = numbers["planes_size"], numbers["lines_size"], numbers["sums_size"]
    items = -(-image[0] // images_per_item) * groups
    return Work(items, tuple([numbers[name] for name in planes.WEIGHT_ARGUMENTS]), private, read_blocks(numbers))


def read_blocks(numbers: dict[str, int]) -> Blocks:
    """Which planes of the gradient, [images, groups * rows, out_height, out_width], an item of the weights' reads."""
    return Blocks({name: numbers[name] for name in ("images", "images_per_item", "groups", "rows")}, (
        ("first_batch", "item // groups * images_per_item"),
        ("last_batch", "min(first_batch + images_per_item, images)"),
        ("first_row", "item % groups * rows"),
        ("last_row", "first_row + rows")), (1, 2), planes=(numbers["images_per_item"], numbers["rows"]))
