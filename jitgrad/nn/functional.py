"""The functions behind the layers, under the name that PyTorch has for them: ``import jitgrad.nn.functional as F``."""

# ruff: noqa: F403

from jitgrad.functional.nn import *
from jitgrad.functional.nn import __all__ as __all__
