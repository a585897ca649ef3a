"""Philox4x32-10, the counter-based generator of all random ops, as scalar functions of kernels.

J. Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (SC 2011). Element i of a random tensor is lane ``i %
4`` of the block with the counter (block low, block high, offset low, offset high), block = i // 4, under the key (seed
low, seed high): it depends on nothing else, so results do not depend on threads, vector width or device.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.scalar import Scalar, scalar, select, u32, u64


@scalar
def low_word(x: Scalar) -> Scalar:
    """The lower 32 bits of an int64 or uint64, as uint64."""
    return u64(u64(x) & u64(0xFFFFFFFF))


@scalar
def high_word(x: Scalar) -> Scalar:
    """The upper 32 bits of an int64 or uint64, as uint64."""
    return u64(u64(x) >> u64(32))


@scalar
def random_bits_block(key: Scalar, offset: Scalar, block: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The four uint32 of block number `block` (all arguments int64)."""
    c0, c1, c2, c3 = low_word(block), high_word(block), low_word(offset), high_word(offset)
    k0, k1 = low_word(key), high_word(key)
    for _ in range(10):
        p, q = u64(c0 * u64(0xD2511F53)), u64(c2 * u64(0xCD9E8D57))
        c0, c1, c2, c3 = (u64(high_word(q) ^ c1 ^ k0), low_word(q), u64(high_word(p) ^ c3 ^ k1), low_word(p))
        k0, k1 = low_word(k0 + u64(0x9E3779B9)), low_word(k1 + u64(0xBB67AE85))
    return u32(c0), u32(c1), u32(c2), u32(c3)


@scalar
def random_bits_lane(key: Scalar, offset: Scalar, i: Scalar) -> Scalar:
    """The uint32 of element i alone."""
    a, b, c, d = random_bits_block(key, offset, i >> 2)
    lane = i & 3
    return select(lane < 2, select(lane == 0, a, b), select(lane == 2, c, d))
