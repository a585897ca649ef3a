"""Which loops a value is computed in: every dimension of every value as a list of *atoms*.

An atom is a loop of a kernel. Elementwise ops leave atoms as they are, permute reorders them, broadcast_to drops them
on the way to its operand, a reduction adds new ones, reshape regroups them and splits one where needed. Dimensions of
size 1 have no atoms. Analysis goes from results to operands: a value is *demanded at an index*, and its node says at
which index it demands its operands. Both fusion and code generation rest on this.

`Axes` keeps sizes, and what was found to be the same loop (unified) or two nested ones (split); `mark` and `undo`
take back a trial that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jitgrad.ir.graph import Node, Value


@dataclass(frozen=True, slots=True)
class Strided:
    """A dimension that is read at ``start + step * position``, by a slice or a flip."""

    atoms: tuple[int, ...]
    start: int
    step: int


Dim = tuple[int, ...] | Strided
Index = tuple[Dim, ...]


class Axes:
    """Atoms by number. An atom is a root (a loop) or forwarded to the atoms that took its place."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.forward: list[tuple[int, ...] | None] = []
        self.trail: list[int] = []

    def fresh(self, size: int) -> int:
        self.sizes.append(size)
        self.forward.append(None)
        return len(self.sizes) - 1

    def fresh_index(self, shape: tuple[int, ...]) -> Index:
        """An index over new atoms, one for each dimension that is not of size 1."""
        return tuple([() if n == 1 else (self.fresh(n),) for n in shape])

    def mark(self) -> int:
        return len(self.trail)

    def undo(self, mark: int) -> None:
        """Forget every unification and split since `mark`."""
        while len(self.trail) > mark:
            self.forward[self.trail.pop()] = None

    def _forward(self, atom: int, to: tuple[int, ...]) -> None:
        self.forward[atom] = to
        self.trail.append(atom)

    def resolve(self, atoms: tuple[int, ...]) -> tuple[int, ...]:
        """The roots that `atoms` stand for, outermost first."""
        for a in atoms:
            if self.forward[a] is not None:
                break
        else:
            return atoms
        found: list[int] = []
        for a in atoms:
            to = self.forward[a]
            if to is None:
                found.append(a)
            else:
                found.extend(self.resolve(to))
        return tuple(found)

    def flat(self, index: Index) -> tuple[int, ...]:
        """All roots of an index, in the order of its dimensions."""
        return self.resolve(atoms_of_all(index))

    def same(self, a: Index, b: Index) -> bool:
        """True when both indices are the same place, without unifying anything."""
        return a == b or all([_rest(x) == _rest(y) and self.resolve(atoms_of(x)) == self.resolve(atoms_of(y))
                              for x, y in zip(a, b, strict=True)])

    def unify(self, a: Index, b: Index) -> bool:
        """Make two indices of one shape the same; False when that cannot be (the caller undoes)."""
        return all(_rest(x) == _rest(y) and self.unify_atoms(atoms_of(x), atoms_of(y))
                   for x, y in zip(a, b, strict=True))

    def unify_atoms(self, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        """Make two lists of atoms the same loops, splitting where one is coarser; False when sizes do not factor."""
        left, right = list(reversed(self.resolve(a))), list(reversed(self.resolve(b)))
        while left and right:
            x, y = left.pop(), right.pop()
            if x == y:
                continue
            m, n = self.sizes[x], self.sizes[y]
            if m == n:
                self._forward(y, (x,))
                left, right = self._again(left), self._again(right)
            elif m > n and n and m % n == 0:
                left.extend(reversed(self.split(x, n)))
                left, right = self._again(left), [*self._again(right), y]
            elif n > m and m and n % m == 0:
                right.extend(reversed(self.split(y, m)))
                left, right = [*self._again(left), x], self._again(right)
            else:
                return False
        return not left and not right

    def _again(self, atoms: list[int]) -> list[int]:
        return list(reversed(self.resolve(tuple(reversed(atoms)))))

    def split(self, atom: int, outer: int) -> tuple[int, int]:
        """Replace a loop by two nested ones; the outer one has size `outer`, which divides."""
        parts = self.fresh(outer), self.fresh(self.sizes[atom] // outer)
        self._forward(atom, parts)
        return parts

    def regroup(self, atoms: tuple[int, ...], shape: tuple[int, ...]) -> Index | None:
        """The same loops, grouped to the dimensions of `shape`; None when the sizes do not factor."""
        if 0 in shape:
            return None
        rest = list(reversed(self.resolve(atoms)))
        dims: list[Dim] = []
        for size in shape:
            group = []
            while size > 1:
                atom = rest.pop()
                n = self.sizes[atom]
                if n <= size and size % n == 0:
                    group.append(atom)
                    size //= n
                elif n > size and n % size == 0:
                    outer, inner = self.split(atom, size)
                    rest.append(inner)
                    group.append(outer)
                    size = 1
                else:
                    return None
            dims.append(tuple(group))
        return tuple(dims)

    def size(self, atoms: tuple[int, ...]) -> int:
        return math.prod([self.sizes[a] for a in self.resolve(atoms)])


def atoms_of(dim: Dim) -> tuple[int, ...]:
    return dim.atoms if isinstance(dim, Strided) else dim


def atoms_of_all(index: Index) -> tuple[int, ...]:
    """The atoms of all dimensions, in order."""
    return tuple([a for dim in index for a in (dim.atoms if isinstance(dim, Strided) else dim)])


def _rest(dim: Dim) -> tuple[int, int] | None:
    return (dim.start, dim.step) if isinstance(dim, Strided) else None


def is_plain(index: Index) -> bool:
    """True when no dimension is sliced or flipped."""
    return Strided not in map(type, index)


def source_index(axes: Axes, node: Node, index: Index) -> Index | None:
    """Where the movement op `node` reads its operand when its result is demanded at `index`; None when that is no
    affine place (the operand's result must then be stored)."""
    rule = _SOURCES.get(node.op.name)
    return rule(axes, node.inputs[0].shape, index, **node.attrs) if rule else None


def _reshape(axes: Axes, source: tuple[int, ...], index: Index, *, shape: Any) -> Index | None:
    return axes.regroup(atoms_of_all(index), source) if is_plain(index) else None


def _permute(axes: Axes, source: tuple[int, ...], index: Index, *, axes_: tuple[int, ...]) -> Index:
    dims: list[Dim] = [()] * len(index)
    for k, a in enumerate(axes_):
        dims[a] = index[k]
    return tuple(dims)


def _broadcast(axes: Axes, source: tuple[int, ...], index: Index, *, shape: Any) -> Index:
    return tuple([() if n == 1 else dim for n, dim in zip(source, index, strict=True)])


def _cut(dim: Dim, start: int, step: int) -> Dim:
    """Position p of a result is position ``start + step * p`` of the operand."""
    if (start, step) == (0, 1):
        return dim
    if isinstance(dim, Strided):
        return Strided(dim.atoms, start + step * dim.start, step * dim.step)
    return Strided(dim, start, step)


def _slice(axes: Axes, source: tuple[int, ...], index: Index, *, start: Any, stop: Any, step: Any) -> Index:
    # A dimension that is only shortened is strided too: its size is not the product of its loops.
    return tuple([dim if (a, b) == (0, n) and s == 1 else _cut(dim, a, s) if (a, s) != (0, 1) else _shorten(dim)
                  for n, dim, a, b, s in zip(source, index, start, stop, step, strict=True)])


def _shorten(dim: Dim) -> Strided:
    return dim if isinstance(dim, Strided) else Strided(dim, 0, 1)


def _flip(axes: Axes, source: tuple[int, ...], index: Index, *, axes_: tuple[int, ...]) -> Index:
    return tuple([_cut(dim, n - 1, -1) if k in axes_ and n > 1 else dim
                  for k, (n, dim) in enumerate(zip(source, index, strict=True))])


_SOURCES: dict[str, Any] = {
    "reshape": _reshape,
    "permute": lambda a, source, index, *, axes: _permute(a, source, index, axes_=axes),
    "broadcast_to": _broadcast,
    "slice": _slice,
    "flip": lambda a, source, index, *, axes: _flip(a, source, index, axes_=axes),
}


def reduced_axes(node: Node) -> tuple[int, ...]:
    """The dimensions that a reduction removes."""
    return node.attrs["axes"] if "axes" in node.attrs else (node.attrs["axis"],)


def reduction_index(axes: Axes, node: Node, index: Index) -> tuple[Index, tuple[int, ...]]:
    """Where a reduction demanded at `index` reads its operand, and the new atoms that it reduces."""
    removed, kept, dims, new = reduced_axes(node), iter(index), list[Dim](), list[int]()
    for k, n in enumerate(node.inputs[0].shape):
        if k not in removed:
            dims.append(next(kept))
        elif n == 1:
            dims.append(())
        else:
            new.append(axes.fresh(n))
            dims.append((new[-1],))
    return tuple(dims), tuple(new)


class Demands:
    """At which indices each value is demanded, in one region. Two demands of a value are made the same loops where
    that is possible; ``a + a.T`` is where it is not, since no value may run along one loop in two dimensions."""

    def __init__(self, axes: Axes):
        self.axes = axes
        self.of: dict[Value, list[Index]] = {}
        self.places: dict[tuple[int, ...], None] = {}
        self.reads: dict[Node, Index] = {}          # where a reduction reads its operand

    def add(self, value: Value, index: Index) -> bool:
        """Record that `value` is read at `index`; True when it was not read there yet."""
        known = self.of.setdefault(value, [])
        for other in known:
            if self.axes.same(other, index) or self.try_unify(partial(self.axes.unify, other, index), index):
                return False
        known.append(index)
        self._occupy(index)
        return True

    def _occupy(self, index: Index) -> None:
        self.places.setdefault(atoms_of_all(index))

    def try_unify(self, attempt: Callable[[], bool], *more: Index) -> bool:
        """Carry out `attempt`; take it back and say False when it fails or makes two dimensions one loop."""
        mark = self.axes.mark()
        if attempt() and self.is_consistent(*more):
            for index in more:
                self._occupy(index)
            return True
        self.axes.undo(mark)
        return False

    def is_consistent(self, *more: Index) -> bool:
        flats = [self.axes.resolve(place) for place in self.places] + [self.axes.flat(index) for index in more]
        return all([len(set(flat)) == len(flat) for flat in flats])

    def only(self, value: Value) -> Index | None:
        """The index that `value` is demanded at, when there is just one."""
        known = self.of.get(value, [])
        return known[0] if len(known) == 1 else None

    def space(self) -> frozenset[int]:
        """All loops."""
        return frozenset([a for place in self.places for a in self.axes.resolve(place)])

    def full_order(self) -> tuple[int, ...]:
        """The loops in the order of a value that runs along all of them, or of the one that runs along most."""
        return max([self.axes.resolve(place) for place in self.places], key=len, default=())

    def take_node(self, node: Node, index: Index) -> tuple[int, ...]:
        """Demand what `node` reads when its result is wanted at `index`; new loops that it reduces over."""
        if node.op.kind == "movement":
            source = source_index(self.axes, node, index)
            assert source is not None, f"{node.op.name} has no affine source index"
            self.add(node.inputs[0], source)
        elif node.op.kind == "reduction":
            source, new = reduction_index(self.axes, node, index)
            self.reads[node] = source
            self.add(node.inputs[0], source)
            return new
        else:
            for v in node.inputs:
                self.add(v, index if v.shape else ())
        return ()
