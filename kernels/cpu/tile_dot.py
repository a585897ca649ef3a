"""The pieces of products of narrow numbers, as plain Python on pointers: groups of steps of the depth that fill 32 bits.

Processors multiply and add up such groups in one instruction: pairs of bfloat16 into float32 (AVX512-BF16), quads of
bytes into int32 (AVX512-VNNI). Panels hold the members of a group side by side, and steps that the depth lacks as zeros.
In here each piece is a loop that says what it means; `kernels.cpu.tile_dot_text` has them as LLVM text for vectors of 512
bits. `has_dot` says for which operands they are used. Offsets and strides are counted in elements.

VNNI multiplies an unsigned by a signed byte, so A is stored 128 too high, as uint8. A line in front of a panel of B holds,
as int32, what has to be added for that: -128 times the sum of each column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import config
from jitgrad.kernels.cpu.tile import Pointer, vector_unit

BIAS = 128


@functools.cache
def has_dot(short: str) -> bool:
    """True where products of ``bf16`` or ``i8`` are best made of dot products.

    A Xeon of Intel's fifth generation takes four times as long for the instruction for bfloat16 as for a multiply-add of
    float32 (measured, vectors of 512 and of 256 bits), and so half as long for the same product with widened operands.
    It is therefore used on AMD's processors alone: a product of 512 x 512 matrices in one thread has 1.9 times the rate of
    float32 on Zen 5."""
    processor = config.processor()
    if vector_unit()[0] != 512 or "avx512bw" not in processor.features:
        return False
    if short == "bf16":
        return "avx512bf16" in processor.features and processor.model.startswith("znver")
    return short == "i8" and "avx512vnni" in processor.features


# --- plain meanings -------------------------------------------------------------------------------------------------


def multiply_pairs(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                   b: Pointer, b_offset: int, b_step: int, c: Pointer, c_offset: int, c_row: int,
                   accumulate: int) -> None:
    """C[i, j] = (C[i, j] if accumulate else 0) + sum over d of A[i, d] * B[d, j] for i < rows, j < columns, in float32.

    A[i, 2q + t] is ``a[a_offset + i * a_row + q * a_step + t]``, B[2q + t, j] ``b[b_offset + q * b_step + 2j + t]``,
    both bfloat16; rows of A lie side by side (`a_row` is 2). Of a pair the second product is added first. Numbers too small
    to be normal count as 0."""
    for i in range(rows):
        for j in range(columns):
            total = c[c_offset + i * c_row + j] if accumulate else np.float32(0)
            for q in range((depth + 1) // 2):
                for t in (1, 0):
                    x, y = a[a_offset + i * a_row + q * a_step + t], b[b_offset + q * b_step + 2 * j + t]
                    total = np.float32(total + x * y)
            c[c_offset + i * c_row + j] = total


def multiply_quads(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, a_step: int,
                   b: Pointer, b_offset: int, b_step: int, c: Pointer, c_offset: int, c_row: int,
                   accumulate: int) -> None:
    """C[i, j] = (C[i, j] if accumulate else 0) + L[j] + sum over d of A[i, d] * B[d, j], modulo 2**32.

    A is uint8, B int8, laid out as in `multiply_pairs` in groups of four; L is the line in front of B
    (`balance_panel`)."""
    line = _words(b, b_offset - b_step, columns)
    for i in range(rows):
        for j in range(columns):
            total = int(line[j]) + (int(c[c_offset + i * c_row + j]) if accumulate else 0)
            for q in range((depth + 3) // 4):
                for t in range(4):
                    total += int(a[a_offset + i * a_row + q * a_step + t]) * int(b[b_offset + q * b_step + 4 * j + t])
            c[c_offset + i * c_row + j] = total


def balance_panel(columns: int, depth: int, b: Pointer, b_offset: int, b_step: int) -> None:
    """Write the line in front of a panel of quads: for each column -128 * sum over d of B[d, j], as int32."""
    line = _words(b, b_offset - b_step, columns)
    for j in range(columns):
        line[j] = -BIAS * sum(int(b[b_offset + q * b_step + 4 * j + t]) for q in range((depth + 3) // 4)
                              for t in range(4))


def interleave_steps(count: int, steps: int, x: Pointer, x_offset: int, x_step: int, o: Pointer, o_offset: int,
                     o_step: int) -> None:
    """o[o_offset + q * o_step + j * group + t] = x[x_offset + d * x_step + j] if d < steps else 0, where d = q * group + t,
    for j < count and all groups that hold a step: of at most 16 rows or columns that lie side by side. An uint8 `o` gets
    bytes 128 higher."""
    group = 4 // o.memory.dtype.itemsize
    for d in range(-(-steps // group) * group):
        for j in range(count):
            value = x[x_offset + d * x_step + j] if d < steps else 0
            _put(o, o_offset + d // group * o_step + j * group + d % group, value)


def transpose_groups(rows: int, steps: int, x: Pointer, x_offset: int, x_row: int, o: Pointer, o_offset: int,
                     o_row: int) -> None:
    """o[o_offset + q * o_row + i * group + t] = x[x_offset + min(i, rows - 1) * x_row + d] if d < steps else 0, where
    d = q * group + t, for i < 16 and all groups that hold a step. `steps` are 64 bytes at most, rows 16. An uint8 `o`
    gets bytes 128 higher."""
    group = 4 // o.memory.dtype.itemsize
    for i in range(16):
        for d in range(-(-steps // group) * group):
            value = x[x_offset + min(i, rows - 1) * x_row + d] if d < steps else 0
            _put(o, o_offset + d // group * o_row + i * group + d % group, value)


def _put(o: Pointer, place: int, value: Any) -> None:
    o[place] = int(value) + BIAS if o.memory.dtype == np.uint8 else value


def _words(p: Pointer, offset: int, count: int) -> np.ndarray:
    """`count` int32 in the memory of bytes `p`."""
    first = p.place(offset)
    return p.memory[first:first + 4 * count].view(np.int32)


NAMES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
    multiply_pairs, multiply_quads, balance_panel, interleave_steps, transpose_groups)}
