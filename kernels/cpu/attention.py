"""Attention on the register tile: scores of a block of queries and keys are in a buffer on the stack and nowhere else.

Forward, an item is a block of queries of one head: it goes through the blocks of keys with a running maximum and sum
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Backward, an item is a head of k and v, or a
part of its keys, with all heads of q that it serves: for each block of keys it makes the weights of each block of queries
again. Each part has a gradient of q of its own; where there are several they are added up afterwards. Products that read
k or v transposed have them packed in panels, by `gemm.pack_source`. See `jitgrad.ops.attention` for the operands.

Dropout makes the random bits of a line of scores beside it, wherever that line is made: they are those of the scores'
positions in [N, L, S] and of nothing else, so both passes drop the same ones, however the work is cut.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.kernels.cpu.math import ceil, exp_of_score, log, select
from jitgrad.kernels.cpu.philox import random_bits_block
from jitgrad.kernels.cpu.scalar import f32, f32 as T, f64
from jitgrad.kernels.cpu.standins import i64, load, pointer, reassociate_add, reassociate_max, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import make_panel, multiply_block

COLUMNS, TILE = 32, 14                          # of the register tile; `source` puts the machine's in their places
KEYS = 128                                      # of a block; `source` too
STEP = 64                                       # elements of a line of scores that are looked at together
MOST = 96                                       # queries of a block, at the most
ARGUMENTS = ("queries", "keys", "width", "values", "times", "masked", "run", "period", "mask_row", "causal", "zero",
             "dropped", "block", "blocks")
"""The integers of both kernels: sizes L, S, E, V; heads of q per head of k; whether there is a mask, how many heads are in
a run of it and how many matrices it has for them in turn, and the distance of its rows; both attributes; whether weights
are dropped; queries of a block; and blocks of queries per head."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    tile = element_tile(element)
    spelled = text(KERNELS[kernel], T=element)
    for name, number in {"COLUMNS": tile.columns, "TILE": tile.rows, "KEYS": block_of_keys(element),
                         "STEP": min(STEP, block_of_keys(element)), "MOST": MOST}.items():
        spelled = spelled.replace(name, str(number))
    return spelled


def block_of_queries(element: str, keys: int) -> int:
    """Rows of a block of scores: whole tiles. Where all keys are one short line, a block may have more of them."""
    rows = element_tile(element).rows
    return (70 if keys <= STEP else 56) // rows * rows


def block_of_keys(element: str) -> int:
    """Columns of a block of scores: whole panels."""
    return 4 * element_tile("f32").columns if element == "f32" else 2 * element_tile("f32").columns


def attention(args, begin, end, thread):
    """Arguments: q, packed k, v, mask; key, offset, p, scale (of dropout); out, lse; `ARGUMENTS`. Items: blocks of queries
    of all heads."""
    q, k, v, mask, o, lse = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                             pointer(args, 9, T), pointer(args, 10, T))
    queries, keys, width, values, times = args[11], args[12], args[13], args[14], args[15]
    masked, run, period, mask_row, causal, zero = args[16], args[17], args[18], args[19], args[20], args[21]
    dropped, block_rows, blocks = args[22], args[23], args[24]
    line_of = min((keys + STEP - 1) // STEP * STEP, KEYS)
    panels = (keys + COLUMNS - 1) // COLUMNS
    scores = make_panel(o)
    stats = make_panel(o)
    kept = make_panel(o)
    key, offset, limit, scale = i64(0), i64(0), i64(0), T(0)
    if dropped != 0:
        key, offset = load(pointer(args, 5, i64), 0, 8, 12), load(pointer(args, 6, i64), 0, 9, 12)
        limit = 256 * i64(ceil(f64(load(pointer(args, 7, f32), 0, 10, 12)) * f64(16777216)))
        scale = load(pointer(args, 8, T), 0, 11, 12)
    for item in range(begin, end):
        n = item // blocks
        first = item % blocks * block_rows
        rows = min(block_rows, queries - first)
        group = n // times
        last = keys
        if causal != 0:
            last = min(keys, first + rows)
        for i in range(rows):
            store(stats, i, T(-1e999), 6, 12)
            store(stats, MOST + i, T(0), 6, 12)
        for start in range(0, last, KEYS):
            count = min(KEYS, last - start)
            wide = (count + STEP - 1) // STEP * STEP
            multiply_block(args, 25, rows, count, width, width, TILE,
                           q, (n * queries + first) * width, TILE * width, width, 1,
                           k, (group * panels + start // COLUMNS) * width * COLUMNS, width * COLUMNS, COLUMNS,
                           scores, 0, line_of, 0)
            for i in range(rows):
                line = i * line_of
                seen = count
                if causal != 0:
                    seen = max(min(count, first + i + 1 - start), 0)
                if masked != 0:
                    above = (n // run * period + n % period) * keys * max(mask_row // keys * queries, 1)
                    above += (first + i) * mask_row + start
                    for j in range(seen):
                        added = load(mask, above + j, 2, 12)
                        store(scores, line + j,
                              T(select(added > T(-1e999), T(load(scores, line + j, 5, 12) + added), added)), 5, 12)
                best = load(stats, i, 6, 12)
                if seen < wide:
                    for j in range(wide):
                        score_j = T(select(j < seen, load(scores, line + j, 5, 12), T(-1e999)))
                        store(scores, line + j, score_j, 5, 12)
                        best = reassociate_max(best, score_j)
                else:
                    for j in range(wide):
                        best = reassociate_max(best, load(scores, line + j, 5, 12))
                store(stats, 2 * MOST + i, best, 6, 12)
            for i in range(rows):                       # apart, so that a line need not wait for its maximum
                line = i * line_of
                place = (n * queries + first + i) * values
                top = load(stats, i, 6, 12)
                best = load(stats, 2 * MOST + i, 6, 12)
                shift = T(select(best > T(-1e999), best, T(0)))
                total = T(0)
                for j in range(wide):
                    weight = T(exp_of_score(T(load(scores, line + j, 5, 12) - shift)))
                    store(scores, line + j, weight, 5, 12)
                    total = reassociate_add(total, weight)
                less = T(0)
                if start > 0:
                    less = T(exp_of_score(T(top - shift)))
                store(stats, i, best, 6, 12)
                store(stats, MOST + i, T(load(stats, MOST + i, 6, 12) * less + total), 6, 12)
                if dropped != 0:
                    score = (n * queries + first + i) * keys + start
                    skip = score % 4
                    for b in range(wide // 4 + min(skip, 1) * 8):
                        w, x, y, z = random_bits_block(key, offset, score // 4 + b)
                        store(kept, 4 * b, T(select(i64(w) >= limit, scale, T(0))), 7, 12)
                        store(kept, 4 * b + 1, T(select(i64(x) >= limit, scale, T(0))), 7, 12)
                        store(kept, 4 * b + 2, T(select(i64(y) >= limit, scale, T(0))), 7, 12)
                        store(kept, 4 * b + 3, T(select(i64(z) >= limit, scale, T(0))), 7, 12)
                    for j in range(wide):
                        store(scores, line + j, T(load(scores, line + j, 5, 12) * load(kept, skip + j, 7, 12)), 5, 12)
                if start > 0:
                    for j in range(values):
                        store(o, place + j, T(load(o, place + j, 3, 12) * less), 3, 12)
            multiply_block(args, 25, rows, values, count, count, TILE, scores, 0, TILE * line_of, line_of, 1,
                           v, (group * keys + start) * values, COLUMNS, values,
                           o, (n * queries + first) * values, values, start)
        for i in range(rows):
            total = load(stats, MOST + i, 6, 12)
            store(lse, n * queries + first + i, T(log(total) + load(stats, i, 6, 12)), 4, 12)
            store(stats, MOST + i, T(T(1) / T(select(zero * i64(total == T(0)) != 0, T(1), total))), 6, 12)
        for i in range(rows):
            place = (n * queries + first + i) * values
            factor = load(stats, MOST + i, 6, 12)
            for j in range(values):
                store(o, place + j, T(load(o, place + j, 3, 12) * factor), 3, 12)


def attention_dots(args, begin, end, thread):
    """Arguments: g, out, dots; values. Items: queries. What a query's gradient and result have in common."""
    g, o, dots = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    values = args[4]
    for item in range(begin, end):
        total = T(0)
        for j in range(item * values, (item + 1) * values):
            product = T(load(g, j, 0, 3) * load(o, j, 1, 3))
            total = reassociate_add(total, product)
        store(dots, item, total, 2, 3)


def attention_grad(args, begin, end, thread):
    """Arguments: g, q, k, mask; key, offset, p, scale (of dropout); lse, dots, packed k, packed v, dq[parts, N, L, E], dk,
    dv; `ARGUMENTS`, parts, keys of a part, all of q's heads. Items: parts of all heads of k."""
    g, q, k, mask, lse, dots = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                                pointer(args, 9, T), pointer(args, 10, T))
    k_panels, v_panels, dq, dk, dv = (pointer(args, 11, T), pointer(args, 12, T), pointer(args, 13, T),
                                      pointer(args, 14, T), pointer(args, 15, T))
    queries, keys, width, values, times = args[16], args[17], args[18], args[19], args[20]
    masked, run, period, mask_row, causal, zero = args[21], args[22], args[23], args[24], args[25], args[26]
    dropped, block_rows, parts, keys_of_part, heads = args[27], args[28], args[30], args[31], args[32]
    line_of = min((keys + STEP - 1) // STEP * STEP, KEYS)
    panels = (keys + COLUMNS - 1) // COLUMNS
    weights = make_panel(dq)
    slopes = make_panel(dq)
    kept = make_panel(dq)
    key, offset, limit, scale = i64(0), i64(0), i64(0), T(0)
    if dropped != 0:
        key, offset = load(pointer(args, 5, i64), 0, 12, 16), load(pointer(args, 6, i64), 0, 13, 16)
        limit = 256 * i64(ceil(f64(load(pointer(args, 7, f32), 0, 14, 16)) * f64(16777216)))
        scale = load(pointer(args, 8, T), 0, 15, 16)
    for item in range(begin, end):
        group = item // parts
        part = item % parts
        own_queries = (part * heads + group * times) * queries
        for i in range(own_queries * width, (own_queries + times * queries) * width):
            store(dq, i, T(0), 6, 16)
        for start in range(part * keys_of_part, min((part + 1) * keys_of_part, keys), KEYS):
            count = min(KEYS, keys - start)
            started = 0
            for n in range(group * times, (group + 1) * times):
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
                    query = n * queries + first
                    panel = group * panels + start // COLUMNS
                    multiply_block(args, 33, rows, near, width, width, TILE, q, query * width, TILE * width, width, 1,
                                   k_panels, panel * width * COLUMNS, width * COLUMNS, COLUMNS, weights, 0, line_of, 0)
                    multiply_block(args, 33, rows, near, values, values, TILE, g, query * values, TILE * values, values, 1,
                                   v_panels, panel * values * COLUMNS, values * COLUMNS, COLUMNS, slopes, 0, line_of, 0)
                    for i in range(rows):
                        line = i * line_of
                        seen = count
                        if causal != 0:
                            seen = max(min(count, first + i + 1 - start), 0)
                        if masked != 0:
                            above = (n // run * period + n % period) * keys * max(mask_row // keys * queries, 1)
                            above += (first + i) * mask_row + start
                            for j in range(seen):
                                added = load(mask, above + j, 3, 16)
                                store(weights, line + j,
                                      T(select(added > T(-1e999), T(load(weights, line + j, 9, 16) + added), added)), 9, 16)
                        shift = load(lse, query + i, 4, 16)
                        dot = load(dots, query + i, 5, 16)
                        if not shift > T(-1e999):
                            shift = T(0) if zero != 0 else T(shift - shift)
                        if seen < wide:
                            for j in range(wide):
                                store(weights, line + j, T(select(j < seen, load(weights, line + j, 9, 16), T(-1e999))),
                                      9, 16)
                        if dropped != 0:
                            score = (query + i) * keys + start
                            skip = score % 4
                            for b in range(wide // 4 + min(skip, 1) * 8):
                                w, x, y, z = random_bits_block(key, offset, score // 4 + b)
                                store(kept, 4 * b, T(select(i64(w) >= limit, scale, T(0))), 11, 16)
                                store(kept, 4 * b + 1, T(select(i64(x) >= limit, scale, T(0))), 11, 16)
                                store(kept, 4 * b + 2, T(select(i64(y) >= limit, scale, T(0))), 11, 16)
                                store(kept, 4 * b + 3, T(select(i64(z) >= limit, scale, T(0))), 11, 16)
                            for j in range(wide):
                                store(slopes, line + j, T(load(slopes, line + j, 10, 16) * load(kept, skip + j, 11, 16)),
                                      10, 16)
                        for j in range(wide):
                            weight = T(exp_of_score(T(load(weights, line + j, 9, 16) - shift)))
                            slope = T(weight * T(load(slopes, line + j, 10, 16) - dot))
                            store(weights, line + j, weight, 9, 16)
                            store(slopes, line + j, slope, 10, 16)
                        if dropped != 0:
                            for j in range(wide):
                                store(weights, line + j, T(load(weights, line + j, 9, 16) * load(kept, skip + j, 11, 16)),
                                      9, 16)
                    own = group * keys + start
                    multiply_block(args, 33, near, values, rows, rows, TILE, weights, 0, TILE, 1, line_of,
                                   g, query * values, COLUMNS, values, dv, own * values, values, started)
                    multiply_block(args, 33, near, width, rows, rows, TILE, slopes, 0, TILE, 1, line_of,
                                   q, query * width, COLUMNS, width, dk, own * width, width, started)
                    multiply_block(args, 33, rows, width, near, near, TILE, slopes, 0, TILE * line_of, line_of, 1,
                                   k, own * width, COLUMNS, width,
                                   dq, (part * heads * queries + query) * width, width, 1)
                    started = 1
            if started == 0:
                for i in range((group * keys + start) * width, (group * keys + start + count) * width):
                    store(dk, i, T(0), 7, 16)
                for i in range((group * keys + start) * values, (group * keys + start + count) * values):
                    store(dv, i, T(0), 8, 16)


KERNELS = {kernel.__name__: kernel for kernel in (attention, attention_dots, attention_grad)}
