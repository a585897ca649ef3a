"""Products of a few rows, as inference makes them, with a B whose columns are lines of memory: C = A @ B.

`source` is the text of a core beside that of `gemm`: same arguments, same blocks of C. It has no panels of B: each item
reads its columns of B once, in order, where they lie (`tile_lines`), so that a product of one row takes as long as reading
B takes. An item copies what it needs of A to the stack, padded to whole vectors; there 16-bit floats are wide. B may be of
narrower numbers than A and may have a factor per column, or one for all: B[d, j] * scale[j] is made, and rounded, where it
is read. `fits` says for which products this is the faster way.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgrad.kernels.cpu import gemm
from jitgrad.kernels.cpu.gemm import ITEMSIZES, Arrangement, Form, Matrices
from jitgrad.kernels.cpu.tile import PANEL_BYTES, tile_for
from jitgrad.kernels.cpu.tile_lines import HIGHEST, KINDS

FEW = 24                                        # rows up to which B is better read in place
DEPTH_PER_ROW = 16                              # steps of the depth per row from which it pays to add up lanes at the end
ITEM_ELEMENTS = 1 << 15                         # of B, below which an item is not cut further

SCALE_ARGUMENTS = ("scale_first", "scale_step")
"""The integers behind `gemm.ARGUMENTS` and a pointer to the factors, in a core with factors."""

_CORE = """\
def {name}(args, begin, end, thread):
    a = pointer(args, 1, {left})
    b = pointer(args, 2, {right})
    c = pointer(args, 3, {total})
{unpack}{scale}
    panel = make_panel(c)
    for item in range(begin, end):
{locate}
        index_3 = batch % size_3
        index_2 = batch // size_3 % size_2
        index_1 = batch // (size_3 * size_2) % size_1
        index_0 = batch // (size_3 * size_2 * size_1)
        a_start = a_first + index_0 * a_0 + index_1 * a_1 + index_2 * a_2 + index_3 * a_3
        b_start = b_first + index_0 * b_0 + index_1 * b_1 + index_2 * b_2 + index_3 * b_3 + first_column * b_column
        c_start = batch * c_batch + first_column
        for first_step in range(0, k, depth_block):
            depth = min(depth_block, k - first_step)
            for row in range(m):
                a_place = a_start + row * a_row + first_step * a_step
                if a_step == 1:
                    for d in range(depth):
                        store(panel, row * a_panel + d, load(a, a_place + d, 0, 2), 1, 2)
                else:
                    for d in range(depth):
                        store(panel, row * a_panel + d, load(a, a_place + d * a_step, 0, 2), 1, 2)
                for d in range(depth, depth + -depth % {lanes}):
                    store(panel, row * a_panel + d, 0, 1, 2)
            for row in range(0, m, panel_rows):
                {piece}(min(panel_rows, m - row), last_column - first_column, depth, panel, row * a_panel, a_panel,
                        b, b_start + first_step, b_column, c, c_start + row * c_row, c_row, first_step{factors})
"""

_SCALE = """\
    scale = pointer(args, {place}, {total})
    scale_first = args[{place} + 1]
    scale_step = args[{place} + 2]
"""


@dataclass(frozen=True, slots=True)
class Lines:
    """A core: the element types of A, B and C, and whether B has factors."""

    left: str
    right: str
    total: str
    scaled: bool = False

    @property
    def name(self) -> str:
        """``lines_f32``; with other types of A or C, those too."""
        kinds = dict.fromkeys((self.right, self.left, self.total))
        return f"lines_{'_'.join(kinds)}{'_scaled' if self.scaled else ''}"


def fits(form: Form, m: int, n: int, k: int, b: Matrices) -> bool:
    """True when a product that `form` would carry out has few rows and a B of lines that are worth it."""
    return 1 <= m <= FEW and n > 1 and b.row == 1 and form.right in KINDS and form.total in ("f32", "f64") and (
        k >= max(2 * form.tile.lanes, DEPTH_PER_ROW * m))


def widens(short: str, m: int, n: int, k: int, b: Matrices) -> bool:
    """True when a B of `short` numbers can become float32 where such a product reads it."""
    return short in ("i8", "bf16", "f16") and fits(gemm.form_for("f32", "f32"), m, n, k, b)


def source(lines: Lines) -> str:
    """The text of a core. Arguments: A, B, C, `gemm.ARGUMENTS`; with factors, those and `SCALE_ARGUMENTS`."""
    place = 4 + len(gemm.ARGUMENTS)
    return _CORE.format(
        name=lines.name, left=lines.left, right=lines.right, total=lines.total, unpack=gemm.unpack(),
        scale=_SCALE.format(place=place, total=lines.total) if lines.scaled else "",
        locate="\n".join(f"        {name} = {value}" for name, value in gemm.LOCATE_ITEM),
        lanes=tile_for(ITEMSIZES[lines.total]).lanes, piece="multiply_scaled_lines" if lines.scaled else "multiply_lines",
        factors=", scale, scale_first + first_column * scale_step, scale_step" if lines.scaled else "")


def arrange(lines: Lines, batch: tuple[int, ...], m: int, n: int, k: int, a: Matrices, b: Matrices) -> Arrangement:
    """The blocking of C[*batch, m, n] = A[*batch, m, k] @ B[*batch, k, n], with C contiguous, for which `fits` is true.
    Items have all rows."""
    size = ITEMSIZES[lines.total]
    lanes = tile_for(size).lanes
    count = 1
    for length in batch:
        count *= length
    least = max(-(-ITEM_ELEMENTS // k), 1)
    columns = max(-(-n // -(-2 * gemm.ITEMS // count)), least)
    columns = min(columns + -columns % lanes, n)
    column_blocks = -(-n // columns)
    deepest = PANEL_BYTES // size // m // lanes * lanes - lanes                     # a vector apart from powers of two
    depth_block = -(-k // -(-k // deepest))
    depth_block += -depth_block % lanes
    pitch = depth_block + lanes
    groups = -(-m // HIGHEST)
    sizes = (1,) * (gemm.BATCH_DIMENSIONS - len(batch)) + batch
    integers = (m, n, k, -(-m // groups), pitch, a.row, a.column, 0, b.row, b.column, 0, 0, n, m * n, m, 1,
                columns, column_blocks, depth_block, 0, *sizes[1:],
                a.first, *gemm.padded_strides(a.batch), b.first, *gemm.padded_strides(b.batch))
    return Arrangement(None, None, column_blocks * count, integers)
