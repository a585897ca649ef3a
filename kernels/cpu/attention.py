"""Attention on the register tile: scores of a block of queries and keys are in a buffer on the stack and nowhere else.

Forward, an item is a block of queries of one head: it goes through the blocks of keys with a running maximum and sum
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Backward, an item is a head of k and v, or a
part of its keys, with all heads of q that it serves: for each block of keys it makes the weights of each block of queries
again. Each part has a gradient of q of its own; where there are several they are added up afterwards. Products that read
k or v transposed have them packed in panels, by `gemm_pack.pack_source`. See `jitgrad.ops.attention` for the operands.

Dropout makes the random bits of a line of scores beside it, wherever that line is made: they are those of the scores'
positions in [N, L, S] and of nothing else, so both passes drop the same ones, however the work is cut.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.math import ceil, exp_of_score, log, select
from jitgrad.kernels.cpu.philox import random_bits_block
from jitgrad.kernels.cpu.scalar import f32, f32 as T, f64, i32
from jitgrad.kernels.cpu.standins import i64, load, pointer, reassociate_add, reassociate_max, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import PANEL_BYTES, make_panel, multiply_block

COLUMNS, TILE = 32, 14                          # of the register tile; `source` puts the machine's in their places
KEYS = 128                                      # of a block; `source` too
ROOM = 1 << 14                                  # elements of a buffer on the stack; `source` too
STEP = 64                                       # elements of a line of scores that are looked at together
MOST = 96                                       # queries of a block, at the most
SPARE = 16                                      # elements between lines of scores: they shall not lie a power of two apart
MORE = 32                                       # random numbers that a line of them may have in front and behind
ARGUMENTS = ("queries", "keys", "width", "values", "times", "masked", "run", "period", "mask_row", "causal", "zero",
             "dropped", "block", "blocks")
"""The integers of both kernels: sizes L, S, E, V; heads of q per head of k; whether there is a mask, how many heads are in
a run of it and how many matrices it has for them in turn, and the distance of its rows; both attributes; whether weights
are dropped; queries of a block; and blocks of queries per head."""
HEADS = ("first", "inner", "outer", "within", "row")
"""Where matrices lie (`jitgrad.ir.strides.Heads`): five integers for each operand that is named so in the kernels."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    tile = element_tile(element)
    spelled = text(KERNELS[kernel], T=element)
    for name, number in {"COLUMNS": tile.columns, "TILE": tile.rows, "KEYS": block_of_keys(element),
                         "STEP": min(STEP, block_of_keys(element)), "MOST": MOST, "SPARE": SPARE, "MORE": MORE,
                         "ROOM": PANEL_BYTES // (4 if element == "f32" else 8)}.items():
        spelled = spelled.replace(name, str(number))
    return spelled


def block_of_queries(element: str, keys: int, causal: bool) -> int:
    """Rows of a block of scores: whole tiles. Where queries see about half of few keys, a low block leaves out more."""
    rows = element_tile(element).rows
    return (28 if causal and keys <= block_of_keys(element) else 70) // rows * rows


def block_of_keys(element: str) -> int:
    """Columns of a block of scores: whole panels."""
    return 4 * element_tile("f32").columns if element == "f32" else 2 * element_tile("f32").columns


def attention(args, begin, end, thread):
    """Arguments: q, packed k, v, mask; key, offset, p, scale (of dropout); out, lse, what scores are multiplied
    with; `ARGUMENTS`, whether they are, `HEADS` of q, v and out. Items: blocks of queries of all heads."""
    q, k, v, mask, o, lse = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                             pointer(args, 9, T), pointer(args, 10, T))
    queries, keys, width, values, times = args[12], args[13], args[14], args[15], args[16]
    masked, run, period, mask_row, causal, zero = args[17], args[18], args[19], args[20], args[21], args[22]
    dropped, block_rows, blocks = args[23], args[24], args[25]
    scaled = args[26]
    q_first, q_inner, q_outer, q_within, q_row = args[27], args[28], args[29], args[30], args[31]
    v_first, v_inner, v_outer, v_within, v_row = args[32], args[33], args[34], args[35], args[36]
    o_first, o_inner, o_outer, o_within, o_row = args[37], args[38], args[39], args[40], args[41]
    line_of = min((keys + STEP - 1) // STEP * STEP, KEYS) + SPARE
    panels = (keys + COLUMNS - 1) // COLUMNS
    scores = make_panel(o)
    stats = make_panel(o)
    kept = make_panel(o)
    key, offset, limit, scale = i64(0), i64(0), i64(0), T(0)
    if dropped != 0:
        key, offset = load(pointer(args, 5, i64), 0, 8, 13), load(pointer(args, 6, i64), 0, 9, 13)
        limit = 256 * i64(ceil(f64(load(pointer(args, 7, f32), 0, 10, 13)) * f64(16777216)))
        scale = load(pointer(args, 8, T), 0, 11, 13)
    factor = T(1)
    if scaled != 0:
        factor = load(pointer(args, 11, T), 0, 12, 13)
    for item in range(begin, end):
        n = item // blocks
        first = item % blocks * block_rows
        rows = min(block_rows, queries - first)
        group = n // times
        q_place = q_first + n // q_inner * q_outer + n % q_inner * q_within + first * q_row
        v_place = v_first + group // v_inner * v_outer + group % v_inner * v_within
        o_place = o_first + n // o_inner * o_outer + n % o_inner * o_within + first * o_row
        last = keys
        if causal != 0:
            last = min(keys, first + rows)
        for i in range(rows):
            store(stats, i, T(-1e999), 6, 13)
            store(stats, MOST + i, T(0), 6, 13)
        for start in range(0, last, KEYS):
            count = min(KEYS, last - start)
            wide = (count + STEP - 1) // STEP * STEP
            whole = min((count + COLUMNS - 1) // COLUMNS * COLUMNS, keys - start)
            multiply_block(args, 42, rows, whole, width, width, TILE,
                           q, q_place, TILE * q_row, q_row, 1,
                           k, (group * panels + start // COLUMNS) * width * COLUMNS, width * COLUMNS, COLUMNS,
                           scores, 0, line_of, 0)
            times_factor = factor
            if masked != 0:
                times_factor = T(1)
                for i in range(rows):
                    line = i * line_of
                    above = (n // run * period + n % period) * keys * max(mask_row // keys * queries, 1)
                    above += (first + i) * mask_row + start
                    for j in range(count):
                        added = load(mask, above + j, 2, 13)
                        score_j = T(load(scores, line + j, 5, 13) * factor)
                        store(scores, line + j, T(select(added > T(-1e999), T(score_j + added), added)), 5, 13)
            for i in range(rows):
                line = i * line_of
                seen = count
                if causal != 0:
                    seen = max(min(count, first + i + 1 - start), 0)
                best = load(stats, i, 6, 13)
                if seen < wide:
                    for j in range(wide):
                        score_j = T(select(i32(j) < i32(seen), T(load(scores, line + j, 5, 13) * times_factor), T(-1e999)))
                        store(scores, line + j, score_j, 5, 13)
                        best = reassociate_max(best, score_j)
                else:
                    for j in range(wide):
                        score_j = T(load(scores, line + j, 5, 13) * times_factor)
                        store(scores, line + j, score_j, 5, 13)
                        best = reassociate_max(best, score_j)
                store(stats, 2 * MOST + i, best, 6, 13)
            for i in range(rows):                       # apart, so that a line need not wait for its maximum
                line = i * line_of
                best = load(stats, 2 * MOST + i, 6, 13)
                shift = T(select(best > T(-1e999), best, T(0)))
                total = T(0)
                for j in range(wide):
                    weight = T(exp_of_score(T(load(scores, line + j, 5, 13) - shift)))
                    store(scores, line + j, weight, 5, 13)
                    total = reassociate_add(total, weight)
                store(stats, 3 * MOST + i, total, 6, 13)
            for i in range(rows):                       # what came before is worth less where there is a new maximum
                best = load(stats, 2 * MOST + i, 6, 13)
                shift = T(select(best > T(-1e999), best, T(0)))
                less = T(exp_of_score(T(load(stats, i, 6, 13) - shift)))
                store(stats, i, best, 6, 13)
                store(stats, MOST + i, T(load(stats, MOST + i, 6, 13) * less + load(stats, 3 * MOST + i, 6, 13)), 6, 13)
                store(stats, 3 * MOST + i, less, 6, 13)
            if dropped != 0:
                for i in range(rows):
                    line = i * line_of
                    score = (n * queries + first + i) * keys + start
                    skip = score % 4
                    for b in range(wide // 4 + min(skip, 1) * 8):
                        w, x, y, z = random_bits_block(key, offset, score // 4 + b)
                        store(kept, 4 * b, T(select(i64(w) >= limit, scale, T(0))), 7, 13)
                        store(kept, 4 * b + 1, T(select(i64(x) >= limit, scale, T(0))), 7, 13)
                        store(kept, 4 * b + 2, T(select(i64(y) >= limit, scale, T(0))), 7, 13)
                        store(kept, 4 * b + 3, T(select(i64(z) >= limit, scale, T(0))), 7, 13)
                    for j in range(wide):
                        store(scores, line + j, T(load(scores, line + j, 5, 13) * load(kept, skip + j, 7, 13)), 5, 13)
            if start > 0:
                for i in range(rows):
                    place = o_place + i * o_row
                    less = load(stats, 3 * MOST + i, 6, 13)
                    if less != T(1):
                        for j in range(values):
                            store(o, place + j, T(load(o, place + j, 3, 13) * less), 3, 13)
            multiply_block(args, 42, rows, values, count, count, TILE, scores, 0, TILE * line_of, line_of, 1,
                           v, v_place + start * v_row, COLUMNS, v_row, o, o_place, o_row, start)
        for i in range(rows):
            total = load(stats, MOST + i, 6, 13)
            store(lse, n * queries + first + i, T(log(total) + load(stats, i, 6, 13)), 4, 13)
            store(stats, MOST + i, T(T(1) / T(select(zero * i64(total == T(0)) != 0, T(1), total))), 6, 13)
        for i in range(rows):
            place = o_place + i * o_row
            less = load(stats, MOST + i, 6, 13)
            for j in range(values):
                store(o, place + j, T(load(o, place + j, 3, 13) * less), 3, 13)


def attention_dots(args, begin, end, thread):
    """Arguments: g, out, dots; L, V, `HEADS` of g and out. Items: `KEYS` queries of a head. What a query's gradient and
    result have in common."""
    g, o, dots = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    queries, values = args[4], args[5]
    g_first, g_inner, g_outer, g_within, g_row = args[6], args[7], args[8], args[9], args[10]
    o_first, o_inner, o_outer, o_within, o_row = args[11], args[12], args[13], args[14], args[15]
    blocks = (queries + KEYS - 1) // KEYS
    for item in range(begin, end):
        n = item // blocks
        g_place = g_first + n // g_inner * g_outer + n % g_inner * g_within
        o_place = o_first + n // o_inner * o_outer + n % o_inner * o_within
        for i in range(item % blocks * KEYS, min((item % blocks + 1) * KEYS, queries)):
            total = T(0)
            for j in range(values):
                product = T(load(g, g_place + i * g_row + j, 0, 3) * load(o, o_place + i * o_row + j, 1, 3))
                total = reassociate_add(total, product)
            store(dots, n * queries + i, total, 2, 3)


def attention_grad(args, begin, end, thread):
    """Arguments: g, q, k, mask; key, offset, p, scale (of dropout); lse, dots, packed k, packed v, dq (parts of them, if
    there are several), dk, dv, what scores are multiplied with; `ARGUMENTS`, parts, keys of a part, the distance of
    parts, whether scores are multiplied (2: so is dq), `HEADS` of g, q, k, dq, dk and dv. Items: parts of all heads of k."""
    g, q, k, mask, lse, dots = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                                pointer(args, 9, T), pointer(args, 10, T))
    k_panels, v_panels, dq, dk, dv = (pointer(args, 11, T), pointer(args, 12, T), pointer(args, 13, T),
                                      pointer(args, 14, T), pointer(args, 15, T))
    queries, keys, width, values, times = args[17], args[18], args[19], args[20], args[21]
    masked, run, period, mask_row, causal, zero = args[22], args[23], args[24], args[25], args[26], args[27]
    dropped, block_rows, parts, keys_of_part, apart = args[28], args[29], args[31], args[32], args[33]
    scaled = args[34]
    g_first, g_inner, g_outer, g_within, g_row = args[35], args[36], args[37], args[38], args[39]
    q_first, q_inner, q_outer, q_within, q_row = args[40], args[41], args[42], args[43], args[44]
    k_first, k_inner, k_outer, k_within, k_row = args[45], args[46], args[47], args[48], args[49]
    dq_first, dq_inner, dq_outer, dq_within, dq_row = args[50], args[51], args[52], args[53], args[54]
    dk_first, dk_inner, dk_outer, dk_within, dk_row = args[55], args[56], args[57], args[58], args[59]
    dv_first, dv_inner, dv_outer, dv_within, dv_row = args[60], args[61], args[62], args[63], args[64]
    line_of = min((keys + STEP - 1) // STEP * STEP, KEYS) + SPARE
    panels = (keys + COLUMNS - 1) // COLUMNS
    weights = make_panel(dq)
    slopes = make_panel(dq)
    kept = make_panel(dq)
    dk_panel = make_panel(dq)
    dv_panel = make_panel(dq)
    key, offset, limit, scale = i64(0), i64(0), i64(0), T(0)
    if dropped != 0:
        key, offset = load(pointer(args, 5, i64), 0, 12, 17), load(pointer(args, 6, i64), 0, 13, 17)
        limit = 256 * i64(ceil(f64(load(pointer(args, 7, f32), 0, 14, 17)) * f64(16777216)))
        scale = load(pointer(args, 8, T), 0, 15, 17)
    factor = T(1)
    steepness = T(1)                            # what the gradients of scores are multiplied with
    if scaled != 0:
        factor = load(pointer(args, 16, T), 0, 16, 17)
    if scaled == 2:
        steepness = factor
    dk_factor = factor if scaled == 1 else T(1)
    gathered = KEYS * max(width, values) <= ROOM
    for item in range(begin, end):
        group = item // parts
        part = item % parts
        k_place = k_first + group // k_inner * k_outer + group % k_inner * k_within
        dk_place = dk_first + group // dk_inner * dk_outer + group % dk_inner * dk_within
        dv_place = dv_first + group // dv_inner * dv_outer + group % dv_inner * dv_within
        first_key = part * keys_of_part
        blind = 0                               # queries that see none of these keys; the first ones reach all the others
        if keys == 0:
            blind = queries
        elif causal != 0:
            blind = min(first_key // block_rows * block_rows, queries)
        for n in range(group * times, (group + 1) * times):
            dq_place = part * apart + dq_first + n // dq_inner * dq_outer + n % dq_inner * dq_within
            for i in range(blind):
                for j in range(width):
                    store(dq, dq_place + i * dq_row + j, T(0), 6, 17)
        for start in range(first_key, min(first_key + keys_of_part, keys), KEYS):
            count = min(KEYS, keys - start)
            dk_lines, dk_at, dk_step = dk, dk_place + start * dk_row, dk_row
            dv_lines, dv_at, dv_step = dv, dv_place + start * dv_row, dv_row
            if gathered:
                dk_lines, dk_at, dk_step = dk_panel, 0, width
                dv_lines, dv_at, dv_step = dv_panel, 0, values
            started = 0
            for n in range(group * times, (group + 1) * times):
                g_place = g_first + n // g_inner * g_outer + n % g_inner * g_within
                q_place = q_first + n // q_inner * q_outer + n % q_inner * q_within
                dq_place = part * apart + dq_first + n // dq_inner * dq_outer + n % dq_inner * dq_within
                begin_query = 0
                if causal != 0:
                    begin_query = start // block_rows * block_rows
                blocks = (queries - begin_query + block_rows - 1) // block_rows
                for block in range(blocks):
                    first = begin_query + (blocks - 1 - block) * block_rows            # first those that see most keys
                    rows = min(block_rows, queries - first)
                    near = count
                    if causal != 0 and started != 0:
                        near = max(min(count, first + rows - start), 1)
                    wide = (near + STEP - 1) // STEP * STEP
                    whole = min((near + COLUMNS - 1) // COLUMNS * COLUMNS, keys - start)
                    query = n * queries + first
                    panel = group * panels + start // COLUMNS
                    multiply_block(args, 65, rows, whole, width, width, TILE,
                                   q, q_place + first * q_row, TILE * q_row, q_row, 1,
                                   k_panels, panel * width * COLUMNS, width * COLUMNS, COLUMNS, weights, 0, line_of, 0)
                    multiply_block(args, 65, rows, whole, values, values, TILE,
                                   g, g_place + first * g_row, TILE * g_row, g_row, 1,
                                   v_panels, panel * values * COLUMNS, values * COLUMNS, COLUMNS, slopes, 0, line_of, 0)
                    times_factor = factor
                    if masked != 0:
                        times_factor = T(1)
                        for i in range(rows):
                            line = i * line_of
                            above = (n // run * period + n % period) * keys * max(mask_row // keys * queries, 1)
                            above += (first + i) * mask_row + start
                            for j in range(near):
                                added = load(mask, above + j, 3, 17)
                                score_j = T(load(weights, line + j, 9, 17) * factor)
                                store(weights, line + j, T(select(added > T(-1e999), T(score_j + added), added)), 9, 17)
                    if dropped != 0:
                        for i in range(rows):
                            line = i * line_of
                            line_kept = i * (line_of + MORE)
                            score = (query + i) * keys + start
                            skip = score % 4
                            for b in range(wide // 4 + min(skip, 1) * (MORE // 4)):
                                w, x, y, z = random_bits_block(key, offset, score // 4 + b)
                                place = line_kept + 4 * b
                                store(kept, place, T(select(i64(w) >= limit, scale, T(0))), 11, 17)
                                store(kept, place + 1, T(select(i64(x) >= limit, scale, T(0))), 11, 17)
                                store(kept, place + 2, T(select(i64(y) >= limit, scale, T(0))), 11, 17)
                                store(kept, place + 3, T(select(i64(z) >= limit, scale, T(0))), 11, 17)
                            for j in range(wide):
                                slope = T(load(slopes, line + j, 10, 17) * load(kept, line_kept + skip + j, 11, 17))
                                store(slopes, line + j, slope, 10, 17)
                    for i in range(rows):
                        line = i * line_of
                        seen = near
                        if causal != 0:
                            seen = max(min(near, first + i + 1 - start), 0)
                        shift = load(lse, query + i, 4, 17)
                        dot = load(dots, query + i, 5, 17)
                        if not shift > T(-1e999):
                            shift = T(0) if zero != 0 else T(shift - shift)
                        for j in range(wide):
                            weight = T(exp_of_score(T(T(load(weights, line + j, 9, 17) * times_factor) - shift)))
                            slope = T(T(weight * T(load(slopes, line + j, 10, 17) - dot)) * steepness)
                            store(weights, line + j, T(select(i32(j) < i32(seen), weight, T(0))), 9, 17)
                            store(slopes, line + j, T(select(i32(j) < i32(seen), slope, T(0))), 10, 17)
                    if dropped != 0:
                        for i in range(rows):
                            line = i * line_of
                            place = i * (line_of + MORE) + ((query + i) * keys + start) % 4
                            for j in range(wide):
                                store(weights, line + j, T(load(weights, line + j, 9, 17) * load(kept, place + j, 11, 17)),
                                      9, 17)
                    multiply_block(args, 65, near, values, rows, rows, TILE, weights, 0, TILE, 1, line_of,
                                   g, g_place + first * g_row, COLUMNS, g_row,
                                   dv_lines, dv_at, dv_step, started)
                    multiply_block(args, 65, near, width, rows, rows, TILE, slopes, 0, TILE, 1, line_of,
                                   q, q_place + first * q_row, COLUMNS, q_row,
                                   dk_lines, dk_at, dk_step, started)
                    multiply_block(args, 65, rows, width, near, near, TILE, slopes, 0, TILE * line_of, line_of, 1,
                                   k, k_place + start * k_row, COLUMNS, k_row, dq, dq_place + first * dq_row, dq_row,
                                   start - first_key)
                    started = 1
            for i in range(count):
                dk_line = dk_at + i * dk_step
                dv_line = dv_at + i * dv_step
                if started == 0:
                    for j in range(width):
                        store(dk_lines, dk_line + j, T(0), 7, 17)
                    for j in range(values):
                        store(dv_lines, dv_line + j, T(0), 8, 17)
                if gathered or scaled == 1:
                    for j in range(width):
                        store(dk, dk_place + (start + i) * dk_row + j, T(load(dk_lines, dk_line + j, 7, 17) * dk_factor),
                              7, 17)
                if gathered:
                    for j in range(values):
                        store(dv, dv_place + (start + i) * dv_row + j, load(dv_lines, dv_line + j, 8, 17), 8, 17)


KERNELS = {kernel.__name__: kernel for kernel in (attention, attention_dots, attention_grad)}
