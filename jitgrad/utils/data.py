"""`jitgrad.data` under the name that PyTorch has for it."""

from jitgrad.data import *
from jitgrad.data import __all__
