"""Recurrent layers: all steps of a few sequences in one item, so that no thread waits for another between steps.

An item is `rows_per_item` sequences of the batch. Per step it multiplies their states with the recurrent weights,
which come packed in panels (`gemm_pack.pack_source`) and stay in its core's cache from step to step, straight into the
memory of the results, and then goes over them once. Every other step takes the panels in reverse: where they are more
than the cache holds, those that came last are still there. A product of several rows meanwhile fetches what the step
will go over, as that comes from memory. Forward, w is read transposed, [H, G * H]; backward as it lies, [G * H, H]. See
`jitgrad.ops.recurrence` for shapes and names.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.gemm import ITEMSIZES
from jitgrad.kernels.cpu.math import sigmoid, tanh
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import Tile, low_tile_for, multiply_ahead, tile_for
from jitgrad.kernels.cpu.tile_text import UNROLLED

ACTIVATION = tanh                               # of the plain recurrent layer; `source` puts relu in its place
COLUMNS = 32                                    # of a panel of weights; `source` puts the tile's width in its place
TURN = COLUMNS * UNROLLED                       # weights of a turn of the tile's loop, which fetches a number of x and of y


def tile_of(element: str, rows: int) -> Tile:
    """The tile of items of so many rows, by which the weights are packed."""
    low = low_tile_for(ITEMSIZES[element])
    return low if rows <= low.rows else tile_for(ITEMSIZES[element])


def source(kernel: str, element: str, rows: int, relu: bool = False, number: bool = False) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``, and for items of at most so many rows. With `number` all elements
    of dc are one in memory."""
    tile = tile_of(element, rows)
    spelled = text(KERNELS[kernel], T=element, COLUMNS=str(tile.columns), TURN=str(tile.columns * UNROLLED))
    if tile != tile_for(ITEMSIZES[element]):
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_low_").replace("multiply_ahead", "multiply_low")
    if relu:
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_relu_")
        spelled = spelled.replace(f"({element}(1) - h_t * h_t)", f"{element}(h_t > {element}(0))")
    if number:
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_number_").replace("load(dc, state + j,", "load(dc, 0,")
    return spelled.replace("ACTIVATION", "relu" if relu else "tanh")


def sum_source(element: str) -> str:
    """The text of `add_items` for ``f32`` or ``f64``."""
    return text(add_items, T=element)


def rnn(args, begin, end, thread):
    """Arguments: gates, packed w, h0, h; steps, batch, hidden, rows_per_item."""
    x, w, h0, h = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    steps, batch, hidden, rows_per_item = args[5], args[6], args[7], args[8]
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        states, at = h0, first * hidden
        for t in range(steps):
            place = (t * batch + first) * hidden
            for panel in range(panels):
                j = (panel if t % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, hidden - j), hidden, states, at, hidden, 1, w, j * hidden, COLUMNS,
                               h, place + j, hidden, 0, x, place + j * rows, near, x, place + j * rows, near)
            states, at = h, place
            for k in range(place, place + rows * hidden):
                total = T(load(x, k, 0, 4) + load(h, k, 3, 4))
                store(h, k, T(ACTIVATION(total)), 3, 4)


def rnn_grad(args, begin, end, thread):
    """Arguments: dh, packed w, h, d_gates, dh0, sums[items, hidden]; steps, batch, hidden, rows_per_item, summed."""
    dh, w, h, d_gates, dh0 = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                              pointer(args, 5, T))
    sums = pointer(args, 6, T)
    steps, batch, hidden, rows_per_item, summed = args[7], args[8], args[9], args[10], args[11]
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        carried = first * hidden
        for k in range(carried, carried + rows * hidden):
            store(dh0, k, T(0), 4, 6)
        for j in range(summed * hidden):
            store(sums, item * hidden + j, T(0), 5, 6)
        for back in range(steps):
            place = ((steps - 1 - back) * batch + first) * hidden
            for k in range(rows * hidden):
                h_t = load(h, place + k, 2, 6)
                total = T(load(dh, place + k, 0, 6) + load(dh0, carried + k, 4, 6))
                store(d_gates, place + k, T(total * (T(1) - h_t * h_t)), 3, 6)
            for row in range(summed * rows):
                for j in range(hidden):
                    total = T(load(sums, item * hidden + j, 5, 6) + load(d_gates, place + row * hidden + j, 3, 6))
                    store(sums, item * hidden + j, total, 5, 6)
            soon = place - batch * hidden
            for panel in range(panels):
                j = (panel if back % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, hidden - j), hidden, d_gates, place, hidden, 1, w, j * hidden, COLUMNS,
                               dh0, carried + j, hidden, 0, h, soon + j * rows, near, dh, soon + j * rows, near)


def lstm(args, begin, end, thread):
    """Arguments: gates, packed w, h0, c0, h, c, kept, products[batch, 4 * hidden]; steps, batch, hidden,
    rows_per_item."""
    x, w, h0, c0 = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    h, c, kept, products = pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T), pointer(args, 8, T)
    steps, batch, hidden, rows_per_item = args[9], args[10], args[11], args[12]
    wide = 4 * hidden
    panels = (wide + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        states, at = h0, first * hidden
        for t in range(steps):
            place = t * batch + first
            for panel in range(panels):
                j = (panel if t % 2 == 0 else panels - 1 - panel) * COLUMNS
                soon = place * wide + j * rows
                multiply_ahead(rows, min(COLUMNS, wide - j), hidden, states, at, hidden, 1, w, j * hidden, COLUMNS,
                               products, first * wide + j, wide, 0, x, soon, near, kept, soon, near)
            states, at = h, place * hidden
            for row in range(rows):
                gate = (place + row) * wide
                product = (first + row) * wide
                state = (place + row) * hidden
                if t == 0:
                    for j in range(hidden):
                        store(c, state + j, load(c0, (first + row) * hidden + j, 3, 8), 5, 8)
                else:
                    for j in range(hidden):
                        store(c, state + j, load(c, state - batch * hidden + j, 5, 8), 5, 8)
                for j in range(hidden):
                    i_t = T(sigmoid(T(load(x, gate + j, 0, 8)
                                      + load(products, product + j, 7, 8))))
                    f_t = T(sigmoid(T(load(x, gate + hidden + j, 0, 8)
                                      + load(products, product + hidden + j, 7, 8))))
                    g_t = T(tanh(T(load(x, gate + 2 * hidden + j, 0, 8)
                                      + load(products, product + 2 * hidden + j, 7, 8))))
                    o_t = T(sigmoid(T(load(x, gate + 3 * hidden + j, 0, 8)
                                      + load(products, product + 3 * hidden + j, 7, 8))))
                    c_t = T(f_t * load(c, state + j, 5, 8) + i_t * g_t)
                    store(kept, gate + j, i_t, 6, 8)
                    store(kept, gate + hidden + j, f_t, 6, 8)
                    store(kept, gate + 2 * hidden + j, g_t, 6, 8)
                    store(kept, gate + 3 * hidden + j, o_t, 6, 8)
                    store(c, state + j, c_t, 5, 8)
                    store(h, state + j, T(o_t * tanh(c_t)), 4, 8)


def lstm_grad(args, begin, end, thread):
    """Arguments: dh, dc, packed w, c0, c, kept, d_gates, dh0, dc0, sums[items, 4 * hidden]; steps, batch, hidden,
    rows_per_item, summed."""
    dh, dc, w, c0 = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    c, kept = pointer(args, 5, T), pointer(args, 6, T)
    d_gates, dh0, dc0, sums = pointer(args, 7, T), pointer(args, 8, T), pointer(args, 9, T), pointer(args, 10, T)
    steps, batch, hidden, rows_per_item, summed = args[11], args[12], args[13], args[14], args[15]
    wide = 4 * hidden
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        carried = first * hidden
        for k in range(carried, carried + rows * hidden):
            store(dh0, k, T(0), 7, 10)
            store(dc0, k, T(0), 8, 10)
        for j in range(summed * wide):
            store(sums, item * wide + j, T(0), 9, 10)
        for back in range(steps):
            t = steps - 1 - back
            place = t * batch + first
            for row in range(rows):
                gate = (place + row) * wide
                state = (place + row) * hidden
                own = carried + row * hidden
                for j in range(hidden):
                    i_t = load(kept, gate + j, 5, 10)
                    f_t = load(kept, gate + hidden + j, 5, 10)
                    g_t = load(kept, gate + 2 * hidden + j, 5, 10)
                    o_t = load(kept, gate + 3 * hidden + j, 5, 10)
                    squashed = T(tanh(load(c, state + j, 4, 10)))
                    total = T(load(dh, state + j, 0, 10) + load(dh0, own + j, 7, 10))
                    cell = T(load(dc, state + j, 1, 10) + load(dc0, own + j, 8, 10)
                             + total * o_t * (T(1) - squashed * squashed))
                    store(d_gates, gate + j, T(cell * g_t * i_t * (T(1) - i_t)), 6, 10)
                    store(d_gates, gate + hidden + j, T(cell * f_t * (T(1) - f_t)), 6, 10)
                    store(d_gates, gate + 2 * hidden + j, T(cell * i_t * (T(1) - g_t * g_t)), 6, 10)
                    store(d_gates, gate + 3 * hidden + j, T(total * squashed * o_t * (T(1) - o_t)), 6, 10)
                    store(dc0, own + j, T(cell * f_t), 8, 10)
                if t == 0:
                    for j in range(hidden):
                        d_f = T(load(d_gates, gate + hidden + j, 6, 10) * load(c0, own + j, 3, 10))
                        store(d_gates, gate + hidden + j, d_f, 6, 10)
                else:
                    for j in range(hidden):
                        d_f = T(load(d_gates, gate + hidden + j, 6, 10) * load(c, state - batch * hidden + j, 4, 10))
                        store(d_gates, gate + hidden + j, d_f, 6, 10)
            for row in range(summed * rows):
                for j in range(wide):
                    total = T(load(sums, item * wide + j, 9, 10) + load(d_gates, (place + row) * wide + j, 6, 10))
                    store(sums, item * wide + j, total, 9, 10)
            for panel in range(panels):
                j = (panel if back % 2 == 0 else panels - 1 - panel) * COLUMNS
                soon = (place - batch) * wide + j * rows * 4
                multiply_ahead(rows, min(COLUMNS, hidden - j), wide, d_gates, place * wide, wide, 1, w, j * wide, COLUMNS,
                               dh0, carried + j, hidden, 0, kept, soon, near, d_gates, soon, near)


def gru(args, begin, end, thread):
    """Arguments: gates, packed w, b, h0, h, kept, products[batch, 3 * hidden]; steps, batch, hidden, rows_per_item."""
    x, w, b, h0 = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    h, kept, products = pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T)
    steps, batch, hidden, rows_per_item = args[8], args[9], args[10], args[11]
    narrow = 3 * hidden
    wide = 4 * hidden
    panels = (narrow + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        states, at = h0, first * hidden
        for t in range(steps):
            place = t * batch + first
            for panel in range(panels):
                j = (panel if t % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, narrow - j), hidden, states, at, hidden, 1, w, j * hidden, COLUMNS,
                               products, first * narrow + j, narrow, 0, x, place * narrow + j * rows, near,
                               kept, place * wide + j * rows * 4 // 3, near * 4 // 3)
            states, at = h, place * hidden
            for row in range(rows):
                gate = (place + row) * narrow
                own = (place + row) * wide
                product = (first + row) * narrow
                state = (place + row) * hidden
                if t == 0:
                    for j in range(hidden):
                        store(h, state + j, load(h0, (first + row) * hidden + j, 3, 7), 4, 7)
                else:
                    for j in range(hidden):
                        store(h, state + j, load(h, state - batch * hidden + j, 4, 7), 4, 7)
                for j in range(hidden):
                    r_h = T(load(products, product + j, 6, 7) + load(b, j, 2, 7))
                    z_h = T(load(products, product + hidden + j, 6, 7) + load(b, hidden + j, 2, 7))
                    n_h = T(load(products, product + 2 * hidden + j, 6, 7) + load(b, 2 * hidden + j, 2, 7))
                    r_t = T(sigmoid(T(load(x, gate + j, 0, 7) + r_h)))
                    z_t = T(sigmoid(T(load(x, gate + hidden + j, 0, 7) + z_h)))
                    n_t = T(tanh(T(load(x, gate + 2 * hidden + j, 0, 7) + r_t * n_h)))
                    before = load(h, state + j, 4, 7)
                    store(kept, own + j, r_t, 5, 7)
                    store(kept, own + hidden + j, z_t, 5, 7)
                    store(kept, own + 2 * hidden + j, n_t, 5, 7)
                    store(kept, own + 3 * hidden + j, n_h, 5, 7)
                    store(h, state + j, T(n_t + z_t * (before - n_t)), 4, 7)


def gru_grad(args, begin, end, thread):
    """Arguments: dh, packed w, h0, h, kept, d_gates, d_hidden, dh0, sums[items, 3 * hidden] of d_gates and of d_hidden;
    steps, batch, hidden, rows_per_item, summed."""
    dh, w, h0, h, kept = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                          pointer(args, 5, T))
    d_gates, d_hidden, dh0 = pointer(args, 6, T), pointer(args, 7, T), pointer(args, 8, T)
    sums, sums_hidden = pointer(args, 9, T), pointer(args, 10, T)
    steps, batch, hidden, rows_per_item, summed = args[11], args[12], args[13], args[14], args[15]
    narrow = 3 * hidden
    wide = 4 * hidden
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        carried = first * hidden
        for k in range(carried, carried + rows * hidden):
            store(dh0, k, T(0), 7, 10)
        for j in range(summed * narrow):
            store(sums, item * narrow + j, T(0), 8, 10)
            store(sums_hidden, item * narrow + j, T(0), 9, 10)
        for back in range(steps):
            t = steps - 1 - back
            place = t * batch + first
            for row in range(rows):
                gate = (place + row) * narrow
                saved = (place + row) * wide
                state = (place + row) * hidden
                own = carried + row * hidden
                for j in range(hidden):
                    r_t = load(kept, saved + j, 4, 10)
                    z_t = load(kept, saved + hidden + j, 4, 10)
                    n_t = load(kept, saved + 2 * hidden + j, 4, 10)
                    n_h = load(kept, saved + 3 * hidden + j, 4, 10)
                    total = T(load(dh, state + j, 0, 10) + load(dh0, own + j, 7, 10))
                    d_n = T(total * (T(1) - z_t) * (T(1) - n_t * n_t))
                    d_r = T(d_n * n_h * r_t * (T(1) - r_t))
                    store(d_gates, gate + j, d_r, 5, 10)
                    store(d_gates, gate + 2 * hidden + j, d_n, 5, 10)
                    store(d_hidden, gate + j, d_r, 6, 10)
                    store(d_hidden, gate + hidden + j, T(total * z_t * (T(1) - z_t)), 6, 10)
                    store(d_hidden, gate + 2 * hidden + j, T(d_n * r_t), 6, 10)
                    store(dh0, own + j, T(total * z_t), 7, 10)
                if t == 0:
                    for j in range(hidden):
                        passed = T(load(h0, own + j, 2, 10) - load(kept, saved + 2 * hidden + j, 4, 10))
                        d_z = T(load(d_hidden, gate + hidden + j, 6, 10) * passed)
                        store(d_hidden, gate + hidden + j, d_z, 6, 10)
                        store(d_gates, gate + hidden + j, d_z, 5, 10)
                else:
                    for j in range(hidden):
                        passed = T(load(h, state - batch * hidden + j, 3, 10) - load(kept, saved + 2 * hidden + j, 4, 10))
                        d_z = T(load(d_hidden, gate + hidden + j, 6, 10) * passed)
                        store(d_hidden, gate + hidden + j, d_z, 6, 10)
                        store(d_gates, gate + hidden + j, d_z, 5, 10)
            for row in range(summed * rows):
                for j in range(narrow):
                    k = (place + row) * narrow + j
                    total = T(load(sums, item * narrow + j, 8, 10) + load(d_gates, k, 5, 10))
                    total_hidden = T(load(sums_hidden, item * narrow + j, 9, 10) + load(d_hidden, k, 6, 10))
                    store(sums, item * narrow + j, total, 8, 10)
                    store(sums_hidden, item * narrow + j, total_hidden, 9, 10)
            for panel in range(panels):
                j = (panel if back % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, hidden - j), narrow, d_hidden, place * narrow, narrow, 1,
                               w, j * narrow, COLUMNS, dh0, carried + j, hidden, 1,
                               kept, (place - batch) * wide + j * rows * 4, near * 4 // 3,
                               d_gates, (place - batch) * narrow + j * rows * 3, near)


def add_items(args, begin, end, thread):
    """The sums of all items. Arguments: sums[count, width], total[width]; count, width. Items: elements of `total`."""
    sums, total = pointer(args, 1, T), pointer(args, 2, T)
    count, width = args[3], args[4]
    for j in range(begin, end):
        store(total, j, load(sums, j, 0, 2), 1, 2)
    for item in range(1, count):
        for j in range(begin, end):
            store(total, j, T(load(total, j, 1, 2) + load(sums, item * width + j, 0, 2)), 1, 2)


KERNELS = {k.__name__: k for k in (rnn, rnn_grad, lstm, lstm_grad, gru, gru_grad)}
