"""PyTorch's ``utils``: what it holds here is `jitgrad.utils.data`."""

from jitgrad.utils import data

__all__ = ["data"]
