"""Convolutions over one, two and three dimensions, and transposed ones."""

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
    given = (value,) * count if isinstance(value, int) else tuple(value)
    return given * count if len(given) == 1 else given


class _Convolution(Module):
    """What convolutions share: weight, bias, their initial values, and the padding."""

    rank: int
    transposed = False
    bias: Parameter | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes, padding: Sizes | str,
                 dilation: Sizes, groups: int, bias: bool, padding_mode: str, dtype: DType | None,
                 device: Any):
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
        self.weight = new_parameter(self._weight_shape(), dtype, device)
        self.bias = new_parameter((out_channels,), dtype, device) if bias else None
        self.reset_parameters()

    def _weight_shape(self) -> tuple[int, ...]:
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return first, second // self.groups, *self.kernel_size

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


class _PlainConvolution(_Convolution):
    """The parameters of convolutions that are not transposed, as PyTorch orders them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1,
                 padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", device: Any = None, dtype: DType | None = None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype, device)


class Conv1d(_PlainConvolution):
    """[N, C, L] or [C, L] -> [N, out_channels, L'], cross-correlation."""

    rank = 1

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv1d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(_PlainConvolution):
    """[N, C, H, W] or [C, H, W] -> [N, out_channels, H', W'], cross-correlation."""

    rank = 2

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Conv3d(_PlainConvolution):
    """[N, C, D, H, W] or [C, D, H, W] -> [N, out_channels, D', H', W'], cross-correlation."""

    rank = 3

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv3d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class _TransposedConvolution(_Convolution):
    """What transposed convolutions share: padding of the result, and sizes that a call asks for."""

    transposed = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0,
                 output_padding: Sizes = 0, groups: int = 1, bias: bool = True, dilation: Sizes = 1,
                 padding_mode: str = "zeros", device: Any = None, dtype: DType | None = None):
        if padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: only padding_mode='zeros' is possible, got {padding_mode!r}")
        if isinstance(padding, str):
            raise ValueError(f"{type(self).__name__}: padding must be numbers, got {padding!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype, device)
        self.output_padding = _tuple_of(output_padding, self.rank)

    def _output_padding(self, input: Tensor, output_size: Any) -> tuple[int, ...]:
        """What has to be added at the end of each dimension to reach `output_size`."""
        if output_size is None:
            return self.output_padding
        padding: Any = self.padding
        wanted = tuple(output_size)[-self.rank:]
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in
                 zip(input.shape[-self.rank:], self.stride, padding, self.dilation, self.kernel_size)]
        added = tuple([size - low for size, low in zip(wanted, least)])
        if len(wanted) != self.rank or any(not 0 <= a < s for a, s in zip(added, self.stride)):
            raise ValueError(f"{type(self).__name__}: output_size={tuple(output_size)} is not between {least} and "
                             f"{[low + s - 1 for low, s in zip(least, self.stride)]}")
        return added


class ConvTranspose1d(_TransposedConvolution):
    """[N, C, L] or [C, L] -> [N, out_channels, L'], the gradient of `Conv1d` in its input, as a layer."""

    rank = 1

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        padding: Any = self.padding
        return F.conv_transpose1d(input, self.weight, self.bias, self.stride, padding,
                                  self._output_padding(input, output_size), self.groups, self.dilation)


class ConvTranspose2d(_TransposedConvolution):
    """[N, C, H, W] or [C, H, W] -> [N, out_channels, H', W'], the gradient of `Conv2d` in its input, as a layer."""

    rank = 2

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        padding: Any = self.padding
        return F.conv_transpose2d(input, self.weight, self.bias, self.stride, padding,
                                  self._output_padding(input, output_size), self.groups, self.dilation)


class ConvTranspose3d(_TransposedConvolution):
    """[N, C, D, H, W] or [C, D, H, W] -> [N, out_channels, D', H', W'], the gradient of `Conv3d` in its input, as a
    layer."""

    rank = 3

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        padding: Any = self.padding
        return F.conv_transpose3d(input, self.weight, self.bias, self.stride, padding,
                                  self._output_padding(input, output_size), self.groups, self.dilation)
