"""Dropout (Srivastava et al. 2014): in training, random entries or channels become zero and the rest grows."""

from __future__ import annotations

from jitgrad.functional import nn as F
from jitgrad.nn.module import Module
from jitgrad.tensor import Tensor


class _Dropout(Module):
    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: the probability must lie in [0, 1], got {p}")
        self.p, self.inplace = p, inplace

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(_Dropout):
    """Each entry is zeroed with probability p."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, inplace=self.inplace)


class Dropout1d(_Dropout):
    """Each channel of [N, C, L] is zeroed as a whole with probability p."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, inplace=self.inplace)


class Dropout2d(_Dropout):
    """Each channel of [N, C, H, W] is zeroed as a whole with probability p."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, inplace=self.inplace)


class Dropout3d(_Dropout):
    """Each channel of [N, C, D, H, W] is zeroed as a whole with probability p."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout3d(input, self.p, self.training, inplace=self.inplace)


class AlphaDropout(_Dropout):
    """Dropout that keeps mean and variance of what `SELU` gives (Klambauer et al. 2017)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.p, self.training, inplace=self.inplace)


class FeatureAlphaDropout(_Dropout):
    """`AlphaDropout` of whole channels of [N, C, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        return F.feature_alpha_dropout(input, self.p, self.training, inplace=self.inplace)
