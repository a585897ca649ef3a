"""Activation functions as layers."""

from __future__ import annotations

from typing import Any

from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import nn as F
from jitgrad.nn import init as initial
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.tensor import Tensor


class _Inplace(Module):
    """An activation that may overwrite its input."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        result = self.function(input)
        return input._assign(result) if self.inplace else result

    def function(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class ReLU(_Inplace):
    """max(x, 0)"""

    def function(self, input: Tensor) -> Tensor:
        return F.relu(input)


class ReLU6(_Inplace):
    """min(max(x, 0), 6)"""

    def function(self, input: Tensor) -> Tensor:
        return F.relu6(input)


class SiLU(_Inplace):
    """x sigmoid(x), also known as swish"""

    def function(self, input: Tensor) -> Tensor:
        return F.silu(input)


class Mish(_Inplace):
    """x tanh(softplus(x))"""

    def function(self, input: Tensor) -> Tensor:
        return F.mish(input)


class SELU(_Inplace):
    """scale (max(x, 0) + min(alpha (exp(x) - 1), 0)) with the constants of Klambauer et al. 2017"""

    def function(self, input: Tensor) -> Tensor:
        return F.selu(input)


class Hardswish(_Inplace):
    """x relu6(x + 3) / 6"""

    def function(self, input: Tensor) -> Tensor:
        return F.hardswish(input)


class Hardsigmoid(_Inplace):
    """relu6(x + 3) / 6"""

    def function(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input)


class LeakyReLU(_Inplace):
    """x where x > 0, else negative_slope x"""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        super().__init__(inplace)
        self.negative_slope = negative_slope

    def function(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


class ELU(_Inplace):
    """x where x > 0, else alpha (exp(x) - 1)"""

    def __init__(self, alpha: float = 1.0, inplace: bool = False):
        super().__init__(inplace)
        self.alpha = alpha

    def function(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")


class CELU(_Inplace):
    """x where x > 0, else alpha (exp(x / alpha) - 1)"""

    def __init__(self, alpha: float = 1.0, inplace: bool = False):
        super().__init__(inplace)
        self.alpha = alpha

    def function(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")


class Threshold(_Inplace):
    """x where x > threshold, else value"""

    def __init__(self, threshold: float, value: float, inplace: bool = False):
        super().__init__(inplace)
        self.threshold, self.value = threshold, value

    def function(self, input: Tensor) -> Tensor:
        return F.threshold(input, self.threshold, self.value)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, value={self.value}" + (", inplace=True" if self.inplace else "")


class Hardtanh(_Inplace):
    """x, but no less than min_val and no more than max_val"""

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False):
        super().__init__(inplace)
        if min_val >= max_val:
            raise ValueError(f"Hardtanh: min_val must be below max_val, got {min_val} and {max_val}")
        self.min_val, self.max_val = min_val, max_val

    def function(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}" + (", inplace=True" if self.inplace else "")


class GELU(Module):
    """x Phi(x) with the normal distribution function Phi, or its tanh approximation (Hendrycks & Gimpel 2016)"""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Tanh(Module):
    """tanh(x)"""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class Sigmoid(Module):
    """1 / (1 + exp(-x))"""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class LogSigmoid(Module):
    """log sigmoid(x), accurate for large negative x"""

    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class Softsign(Module):
    """x / (1 + |x|)"""

    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class Tanhshrink(Module):
    """x - tanh(x)"""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


class _Shrinking(Module):
    """An activation that is 0 between -lambd and lambd."""

    def __init__(self, lambd: float = 0.5):
        super().__init__()
        self.lambd = lambd

    def extra_repr(self) -> str:
        return str(self.lambd)


class Hardshrink(_Shrinking):
    """x where |x| > lambd, else 0"""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardshrink(input, self.lambd)


class Softshrink(_Shrinking):
    """x - lambd where x > lambd, x + lambd where x < -lambd, else 0"""

    def forward(self, input: Tensor) -> Tensor:
        return F.softshrink(input, self.lambd)


class Softplus(Module):
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold"""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0):
        super().__init__()
        self.beta, self.threshold = beta, threshold

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class PReLU(Module):
    """x where x > 0, else weight x; one learned weight, or one per channel"""

    def __init__(self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: DType | None = None):
        super().__init__()
        self.num_parameters, self.init = num_parameters, init
        self.weight: Parameter = new_parameter((num_parameters,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initial.constant_(self.weight, self.init)

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


class _AlongDim(Module):
    def __init__(self, dim: int | None = None):
        super().__init__()
        self.dim = dim

    def _dim_of(self, input: Tensor) -> int:
        """The dimension asked for; without one PyTorch's old choice, the channels of batches and the rows of others."""
        if self.dim is not None:
            return self.dim
        return 0 if len(input.shape) in (0, 1, 3) else 1

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_AlongDim):
    """exp(x) / sum(exp(x)) along one dimension"""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self._dim_of(input))


class Softmin(_AlongDim):
    """softmax(-x)"""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(-input, self._dim_of(input))


class LogSoftmax(_AlongDim):
    """log softmax(x) along one dimension"""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self._dim_of(input))


class Softmax2d(Module):
    """softmax over the channels of images [N, C, H, W] or [C, H, W]"""

    def forward(self, input: Tensor) -> Tensor:
        if len(input.shape) not in (3, 4):
            raise complain(ShapeError, "Softmax2d", f"expected [N, C, H, W] or [C, H, W], got {list(input.shape)}")
        return F.softmax(input, -3)


class GLU(Module):
    """a sigmoid(b) of the two halves a, b along one dimension"""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
