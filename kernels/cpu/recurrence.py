"""Recurrent layers: all steps of a few sequences in one item, so that no thread waits for another between steps.

An item is `rows_per_item` sequences of the batch. Per step it multiplies their states with the recurrent weights,
which come packed in panels (`gemm_pack.pack_source`) and stay in its core's cache from step to step, straight into the
memory of the results, and then goes over them: forward in several loops, as a processor starts only so many operations
ahead of one that waits, and of a loop of all gates that is hardly the next turn. Every other step takes the panels in
reverse: where they are more than the cache holds, those that came last are still there. A product of several rows meanwhile
fetches what the step will go over, as that comes from memory. Forward, w is read transposed, [H, G * H]; backward as it
lies, [G * H, H]; the first `products` times, as the last product has nothing but the gradient of the states before the
first step. See `jitgrad.ops.recurrence` for shapes and names.
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
THERE = 0                                       # 1 where products are added to gates that lie there; `source` says
OLD = {"rnn_grad": "dh", "lstm_grad": "kept"}     # what may lie where the gradients of gates go
TURN = COLUMNS * UNROLLED                       # weights of a turn of the tile's loop, which fetches a number of x and of y


def tile_of(element: str, rows: int) -> Tile:
    """The tile of items of so many rows, by which the weights are packed."""
    low = low_tile_for(ITEMSIZES[element])
    return low if rows <= low.rows else tile_for(ITEMSIZES[element])


def source(kernel: str, element: str, rows: int, relu: bool = False, number: bool = False, in_place: bool = False) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``, and for items of at most so many rows. With `number` all elements
    of dc are one in memory. With `in_place` the gates lie where h (`rnn`) or what is kept (`lstm`) goes, and so does dh
    (`rnn_grad`) or what was kept (`lstm_grad`) where the gradients of the gates go."""
    tile = tile_of(element, rows)
    spelled = text(KERNELS[kernel], T=element, COLUMNS=str(tile.columns), TURN=str(tile.columns * UNROLLED),
                   THERE=str(int(in_place)))
    if tile != tile_for(ITEMSIZES[element]):
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_low_").replace("multiply_ahead", "multiply_low")
    if relu:
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_relu_")
        spelled = spelled.replace(f"({element}(1) - h_t * h_t)", f"{element}(h_t > {element}(0))")
    if number:
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_number_").replace("load(dc, state + j,", "load(dc, 0,")
    if in_place:
        spelled = spelled.replace(f"def {kernel}_", f"def {kernel}_in_place_").replace("load(x, k, 0, 5) + ", "")
        spelled = spelled.replace(f"load({OLD.get(kernel)}, ", "load(d_gates, ")
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
            soon = place + THERE * batch * hidden
            for panel in range(panels):
                j = (panel if t % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, hidden - j), hidden, states, at, hidden, 1, w, j * hidden, COLUMNS,
                               h, place + j, hidden, THERE, x, soon + j * rows, near, x, soon + j * rows, near)
            states, at = h, place
            for k in range(place, place + rows * hidden):
                total = T(load(x, k, 0, 5) + load(h, k, 1, 5))
                store(h, k, T(ACTIVATION(total)), 1, 5)


def rnn_grad(args, begin, end, thread):
    """Arguments: dh, packed w, h, d_gates, dh0, sums[items, hidden]; steps, batch, hidden, rows_per_item,
    products."""
    dh, w, h, d_gates, dh0 = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                              pointer(args, 5, T))
    sums = pointer(args, 6, T)
    steps, batch, hidden, rows_per_item, products = args[7], args[8], args[9], args[10], args[11]
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        carried = first * hidden
        for k in range(carried, carried + rows * hidden):
            store(dh0, k, T(0), 2, 4)
        for k in range(item * hidden, (item + 1) * hidden):
            store(sums, k, T(0), 3, 4)
        for back in range(steps):
            place = ((steps - 1 - back) * batch + first) * hidden
            for row in range(rows):
                own = place + row * hidden
                for j in range(hidden):
                    h_t = load(h, own + j, 1, 4)
                    total = T(load(dh, own + j, 0, 4) + load(dh0, carried + row * hidden + j, 2, 4))
                    d_t = T(total * (T(1) - h_t * h_t))
                    store(d_gates, own + j, d_t, 0, 4)
                    store(sums, item * hidden + j, T(load(sums, item * hidden + j, 3, 4) + d_t), 3, 4)
            soon = place - batch * hidden
            for panel in range(panels * min(products - back, 1)):
                j = (panel if back % 2 == 0 else panels - 1 - panel) * COLUMNS
                multiply_ahead(rows, min(COLUMNS, hidden - j), hidden, d_gates, place, hidden, 1, w, j * hidden, COLUMNS,
                               dh0, carried + j, hidden, 0, h, soon + j * rows, near, dh, soon + j * rows, near)


def lstm(args, begin, end, thread):
    """Arguments: gates, packed w, h0, c0, h, c, kept; steps, batch, hidden, rows_per_item."""
    x, w, h0, c0 = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    h, c, kept = pointer(args, 5, T), pointer(args, 6, T), pointer(args, 7, T)
    steps, batch, hidden, rows_per_item = args[8], args[9], args[10], args[11]
    wide = 4 * hidden
    panels = (wide + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        states, at = h0, first * hidden
        cells, behind = c0, first * hidden
        for t in range(steps):
            place = t * batch + first
            for panel in range(panels):
                j = (panel if t % 2 == 0 else panels - 1 - panel) * COLUMNS
                soon = (place + THERE * batch) * wide + j * rows
                multiply_ahead(rows, min(COLUMNS, wide - j), hidden, states, at, hidden, 1, w, j * hidden, COLUMNS,
                               kept, place * wide + j, wide, THERE, x, soon, near, x, soon, near)
            states, at = h, place * hidden
            for row in range(rows):
                gate = (place + row) * wide
                state = (place + row) * hidden
                own = behind + row * hidden
                for part in range(gate, gate + wide, 3 * hidden):
                    for k in range(part, min(part + 2 * hidden, gate + wide)):
                        store(kept, k, T(sigmoid(T(load(x, k, 0, 5) + load(kept, k, 1, 5)))), 1, 5)
                for j in range(hidden):
                    k = gate + 2 * hidden + j
                    g_t = T(tanh(T(load(x, k, 0, 5) + load(kept, k, 2, 5))))
                    store(kept, k, g_t, 2, 5)
                    c_t = T(load(kept, gate + hidden + j, 1, 5) * load(cells, own + j, 3, 5)
                            + load(kept, gate + j, 1, 5) * g_t)
                    store(c, state + j, c_t, 3, 5)
                for j in range(hidden):
                    h_t = T(load(kept, gate + 3 * hidden + j, 1, 5) * tanh(load(c, state + j, 3, 5)))
                    store(h, state + j, h_t, 4, 5)
            cells, behind = c, place * hidden


def lstm_grad(args, begin, end, thread):
    """Arguments: dh, dc, packed w, c0, c, kept, d_gates, dh0, dc0, sums[items, 4 * hidden]; steps, batch, hidden,
    rows_per_item, products."""
    dh, dc, w, c0 = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T)
    c, kept = pointer(args, 5, T), pointer(args, 6, T)
    d_gates, dh0, dc0, sums = pointer(args, 7, T), pointer(args, 8, T), pointer(args, 9, T), pointer(args, 10, T)
    other, times = d_gates, 4                   # what is fetched beside what was kept: if that is one memory, dh
    if THERE != 0:
        other, times = dh, 1
    steps, batch, hidden, rows_per_item, products = args[11], args[12], args[13], args[14], args[15]
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
        for j in range(item * wide, (item + 1) * wide):
            store(sums, j, T(0), 9, 10)
        for back in range(steps):
            place = (steps - 1 - back) * batch + first
            cells, behind = c, (place - batch) * hidden
            if back == steps - 1:
                cells, behind = c0, carried
            for row in range(rows):
                gate = (place + row) * wide
                state = (place + row) * hidden
                own = carried + row * hidden
                total = item * wide
                for j in range(hidden):
                    i_t = load(kept, gate + j, 3, 10)
                    f_t = load(kept, gate + hidden + j, 4, 10)
                    g_t = load(kept, gate + 2 * hidden + j, 5, 10)
                    o_t = load(kept, gate + 3 * hidden + j, 6, 10)
                    squashed = T(tanh(load(c, state + j, 2, 10)))
                    d_h = T(load(dh, state + j, 0, 10) + load(dh0, own + j, 7, 10))
                    cell = T(load(dc, state + j, 1, 10) + load(dc0, own + j, 8, 10)
                             + d_h * o_t * (T(1) - squashed * squashed))
                    d_i = T(cell * g_t * i_t * (T(1) - i_t))
                    d_f = T(T(cell * f_t * (T(1) - f_t)) * load(cells, behind + row * hidden + j, 2, 10))
                    d_g = T(cell * i_t * (T(1) - g_t * g_t))
                    d_o = T(d_h * squashed * o_t * (T(1) - o_t))
                    store(d_gates, gate + j, d_i, 3, 10)
                    store(d_gates, gate + hidden + j, d_f, 4, 10)
                    store(d_gates, gate + 2 * hidden + j, d_g, 5, 10)
                    store(d_gates, gate + 3 * hidden + j, d_o, 6, 10)
                    store(dc0, own + j, T(cell * f_t), 8, 10)
                    store(sums, total + j, T(load(sums, total + j, 9, 10) + d_i), 9, 10)
                    store(sums, total + hidden + j, T(load(sums, total + hidden + j, 9, 10) + d_f), 9, 10)
                    store(sums, total + 2 * hidden + j, T(load(sums, total + 2 * hidden + j, 9, 10) + d_g), 9, 10)
                    store(sums, total + 3 * hidden + j, T(load(sums, total + 3 * hidden + j, 9, 10) + d_o), 9, 10)
            for panel in range(panels * min(products - back, 1)):
                j = (panel if back % 2 == 0 else panels - 1 - panel) * COLUMNS
                soon = (place - batch) * wide + j * rows * 4
                multiply_ahead(rows, min(COLUMNS, hidden - j), wide, d_gates, place * wide, wide, 1, w, j * wide, COLUMNS,
                               dh0, carried + j, hidden, 0, kept, soon, near,
                               other, ((place - batch) * hidden + j * rows) * times, near * times // 4)


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
            for row in range(rows):
                gate = (place + row) * narrow
                own = (place + row) * wide
                product = (first + row) * narrow
                state = (place + row) * hidden
                before = at + row * hidden
                for k in range(2 * hidden):
                    hidden_k = T(load(products, product + k, 1, 7) + load(b, k, 2, 7))
                    store(kept, own + k, T(sigmoid(T(load(x, gate + k, 0, 7) + hidden_k))), 3, 7)
                for j in range(hidden):
                    n_h = T(load(products, product + 2 * hidden + j, 1, 7) + load(b, 2 * hidden + j, 2, 7))
                    n_t = T(tanh(T(load(x, gate + 2 * hidden + j, 0, 7) + load(kept, own + j, 3, 7) * n_h)))
                    z_t = load(kept, own + hidden + j, 3, 7)
                    store(kept, own + 2 * hidden + j, n_t, 4, 7)
                    store(kept, own + 3 * hidden + j, n_h, 5, 7)
                    store(h, state + j, T(n_t + z_t * (load(states, before + j, 6, 7) - n_t)), 6, 7)
            states, at = h, place * hidden


def gru_grad(args, begin, end, thread):
    """Arguments: dh, packed w, h0, h, kept, d_gates, d_hidden, dh0, sums[items, 3 * hidden] of d_gates and of d_hidden;
    steps, batch, hidden, rows_per_item, products."""
    dh, w, h0, h, kept = (pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T), pointer(args, 4, T),
                          pointer(args, 5, T))
    d_gates, d_hidden, dh0 = pointer(args, 6, T), pointer(args, 7, T), pointer(args, 8, T)
    sums, sums_hidden = pointer(args, 9, T), pointer(args, 10, T)
    steps, batch, hidden, rows_per_item, products = args[11], args[12], args[13], args[14], args[15]
    narrow = 3 * hidden
    wide = 4 * hidden
    panels = (hidden + COLUMNS - 1) // COLUMNS
    for item in range(begin, end):
        first = item * rows_per_item
        rows = min(rows_per_item, batch - first)
        near = rows * TURN // hidden
        carried = first * hidden
        for k in range(carried, carried + rows * hidden):
            store(dh0, k, T(0), 5, 8)
        for k in range(item * narrow, (item + 1) * narrow):
            store(sums, k, T(0), 6, 8)
            store(sums_hidden, k, T(0), 7, 8)
        for back in range(steps):
            place = (steps - 1 - back) * batch + first
            states, at = h, (place - batch) * hidden
            if back == steps - 1:
                states, at = h0, carried
            for row in range(rows):
                gate = (place + row) * narrow
                saved = (place + row) * wide
                own = carried + row * hidden
                for j in range(hidden):
                    r_t = load(kept, saved + j, 2, 8)
                    z_t = load(kept, saved + hidden + j, 2, 8)
                    n_t = load(kept, saved + 2 * hidden + j, 2, 8)
                    n_h = load(kept, saved + 3 * hidden + j, 2, 8)
                    total = T(load(dh, (place + row) * hidden + j, 0, 8) + load(dh0, own + j, 5, 8))
                    d_n = T(total * (T(1) - z_t) * (T(1) - n_t * n_t))
                    d_r = T(d_n * n_h * r_t * (T(1) - r_t))
                    d_z = T(T(total * z_t * (T(1) - z_t)) * T(load(states, at + row * hidden + j, 1, 8) - n_t))
                    store(d_gates, gate + j, d_r, 3, 8)
                    store(d_gates, gate + hidden + j, d_z, 3, 8)
                    store(d_gates, gate + 2 * hidden + j, d_n, 3, 8)
                    store(d_hidden, gate + j, d_r, 4, 8)
                    store(d_hidden, gate + hidden + j, d_z, 4, 8)
                    store(d_hidden, gate + 2 * hidden + j, T(d_n * r_t), 4, 8)
                    store(dh0, own + j, T(total * z_t), 5, 8)
                for j in range(narrow):
                    k = item * narrow + j
                    store(sums, k, T(load(sums, k, 6, 8) + load(d_gates, gate + j, 3, 8)), 6, 8)
                    store(sums_hidden, k, T(load(sums_hidden, k, 7, 8) + load(d_hidden, gate + j, 4, 8)), 7, 8)
            for panel in range(panels * min(products - back, 1)):
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
