"""The text of a kernel that does nothing but multiply and add, to measure how fast a machine can do that.

It is the register tile of `tile` on one step of the depth, taken again and again: A and B stay in the nearest cache, all
sums in registers, and so the loop is as fast as the processor's multipliers.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile

_MULTIPLY_ADD = """\
def multiply_add_{short}(args, begin, end, thread):
    a = pointer(args, 1, {short})
    b = pointer(args, 2, {short})
    c = pointer(args, 3, {short})
    depth = args[4]
    for item in range(begin, end):
        multiply_tile({rows}, {columns}, depth, a, 0, 1, 0, b, 0, 0, c, item * {size}, {columns}, 0)
"""


def source(short: str) -> str:
    """The text for ``f32`` or ``f64``. An item is a tile of C, to which `depth` equal outer products are added.
    Arguments: a[rows], b[columns], c[items * rows * columns]; depth. Sizes are those of the machine's tile."""
    tile = element_tile(short)
    return _MULTIPLY_ADD.format(short=short, rows=tile.rows, columns=tile.columns, size=tile.rows * tile.columns)
