"""What a library of matrix products is asked for: data that lowering writes, plans store, and the library's binding reads.

A `Product` is ``activation(A @ B + bias)`` for a batch of matrices. Its result is dense, row by row. Sizes, pitches and
strides are in elements.
"""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("", "relu", "gelu")
"""What can follow; "gelu" is the approximation by tanh."""

DTYPES = ("f32", "f64", "bf16", "f16")
"""Of factors, bias and result, by their short names."""

WORKSPACE = 32 << 20
"""Bytes that the library may use while it computes a product, as NVIDIA advises for its newer GPUs."""

SLACK = 256
"""Bytes in addition, so that the workspace can begin at a multiple of this."""


@dataclass(frozen=True, slots=True)
class Laid:
    """Where matrices lie: `pitch` from row to row, or from column to column if neighbours of a column lie beside each other
    (`turned`); `stride` from matrix to matrix, 0 if all are one; `first`, where the first one begins."""

    turned: bool
    pitch: int
    stride: int
    first: int

    def end(self, batch: int, rows: int, columns: int) -> int:
        """Elements up to the end of the last matrix."""
        lines, length = (columns, rows) if self.turned else (rows, columns)
        return self.first + (batch - 1) * self.stride + (lines - 1) * self.pitch + length


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products of m x k with k x n matrices. `bias`: n numbers are added to every row. `tf32`: float32 may be
    rounded to TF32."""

    dtype: str
    tf32: bool
    m: int
    n: int
    k: int
    batch: int
    a: Laid
    b: Laid
    bias: bool = False
    activation: str = ""

    @property
    def work(self) -> int:
        """Multiplications."""
        return self.batch * self.m * self.n * self.k
