"""Philox4x32-10, the counter-based generator behind every random op (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), vectorized in NumPy.

In: a 64-bit key (the seed), a 64-bit offset, a shape. Out: one uint32 per element. Element i is lane ``i % 4`` of block
``i // 4``, whose counter is (block low, block high, offset low, offset high); so the bits of an element depend on
nothing but key, offset and its number.
"""

from __future__ import annotations

import math

import numpy as np

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
PIECE = 1 << 14                                 # blocks at a time, which stay in the cache
_MASK = 0xFFFFFFFF
_LOW, _SHIFT = np.uint64(_MASK), np.uint64(32)


def philox_bits(key: int, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint32 array of `shape`."""
    return philox_run(key, offset, 0, math.prod(shape)).reshape(shape)


def philox_run(key: int, offset: int, first: int, count: int) -> np.ndarray:
    """uint32 array of the elements `first` … `first` + `count` - 1 of a draw of any shape."""
    begin, end = first // 4, (first + count + 3) // 4
    words = np.empty((end - begin, 4), np.uint32)
    for at in range(begin, end, PIECE):
        block = np.arange(at, min(at + PIECE, end), dtype=np.uint64)
        for lane, found in enumerate(philox_blocks(block & _LOW, block >> _SHIFT, key, offset)):
            words[at - begin:at - begin + len(block), lane] = found
    return words.reshape(-1)[first % 4:first % 4 + count]


def philox_blocks(low: np.ndarray, high: np.ndarray, key: int, offset: int) -> tuple[np.ndarray, ...]:
    """The four lanes (uint64 arrays that hold 32-bit words) of the blocks numbered ``low + 2**32 * high``."""
    key_0, key_1 = key & _MASK, key >> 32 & _MASK
    c0, c1 = low, high
    c2, c3 = np.full_like(low, offset & _MASK), np.full_like(low, offset >> 32 & _MASK)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0 = (product_1 >> _SHIFT) ^ c1 ^ np.uint64(key_0)
        c2 = (product_0 >> _SHIFT) ^ c3 ^ np.uint64(key_1)
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = key_0 + WEYL_0 & _MASK, key_1 + WEYL_1 & _MASK
    return c0, c1, c2, c3
