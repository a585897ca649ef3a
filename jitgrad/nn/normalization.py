"""Normalization over the batch, over channels in groups, and over trailing dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.autograd import no_grad
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import nn as F
from jitgrad.nn import init
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.tensor import Tensor, tensor_on


class _Affine(Module):
    """A weight of ones and a bias of zeros, or neither."""

    weight: Parameter | None
    bias: Parameter | None

    def _make_affine(self, shape: tuple[int, ...], weight: bool, bias: bool, dtype: DType | None,
                     device: Any) -> None:
        self.weight = new_parameter(shape, dtype, device) if weight else None
        self.bias = new_parameter(shape, dtype, device) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class _ChannelNorm(_Affine):
    """What batch and instance norm share: `num_features` channels, and running averages of their statistics.

    ``running = (1 - momentum) * running + momentum * batch``."""

    ranks: tuple[int, ...]

    def __init__(self, num_features: int, eps: float, momentum: float | None, affine: bool, track_running_stats: bool,
                 bias: bool, dtype: DType | None, device: Any):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self._make_affine((num_features,), affine, affine and bias, dtype, device)
        kind = (dtype or dtypes.get_default_dtype()).numpy
        tracked = track_running_stats
        self.register_buffer("running_mean", tensor_on(np.zeros(num_features, kind), device) if tracked else None)
        self.register_buffer("running_var", tensor_on(np.ones(num_features, kind), device) if tracked else None)
        self.register_buffer("num_batches_tracked", tensor_on(np.array(0), device) if tracked else None)

    def reset_running_stats(self) -> None:
        """Forget what was averaged."""
        if self.track_running_stats:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            init.zeros_(self.num_batches_tracked)

    def _check_rank(self, input: Tensor) -> None:
        if len(input.shape) not in self.ranks:
            raise complain(ShapeError, type(self).__name__, f"expected {' or '.join(map(str, self.ranks))} dimensions, "
                           f"got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}")


class _BatchNorm(_ChannelNorm):
    """Each channel normalized by its statistics over the batch, or in evaluation by running averages of them; with
    momentum None these are plain averages."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device: Any = None, dtype: DType | None = None, *,
                 bias: bool = True):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        self._check_rank(input)
        by_batch = self.training or self.running_mean is None
        updating = self.training and self.track_running_stats
        momentum: Any = self.momentum
        if updating and self.num_batches_tracked is not None:
            with no_grad():
                self.num_batches_tracked.add_(1)
                if momentum is None:
                    momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
        keep_running = not self.training or self.track_running_stats
        return F.batch_norm(input, self.running_mean if keep_running else None,
                            self.running_var if keep_running else None, self.weight, self.bias, by_batch,
                            0.0 if momentum is None else momentum, self.eps)


class BatchNorm1d(_BatchNorm):
    """[N, C] or [N, C, L], normalized over all but C (Ioffe & Szegedy 2015)."""

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """[N, C, H, W], normalized over all but C (Ioffe & Szegedy 2015)."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """[N, C, D, H, W], normalized over all but C (Ioffe & Szegedy 2015)."""

    ranks = (5,)


class _InstanceNorm(_ChannelNorm):
    """Each channel of each sample normalized by its own statistics; with `track_running_stats`, in evaluation by running
    averages of them. The last of `ranks` is the one with a batch dimension."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
                 track_running_stats: bool = False, device: Any = None, dtype: DType | None = None, *,
                 bias: bool = True):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        self._check_rank(input)
        if len(input.shape) == self.ranks[-1]:
            return self._normalized(input)
        return self._normalized(input.unsqueeze(0)).squeeze(0)

    def _normalized(self, input: Tensor) -> Tensor:
        by_input = self.training or not self.track_running_stats
        return F.instance_norm(input, self.running_mean, self.running_var, self.weight, self.bias, by_input,
                               0.0 if self.momentum is None else self.momentum, self.eps)


class InstanceNorm1d(_InstanceNorm):
    """[N, C, L] or [C, L], each C normalized over L (Ulyanov et al. 2016)."""

    ranks = (2, 3)


class InstanceNorm2d(_InstanceNorm):
    """[N, C, H, W] or [C, H, W], each C normalized over H and W (Ulyanov et al. 2016)."""

    ranks = (3, 4)


class InstanceNorm3d(_InstanceNorm):
    """[N, C, D, H, W] or [C, D, H, W], each C normalized over D, H and W (Ulyanov et al. 2016)."""

    ranks = (4, 5)


class GroupNorm(_Affine):
    """[N, C, ...]: the channels in `num_groups` groups, each normalized by itself (Wu & He 2018)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, device: Any = None,
                 dtype: DType | None = None):
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"GroupNorm: {num_channels} channels cannot be divided into {num_groups} groups")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self._make_affine((num_channels,), affine, affine, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


def _trailing(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


class LayerNorm(_Affine):
    """The trailing dimensions `normalized_shape` normalized to mean 0 and variance 1 (Ba et al. 2016)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
                 bias: bool = True, device: Any = None, dtype: DType | None = None):
        super().__init__()
        self.normalized_shape, self.eps = _trailing(normalized_shape), eps
        self.elementwise_affine = elementwise_affine
        self._make_affine(self.normalized_shape, elementwise_affine, elementwise_affine and bias, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class RMSNorm(_Affine):
    """The trailing dimensions divided by their root mean square (Zhang & Sennrich 2019)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float | None = None,
                 elementwise_affine: bool = True, device: Any = None, dtype: DType | None = None):
        super().__init__()
        self.normalized_shape, self.eps = _trailing(normalized_shape), eps
        self.elementwise_affine = elementwise_affine
        self._make_affine(self.normalized_shape, elementwise_affine, False, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class LocalResponseNorm(Module):
    """[N, C, ...]: each channel divided by ``(k + alpha * mean of squares of `size` neighbouring channels) ** beta``
    (Krizhevsky et al. 2012)."""

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0):
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
