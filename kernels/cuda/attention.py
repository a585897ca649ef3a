"""Attention of 16-bit floats on tensor cores: no score is ever in global memory.

The scheme is that of T. Dao, *FlashAttention-2* (2023, arXiv:2307.08691). Forward, a block of threads has `ROWS` queries of
a head and goes through the keys, `T` at a time, with a running maximum and sum. Backward makes the weights again from the
logarithm of the softmax's denominator, twice: `attention_queries` has a block for some queries and gives the gradient of
q, `attention_keys` one for some keys and gives those of k and v. So every sum has one owner and one order, and results
are the same each time.

Each of them multiplies rows that it has (X) with rows that come by (Y). Both lie in shared memory, rows of `D` elements,
swizzled so that what a matrix load reads at once lies in different banks; scores stay in registers, where they become
factors of the second product. A block makes `W` columns of the result, a *chunk*; what is wider than `W` is made by several
blocks, which compute the scores for themselves. See `jitgrad.ops.attention` for the operands, and `codegen.cuda_unroll` for
how arrays of registers are written. Random numbers are those of the scores' positions, as on the CPU.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import ceil, log, random_bits_block, select
from jitgrad.kernels.cuda.standins import (
    N,
    T as C,
    T as E,
    barrier,
    block,
    copy_async,
    copy_commit,
    copy_wait,
    each,
    f32,
    i16,
    i32,
    i64,
    load,
    load_lanes,
    load_matrix_x4,
    load_matrix_x4_transposed,
    multiply,
    multiply_add,
    pack,
    pointer,
    pointer_as,
    quick_exp2,
    reassociate_max,
    registers,
    shared,
    shared_address,
    shuffle,
    store,
    store_lanes,
    thread,
    warp_barrier,
)

D = W = T = M = THREADS = ROWS = SHIFT = BITS = WORDS = LOG2_E = 0
"""Numbers that are put in: elements of a row in shared memory, of a chunk; rows of Y, fragments of 16 rows of X per warp,
threads, rows of X; what of a row's number turns its pieces; words of shared
memory. `E` is the type of the elements, `C` that of sums."""

memory = x_base = x_turn = y_base = y_turn = z_base = z_turn = lane = warp = member = words = halves = 0
n = group = queries = keys = width = values = times = tiles = chunks = run = period = mask_row = mask_size = wide = 0
column = first = far = k_start = v_start = low = per_head = causal = zero = lse = shift = factor = 0
mask = seed = place_of_draw = limit = kept_scale = dropped = 0
"""What the pieces find in the kernels that they stand in."""

# ---- pieces, also of attention on CUDA cores ---------------------------------------------------------------------------


def locate_queries(rows: N) -> None:
    """The columns that a block makes and its `rows` queries, from `first` on, of head `n`; where keys and values of the head
    begin, and how many keys are seen."""
    column = block() % chunks * W
    n = block() // chunks // tiles
    first = (tiles - 1 - block() // chunks % tiles) * rows              # first those that see most keys
    k_start = n // times * keys * width
    v_start = n // times * keys * values
    far = keys if causal == 0 else min(keys, first + rows)


def locate_keys(rows: N, turns: N) -> None:
    """The columns that a block makes and its `rows` keys, from `first` on, of the heads of a `group`. Queries from `low` on
    see them, of each head in `per_head` tiles of `turns`."""
    column = block() % chunks * W
    group = block() // chunks // tiles
    first = block() // chunks % tiles * rows
    low = 0 if causal == 0 else min(first, queries) // turns * turns    # queries before it see none of these keys
    per_head = (queries - low + (turns - 1)) // turns


def read_draw(key: N, offset: N, p: N, scale: N) -> None:
    """What dropout needs to know."""
    seed = i64(0)
    place_of_draw = i64(0)
    limit = i32(0)
    kept_scale = C(0)
    if dropped != 0:
        seed = load(key, 0, 5, 14)
        place_of_draw = load(offset, 0, 6, 14)
        limit = i32(ceil(f32(load(p, 0, 7, 14) * f32(16777216))))
        kept_scale = load(scale, 0, 8, 14)


def read_shift(shift: N, place: N) -> None:
    """The logarithm of the denominator of a query; of one that sees nothing NaN, or 0 where its weights are to be 0."""
    shift = load(lse, place, 10, 14)
    if not shift > C(-1e999):
        shift = C(0) if zero != 0 else C(shift - shift)


def finish_row(factor: N, total: N, top: N, row: N, member: N) -> None:
    """What the result of a query is multiplied by; one thread stores the logarithm of the denominator."""
    if member == 0 and column == 0 and row < queries:
        store(lse, n * queries + row, C(log(total) + top), 10, 14)
    factor = C(C(1) / total)
    if zero != 0 and total == C(0):
        factor = C(1)


SHARED = (locate_queries, locate_keys, read_draw, read_shift, finish_row)

# ---- pieces ----------------------------------------------------------------------------------------------------------


def locate_fragments() -> None:
    """Shared memory, and which rows of 16 bytes each lane names: of X, of Y read along rows, of Y read along columns."""
    words = shared(0, i32, WORDS)
    halves = pointer_as(words, i16)
    memory = shared_address(words)
    lane = thread() % 32
    warp = thread() // 32
    member = lane % 4
    x_line = warp * (16 * M) + lane % 16
    x_base = x_line * (2 * D)
    x_turn = ((lane >> 4) ^ ((x_line >> SHIFT) & BITS)) * 16
    y_line = (lane >> 4) * 8 + lane % 8
    y_base = y_line * (2 * D)
    y_turn = (((lane >> 3) & 1) ^ ((y_line >> SHIFT) & BITS)) * 16
    z_line = lane % 16
    z_base = z_line * (2 * D)
    z_turn = ((lane >> 4) ^ ((z_line >> SHIFT) & BITS)) * 16


def copy_tile(bits: N, operand: N, place: N, count: N, width: N, column: N, across: N, rows: N, into: N) -> None:
    """Begin to copy `across` columns of `rows` rows, from `column` of the row at `place` on, of which `count` rows and
    `width` columns exist; zeros for the others."""
    for c in each((rows * (across // 8) + THREADS - 1) // THREADS):
        number = thread() + c * THREADS
        if number < rows * (across // 8):
            line = number // (across // 8)
            at = number % (across // 8) * 8
            spot = into + line * (2 * D) + ((at >> 3) ^ ((line >> SHIFT) & BITS)) * 16
            there = max(0, min(width - column - at, 8)) if line < count else 0
            origin = place + line * width + column + at
            if wide != 0:
                copy_async(memory + spot, bits, origin, there * 2)
            else:
                for piece in range(8):
                    half = i16(0)
                    if piece < there:
                        half = load(bits, origin + piece, operand, 14)
                    store(halves, (spot >> 1) + piece, half, 13, 14)


def multiply_rows(s: N, x_into: N, y_into: N) -> None:
    """s = X Y^T: 16 M rows of X of this warp, all rows of Y."""
    a, b = registers(), registers()
    for i in each(M):
        for j in each(T // 8):
            for w in each(4):
                s[i, j, w] = f32(0)
    for slice_ in range(D // 16):
        turn = slice_ * 32
        for i in each(M):
            a[i, :4] = load_matrix_x4(memory + x_into + x_base + i * 32 * D + (x_turn ^ turn))
        for j in each(T // 16):
            b[:4] = load_matrix_x4(memory + y_into + y_base + j * 32 * D + (y_turn ^ turn))
            for i in each(M):
                for h in each(2):
                    s[i, 2 * j + h, :4] = multiply(a[i, :4], b[2 * h:2 * h + 2], s[i, 2 * j + h, :4])


def pack_factor(f: N, s: N) -> None:
    """Scores as the left factor of a product: what lies in a thread is what a thread needs."""
    for i in each(M):
        for j in each(T // 16):
            for w in each(4):
                f[i, j, w] = pack(s[i, 2 * j + w // 2, w % 2 * 2], s[i, 2 * j + w // 2, w % 2 * 2 + 1])


def multiply_columns(o: N, f: N, y_into: N, column: N) -> None:
    """o += F Y: the chunk of Y that begins at `column`."""
    b = registers()
    for j in each(T // 16):
        for c in each(W // 16):
            b[:4] = load_matrix_x4_transposed(memory + y_into + z_base + j * 32 * D + (z_turn ^ (column * 2 + c * 32)))
            for i in each(M):
                for h in each(2):
                    o[i, 2 * c + h, :4] = multiply(f[i, j, :4], b[2 * h:2 * h + 2], o[i, 2 * c + h, :4])


def clear(o: N) -> None:
    for i in each(M):
        for c in each(W // 8):
            for w in each(4):
                o[i, c, w] = f32(0)


def put_rows(o: N, target: N, bits: N, operand: N, place: N, count: N, width: N, column: N, into: N) -> None:
    """Store the chunk `o` of the rows of this warp at `place`, by way of its own rows of X, which nobody needs any more."""
    target_words = pointer_as(target, i32)
    for i in each(M):
        for h in each(2):
            line = warp * (16 * M) + i * 16 + h * 8 + lane // 4
            for c in each(W // 8):
                spot = into + line * (2 * D) + (c ^ ((line >> SHIFT) & BITS)) * 16
                store(words, (spot >> 2) + member, pack(o[i, c, 2 * h], o[i, c, 2 * h + 1]), 13, 14)
    warp_barrier()
    for r in each(M * W // 16):
        number = lane + r * 32
        line = warp * (16 * M) + number // (W // 8)
        at = number % (W // 8) * 8
        spot = into + line * (2 * D) + ((at >> 3) ^ ((line >> SHIFT) & BITS)) * 16
        if line < count and column + at < width:
            goal = place + line * width + column + at
            if wide != 0:
                store_lanes(target_words, goal >> 1, load_lanes(words, spot >> 2, 4, 13, 14), operand, 14)
            else:
                for piece in range(min(8, width - column - at)):
                    store(bits, goal + piece, load(halves, (spot >> 1) + piece, 13, 14), operand, 14)


def draw_rows(kept: N, first: N, start: N) -> None:
    """A bit for each score of this thread, rows being queries: neighbours are mostly of one block of random numbers."""
    u = registers()
    for i in each(M):
        kept[i] = i32(0)
        for number in range(T // 4):
            row = first + warp * (16 * M) + i * 16 + number // (T // 8) * 8 + lane // 4
            at = start + number % (T // 8) * 8 + member * 2
            position = i64(i64(i64(i64(n) * i64(queries)) + i64(row)) * i64(keys) + i64(at))
            u[:4] = random_bits_block(seed, place_of_draw, i64(position >> 2))
            second = i64(position & 2) != 0
            odd = i64(position & 1) != 0
            one = select(odd, select(second, u[3], u[1]), select(second, u[2], u[0]))
            two = select(odd, u[2], select(second, u[3], u[1]))
            if odd and second:
                u[:4] = random_bits_block(seed, place_of_draw, i64(i64(position >> 2) + 1))
                two = u[0]
            found = i32(i32(i32(one >> 8) >= limit) | i32(i32(i32(two >> 8) >= limit) << 1))
            kept[i] = i32(kept[i] | i32(found << i32(2 * number)))


def draw_columns(kept: N, first: N, start: N) -> None:
    """The same where columns are queries."""
    u = registers()
    for i in each(M):
        kept[i] = i32(0)
        for number in range(T // 2):
            row = first + warp * (16 * M) + i * 16 + number // (T // 4) * 8 + lane // 4
            at = start + number % (T // 4) // 2 * 8 + member * 2 + number % 2
            position = i64(i64(i64(i64(n) * i64(queries)) + i64(at)) * i64(keys) + i64(row))
            u[:4] = random_bits_block(seed, place_of_draw, i64(position >> 2))
            second = i64(position & 2) != 0
            one = select(i64(position & 1) != 0, select(second, u[3], u[1]), select(second, u[2], u[0]))
            kept[i] = i32(kept[i] | i32(i32(i32(one >> 8) >= limit) << i32(number)))


def drop(s: N, kept: N) -> None:
    """Scores times 0 or the scale of what is kept."""
    for i in each(M):
        for j in each(T // 8):
            for w in each(4):
                bit = i32(kept[i] >> (2 * (w // 2 * (T // 8) + j) + w % 2)) & 1
                s[i, j, w] = f32(s[i, j, w] * select(bit != 0, kept_scale, f32(0)))


def hide_unseen(s: N, first: N, start: N) -> None:
    """Scores of keys that are not there, or must not be seen, are -inf."""
    if start + T > keys or (causal != 0 and start + T > first + warp * (16 * M) + 1):
        for i in each(M):
            for h in each(2):
                seen = keys if causal == 0 else min(keys, first + warp * (16 * M) + i * 16 + h * 8 + lane // 4 + 1)
                for j in each(T // 8):
                    for w in each(2):
                        s[i, j, 2 * h + w] = select(start + j * 8 + member * 2 + w < seen, s[i, j, 2 * h + w],
                                                    f32(-1e999))


def add_mask(s: N, first: N, start: N, row_step: N, column_step: N, rows: N, columns: N) -> None:
    """What is added to the scores, of which there are `rows` x `columns`; where it is -inf nothing else counts."""
    matrix = (n // run * period + n % period) * mask_size
    for i in each(M):
        for h in each(2):
            line = matrix + min(first + warp * (16 * M) + i * 16 + h * 8 + lane // 4, rows - 1) * row_step
            for j in each(T // 8):
                for w in each(2):
                    added = load(mask, line + min(start + j * 8 + member * 2 + w, columns - 1) * column_step, 4, 14)
                    s[i, j, 2 * h + w] = select(added > f32(-1e999), f32(s[i, j, 2 * h + w] + added), added)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def attention_dots(g: pointer[E], o: pointer[E], dots: pointer[C], rows: N, values: N) -> block[256]:
    """What the gradient and the result of a query have in common, a warp for each."""
    lane = thread() % 32
    row = block() * 8 + thread() // 32
    if row < rows:
        total = C(0)
        for step in range((values + 31) // 32):
            at = step * 32 + lane
            if at < values:
                total = C(total + C(load(g, row * values + at, 0, 3) * load(o, row * values + at, 1, 3)))
        for d in each(5):
            total = C(total + shuffle(total, 1 << d))
        if lane == 0:
            store(dots, row, total, 2, 3)


def attention(q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64], offset: pointer[i64],
              p: pointer[f32], scale: pointer[f32], o: pointer[E], lse: pointer[f32], queries: N, keys: N, width: N,
              values: N, times: N, masked: N, run: N, period: N, mask_row: N, mask_size: N, causal: N, zero: N, dropped: N,
              tiles: N, chunks: N) -> block[THREADS]:
    """X is q, Y is k, then v, each of which is copied while the other one is multiplied."""
    s, o_, f, top, total, kept = registers(), registers(), registers(), registers(), registers(), registers()
    q_bits, k_bits, v_bits, o_bits = pointer_as(q, i16), pointer_as(k, i16), pointer_as(v, i16), pointer_as(o, i16)
    locate_fragments()
    read_draw(key, offset, p, scale)
    locate_queries(ROWS)
    for i in each(M):
        for h in each(2):
            top[i, h] = f32(-1e999)
            total[i, h] = f32(0)
    clear(o_)
    copy_tile(q_bits, 1, (n * queries + first) * width, queries - first, width, 0, D, ROWS, 0)
    copy_tile(k_bits, 2, k_start, keys, width, 0, D, T, 2 * ROWS * D)
    copy_commit()
    for step in range((far + (T - 1)) // T):
        start = step * T
        copy_wait(0)
        barrier()
        copy_tile(v_bits, 3, v_start + start * values, keys - start, values, column, W, T, 2 * ROWS * D + 2 * T * D)
        copy_commit()
        multiply_rows(s, 0, 2 * ROWS * D)
        if masked != 0:
            add_mask(s, first, start, mask_row, 1, queries, keys)
        hide_unseen(s, first, start)
        for i in each(M):
            for h in each(2):
                best = top[i, h]
                for j in each(T // 8):
                    best = reassociate_max(best, reassociate_max(s[i, j, 2 * h], s[i, j, 2 * h + 1]))
                best = reassociate_max(best, shuffle(best, 1))
                best = reassociate_max(best, shuffle(best, 2))
                shift = f32(select(best > f32(-1e999), best, f32(0)) * f32(LOG2_E))
                less = quick_exp2(f32(f32(top[i, h] * f32(LOG2_E)) - shift))
                top[i, h] = best
                total[i, h] = f32(total[i, h] * less)
                for j in each(T // 8):
                    for w in each(2):
                        s[i, j, 2 * h + w] = quick_exp2(multiply_add(s[i, j, 2 * h + w], f32(LOG2_E),
                                                                     f32(-shift)))
                        total[i, h] = f32(total[i, h] + s[i, j, 2 * h + w])
                for c in each(W // 8):
                    for w in each(2):
                        o_[i, c, 2 * h + w] = f32(o_[i, c, 2 * h + w] * less)
        if dropped != 0:
            draw_rows(kept, first, start)
            drop(s, kept)
        pack_factor(f, s)
        copy_wait(0)
        barrier()
        if start + T < far:
            copy_tile(k_bits, 2, k_start + (start + T) * width, keys - start - T, width, 0, D, T, 2 * ROWS * D)
            copy_commit()
        multiply_columns(o_, f, 2 * ROWS * D + 2 * T * D, 0)
    copy_wait(0)
    barrier()
    for i in each(M):
        for h in each(2):
            whole = total[i, h]
            whole = f32(whole + shuffle(whole, 1))
            whole = f32(whole + shuffle(whole, 2))
            row = first + warp * (16 * M) + i * 16 + h * 8 + lane // 4
            finish_row(factor, whole, top[i, h], row, member)
            for c in each(W // 8):
                for w in each(2):
                    o_[i, c, 2 * h + w] = f32(o_[i, c, 2 * h + w] * factor)
    put_rows(o_, o, o_bits, 9, (n * queries + first) * values, queries - first, values, column, 0)


def attention_queries(g: pointer[E], q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64],
                      offset: pointer[i64], p: pointer[f32], scale: pointer[f32], lse: pointer[f32], dots: pointer[f32],
                      dq: pointer[E], queries: N, keys: N, width: N, values: N, times: N, masked: N, run: N, period: N,
                      mask_row: N, mask_size: N, causal: N, zero: N, dropped: N, tiles: N,
                      chunks: N) -> block[THREADS]:
    """X is q and g, Y is k and v; the next two tiles are copied while these are multiplied."""
    s, d, o_, f, shift, dot, kept = (registers(), registers(), registers(), registers(), registers(), registers(),
                                     registers())
    q_bits, g_bits, k_bits, v_bits = pointer_as(q, i16), pointer_as(g, i16), pointer_as(k, i16), pointer_as(v, i16)
    o_bits = pointer_as(dq, i16)
    locate_fragments()
    read_draw(key, offset, p, scale)
    locate_queries(ROWS)
    for i in each(M):
        for h in each(2):
            row = min(first + warp * (16 * M) + i * 16 + h * 8 + lane // 4, queries - 1)
            dot[i, h] = load(dots, n * queries + row, 11, 14)
            read_shift(shift[i, h], n * queries + row)
            shift[i, h] = f32(shift[i, h] * f32(LOG2_E))
    clear(o_)
    copy_tile(q_bits, 1, (n * queries + first) * width, queries - first, width, 0, D, ROWS, 0)
    copy_tile(g_bits, 0, (n * queries + first) * values, queries - first, values, 0, D, ROWS, 2 * ROWS * D)
    copy_tile(k_bits, 2, k_start, keys, width, 0, D, T, 4 * ROWS * D)
    copy_tile(v_bits, 3, v_start, keys, values, 0, D, T, 4 * ROWS * D + 2 * T * D)
    copy_commit()
    for step in range((far + (T - 1)) // T):
        start = step * T
        near = 4 * ROWS * D + step % 2 * (4 * T * D)
        copy_wait(0)
        barrier()
        if start + T < far:
            later = start + T
            next_ = 4 * ROWS * D + (step + 1) % 2 * (4 * T * D)
            copy_tile(k_bits, 2, k_start + later * width, keys - later, width, 0, D, T, next_)
            next_values = next_ + 2 * T * D
            copy_tile(v_bits, 3, v_start + later * values, keys - later, values, 0, D, T, next_values)
            copy_commit()
        near_values = near + 2 * T * D
        multiply_rows(s, 0, near)
        multiply_rows(d, 2 * ROWS * D, near_values)
        if masked != 0:
            add_mask(s, first, start, mask_row, 1, queries, keys)
        hide_unseen(s, first, start)
        if dropped != 0:
            draw_rows(kept, first, start)
            drop(d, kept)
        for i in each(M):
            for j in each(T // 8):
                for w in each(4):
                    weight = quick_exp2(multiply_add(s[i, j, w], f32(LOG2_E), f32(-shift[i, w // 2])))
                    s[i, j, w] = f32(weight * f32(d[i, j, w] - dot[i, w // 2]))
        pack_factor(f, s)
        multiply_columns(o_, f, near, column)
    copy_wait(0)
    barrier()
    put_rows(o_, dq, o_bits, 12, (n * queries + first) * width, queries - first, width, column, 0)


def attention_keys(g: pointer[E], q: pointer[E], k: pointer[E], v: pointer[E], mask: pointer[E], key: pointer[i64],
                   offset: pointer[i64], p: pointer[f32], scale: pointer[f32], lse: pointer[f32], dots: pointer[f32],
                   dk: pointer[E], dv: pointer[E], queries: N, keys: N, width: N, values: N, times: N, masked: N, run: N,
                   period: N, mask_row: N, mask_size: N, causal: N, zero: N, dropped: N, tiles: N,
                   chunks: N) -> block[THREADS]:
    """X is k and v, Y is q and g of all heads that k serves; scores lie transposed."""
    s, d, dk_, dv_, f, kept = registers(), registers(), registers(), registers(), registers(), registers()
    q_bits, g_bits, k_bits, v_bits = pointer_as(q, i16), pointer_as(g, i16), pointer_as(k, i16), pointer_as(v, i16)
    dk_bits, dv_bits = pointer_as(dk, i16), pointer_as(dv, i16)
    locate_fragments()
    read_draw(key, offset, p, scale)
    locate_keys(ROWS, T)
    clear(dk_)
    clear(dv_)
    steps = times * per_head
    copy_tile(k_bits, 2, (group * keys + first) * width, keys - first, width, 0, D, ROWS, 0)
    copy_tile(v_bits, 3, (group * keys + first) * values, keys - first, values, 0, D, ROWS, 2 * ROWS * D)
    if steps > 0:
        begin = group * times * queries + low
        copy_tile(q_bits, 1, begin * width, queries - low, width, 0, D, T, 4 * ROWS * D)
        copy_tile(g_bits, 0, begin * values, queries - low, values, 0, D, T, 4 * ROWS * D + 2 * T * D)
    copy_commit()
    for step in range(steps):
        n = group * times + step // per_head
        start = low + step % per_head * T
        near = 4 * ROWS * D + step % 2 * (4 * T * D)
        copy_wait(0)
        barrier()
        if step + 1 < steps:
            later = low + (step + 1) % per_head * T
            begin = (group * times + (step + 1) // per_head) * queries + later
            next_ = 4 * ROWS * D + (step + 1) % 2 * (4 * T * D)
            copy_tile(q_bits, 1, begin * width, queries - later, width, 0, D, T, next_)
            next_values = next_ + 2 * T * D
            copy_tile(g_bits, 0, begin * values, queries - later, values, 0, D, T, next_values)
            copy_commit()
        near_values = near + 2 * T * D
        multiply_rows(s, 0, near)
        multiply_rows(d, 2 * ROWS * D, near_values)
        if masked != 0:
            add_mask(s, first, start, 1, mask_row, keys, queries)
        if dropped != 0:
            draw_columns(kept, first, start)
        for j in each(T // 8):
            for w in each(2):
                query = start + j * 8 + member * 2 + w
                place = n * queries + min(query, queries - 1)
                dot = load(dots, place, 11, 14)
                read_shift(shift, place)
                power = f32(shift * f32(LOG2_E))
                for i in each(M):
                    for h in each(2):
                        row = first + warp * (16 * M) + i * 16 + h * 8 + lane // 4
                        weight = quick_exp2(multiply_add(s[i, j, 2 * h + w], f32(LOG2_E), f32(-power)))
                        weight = select(query < queries and (causal == 0 or row <= query), weight, f32(0))
                        slope = d[i, j, 2 * h + w]
                        s[i, j, 2 * h + w] = weight
                        if dropped != 0:
                            bit = i32(kept[i] >> (2 * (h * (T // 8) + j) + w)) & 1
                            factor = select(bit != 0, kept_scale, f32(0))
                            s[i, j, 2 * h + w] = f32(weight * factor)
                            slope = f32(slope * factor)
                        d[i, j, 2 * h + w] = f32(weight * f32(slope - dot))
        pack_factor(f, s)
        multiply_columns(dv_, f, near_values, column)
        pack_factor(f, d)
        multiply_columns(dk_, f, near, column)
    copy_wait(0)
    barrier()
    put_rows(dk_, dk, dk_bits, 12, (group * keys + first) * width, keys - first, width, column, 0)
    put_rows(dv_, dv, dv_bits, 12, (group * keys + first) * values, keys - first, values, column, 2 * ROWS * D)


PIECES = (*SHARED, locate_fragments, copy_tile, multiply_rows, pack_factor, multiply_columns, clear, put_rows,
          draw_rows, draw_columns, drop, hide_unseen, add_mask)
