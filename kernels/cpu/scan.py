"""Running sums and products along one axis of ``[outer, size, inner]``, strictly in order."""

from __future__ import annotations

from jitgrad.kernels.cpu.math import minimum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import load, pointer, store
from jitgrad.kernels.cpu.template import text


def source(kernel: str, element: str) -> str:
    """The text of `scan_lines` or `scan_columns` (sums), or of one of these names with ``_product`` behind it."""
    name = kernel.removesuffix("_product")
    sums = text(KERNELS[name], T=element)
    return sums if name == kernel else sums.replace("total + x_", "total * x_").replace(name, kernel)


def scan_lines(args, begin, end, thread):
    """An item is a line of contiguous elements (inner = 1). Arguments: x, o; size."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    size = args[3]
    for item in range(begin, end):
        total = load(x, item * size, 0, 2)
        store(o, item * size, total, 1, 2)
        for i in range(item * size + 1, (item + 1) * size):
            x_i = load(x, i, 0, 2)
            total = T(total + x_i)
            store(o, i, total, 1, 2)


def scan_columns(args, begin, end, thread):
    """An item is `width` neighbouring lines. Arguments: x, o; size, inner, parts of inner, width."""
    x, o = pointer(args, 1, T), pointer(args, 2, T)
    size, inner, parts, width = args[3], args[4], args[5], args[6]
    for item in range(begin, end):
        first = item % parts * width
        start = item // parts * size * inner + first
        count = minimum(width, inner - first)
        for j in range(count):
            store(o, start + j, load(x, start + j, 0, 2), 1, 2)
        for i in range(1, size):
            row = start + i * inner
            for j in range(count):
                total = load(o, row - inner + j, 1, 2)
                x_j = load(x, row + j, 0, 2)
                store(o, row + j, T(total + x_j), 1, 2)


KERNELS = {k.__name__: k for k in (scan_lines, scan_columns)}
