"""Attention on CUDA cores: of float32 and float64, and of 16-bit floats with rows that are too long for tensor cores.

The same three kernels as in `attention`. A block has `R` rows of X and meets `R` rows of Y at a time. Both are read in
slices of `DEPTH` columns, the next one on its way into registers while one is multiplied, so that rows may have any length.
A thread has 2 `L` rows and `L` columns of the scores, ``s[column, row]``; they go through shared memory
to the second product, of which a block makes `W` columns, a thread `L` in every 16 `L`.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import exp, random_bits_block, select
from jitgrad.kernels.cuda.attention import SHARED, finish_row, locate_keys, locate_queries, read_draw, read_shift
from jitgrad.kernels.cuda.standins import (
    N,
    T as C,
    T as E,
    barrier,
    block,
    each,
    f32,
    i32,
    i64,
    load,
    load_lanes,
    multiply_add,
    pointer,
    reassociate_max,
    registers,
    shared,
    shuffle,
    store,
    store_lanes,
    thread,
)

L = R = W = DEPTH = WORDS = 0
"""Numbers that are put in: elements of an access of 16 bytes, rows of X and Y, columns of a chunk, of a slice; elements of
shared memory. `E` is the type of the elements, `C` that of sums."""

x = y = tile = ahead = va = vb = kept = found = n = group = queries = keys = run = period = mask_row = mask_size = wide = 0
column = first = far = k_start = v_start = low = per_head = shift = factor = 0
mask = seed = place_of_draw = limit = kept_scale = 0
"""What the pieces find in the kernels that they stand in."""


# ---- pieces ----------------------------------------------------------------------------------------------------------


def locate_thread() -> None:
    """Shared memory, and where in a tile of scores a thread's begin: at column `x` and row `y`."""
    tile = shared(0, C, WORDS)
    x = thread() % 16 * L
    y = thread() // 16 * L


def fetch(v: N, p: N, operand: N, from_: N, there: N) -> None:
    """`L` elements into registers: zeros where there are fewer."""
    room = there
    origin = from_
    for w in each(L):
        v[w] = C(0)
    if wide != 0:
        if room > 0:
            v[:L] = load_lanes(p, origin, L, operand, 14)
    else:
        for w in each(L):
            if room > w:
                v[w] = load(p, origin + w, operand, 14)


def fetch_slices(a: N, a_operand: N, a_place: N, a_count: N, b: N, b_operand: N, b_place: N, b_count: N, width: N) -> None:
    """The slices of X and Y that begin at column `ahead`."""
    for c in each(2):
        number = thread() + c * 128
        line = number // (DEPTH // L)
        at = number % (DEPTH // L) * L + ahead
        fetch(va[c], a, a_operand, a_place + line * width + at, width - at if line < a_count else 0)
        fetch(vb[c], b, b_operand, b_place + line * width + at, width - at if line < b_count else 0)


def keep_slices(into: N) -> None:
    """What was fetched, into shared memory, where it lies column by column."""
    for c in each(2):
        number = thread() + c * 128
        spot = into + number % (DEPTH // L) * (L * (R + L)) + number // (DEPTH // L)
        for w in each(L):
            store(tile, spot + w * (R + L), va[c, w], 13, 14)
            store(tile, spot + w * (R + L) + DEPTH * (R + L), vb[c, w], 13, 14)


def multiply_rows(s: N, a: N, a_operand: N, a_place: N, a_count: N, b: N, b_operand: N, b_place: N, b_count: N,
                  width: N) -> None:
    """s = X Y^T."""
    va, vb, fa, fb = registers(), registers(), registers(), registers()
    for j in each(L):
        for i in each(2 * L):
            s[j, i] = C(0)
    ahead = 0
    fetch_slices(a, a_operand, a_place, a_count, b, b_operand, b_place, b_count, width)
    keep_slices(0)
    barrier()
    for slice_ in range((width + (DEPTH - 1)) // DEPTH):
        out_of = slice_ % 2 * (2 * DEPTH * (R + L))
        ahead = (slice_ + 1) * DEPTH
        fetch_slices(a, a_operand, a_place, a_count, b, b_operand, b_place, b_count, width)
        for deep in range(DEPTH):
            fa[:L] = load_lanes(tile, out_of + deep * (R + L) + y, L, 13, 14)
            fa[L:2 * L] = load_lanes(tile, out_of + deep * (R + L) + y + 8 * L, L, 13, 14)
            fb[:L] = load_lanes(tile, out_of + (deep + DEPTH) * (R + L) + x, L, 13, 14)
            for j in each(L):
                for i in each(2 * L):
                    s[j, i] = multiply_add(fa[i], fb[j], s[j, i])
        keep_slices(2 * DEPTH * (R + L) - out_of)
        barrier()


def put_scores(s: N) -> None:
    """Scores into shared memory, column by column, behind the slices."""
    for j in each(L):
        for h in each(2):
            store_lanes(tile, 4 * DEPTH * (R + L) + (x + j) * (R + L) + y + h * 8 * L, s[j, h * L:h * L + L], 13, 14)


def fetch_rows(b: N, operand: N, place: N, count: N, width: N, column: N) -> None:
    """The rows of Y that begin at row `ahead`, of the chunk's columns."""
    for c in each(W // (8 * L)):
        number = thread() + c * 128
        line = number // (W // L) + ahead
        at = number % (W // L) * L + column
        fetch(vb[c], b, operand, place + line * width + at, width - at if line < count else 0)


def keep_rows(into: N) -> None:
    for c in each(W // (8 * L)):
        number = thread() + c * 128
        store_lanes(tile, into + number // (W // L) * (W + L) + number % (W // L) * L, vb[c, :L], 13, 14)


def multiply_columns(o: N, b: N, operand: N, place: N, count: N, width: N, column: N) -> None:
    """o += F Y, F being what `put_scores` put."""
    vb, fa, fb = registers(), registers(), registers()
    ahead = 0
    fetch_rows(b, operand, place, count, width, column)
    keep_rows(0)
    barrier()
    for slice_ in range(R // DEPTH):
        out_of = slice_ % 2 * (DEPTH * (W + L))
        ahead = (slice_ + 1) * DEPTH
        fetch_rows(b, operand, place, count, width, column)
        for deep in range(DEPTH):
            for h in each(2):
                spot = 4 * DEPTH * (R + L) + (slice_ * DEPTH + deep) * (R + L) + y + h * 8 * L
                fa[h * L:h * L + L] = load_lanes(tile, spot, L, 13, 14)
            for r in each(W // (16 * L)):
                fb[r * L:r * L + L] = load_lanes(tile, out_of + deep * (W + L) + x + r * 16 * L, L, 13, 14)
            for i in each(2 * L):
                for c in each(W // 16):
                    o[i, c] = multiply_add(fa[i], fb[c], o[i, c])
        keep_rows(DEPTH * (W + L) - out_of)
        barrier()


def clear(o: N) -> None:
    for i in each(2 * L):
        for c in each(W // 16):
            o[i, c] = C(0)


def put_rows(o: N, target: N, operand: N, place: N, count: N, width: N, column: N) -> None:
    """Store the chunk `o` of the rows at `place`."""
    for i in each(2 * L):
        line = y + i % L + i // L * 8 * L
        for r in each(W // (16 * L)):
            at = column + x + r * 16 * L
            if line < count and at < width:
                if wide != 0:
                    store_lanes(target, place + line * width + at, o[i, r * L:r * L + L], operand, 14)
                else:
                    for w in each(L):
                        if at + w < width:
                            store(target, place + line * width + at + w, o[i, r * L + w], operand, 14)


def add_mask(s: N, first: N, start: N, row_step: N, column_step: N, rows: N, columns: N) -> None:
    """What is added to the scores, of which there are `rows` x `columns`; where it is -inf nothing else counts."""
    matrix = (n // run * period + n % period) * mask_size
    for i in each(2 * L):
        line = matrix + min(first + y + i % L + i // L * 8 * L, rows - 1) * row_step
        for j in each(L):
            added = load(mask, line + min(start + x + j, columns - 1) * column_step, 4, 14)
            s[j, i] = select(added > C(-1e999), C(s[j, i] + added), added)


def draw(position: N, found: N) -> None:
    """A bit for each of `L` neighbours from `position` on: they are in one block of random numbers or in two."""
    u = registers()
    u[:4] = random_bits_block(seed, place_of_draw, i64(position >> 2))
    skip = i32(position & 3)
    for w in each(4):
        u[w + 4] = u[w]
    if skip > 4 - L:
        u[4:8] = random_bits_block(seed, place_of_draw, i64(i64(position >> 2) + 1))
    found = i32(0)
    for w in each(L):
        word = select(skip < 2, select(skip == 0, u[w], u[w + 1]), select(skip == 2, u[w + 2], u[w + 3]))
        found = i32(found | i32(i32(i32(word >> 8) >= limit) << w))


def draw_rows(kept: N, first: N, start: N) -> None:
    """A bit for each score of this thread, rows being queries."""
    kept = i32(0)
    for number in range(2 * L):
        row = first + y + number % L + number // L * (8 * L)
        position = i64(i64(i64(i64(n) * i64(queries)) + i64(row)) * i64(keys) + i64(start + x))
        draw(position, found)
        kept = i32(kept | i32(found << i32(number * L)))


def draw_columns(kept: N, first: N, start: N) -> None:
    """The same where columns are queries: neighbours are rows."""
    kept = i32(0)
    for number in range(2 * L):
        query = start + x + number // 2
        row = first + y + number % 2 * (8 * L)
        position = i64(i64(i64(i64(n) * i64(queries)) + i64(query)) * i64(keys) + i64(row))
        draw(position, found)
        kept = i32(kept | i32(found << i32(number * L)))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def attention(q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64], offset: pointer[i64],
              p: pointer[f32], scale: pointer[C], o: pointer[E], lse: pointer[C], queries: N, keys: N, width: N,
              values: N, times: N, masked: N, run: N, period: N, mask_row: N, mask_size: N, causal: N, zero: N, dropped: N,
              tiles: N, chunks: N) -> block[128]:
    """X is q, Y is k and v."""
    s, o_, top, total = registers(), registers(), registers(), registers()
    locate_thread()
    read_draw(key, offset, p, scale)
    locate_queries(R)
    for i in each(2 * L):
        top[i] = C(-1e999)
        total[i] = C(0)
    clear(o_)
    for step in range((far + (R - 1)) // R):
        start = step * R
        multiply_rows(s, q, 1, (n * queries + first) * width, queries - first, k, 2, k_start + start * width, keys - start,
                      width)
        if masked != 0:
            add_mask(s, first, start, mask_row, 1, queries, keys)
        if dropped != 0:
            draw_rows(kept, first, start)
        for i in each(2 * L):
            seen = keys if causal == 0 else min(keys, first + y + i % L + i // L * 8 * L + 1)
            best = top[i]
            for j in each(L):
                s[j, i] = select(start + x + j < seen, s[j, i], C(-1e999))
                best = reassociate_max(best, s[j, i])
            for d in each(4):
                best = reassociate_max(best, shuffle(best, 1 << d))
            shift = select(best > C(-1e999), best, C(0))
            less = exp(C(top[i] - shift))
            top[i] = best
            total[i] = C(total[i] * less)
            for j in each(L):
                s[j, i] = exp(C(s[j, i] - shift))
                total[i] = C(total[i] + s[j, i])
                if dropped != 0:
                    s[j, i] = C(s[j, i] * select((i32(kept >> (i * L + j)) & 1) != 0, kept_scale, C(0)))
            for c in each(W // 16):
                o_[i, c] = C(o_[i, c] * less)
        put_scores(s)
        multiply_columns(o_, v, 3, v_start + start * values, keys - start, values, column)
    for i in each(2 * L):
        for d in each(4):
            total[i] = C(total[i] + shuffle(total[i], 1 << d))
        row = first + y + i % L + i // L * 8 * L
        finish_row(factor, total[i], top[i], row, x)
        for c in each(W // 16):
            o_[i, c] = C(o_[i, c] * factor)
    put_rows(o_, o, 9, (n * queries + first) * values, queries - first, values, column)


def attention_queries(g: pointer[E], q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64],
                      offset: pointer[i64], p: pointer[f32], scale: pointer[C], lse: pointer[C], dots: pointer[C],
                      dq: pointer[E], queries: N, keys: N, width: N, values: N, times: N, masked: N, run: N, period: N,
                      mask_row: N, mask_size: N, causal: N, zero: N, dropped: N, tiles: N, chunks: N) -> block[128]:
    """X is q and g, Y is k and v."""
    s, d, o_, shift, dot = registers(), registers(), registers(), registers(), registers()
    locate_thread()
    read_draw(key, offset, p, scale)
    locate_queries(R)
    for i in each(2 * L):
        row = min(first + y + i % L + i // L * 8 * L, queries - 1)
        dot[i] = load(dots, n * queries + row, 11, 14)
        read_shift(shift[i], n * queries + row)
    clear(o_)
    for step in range((far + (R - 1)) // R):
        start = step * R
        multiply_rows(s, q, 1, (n * queries + first) * width, queries - first, k, 2, k_start + start * width, keys - start,
                      width)
        multiply_rows(d, g, 0, (n * queries + first) * values, queries - first, v, 3, v_start + start * values,
                      keys - start, values)
        if masked != 0:
            add_mask(s, first, start, mask_row, 1, queries, keys)
        if dropped != 0:
            draw_rows(kept, first, start)
        for i in each(2 * L):
            seen = keys if causal == 0 else min(keys, first + y + i % L + i // L * 8 * L + 1)
            for j in each(L):
                weight = exp(C(select(start + x + j < seen, s[j, i], C(-1e999)) - shift[i]))
                if dropped != 0:
                    d[j, i] = C(d[j, i] * select((i32(kept >> (i * L + j)) & 1) != 0, kept_scale, C(0)))
                s[j, i] = C(weight * C(d[j, i] - dot[i]))
        put_scores(s)
        multiply_columns(o_, k, 2, k_start + start * width, keys - start, width, column)
    put_rows(o_, dq, 12, (n * queries + first) * width, queries - first, width, column)


def attention_keys(g: pointer[E], q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64],
                   offset: pointer[i64], p: pointer[f32], scale: pointer[C], lse: pointer[C], dots: pointer[C],
                   dk: pointer[E], dv: pointer[E], queries: N, keys: N, width: N, values: N, times: N, masked: N, run: N,
                   period: N, mask_row: N, mask_size: N, causal: N, zero: N, dropped: N, tiles: N,
                   chunks: N) -> block[128]:
    """X is k and v, Y is q and g of all heads that k serves; scores lie transposed."""
    s, d, dk_, dv_ = registers(), registers(), registers(), registers()
    locate_thread()
    read_draw(key, offset, p, scale)
    locate_keys(R, R)
    clear(dk_)
    clear(dv_)
    for step in range(times * per_head):
        n = group * times + step // per_head
        start = low + step % per_head * R
        multiply_rows(s, k, 2, (group * keys + first) * width, keys - first, q, 1, (n * queries + start) * width,
                      queries - start, width)
        multiply_rows(d, v, 3, (group * keys + first) * values, keys - first, g, 0, (n * queries + start) * values,
                      queries - start, values)
        if masked != 0:
            add_mask(s, first, start, 1, mask_row, keys, queries)
        if dropped != 0:
            draw_columns(kept, first, start)
        for j in each(L):
            query = start + x + j
            place = n * queries + min(query, queries - 1)
            dot = load(dots, place, 11, 14)
            read_shift(shift, place)
            for i in each(2 * L):
                there = query < queries and (causal == 0 or first + y + i % L + i // L * 8 * L <= query)
                weight = select(there, exp(C(s[j, i] - shift)), C(0))
                slope = d[j, i]
                s[j, i] = weight
                if dropped != 0:
                    factor = select((i32(kept >> (j * 2 * L + i)) & 1) != 0, kept_scale, C(0))
                    s[j, i] = C(weight * factor)
                    slope = C(slope * factor)
                d[j, i] = select(there, C(weight * C(slope - dot)), C(0))
        put_scores(s)
        multiply_columns(dv_, g, 0, (n * queries + start) * values, queries - start, values, column)
        put_scores(d)
        multiply_columns(dk_, q, 1, (n * queries + start) * width, queries - start, width, column)
    put_rows(dk_, dk, 12, (group * keys + first) * width, keys - first, width, column)
    put_rows(dv_, dv, 12, (group * keys + first) * values, keys - first, values, column)


PIECES = (*SHARED, locate_thread, fetch, fetch_slices, keep_slices, multiply_rows, put_scores, fetch_rows, keep_rows,
          multiply_columns, clear, put_rows, add_mask, draw, draw_rows, draw_columns)
