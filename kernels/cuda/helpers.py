"""Functions that hand-written GPU kernels share, compiled into each of them: orders of numbers, binary search, sorting in
shared memory, running sums of a warp.

Memory that a function takes is numbered among the operands of its kernel as it is here: the first pointer is operand 0, the
second operand 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types

from jitgrad.kernels.cpu.frontend import teach
from jitgrad.kernels.cpu.scalar import bits, select
from jitgrad.kernels.cuda.vocabulary import NAMES as WORDS

barrier, i16, i32, i64, load, quotient, shuffle, store, thread, u32, u64 = [WORDS[name] for name in (
    "barrier", "i16", "i32", "i64", "load", "quotient", "shuffle", "store", "thread", "u32", "u64")]

SPAN = 2048
"""The most elements that one block sorts."""


# ---- order -------------------------------------------------------------------------------------------------------------


def order_key(x: Any) -> Any:
    """An unsigned integer, of 32 bits for types of at most as many: keys are ordered as numbers are, equal for equal ones.
    NaN is the largest, and every NaN is equal."""
    raise NotImplementedError


def _key_of_single(x: Any) -> Any:
    pattern = u32(bits(x))
    key = u32(pattern ^ select(x < 0, u32(0xFFFFFFFF), u32(0x80000000)))
    return select(x != x, u32(0xFFFFFFFF), select(x == 0, u32(0x80000000), key))


def _key_of_double(x: Any) -> Any:
    pattern = u64(bits(x))
    key = u64(pattern ^ select(x < 0, u64(0xFFFFFFFFFFFFFFFF), u64(0x8000000000000000)))
    return select(x != x, u64(0xFFFFFFFFFFFFFFFF), select(x == 0, u64(0x8000000000000000), key))


def _key_of_signed(x: Any) -> Any:
    return u32(u32(x) ^ u32(0x80000000))


def _key_of_signed_long(x: Any) -> Any:
    return u64(u64(x) ^ u64(0x8000000000000000))


def _key_of_unsigned(x: Any) -> Any:
    return u32(x)


def _key_of_unsigned_long(x: Any) -> Any:
    return u64(x)


def _key_for(kind: Any) -> Callable[..., Any]:
    if isinstance(kind, types.Float):
        return _key_of_single if kind == types.float32 else _key_of_double
    if isinstance(kind, types.Integer) and kind.signed:
        return _key_of_signed if kind.bitwidth <= 32 else _key_of_signed_long
    return _key_of_unsigned_long if kind == types.uint64 else _key_of_unsigned


def count_below(begin: Any, end: Any, keys: Any, key: Any, equal: Any) -> Any:
    """The first of the places begin … end of ascending `keys` that is not below `key`; if `equal`, that is above it."""
    raise NotImplementedError


def _count_below(begin: Any, end: Any, keys: Any, key: Any, equal: Any) -> Any:
    low, high = begin, end
    while low < high:
        middle = i32(low + quotient(i32(high - low), 2))
        other = load(keys, middle, 0, 2)
        if other < key or (equal and other == key):
            low = i32(middle + 1)
        else:
            high = middle
    return low


def _count_below_wide(begin: Any, end: Any, keys: Any, key: Any, equal: Any) -> Any:
    low, high = begin, end
    while low < high:
        middle = i64(low + quotient(i64(high - low), 2))
        other = load(keys, middle, 0, 2)
        if other < key or (equal and other == key):
            low = i64(middle + 1)
        else:
            high = middle
    return low


def sort_shared(keys: Any, places: Any, span: Any, run: Any) -> Any:
    """Sort each `run` of the first `span` elements, powers of two, of ``keys[2 * SPAN]`` and `places` with them; where the
    result begins. Neighbouring runs are merged: an element goes as far behind its run's begin as there are elements in front
    of it in both. Of equal keys the one of the left run comes first."""
    raise NotImplementedError


def _sort_shared(keys: Any, places: Any, span: Any, run: Any) -> Any:
    source, width = i32(0), i32(1)
    while width < run:
        for step in range(i32(thread()), span, i32(256)):
            e = i32(step)
            key = load(keys, i32(source + e), 0, 2)
            low = i32(source + e - (e & i32(2 * width - 1)))
            middle, is_right = i32(low + width), (e & width) != 0
            begin = select(is_right, low, middle)
            found = i32(_count_below(begin, i32(begin + width), keys, key, is_right) - middle)
            target = i32(i32(SPAN) - source + e + found)
            store(keys, target, key, 0, 2)
            store(places, target, load(places, i32(source + e), 1, 2), 1, 2)
        barrier()
        source, width = i32(i32(SPAN) - source), i32(2 * width)
    return source


# ---- running sums ------------------------------------------------------------------------------------------------------


def scan_warp(x: Any) -> Any:
    """The sum of x of all threads of the warp up to this one, and of all its threads, for a float or an int64."""
    raise NotImplementedError


def _scan_warp(x: Any) -> Any:
    me, so_far, total = i32(thread()), x, x
    other = shuffle(total, 1)
    so_far, total = select((me & 1) != 0, other + so_far, so_far), total + other
    other = shuffle(total, 2)
    so_far, total = select((me & 2) != 0, other + so_far, so_far), total + other
    other = shuffle(total, 4)
    so_far, total = select((me & 4) != 0, other + so_far, so_far), total + other
    other = shuffle(total, 8)
    so_far, total = select((me & 8) != 0, other + so_far, so_far), total + other
    other = shuffle(total, 16)
    so_far, total = select((me & 16) != 0, other + so_far, so_far), total + other
    return so_far, total


def scan_warp_product(x: Any) -> Any:
    """As `scan_warp`, the product."""
    raise NotImplementedError


def _scan_warp_product(x: Any) -> Any:
    me, so_far, total = i32(thread()), x, x
    other = shuffle(total, 1)
    so_far, total = select((me & 1) != 0, other * so_far, so_far), total * other
    other = shuffle(total, 2)
    so_far, total = select((me & 2) != 0, other * so_far, so_far), total * other
    other = shuffle(total, 4)
    so_far, total = select((me & 4) != 0, other * so_far, so_far), total * other
    other = shuffle(total, 8)
    so_far, total = select((me & 8) != 0, other * so_far, so_far), total * other
    other = shuffle(total, 16)
    so_far, total = select((me & 16) != 0, other * so_far, so_far), total * other
    return so_far, total


NAMES: dict[str, Any] = {"order_key": order_key, "count_below": count_below, "sort_shared": sort_shared,
                         "scan_warp": scan_warp, "scan_warp_product": scan_warp_product}

teach(order_key, _key_for)
teach(count_below, lambda kind: _count_below_wide if kind == types.int64 else _count_below)
teach(_count_below, lambda kind: _count_below)
teach(sort_shared, lambda kind: _sort_shared)
teach(scan_warp, lambda kind: _scan_warp)
teach(scan_warp_product, lambda kind: _scan_warp_product)
