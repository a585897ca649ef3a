"""PyTorch's ``utils``: `checkpoint`, and `jitgrad.data` under the name that PyTorch has for it."""

from jitgrad.utils import checkpoint, data

__all__ = ["checkpoint", "data"]
