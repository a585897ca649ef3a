"""Pooling windows over volumes ``[planes, depth, height, width]`` on a GPU; an image has depth 1, a sequence also height 1.

A thread is an element of what is written. It reads every place of its window, with the coordinates brought back into the
plane where the window sticks out, so that no read waits for a condition. Gradients are gathered: an element asks the
windows that may contain it, in their order, so that sums do not depend on who comes first. Ties, NaN and numbers of taps are
those of the CPU (`kernels.cpu.pooling`).

Numbers come along depth, height and width: sizes of the input (`depth` …) and of what was pooled (`layers` …), `deep` … of
the window, `onward` … from window to window, `front` … the padding before, `behind` … from element to element of a window.
"""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import K, N, T, block, load, pointer, quotient, rest, store, thread


def pinned(source: str, numbers: dict[str, int]) -> str:
    """The text with these parameters known in it, and in its name: loops over them are written out. The parameters stay."""
    first, _, body = source.partition(":\n")
    name = first[4:first.index("(")]
    kind = "i64" if ": i64" in first.rpartition("pointer[")[2] else "i32"
    spelled = "".join(f"    {key} = {kind}({number})\n" for key, number in numbers.items())
    tag = "x".join(map(str, numbers.values()))
    return f"{first.replace(name, f'{name}_{tag}', 1)}:\n{spelled}{body}"


def max_pool(x: pointer[T], o: pointer[T], taps: pointer[K], elements: N, depth: N, height: N, width: N, layers: N,
             rows: N, columns: N, deep: N, tall: N, wide: N, onward: N, down: N, across: N, front: N, top: N, left: N,
             behind: N, apart: N, beside: N) -> block[256]:
    """The largest element of a window, the first of equal ones, the last NaN; and the number of its tap."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        line = quotient(item, columns)
        stack = quotient(line, rows)
        column = N(N(rest(item, columns) * across) - left)
        row = N(N(rest(line, rows) * down) - top)
        layer = N(N(rest(stack, layers) * onward) - front)
        plane = N(N(quotient(stack, layers) * depth) * N(height * width))
        best = T(0)
        found = N(-1)
        for w in range(deep):
            z = N(layer + N(N(w) * behind))
            for v in range(tall):
                y = N(row + N(N(v) * apart))
                there = (z >= 0) & (z < depth) & (y >= 0) & (y < height)
                edge = N(N(N(min(max(z, N(0)), N(depth - 1)) * height) + min(max(y, N(0)), N(height - 1))) * width)
                for u in range(wide):
                    c = N(column + N(N(u) * beside))
                    value = load(x, N(plane + N(edge + min(max(c, N(0)), N(width - 1)))), 0, 3)
                    if there & (c >= 0) & (c < width) & ((found < 0) | (value > best) | (value != value)):
                        best = value
                        found = N(N(N(N(w) * tall) + N(v)) * wide + N(u))
        store(o, item, best, 1, 3)
        store(taps, item, K(max(found, N(0))), 2, 3)


def max_pool_grad(g: pointer[T], taps: pointer[K], o: pointer[T], elements: N, depth: N, height: N, width: N, layers: N,
                  rows: N, columns: N, deep: N, tall: N, wide: N, onward: N, down: N, across: N, front: N, top: N, left: N,
                  behind: N, apart: N, beside: N, layer_spans: N, row_spans: N, column_spans: N) -> block[256]:
    """What windows give to the element that is their maximum. `layer_spans` …: how many windows may contain an element."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        line = quotient(item, width)
        stack = quotient(line, height)
        plane = quotient(stack, depth)
        column = N(rest(item, width) + left)
        row = N(rest(line, height) + top)
        layer = N(rest(stack, depth) + front)
        first_c = quotient(N(max(N(column - N(N(wide - 1) * beside)), N(0)) + N(across - 1)), across)
        first_r = quotient(N(max(N(row - N(N(tall - 1) * apart)), N(0)) + N(down - 1)), down)
        first_l = quotient(N(max(N(layer - N(N(deep - 1) * behind)), N(0)) + N(onward - 1)), onward)
        end_c = min(quotient(column, across), N(columns - 1))
        end_r = min(quotient(row, down), N(rows - 1))
        end_l = min(quotient(layer, onward), N(layers - 1))
        total = T(0)
        for w in range(layer_spans):
            z = N(first_l + N(w))
            i = quotient(max(N(layer - N(z * onward)), N(0)), behind)
            in_z = (z <= end_l) & (N(N(z * onward) + N(i * behind)) == layer)
            for v in range(row_spans):
                y = N(first_r + N(v))
                j = quotient(max(N(row - N(y * down)), N(0)), apart)
                in_y = in_z & (y <= end_r) & (N(N(y * down) + N(j * apart)) == row)
                edge = N(N(N(N(N(plane * layers) + min(z, N(layers - 1))) * rows) + min(y, N(rows - 1))) * columns)
                for u in range(column_spans):
                    c = N(first_c + N(u))
                    window = N(edge + min(c, N(columns - 1)))
                    k = quotient(max(N(column - N(c * across)), N(0)), beside)
                    in_c = in_y & (c <= end_c) & (N(N(c * across) + N(k * beside)) == column)
                    tap = N(load(taps, window, 1, 3))
                    if in_c & (tap == N(N(N(N(i * tall) + j) * wide) + k)):
                        total = T(total + load(g, window, 0, 3))
        store(o, item, total, 2, 3)


def max_pool_gather(x: pointer[T], taps: pointer[K], o: pointer[T], elements: N, depth: N, height: N, width: N, layers: N,
                    rows: N, columns: N, deep: N, tall: N, wide: N, onward: N, down: N, across: N, front: N, top: N, left: N,
                    behind: N, apart: N, beside: N) -> block[256]:
    """The element of x at the tap of each window; 0 where that is padding."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        line = quotient(item, columns)
        stack = quotient(line, rows)
        tap = N(load(taps, item, 1, 3))
        lines = quotient(tap, wide)
        column = N(N(N(rest(item, columns) * across) - left) + N(rest(tap, wide) * beside))
        row = N(N(N(rest(line, rows) * down) - top) + N(rest(lines, tall) * apart))
        layer = N(N(N(rest(stack, layers) * onward) - front) + N(quotient(lines, tall) * behind))
        value = T(0)
        if (layer >= 0) & (layer < depth) & (row >= 0) & (row < height) & (column >= 0) & (column < width):
            place = N(N(N(N(N(quotient(stack, layers) * depth) + layer) * height) + row) * width)
            value = load(x, N(place + column), 0, 3)
        store(o, item, value, 2, 3)


def avg_pool(x: pointer[T], o: pointer[T], elements: N, depth: N, height: N, width: N, layers: N, rows: N, columns: N,
             deep: N, tall: N, wide: N, onward: N, down: N, across: N, front: N, top: N, left: N, begin_layer: N,
             begin_row: N, begin_column: N, end_layer: N, end_row: N, end_column: N, divisor: N) -> block[256]:
    """The mean of a window. Of its elements those count that lie between `begin_layer` … and `end_layer` …, padding or not,
    unless there is a `divisor`."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        line = quotient(item, columns)
        stack = quotient(line, rows)
        column = N(N(rest(item, columns) * across) - left)
        row = N(N(rest(line, rows) * down) - top)
        layer = N(N(rest(stack, layers) * onward) - front)
        plane = N(N(quotient(stack, layers) * depth) * N(height * width))
        total = T(0)
        for w in range(deep):
            z = N(layer + N(w))
            for v in range(tall):
                y = N(row + N(v))
                there = (z >= 0) & (z < depth) & (y >= 0) & (y < height)
                edge = N(N(N(min(max(z, N(0)), N(depth - 1)) * height) + min(max(y, N(0)), N(height - 1))) * width)
                for u in range(wide):
                    c = N(column + N(u))
                    value = load(x, N(plane + N(edge + min(max(c, N(0)), N(width - 1)))), 0, 2)
                    if there & (c >= 0) & (c < width):
                        total = T(total + value)
        size = divisor
        if divisor == 0:
            size = N(min(N(column + wide), end_column) - max(column, begin_column))
            size = N(size * N(min(N(row + tall), end_row) - max(row, begin_row)))
            size = N(size * N(min(N(layer + deep), end_layer) - max(layer, begin_layer)))
        store(o, item, T(total / T(size)), 1, 2)


def avg_pool_grad(g: pointer[T], o: pointer[T], elements: N, depth: N, height: N, width: N, layers: N, rows: N, columns: N,
                  deep: N, tall: N, wide: N, onward: N, down: N, across: N, front: N, top: N, left: N, begin_layer: N,
                  begin_row: N, begin_column: N, end_layer: N, end_row: N, end_column: N, divisor: N, layer_spans: N,
                  row_spans: N, column_spans: N) -> block[256]:
    """The share that an element has in the windows that contain it; numbers as for `avg_pool` and `max_pool_grad`."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        line = quotient(item, width)
        stack = quotient(line, height)
        plane = quotient(stack, depth)
        column = N(rest(item, width) + left)
        row = N(rest(line, height) + top)
        layer = N(rest(stack, depth) + front)
        first_c = quotient(N(max(N(column - N(wide - 1)), N(0)) + N(across - 1)), across)
        first_r = quotient(N(max(N(row - N(tall - 1)), N(0)) + N(down - 1)), down)
        first_l = quotient(N(max(N(layer - N(deep - 1)), N(0)) + N(onward - 1)), onward)
        end_c = min(quotient(column, across), N(columns - 1))
        end_r = min(quotient(row, down), N(rows - 1))
        end_l = min(quotient(layer, onward), N(layers - 1))
        total = T(0)
        for w in range(layer_spans):
            z = N(first_l + N(w))
            at_z = N(N(z * onward) - front)
            for v in range(row_spans):
                y = N(first_r + N(v))
                at_y = N(N(y * down) - top)
                edge = N(N(N(N(N(plane * layers) + min(z, N(layers - 1))) * rows) + min(y, N(rows - 1))) * columns)
                area = N(N(min(N(at_z + deep), end_layer) - max(at_z, begin_layer))
                         * N(min(N(at_y + tall), end_row) - max(at_y, begin_row)))
                for u in range(column_spans):
                    c = N(first_c + N(u))
                    at_c = N(N(c * across) - left)
                    value = load(g, N(edge + min(c, N(columns - 1))), 0, 2)
                    if (z <= end_l) & (y <= end_r) & (c <= end_c):
                        if divisor == 0:
                            value = T(value / T(N(area * N(min(N(at_c + wide), end_column) - max(at_c, begin_column)))))
                        total = T(total + value)
        if divisor != 0:
            total = T(total / T(divisor))
        store(o, item, total, 1, 2)
