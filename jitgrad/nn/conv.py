"""Convolutions over one and two dimensions, and transposed ones."""

from __future__ import annotations

import math
from typing import Any

from jitgrad.dtypes import DType
from jitgrad.functional import nn as F
from jitgrad.nn import init
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.tensor import Tensor

Sizes = int | tuple[int, ...]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _tuple_of(value: Sizes, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


class _Convolution(Module):
    """What convolutions share: weight, bias, their initial values, and the padding."""

    rank: int
    transposed = False
    bias: Parameter | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes, padding: Sizes | str,
                 dilation: Sizes, groups: int, bias: bool, padding_mode: str, dtype: DType | None):
        super().__init__()
        if groups <= 0 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{type(self).__name__}: {in_channels} input and {out_channels} output channels must be "
                             f"divisible by groups={groups}")
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"{type(self).__name__}: padding_mode must be one of {', '.join(_PADDING_MODES)}, "
                             f"got {padding_mode!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.padding_mode = groups, padding_mode
        self.kernel_size, self.stride = _tuple_of(kernel_size, self.rank), _tuple_of(stride, self.rank)
        self.dilation = _tuple_of(dilation, self.rank)
        self.padding = self._check_padding(padding)
        inner, outer = (out_channels, in_channels) if self.transposed else (in_channels, out_channels)
        self.weight = new_parameter((outer, inner // groups, *self.kernel_size), dtype)
        self.bias = new_parameter((out_channels,), dtype) if bias else None
        self.reset_parameters()

    def _check_padding(self, padding: Sizes | str) -> tuple[int, ...] | str:
        if not isinstance(padding, str):
            return _tuple_of(padding, self.rank)
        if padding not in ("same", "valid"):
            raise ValueError(f"{type(self).__name__}: padding must be numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"{type(self).__name__}: padding='same' needs stride 1, got {self.stride}")
        return padding

    def reset_parameters(self) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        fan_in = math.prod(self.weight.shape[1:])
        if self.bias is not None and fan_in:
            bound = 1 / math.sqrt(fan_in)
            init.uniform_(self.bias, -bound, bound)

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input with other than zero padding applied, and the padding that is left to the convolution."""
        if self.padding_mode == "zeros":
            return input, self.padding
        pads: list[int] = []
        for low, high in reversed(self._pads_per_dim()):
            pads += [low, high]
        return F.pad(input, pads, mode=self.padding_mode), 0

    def _pads_per_dim(self) -> list[tuple[int, int]]:
        if self.padding == "valid":
            return [(0, 0)] * self.rank
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(p, p) for p in self.padding]                                  # type: ignore[misc]

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        ones, zeros = (1,) * self.rank, (0,) * self.rank
        for name, value, default in (("padding", self.padding, zeros), ("dilation", self.dilation, ones),
                                     ("output_padding", getattr(self, "output_padding", zeros), zeros),
                                     ("groups", self.groups, 1), ("bias", self.bias is not None, True),
                                     ("padding_mode", self.padding_mode, "zeros")):
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


class Conv1d(_Convolution):
    """[N, C, L] or [C, L] -> [N, out_channels, L'], cross-correlation."""

    rank = 1

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1,
                 padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", device: Any = None, dtype: DType | None = None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype)

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv1d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(_Convolution):
    """[N, C, H, W] or [C, H, W] -> [N, out_channels, H', W'], cross-correlation."""

    rank = 2

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1,
                 padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", device: Any = None, dtype: DType | None = None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype)

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
