"""Joining and cutting by rows, columns and depth, matrices from blocks and powers, products of sets, numerical
integration and differentiation along a dimension.

Everything is made of the movements of `shape`; what depends on sizes alone (which pairs there are) is worked out in
Python.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_float,
    broadcast_shape,
    cast,
    describe,
    from_array,
    is_number,
    many_dims,
    one_dim,
    require_shape,
    result_type,
    size,
    sizes_of,
)
from jitgrad.functional.elementwise import add, div, floor_divide, mul, remainder, sub
from jitgrad.functional.reduce import cumprod, cumsum, diff, sum
from jitgrad.functional.shape import (
    atleast_2d,
    cat,
    diag,
    flip,
    meshgrid,
    ravel,
    section,
    split,
    stack,
    tensor_split,
    vstack,
)
from jitgrad.ops.builders import broadcast, expand_dims, full

__all__ = ["atleast_3d", "block_diag", "cartesian_prod", "column_stack", "combinations", "cumulative_trapezoid",
           "diagflat", "dsplit", "dstack", "gradient", "hsplit", "row_stack", "split_with_sizes", "trapezoid", "trapz",
           "unravel_index", "vander", "vsplit"]


# joining and cutting

def atleast_3d(input: Tensor) -> Tensor:
    """With at least three dimensions: a vector becomes [1, n, 1], a matrix [rows, columns, 1]."""
    if len(input.shape) >= 3:
        return input
    matrix = atleast_2d(input)
    return ops.reshape(matrix, shape=(*matrix.shape, 1))


def column_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined along dimension 1, vectors as columns."""
    return cat([ops.reshape(x, shape=(size(x.shape), 1)) if len(x.shape) <= 1 else x for x in tensors], 1)


def row_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined as rows: `vstack`."""
    return vstack(tensors)


def dstack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined along dimension 2."""
    return cat([atleast_3d(x) for x in tensors], 2)


def hsplit(input: Tensor, indices_or_sections: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Cut into columns (a vector into pieces): into so many equal ones, or before those indices. Views."""
    return _cut("hsplit", input, indices_or_sections, 1, 0 if len(input.shape) == 1 else 1)


def vsplit(input: Tensor, indices_or_sections: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Cut into rows: into so many equal ones, or before those indices. Views."""
    return _cut("vsplit", input, indices_or_sections, 2, 0)


def dsplit(input: Tensor, indices_or_sections: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Cut along dimension 2: into so many equal ones, or before those indices. Views."""
    return _cut("dsplit", input, indices_or_sections, 3, 2)


def _cut(op: str, x: Tensor, where: int | Sequence[int], least: int, axis: int) -> tuple[Tensor, ...]:
    require_shape(op, len(x.shape) >= least, f"expected at least {least} dimensions, got {describe(x)}")
    if isinstance(where, int):
        require_shape(op, where > 0 and x.shape[axis] % where == 0,
                      f"{x.shape[axis]}, the size of dimension {axis}, is not a multiple of {where}")
    return tensor_split(x, where, axis)


def split_with_sizes(input: Tensor, split_sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Pieces of those sizes along `dim`. Views."""
    return split(input, list(split_sizes), dim)


# matrices

def diagflat(input: Tensor, offset: int = 0) -> Tensor:
    """The matrix with the flattened `input` on that diagonal, zero elsewhere."""
    return diag(ravel(input), offset)


def block_diag(*tensors: Tensor) -> Tensor:
    """The matrix with those matrices along its diagonal, zero elsewhere; vectors and numbers count as one row."""
    blocks = [atleast_2d(x) for x in tensors] or [full((1, 0), 0.0, dtypes.get_default_dtype())]
    for x in blocks:
        require_shape("block_diag", len(x.shape) == 2, f"expected at most 2 dimensions, got {describe(x)}")
    dtype, width = result_type(*blocks), builtins.sum(x.shape[1] for x in blocks)
    rows, at = [], 0
    for x in blocks:
        right = width - at - x.shape[1]
        rows.append(ops.pad(cast(x, dtype), low=(0, at), high=(0, right)))
        at += x.shape[1]
    return cat(rows, 0)


def vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    """Powers of a vector as columns, from ``N - 1`` (by default one less than its length) down to 0, or up from 0."""
    require_shape("vander", len(x.shape) == 1, f"expected a vector, got {describe(x)}")
    count = x.shape[0] if N is None else N
    require_shape("vander", count >= 0, f"N must not be negative, got {N}")
    x = x if x.dtype.category in "fc" else cast(x, dtypes.int64)
    ones = full((x.shape[0], min(count, 1)), 1, x.dtype)
    factors = broadcast(expand_dims(x, (1,)), (x.shape[0], max(count - 1, 0)))
    powers = cumprod(ops.concat(ones, factors, axis=1), 1)
    return powers if increasing else flip(powers, 1)


# sets

def cartesian_prod(*tensors: Tensor) -> Tensor:
    """All combinations of an element of each vector, one a row, the last vector's running fastest. Of one vector itself."""
    for x in tensors:
        require_shape("cartesian_prod", len(x.shape) == 1, f"expected vectors, got {describe(x)}")
    require_shape("cartesian_prod", len(tensors) > 0, "expected at least one vector")
    return tensors[0] if len(tensors) == 1 else stack([ravel(grid) for grid in meshgrid(*tensors)], 1)


def combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """All choices of `r` elements of a vector, one a row, in order; with replacement elements may come again."""
    require_shape("combinations", len(input.shape) == 1, f"expected a vector, got {describe(input)}")
    require_shape("combinations", r >= 0, f"r must not be negative, got {r}")
    if r == 0:
        return full((0,), 0, input.dtype)
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    rows = np.array(list(choose(range(input.shape[0]), r)), np.int64).reshape(-1, r)
    return ops.take(input, from_array(rows, input), axis=0)


def unravel_index(indices: Tensor, shape: int | Sequence[int]) -> tuple[Tensor, ...]:
    """The positions in each dimension of a tensor of `shape` that positions in the flattened tensor stand for."""
    if not indices.dtype.is_integer:
        raise complain(DTypeError, "unravel_index", f"indices must be integers, got {describe(indices)}")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    require_shape("unravel_index", min(sizes, default=0) >= 0, f"sizes must not be negative, got {list(sizes)}")
    found: list[Tensor] = []
    left = indices
    for n in reversed(sizes):
        found.insert(0, remainder(left, max(n, 1)))
        left = floor_divide(left, max(n, 1))
    return tuple(found)


# integrals and derivatives

def trapezoid(y: Tensor, x: Tensor | None = None, *, dx: Operand | None = None, dim: int = -1) -> Tensor:
    """The integral along `dim` by the trapezoidal rule, over the places `x` or at a distance of `dx` (by default 1)."""
    return sum(_panels("trapezoid", y, x, dx, dim), one_dim("trapezoid", dim, len(y.shape)))


trapz = trapezoid


def cumulative_trapezoid(y: Tensor, x: Tensor | None = None, *, dx: Operand | None = None, dim: int = -1) -> Tensor:
    """The integrals up to each place but the first along `dim`, as `trapezoid` takes them."""
    return cumsum(_panels("cumulative_trapezoid", y, x, dx, dim), dim)


def _panels(op: str, y: Tensor, x: Tensor | None, dx: Operand | None, dim: int) -> Tensor:
    """The integrals between neighbours along `dim`."""
    require_shape(op, x is None or dx is None, "x and dx cannot both be given")
    axis = one_dim(op, dim, len(y.shape))
    y, extent = as_float(y), y.shape[axis]
    both = add(section(y, axis, 0, max(extent - 1, 0)), section(y, axis, min(1, extent), extent))
    if x is None:
        return div(both if dx is None else mul(both, dx), 2)
    if len(x.shape) == 1:
        require_shape(op, x.shape[0] == extent, f"{describe(x)} gives no place for each of {extent} values")
        x = ops.reshape(x, shape=tuple([extent if d == axis else 1 for d in range(len(y.shape))]))
    return mul(both, div(diff(x, 1, axis - len(y.shape)), 2))


def gradient(input: Tensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1) -> tuple[Tensor, ...]:
    """The derivative along each dimension of `dim` (by default all), from neighbours on both sides, and at the ends from the
    next ones, with an error of order `edge_order` (1 or 2). `spacing` is a distance, one for each dimension, or a vector of
    places for each dimension."""
    require_shape("gradient", edge_order in (1, 2), f"edge_order must be 1 or 2, got {edge_order}")
    x = as_float(input)
    dims = many_dims("gradient", None, len(x.shape)) if dim is None else \
        [one_dim("gradient", d, len(x.shape)) for d in ([dim] if isinstance(dim, int) else dim)]
    spacings = [spacing] * len(dims) if is_number(spacing) else list(spacing)
    require_shape("gradient", len(spacings) == len(dims), f"{len(spacings)} spacings for {len(dims)} dimensions")
    return tuple([_slope(x, axis, s, edge_order) for axis, s in zip(dims, spacings)])


def _slope(x: Tensor, axis: int, spacing: Any, edge_order: int) -> Tensor:
    extent = x.shape[axis]
    require_shape("gradient", extent > edge_order, f"dimension {axis} of {describe(x)} is too short")
    gaps = _gaps(x, axis, spacing)
    rises = div(sub(section(x, axis, 1, extent), section(x, axis, 0, extent - 1)), gaps)
    first, last = section(rises, axis, 0, 1), section(rises, axis, extent - 2, extent - 1)
    if extent == 2:
        return cat([first, last], axis)
    before, after = section(gaps, axis, 0, extent - 2), section(gaps, axis, 1, extent - 1)
    left, right = section(rises, axis, 0, extent - 2), section(rises, axis, 1, extent - 1)
    inner = div(add(mul(left, after), mul(right, before)), add(before, after))
    if edge_order == 2:                                # a parabola through three: twice the end's rise less the middle's
        first = _bent(first, section(rises, axis, 1, 2), section(gaps, axis, 0, 1), section(gaps, axis, 1, 2))
        last = _bent(last, section(rises, axis, extent - 3, extent - 2), section(gaps, axis, extent - 2, extent - 1),
                     section(gaps, axis, extent - 3, extent - 2))
    return cat([first, inner, last], axis)


def _bent(near: Tensor, far: Tensor, near_gap: Tensor, far_gap: Tensor) -> Tensor:
    """The slope at the end of a parabola, from the rises of its two panels."""
    return add(near, mul(sub(near, far), div(near_gap, add(near_gap, far_gap))))


def _gaps(x: Tensor, axis: int, spacing: Any) -> Tensor:
    """The distances between neighbours along `axis`, with size 1 in all other dimensions."""
    extent = x.shape[axis]
    shape = tuple([extent - 1 if d == axis else 1 for d in range(len(x.shape))])
    if is_number(spacing):
        return full(shape, float(spacing), x.dtype)
    require_shape("gradient", tuple(spacing.shape) == (extent,), f"expected {extent} places, got {describe(spacing)}")
    return ops.reshape(cast(diff(spacing), x.dtype), shape=shape)


def sum_to_size(input: Tensor, *size: Any) -> Tensor:
    """Summed over what broadcasting a tensor of that shape to the shape of `input` would repeat."""
    target = sizes_of(size)
    fits = len(target) <= len(input.shape) and broadcast_shape("sum_to_size", tuple(input.shape), target) == input.shape
    require_shape("sum_to_size", fits, f"{describe(input)} is no broadcast of shape {list(target)}")
    lead = len(input.shape) - len(target)
    axes = [d for d, n in enumerate(input.shape) if d < lead or (target[d - lead] == 1 and n != 1)]
    return ops.reshape(sum(input, axes), shape=target) if axes else input
