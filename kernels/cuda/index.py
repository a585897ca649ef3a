"""Reading and writing at places given by integers, on a GPU.

Operands are seen as ``[outer, axis, inner]``, C-contiguous, or by a table of sizes and strides. An index outside of its
dimension is an error, and what it names is left out. Elements that are only carried about are looked at in units of up to
16 bytes: `LANES` integers of type `T`.

No result depends on the order in which threads run. Of several writers of a place the last in the order of the index is
found by the largest position (`mark_last`, `mark_elements`), a maximum of integers. What is added to one place is added by
one thread, in the order of the index: in a line of its own (`add_lines`), or after `kernels.cuda.sort` has brought positions
that name the same place together (`add_rows`), which is stable. Integers of 32 and 64 bits, whose sums are the same in any
order, are added by whoever comes (`count_rows`), where places are few in shared memory first (`count_few`)."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import (
    LANES,
    I,
    N,
    T,
    atomic_add,
    atomic_max,
    barrier,
    block,
    fail,
    i32,
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
    u32,
)


def take(args: pointer[i64], x: pointer[T], index: pointer[I], o: pointer[T], units: N, size: N, count: N,
         inner: N) -> block[256]:
    """A thread is a unit of the result: x[outer, size, inner], index[count], o[outer, count, inner]."""
    item = N(block() * N(256) + thread())
    if item < units:
        row = quotient(item, inner)
        place = i64(load(index, rest(row, count), 1, 3))
        if place < 0 or place >= size:
            fail(args, 1, row, place)
        else:
            start = N(N(N(quotient(row, count) * size) + N(place)) * inner)
            store_lanes(o, N(item * LANES), load_lanes(x, N(N(start + rest(item, inner)) * LANES), LANES, 0, 3), 2, 3)


def fill(o: pointer[T], count: N, value: N) -> block[256]:
    """A thread is an element."""
    item = N(block() * N(256) + thread())
    if item < count:
        store(o, item, T(value), 0, 1)


# ---- rows --------------------------------------------------------------------------------------------------------------


def mark_last(args: pointer[i64], index: pointer[I], last: pointer[i32], count: N, size: N) -> block[256]:
    """A thread is a position of index[count]: last[size] gets the largest position that names a row."""
    item = N(block() * N(256) + thread())
    if item < count:
        place = i64(load(index, item, 0, 2))
        if place < 0 or place >= size:
            fail(args, 1, item, place)
        else:
            atomic_max(last, N(place), item)


def update_rows(index: pointer[I], source: pointer[T], last: pointer[i32], o: pointer[T], units: N, size: N, count: N,
                inner: N) -> block[256]:
    """A thread is a unit of source[outer, count, inner], which goes to o[outer, size, inner] if its position is the last one
    that names the row."""
    item = N(block() * N(256) + thread())
    if item < units:
        row = quotient(item, inner)
        position = rest(row, count)
        place = i64(load(index, position, 0, 4))
        if place >= 0 and place < size and load(last, N(place), 2, 4) == position:
            start = N(N(N(quotient(row, count) * size) + N(place)) * inner)
            target = N(N(start + rest(item, inner)) * LANES)
            store_lanes(o, target, load_lanes(source, N(item * LANES), LANES, 1, 4), 3, 4)


def row_keys(args: pointer[i64], index: pointer[I], keys: pointer[u32], count: N, size: N) -> block[256]:
    """A thread is a position of the index: the row that it names, `size` where there is none."""
    item = N(block() * N(256) + thread())
    if item < count:
        place = i64(load(index, item, 0, 2))
        if place < 0 or place >= size:
            fail(args, 1, item, place)
            place = i64(size)
        store(keys, item, u32(place), 1, 2)


def add_rows(keys: pointer[u32], order: pointer[i32], source: pointer[T], o: pointer[T], elements: N, size: N, count: N,
             inner: N) -> block[256]:
    """A thread is an element of a slot of the sorted keys: the first slot of a row adds the source[outer, count, inner] of
    all of them, in order, to o[outer, size, inner]."""
    item = N(block() * N(256) + thread())
    if item < elements:
        slot = rest(quotient(item, inner), count)
        outer = quotient(quotient(item, inner), count)
        row = load(keys, slot, 0, 4)
        is_first = N(1)
        if slot > 0 and load(keys, N(slot - 1), 0, 4) == row:
            is_first = N(0)
        if is_first != 0 and N(row) < size:
            step = N(1)
            while N(slot + step) < count and load(keys, min(N(slot + step), N(count - 1)), 0, 4) == row:
                step = N(step * 2)
            low = N(slot + quotient(step, 2))                   # the last one known to name the row
            end = N(min(N(slot + step), count))                 # names it no more
            while N(end - low) > 1:
                middle = N(low + quotient(N(end - low), 2))
                if load(keys, middle, 0, 4) == row:
                    low = middle
                else:
                    end = middle
            column, base = rest(item, inner), N(outer * count)
            place = N(N(N(N(outer * size) + N(row)) * inner) + column)
            total = load(o, place, 3, 4)
            at = slot
            while N(at + 4) <= end:
                a = N(N(N(base + N(load(order, at, 1, 4))) * inner) + column)
                b = N(N(N(base + N(load(order, N(at + 1), 1, 4))) * inner) + column)
                c = N(N(N(base + N(load(order, N(at + 2), 1, 4))) * inner) + column)
                d = N(N(N(base + N(load(order, N(at + 3), 1, 4))) * inner) + column)
                w, x, y, z = load(source, a, 2, 4), load(source, b, 2, 4), load(source, c, 2, 4), load(source, d, 2, 4)
                total = T(T(T(T(total + w) + x) + y) + z)
                at = N(at + 4)
            while at < end:
                total = T(total + load(source, N(N(N(base + N(load(order, at, 1, 4))) * inner) + column), 2, 4))
                at = N(at + 1)
            store(o, place, total, 3, 4)


def count_rows(args: pointer[i64], index: pointer[I], source: pointer[T], o: pointer[T], elements: N, size: N, count: N,
               inner: N) -> block[256]:
    """A thread is an element of source[outer, count, inner], which it adds to the row of o[outer, size, inner] that
    index[count] names."""
    item = N(block() * N(256) + thread())
    if item < elements:
        line = quotient(item, inner)
        slot = rest(line, count)
        place = i64(load(index, slot, 0, 3))
        if place < 0 or place >= size:
            fail(args, 1, slot, place)
        else:
            start = N(N(N(quotient(line, count) * size) + N(place)) * inner)
            atomic_add(o, N(start + rest(item, inner)), load(source, item, 1, 3))


def count_few(args: pointer[i64], index: pointer[I], source: pointer[T], o: pointer[T], count: N, size: N,
              stride: N) -> block[256]:
    """A thread adds the elements of source[count] that are `stride` apart to those of o[size] that index[count] names, of
    which there are at most 8192: its block's sums come first."""
    sums = shared(0, T, 8192)
    for step in range(i32(thread()), i32(size), i32(256)):
        store(sums, step, T(0), 3, 4)
    barrier()
    for item in range(N(block() * N(256) + thread()), count, stride):
        place = i64(load(index, item, 0, 4))
        if place < 0 or place >= size:
            fail(args, 1, item, place)
        else:
            atomic_add(sums, N(place), load(source, item, 1, 4))
    barrier()
    for step in range(i32(thread()), i32(size), i32(256)):
        total = load(sums, step, 3, 4)
        if total != 0:
            atomic_add(o, N(step), total)


# ---- elements ----------------------------------------------------------------------------------------------------------


def gather(args: pointer[i64], x: pointer[T], index: pointer[I], o: pointer[T], dims: pointer[i64], units: N, size: N,
           stride: N, rank: N) -> block[256]:
    """A thread is a place of the index. `dims` has for each dimension of the index its size and its stride in x, 0 for the
    axis, which has `size` and `stride` there."""
    item = N(block() * N(256) + thread())
    if item < units:
        place = i64(load(index, item, 1, 4))
        left, start = item, N(0)
        for k in range(rank):
            d = N(2 * (rank - 1 - k))
            extent = N(load(dims, d, 3, 4))
            start = N(start + rest(left, extent) * N(load(dims, d + 1, 3, 4)))
            left = quotient(left, extent)
        if place < 0 or place >= size:
            fail(args, 1, item, place)
        else:
            start = N(start + N(place) * stride)
            store_lanes(o, N(item * LANES), load_lanes(x, N(start * LANES), LANES, 0, 4), 2, 4)


def element_keys(args: pointer[i64], index: pointer[I], dims: pointer[i64], keys: pointer[u32], units: N, size: N,
                 stride: N, nowhere: N, rank: N) -> block[256]:
    """A thread is a place of the index, as of `gather`: where in x it is, `nowhere` if it is in no place of x."""
    item = N(block() * N(256) + thread())
    if item < units:
        place = i64(load(index, item, 0, 3))
        left, start = item, N(0)
        for k in range(rank):
            d = N(2 * (rank - 1 - k))
            extent = N(load(dims, d, 1, 3))
            start = N(start + rest(left, extent) * N(load(dims, d + 1, 1, 3)))
            left = quotient(left, extent)
        if place < 0 or place >= size:
            fail(args, 1, item, place)
            start = nowhere
        else:
            start = N(start + N(place) * stride)
        store(keys, item, u32(start), 2, 3)


def mark_elements(keys: pointer[u32], last: pointer[i32], count: N, size: N) -> block[256]:
    """A thread is a key: last[size] gets the largest position that has it."""
    item = N(block() * N(256) + thread())
    if item < count:
        place = N(load(keys, item, 0, 2))
        if place < size:
            atomic_max(last, place, item)


def update_elements(keys: pointer[u32], source: pointer[T], last: pointer[i32], o: pointer[T], count: N,
                    size: N) -> block[256]:
    """A thread is an element of the source, which goes to its place in o[size] if its position is the last one for it."""
    item = N(block() * N(256) + thread())
    if item < count:
        place = N(load(keys, item, 0, 4))
        if place < size and load(last, place, 2, 4) == item:
            store_lanes(o, N(place * LANES), load_lanes(source, N(item * LANES), LANES, 1, 4), 3, 4)


def add_lines(keys: pointer[u32], source: pointer[T], o: pointer[T], lines: N, count: N, inner: N, size: N) -> block[256]:
    """A thread is a line of the source along the axis, ``[outer, count, inner]``, whose elements are added one by one."""
    item = N(block() * N(256) + thread())
    if item < lines:
        start = N(N(quotient(item, inner) * N(count * inner)) + rest(item, inner))
        for k in range(count):
            position = N(start + N(k) * inner)
            place = N(load(keys, position, 0, 3))
            if place < size:
                store(o, place, T(load(o, place, 2, 3) + load(source, position, 1, 3)), 2, 3)
