"""Lowering of convolutions in groups of few channels to the kernels of `jitgrad.kernels.cpu.planes`: what they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jitgrad.codegen.kernel import Blocks
from jitgrad.codegen.taps import Steps, Work
from jitgrad.kernels.cpu import gemm, planes

MOST = 1 << 18                                  # elements of a group's planes, and of its result: the second cache has room
SEVERAL = 1 << 14                               # elements of planes up to which they have several images
FEW = 64                                        # channels of a group on either side, up to which it is done this way


@dataclass(frozen=True, slots=True)
class Spread:
    """Where a result goes: to every `step`th row and column, from `first` on, of planes of a `size`."""

    size: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)


def suits(image: tuple[int, ...], out: tuple[int, ...], groups: int, steps: Steps) -> bool:
    """Whether this is the fastest way for a convolution of `image`, [N, C, 1, H, W], to `out`."""
    channels, rows = image[1] // groups, out[1] // groups
    if groups == 1 or max(channels, rows) > FEW:
        return False
    numbers = geometry(image, out, groups, steps)
    return max(numbers["planes_size"], rows * numbers["plane_height"] * numbers["plane_width"]) <= MOST


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


def convolve(short: str, image: tuple[int, ...], out: tuple[int, ...], groups: int, steps: Steps,
             blocks: Callable[[dict[str, int]], Blocks], spread: Spread | None) -> Work:
    """The convolution of `image` to `out`, which is all of the result or spread over it; `blocks` says what items like those
    of `conv.convolve` make."""
    numbers = geometry(image, out, groups, steps)
    whole = spread or Spread((out[3], out[4]))
    for axis, name, size, first, step in zip("yx", ("height", "width"), whole.size, whole.first, whole.step, strict=True):
        numbers |= {f"whole_{name}": size, f"first_{axis}": first, f"spread_{axis}": step}
    table = numbers["channels"] * steps["kernel_height"] * steps["kernel_width"]
    numbers |= {"table_size": table, "panel_rows": gemm.panel_height(numbers["rows"], gemm.element_tile(short)),
                "result_size": numbers["rows"] * numbers["plane_height"] * numbers["plane_width"],
                "blocks": 1, "columns_per_item": out[3] * out[4], "images": out[0], "images_per_item": 1}
    private = numbers["planes_size"], table * 8 // gemm.ITEMSIZES[short], numbers["result_size"]
    return Work(out[0] * groups, tuple([numbers[name] for name in planes.ARGUMENTS]), private,
                blocks(numbers) if spread is None else None)


def weight_gradient(short: str, image: tuple[int, ...], gradient: tuple[int, ...], groups: int, steps: Steps,
                    images_per_item: int) -> Work:
    """The gradient in the weights; an item has so many images."""
    numbers = geometry(image, gradient, groups, steps)
    lanes, at_once = gemm.element_tile(short).lanes, max(min(images_per_item, SEVERAL // numbers["planes_size"]), 1)
    at_once = -(-images_per_item // -(-images_per_item // at_once))                 # evenly
    line = at_once * numbers["plane_height"] * numbers["plane_width"]
    line += -line % lanes
    taps = steps["kernel_height"] * steps["kernel_width"]
    numbers |= {"images": image[0], "images_per_item": images_per_item, "images_at_once": at_once,
                "planes_size": at_once * numbers["planes_size"], "line_size": line, "lines_size": numbers["rows"] * line,
                "sums_size": numbers["rows"] * numbers["channels"] * taps}
    private = numbers["planes_size"], numbers["lines_size"], numbers["sums_size"]
    items = -(-image[0] // images_per_item) * groups
    return Work(items, tuple([numbers[name] for name in planes.WEIGHT_ARGUMENTS]), private)
