"""Stable sorting of lines: merge sort from runs made by insertion, values and positions together.

NaN counts as larger than every number, as in NumPy and PyTorch.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import goes_before, minimum, select
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text

RUN = 12
"""The length of the runs that insertion sorts."""


def source(kernel: str, element: str) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``."""
    return text(KERNELS[kernel], T=element, RUN=str(RUN))


def sort_lines(args, begin, end, thread):
    """An item is a line of ``x[outer, size, inner]``. Arguments: x, values, indices, keys[2, items, size],
    places[2, items, size] (scratch); items, size, inner, descending."""
    x, values, indices = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    keys, places = pointer(args, 4, T), pointer(args, 5, i64)
    items, size, inner, descending = args[6], args[7], args[8], args[9]
    for item in range(begin, end):
        line = item // inner * size * inner + item % inner
        source, target = i64(item * size), i64((items + item) * size)
        for i in range(size):
            key = load(x, line + i * inner, 0, 5)
            j = i64(i)
            lowest = i64(i - i % RUN)
            while j > lowest and goes_before(key, load(keys, source + j - 1, 3, 5), descending):
                store(keys, source + j, load(keys, source + j - 1, 3, 5), 3, 5)
                store(places, source + j, load(places, source + j - 1, 4, 5), 4, 5)
                j = i64(j - 1)
            store(keys, source + j, key, 3, 5)
            store(places, source + j, i, 4, 5)
        width = i64(RUN)
        while width < size:
            for first in range(0, size, 2 * width):
                middle = minimum(i64(first + width), size)
                last = minimum(i64(first + 2 * width), size)
                left, right, out = i64(source + first), i64(source + middle), i64(target + first)
                left_end, right_end = right, i64(source + last)
                while left < left_end and right < right_end:
                    key, other = load(keys, left, 3, 5), load(keys, right, 3, 5)
                    swap = goes_before(other, key, descending)
                    store(keys, out, select(swap, other, key), 3, 5)
                    store(places, out, load(places, select(swap, right, left), 4, 5), 4, 5)
                    left, right, out = i64(left + select(swap, 0, 1)), i64(right + select(swap, 1, 0)), i64(out + 1)
                for rest in range(left, left_end):
                    store(keys, out + rest - left, load(keys, rest, 3, 5), 3, 5)
                    store(places, out + rest - left, load(places, rest, 4, 5), 4, 5)
                for rest in range(right, right_end):
                    store(keys, out + rest - right, load(keys, rest, 3, 5), 3, 5)
                    store(places, out + rest - right, load(places, rest, 4, 5), 4, 5)
            source, target = target, source
            width = i64(2 * width)
        for i in range(size):
            store(values, line + i * inner, load(keys, source + i, 3, 5), 1, 5)
            store(indices, line + i * inner, load(places, source + i, 4, 5), 2, 5)


def top_lines(args, begin, end, thread):
    """The first `kept` elements of a line in order, by insertion among those that are kept so far: of a long line few get
    so far. An item is a line of ``x[outer, size, inner]``. Arguments: x, values, indices; size, inner, kept, descending."""
    x, values, indices = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    size, inner, kept, descending = args[4], args[5], args[6], args[7]
    for item in range(begin, end):
        line = item // inner * size * inner + item % inner
        out = item // inner * kept * inner + item % inner
        last = i64(out + (kept - 1) * inner)
        for i in range(size):
            key = load(x, line + i * inner, 0, 3)
            if i < kept or goes_before(key, load(values, last, 1, 3), descending):
                j = i64(out + minimum(i64(i), i64(kept - 1)) * inner)
                while j > out and goes_before(key, load(values, j - inner, 1, 3), descending):
                    store(values, j, load(values, j - inner, 1, 3), 1, 3)
                    store(indices, j, load(indices, j - inner, 2, 3), 2, 3)
                    j = i64(j - inner)
                store(values, j, key, 1, 3)
                store(indices, j, i, 2, 3)


KERNELS = {"sort_lines": sort_lines, "top_lines": top_lines}
