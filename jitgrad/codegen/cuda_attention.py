"""GPU lowering of attention and its gradient: which kernels, with which tiles, for which operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import gpu_launch, is_wide, lowers_on_gpu
from jitgrad.codegen.cuda_unroll import spell
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.codegen.library_attention import mask_and_draw
from jitgrad.dtypes import DType
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cuda import attention, attention_cores
from jitgrad.ops.attention import mask_runs, sum_dtype

ENOUGH = 128
"""Large tiles that give every multiprocessor one."""

LOG2_E = 1.4426950408889634

WIDEST = 256
"""Elements of a row that tensor cores take."""

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class TensorTile:
    """For tensor cores. `warps` warps of a block have `fragments` times 16 rows each, which they multiply with `turns` rows
    at a time. Rows have `across` elements in shared memory, where there are so many `tiles` of either kind; a block makes
    `chunk` columns of the result."""

    warps: int
    fragments: int
    turns: int
    across: int
    chunk: int
    tiles: tuple[int, int]

    module = attention

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.fragments

    @property
    def words(self) -> int:
        """Of 32 bits, of shared memory: at most 12,288, so that every block may have them."""
        return (self.tiles[0] * self.rows + self.tiles[1] * self.turns) * self.across // 2

    def constants(self, dtype: DType) -> dict[str, int | float | str]:
        return {"D": self.across, "W": self.chunk, "T": self.turns, "M": self.fragments, "ROWS": self.rows,
                "THREADS": 32 * self.warps, "WORDS": self.words, "SHIFT": int(self.across % 64 != 0),
                "BITS": 7 if self.across % 64 == 0 else 3, "LOG2_E": LOG2_E, "multiply": f"multiply_{dtype.short}",
                "pack": f"pack_{dtype.short}"}


@dataclass(frozen=True)
class CoresTile:
    """For CUDA cores: as many rows as 16 threads have, `lanes` each; a block makes `chunk` columns of the result."""

    lanes: int
    chunk: int

    module = attention_cores

    @property
    def rows(self) -> int:
        return 16 * self.lanes

    def constants(self, dtype: DType) -> dict[str, int | float | str]:
        elements = (4 * DEPTH + self.rows) * (self.rows + self.lanes)
        return {"L": self.lanes, "R": self.rows, "W": self.chunk, "DEPTH": DEPTH, "WORDS": elements}


DEPTH = 16
"""Columns of a slice on CUDA cores."""

Tile = TensorTile | CoresTile


def tensor_tile(width: int, gradient: bool, large: bool) -> TensorTile:
    """The tile for rows of so many elements; a `large` one where there are enough blocks of it."""
    across = next(n for n in (32, 64, 96, 128, WIDEST) if width <= n)
    if gradient:
        warps, turns = {128: (4, 16), 256: (1, 16)}.get(across, (4, 32))
        return TensorTile(warps, 1, turns, across, min(across, 128), (2, 4))
    if across == 256:
        return TensorTile(4, 1, 16, across, 128, (1, 2))
    return TensorTile(4, 2, 32, across, across, (1, 2)) if large else TensorTile(4, 1, 64, across, across, (1, 2))


def text_of(name: str, tile: Tile, dtype: DType, wide_rows: bool, plain: bool, wide: bool) -> str:
    """The text of a kernel for a tile and a type of elements. `wide_rows`: they are read 16 bytes at a time; `plain`:
    without mask and dropout; `wide`: with indices in int64."""
    constants = {"E": dtype.short, "C": sum_dtype(dtype).short, "wide": int(wide_rows), **tile.constants(dtype),
                 **({"masked": 0, "dropped": 0} if plain else {})}
    return spell(f"{name}_{dtype.short}", getattr(tile.module, name), constants, tile.module.PIECES, wide)


@dataclass(frozen=True)
class _Operands:
    """What both directions know of a call: the types of q, k and v, and the arguments that follow from them. `first`: where
    q is among the inputs; `last`: where what belongs to the forward pass ends."""

    call: Call
    aligned: bool
    first: int
    last: int

    @property
    def types(self) -> tuple[TensorType, TensorType, TensorType]:
        q, k, v = self.call.inputs[self.first:self.first + 3]
        return q, k, v

    @property
    def width(self) -> int:
        """Of rows of q, k and v, whichever are longer."""
        return max(self.types[0].shape[2], self.types[2].shape[2])

    @property
    def wide_rows(self) -> bool:
        """Whether all rows can be read 16 bytes at a time."""
        lanes = 16 // self.types[0].dtype.itemsize
        return self.aligned and all(t.shape[2] % lanes == 0 for t in self.types)

    def behind_value(self) -> tuple[TensorType | None, bool, list[Buffer]]:
        """See `mask_and_draw`."""
        inputs = range(self.first, self.last)
        return mask_and_draw([self.call.inputs[i] for i in inputs], [self.call.input(i) for i in inputs])

    def given(self) -> list[Buffer]:
        """q, k, v, mask, and the four of dropout."""
        _, _, extra = self.behind_value()
        return [self.call.input(self.first + k) for k in range(3)] + extra

    def numbers(self, tiles: int, chunks: int) -> tuple[int, ...]:
        """The integers of all kernels, from ``queries`` on."""
        q, k, v = self.types
        mask, dropped, _ = self.behind_value()
        runs, period = mask_runs(mask.shape) if mask else (1, 1)
        row = 0 if mask is None or mask.shape[-2] == 1 else mask.shape[-1]
        matrix = mask.shape[-2] * mask.shape[-1] if mask else 0
        attrs = self.call.attrs
        return (q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.shape[0] // max(k.shape[0], 1), int(mask is not None),
                q.shape[0] // runs, period, row, matrix, int(attrs["causal"]), int(attrs["zero"]), int(dropped),
                tiles, chunks)

    def tile(self, gradient: bool, of_both: bool, heads: int, rows: int, columns: int) -> Tile:
        """The tile of a kernel that makes so many rows and columns for each head, `of_both` k and v at once."""
        dtype = self.types[0].dtype
        if dtype.itemsize == 2 and self.width <= WIDEST:
            large = tensor_tile(self.width, gradient, True)
            return large if heads * -(-rows // large.rows) >= ENOUGH else tensor_tile(self.width, gradient, False)
        lanes = 16 // sum_dtype(dtype).itemsize
        return CoresTile(lanes, (1 if of_both or columns <= 16 * lanes else 2) * 16 * lanes)

    def launch(self, name: str, heads: int, rows: int, columns: int, *buffers: Buffer) -> CudaLaunch:
        """A block for every tile of rows of every head, and for every chunk of columns. What is added to `buffers`: the
        numbers that all kernels take."""
        tile = self.tile(name != "attention", name == "attention_keys", heads, rows, columns)
        tiles, chunks = -(-rows // tile.rows), max(1, -(-columns // tile.chunk))
        dtype, wide, plain = self.types[0].dtype, is_wide(self.call), self.last == self.first + 3
        return gpu_launch(text_of(name, tile, dtype, self.wide_rows, plain, wide), heads * tiles * chunks, *buffers,
                          *self.numbers(tiles, chunks), wide=wide, alignment=16 if self.wide_rows else dtype.itemsize)


@lowers_on_gpu("attention")
def lower_attention(call: Call, aligned: bool) -> CudaLowered:
    operands = _Operands(call, aligned, 0, len(call.inputs))
    q, _, v = operands.types
    return CudaLowered((operands.launch("attention", q.shape[0], q.shape[1], v.shape[2], *operands.given(), call.output(0),
                                        call.output(1)),))


@lowers_on_gpu("attention_grad")
def lower_attention_grad(call: Call, aligned: bool) -> CudaLowered:
    out, lse = len(call.inputs) - 2, call.input(len(call.inputs) - 1)
    operands = _Operands(call, aligned, 1, out)
    q, k, v = operands.types
    rows, sums, dots, wide = q.shape[0] * q.shape[1], sum_dtype(q.dtype), call.scratch(0), is_wide(call)
    text = spell(f"attention_dots_{q.dtype.short}", attention.attention_dots, {"E": q.dtype.short, "C": sums.short},
                 wide=wide)
    make_dots = gpu_launch(text, -(-rows // 8), call.input(0), call.input(out), dots, rows, v.shape[2], wide=wide,
                           alignment=sums.itemsize)
    given = (call.input(0), *operands.given(), lse, dots)
    dq = operands.launch("attention_queries", q.shape[0], q.shape[1], q.shape[2], *given, call.output(0))
    dk = operands.launch("attention_keys", k.shape[0], k.shape[1], max(k.shape[2], v.shape[2]), *given, call.output(1),
                         call.output(2))
    return CudaLowered((make_dots, dq, dk), (max(8, rows * sums.itemsize),))
