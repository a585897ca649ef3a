"""The memory of the machine: buffers with an address range each, and shared and local memory.

Every access is checked for bounds, alignment and (for reads) that its bytes were written before; buffers lie so far
apart that a wrong address never falls into another one. An address is a 64-bit number: its upper half names the buffer,
or the space of shared or local memory, its lower half is an offset from the middle. Accesses are vectorized over the
lanes of an instruction. Shared memory is one row per block, local memory one row per thread; both begin as garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.errors import Misaligned, OutOfBounds, PtxError, Race, Uninitialized
from ptx.shadow import Shadow, Who
from ptx.values import unsigned

WINDOW = 32                                   # bits of an offset
SHARED, LOCAL, FIRST_BUFFER = 0x7E00, 0x7E01, 0x7F00
GARBAGE = 0xCB
Fail = Callable[[type[PtxError], int, str], None]


class Region:
    """Rows of bytes of which a lane sees one: a buffer has one row for all, shared memory one per block."""

    def __init__(self, name: str, size: int, rows: int, window: int, data: np.ndarray | None = None, skew: int = 0,
                 writable: bool = True, granule: int = 4):
        self.name, self.size, self.skew, self.writable, self.granule = name, size, skew, writable, granule
        self.base = (window << WINDOW) + (1 << WINDOW - 1) + skew
        self.stride = -(-size // 16) * 16 + 16
        self.bytes = np.full(skew + rows * self.stride, GARBAGE, np.uint8)
        self.known = np.zeros(skew + rows * self.stride, np.bool_)
        if data is not None:
            self.bytes[skew:skew + size], self.known[skew:skew + size] = data, True
        self.all_known = data is not None
        self.shadow: Shadow | None = None
        self.views = {1: self.bytes}

    def view(self, size: int) -> np.ndarray:
        if size not in self.views:
            self.views[size] = self.bytes[:len(self.bytes) // size * size].view(unsigned(size))
        return self.views[size]

    def describe(self) -> str:
        return f"{self.name} ({self.size} bytes)"


class Buffer(Region):
    """Memory of the device that the test made, or a variable of the module."""

    def __init__(self, name: str, number: int, array: np.ndarray, garbage: bool, skew: int, writable: bool = True):
        data = None if garbage else np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        super().__init__(name, array.nbytes, 1, FIRST_BUFFER + number, data, skew, writable, array.dtype.itemsize)
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def address(self) -> int:
        return self.base

    def array(self, partial: bool = False) -> np.ndarray:
        """What the buffer holds. Uninitialized where elements were never written, unless `partial`."""
        inside = slice(self.skew, self.skew + self.size)
        unknown = np.flatnonzero(~self.known[inside])
        if len(unknown) and not partial:
            first = int(unknown[0]) // self.dtype.itemsize
            raise Uninitialized(f"{self.describe()}: element {first} was never written, nor "
                                f"{len(unknown) // self.dtype.itemsize - 1} others")
        return self.bytes[inside].copy().view(self.dtype).reshape(self.shape)


class Memory:
    """All that a launch can address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.shared: Region | None = None
        self.local: Region | None = None
        self.races = True

    def add(self, array: np.ndarray, name: str, *, garbage: bool = False, skew: int = 0, writable: bool = True) -> Buffer:
        buffer = Buffer(name, len(self.buffers), array, garbage, skew, writable)
        self.buffers.append(buffer)
        return buffer

    def launch(self, shared: int, local: int, blocks: int, threads: int) -> None:
        """Fresh shared and local memory for a wave of blocks."""
        self.shared = Region("shared memory", shared, blocks, SHARED)
        self.local = Region("local memory", local, threads, LOCAL)

    def forget(self) -> None:
        """A launch begins: what was before is in order with it."""
        for buffer in self.buffers:
            buffer.shadow = None

    # An access -----------------------------------------------------------------------------------------------------

    def split(self, addresses: np.ndarray, space: str, fail: Fail) -> list[tuple[Region, Any, np.ndarray]]:
        """The regions that lanes address: (region, lanes, offsets). Lanes are None where it is all of them."""
        if space in ("shared", "local"):
            region = self.shared if space == "shared" else self.local
            assert region is not None
            return [(region, None, self.window_offset(addresses, region))]
        windows = addresses >> WINDOW
        if (windows == windows[0]).all():
            region = self.region(int(windows[0]), fail, 0, int(addresses[0]))
            return [(region, None, addresses - region.base)]
        found = []
        for window in np.unique(windows):
            lanes = np.flatnonzero(windows == window)
            region = self.region(int(window), fail, int(lanes[0]), int(addresses[lanes[0]]))
            found.append((region, lanes, addresses[lanes] - region.base))
        return found

    @staticmethod
    def window_offset(addresses: np.ndarray, region: Region) -> np.ndarray:
        """Offsets into shared or local memory, from addresses within the space or generic ones."""
        return np.where(addresses >> WINDOW == region.base >> WINDOW, addresses - region.base, addresses)

    def region(self, window: int, fail: Fail, lane: int, address: int) -> Region:
        number = window - FIRST_BUFFER
        if 0 <= number < len(self.buffers):
            return self.buffers[number]
        region = {SHARED: self.shared, LOCAL: self.local}.get(window)
        if region is not None:
            return region
        fail(OutOfBounds, lane, f"address {address:#x} belongs to no buffer")
        raise AssertionError

    def check(self, region: Region, offsets: np.ndarray, size: int, lanes: Any, fail: Fail, verb: str) -> None:
        """Bounds and alignment of an access of `size` bytes."""
        wrong = (offsets < 0) | (offsets > region.size - size)
        if wrong.any():
            k = int(np.argmax(wrong))
            offset = int(offsets[k])
            where = f"{-offset} bytes before its begin" if offset < 0 else f"at byte {offset}"
            fail(OutOfBounds, k if lanes is None else int(lanes[k]),
                 f"{verb} {size} bytes of {region.describe()} {where}, address {region.base + offset:#x}")
        crooked = (offsets + region.skew) & (size - 1)
        if crooked.any():
            k = int(np.argmax(crooked != 0))
            fail(Misaligned, k if lanes is None else int(lanes[k]),
                 f"{verb} {size} bytes of {region.describe()} at byte {int(offsets[k])}, address "
                 f"{region.base + int(offsets[k]):#x}, no multiple of {size}")

    def track(self, region: Region, places: np.ndarray, size: int, who: Who, writes: bool, fail: Fail) -> None:
        """Ask the detector of races, which also remembers this access."""
        if not self.races or region is self.local or not region.writable:
            return
        if region.shadow is None:
            region.shadow = Shadow(len(region.bytes), min(region.granule, 4), lambda *a: None)

        def report(lane: int, thread: int, place: int, what: str) -> None:
            other = f"thread {thread}" if thread >= 0 else "several threads"
            verb, byte = "writes" if writes else "reads", (place - region.skew) % region.stride
            fail(Race, lane, f"{verb} {region.describe()} at byte {byte}, where {what} by {other} (counted over the whole "
                             "grid) has no barrier in between")

        region.shadow.report = report
        region.shadow.access(places, size, who, writes)


def places_of(region: Region, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the bytes of lanes lie, whose rows these are."""
    return offsets + (region.skew + rows * region.stride)


def expand(places: np.ndarray, size: int) -> np.ndarray:
    """All bytes of accesses of `size` bytes, one row per lane."""
    return places[:, None] + np.arange(size)
