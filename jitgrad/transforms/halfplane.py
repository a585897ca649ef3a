"""Which side of a diagonal: what a value made of constants and counting alone is, without computing it.

In: a value of a graph, say ``ones(n, n).tril() == 0``. Out: `Affine`, a linear function of its indices, or `Split`, one
of two numbers by the sign of such a function; None for everything else. Indices are integers, so all of it is exact, and
the time that it takes does not depend on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad.dtypes import int32, int64
from jitgrad.ir.graph import Node, Value

Coefficients = tuple[tuple[int, int], ...]              # (dimension, factor), in order, no factor is 0
WIDE = (int64, int32)                                   # dtypes in which indices are counted
LARGEST = 1 << 28                                       # and below which sums of a few of them do not overflow


@dataclass(frozen=True, slots=True)
class Affine:
    """``constant`` + the sum of factor * index over some dimensions; with none of them the number itself, of any kind."""

    factors: Coefficients
    constant: Any


@dataclass(frozen=True, slots=True)
class Split:
    """`high` where `plane` >= 0, else `low`."""

    plane: Affine
    low: Any
    high: Any


Found = Affine | Split | None


def classify(value: Value, producers: Mapping[Value, Node]) -> Found:
    """See the module."""
    found: dict[Value, Found] = {}
    stack = [value]
    while stack:
        v = stack[-1]
        node = producers.get(v)
        if v in found or node is None or len(node.outputs) > 1:
            found.setdefault(v, None)
            stack.pop()
            continue
        missing = [x for x in node.inputs if x not in found]
        if any(found.get(x, v) is None for x in node.inputs):           # one that is nothing of this kind
            found[stack.pop()] = None
        elif missing:
            stack += missing
        else:
            found[stack.pop()] = _result(node, [found[x] for x in node.inputs])
    return found[value]


def _result(node: Node, xs: list[Any]) -> Found:
    if node.op.name == "iota":
        shape, axis = node.attrs["shape"], node.attrs["axis"]
        fits = node.output.dtype in WIDE and shape[axis] < LARGEST
        return Affine(_kept({axis: 1}, shape), 0) if fits else None
    if node.op.name == "constant":
        return Affine((), node.op.eager(**node.attrs)[()])
    if node.op.name in _MOVES:
        return _moved(node, xs[0])
    if node.op.kind != "elementwise" or node.op.effects:
        return None
    counts = all(type(x) is Affine and v.dtype in WIDE and abs(int(x.constant)) < LARGEST
                 for x, v in zip(xs, node.inputs, strict=True))
    if node.op.name in _LINEAR and counts:
        return _LINEAR[node.op.name](*xs)
    if node.op.name == "cast" and counts and node.output.dtype in WIDE:
        return xs[0]  # type: ignore[no-any-return]
    return _by_side(node, xs)


def _by_side(node: Node, xs: list[Any]) -> Found:
    """An op on numbers and on values that part along the same line: once for each side."""
    planes = {x.plane for x in xs if type(x) is Split}
    if len(planes) > 1 or any(type(x) is Affine and x.factors for x in xs):
        return None

    def on(side: str) -> Any:
        given = [getattr(x, side) if type(x) is Split else x.constant for x in xs]
        arrays = [np.asarray(x, v.dtype.numpy) for x, v in zip(given, node.inputs, strict=True)]
        with np.errstate(all="ignore"):
            return node.op.eager(*arrays, **node.attrs)[()]

    return Split(planes.pop(), on("low"), on("high")) if planes else Affine((), on("constant"))


# ---- indices -------------------------------------------------------------------------------------------------------


def _kept(factors: Mapping[int, int], shape: tuple[int, ...]) -> Coefficients:
    """Along a dimension of size 1 the index is 0."""
    return tuple(sorted((axis, factor) for axis, factor in factors.items() if factor and shape[axis] > 1))


def _combined(x: Affine, y: Affine, sign: int) -> Affine:
    factors = dict(x.factors)
    for axis, factor in y.factors:
        factors[axis] = factors.get(axis, 0) + sign * factor
    return Affine(tuple(sorted((a, f) for a, f in factors.items() if f)), int(x.constant) + sign * int(y.constant))


def _at_least(x: Affine, y: Affine, more: int) -> Split:
    """x >= y + more."""
    difference = _combined(x, y, -1)
    return Split(Affine(difference.factors, difference.constant - more), np.False_, np.True_)


_LINEAR: dict[str, Callable[..., Found]] = {
    "add": lambda x, y: _combined(x, y, 1), "sub": lambda x, y: _combined(x, y, -1),
    "ge": lambda x, y: _at_least(x, y, 0), "gt": lambda x, y: _at_least(x, y, 1),
    "le": lambda x, y: _at_least(y, x, 0), "lt": lambda x, y: _at_least(y, x, 1)}


# ---- movement ------------------------------------------------------------------------------------------------------


def _moved(node: Node, x: Any) -> Found:
    plane = x.plane if type(x) is Split else x
    mapped = _MOVES[node.op.name](node, plane)
    if mapped is None:
        return None
    kept = Affine(_kept(dict(mapped.factors), node.output.shape), mapped.constant)
    return Split(kept, x.low, x.high) if type(x) is Split else kept


def _reshaped(node: Node, x: Affine) -> Affine | None:
    """Dimensions of size 1 come and go; others stay what they are."""
    before, after = [[k for k, size in enumerate(v.shape) if size != 1] for v in (node.inputs[0], node.output)]
    if [node.inputs[0].shape[k] for k in before] != [node.output.shape[k] for k in after]:
        return Affine((), x.constant) if not x.factors else None
    place = dict(zip(before, after, strict=True))
    return Affine(tuple([(place[axis], factor) for axis, factor in x.factors]), x.constant)


def _permuted(node: Node, x: Affine) -> Affine:
    axes = node.attrs["axes"]
    return Affine(tuple([(axes.index(axis), factor) for axis, factor in x.factors]), x.constant)


def _sliced(node: Node, x: Affine) -> Affine:
    start, step = node.attrs["start"], node.attrs["step"]
    if not x.factors:
        return x
    moved = x.constant + sum(factor * start[axis] for axis, factor in x.factors)
    return Affine(tuple([(axis, factor * step[axis]) for axis, factor in x.factors]), moved)


_MOVES: dict[str, Callable[[Node, Affine], Affine | None]] = {
    "reshape": _reshaped, "permute": _permuted, "slice": _sliced, "broadcast_to": lambda node, x: x}
