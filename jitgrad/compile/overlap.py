"""Memory that Tensors share only in part: how one array is found inside of another, as movement ops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.ir.op import Op
from jitgrad.shapes import contiguous_strides


def movement_between(owner: np.ndarray, view: np.ndarray) -> tuple[tuple[Op, dict[str, Any]], ...] | None:
    """The movement ops that make `view` out of the dense array `owner`, whose memory it lies in; None when there are
    none (windows that overlap, another dtype)."""
    if owner.dtype != view.dtype or not owner.flags.c_contiguous:
        return None
    repeated = [size > 1 and stride == 0 for size, stride in zip(view.shape, view.strides)]
    if any(repeated):
        once = movement_between(owner, view[tuple([slice(0, 1) if r else slice(None) for r in repeated])])
        return None if once is None else (*once, (ops.broadcast_to, {"shape": view.shape}))
    for shape in (owner.shape, (owner.size,), _shape_of(view, owner)):
        chain = _slices(shape, owner, view)
        if chain is not None:
            return (*(() if shape == owner.shape else ((ops.reshape, {"shape": shape}),)), *chain)
    return None


def _shape_of(view: np.ndarray, owner: np.ndarray) -> tuple[int, ...]:
    """The shape in which the dimensions of `view` are dimensions of the owner, if each of its strides divides the next."""
    steps = sorted({abs(stride) // owner.itemsize for size, stride in zip(view.shape, view.strides) if size > 1} | {1})
    inner = [b // a for a, b in pairwise(steps)]
    return (owner.size // steps[-1], *reversed(inner))


def _slices(shape: tuple[int, ...], owner: np.ndarray, view: np.ndarray) -> list[tuple[Op, dict[str, Any]]] | None:
    """`view` as slice, flip, reshape and permute of `owner` seen with this shape; None when it is not."""
    strides = contiguous_strides(shape)
    offset = (view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]) // owner.itemsize
    start = []
    for stride in strides:
        start.append(offset // stride)
        offset -= start[-1] * stride
    sizes, steps, flipped = [1] * len(shape), [1] * len(shape), []
    axis_of: list[int | None] = []
    for size, byte_stride in zip(view.shape, view.strides):
        step = byte_stride // owner.itemsize
        axis = next((k for k, s in enumerate(strides) if s <= abs(step) and step % s == 0), None)
        if size == 1 or axis is None or axis in axis_of or step == 0:
            if size != 1:
                return None
            axis_of.append(None)
            continue
        axis_of.append(axis)
        sizes[axis], steps[axis] = size, abs(step) // strides[axis]
        if step < 0:
            start[axis] -= (size - 1) * steps[axis]
            flipped.append(axis)
    stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, sizes, steps)]
    if any(a < 0 or b > n for a, b, n in zip(start, stop, shape)):
        return None
    chain: list[tuple[Op, dict[str, Any]]] = [
        (ops.slice, {"start": tuple(start), "stop": tuple(stop), "step": tuple(steps)})]
    if flipped:
        chain.append((ops.flip, {"axes": tuple(sorted(flipped))}))
    kept = [a for a in axis_of if a is not None]
    order = sorted(kept)
    chain.append((ops.reshape, {"shape": tuple([sizes[a] for a in order])}))
    chain.append((ops.permute, {"axes": tuple([order.index(a) for a in kept])}))
    chain.append((ops.reshape, {"shape": view.shape}))
    return chain
