"""Who accessed which memory last, and whether a barrier lies between: the detector of races.

For every granule of memory (as many bytes as its smallest access) the last writer and the last readers are kept: thread,
warp and block, the number of barriers of that block and the number of warp barriers of that warp up to then. Two accesses
of which one writes are in order if they are of one thread, of one block with a barrier between, or of one warp with a warp
barrier between. Blocks are never in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NOBODY, MANY = -1, -2


@dataclass(slots=True)
class Who:
    """The lanes of one access: their threads, warps and blocks by number, the barriers that their blocks and warps have
    passed, and whether the access is atomic. Arrays of equal length."""

    thread: np.ndarray
    warp: np.ndarray
    block: np.ndarray
    barriers: np.ndarray
    warp_barriers: np.ndarray
    atomic: bool

    def of(self, lanes: np.ndarray) -> Who:
        return Who(self.thread[lanes], self.warp[lanes], self.block[lanes], self.barriers[lanes],
                   self.warp_barriers[lanes], self.atomic)


class _Record:
    """The last access of one kind to each granule."""

    FIELDS = ("thread", "warp", "block", "barriers", "warp_barriers")

    def __init__(self, count: int):
        self.thread = np.full(count, NOBODY, np.int32)
        self.warp, self.block, self.barriers, self.warp_barriers = (np.zeros(count, np.int32) for _ in range(4))
        self.atomic = np.zeros(count, np.bool_)

    def refine(self, times: int) -> None:
        for field in (*self.FIELDS, "atomic"):
            setattr(self, field, np.repeat(getattr(self, field), times))

    def conflicts(self, at: np.ndarray, who: Who) -> np.ndarray:
        """For each lane, whether the record at its granule is of another thread and not in order with it."""
        thread = self.thread[at]
        suspicious = (thread != NOBODY) & (thread != who.thread)
        if not suspicious.any():
            return suspicious
        same_block = self.block[at] == who.block
        same_warp = self.warp[at] == who.warp
        ordered = same_block & ((self.barriers[at] != who.barriers)
                                | (same_warp & (self.warp_barriers[at] != who.warp_barriers)))
        if who.atomic:
            ordered |= self.atomic[at]
        return suspicious & ~ordered

    def replace(self, at: np.ndarray, who: Who) -> None:
        for field in self.FIELDS:
            getattr(self, field)[at] = getattr(who, field)
        self.atomic[at] = who.atomic

    def merge(self, at: np.ndarray, who: Who) -> None:
        """Add readers: together with others that no barrier parts from them they make the record that of many."""
        old_thread, old_block, old_warp = self.thread[at], self.block[at], self.warp[at]
        known = old_thread != NOBODY
        unparted = (self.barriers[at] == who.barriers) & ((old_warp != who.warp)
                                                          | (self.warp_barriers[at] == who.warp_barriers))
        current = known & ((old_block != who.block) | unparted)
        other_block = current & (old_block != who.block)
        other_warp = current & (old_warp != who.warp)
        self.replace(at, who)
        mixed = self.thread[at] != who.thread                # several lanes of this access read one granule
        self.thread[at[mixed]] = MANY
        self.warp[at[self.warp[at] != who.warp]] = MANY
        self.block[at[self.block[at] != who.block]] = MANY
        self.thread[at[current & (old_thread != who.thread)]] = MANY
        self.warp[at[other_warp]] = MANY
        self.block[at[other_block]] = MANY


class Shadow:
    """The detector for one piece of memory of `size` bytes."""

    def __init__(self, size: int, granule: int, report: Callable[[int, int, int, str], None]):
        self.granule, self.report = granule, report
        count = -(-size // granule)
        self.written, self.read = _Record(count), _Record(count)

    def granules(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules of accesses of `size` bytes, one row per lane, flattened, and how many there are per lane."""
        if size < self.granule:
            self.written.refine(self.granule // size)
            self.read.refine(self.granule // size)
            self.granule = size
        count = size // self.granule
        first = offsets // self.granule
        return (first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)), count

    def access(self, offsets: np.ndarray, size: int, who: Who, writes: bool) -> None:
        at, count = self.granules(offsets, size)
        lanes = np.arange(len(offsets))
        if count > 1:
            lanes = np.repeat(lanes, count)
            who = who.of(lanes)
        self.check(self.written, at, who, lanes, "a write")
        if writes:
            self.check(self.read, at, who, lanes, "a read")
            self.written.replace(at, who)
            if not who.atomic:
                self.same_time(at, who, lanes)
        if not writes:
            self.read.merge(at, who)

    def check(self, record: _Record, at: np.ndarray, who: Who, lanes: np.ndarray, what: str) -> None:
        bad = record.conflicts(at, who)
        if bad.any():
            k = int(np.argmax(bad))
            self.report(int(lanes[k]), int(record.thread[at[k]]), int(at[k]) * self.granule, what)

    def same_time(self, at: np.ndarray, who: Who, lanes: np.ndarray) -> None:
        """Two lanes of one instruction that write to one place."""
        bad = self.written.thread[at] != who.thread
        if bad.any():
            k = int(np.argmax(bad))
            self.report(int(lanes[k]), int(self.written.thread[at[k]]), int(at[k]) * self.granule,
                        "a write of the same instruction")
