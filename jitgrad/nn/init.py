"""Filling Tensors with initial values in place, without a gradient; names, formulas and defaults are PyTorch's."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from jitgrad import dtypes
from jitgrad.autograd import no_grad
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import random
from jitgrad.functional.random import Generator
from jitgrad.tensor import Tensor

FanMode = Literal["fan_in", "fan_out"]

_GAINS = {"linear": 1.0, "conv1d": 1.0, "conv2d": 1.0, "conv3d": 1.0, "conv_transpose1d": 1.0, "conv_transpose2d": 1.0,
          "conv_transpose3d": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor by which a nonlinearity's input should be larger; `param` is the slope of leaky_relu (0.01)."""
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else float(param)
        return math.sqrt(2 / (1 + slope ** 2))
    if nonlinearity not in _GAINS:
        raise ValueError(f"calculate_gain: unknown nonlinearity {nonlinearity!r}; known are leaky_relu, "
                         f"{', '.join(_GAINS)}")
    return _GAINS[nonlinearity]


def _fill(tensor: Tensor, value: Tensor) -> Tensor:
    with no_grad():
        tensor.copy_(value)
    return tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform in [a, b)."""
    return _fill(tensor, random.uniform(tuple(tensor.shape), a, b, tensor.dtype, generator, tensor.device))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with that mean and standard deviation."""
    return _fill(tensor, random.normal(mean, std, tuple(tensor.shape), dtype=tensor.dtype, generator=generator,
                                       device=tensor.device))


def constant_(tensor: Tensor, val: float) -> Tensor:
    """The same value everywhere."""
    with no_grad():
        tensor.fill_(val)
    return tensor


def ones_(tensor: Tensor) -> Tensor:
    return constant_(tensor, 1.0)


def zeros_(tensor: Tensor) -> Tensor:
    return constant_(tensor, 0.0)


def eye_(tensor: Tensor) -> Tensor:
    """The identity matrix."""
    if len(tensor.shape) != 2:
        raise complain(ShapeError, "eye_", f"needs a matrix, got {tuple(tensor.shape)}")
    return _from_numpy(tensor, np.eye(*tensor.shape))


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """The convolution weight that passes as many channels as possible through unchanged, per group."""
    if len(tensor.shape) not in (3, 4, 5) or tensor.shape[0] % groups:
        raise complain(ShapeError, "dirac_", f"needs a convolution weight divisible by {groups} groups, got "
                       f"{tuple(tensor.shape)}")
    out_per_group = tensor.shape[0] // groups
    center = tuple(size // 2 for size in tensor.shape[2:])
    values = np.zeros(tensor.shape)
    for group in range(groups):
        for k in range(min(out_per_group, tensor.shape[1])):
            values[(group * out_per_group + k, k, *center)] = 1
    return _from_numpy(tensor, values)


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0,
                  generator: Generator | None = None) -> Tensor:
    """Normal, but only values between a and b: the normal quantile function of uniform values."""
    low, high = (math.erf((bound - mean) / std / math.sqrt(2)) for bound in (a, b))
    wide = dtypes.float64 if tensor.dtype is dtypes.float64 else dtypes.float32
    u = random.uniform(tuple(tensor.shape), low, high, wide, generator, tensor.device)
    values = (u.erfinv() * (std * math.sqrt(2)) + mean).clamp(a, b)
    return _fill(tensor, values.to(tensor.dtype))


def _fans(tensor: Tensor) -> tuple[int, int]:
    """Connections into one output and out of one input, of a linear or convolution weight."""
    if len(tensor.shape) < 2:
        raise complain(ShapeError, "fan in and fan out", f"a tensor of {len(tensor.shape)} dimensions has none",
                       fix="They are defined for 2 or more")
    receptive = math.prod(tensor.shape[2:])
    return tensor.shape[1] * receptive, tensor.shape[0] * receptive


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform with variance gain² * 2 / (fan_in + fan_out) (Glorot & Bengio 2010)."""
    bound = gain * math.sqrt(6 / sum(_fans(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with variance gain² * 2 / (fan_in + fan_out) (Glorot & Bengio 2010)."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(_fans(tensor))), generator)


def _kaiming_std(tensor: Tensor, a: float, mode: FanMode, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"kaiming: mode must be fan_in or fan_out, got {mode!r}")
    fan = _fans(tensor)[0 if mode == "fan_in" else 1]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


def kaiming_uniform_(tensor: Tensor, a: float = 0, mode: FanMode = "fan_in", nonlinearity: str = "leaky_relu",
                     generator: Generator | None = None) -> Tensor:
    """Uniform with variance gain² / fan (He et al. 2015); `a` is the negative slope of leaky_relu."""
    if 0 in tensor.shape:
        return tensor
    bound = math.sqrt(3) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(tensor: Tensor, a: float = 0, mode: FanMode = "fan_in", nonlinearity: str = "leaky_relu",
                    generator: Generator | None = None) -> Tensor:
    """Normal with variance gain² / fan (He et al. 2015); `a` is the negative slope of leaky_relu."""
    if 0 in tensor.shape:
        return tensor
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """A (semi-)orthogonal matrix, trailing dimensions flattened, uniformly distributed (Saxe et al. 2013)."""
    if len(tensor.shape) < 2:
        raise complain(ShapeError, "orthogonal_", f"needs 2 or more dimensions, got {tuple(tensor.shape)}")
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    if 0 in (rows, columns):
        return tensor
    shape = (max(rows, columns), min(rows, columns))
    q, r = np.linalg.qr(random.standard_normal(shape, dtypes.float64, generator).numpy())
    q = q * np.sign(np.diag(r))                               # makes the decomposition, and so the distribution, unique
    return _from_numpy(tensor, gain * (q if rows >= columns else q.T).reshape(tensor.shape))


def sparse_(tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None) -> Tensor:
    """Normal, with that share of each column set to zero (Martens 2010)."""
    if len(tensor.shape) != 2:
        raise complain(ShapeError, "sparse_", f"needs a matrix, got {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    normal_(tensor, 0.0, std, generator)
    order = np.argsort(random.uniform((rows, columns), dtype=dtypes.float64, generator=generator).numpy(), axis=0)
    return _from_numpy(tensor, np.where(order < math.ceil(sparsity * rows), 0.0, tensor.numpy(force=True)))


def _from_numpy(tensor: Tensor, values: np.ndarray[Any, Any]) -> Tensor:
    return _fill(tensor, Tensor(values.astype(tensor.dtype.numpy)))


