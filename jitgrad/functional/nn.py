"""The functions that ``jitgrad.nn.functional`` offers: activations, normalization, convolution, pooling and resampling,
losses, attention."""

# ruff: noqa: F403

from jitgrad.functional import activation, attention, convolution, loss, normalization, pooling, resampling
from jitgrad.functional.activation import *
from jitgrad.functional.assigning import celu_, elu_, hardtanh_, leaky_relu_, relu_, selu_, threshold_
from jitgrad.functional.attention import *
from jitgrad.functional.convolution import *
from jitgrad.functional.elementwise import sigmoid, tanh
from jitgrad.functional.linalg import bilinear, linear, pdist
from jitgrad.functional.loss import *
from jitgrad.functional.normalization import *
from jitgrad.functional.padding import pad
from jitgrad.functional.pooling import *
from jitgrad.functional.resampling import *

__all__ = [*activation.__all__, *attention.__all__, *convolution.__all__, *loss.__all__, *normalization.__all__,
           *pooling.__all__, *resampling.__all__, "bilinear", "celu_", "elu_", "hardtanh_", "leaky_relu_", "linear", "pad",
           "pdist", "relu_", "selu_", "sigmoid", "tanh", "threshold_"]

# Those that also stand in ``jitgrad`` itself: there `pad`, `fold`, `unfold` and `upsample` would not say of what.
TOP_LEVEL = [name for name in __all__ if name not in ("pad", "fold", "unfold", "upsample", "sigmoid", "tanh")]
