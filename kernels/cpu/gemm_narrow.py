"""Text of GEMM kernels for operands that are narrower than their sums, and for integers: how panels come about.

Two ways lead from 16-bit floats and bytes to a tile of 32-bit sums. *Widened*: elements become float32 where they are
copied anyway, A in its packing phase and B on its way to the panel on the stack, so that memory is read at its narrow
size; the tile is that of float32. *Grouped*: panels keep the narrow type, with the steps of a group side by side
(`tile_dot`). Integers for which the processor has no dot product are multiplied by a loop that LLVM vectorizes. `gemm` puts
these bodies into its core and packing phase; `lanes`, `columns` and so on are filled in there.
"""

from __future__ import annotations

CHUNK = 64                                      # steps that are widened at once before they are transposed

WIDEN_PANEL = """\
                lines = panel
                lines_place = 0
                lines_step = {columns}
                if b_step == 1:
                    for d in range(0, depth, {chunk}):
                        steps = min({chunk}, depth - d)
                        for j in range(0, width, {lanes}):
                            count = min({lanes}, width - j)
                            for i in range(count):
                                from_place = b_place + d + (j + i) * b_column
                                for s in range(steps):
                                    store(wide, i * {chunk} + s, load(b, from_place + s, 0, 2), 1, 2)
                            for s in range(0, steps, {lanes}):
                                transpose_tile(count, wide, s, {chunk}, panel, (d + s) * {columns} + j, {columns}, {lanes})
                elif b_column == 1 and width == {columns}:
                    for d in range(depth):
                        for j in range({columns}):
                            store(panel, d * {columns} + j, load(b, b_place + d * b_step + j, 0, 2), 1, 2)
                else:
                    for d in range(depth):
                        for j in range(width):
                            store(panel, d * {columns} + j, load(b, b_place + d * b_step + j * b_column, 0, 2), 1, 2)
"""

GROUP_PANEL = """\
                lines = b
                lines_place = b_place{blocks}
                lines_step = {line}
                if b_copies != 0:
                    lines = panel
                    lines_place = {start}
                    for d in range(0, depth, {chunk}):
                        steps = min({chunk}, depth - d)
                        to_place = lines_place + d // {group} * {line}
                        if b_step == 1:
                            for j in range(0, width, {lanes}):
                                transpose_groups(min(width - j, {lanes}), steps, b, b_place + d + j * b_column, b_column,
                                                 panel, to_place + j * {group}, {line})
                        else:
                            run = {lanes} if b_column == 1 else 1
                            for j in range(0, width, run):
                                interleave_steps(min(run, width - j), steps, b, b_place + d * b_step + j * b_column, b_step,
                                                 panel, to_place + j * {group}, {line})
"""

BALANCE = """\
                    balance_panel({columns}, depth, panel, lines_place, {line})
"""

BALANCED_BLOCKS = """\
        for done in range(0, steps_of_all, block):
            depth = min(block, steps_of_all - done)
            place += {line}
{body}            for k in range(min(panels_per_item, panels - panel)):
                balance_panel({columns}, depth, o, place + k * {size}, {line})
            start += depth * depth_stride
            place += (depth + {last}) // {group} * {line}
        start -= steps_of_all * depth_stride
"""

COPY_PANEL = """\
                lines = panel
                lines_place = 0
                lines_step = {columns}
                if b_column == 1:
                    for d in range(depth):
                        for j in range(width):
                            store(panel, d * {columns} + j, load(b, b_place + d * b_step + j, 0, 4), 1, 4)
                else:
                    for j in range(width):
                        for d in range(depth):
                            store(panel, d * {columns} + j, load(b, b_place + d * b_step + j * b_column, 0, 4), 1, 4)
"""

MULTIPLY = """\
                    c_place = c_start + row * c_row + column
                    for i in range(height):
                        if keep == 0:
                            for j in range(width):
                                store(c, c_place + i * c_row + j, 0, 2, 4)
                        for d in range(depth):
                            x = load(a, a_place + i * a_row + d * a_step, 3, 4)
                            for j in range(width):
                                y = load(c, c_place + i * c_row + j, 2, 4)
                                store(c, c_place + i * c_row + j, y + x * load(lines, d * {columns} + j, 1, 4), 2, 4)
"""

WIDEN_ROWS = """\
        for d in range(depth):
            for i in range(height):
                store(o, place + d * width + i, load(x, start + i + d * depth_stride, 0, 2), 1, 2)
"""

WIDEN_DEPTH = """\
        wide = make_panel(o)
        for d in range(0, depth, {chunk}):
            steps = min({chunk}, depth - d)
            whole = steps - steps % {lanes}
            for i in range(0, height, {lanes}):
                count = min({lanes}, height - i)
                for r in range(count):
                    from_place = start + (i + r) * row_stride + d
                    for s in range(steps):
                        store(wide, r * {chunk} + s, load(x, from_place + s, 0, 3), 2, 3)
                for s in range(0, whole, {lanes}):
                    transpose_tile(count, wide, s, {chunk}, o, place + (d + s) * width + i, width, {lanes})
                for s in range(whole, steps):
                    for r in range(count):
                        store(o, place + (d + s) * width + i + r, load(wide, r * {chunk} + s, 2, 3), 1, 3)
"""

GROUP_ROWS = """\
        count = min(panels_per_item, panels - panel)
        for d in range(0, depth, {chunk}):
            for s in range({chunk}):
                for i in range(0, count * panel_rows + {lanes}, {lanes}):
                    prefetch(x, start + i + (d + {chunk} + s) * depth_stride)
            for k in range(count):
                height = min(panel_rows, rows - first - k * panel_rows)
                for i in range(0, height, {lanes}):
                    interleave_steps(min(height - i, {lanes}), min({chunk}, depth - d), x,
                                     start + k * panel_rows + i + d * depth_stride, depth_stride,
                                     o, place + k * {size} + d * width + i * {group}, width * {group})
"""

GROUP_DEPTH = """\
        for d in range(0, depth, {chunk}):
            for i in range(height):
                prefetch(x, start + i * row_stride + d + {soon})
            for i in range(0, height, {lanes}):
                transpose_groups(min(height - i, {lanes}), min({chunk}, depth - d), x, start + i * row_stride + d,
                                 row_stride, o, place + d * width + i * {group}, width * {group})
"""

GROUP_ANY = """\
        for i in range(height):
            interleave_steps(1, depth, x, start + i * row_stride, depth_stride, o, place + i * {group}, width * {group})
"""
