"""How the loops of a kernel are cut into work items: by shape alone.

A space is an inner loop, cut into blocks when it is long, and outer loops that are walked as one row number. What goes
in: groups of atoms, outermost first. What comes out: loops opened in a `Writer`, and the number of items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jitgrad.codegen.region import BLOCK, Place
from jitgrad.codegen.writer import Axis, Writer


@dataclass(frozen=True)
class Space:
    """`rows` rows of `length` elements; an item is `rows_per_item` rows, or one of `parts` parts of one row."""

    outer: tuple[Axis, ...]
    inner: Axis | None
    rows: int
    length: int

    @property
    def parts(self) -> int:
        return max(1, -(-self.length // BLOCK))

    @property
    def rows_per_item(self) -> int:
        return max(1, BLOCK // max(1, self.length)) if self.parts == 1 else 1

    @property
    def items(self) -> int:
        if self.rows == 0 or self.length == 0:
            return 0
        return -(-self.rows // self.rows_per_item) * self.parts


def make_space(writer: Writer, groups: Sequence[Place]) -> Space:
    """The axes of a kernel that runs along `groups`, the last one innermost."""
    if not groups:
        return Space((), None, 1, 1)
    inner = writer.axis(groups[-1], "j")
    outer = outer_axes(writer, groups[:-1])
    rows = math.prod([writer.axes.size(group) for group in groups[:-1]])
    return Space(outer, inner, rows, writer.axes.size(inner.atoms))


def outer_axes(writer: Writer, groups: Sequence[Place]) -> tuple[Axis, ...]:
    if len(groups) == 1:
        return (writer.axis(groups[0], "i"),)
    return tuple([writer.axis(group, f"i{k}") for k, group in enumerate(groups)])


def open_items(writer: Writer) -> None:
    writer.open("item", "begin", "end")


def open_block(writer: Writer, space: Space) -> int:
    """The loops over the elements of one item; how many were opened."""
    return open_rows_of_block(writer, space) + open_line_of_block(writer, space)


def open_rows_of_block(writer: Writer, space: Space) -> int:
    """The loops over the rows of one item, if there are rows; how many were opened."""
    if space.inner is None or not space.outer:
        return 0
    _block(writer, space)
    return open_rows(writer, space.outer, f"item // {writer.size('parts', space.parts)}", space.rows_per_item)


def open_line_of_block(writer: Writer, space: Space) -> int:
    """The loop along the innermost axis, in the rows of one item; how many were opened. It may be opened again."""
    if space.inner is None:
        return 0
    block = _block(writer, space)
    part = f"item % {writer.size('parts', space.parts)}" if space.outer else "item"
    _open_part(writer, space.inner, part, block)
    return 1


def _block(writer: Writer, space: Space) -> str:
    return writer.size("block", -(-space.length // space.parts))


def _open_part(writer: Writer, inner: Axis, part: str, block: str) -> None:
    writer.open(inner.name, f"({part}) * {block}" if " " in part else f"{part} * {block}",
                f"min({inner.size}, ({part} + 1) * {block})" if " " not in part else
                f"min({inner.size}, ({part}) * {block} + {block})")
    writer.know(inner)


TILE = 32, 16
"""Rows and columns of a tile: small enough that the cache lines of a transposed operand, one per column, stay until they are
used up, even where all of them belong into few sets of the cache, as for rows of 16 KiB."""


def open_tiles(writer: Writer, groups: Sequence[Place], turned: int) -> int:
    """Loops over strips of tiles of loop number `turned` and the innermost one; the number of items. An item is one
    strip."""
    height, width = TILE
    inner, across = writer.axis(groups[-1], "j"), writer.axis(groups[turned], "t")
    rest = [group for k, group in enumerate(groups[:-1]) if k != turned]
    count = -(-writer.axes.size(across.atoms) // height)
    strips = writer.size("strips", count)
    outer = outer_axes(writer, rest)
    if outer:
        spread(writer, outer, f"item // {strips}")
        for axis in outer:
            writer.know(axis)
    writer.let("t0", f"item % {strips} * {height}")
    writer.open("tile", "0", f"({inner.size} + {width - 1}) // {width}")
    writer.open(across.name, "t0", f"min({across.size}, t0 + {height})")
    writer.know(across)
    writer.open(inner.name, f"tile * {width}", f"min({inner.size}, tile * {width} + {width})")
    writer.know(inner)
    return count * math.prod([writer.axes.size(group) for group in rest])


def open_rows(writer: Writer, outer: Sequence[Axis], group: str, rows_per_item: int) -> int:
    """The loops over the rows of group number `group`; inside of them the variables of all `outer` axes are known. How many
    were opened: several rows along several axes are two, for the divisions that say where a row is take as long as a short
    row."""
    per_item = writer.size("rows", rows_per_item)
    total = " * ".join([axis.size for axis in outer])
    first = f"({group}) * {per_item}" if " " in group else f"{group} * {per_item}"
    last = f"min({total}, {first} + {per_item})"
    if len(outer) > 1 and rows_per_item > 1:
        *slow, fast = outer
        writer.let("first", first)
        writer.let("last", last)
        writer.open("line", f"first // {fast.size}", f"(last + {fast.size} - 1) // {fast.size}")
        spread(writer, slow, "line")
        writer.open(fast.name, f"max(0, first - line * {fast.size})", f"min({fast.size}, last - line * {fast.size})")
        opened = 2
    else:
        row = outer[0].name if len(outer) == 1 else "row"
        writer.open(row, first, last)
        if len(outer) > 1:
            spread(writer, outer, row)
        opened = 1
    for axis in outer:
        writer.know(axis)
    return opened


def spread(writer: Writer, outer: Sequence[Axis], row: str) -> None:
    """The variables of all axes from the number of the row."""
    rest = f"({row})" if " " in row else row
    for k, axis in reversed(list(enumerate(outer))):
        if k == 0:
            writer.let(axis.name, rest)
        else:
            writer.let(axis.name, f"{rest} % {axis.size}")
            rest = writer.let(f"rest{k}", f"{rest} // {axis.size}") if k > 1 else f"{rest} // {axis.size}"
