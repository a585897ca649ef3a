"""Copies into a part of a result, on a GPU: concatenation, padding, writing into a slice; and planes turned into lines.

What is copied is contiguous and looked at in units of up to 16 bytes, `LANES` elements of the integer type `T`. Where a unit
goes is said by a table of int64, a few numbers for each dimension of the rows."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import (
    ACROSS,
    LANES,
    PIECE,
    N,
    T,
    barrier,
    block,
    i64,
    load,
    load_lanes,
    pointer,
    quotient,
    rest,
    shared,
    store,
    store_lanes,
    thread,
)


def place_rows(x: pointer[T], o: pointer[T], dims: pointer[i64], units: N, inner: N, first: N, step: N,
               rank: N) -> block[256]:
    """A thread is a unit of x. Rows of `inner` units lie `step` apart in o, from `first` on; `dims` has the size and the
    stride in o of every dimension of the rows."""
    item = N(block() * N(256) + thread())
    if item < units:
        row = quotient(item, inner)
        place = N(first + rest(item, inner) * step)
        for k in range(rank):
            d = N(2 * (rank - 1 - k))
            size = N(load(dims, d, 2, 3))
            place = N(place + rest(row, size) * N(load(dims, d + 1, 2, 3)))
            row = quotient(row, size)
        store_lanes(o, N(place * LANES), load_lanes(x, N(item * LANES), LANES, 0, 3), 1, 3)


def pad_rows(x: pointer[T], o: pointer[T], dims: pointer[i64], units: N, rank: N) -> block[256]:
    """A thread is a unit of o, zero where there is none of x. `dims` has for every dimension its size in o, how much of it
    is in front of x, its size and its stride in x."""
    item = N(block() * N(256) + thread())
    if item < units:
        left, place, inside = item, N(0), N(1)
        for k in range(rank):
            d = N(4 * (rank - 1 - k))
            size = N(load(dims, d, 2, 3))
            here = N(rest(left, size) - N(load(dims, d + 1, 2, 3)))
            if here < 0 or here >= N(load(dims, d + 2, 2, 3)):
                inside = N(0)
            place = N(place + here * N(load(dims, d + 3, 2, 3)))
            left = quotient(left, size)
        if inside != 0:
            store_lanes(o, N(item * LANES), load_lanes(x, N(place * LANES), LANES, 0, 3), 1, 3)
        else:
            for k in range(LANES):
                store(o, N(item * LANES + k), T(0), 1, 3)


def turn_planes(x: pointer[T], o: pointer[T], planes: N, positions: N, wanted: N, groups: N, bands: N,
                strips: N) -> block[256]:
    """x[n, g, plane, position] becomes o[n, position, g, plane], with zeros for planes up to `wanted` of a group, a multiple
    of `PIECE`. A block turns a tile of 8 * `PIECE` planes and `ACROSS` positions: `LANES` positions are read at once, which
    `positions` is a multiple of, and `PIECE` planes, 16 bytes, are written. In between, the eight pieces of a position are
    in an order of its own, so that the threads of a warp meet in few banks both ways."""
    tile = shared(0, T, 8 * PIECE * ACROSS)
    item = N(block())
    column = N(rest(item, strips) * N(ACROSS))
    row = N(rest(quotient(item, strips), bands) * N(8 * PIECE))
    group = N(quotient(quotient(item, strips), bands))
    for k in range(PIECE * ACROSS // (32 * LANES)):
        unit = N(N(k * 256) + thread())
        y, x0 = quotient(unit, N(ACROSS // LANES)), N(rest(unit, N(ACROSS // LANES)) * N(LANES))
        there = N(row + y) < planes and N(column + x0) < positions
        place = N(N(N(N(group * planes) + N(row + y)) * positions) + N(column + x0))
        read = load_lanes(x, place if there else N(0), LANES, 0, 3)
        for i in range(LANES):
            at = N(x0 + N(i))
            turned = N(quotient(y, N(PIECE)) ^ N(N(at ^ quotient(at, 8)) & N(7)))
            value = read[i] if there else T(0)
            store(tile, N(N(at * N(8 * PIECE)) + N(N(turned * N(PIECE)) + rest(y, N(PIECE)))), value, 2, 3)
    barrier()
    for k in range((8 * ACROSS + 255) // 256):
        unit = N(N(k * 256) + thread())
        at, piece = quotient(unit, N(8)), rest(unit, N(8))
        first = N(row + N(piece * N(PIECE)))
        if at < ACROSS and N(column + at) < positions and first < wanted:
            turned = N(piece ^ N(N(at ^ quotient(at, 8)) & N(7)))
            line = N(N(quotient(group, groups) * positions) + N(column + at))
            place = N(N(N(N(line * groups) + rest(group, groups)) * wanted) + first)
            store_lanes(o, place, load_lanes(tile, N(N(at * N(8 * PIECE)) + N(turned * N(PIECE))), PIECE, 2, 3), 1, 3)
