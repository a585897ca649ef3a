"""Matrix multiplication: C = A @ B for batches of matrices with any strides, on the register tile of `tile`.

`source` is the text of the core, compiled once per `Form` (element types, and how a tile is multiplied): its items are
blocks of C, cut by shape and by how many processors the machine has, and each sum runs through the depth in one order, so
results depend neither on threads nor on which call does which items. An earlier phase (`gemm_pack`) copies A into panels
where the core cannot read it at full speed, or has another type for it. Whether A is packed, and all blocking, is decided by
`arrange` from shapes and strides and reaches both kernels as integers.

To the core, A is a row of panels of `panel_rows` rows, and B of panels as wide as the tile; a panel, a row and a step in
the depth each have a stride. Panels of B that serve more than a few rows, or whose rows are not contiguous, are copied
to the stack first: then their elements lie in the order in which they are read, and in the second cache. Those that are
narrower than their sums become wide, or stand in groups, on that way (`gemm_narrow`). Where an item cannot have many rows, B
is packed by a phase of its own. The core goes through `span` columns for one panel of A before it takes the next one: rows
of C may be a page apart, and this way it stays on a few pages for long.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from textwrap import indent

from jitgrad.kernels.cpu import gemm_narrow as narrow
from jitgrad.kernels.cpu.tile import BLOCK_OF_B, DEPTH_BLOCK, HIGH, Tile, tile_for
from jitgrad.kernels.cpu.tile_dot import has_dot
from jitgrad.kernels.cpu.tile_text import UNROLLED

BATCH_DIMENSIONS = 4
ITEMSIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1}
FLOATS = ("f64", "f32", "bf16", "f16")
ITEM_COST = 1 << 20                             # multiply-adds below which an item is not cut further
ITEMS = min(max(8, 2 * (os.cpu_count() or 1)), 64)     # as many items as there are, at most, are wanted for balance
DEEPEST = 512                                   # steps that are summed up at once: a panel has room for them
ITEM_ROWS, ITEM_COLUMNS = 252, 256              # a block of C, in the second cache; an item that copies B has all rows
ITEM_OF_WHOLE_ROWS = 1 << 16                    # elements of C
DEEP = 256                                      # steps from which a transposed A is packed
WIDE = 1024                                     # columns from which a transposed A is packed
PACKED_FROM = 3                                 # low items one below the other from which B is packed once
PAGE = 4096
"""Bytes: lines that are a multiple of them apart have the same few places in the nearest cache. There are at least `HIGH`,
and so many rows of A are read where they lie; of more, each would push another one out before all of it was used."""
COPIED_FROM = 2                                 # tiles of rows that a panel of B must serve for its copy to pay

BESIDE = 8                                      # panels that an item packs where they lie side by side in memory
FEW = 4                                         # items of packing that there should be
FETCHED_LINES = 4                               # of each row, where rows are transposed
FETCHED = 16                                    # rows that are fetched before they are packed: each may be a page of its own

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matrices:
    """A batch of matrices as an operand: strides in elements of the batch dimensions, of rows and of columns, and where
    in its memory the first element lies."""

    batch: Strides
    row: int
    column: int
    first: int = 0


ARGUMENTS = ("m", "n", "k", "panel_rows", "a_panel", "a_row", "a_step", "b_panel", "b_step", "b_column",
             "b_copies", "span", "c_row", "c_batch", "rows_per_item", "row_blocks", "columns_per_item", "column_blocks",
             "depth_block", "accumulate", "size_1", "size_2", "size_3",
             "a_first", "a_0", "a_1", "a_2", "a_3", "b_first", "b_0", "b_1", "b_2", "b_3")
"""The integers after the pointers to A, B and C (arguments 1 to 3) in the core's argument block, from argument 4 on."""

LOCATE_ITEM = (
    ("batch", "item // (column_blocks * row_blocks)"),
    ("first_row", "item // column_blocks % row_blocks * rows_per_item"),
    ("last_row", "min(first_row + rows_per_item, m)"),
    ("first_column", "item % column_blocks * columns_per_item"),
    ("last_column", "min(first_column + columns_per_item, n)"))
"""Which block of C an item is: assignments over the core's arguments."""

_CORE = """\
def {name}(args, begin, end, thread):
    a = pointer(args, 1, {left})
    b = pointer(args, 2, {right})
    c = pointer(args, 3, {total})
{unpack}
    panel = {panel}
{more}    for item in range(begin, end):
{locate}
        a_start, b_start, c_start = a_first, b_first, batch * c_batch
        if batch != 0:
            index_3 = batch % size_3
            index_2 = batch // size_3 % size_2
            index_1 = batch // (size_3 * size_2) % size_1
            index_0 = batch // (size_3 * size_2 * size_1)
            a_start += index_0 * a_0 + index_1 * a_1 + index_2 * a_2 + index_3 * a_3
            b_start += index_0 * b_0 + index_1 * b_1 + index_2 * b_2 + index_3 * b_3
        for first_step in range(0, max(k, 1), depth_block):
            depth = min(depth_block, k - first_step)
            keep = accumulate if first_step == 0 else 1
            for column in range(first_column, last_column, max(span, {columns})):
                width = min({columns}, last_column - column)
                b_place = b_start + column // {columns} * b_panel + first_step * b_step
                lines_panel = b_panel
{copy}{of_columns}                for row in range(first_row, last_row, panel_rows):
                    height = min(panel_rows, last_row - row)
                    a_place = a_start + row // panel_rows * a_panel + first_step{grouped} * a_step
{of_row}                    for at in range(column, min(column + max(span, {columns}), last_column), {columns}):
{multiply}"""

_MULTIPLY = """\
                        {piece}(height, min({columns}, last_column - at), depth, a, a_place, a_row, a_step,
                                      lines, lines_place + (at - column) // {columns} * lines_panel, lines_step,
                                      c, c_start + row * c_row + at, c_row, keep{fetched})
"""

# Of a packed A each tile fetches its share of the next panel; of one that is read in place a row, as far as there are tiles.
_AHEAD_OF_COLUMNS = """\
                turn_a, turn_b, share_a, share_b, soon_b, further, left, parts = 0, 0, 0, 0, b_place, 0, 0, 0
                if span != 0:
                    panels = (last_row - first_row + panel_rows - 1) // panel_rows
                    parts = (min(span, last_column - column) + {columns} - 1) // {columns}
                    further = first_step + depth if first_step + depth < k else 0
                    soon_b = b_start + (column // {columns} + (0 if further else parts)) * b_panel + further * b_step
                    turn_b = {turn} * b_step // panels
                    share_b = depth // panels * b_step
                    left = panels
                    if a_row == 1:
                        turn_a = {turn} * a_step // parts
                        share_a = depth * a_step // parts
                    elif a_step == 1:
                        turn_a = {turn}
                        share_a = a_row
"""

# Where copies of B are in the second cache already, further rows of A are fetched in its place; `left` never comes to 0.
_BESIDE_COPIES = """\
                beside = b
                if b_copies != 0:
                    beside, turn_b, share_b = a, 0, 0
                    if a_row != 1:
                        turn_b, share_b = turn_a, share_a
"""

_AHEAD_OF_ROW = """\
                    soon_a = a_place
                    if turn_a != 0:
                        soon_a += a_panel
                        if row + panel_rows >= last_row:
                            soon_a = a_start + first_row // panel_rows * a_panel + further * a_step
"""

_ROWS_BESIDE = """\
                    if b_copies != 0:
                        soon_b = soon_a + parts * a_row
                        left = parts + 2
"""

_NEXT = """\
                        soon_a += share_a
                        soon_b += share_b
                        left -= 1
                        if left == 0:
                            left = (last_row - first_row + panel_rows - 1) // panel_rows
                            soon_b += b_panel - left * share_b
"""


_COPY_PANELS = """\
                lines = b
                lines_place = b_place
                lines_step = b_step
                if b_copies != 0:
                    lines = panel
                    lines_place = 0
                    lines_step = {columns}
                    lines_panel = depth * {columns}
                    count = min(max(span, {columns}), last_column - column)
                    for at in range(0, count, {columns}):
                        width = min({columns}, count - at)
                        place = b_place + at * b_column
                        plain_steps = 0
                        if b_step == 1:
                            plain_steps = depth - depth % {lanes}
                            for d in range(0, plain_steps, {lanes}):
                                for j in range(width):
                                    prefetch(b, place + d + {soon} + j * b_column)
                                for j in range(0, width, {lanes}):
                                    transpose_tile(min(width - j, {lanes}), b, place + d + j * b_column, b_column,
                                                   panel, at * depth + d * {columns} + j, {columns}, {lanes})
                        elif b_column == 1 and width == {columns}:
                            plain_steps = depth
                            for d in range(depth):
                                for j in range(0, {columns}, {lanes}):
                                    prefetch(b, place + (d + {ahead}) * b_step + j)
                                for j in range({columns}):
                                    store(panel, at * depth + d * {columns} + j, load(b, place + d * b_step + j, 0, 2), 1, 2)
                        for d in range(plain_steps, depth):
                            gather_run(width, 0, width, b, place + d * b_step, b_column, panel, at * depth + d * {columns})
"""


@dataclass(frozen=True, slots=True)
class Form:
    """A core: the element types of what it reads as A and as B and of C, the piece that multiplies a tile (none: a plain
    loop, which reads any A), and how many steps of the depth lie side by side for it."""

    left: str
    right: str
    total: str
    piece: str = "multiply_ahead"
    group: int = 1

    @property
    def name(self) -> str:
        """``gemm_f32``; where sums are kept in another type, or steps in groups, that too."""
        kind = "gemm" if self.group == 1 else "dot"
        return f"{kind}_{self.right}" if self.right == self.total else f"{kind}_{self.right}_{self.total}"

    @property
    def must_pack(self) -> bool:
        """True when A cannot be read where it lies: it has another type there, or its groups are to lie side by side."""
        return self.left != self.right or self.group > 1

    @property
    def widens(self) -> bool:
        """True when B is converted to the type of C on its way into a panel."""
        return self.total == "f32" != self.right and self.group == 1

    @property
    def balances(self) -> bool:
        """Whether a line stands in front of every block of a panel of B (`tile_dot.balance_panel`)."""
        return self.piece == "multiply_quads"

    @property
    def fetches(self) -> bool:
        """Whether what the next tiles need is fetched while one is multiplied."""
        return self.piece == "multiply_ahead"

    @property
    def spans(self) -> bool:
        """Whether an item copies several panels of B at once."""
        return self.fetches and self.left == self.right

    @property
    def tile(self) -> Tile:
        return tile_for(ITEMSIZES[self.total])


def form_for(short: str, total: str) -> Form:
    """The core on this machine for operands of dtype `short` and sums of type `total`: the same type, float32 for 16-bit
    floats, or int32 for int8."""
    if short not in FLOATS:
        dots = (short, total) == ("i8", "i32") and has_dot(short)
        return Form("u8", short, total, "multiply_quads", 4) if dots else Form(short, short, total, "")
    if short == total:
        return Form(short, short, short)
    return Form("bf16", "bf16", "f32", "multiply_pairs", 2) if has_dot(short) else Form("f32", short, "f32")


def core_of_panels(form: Form) -> Form:
    """The core for panels of both operands that are packed for `form`: what became wide is what it is."""
    return Form(form.total, form.total, form.total) if form.widens else form


def source(short: str) -> str:
    """The text of the core for ``f32`` or ``f64``."""
    return core_source(form_for(short, short))


def core_source(form: Form) -> str:
    """The text of a core. Arguments: A, B, C, then `ARGUMENTS`."""
    tile = form.tile
    sizes = {"columns": tile.columns, "lanes": tile.lanes, "group": form.group, "line": form.group * tile.columns,
             "chunk": form.group * tile.lanes if form.group > 1 else narrow.CHUNK, "piece": form.piece,
             "start": form.group * tile.columns if form.balances else 0, "turn": UNROLLED,
             "blocks": f" + (first_step // depth_block + 1) * {form.group * tile.columns}" * form.balances,
             "soon": FETCHED_LINES * form.group * tile.lanes, "ahead": FETCHED,
             "fetched": f", a, soon_a, turn_a, {'beside' if form.spans else 'b'}, soon_b, turn_b" * form.fetches}
    copy = (narrow.GROUP_PANEL + narrow.BALANCE * form.balances if form.group > 1 else narrow.COPY_PANEL if not form.piece
            else narrow.WIDEN_PANEL if form.widens else _COPY_PANELS)
    multiply = _MULTIPLY + _NEXT * form.fetches if form.piece else indent(narrow.MULTIPLY, "    ")
    return _CORE.format(name=form.name, left=form.left, right=form.right, total=form.total, columns=tile.columns,
                        panel="make_panels(c)" if form.spans else f"make_panel({'b' if form.group > 1 else 'c'})",
                        more="    wide = make_panel(c)\n" * form.widens,
                        grouped=f" // {form.group}" if form.group > 1 else "", unpack=unpack(),
                        locate="\n".join(f"        {name} = {value}" for name, value in LOCATE_ITEM),
                        of_columns=(_AHEAD_OF_COLUMNS * form.fetches + _BESIDE_COPIES * form.spans).format(**sizes),
                        of_row=_AHEAD_OF_ROW * form.fetches + _ROWS_BESIDE * form.spans,
                        copy=copy.format(**sizes), multiply=multiply.format(**sizes))


def unpack(names: tuple[str, ...] = ARGUMENTS, first: int = 4) -> str:
    """Lines that give integer arguments their names."""
    return "".join(f"    {name} = args[{first + i}]\n" for i, name in enumerate(names))


def element_tile(short: str) -> Tile:
    return tile_for(ITEMSIZES[short])


# --- arranging ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packing:
    """One packing phase: the kind of text, its items, its integers, and the elements that its panels take."""

    kind: str
    items: int
    integers: tuple[int, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a product is carried out: packing of A and of B (None: there is none), then `items` of the core."""

    pack_a: Packing | None
    pack_b: Packing | None
    items: int
    integers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blocking:
    """What of an arrangement shapes do not settle: whether A is packed, how B is read ("packed" by a phase of its own,
    "copied" by every item, or "in place"), how many rows a panel of A has, how many panels high and wide an item is, and how
    many steps of the depth, in groups, are summed up at once at most (more than `DEEPEST` only where B is not copied)."""

    pack_a: bool
    read_b: str
    panel_rows: int
    high: int
    wide: int
    deepest: int


def usual_blocking(form: Form, batch: tuple[int, ...], m: int, n: int, k: int, a: Matrices, b: Matrices,
                   whole_rows: bool = False, must_pack_a: bool = False) -> Blocking:
    """The blocking that is best for most products on most machines. With `whole_rows` an item is no part of a row, with
    `must_pack_a` A cannot be read where it lies."""
    tile = form.tile
    pack_a = bool(form.piece) and (must_pack_a or form.must_pack or _pays_to_pack_a(form, a, m, n, k))
    apart = not pack_a and a.row != 1 and a.row * ITEMSIZES[form.left] % PAGE == 0
    panel_rows = panel_height(m, tile, HIGH if apart else None)
    copies = form.group > 1 or (n > 1 and (b.column != 1 or m > COPIED_FROM * tile.rows))
    high, wide = cut(batch, m, n, k, panel_rows, tile, whole_rows, item_rows=m if copies and form.spans else ITEM_ROWS)
    item_rows = high * panel_rows
    packs = copies and may_pack_b(form, n) and item_rows <= ITEM_ROWS and -(-m // item_rows) >= PACKED_FROM
    if packs:
        high, wide = cut(batch, m, n, k, panel_rows, tile, whole_rows)
    deepest = DEPTH_BLOCK - 1 if form.group > 1 else DEEPEST
    return Blocking(pack_a, "packed" if packs else "copied" if copies else "in place", panel_rows, high, wide, deepest)


def may_pack_b(form: Form, n: int) -> bool:
    """Whether there is a phase that packs a B of `n` columns for this core."""
    return bool(form.piece) and (form.group > 1 or n > form.tile.columns)


def arrange(form: Form, batch: tuple[int, ...], m: int, n: int, k: int, a: Matrices, b: Matrices,
            blocking: Blocking | None = None) -> Arrangement:
    """C[*batch, m, n] = A[*batch, m, k] @ B[*batch, k, n] in blocks, with C contiguous. At most `BATCH_DIMENSIONS` batch
    sizes."""
    tile, made = form.tile, blocking or usual_blocking(form, batch, m, n, k, a, b)
    panel_rows = made.panel_rows
    rows, columns = made.high * panel_rows, made.wide * tile.columns
    row_blocks, column_blocks = -(-m // rows), -(-n // columns)
    pack_a = pack_b = None
    if made.pack_a:
        pack_a, a, a_panel = pack(a, batch, m, k, panel_rows, tile.packed_rows, a.row, a.column, form.group)
        pack_a = pack_a if m else None
    else:
        a_panel = panel_rows * a.row
        a = Matrices(a.batch, a.row, a.column * form.group, a.first)
    sizes = (1,) * (BATCH_DIMENSIONS - len(batch)) + batch
    deepest = made.deepest * form.group
    depth_block = max(-(-k // max(-(-k // deepest), 1)), 1)             # evenly, so that the last one is not short
    depth_block += -depth_block % form.group
    b_panel, span = tile.columns * b.column, 0
    if made.read_b == "packed":
        pack_b, panels_of_b, b_panel = pack(b, batch, n, k, tile.columns, tile.columns, b.column, b.row, form.group,
                                            block=depth_block if form.balances else 0)
        b = Matrices(panels_of_b.batch, tile.columns, 1)
    if made.read_b == "packed" or (made.read_b == "copied" and form.spans and rows > ITEM_ROWS):
        span = min(columns, block_columns(k, tile))
    integers = (m, n, k, panel_rows, a_panel, a.row, a.column, b_panel, b.row, b.column, int(made.read_b == "copied"), span,
                n, m * n, rows, row_blocks, columns, column_blocks, depth_block, 0, *sizes[1:],
                a.first, *padded_strides(a.batch), b.first, *padded_strides(b.batch))
    count = row_blocks * column_blocks
    for size in batch:
        count *= size
    return Arrangement(pack_a, pack_b, count, integers)


def panel_height(rows: int, tile: Tile, most: int | None = None) -> int:
    """Rows of a panel of A: an even number, no more than the tile has, or `most`, so that the last panel is not much
    shorter."""
    even = -(-rows // max(-(-rows // min(tile.rows, most or tile.rows)), 1))
    return max(even + even % 2, 1) if rows > 1 else 1


def _pays_to_pack_a(form: Form, a: Matrices, m: int, n: int, k: int) -> bool:
    """A stride in both directions spends a cache line on every element. Otherwise packing pays where rows lie side by side,
    so that at most two steps of a deep product are on one page, and the product is wide."""
    if m == 1 or k <= 4:
        return False
    if a.row != 1:
        return a.column != 1
    return n >= WIDE and k >= DEEP and m > form.tile.rows and 2 * a.column * ITEMSIZES[form.left] >= PAGE


def pack(x: Matrices, batch: tuple[int, ...], rows: int, depth: int, panel_rows: int, width: int, row_stride: int,
         depth_stride: int, group: int = 1, once: bool = True, block: int = 0) -> tuple[Packing, Matrices, int]:
    """The phase that packs `x`, the operand that it makes, and the stride of its panels. A batch dimension in which the
    operand is broadcast is packed once, unless that is not wanted. `group` steps of the depth lie side by side. `block`: the
    steps of blocks that have a line in front, if not 0."""
    panels, panel = -(-rows // panel_rows), width * (depth + -depth % group)
    panel += -(-depth // block) * group * width if block else 0
    kind = "rows" if row_stride == 1 else "depth" if depth_stride == 1 else "any"
    beside_it = beside(panels) if kind == "rows" else 1
    sizes = tuple(1 if once and stride == 0 else size for size, stride in zip(batch, x.batch, strict=True))
    strides, count = [], panels
    parts = -(-panels // beside_it)
    for size in reversed(sizes):
        strides.append(0 if size == 1 else count * panel)
        count *= size
    padded = (1,) * (BATCH_DIMENSIONS - len(sizes)) + sizes
    integers = (rows, depth, row_stride, depth_stride, panel_rows, width, panels, beside_it,
                *padded[1:], x.first, *padded_strides(x.batch), *([block] if block else []))
    packing = Packing(kind, count // panels * parts, integers, count * panel)
    return packing, Matrices(tuple(reversed(strides)), group, group * width), panel


def beside(panels: int) -> int:
    """Of how many panels an item of packing consists, where they lie side by side in memory."""
    return min(BESIDE, max(panels // FEW, 1))


def padded_strides(strides: Strides) -> Strides:
    """`strides` with zeros in front, one for each of `BATCH_DIMENSIONS`."""
    return (0,) * (BATCH_DIMENSIONS - len(strides)) + strides


def cut(batch: tuple[int, ...], m: int, n: int, k: int, panel_rows: int, tile: Tile, whole_rows: bool = False,
        items: int = ITEMS, item_rows: int = ITEM_ROWS) -> tuple[int, int]:
    """Panels of rows and of columns of an item of `item_rows` at most: halved until there are `items` or they are small, the
    columns first: what is copied of B serves as many rows as there are."""
    count = 1
    for size in batch:
        count *= size
    rows, columns = max(-(-m // panel_rows), 1), max(-(-n // tile.columns), 1)      # in panels
    high, wide = min(rows, max(-(-item_rows // panel_rows), 1)), min(columns, block_columns(k, tile) // tile.columns)
    if whole_rows:
        wide, high = columns, min(high, max(ITEM_OF_WHOLE_ROWS // (columns * tile.columns * panel_rows), 1))
    while (count * -(-rows // high) * -(-columns // wide) < items and (high if whole_rows else high * wide) > 1
           and high * panel_rows * wide * tile.columns * k > ITEM_COST):
        if wide > 1 and not (whole_rows and high > 1):
            wide = -(-wide // 2)
        else:
            high = -(-high // 2)
    return -(-rows // -(-rows // high)), -(-columns // -(-columns // wide))     # evenly: the last block is not small


def block_columns(k: int, tile: Tile) -> int:
    """Columns of a block of B, whole panels."""
    depth = -(-k // max(-(-k // DEEPEST), 1))
    return max(min(ITEM_COLUMNS, BLOCK_OF_B // max(depth, 1)) // tile.columns, 1) * tile.columns
