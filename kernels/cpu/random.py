"""Random bits of a whole tensor, four elements from each Philox block."""

from __future__ import annotations

from jitgrad.kernels.cpu.math import minimum
from jitgrad.kernels.cpu.philox import random_bits_block, random_bits_lane
from jitgrad.kernels.cpu.standins import i64, load, pointer, store, u32
from jitgrad.kernels.cpu.template import text


def source(kernel: str) -> str:
    """The text of `random_bits`."""
    return text(KERNELS[kernel])


def random_bits(args, begin, end, thread):
    """An item is `width` elements, a multiple of four. Arguments: key[1], offset[1], o[count]; count, width."""
    o = pointer(args, 3, u32)
    key, offset = load(pointer(args, 1, i64), 0, 0, 3), load(pointer(args, 2, i64), 0, 1, 3)
    count, width = args[4], args[5]
    for item in range(begin, end):
        last = minimum((item + 1) * width, count)
        for block in range(item * width // 4, last // 4):
            a, b, c, d = random_bits_block(key, offset, block)
            store(o, 4 * block, a, 2, 3)
            store(o, 4 * block + 1, b, 2, 3)
            store(o, 4 * block + 2, c, 2, 3)
            store(o, 4 * block + 3, d, 2, 3)
        for i in range(last - last % 4, last):
            store(o, i, random_bits_lane(key, offset, i), 2, 3)


KERNELS = {"random_bits": random_bits}
