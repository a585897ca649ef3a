"""Copies into a part of a result, on a GPU: concatenation, padding, writing into a slice.

What is copied is contiguous and looked at in units of up to 16 bytes, `LANES` elements of the integer type `T`. Where a unit
goes is said by a table of int64, a few numbers for each dimension of the rows."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import (
    LANES,
    N,
    T,
    block,
    i64,
    load,
    load_lanes,
    pointer,
    quotient,
    rest,
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
