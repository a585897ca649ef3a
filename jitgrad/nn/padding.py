"""Padding as layers: what is put around a sequence [N, C, L], an image [N, C, H, W] or a volume [N, C, D, H, W] (the batch
dimension may be missing). `padding` is one number for all sides, or two for each dimension, beginning with the last:
(left, right, top, bottom, front, back). Negative numbers of constant padding take elements away.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitgrad.errors import ShapeError, complain
from jitgrad.functional import nn as F
from jitgrad.nn.module import Module
from jitgrad.tensor import Tensor

Sizes = int | Sequence[int]


class _Pad(Module):
    rank: int
    mode: str

    def __init__(self, padding: Sizes):
        super().__init__()
        self.padding = (padding,) * (2 * self.rank) if isinstance(padding, int) else tuple(padding)
        if len(self.padding) != 2 * self.rank:
            raise ValueError(f"{type(self).__name__}: padding is one number or {2 * self.rank} of them, got {padding}")

    def _check(self, input: Tensor) -> None:
        if len(input.shape) not in (self.rank + 1, self.rank + 2):
            raise complain(ShapeError, type(self).__name__,
                           f"expected {self.rank + 1} or {self.rank + 2} dimensions, got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return F.pad(input, self.padding, self.mode)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ReflectionPad1d(_Pad):
    """Sequences continued by their mirror image; the outermost element is not repeated."""

    rank, mode = 1, "reflect"


class ReflectionPad2d(_Pad):
    """Images continued by their mirror image; the outermost elements are not repeated."""

    rank, mode = 2, "reflect"


class ReflectionPad3d(_Pad):
    """Volumes continued by their mirror image; the outermost elements are not repeated."""

    rank, mode = 3, "reflect"


class ReplicationPad1d(_Pad):
    """Sequences continued by their outermost element."""

    rank, mode = 1, "replicate"


class ReplicationPad2d(_Pad):
    """Images continued by their outermost elements."""

    rank, mode = 2, "replicate"


class ReplicationPad3d(_Pad):
    """Volumes continued by their outermost elements."""

    rank, mode = 3, "replicate"


class CircularPad1d(_Pad):
    """Sequences continued from their other end."""

    rank, mode = 1, "circular"


class CircularPad2d(_Pad):
    """Images continued from their other side."""

    rank, mode = 2, "circular"


class CircularPad3d(_Pad):
    """Volumes continued from their other side."""

    rank, mode = 3, "circular"


class _ConstantPad(_Pad):
    mode = "constant"

    def __init__(self, padding: Sizes, value: float):
        super().__init__(padding)
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return F.pad(input, self.padding, self.mode, self.value)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class ConstantPad1d(_ConstantPad):
    """Sequences continued by `value`."""

    rank = 1


class ConstantPad2d(_ConstantPad):
    """Images continued by `value`."""

    rank = 2


class ConstantPad3d(_ConstantPad):
    """Volumes continued by `value`."""

    rank = 3


class _ZeroPad(_ConstantPad):
    def __init__(self, padding: Sizes):
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ZeroPad1d(_ZeroPad):
    """Sequences continued by zeros."""

    rank = 1


class ZeroPad2d(_ZeroPad):
    """Images continued by zeros."""

    rank = 2


class ZeroPad3d(_ZeroPad):
    """Volumes continued by zeros."""

    rank = 3
