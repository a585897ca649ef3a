"""Views by their strides: the array in one piece that a transposed and expanded array is a view of, and the ops in between.

What eager execution on the CPU and on GPUs asks, so that operands need no copy: their plan begins with the movement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jitgrad import ops

Chain = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Base:
    """How to get at it: the dimensions that are `gone`, which have one element or repeat it; the `order` of those that are
    left, the one with the largest stride first; and the `chain` of ops that makes the view of it."""

    gone: tuple[bool, ...]
    order: tuple[int, ...]
    chain: Chain


@lru_cache(maxsize=4096)
def dense_base(shape: tuple[int, ...], strides: tuple[int, ...]) -> Base | None:
    """None for an empty array. Whether the base is in one piece is for the caller to see."""
    if 0 in shape:
        return None
    gone = tuple([n == 1 or stride == 0 for n, stride in zip(shape, strides, strict=True)])
    left = [k for k, missing in enumerate(gone) if not missing]
    order = tuple(sorted(range(len(left)), key=lambda k: -strides[left[k]]))
    back = tuple(sorted(range(len(order)), key=lambda k: order[k]))
    ones = tuple([1 if stride == 0 else n for n, stride in zip(shape, strides, strict=True)])
    chain: list[tuple[str, tuple[int, ...]]] = []
    if back != tuple(range(len(order))):
        chain.append(("permute", back))
    if len(order) != len(shape):
        chain.append(("reshape", ones))
    if ones != shape:
        chain.append(("broadcast_to", shape))
    return Base(gone, order, tuple(chain))


def moved(value: Any, chain: Sequence[tuple[str, tuple[int, ...]]]) -> Any:
    """`value` after the ops of a chain."""
    for name, sizes in chain:
        if name == "permute":
            value = ops.permute(value, axes=sizes)
        else:
            value = (ops.reshape if name == "reshape" else ops.broadcast_to)(value, shape=sizes)
    return value
