"""The phase in front of a product that copies an operand into panels, as the core of `gemm` reads them fastest.

A panel has the elements of one step of the depth side by side. The phase goes through memory as it lies: rows of several
panels together where elements of a step are neighbours, squares that are transposed where those of a row are. Numbers that
are narrower than their sums become wide, or stand in groups, on that way (`gemm_narrow`).
"""

from __future__ import annotations

from textwrap import indent

from jitgrad.kernels.cpu import gemm_narrow as narrow
from jitgrad.kernels.cpu.gemm import FETCHED, FETCHED_LINES, Form, form_for, unpack

PACK_ARGUMENTS = ("rows", "depth", "row_stride", "depth_stride", "panel_rows", "width", "panels", "panels_per_item",
                  "size_1", "size_2", "size_3", "base", "stride_0", "stride_1", "stride_2", "stride_3")
"""The integers after the pointers to the operand and to the panels. `rows` counts rows of A or columns of B."""

_PACK = """\
def pack_{short}_{kind}(args, begin, end, thread):
    x = pointer(args, 1, {short})
    o = pointer(args, 2, {made})
{unpack}
    parts = (panels + panels_per_item - 1) // panels_per_item
    for item in range(begin, end):
        panel = item % parts * panels_per_item
        batch = item // parts
        index_3 = batch % size_3
        index_2 = batch // size_3 % size_2
        index_1 = batch // (size_3 * size_2) % size_1
        index_0 = batch // (size_3 * size_2 * size_1)
        first = panel * panel_rows
        start = (base + index_0 * stride_0 + index_1 * stride_1 + index_2 * stride_2 + index_3 * stride_3
                 + first * row_stride)
        place = (batch * panels + panel) * {size}
{body}"""

_EACH = """\
        for panel in range(panel, min(panel + panels_per_item, panels)):
            height = min(panel_rows, rows - panel * panel_rows)
{body}            start += panel_rows * row_stride
{next}"""

_COPY = """\
        for d in range(depth):
            for i in range(height):
                store(o, place + d * width + i, load(x, start + i * row_stride + d * depth_stride, 0, 2), 1, 2)
"""

_COPY_ROWS = """\
        count = min(panels_per_item, panels - panel)
        whole = max(min(count, (rows - first - width) // panel_rows + 1), 0)
        for d in range(depth):
            soon = start + (d + {ahead}) * depth_stride
            for i in range(0, count * panel_rows + {lanes}, {lanes}):
                prefetch(x, soon + i)
            for k in range(whole):
                for i in range(0, width, {lanes}):
                    for lane in range(i, i + {lanes}):
                        store(o, place + (k * depth + d) * width + lane,
                              load(x, start + k * panel_rows + d * depth_stride + lane, 0, 2), 1, 2)
            for k in range(whole, count):
                height = min(panel_rows, rows - first - k * panel_rows)
                gather_run(height, 0, height, x, start + k * panel_rows + d * depth_stride, 1,
                           o, place + (k * depth + d) * width)
"""

_TRANSPOSE = """\
        whole = depth - depth % {lanes}
        for d in range(0, whole, {lanes}):
            for i in range(height):
                prefetch(x, start + i * row_stride + d + {soon})
            for i in range(0, height, {lanes}):
                transpose_tile(min(height - i, {lanes}), x, start + i * row_stride + d, row_stride,
                               o, place + d * width + i, width, {lanes})
        for d in range(whole, depth):
            for i in range(height):
                store(o, place + d * width + i, load(x, start + i * row_stride + d, 0, 2), 1, 2)
"""

PACK_KINDS = {"rows": _COPY_ROWS, "depth": _TRANSPOSE, "any": _COPY}
"""Bodies by what lies side by side in memory: elements of one step, elements of one row, or neither."""

WIDEN_KINDS = {"rows": narrow.WIDEN_ROWS, "depth": narrow.WIDEN_DEPTH, "any": _COPY}
GROUP_KINDS = {"rows": narrow.GROUP_ROWS, "depth": narrow.GROUP_DEPTH, "any": narrow.GROUP_ANY}


def pack_source(short: str, kind: str) -> str:
    """The text of the packing phase for ``f32`` or ``f64``."""
    return pack_text(form_for(short, short), kind)


def pack_text(form: Form, kind: str, of_b: bool = False) -> str:
    """The text of the packing phase of A, or of B, for a core and a kind of `PACK_KINDS`. Arguments: operand, panels, then
    `PACK_ARGUMENTS`; for a B with lines in front of its blocks, the steps of a block. Items: panels of all batches."""
    lanes, group, columns, balanced = form.tile.lanes, form.group, form.tile.columns, of_b and form.balances
    kinds = GROUP_KINDS if group > 1 else WIDEN_KINDS if form.widens else PACK_KINDS
    padded, line = f"width * ((depth + {group - 1}) // {group} * {group})" if group > 1 else "width * depth", group * columns
    names, size = unpack(PACK_ARGUMENTS, 3), padded
    if balanced:
        names = unpack((*["steps_of_all" if name == "depth" else name for name in PACK_ARGUMENTS], "block"), 3)
        size = f"({padded.replace('depth', 'steps_of_all')} + (steps_of_all + block - 1) // block * {line})"
    sizes = {"lanes": lanes, "group": group, "chunk": group * lanes if group > 1 else narrow.CHUNK, "columns": columns,
             "line": line, "last": group - 1, "ahead": FETCHED, "size": size,
             "soon": group * lanes * FETCHED_LINES}
    body = kinds[kind].format(**sizes)
    if balanced:
        body = narrow.BALANCED_BLOCKS.format(body=indent(body, "    "), **sizes)
    if kind != "rows" or form.widens:
        body = _EACH.format(body=indent(body, "    "), next="" if balanced else f"            place += {size}\n")
    name = kind if group == 1 else f"{kind}_by_{group}{'_balanced' * balanced}"
    return _PACK.format(short=form.right, kind=name, made=form.right if of_b and group > 1 else form.left, body=body,
                        size=size, unpack=names)
