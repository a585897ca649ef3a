"""What convolution, pooling and resampling have in common: sequences ``[N, C, L]``, images ``[N, C, H, W]`` and volumes
``[N, C, D, H, W]`` whose batch dimension may be missing, and arguments that are one number or one for each dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.errors import ShapeError, complain
from jitgrad.functional.core import Tensor, describe, from_array, is_number, require_shape
from jitgrad.ops.builders import broadcast, expand_dims

Sizes = int | Sequence[int]
Ints = tuple[int, ...]


def per_dimension(op: str, name: str, value: Any, dims: int) -> Ints:
    """The argument `name` as one integer for each of `dims` dimensions."""
    if is_number(value):
        return (int(value),) * dims
    given = tuple([int(v) for v in value])
    require_shape(op, len(given) in (1, dims), f"{name}={given} needs one number, or one for each of {dims} dimension(s)")
    return given * dims if len(given) == 1 else given


def batched(op: str, x: Tensor, dims: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`x` with a batch dimension before its channels and `dims` sizes, and how to take one that was added away again."""
    if len(x.shape) == dims + 2:
        return x, lambda y: y
    if len(x.shape) != dims + 1:
        raise complain(ShapeError, op, f"expected {dims + 1} or {dims + 2} dimensions, got {describe(x)}")
    return expand_dims(x, (0,)), lambda y: ops.reshape(y, shape=tuple(y.shape[1:]))


def both_sides(padding: Ints) -> tuple[tuple[int, int], ...]:
    """The same padding before and after."""
    return tuple([(p, p) for p in padding])


def flattened(x: Tensor) -> Tensor:
    """[N, C, *sizes] as [N, C, number of places]."""
    count = 1
    for n in x.shape[2:]:
        count *= n
    return ops.reshape(x, shape=(*x.shape[:2], count))


def apply_matrices(x: Tensor, matrices: Sequence[np.ndarray]) -> Tensor:
    """[N, C, *sizes] with a matrix [new size, size] applied along each of the sizes; the last dimension first."""
    for axis in reversed(range(2, len(x.shape))):
        x = _apply_along(x, axis, from_array(matrices[axis - 2].astype(x.dtype.numpy)))
    return x


def _apply_along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    outer, inner = 1, 1
    for n in x.shape[:axis]:
        outer *= n
    for n in x.shape[axis + 1:]:
        inner *= n
    count, extent = matrix.shape
    if inner == 1:
        moved = ops.matmul(ops.reshape(x, shape=(outer, extent)), ops.permute(matrix, axes=(1, 0)))
    else:
        planes = ops.reshape(x, shape=(outer, extent, inner))
        moved = ops.matmul(broadcast(matrix, (outer, count, extent)), planes)
    return ops.reshape(moved, shape=(*x.shape[:axis], count, *x.shape[axis + 1:]))
