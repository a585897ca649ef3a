"""What can be chosen about a matrix product: the blocks of an item, packing of either operand, and depth summed at once.

In go what `gemm.arrange` is told of a product, out comes its `Blocking`: the usual one, or what was measured to be better
(`choice`). Questions are asked of products only that take long enough to be measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from jitgrad.codegen.choice import Choice
from jitgrad.kernels.cpu import gemm
from jitgrad.kernels.cpu.gemm import DEEPEST, Blocking, Form, Matrices

WORTH_ASKING = 1 << 21                          # multiply-adds, some ten microseconds
FEW_ITEMS = 4
DEPTHS = (2 * DEEPEST // 3, 4 * DEEPEST // 3)

Sizes = tuple[int, int, int]                    # rows, columns, depth


def choose_blocking(form: Form, batch: tuple[int, ...], sizes: Sizes, a: Matrices, b: Matrices,
                    whole_rows: bool, must_pack_a: bool) -> Blocking:
    """The blocking of C[*batch, m, n] = A[*batch, m, k] @ B[*batch, k, n] for `sizes` (m, n, k). With `whole_rows` an item
    is no part of a row, with `must_pack_a` A cannot be read where it lies."""
    usual = gemm.usual_blocking(form, batch, *sizes, a, b, whole_rows, must_pack_a)
    if math.prod((*batch, *sizes)) < WORTH_ASKING:
        return usual
    made = _choose_item(usual, form, batch, sizes, whole_rows)
    if form != Form(form.total, form.total, form.total) or not form.piece:
        return made
    if a.row == 1 and not must_pack_a:
        made = _choose_a(made, form, sizes)
    return _choose_depth(_choose_b(made, form, sizes), sizes)


def _choose_item(usual: Blocking, form: Form, batch: tuple[int, ...], sizes: Sizes, whole_rows: bool) -> Blocking:
    """Items of half or twice the rows or, where they may be parts of rows, columns, and as large ones as leave some for
    every thread."""
    (m, n, k), tile, panel_rows = sizes, form.tile, usual.panel_rows
    rows, columns, high, wide = -(-m // panel_rows), -(-n // tile.columns), usual.high, usual.wide
    shapes = [(high, wide), gemm.cut(batch, m, n, k, panel_rows, tile, whole_rows, FEW_ITEMS), (-(-high // 2), wide),
              (min(2 * high, rows), wide)]
    if not whole_rows:
        shapes += [(high, -(-wide // 2)), (high, min(2 * wide, columns))]
    named = {f"{x * panel_rows} x {y * tile.columns}": (x, y) for x, y in shapes}
    high, wide = Choice("block of an item", named).take()
    return replace(usual, high=high, wide=wide)


def _choose_a(made: Blocking, form: Form, sizes: Sizes) -> Blocking:
    """Whether to pack a transposed operand: to pack another one that usually is not has never been faster."""
    if sizes[0] <= form.tile.rows:
        return made
    ways = {"packed": True, "in place": False}
    usual = "packed" if made.pack_a else "in place"
    return replace(made, pack_a=Choice("left operand", {usual: ways.pop(usual), **ways}).take())


def _choose_b(made: Blocking, form: Form, sizes: Sizes) -> Blocking:
    """Only whether to pack what every item usually copies: here, too, the other way around is slower."""
    if made.read_b != "copied" or not gemm.may_pack_b(form, sizes[1]):
        return made
    return replace(made, read_b=Choice("right operand", {"copied": "copied", "packed": "packed"}).take())


def _choose_depth(made: Blocking, sizes: Sizes) -> Blocking:
    """Depths that cut the sums into other numbers of blocks; the copy of a panel of B has room for `DEEPEST`."""
    blocks: dict[int, int] = {}
    for deepest in (made.deepest, *DEPTHS):
        if deepest <= DEEPEST or made.read_b != "copied":
            blocks.setdefault(-(-sizes[2] // deepest), deepest)
    return replace(made, deepest=Choice("steps summed at once", {str(d): d for d in blocks.values()}).take())
