"""The steps of a convolution as the integers of its kernels, and the phases of its gradient in an image.

`geometry` makes the steps of the attributes of a convolution: for each axis the size of the kernel, the stride, by how much
places are shifted, and the distance of taps. Shapes are those of volumes, [N, C, D, H, W]; images have a depth of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jitgrad.codegen.call import Call

AXES = ("z", "y", "x")
KERNEL = {"z": "kernel_depth", "y": "kernel_height", "x": "kernel_width"}
GATHERED = 64                                   # positions from which a product of one image is long enough for its panels


def geometry(call: Call, kernel: tuple[int, ...]) -> dict[str, int]:
    """The steps of a convolution, as integers of the kernels."""
    stride, dilation, padding = (call.attrs[name] for name in ("stride", "dilation", "padding"))
    steps = {KERNEL[axis]: 1 for axis in AXES}
    for axis in AXES:
        steps |= {f"stride_{axis}": 1, f"shift_{axis}": 0, f"tap_{axis}": 1}
    for k, axis in enumerate(AXES[3 - len(kernel):]):
        steps |= {KERNEL[axis]: kernel[k], f"stride_{axis}": stride[k], f"shift_{axis}": -padding[k][0],
                  f"tap_{axis}": dilation[k]}
    return steps


def taps_of(steps: dict[str, int]) -> int:
    return math.prod(steps[name] for name in KERNEL.values())


def volume(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same as [N, C, D, H, W]."""
    return (*shape[:2], *(1,) * (5 - len(shape)), *shape[2:])


def meets_once(shape: tuple[int, ...], gradient: tuple[int, ...], steps: dict[str, int]) -> bool:
    """Whether each position of an image meets exactly one of several taps, at one place of the gradient."""
    return taps_of(steps) > 1 and all(
        steps[f"stride_{axis}"] == steps[KERNEL[axis]] and steps[f"shift_{axis}"] == 0
        and (steps[f"tap_{axis}"] == 1 or steps[KERNEL[axis]] == 1) and size == steps[KERNEL[axis]] * count
        for axis, size, count in zip(AXES, shape[2:], gradient[2:], strict=True))


def scattered(out: tuple[int, ...], steps: dict[str, int]) -> bool:
    """Whether most of an image meets no tap, and the positions `out` enough of it to be gathered image by image."""
    return taps_of(steps) == 1 < steps["stride_y"] * steps["stride_x"] and out[3] * out[4] >= GATHERED


@dataclass(frozen=True, slots=True)
class Phase:
    """Along one axis, the positions of an image that are `number` modulo the stride: `size` of them. `taps` taps meet
    them, each `every`th from `first` on; position p and tap t come from place ``p + shift + t * tap``."""

    number: int
    size: int
    first: int
    every: int
    taps: int
    shift: int
    tap: int


ALONE = Phase(0, 0, 0, 1, 1, 0, 1)              # an axis with one tap


def phases(size: int, steps: dict[str, int], axis: str) -> list[Phase]:
    """The phases of an axis of `size` positions."""
    stride, padding, dilation = steps[f"stride_{axis}"], -steps[f"shift_{axis}"], steps[f"tap_{axis}"]
    kernel = steps[KERNEL[axis]]
    every = stride // math.gcd(stride, dilation)
    found = []
    for number in range(min(stride, size)):
        meeting = [i for i in range(kernel) if (number + padding - i * dilation) % stride == 0]
        first = meeting[0] if meeting else 0
        found.append(Phase(number, -(-(size - number) // stride), first, every, len(meeting),
                           (number + padding - first * dilation) // stride, -(every * dilation // stride)))
    return found


def phase_steps(y: Phase, x: Phase) -> dict[str, int]:
    """The steps of the convolution that makes a phase."""
    places = {"y": y, "x": x}
    steps = {f"{name}_{axis}": value for axis, p in places.items()
             for name, value in (("stride", 1), ("shift", p.shift), ("tap", p.tap))}
    return {**steps, "kernel_depth": 1, **{KERNEL[axis]: p.taps for axis, p in places.items()}}
