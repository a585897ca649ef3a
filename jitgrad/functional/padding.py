"""Padding: `pad` with a constant or with elements of the tensor itself."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import Tensor, cast, constant, describe, require_shape, sizes_of
from jitgrad.functional.elementwise import where
from jitgrad.functional.shape import section
from jitgrad.ops.builders import broadcast, full

__all__ = [
    "pad",
]

# padding

def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`input` with ``pad = (left, right, top, bottom, …)`` elements put in, beginning at the last dimension; negative
    counts take elements away. `mode` is constant (filled with `value`), reflect, replicate or circular."""
    widths = sizes_of((pad,))
    require_shape("pad", len(widths) % 2 == 0 and len(widths) // 2 <= len(input.shape),
                  f"pad={widths} needs a pair for each padded dimension of {describe(input)}")
    pairs = {len(input.shape) - 1 - k: (widths[2 * k], widths[2 * k + 1]) for k in range(len(widths) // 2)}
    if mode == "constant":
        return _pad_constant(input, pairs, 0 if value is None else value)
    by_elements = _pad_all if mode == "circular" or (mode == "reflect" and len(pairs) > 2) else _pad_from_the_edge
    return by_elements(input, pairs, mode)


def _pad_all(x: Tensor, pairs: dict[int, tuple[int, int]], mode: str) -> Tensor:
    for axis, (low, high) in pairs.items():
        x = _pad_by_elements(x, axis, low, high, mode)
    return x


_pad_from_the_edge = casts(cpu="full")(_pad_all)


def _pad_constant(x: Tensor, pairs: dict[int, tuple[int, int]], value: Any) -> Tensor:
    for axis, (before, after) in pairs.items():
        x = section(x, axis, builtins.max(-before, 0), x.shape[axis] - builtins.max(-after, 0))
    low = tuple([builtins.max(pairs.get(d, (0, 0))[0], 0) for d in range(len(x.shape))])
    high = tuple([builtins.max(pairs.get(d, (0, 0))[1], 0) for d in range(len(x.shape))])
    padded = ops.pad(x, low=low, high=high)
    if type(value) in (int, float, bool) and value == 0:
        return padded
    inside = ops.pad(full(x.shape, True, dtypes.bool_), low=low, high=high)
    return where(inside, padded, cast(constant(value, x.dtype), x.dtype))


_PADDING_MODES = ("constant", "reflect", "replicate", "circular")


def _pad_by_elements(x: Tensor, axis: int, low: int, high: int, mode: str) -> Tensor:
    """One dimension padded with elements of `x` itself."""
    n = x.shape[axis]
    require_shape("pad", mode in _PADDING_MODES, f"mode={mode!r} is none of {', '.join(_PADDING_MODES)}")
    limit = {"reflect": n - 1, "circular": n, "replicate": builtins.max(low, high)}[mode]
    require_shape("pad", 0 <= low <= limit and 0 <= high <= limit,
                  f"{mode} padding ({low}, {high}) must be between 0 and {limit} for a dimension of size {n}")
    if mode == "reflect":
        before = ops.flip(section(x, axis, 1, low + 1), axes=(axis,))
        after = ops.flip(section(x, axis, n - 1 - high, n - 1), axes=(axis,))
    elif mode == "circular":
        before, after = section(x, axis, n - low, n), section(x, axis, 0, high)
    else:
        before = broadcast(section(x, axis, 0, 1), (*x.shape[:axis], low, *x.shape[axis + 1:]))
        after = broadcast(section(x, axis, n - 1, n), (*x.shape[:axis], high, *x.shape[axis + 1:]))
    return ops.concat(before, x, after, axis=axis)
