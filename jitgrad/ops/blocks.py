"""Large elementwise work cut into blocks that stay in a core's cache, and shared by the threads that eager may use.

NumPy lets go of the interpreter lock while it computes, so ordinary Python threads suffice; they sleep between calls.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from jitgrad.ops.record import silence_numpy

__all__ = ["elementwise_in_blocks", "in_blocks", "install_thread_limit"]

BLOCK = 1 << 16                         # elements: a few operands of a block fit the second-level cache
PASS = 1 << 18                          # for a single pass, which finds nothing in a cache: fewer calls
SHARED = 1 << 18                        # from this size on several threads pay

_limit: Callable[[], int] = lambda: 1


def install_thread_limit(limit: Callable[[], int]) -> None:
    """Say how many threads may work at once, the caller's included (the layer above knows)."""
    global _limit
    _limit = limit


def in_blocks(size: int, work: Callable[[int, int], None], block: int = BLOCK) -> None:
    """``work(begin, end)`` for pieces of ``range(size)``, in any order and on any of the threads."""
    begins = itertools.count(0, block)  # drawn from by all threads; one next() is one step of the interpreter

    def draw() -> None:
        while (begin := next(begins)) < size:
            work(begin, min(begin + block, size))

    helpers = _limit() - 1 if size >= SHARED else 0
    started = [_pool(helpers).submit(draw) for _ in range(helpers)]
    draw()
    for helper in started:
        helper.result()


@cache
def _pool(helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(helpers, "jitgrad-eager", initializer=silence_numpy)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def elementwise_in_blocks(function: Callable[..., Any], arrays: Sequence[np.ndarray], attrs: dict[str, Any]) -> Any:
    """``function(*arrays, **attrs)``, elementwise, block by block; at once where the memory is not in one piece."""
    shape = arrays[0].shape
    flat = [_flat(x) for x in arrays]
    if any(x is None for x in flat):
        return function(*arrays, **attrs)
    sample = function(*[x[:1] for x in flat], **attrs)
    out = np.empty(arrays[0].size, sample.dtype)

    def work(begin: int, end: int) -> None:
        pieces = [x if len(x) == 1 else x[begin:end] for x in flat]
        if isinstance(function, np.ufunc):
            function(*pieces, out=out[begin:end])
        else:
            out[begin:end] = function(*pieces, **attrs)

    in_blocks(out.size, work, PASS if isinstance(function, np.ufunc) else BLOCK)
    return out.reshape(shape)


def _flat(x: np.ndarray) -> Any:
    """The elements in one dimension without a copy; one element where all share its memory; None if neither works."""
    if x.flags.c_contiguous:
        return x.reshape(-1)
    return x[(slice(0, 1),) * x.ndim].reshape(-1) if not any(x.strides) else None
