"""Stable sorting of lines on a GPU: merge sort, by keys of 32 or 64 bits that are ordered as the elements are.

A line of ``x[outer, size, inner]`` of at most 2048 elements is sorted by one block in shared memory, short lines several
of them (`sort_lines`). A longer one is cut into pieces of 2048 (`sort_pieces`), and sorted pieces are merged two and two
until there is one (`merge_pieces`), every element by itself: a binary search in the other piece says how far behind it
goes. For the first few elements of a long line, only as many of every piece are kept, again and again. Keys and where their
elements stood are all that is moved; the elements follow at the end (`write_sorted`). A long line of bools is parted instead
(`write_parted`): how many are True up to each one says where it goes.

What is searched is operand 0, as `helpers` demands."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import (
    K,
    N,
    T,
    barrier,
    block,
    boolean,
    count_below,
    i16,
    i32,
    i64,
    load,
    order_key,
    pointer,
    quotient,
    rest,
    select,
    shared,
    sort_shared,
    store,
    thread,
)


def sort_lines(x: pointer[T], values: pointer[T], indices: pointer[i64], lines: N, size: N, inner: N, kept: N, run: N,
               span: N, flip: N) -> block[256]:
    """A block sorts ``span // run`` lines, of which each has `run` places, a power of two; the first `kept` are written.
    `flip`: -1 for a descending order, 0 for an ascending one."""
    keys, places = shared(0, K, 4096), shared(1, i16, 4096)
    first = N(block() * quotient(span, run))
    for step in range(i32(thread()), i32(span), i32(256)):
        line, i = N(first + quotient(N(step), run)), rest(N(step), run)
        key = K(-1)
        if i < size and line < lines:
            place = N(N(N(quotient(line, inner) * size + i) * inner) + rest(line, inner))
            key = K(order_key(load(x, place, 2, 5)) ^ K(flip))
        store(keys, step, key, 0, 5)
        store(places, step, i, 1, 5)
    barrier()
    begin = sort_shared(keys, places, i32(span), i32(run))
    for step in range(i32(thread()), i32(span), i32(256)):
        line, i = N(first + quotient(N(step), run)), rest(N(step), run)
        if i < kept and line < lines:
            found = load(places, i32(begin + step), 1, 5)
            place = N(N(N(quotient(line, inner) * size + N(found)) * inner) + rest(line, inner))
            target = N(N(N(quotient(line, inner) * kept + i) * inner) + rest(line, inner))
            store(values, target, load(x, place, 2, 5), 3, 5)
            store(indices, target, found, 4, 5)


def sort_pieces(x: pointer[T], places_in: pointer[i32], keys_out: pointer[K], places_out: pointer[i32], pieces: N, size: N,
                inner: N, kept: N, stride: N, run: N, flip: N, again: N) -> block[256]:
    """A block sorts a piece of a line; the first `kept` keys, and where they stood in the line, go to [line, stride].
    `again`: 1 if x are keys that were kept before, of places_in[line, size], 0 if nothing is known of them."""
    keys, places = shared(0, K, 4096), shared(1, i16, 4096)
    line, piece = quotient(N(block()), pieces), rest(N(block()), pieces)
    first = N(piece * 2048)
    for step in range(i32(thread()), i32(run), i32(256)):
        i = N(first + step)
        key = K(-1)
        if i < size:
            place = N(N(N(quotient(line, inner) * size + i) * inner) + rest(line, inner))
            key = K(order_key(load(x, place, 2, 6)) ^ K(flip))
        store(keys, step, key, 0, 6)
        store(places, step, step, 1, 6)
    barrier()
    begin = sort_shared(keys, places, i32(run), i32(run))
    for step in range(i32(thread()), i32(run), i32(256)):
        i = N(piece * kept + step)
        if step < kept and i < stride:
            target, found = N(line * stride + i), N(first + N(load(places, i32(begin + step), 1, 6)))
            if again != 0:
                found = N(load(places_in, N(line * size + found), 3, 6))
            store(keys_out, target, load(keys, i32(begin + step), 0, 6), 4, 6)
            store(places_out, target, found, 5, 6)


def merge_pieces(keys_in: pointer[K], places_in: pointer[i32], keys_out: pointer[K], places_out: pointer[i32], elements: N,
                 size: N, width: N) -> block[256]:
    """A thread is an element of ``[lines, size]``, in which pieces of `width` are sorted, afterwards those of twice that."""
    item = N(block() * N(256) + thread())
    if item < elements:
        line, i = quotient(item, size), rest(item, size)
        start = N(line * size)
        low = N(start + quotient(i, N(2 * width)) * N(2 * width))
        middle, high = N(min(N(low + width), N(start + size))), N(min(N(low + 2 * width), N(start + size)))
        key = load(keys_in, item, 0, 4)
        is_right = item >= middle
        begin, end = N(select(is_right, low, middle)), N(select(is_right, middle, high))
        target = N(item + count_below(begin, end, keys_in, key, is_right) - middle)
        store(keys_out, target, key, 2, 4)
        store(places_out, target, load(places_in, item, 1, 4), 3, 4)


def write_sorted(x: pointer[T], places: pointer[i32], values: pointer[T], indices: pointer[i64], elements: N, size: N,
                 inner: N, kept: N, stride: N) -> block[256]:
    """A thread is an element of the results ``[outer, kept, inner]``; `places` are [line, stride]."""
    item = N(block() * N(256) + thread())
    if item < elements:
        line, i = quotient(item, kept), rest(item, kept)
        found = N(load(places, N(line * stride + i), 1, 4))
        outer, across = quotient(line, inner), rest(line, inner)
        target = N(N(N(outer * kept + i) * inner) + across)
        store(values, target, load(x, N(N(N(outer * size + found) * inner) + across), 0, 4), 2, 4)
        store(indices, target, found, 3, 4)


def write_parted(x: pointer[boolean], counts: pointer[i32], values: pointer[boolean], indices: pointer[i64], elements: N,
                 size: N, inner: N, kept: N, flip: N) -> block[256]:
    """A thread is an element of ``[outer, size, inner]``; counts[outer, size, inner] are of those that are True, up to and
    with each one. `flip`: -1 if these come first."""
    item = N(block() * N(256) + thread())
    if item < elements:
        row, across = quotient(item, inner), rest(item, inner)
        outer, i = quotient(row, size), rest(row, size)
        last = N(N(N(outer * size) + N(size - 1)) * inner + across)
        count, total = N(load(counts, item, 1, 4)), N(load(counts, last, 1, 4))
        value = load(x, item, 0, 4)
        first = N(select(value, N(count - 1), N(total + i - count)))
        target = N(select(flip != 0, first, N(select(value, N(size - total + count - 1), N(i - count)))))
        if target < kept:
            place = N(N(N(outer * kept + target) * inner) + across)
            store(values, place, value, 2, 4)
            store(indices, place, i, 3, 4)
