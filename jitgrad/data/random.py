"""Random order for samplers, drawn from a Generator or from the default stream, as NumPy arrays and lists."""

from __future__ import annotations

import numpy as np

from jitgrad import dtypes
from jitgrad.functional import random
from jitgrad.functional.random import Generator


def permutation(count: int, generator: Generator | None = None) -> list[int]:
    """0 … count - 1 in random order."""
    return random.permutation(count, generator=generator).tolist() if count else []


def uniforms(count: int, generator: Generator | None = None) -> np.ndarray:
    """`count` independent float64 in [0, 1)."""
    return random.uniform((count,), dtype=dtypes.float64, generator=generator).numpy()


def draw_seed(generator: Generator | None = None) -> int:
    """A random 62-bit seed."""
    return int(random.integers(0, 1 << 62, (), generator=generator).item())
