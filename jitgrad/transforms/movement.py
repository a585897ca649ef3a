"""Rewrite rules for ops that only move elements: what moves nothing goes, what moves twice moves once."""

from __future__ import annotations

from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Node, Value
from jitgrad.transforms.rewrite import Result, constant_value, full_like, made_by, operand_of, rewriter, rule

Ints = tuple[int, ...]

# ---- uniform values ---------------------------------------------------------------------------------------------


def _moved_constant(x: Value, shape: Ints) -> Result:
    """A uniform value at another shape, in normal form; None when `x` is a part of that form."""
    constant = constant_value(x)
    if constant is None or made_by(x, "constant") or (made_by(x, "reshape") and x.type.size == 1):
        return None
    return rewriter().full(x.type.with_shape(shape), constant)


@rule("reshape", "broadcast_to")
def reshape_constant(x: Value, shape: Ints) -> Result:
    "A constant at another shape is that constant."
    return _moved_constant(x, shape)


@rule("permute")
def permute_constant(x: Value, axes: Ints) -> Result:
    "permute(constant) -> the constant at that shape"
    return _moved_constant(x, tuple([x.shape[a] for a in axes]))


@rule("slice")
def slice_constant(x: Value, start: Ints, stop: Ints, step: Ints) -> Result:
    "slice(constant) -> the constant at that shape"
    return _moved_constant(x, tuple([-(-(b - a) // s) for a, b, s in zip(start, stop, step)]))


@rule("flip")
def flip_constant(x: Value, axes: Ints) -> Result:
    "flip(constant) -> constant"
    return x if constant_value(x) is not None else None


# ---- shapes -----------------------------------------------------------------------------------------------------


@rule("reshape", "broadcast_to")
def drop_same_shape(x: Value, shape: Ints) -> Result:
    "reshape(x, its own shape) -> x"
    return x if x.shape == shape else None


@rule("reshape")
def merge_reshapes(x: Value, shape: Ints) -> Result:
    "reshape(reshape(x)) -> reshape(x)"
    first = operand_of(x, "reshape")
    return None if first is None else ops.reshape(first, shape=shape)


@rule("broadcast_to")
def merge_broadcasts(x: Value, shape: Ints) -> Result:
    "broadcast_to(broadcast_to(x)) -> broadcast_to(x)"
    first = operand_of(x, "broadcast_to")
    return None if first is None else ops.broadcast_to(first, shape=shape)


@rule("permute")
def drop_identity_permutation(x: Value, axes: Ints) -> Result:
    "permute(x, (0, 1, …)) -> x"
    return x if axes == tuple(range(len(axes))) else None


@rule("permute")
def merge_permutations(x: Value, axes: Ints) -> Result:
    "permute(permute(x)) -> permute(x)"
    node = made_by(x, "permute")
    return ops.permute(node.inputs[0], axes=tuple([node.attrs["axes"][a] for a in axes])) if node else None


@rule("permute")
def permute_of_ones_is_reshape(x: Value, axes: Ints) -> Result:
    "permute that moves dimensions of size 1 only -> reshape"
    moving = [a for a in axes if x.shape[a] != 1]
    if moving == sorted(moving):
        return ops.reshape(x, shape=tuple([x.shape[a] for a in axes]))
    return None


# ---- parts ------------------------------------------------------------------------------------------------------


@rule("slice")
def drop_full_slice(x: Value, start: Ints, stop: Ints, step: Ints) -> Result:
    "x[:, :] -> x"
    return x if not any(start) and stop == x.shape and all(s == 1 for s in step) else None


@rule("slice")
def merge_slices(x: Value, start: Ints, stop: Ints, step: Ints) -> Result:
    "slice(slice(x)) -> slice(x)"
    node = made_by(x, "slice")
    if node is None:
        return None
    offset, stride, limit = node.attrs["start"], node.attrs["step"], node.attrs["stop"]
    return ops.slice(node.inputs[0],
                     start=tuple([o + a * s for o, s, a in zip(offset, stride, start)]),
                     stop=tuple([min(o + b * s, end) for o, s, end, b in zip(offset, stride, limit, stop)]),
                     step=tuple([s * t for s, t in zip(stride, step)]))


@rule("slice")
def slice_of_concat(x: Value, start: Ints, stop: Ints, step: Ints) -> Result:
    "slice(concat(…)) that lies in one operand -> slice of that operand"
    node = made_by(x, "concat")
    if node is None:
        return None
    axis, begin = node.attrs["axis"], 0
    for piece in node.inputs:
        end = begin + piece.shape[axis]
        if begin <= start[axis] and stop[axis] <= end and begin < end:
            return ops.slice(piece, start=_shifted(start, axis, -begin), stop=_shifted(stop, axis, -begin), step=step)
        begin = end
    return None


@rule("slice")
def slice_of_pad(x: Value, start: Ints, stop: Ints, step: Ints) -> Result:
    "slice(pad(x)) that takes no padding -> slice(x)"
    node = made_by(x, "pad")
    if node is None:
        return None
    inner, low = node.inputs[0], node.attrs["low"]
    inside = all(before <= a and b <= before + n for a, b, before, n in zip(start, stop, low, inner.shape))
    if not inside:
        return None
    return ops.slice(inner, start=tuple([a - p for a, p in zip(start, low)]),
                     stop=tuple([b - p for b, p in zip(stop, low)]), step=step)


def _shifted(bounds: Ints, axis: int, by: int) -> Ints:
    return tuple([b + by if k == axis else b for k, b in enumerate(bounds)])


@rule("flip")
def drop_flip_of_nothing(x: Value, axes: Ints) -> Result:
    "flip along dimensions of size 1 -> x"
    moving = tuple([a for a in axes if x.shape[a] != 1])
    if not moving:
        return x
    return ops.flip(x, axes=moving) if moving != axes else None


@rule("flip")
def merge_flips(x: Value, axes: Ints) -> Result:
    "flip(flip(x)) -> flip along the axes that stand in one of them"
    node = made_by(x, "flip")
    if node is None:
        return None
    return ops.flip(node.inputs[0], axes=tuple(sorted(set(axes) ^ set(node.attrs["axes"]))))


@rule("pad")
def drop_empty_padding(x: Value, low: Ints, high: Ints) -> Result:
    "pad by nothing -> x"
    return x if not any(low) and not any(high) else None


@rule("concat")
def drop_empty_pieces(xs: tuple[Value, ...], axis: int) -> Result:
    "concat without its empty operands; of one operand that operand"
    pieces = tuple([x for x in xs if x.shape[axis]])
    if len(xs) == 1 or len(pieces) == 1:
        return pieces[0] if pieces else xs[0]
    return ops.concat(*pieces, axis=axis) if 0 < len(pieces) < len(xs) else None


@rule("concat")
def concat_of_neighbours(xs: tuple[Value, ...], axis: int) -> Result:
    "concat of all the slices of x, in order -> x"
    nodes = [made_by(x, "slice") for x in xs]
    if any(n is None for n in nodes) or len({n.inputs[0] for n in nodes if n}) != 1:
        return None
    found: list[Node] = [n for n in nodes if n]
    whole = found[0].inputs[0]
    position = 0
    for node in found:
        if not _is_piece(node.attrs, whole.shape, axis, position):
            return None
        position = node.attrs["stop"][axis]
    return whole if position == whole.shape[axis] else None


def _is_piece(attrs: Any, shape: Ints, axis: int, position: int) -> bool:
    """The slice takes everything but along `axis`, where it begins at `position`."""
    start, stop, step = attrs["start"], attrs["stop"], attrs["step"]
    others = all(start[k] == 0 and stop[k] == n for k, n in enumerate(shape) if k != axis)
    return others and start[axis] == position and all(s == 1 for s in step)


@rule("slice_update")
def drop_empty_update(x: Value, update: Value) -> Result:
    "Nothing put into x -> x"
    return x if update.type.size == 0 else None


# ---- reductions over nothing ------------------------------------------------------------------------------------


@rule("prod", "max", "min")
def reduction_of_ones(x: Value, axes: Ints) -> Result:
    "A product or extreme over dimensions of size 1, or none -> reshape"
    return _without(x, axes) if all(x.shape[a] == 1 for a in axes) else None


@rule("sum")
def sum_of_ones(x: Value, axes: Ints) -> Result:
    "A sum over dimensions of size 1 -> reshape; for floats of x + 0.0, since a sum that starts at 0.0 is never -0.0"
    if not all(x.shape[a] == 1 for a in axes) or x.dtype.is_complex:
        return None
    return _without(ops.add(x, full_like(x, 0.0)) if x.dtype.is_floating_point else x, axes)


def _without(x: Value, axes: Ints) -> Any:
    shape = tuple([n for k, n in enumerate(x.shape) if k not in axes])
    return ops.reshape(x, shape=shape)
