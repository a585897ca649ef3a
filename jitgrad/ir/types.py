"""The type of a value: dtype, shape, device. Prints as ``f32[64, 10]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Protocol

from jitgrad import dtypes
from jitgrad.dtypes import DType


class Typed(Protocol):
    """What gradient rules may ask of any operand: a Tensor, a graph Value or a bare type."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype, shape and device of a dense array."""

    dtype: DType
    shape: tuple[int, ...]
    device: str = "cpu"

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def with_shape(self, shape: tuple[int, ...]) -> TensorType:
        return TensorType(self.dtype, shape, self.device)

    def with_dtype(self, dtype: DType) -> TensorType:
        return self if dtype is self.dtype else TensorType(dtype, self.shape, self.device)

    def __str__(self) -> str:
        device = "" if self.device == "cpu" else f"@{self.device}"
        return f"{self.dtype.short}[{', '.join(map(str, self.shape))}]{device}"

    __repr__ = __str__


_TYPE = re.compile(r"(\w+)\[([\d, ]*)\](?:@([\w:]+))?$")


@lru_cache(maxsize=4096)
def parse_type(text: str) -> TensorType:
    """The inverse of ``str(type)``; ValueError for anything else."""
    match = _TYPE.match(text.strip())
    if not match or match[1] not in dtypes.BY_SHORT:
        raise ValueError(f"not a tensor type: {text!r}")
    shape = tuple(int(s) for s in match[2].split(",") if s.strip())
    return TensorType(dtypes.BY_SHORT[match[1]], shape, match[3] or "cpu")
