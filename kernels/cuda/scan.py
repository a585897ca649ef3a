"""Running sums and products along one axis of ``[outer, size, inner]`` on a GPU.

Lines that lie across memory, or are short, are a thread each (`scan_columns`). Others are cut into pieces of which a warp
has one: it goes along it in steps of 128 elements, and within a step doubles the distance over which threads exchange their
sums (`scan_pieces`). Where a line is several pieces, totals of all pieces come first (`piece_totals`), and running sums of
the totals are what pieces begin with. How a line is cut depends on shapes alone. 16-bit floats accumulate in float32.
The type of what is written, `O`, may be another one than that of what is read."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import (
    IDENTITY,
    A,
    N,
    O,
    T,
    block,
    load,
    pointer,
    quotient,
    rest,
    scan_warp,
    store,
    thread,
)


def for_products(source: str) -> str:
    """The text of a kernel of this module, for products in place of sums."""
    return source.replace("total + x_i", "total * x_i").replace("scan_warp(", "scan_warp_product(").replace(
        "def ", "def product_", 1)


def scan_columns(x: pointer[T], o: pointer[O], lines: N, size: N, inner: N) -> block[256]:
    """A thread is a line."""
    item = N(block() * N(256) + thread())
    if item < lines:
        place = N(N(quotient(item, inner) * N(size * inner)) + rest(item, inner))
        total = O(load(x, place, 0, 2))
        store(o, place, total, 1, 2)
        for _ in range(size - 1):
            place = N(place + inner)
            x_i = load(x, place, 0, 2)
            total = O(total + x_i)
            store(o, place, total, 1, 2)


def piece_totals(x: pointer[T], totals: pointer[A], pieces: N, count: N, size: N, inner: N, length: N) -> block[256]:
    """A warp adds up a piece: one of the `count` of its line of `size` elements, `length` to a piece, `inner` apart."""
    piece, lane = N(block() * N(8) + quotient(thread(), 32)), N(rest(thread(), 32))
    if piece < pieces:
        line, at = quotient(piece, count), N(rest(piece, count) * length)
        start = N(quotient(line, inner) * N(size * inner) + rest(line, inner))
        total = A(IDENTITY)
        for step in range(N(at + lane), N(min(N(at + length), size)), N(32)):
            x_i = A(load(x, N(start + N(step) * inner), 0, 2))
            total = A(total + x_i)
        _, total = scan_warp(total)
        if lane == 0:
            store(totals, piece, total, 1, 2)


def scan_pieces(x: pointer[T], before: pointer[A], o: pointer[O], pieces: N, count: N, size: N, inner: N,
                length: N) -> block[256]:
    """A warp scans a piece, as in `piece_totals`. `before`: the running sums of the totals, read where a line has several
    pieces."""
    piece, lane = N(block() * N(8) + quotient(thread(), 32)), N(rest(thread(), 32))
    if piece < pieces:
        line, at = quotient(piece, count), N(rest(piece, count) * length)
        start, far = N(quotient(line, inner) * N(size * inner) + rest(line, inner)), N(32 * inner)
        total = A(IDENTITY)
        if at > 0:
            total = load(before, N(piece - 1), 1, 3)
        for step in range(at, N(min(N(at + length), size)), N(128)):
            left = N(size - N(N(step) + lane))
            i = N(start + N(N(step) + lane) * inner)
            j, k, m = N(i + far), N(i + 2 * far), N(i + 3 * far)
            a, b, c, d = A(IDENTITY), A(IDENTITY), A(IDENTITY), A(IDENTITY)
            if left > 0:
                a = A(load(x, i, 0, 3))
            if left > 32:
                b = A(load(x, j, 0, 3))
            if left > 64:
                c = A(load(x, k, 0, 3))
            if left > 96:
                d = A(load(x, m, 0, 3))
            x_i, whole = scan_warp(a)
            if left > 0:
                store(o, i, A(total + x_i), 2, 3)
            x_i = whole
            total = A(total + x_i)
            x_i, whole = scan_warp(b)
            if left > 32:
                store(o, j, A(total + x_i), 2, 3)
            x_i = whole
            total = A(total + x_i)
            x_i, whole = scan_warp(c)
            if left > 64:
                store(o, k, A(total + x_i), 2, 3)
            x_i = whole
            total = A(total + x_i)
            x_i, whole = scan_warp(d)
            if left > 96:
                store(o, m, A(total + x_i), 2, 3)
            x_i = whole
            total = A(total + x_i)
