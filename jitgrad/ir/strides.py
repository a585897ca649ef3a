"""How a value is read where its source lies, through movement ops: what goes in is a chain of them, what comes out are
distances in the source's memory, counted in elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jitgrad.ir.axes import Axes, Strided, atoms_of, source_index
from jitgrad.ir.graph import Node, Value
from jitgrad.ir.types import TensorType

Loops = tuple[tuple[int, int], ...]             # nested loops, outermost first: how many times, and how far apart


def follow(producers: Mapping[Value, Node], value: Value) -> tuple[list[Node], Value]:
    """The movement ops that end at `value`, the last one first, and where they begin."""
    chain: list[Node] = []
    while value in producers and producers[value].op.kind == "movement":
        chain.append(producers[value])
        value = chain[-1].inputs[0]
    return chain, value


def loops_through(chain: Sequence[Node], source: TensorType, result: TensorType) -> tuple[int, tuple[Loops, ...]] | None:
    """Where in `source`, contiguous, the first element of `result` lies, and for each dimension of it the loops that go
    through the others. The movement ops of `chain` stand last one first. None when there is no such place."""
    axes = Axes()
    index = wanted = axes.fresh_index(result.shape)
    for node in chain:
        found = source_index(axes, node, index)
        if found is None:
            return None
        index = found
    steps, first, stride = dict[int, int](), 0, 1
    for size, dim in zip(reversed(source.shape), reversed(index), strict=True):
        start, step = (dim.start, dim.step) if isinstance(dim, Strided) else (0, 1)
        first += start * stride
        inner = stride * step
        for atom in reversed(axes.resolve(atoms_of(dim))):
            steps[atom] = inner
            inner *= axes.sizes[atom]
        stride *= size
    atoms = [axes.resolve(atoms_of(dim)) for dim in wanted]
    return first, tuple([_merged([(axes.sizes[a], steps.get(a, 0)) for a in group]) for group in atoms])


def steps_through(chain: Sequence[Node], source: TensorType, result: TensorType) -> tuple[int, tuple[int, ...]] | None:
    """`loops_through` with one loop for each dimension: where the first element lies, and how far apart the others. None
    when some dimension has no one step."""
    found = loops_through(chain, source, result)
    if found is None or any(len(loops) > 1 for loops in found[1]):
        return None
    return found[0], tuple([loops[0][1] if loops else 0 for loops in found[1]])


def _merged(loops: Sequence[tuple[int, int]]) -> Loops:
    """The same with fewer loops: neighbours that are evenly spaced become one. A loop that the source lacks has stride 0."""
    merged: list[tuple[int, int]] = []
    for size, step in loops:
        if merged and merged[-1][1] == size * step:
            merged[-1] = merged[-1][0] * size, step
        else:
            merged.append((size, step))
    return tuple(merged)


@dataclass(frozen=True, slots=True)
class Heads:
    """Matrices [N, rows, width] whose rows are contiguous. Matrix n begins at
    ``first + n // inner * outer + n % inner * within``, and its rows are `row` apart."""

    first: int
    inner: int
    outer: int
    within: int
    row: int

    @property
    def integers(self) -> tuple[int, ...]:
        return self.first, self.inner, self.outer, self.within, self.row


def heads_in(shape: tuple[int, ...]) -> Heads:
    """Those of a contiguous array."""
    return Heads(0, 1, shape[1] * shape[2], 0, shape[2])


def heads_through(chain: Sequence[Node], source: TensorType, result: TensorType) -> Heads | None:
    """`result`, of three dimensions, as matrices in `source`; None where it is none."""
    found = loops_through(chain, source, result)
    if found is None:
        return None
    first, (outer, rows, columns) = found
    if len(outer) > 2 or len(rows) > 1 or len(columns) > 1 or any(step != 1 for _, step in columns):
        return None
    row = rows[0][1] if rows else result.shape[2]
    if len(outer) < 2:
        return Heads(first, 1, outer[0][1] if outer else 0, 0, row)
    return Heads(first, outer[1][0], outer[0][1], outer[1][1], row)


@dataclass(frozen=True, slots=True)
class Read:
    """Matrices that are read out of `source`, and what multiplies all of their elements, of one element, if anything."""

    source: Value
    heads: Heads
    factor: Value | None


def read_heads(producers: Mapping[Value, Node], value: Value) -> Read | None:
    """How `value`, [N, rows, width], is read where its source lies; None where that cannot be."""
    chain, source = follow(producers, value)
    factor = None
    if source in producers and producers[source].op.name == "mul":
        for one, other in (producers[source].inputs, producers[source].inputs[::-1]):
            _, number = follow(producers, other)
            if number.type.size == 1 and number not in producers:
                before, source = follow(producers, one)
                chain, factor = [*chain, *before], number
                break
    heads = None if source in producers else heads_through(chain, source.type, value.type)
    return None if heads is None else Read(source, heads, factor)
