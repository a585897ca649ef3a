"""Lazy layers: the number of input features or channels is left out and taken from the first input.

A lazy layer holds parameters without elements (`UninitializedParameter`). The first call, or loading a state dict, gives
them their shapes and initial values, and the layer becomes an ordinary one of the class it stands for. A Parameter stays
the same object, so an optimizer that holds it goes on holding it. To compile a model, call it once before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.nn import conv, normalization
from jitgrad.nn.linear import Linear
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import UninitializedParameter
from jitgrad.tensor import Tensor, tensor_on

Sizes = int | tuple[int, ...]


class _Lazy(Module):
    """What lazy layers share. `becomes` is the class that this one stands for."""

    becomes: type[Module]

    def has_uninitialized_params(self) -> bool:
        """True until the first input has said the shapes."""
        return any(isinstance(p, UninitializedParameter) for p in self._parameters.values())

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()                       # type: ignore[misc]

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        self._settle(self._features_of(input))
        return self.forward(input, *args)

    def _features_of(self, input: Tensor) -> int:
        raise NotImplementedError

    def _features_in(self, entries: dict[str, Any], prefix: str) -> int | None:
        """The number of features according to a state dict; None if it does not say it."""
        raise NotImplementedError

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """Note the number of features; the shapes of the parameters that this makes known."""
        raise NotImplementedError

    def _settle(self, features: int) -> None:
        """Become the layer for so many features."""
        for name, shape in self._shapes(features).items():
            parameter = self._parameters[name]
            if isinstance(parameter, UninitializedParameter):
                parameter.materialize(shape)
        self.__class__ = self.becomes                        # type: ignore[assignment]
        self.reset_parameters()


def _settle_from_state(module: Module, entries: dict[str, Any], prefix: str) -> None:
    """Before a state dict is loaded: it says the shapes."""
    if isinstance(module, _Lazy):
        features = module._features_in(entries, prefix)
        if features is not None:
            module._settle(features)


def _shape_in(entries: dict[str, Any], key: str, ndim: int) -> tuple[int, ...] | None:
    shape = getattr(entries.get(key), "shape", None)
    return tuple(shape) if shape is not None and len(shape) == ndim else None


class LazyLinear(_Lazy, Linear):
    """`Linear` whose `in_features` is the last size of the first input."""

    becomes = Linear

    def __init__(self, out_features: int, bias: bool = True, device: Any = None, dtype: DType | None = None):
        Linear.__init__(self, 0, 0, False, device=device, dtype=dtype)
        self.out_features = out_features
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        self.bias = UninitializedParameter(device=device, dtype=dtype) if bias else None
        self.register_load_state_dict_pre_hook(_settle_from_state)

    def _features_of(self, input: Tensor) -> int:
        return input.shape[-1]

    def _features_in(self, entries: dict[str, Any], prefix: str) -> int | None:
        shape = _shape_in(entries, prefix + "weight", 2)
        return None if shape is None else shape[1]

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        self.in_features = features
        return {"weight": (self.out_features, features), "bias": (self.out_features,)}


class _LazyConvolution(_Lazy, conv._Convolution):
    def _make_lazy(self, out_channels: int, bias: bool, dtype: DType | None, device: Any) -> None:
        self.out_channels = out_channels
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        self.bias = UninitializedParameter(device=device, dtype=dtype) if bias else None
        self.register_load_state_dict_pre_hook(_settle_from_state)

    def _features_of(self, input: Tensor) -> int:
        if len(input.shape) not in (self.rank + 1, self.rank + 2):
            raise complain(ShapeError, type(self).__name__, f"expected {self.rank + 1} or {self.rank + 2} dimensions, got "
                           f"{tuple(input.shape)}")
        channels = input.shape[-self.rank - 1]
        if channels % self.groups:
            raise complain(ShapeError, type(self).__name__, f"{channels} channels cannot be divided by groups="
                           f"{self.groups}")
        return channels

    def _features_in(self, entries: dict[str, Any], prefix: str) -> int | None:
        shape = _shape_in(entries, prefix + "weight", self.rank + 2)
        if shape is None:
            return None
        return shape[0] if self.transposed else shape[1] * self.groups

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        self.in_channels = features
        return {"weight": self._weight_shape(), "bias": (self.out_channels,)}


class _LazyPlainConvolution(_LazyConvolution, conv._PlainConvolution):
    def __init__(self, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes | str = 0,
                 dilation: Sizes = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
                 device: Any = None, dtype: DType | None = None):
        conv._PlainConvolution.__init__(self, 0, 0, kernel_size, stride, padding, dilation, groups, False, padding_mode,
                                        device=device, dtype=dtype)
        self._make_lazy(out_channels, bias, dtype, device)


class LazyConv1d(_LazyPlainConvolution, conv.Conv1d):
    """`Conv1d` whose `in_channels` are those of the first input."""

    becomes = conv.Conv1d


class LazyConv2d(_LazyPlainConvolution, conv.Conv2d):
    """`Conv2d` whose `in_channels` are those of the first input."""

    becomes = conv.Conv2d


class LazyConv3d(_LazyPlainConvolution, conv.Conv3d):
    """`Conv3d` whose `in_channels` are those of the first input."""

    becomes = conv.Conv3d


class _LazyTransposedConvolution(_LazyConvolution, conv._TransposedConvolution):
    def __init__(self, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0,
                 output_padding: Sizes = 0, groups: int = 1, bias: bool = True, dilation: Sizes = 1,
                 padding_mode: str = "zeros", device: Any = None, dtype: DType | None = None):
        conv._TransposedConvolution.__init__(self, 0, 0, kernel_size, stride, padding, output_padding, groups, False,
                                             dilation, padding_mode, device=device, dtype=dtype)
        self._make_lazy(out_channels, bias, dtype, device)


class LazyConvTranspose1d(_LazyTransposedConvolution, conv.ConvTranspose1d):
    """`ConvTranspose1d` whose `in_channels` are those of the first input."""

    becomes = conv.ConvTranspose1d


class LazyConvTranspose2d(_LazyTransposedConvolution, conv.ConvTranspose2d):
    """`ConvTranspose2d` whose `in_channels` are those of the first input."""

    becomes = conv.ConvTranspose2d


class LazyConvTranspose3d(_LazyTransposedConvolution, conv.ConvTranspose3d):
    """`ConvTranspose3d` whose `in_channels` are those of the first input."""

    becomes = conv.ConvTranspose3d


class _LazyNorm(_Lazy, normalization._ChannelNorm):
    def __init__(self, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device: Any = None, dtype: DType | None = None, *,
                 bias: bool = True):
        normalization._ChannelNorm.__init__(self, 0, eps, momentum, False, track_running_stats, bias, dtype, device)
        self.affine = affine
        self.weight = UninitializedParameter(device=device, dtype=dtype) if affine else None
        self.bias = UninitializedParameter(device=device, dtype=dtype) if affine and bias else None
        self.register_load_state_dict_pre_hook(_settle_from_state)

    def has_uninitialized_params(self) -> bool:
        return not self.num_features

    def _features_of(self, input: Tensor) -> int:
        self._check_rank(input)
        whole = len(input.shape) == self.ranks[-1] or issubclass(self.becomes, normalization._BatchNorm)
        return input.shape[1 if whole else 0]

    def _features_in(self, entries: dict[str, Any], prefix: str) -> int | None:
        shapes = [_shape_in(entries, prefix + name, 1) for name in ("weight", "running_mean")]
        return next((shape[0] for shape in shapes if shape is not None), None)

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        self.num_features = features
        if self.track_running_stats:
            kind = self.get_buffer("running_mean").dtype.numpy
            where = self.get_buffer("running_mean").device
            self.running_mean, self.running_var = (tensor_on(np.zeros(features, kind), where),
                                                   tensor_on(np.ones(features, kind), where))
        return {"weight": (features,), "bias": (features,)}


class LazyBatchNorm1d(_LazyNorm, normalization.BatchNorm1d):
    """`BatchNorm1d` whose `num_features` are the channels of the first input."""

    becomes = normalization.BatchNorm1d


class LazyBatchNorm2d(_LazyNorm, normalization.BatchNorm2d):
    """`BatchNorm2d` whose `num_features` are the channels of the first input."""

    becomes = normalization.BatchNorm2d


class LazyBatchNorm3d(_LazyNorm, normalization.BatchNorm3d):
    """`BatchNorm3d` whose `num_features` are the channels of the first input."""

    becomes = normalization.BatchNorm3d


class LazyInstanceNorm1d(_LazyNorm, normalization.InstanceNorm1d):
    """`InstanceNorm1d` whose `num_features` are the channels of the first input."""

    becomes = normalization.InstanceNorm1d


class LazyInstanceNorm2d(_LazyNorm, normalization.InstanceNorm2d):
    """`InstanceNorm2d` whose `num_features` are the channels of the first input."""

    becomes = normalization.InstanceNorm2d


class LazyInstanceNorm3d(_LazyNorm, normalization.InstanceNorm3d):
    """`InstanceNorm3d` whose `num_features` are the channels of the first input."""

    becomes = normalization.InstanceNorm3d
