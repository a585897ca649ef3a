"""The template of `foreach` on a GPU: one elementwise body over the elements of any number of groups of tensors, one launch.

What differs from group to group is in a table in device memory, so that neither the text nor the number of arguments depends
on the number of tensors:

    group of every item | first item of every group | its size | pointers of operand 0 of every group | operand 1 …

Items are blocks of elements, numbered through all groups; a block of threads does one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jitgrad.codegen.cuda_templates import ACCESS, THREADS, WIDE, close_elements, pack
from jitgrad.codegen.emit_cpu import dtype_name
from jitgrad.codegen.foreach import Members, Pattern, by_pattern, kernel_name, pointers, write
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered, Load, Table, When
from jitgrad.codegen.region import BLOCK
from jitgrad.codegen.writer import Axis, Writer
from jitgrad.dtypes import int64
from jitgrad.ir.axes import Index
from jitgrad.ir.graph import Graph
from jitgrad.ir.types import TensorType

TABLE = Buffer(-1)


def lower_foreach(inputs: Sequence[TensorType], attrs: Mapping[str, Any], shared: Sequence[tuple[int, int]],
                  aligned: bool) -> CudaLowered:
    """The launches of a foreach node."""
    return CudaLowered(tuple([_launch(attrs["body"], attrs["shared"], pattern, groups, aligned)
                              for pattern, groups in by_pattern(inputs, attrs, shared).items()]))


def _launch(body: Graph, scalars: int, pattern: Pattern, groups: list[Members], aligned: bool) -> CudaLaunch:
    along = [v.dtype.itemsize for v, is_scalar in zip(body.inputs[scalars:], pattern.scalar, strict=True) if not is_scalar]
    width = ACCESS // max([*along, *[v.dtype.itemsize for v in body.outputs]]) if aligned else 1

    def open_loops(writer: Writer, index: Index) -> None:
        _open_loops(writer, index, width)

    writer = write(body, scalars, pattern, open_loops)
    close_elements(writer, width, "size")
    table, items = _table(groups, pattern)
    writer.sizes.update(items=items, groups=len(groups))
    kernel, arguments = writer.kernel(kernel_name(body))
    given = tuple([table if argument == TABLE else argument for argument in arguments])
    return pack(kernel, given, items, THREADS, aligned, max(members.size for members in groups) >= WIDE)


def _table(groups: list[Members], pattern: Pattern) -> tuple[Table, int]:
    """The table, and the number of items."""
    owner: list[int] = []
    first: list[int] = []
    for k, members in enumerate(groups):
        first.append(len(owner))
        owner += [k] * -(-members.size // BLOCK)
    return Table((*owner, *first, *[members.size for members in groups], *pointers(groups, pattern))), len(owner)


def _open_loops(writer: Writer, index: Index, width: int) -> None:
    """Look up the group of this block; then a loop over the elements of a thread."""
    table = writer.operand(TABLE, int64, "")
    items, groups = writer.size("items", 0), writer.size("groups", 0)
    writer.emit(Load("group", table, "block()"))
    writer.emit(Load("begin", table, f"{items} + group"))
    writer.emit(Load("size", table, f"{items} + {groups} + group"))
    for k, operand in enumerate(writer.tables.values()):
        writer.emit(Load(f"a{k}", table, f"{items} + {groups} * {k + 2} + group"))
        writer.let(operand.name, f"pointer_at(a{k}, {dtype_name(operand.dtype)})")
    writer.let("start", f"(block() - begin) * {BLOCK}")
    writer.open("m", "0", str(BLOCK // (THREADS * width)))
    writer.let("first", f"start + (m * {THREADS} + thread()) * {width}")
    writer.enter(When("first < size"))
    writer.open("j", "first", f"min(size, first + {width})")
    (atoms,) = index
    assert isinstance(atoms, tuple)
    writer.know(Axis(atoms, "j", "size"))
