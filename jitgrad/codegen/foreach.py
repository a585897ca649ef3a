"""The template of `foreach`: one elementwise body over the elements of any number of groups of tensors.

The kernel's fixed arguments are the shared scalars and three numbers. Behind them stands a table, so that the text (and
the time to compile it) does not depend on the number of tensors:

    first item of every group, and of the end | size of every group | pointers of operand 0 of every group | operand 1 …

Items are blocks of elements, numbered through all groups. Groups that differ in which operands are 0-d, or in which
outputs lie in the memory of an operand, get a launch of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jitgrad.codegen.emit_cpu import dtype_name, emit
from jitgrad.codegen.kernel import Buffer, Launch, Let, Loop, Lowered, Operand
from jitgrad.codegen.region import BLOCK
from jitgrad.codegen.writer import Axis, Writer
from jitgrad.ir.axes import Axes, Index
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ir.types import TensorType


@dataclass(frozen=True)
class Pattern:
    """What groups of one launch have in common. `scalar`: which operands are 0-d; `home`: for every output the
    operand that it overwrites, or None."""

    scalar: tuple[bool, ...]
    home: tuple[int | None, ...]


@dataclass(frozen=True)
class Members:
    """One group: its size, and the buffers of its operands and outputs."""

    size: int
    operands: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]


def lower_foreach(inputs: Sequence[TensorType], attrs: Mapping[str, Any],
                  shared: Sequence[tuple[int, int]]) -> Lowered:
    """The launches of a foreach node."""
    body, scalars = attrs["body"], attrs["shared"]
    return Lowered(tuple([_launch(body, scalars, pattern, groups)
                          for pattern, groups in by_pattern(inputs, attrs, shared).items()]))


def by_pattern(inputs: Sequence[TensorType], attrs: Mapping[str, Any],
               shared: Sequence[tuple[int, int]]) -> dict[Pattern, list[Members]]:
    """The groups of a foreach node that have elements, those of one launch together."""
    body, scalars = attrs["body"], attrs["shared"]
    patterns: dict[Pattern, list[Members]] = {}
    homes = dict(shared)
    for group in range(attrs["groups"]):
        pattern, members = _members(inputs, body, scalars, attrs["groups"], group, homes)
        if members.size:
            patterns.setdefault(pattern, []).append(members)
    return patterns


def _members(inputs: Sequence[TensorType], body: Graph, scalars: int, groups: int, group: int,
             homes: Mapping[int, int]) -> tuple[Pattern, Members]:
    positions = range(scalars + group, len(inputs), groups)
    size = inputs[positions[0]].size
    written = [k * groups + group for k in range(len(body.outputs))]
    home = [positions.index(homes[k]) if homes.get(k) in positions else None for k in written]
    members = Members(size, tuple(map(Buffer, positions)),
                      tuple([Buffer(homes.get(k, len(inputs) + k)) for k in written]))
    return Pattern(tuple([inputs[p].size < size for p in positions]), tuple(home)), members


def _launch(body: Graph, scalars: int, pattern: Pattern, groups: list[Members]) -> Launch:
    writer = write(body, scalars, pattern, _open_loops)
    name = kernel_name(body)
    kernel, fixed = writer.kernel(name)
    arguments, items = _table(groups, pattern)
    numbers = {"groups": len(groups), "block": BLOCK, "steps": len(groups).bit_length()}
    fixed = tuple([numbers[a] if isinstance(a, str) else a for a in _named(fixed, writer)])
    return Launch(name, emit(kernel), items, (*fixed, *arguments))


def kernel_name(body: Graph) -> str:
    names = list(dict.fromkeys([node.op.name for node in body.nodes if node.op.kind == "elementwise"]))
    return f"foreach_{'_'.join(names[:3]) or 'copy'}_{body.outputs[0].dtype.short}"


def _named(arguments: Sequence[Buffer | int], writer: Writer) -> list[Buffer | str]:
    return [*[a for a in arguments if isinstance(a, Buffer)], *writer.sizes]


def _table(groups: list[Members], pattern: Pattern) -> tuple[list[Buffer | int], int]:
    """The table, and the number of items."""
    first = [0]
    for members in groups:
        first.append(first[-1] + -(-members.size // BLOCK))
    return [*first, *[members.size for members in groups], *pointers(groups, pattern)], first[-1]


def pointers(groups: list[Members], pattern: Pattern) -> list[Buffer]:
    """The memory of every group's operand 0, operand 1 …, then of the outputs that overwrite no operand."""
    found = [members.operands[k] for k in range(len(pattern.scalar)) for members in groups]
    return found + [members.outputs[k] for k, home in enumerate(pattern.home) if home is None for members in groups]


def _spread(body: Graph, scalars: int, pattern: Pattern) -> Graph:
    """`body` with a dimension for the elements, on every value that differs from element to element."""
    scalar = (True,) * scalars + pattern.scalar
    mapped = {v: Value(v.id, v.type.with_shape(() if is_scalar else (2,)))
              for v, is_scalar in zip(body.inputs, scalar, strict=True)}
    nodes = []
    for node in body.nodes:
        inputs = tuple([mapped[v] for v in node.inputs])
        shape = (2,) if any(v.shape for v in inputs) else ()
        mapped[node.output] = Value(node.output.id, node.output.type.with_shape(shape))
        nodes.append(Node(node.op, inputs, node.attrs, (mapped[node.output],), node.where))
    return Graph(tuple([mapped[v] for v in body.inputs]), tuple(nodes), tuple([mapped[v] for v in body.outputs]))


def write(body: Graph, scalars: int, pattern: Pattern, open_loops: Callable[[Writer, Index], None]) -> Writer:
    """A writer in which the loops of `open_loops` are open and the outputs stored. It has an operand for each shared
    scalar; the others are in its tables, in the order of `pointers`."""
    body, axes = _spread(body, scalars, pattern), Axes()
    buffers = {v: Buffer(k) for k, v in enumerate(body.inputs)}
    writer = Writer(axes, body.producers(), buffers)
    for v in body.inputs[:scalars]:
        writer.operand(buffers[v], v.dtype, str(v.type))
    homes = [buffers[body.inputs[scalars + home]] if home is not None else Buffer(len(body.inputs) + k)
             for k, home in enumerate(pattern.home)]
    for v in body.inputs[scalars:]:
        writer.tables[buffers[v]] = Operand(f"q{len(writer.tables)}", v.dtype)
    for v, buffer in zip(body.outputs, homes, strict=True):
        writer.tables.setdefault(buffer, Operand(f"q{len(writer.tables)}", v.dtype))
    index: Index = ((axes.fresh(2),),)
    open_loops(writer, index)
    for v, buffer in zip(body.outputs, homes, strict=True):
        writer.store_at(buffer, v.type, "j", writer.evaluate(v, index if v.shape else ()))
    writer.flush()
    return writer


def _open_loops(writer: Writer, index: Index) -> None:
    """Find the group of the first item; then walk items, and inside of an item its elements."""
    for name in ("groups", "block", "steps"):
        writer.size(name, 0)
    table = 1 + len(writer.operands) + len(writer.sizes)
    search = Loop("step", "0", "steps", [
        Let("middle", None, "(group + last) // 2"),
        Let("below", None, f"args[{table} + middle] <= begin"),
        Let("group", None, "middle if below else group"),
        Let("last", None, "last if below else middle")])
    for statement in (Let("group", None, "0"), Let("last", None, "groups"), search):
        writer.emit(statement)
    writer.open("item", "begin", "end")
    writer.let("group", f"group + 1 if args[{table} + group + 1] <= item else group")
    writer.let("size", f"args[{table} + groups + 1 + group]")
    for k, operand in enumerate(writer.tables.values()):
        place = f"{table} + (2 + {k}) * groups + 1 + group"
        writer.let(operand.name, f"pointer(args, {place}, {dtype_name(operand.dtype)})")
    writer.let("start", f"(item - args[{table} + group]) * block")
    writer.table_level = len(writer.levels) - 1
    writer.open("j", "start", "min(size, start + block)")
    (atoms,) = index
    assert isinstance(atoms, tuple)
    writer.know(Axis(atoms, "j", "size"))
