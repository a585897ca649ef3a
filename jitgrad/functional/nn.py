"""The functions that ``jitgrad.nn.functional`` offers: activations, normalization, convolution and pooling, losses,
attention."""

from jitgrad.functional import activation, attention, loss, normalization, window
from jitgrad.functional.activation import *
from jitgrad.functional.attention import *
from jitgrad.functional.elementwise import sigmoid, tanh
from jitgrad.functional.linalg import bilinear, linear
from jitgrad.functional.loss import *
from jitgrad.functional.normalization import *
from jitgrad.functional.shape import pad
from jitgrad.functional.window import *

__all__ = [*activation.__all__, *attention.__all__, *loss.__all__, *normalization.__all__, *window.__all__, "bilinear",
           "linear", "pad", "sigmoid", "tanh"]
