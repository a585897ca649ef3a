"""Reading and writing at places given by integers, on a GPU.

Operands are seen as ``[outer, axis, inner]``, C-contiguous. An index outside of its dimension is an error."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import I, N, T, block, fail, i64, load, pointer, quotient, rest, store, thread


def take(args: pointer[i64], x: pointer[T], index: pointer[I], o: pointer[T], elements: N, size: N, count: N,
         inner: N) -> block[256]:
    """A thread is an element of the result: x[outer, size, inner], index[count], o[outer, count, inner]."""
    item = N(block() * N(256) + thread())
    if item < elements:
        row = quotient(item, inner)
        place = i64(load(index, rest(row, count), 1, 3))
        if place < 0 or place >= size:
            fail(args, 1, row, place)
        else:
            start = N(N(N(quotient(row, count) * size) + N(place)) * inner)
            store(o, item, load(x, N(start + rest(item, inner)), 0, 3), 2, 3)
