"""Where elements lie: reshaping, reordering, repeating, cutting and joining, with PyTorch's names and meaning.

Everything that can be a view of its operand is one; what has to copy (cat, stack, repeat, roll, pad …) says so. Sizes
and dimensions may be given one by one or as one sequence. """

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import OutOfRangeError, ShapeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Tensor,
    broadcast_all,
    broadcast_shape,
    cast,
    describe,
    describe_all,
    many_dims,
    one_dim,
    require_shape,
    result_type,
    size,
    sizes_of,
)
from jitgrad.ops.builders import broadcast, conjugate, expand_dims, full, zeros_like

__all__ = [
    "adjoint", "atleast_1d", "atleast_2d", "broadcast_shapes", "broadcast_tensors", "broadcast_to", "cat",
    "chunk", "clone", "concat", "concatenate", "diag", "diag_embed", "diagonal", "expand", "expand_as",
    "flatten", "flip", "fliplr", "flipud", "hstack", "meshgrid", "moveaxis", "movedim", "narrow", "permute",
    "ravel", "repeat", "repeat_interleave", "reshape", "roll", "rot90", "select", "split", "squeeze", "stack",
    "swapaxes", "swapdims", "t", "tensor_split", "tile", "transpose", "tril", "triu", "unbind", "unflatten",
    "unsqueeze", "vstack",
]

# other shapes of the same elements

def reshape(input: Tensor, *shape: Any) -> Tensor:
    """The elements in row-major order at another shape, one size of which may be -1. A view where memory allows."""
    target = known_shape("reshape", input, sizes_of(shape))
    return input if target == input.shape else ops.reshape(input, shape=target)


def known_shape(op: str, x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with -1 replaced by the size that it stands for; ShapeError when there is none."""
    count = size(x.shape)
    if -1 not in shape:
        if size(shape) != count or builtins.min(shape, default=0) < 0:
            raise _misfit(op, x, shape)
        return shape
    rest = -size(shape)                                       # the product without the -1
    if rest <= 0 or count % rest or shape.count(-1) > 1:
        raise _misfit(op, x, shape)
    return tuple([count // rest if n == -1 else n for n in shape])


def _misfit(op: str, x: Tensor, shape: tuple[int, ...]) -> ShapeError:
    if shape.count(-1) > 1:
        problem = f"only one size can be -1, got {list(shape)}"
    else:
        problem = f"shape {list(shape)} is invalid for {describe(x)}, which has {size(x.shape)} elements"
    return complain(ShapeError, op, problem)  # type: ignore[return-value]


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The dimensions `start_dim` … `end_dim` (both included) as one."""
    shape = input.shape
    first, last = one_dim("flatten", start_dim, len(shape)), one_dim("flatten", end_dim, len(shape))
    require_shape("flatten", first <= last, f"start_dim={start_dim} comes after end_dim={end_dim}")
    if not shape:
        return ops.reshape(input, shape=(1,))
    return reshape(input, (*shape[:first], size(shape[first:last + 1]), *shape[last + 1:]))


def ravel(input: Tensor) -> Tensor:
    """All elements in one dimension."""
    return reshape(input, (size(input.shape),))


def unflatten(input: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Dimension `dim` split into several of those sizes, one of which may be -1."""
    axis = one_dim("unflatten", dim, len(input.shape))
    known = size([n for n in sizes if n != -1])
    inner = tuple([input.shape[axis] // known if n == -1 and known else n for n in sizes])
    require_shape("unflatten", size(inner) == input.shape[axis],
                  f"sizes {tuple(sizes)} do not multiply to {input.shape[axis]}, the size of dimension {dim}")
    return reshape(input, (*input.shape[:axis], *inner, *input.shape[axis + 1:]))


def squeeze(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """Without dimensions of size 1: all of them, or those of `dim` that have size 1."""
    axes = many_dims("squeeze", dim, len(input.shape))
    shape = tuple([n for d, n in enumerate(input.shape) if n != 1 or d not in axes])
    return input if shape == input.shape else ops.reshape(input, shape=shape)


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """With a dimension of size 1 put in at `dim`."""
    return expand_dims(input, (one_dim("unsqueeze", dim, len(input.shape) + 1),))


def permute(input: Tensor, *dims: Any) -> Tensor:
    """Dimension k of the result is dimension ``dims[k]`` of `input`."""
    ndim = len(input.shape)
    axes = tuple([one_dim("permute", d, ndim) for d in sizes_of(dims)])
    if sorted(axes) != list(range(ndim)):
        raise complain(ShapeError, "permute", f"dims={axes} do not name each of the {ndim} dimensions of "
                                              f"{describe(input)} once")
    return input if axes == tuple(range(ndim)) else ops.permute(input, axes=axes)


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """Two dimensions exchanged."""
    ndim = len(input.shape)
    first, second = one_dim("transpose", dim0, ndim), one_dim("transpose", dim1, ndim)
    if first == second:
        return input
    axes = list(range(ndim))
    axes[first], axes[second] = second, first
    return ops.permute(input, axes=tuple(axes))


swapaxes = swapdims = transpose


def t(input: Tensor) -> Tensor:
    """The transpose of a matrix; tensors of fewer dimensions as they are."""
    require_shape("t", len(input.shape) <= 2, f"expected at most 2 dimensions, got {describe(input)}",
                  fix="Did you mean x.mT?")
    return ops.permute(input, axes=(1, 0)) if len(input.shape) == 2 else input


def adjoint(input: Tensor) -> Tensor:
    """The last two dimensions exchanged, complex numbers conjugated."""
    return conjugate(transpose(input, -2, -1))


def movedim(input: Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """Dimensions `source` moved to `destination`; the others keep their order."""
    ndim = len(input.shape)
    origin = [one_dim("movedim", d, ndim) for d in ([source] if isinstance(source, int) else source)]
    goal = [one_dim("movedim", d, ndim) for d in ([destination] if isinstance(destination, int) else destination)]
    require_shape("movedim", len(set(origin)) == len(origin) == len(goal) == len(set(goal)),
                  f"source={source} and destination={destination} must name equally many different dimensions")
    rest = iter([d for d in range(ndim) if d not in origin])
    placed = dict(zip(goal, origin))
    return permute(input, [placed[d] if d in placed else next(rest) for d in range(ndim)])


moveaxis = movedim


def atleast_1d(input: Tensor) -> Tensor:
    """With at least one dimension."""
    return input if input.shape else ops.reshape(input, shape=(1,))


def atleast_2d(input: Tensor) -> Tensor:
    """With at least two dimensions."""
    return input if len(input.shape) >= 2 else ops.reshape(input, shape=(1, size(input.shape)))


# repeating

def expand(input: Tensor, *shape: Any) -> Tensor:
    """Dimensions of size 1 (and new ones in front) grown to `shape`, without copying; -1 keeps a size."""
    sizes = sizes_of(shape)
    lead = len(sizes) - len(input.shape)
    fits = lead >= 0 and all_nonnegative(sizes[lead:], input.shape)
    target = tuple([input.shape[k - lead] if n == -1 and k >= lead else n for k, n in enumerate(sizes)]) if fits else ()
    fits = fits and builtins.all(n >= 0 for n in target) and builtins.all(
        m in (1, n) for m, n in zip(input.shape, target[lead:]))
    require_shape("expand", fits, f"{describe(input)} cannot be expanded to {list(sizes)}: only dimensions of size 1 "
                                  "grow")
    return broadcast(input, target)


def all_nonnegative(sizes: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether sizes are -1 or more and as many as those that they replace."""
    return len(sizes) == len(kept) and builtins.all(n >= -1 for n in sizes)


def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """`expand` to the shape of `other`."""
    return expand(input, other.shape)


def broadcast_to(input: Tensor, *shape: Any) -> Tensor:
    """`expand`."""
    return expand(input, *shape)


def broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors expanded to their common shape."""
    return broadcast_all("broadcast_tensors", *tensors)


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of tensors of those shapes."""
    return broadcast_shape("broadcast_shapes", *[tuple(s) for s in shapes])


def repeat(input: Tensor, *repeats: Any) -> Tensor:
    """`input` tiled ``repeats[k]`` times along dimension k; more repeats than dimensions put new ones in front."""
    counts = sizes_of(repeats)
    lead = len(counts) - len(input.shape)
    require_shape("repeat", lead >= 0 and builtins.min(counts, default=0) >= 0,
                  f"expected one repeat count for each dimension of {describe(input)}, got {counts}")
    shape = (1,) * lead + tuple(input.shape)
    apart = ops.reshape(input, shape=tuple([n for size_ in shape for n in (1, size_)]))
    grown = broadcast(apart, tuple([n for pair in zip(counts, shape) for n in pair]))
    return ops.reshape(grown, shape=tuple([c * n for c, n in zip(counts, shape)]))


def tile(input: Tensor, *dims: Any) -> Tensor:
    """`repeat`, with missing counts in front taken as 1."""
    counts = sizes_of(dims)
    return repeat(input, (1,) * (len(input.shape) - len(counts)) + counts)


def repeat_interleave(input: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    """Every element (of the flattened tensor, or slice along `dim`) `repeats` times in a row."""
    if dim is None:
        input, dim = ravel(input), 0
    axis = one_dim("repeat_interleave", dim, len(input.shape))
    shape = input.shape
    apart = expand_dims(input, (axis + 1,))
    grown = broadcast(apart, (*shape[:axis + 1], repeats, *shape[axis + 1:]))
    return ops.reshape(grown, shape=(*shape[:axis], shape[axis] * repeats, *shape[axis + 1:]))


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Tensor, ...]:
    """Coordinate grids of 1-d tensors, indexed by matrix ("ij") or Cartesian ("xy") convention."""
    axes = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    swap = indexing == "xy" and len(axes) >= 2
    if swap:
        axes = (axes[1], axes[0], *axes[2:])
    shape = tuple([size(v.shape) for v in axes])
    grids = [broadcast(ops.reshape(v, shape=tuple([n if d == k else 1 for d, n in enumerate(shape)])), shape)
             for k, v in enumerate(axes)]
    return (grids[1], grids[0], *grids[2:]) if swap else tuple(grids)


# cutting

def section(x: Tensor, axis: int, start: int, stop: int, step: int = 1) -> Tensor:
    """``x[start:stop:step]`` along one dimension; all arguments in range, as `ops.slice` wants them."""
    shape = x.shape
    if start == 0 and stop == shape[axis] and step == 1:
        return x
    ndim = len(shape)
    return ops.slice(x, start=(0,) * axis + (start,) + (0,) * (ndim - axis - 1),
                     stop=(*shape[:axis], stop, *shape[axis + 1:]),
                     step=(1,) * axis + (step,) + (1,) * (ndim - axis - 1))


def narrow(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """The `length` slices along `dim` from `start` on."""
    require_shape("narrow", input.shape, "a 0-d tensor has no dimension to select from")
    axis = one_dim("narrow", dim, len(input.shape))
    extent = input.shape[axis]
    first = start + extent if start < 0 else start
    require_shape("narrow", first >= 0 and length >= 0 and first + length <= extent,
                  f"start ({start}) + length ({length}) exceeds dimension size ({extent})")
    return section(input, axis, first, first + length)


def select(input: Tensor, dim: int, index: int) -> Tensor:
    """Slice number `index` along `dim`, which is gone from the result."""
    axis = one_dim("select", dim, len(input.shape))
    extent = input.shape[axis] if input.shape else 0
    if not -extent <= index < extent:
        raise complain(OutOfRangeError, "select", f"index {index} is out of range for dimension {dim} of {describe(input)}")
    one = narrow(input, axis, index, 1)
    return ops.reshape(one, shape=input.shape[:axis] + input.shape[axis + 1:])


def split(tensor: Tensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Pieces of that size along `dim` (the last may be smaller), or of those sizes. Views."""
    axis = one_dim("split", dim, len(tensor.shape))
    extent = tensor.shape[axis]
    if isinstance(split_size_or_sections, int):
        step = split_size_or_sections
        require_shape("split", step > 0 or extent == 0, f"the size of a piece must be positive, got {step}")
        sizes = [builtins.min(step, extent - at) for at in range(0, extent, builtins.max(step, 1))] or [0]
    else:
        sizes = list(split_size_or_sections)
        require_shape("split", builtins.sum(sizes) == extent and builtins.min(sizes, default=0) >= 0,
                      f"sizes {sizes} do not add up to {extent}, the size of dimension {dim}")
    pieces, at = [], 0
    for length in sizes:
        pieces.append(section(tensor, axis, at, at + length))
        at += length
    return tuple(pieces)


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """At most `chunks` pieces of equal size along `dim` (the last may be smaller). Views."""
    axis = one_dim("chunk", dim, len(input.shape))
    require_shape("chunk", chunks > 0, f"the number of chunks must be positive, got {chunks}")
    extent = input.shape[axis]
    if extent == 0:
        return split(input, [0] * chunks, axis)
    return split(input, -(-extent // chunks), axis)


def tensor_split(input: Tensor, indices_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Pieces along `dim`: that many, as equal as possible, or cut before those indices. Views."""
    axis = one_dim("tensor_split", dim, len(input.shape))
    extent = input.shape[axis]
    if isinstance(indices_or_sections, int):
        small, larger = divmod(extent, indices_or_sections)
        return split(input, [small + (k < larger) for k in range(indices_or_sections)], axis)
    cuts = [builtins.min(c + extent if c < 0 else c, extent) for c in indices_or_sections]
    return tuple([section(input, axis, a, builtins.max(a, b)) for a, b in zip([0, *cuts], [*cuts, extent])])


def unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """All slices along `dim`, which is gone from them. Views."""
    axis = one_dim("unbind", dim, len(input.shape))
    require_shape("unbind", len(input.shape) > 0, "a 0-d tensor has no slices")
    shape = input.shape[:axis] + input.shape[axis + 1:]
    return tuple([ops.reshape(section(input, axis, k, k + 1), shape=shape) for k in range(input.shape[axis])])


def unfold(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """All windows of `size` along `dimension`, `step` apart, as a new last dimension (copied)."""
    axis = one_dim("unfold", dimension, len(input.shape))
    extent = input.shape[axis]
    require_shape("unfold", 0 < size <= extent and step > 0, f"windows of {size} by {step} do not fit into {extent}")
    count = (extent - size) // step + 1
    columns = [section(input, axis, k, k + (count - 1) * step + 1, step) for k in range(size)]
    return stack(columns, len(input.shape))


# joining

@casts(cpu="widest")
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors joined along an existing dimension; dtypes are promoted. Empty 1-d tensors are skipped, as in PyTorch."""
    require_shape("cat", len(tensors) > 0, "expected a non-empty list of tensors")
    parts = [x for x in tensors if x.shape != (0,)] or list(tensors[:1])
    require_shape("cat", builtins.all(x.shape for x in parts), "0-d tensors cannot be joined",
                  fix="Did you mean stack?")
    axis = one_dim("cat", dim, len(parts[0].shape))
    if not _join(parts, axis):
        raise complain(ShapeError, "cat", f"sizes must match except in dimension {axis}, got {describe_all(*parts)}")
    dtype = result_type(*tensors)
    return ops.concat(*[cast(x, dtype) for x in parts], axis=axis)


concat = concatenate = cat


def _join(parts: Sequence[Tensor], axis: int) -> bool:
    first = parts[0].shape
    return builtins.all(x.shape[:axis] == first[:axis] and x.shape[axis + 1:] == first[axis + 1:]
                        and len(x.shape) == len(first) for x in parts)


@casts(cpu="widest")
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape joined along a new dimension."""
    require_shape("stack", len(tensors) > 0, "expected a non-empty list of tensors")
    shape = tensors[0].shape
    if builtins.any(x.shape != shape for x in tensors):
        raise complain(ShapeError, "stack", f"all tensors must have one shape, got {describe_all(*tensors)}")
    axis = one_dim("stack", dim, len(shape) + 1)
    dtype = result_type(*tensors)
    return ops.concat(*[expand_dims(cast(x, dtype), (axis,)) for x in tensors], axis=axis)


def vstack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined as rows."""
    return cat([atleast_2d(x) for x in tensors], 0)


def hstack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined as columns (1-d tensors end to end)."""
    parts = [atleast_1d(x) for x in tensors]
    return cat(parts, 0 if len(parts[0].shape) == 1 else 1)


# reordering and masking

def flip(input: Tensor, *dims: Any) -> Tensor:
    """The order along `dims` reversed (copied)."""
    axes = tuple(sorted(one_dim("flip", d, len(input.shape)) for d in sizes_of(dims)))
    require_shape("flip", len(set(axes)) == len(axes), f"a dimension appears twice in dims={dims}")
    return clone(ops.flip(input, axes=axes)) if axes and input.shape else clone(input)


def fliplr(input: Tensor) -> Tensor:
    """The order of columns reversed."""
    return flip(input, 1)


def flipud(input: Tensor) -> Tensor:
    """The order of rows reversed."""
    return flip(input, 0)


def clone(input: Tensor) -> Tensor:
    """A copy; gradients flow through it."""
    return ops.cast(input, dtype=input.dtype)


def roll(input: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int] | None = None) -> Tensor:
    """Elements moved along `dims` by `shifts`, those pushed out coming back at the front (copied). Without `dims` the
    flattened tensor is rolled."""
    if dims is None:
        return reshape(roll(ravel(input), shifts, 0), input.shape)
    amounts = [shifts] if isinstance(shifts, int) else list(shifts)
    axes = [dims] if isinstance(dims, int) else list(dims)
    require_shape("roll", len(amounts) == len(axes), f"shifts={shifts} and dims={dims} differ in length")
    for amount, dim in zip(amounts, axes):
        axis = one_dim("roll", dim, len(input.shape))
        extent = input.shape[axis] if input.shape else 0
        cut = -amount % extent if extent else 0
        if cut:
            input = ops.concat(section(input, axis, cut, extent), section(input, axis, 0, cut), axis=axis)
    return input


def rot90(input: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    """The plane of two dimensions turned `k` times by 90 degrees."""
    first, second = dims
    if k % 4 == 2:
        return flip(input, first, second)
    if k % 2 == 0:
        return clone(input)
    return flip(transpose(input, first, second), first if k % 4 == 1 else second)


def diagonal_distance(rows: int, columns: int) -> Tensor:
    """For each element of a matrix its column number minus its row number (int64)."""
    shape = (rows, columns)
    return ops.sub(ops.iota(shape=shape, axis=1, dtype=dtypes.int64), ops.iota(shape=shape, axis=0, dtype=dtypes.int64))


def tril(input: Tensor, diagonal: int = 0) -> Tensor:
    """The lower triangle of each matrix, up to that diagonal; zero elsewhere."""
    return _triangle("tril", ops.le, input, diagonal)


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    """The upper triangle of each matrix, from that diagonal on; zero elsewhere."""
    return _triangle("triu", ops.ge, input, diagonal)


def _triangle(name: str, compare: Any, x: Tensor, diagonal: int) -> Tensor:
    require_shape(name, len(x.shape) >= 2, f"expected at least 2 dimensions, got {describe(x)}")
    distance = diagonal_distance(*x.shape[-2:])
    keep = compare(distance, full(distance.shape, diagonal, dtypes.int64))
    return ops.where(broadcast(keep, x.shape), x, zeros_like(x))


def diagonal(input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """That diagonal of two dimensions, as the last dimension (copied)."""
    first, second = one_dim("diagonal", dim1, len(input.shape)), one_dim("diagonal", dim2, len(input.shape))
    rest = [d for d in range(len(input.shape)) if d not in (first, second)]
    moved = permute(input, [*rest, first, second])
    *outer, rows, columns = moved.shape
    length = builtins.max(0, builtins.min(rows + builtins.min(offset, 0), columns - builtins.max(offset, 0)))
    start = builtins.max(-offset, 0) * columns + builtins.max(offset, 0)
    flat = ops.reshape(moved, shape=(*outer, rows * columns))
    if length == 0:
        return section(flat, len(outer), 0, 0)
    return section(flat, len(outer), start, start + (length - 1) * (columns + 1) + 1, columns + 1)


_diagonal_of = diagonal


def diag(input: Tensor, diagonal: int = 0) -> Tensor:
    """Of a matrix that diagonal; of a vector the matrix with it there."""
    require_shape("diag", len(input.shape) in (1, 2), f"expected a vector or a matrix, got {describe(input)}")
    return diag_embed(input, diagonal) if len(input.shape) == 1 else _diagonal_of(input, diagonal)


def diag_embed(input: Tensor, offset: int = 0) -> Tensor:
    """Matrices with the last dimension of `input` on that diagonal, zero elsewhere."""
    length = input.shape[-1]
    n = length + builtins.abs(offset)
    low = (0,) * (len(input.shape) - 1)
    padded = ops.pad(input, low=(*low, builtins.max(offset, 0)), high=(*low, builtins.max(-offset, 0)))
    on_diagonal = ops.eq(diagonal_distance(n, n), full((n, n), offset, dtypes.int64))
    rows = expand_dims(padded, (len(input.shape) - 1,))
    shape = (*input.shape[:-1], n, n)
    return ops.where(broadcast(on_diagonal, shape), broadcast(rows, shape), full(shape, 0, input.dtype))
