"""Stable sorting of lines: by the digits of the numbers, eight bits at a time, and short ones by merging runs that insertion
has made; values and positions together.

NaN counts as larger than every number, as in NumPy and PyTorch. A sort by digits never compares: it counts how often each
digit occurs, and so knows where each number goes (D. E. Knuth, *The Art of Computer Programming*, volume 3, 5.2.5).
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import goes_before, minimum, order, select
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i32, i32 as I, i64, load, pointer, reassociate_min, store
from jitgrad.kernels.cpu.template import text

RUN = 12
"""The length of the runs that insertion sorts."""


PIECE = 32
"""How many elements of a line are looked at together for one that belongs among the first."""
DIGITS = 4
"""How many digits a number has; a kernel's text has the number of its type in place of this one."""
VALUES = 256
"""How many values a digit has."""


def source(kernel: str, element: str) -> str:
    """The text of the kernel of this name for a short dtype name such as ``f32``."""
    count = digits(element)
    return text(KERNELS[kernel], T=element, I="i64" if count == 8 else "i32", DIGITS=str(count), RUN=str(RUN),
                VALUES=str(VALUES), PIECE=str(PIECE))


def digits(element: str) -> int:
    """Of numbers of this type: bytes of what `order` makes of them. 16-bit floats are sorted as float32."""
    return 1 if element == "bool" else 4 if element in ("f16", "bf16") else int(element[1:]) // 8


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


def digit_lines(args, begin, end, thread):
    """`sort_lines`, by digits. Arguments: x, values, indices; of each thread keys[2, size], places[2, size] and
    counts[digits, 256]; size, inner, and which bits of keys are flipped, so that they count up in the order wanted."""
    x, values, indices = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    keys, places, counts = pointer(args, 4, I), pointer(args, 5, i32), pointer(args, 6, i32)
    size, inner, flipped = args[7], args[8], args[9]
    table = i64(thread * DIGITS * VALUES)
    for item in range(begin, end):
        line = item // inner * size * inner + item % inner
        source, target = i64(thread * 2 * size), i64((thread * 2 + 1) * size)
        for k in range(table, table + DIGITS * VALUES):
            store(counts, k, 0, 5, 6)
        for i in range(size):
            key = I(I(order(load(x, line + i * inner, 0, 6))) ^ flipped)
            store(keys, source + i, key, 3, 6)
            store(places, source + i, i, 4, 6)
            for digit in range(DIGITS):
                k = table + digit * VALUES + ((i64(key) >> 8 * digit) & 255)
                store(counts, k, load(counts, k, 5, 6) + 1, 5, 6)
        for digit in range(DIGITS):
            row, shift = table + digit * VALUES, 8 * digit
            alike = load(counts, row + ((i64(load(keys, source, 3, 6)) >> shift) & 255), 5, 6) == size
            if not alike:
                before = i32(0)
                for k in range(row, row + VALUES):
                    count = load(counts, k, 5, 6)
                    store(counts, k, before, 5, 6)
                    before = i32(before + count)
                for i in range(source, source + size):
                    key = load(keys, i, 3, 6)
                    k = row + ((i64(key) >> shift) & 255)
                    out = load(counts, k, 5, 6)
                    store(counts, k, out + 1, 5, 6)
                    store(keys, target + out, key, 3, 6)
                    store(places, target + out, load(places, i, 4, 6), 4, 6)
                source, target = target, source
        for i in range(size):
            place = load(places, source + i, 4, 6)
            store(values, line + i * inner, load(x, line + place * inner, 0, 6), 1, 6)
            store(indices, line + i * inner, place, 2, 6)


def top_lines(args, begin, end, thread):
    """The first `kept` elements of a line in order, by insertion among those that are kept so far: of a long line few get
    so far, and most pieces of it have none. An item is a line of ``x[outer, size, inner]``. Arguments: x, values, indices;
    size, inner, kept, descending."""
    x, values, indices = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, i64)
    size, inner, kept, descending = args[4], args[5], args[6], args[7]
    turned = I(select(descending != 0, -1, 0))
    for item in range(begin, end):
        line = item // inner * size * inner + item % inner
        out = item // inner * kept * inner + item % inner
        last = i64(out + (kept - 1) * inner)
        beaten = I(0)
        for piece in range((size + PIECE - 1) // PIECE):
            first, stop = piece * PIECE, minimum(i64(size), i64(piece * PIECE + PIECE))
            best = beaten
            if first >= kept and stop - first == PIECE:
                for i in range(PIECE):
                    key = load(x, line + (first + i) * inner, 0, 3)
                    best = reassociate_min(best, I(I(order(key)) ^ turned))
            if first < kept or best < beaten or stop - first < PIECE:
                for i in range(first, stop):
                    key = load(x, line + i * inner, 0, 3)
                    if i < kept or goes_before(key, load(values, last, 1, 3), descending):
                        j = i64(out + minimum(i64(i), i64(kept - 1)) * inner)
                        while j > out and goes_before(key, load(values, j - inner, 1, 3), descending):
                            store(values, j, load(values, j - inner, 1, 3), 1, 3)
                            store(indices, j, load(indices, j - inner, 2, 3), 2, 3)
                            j = i64(j - inner)
                        store(values, j, key, 1, 3)
                        store(indices, j, i, 2, 3)
                if stop >= kept:
                    beaten = I(I(order(load(values, last, 1, 3))) ^ turned)


KERNELS = {"sort_lines": sort_lines, "digit_lines": digit_lines, "top_lines": top_lines}
