"""Pinned host memory: pages that stay where they are, so that a GPU can read and write them by itself.

`allocate(nbytes)` gives a `Pinned`, which NumPy can see as an array. Copies from and to it run while Python goes on; it
notes the streams that use it (`record_stream`) and is lent again only when their work is done.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from ctypes import c_void_p
from typing import Any

import numpy as np

from jitgrad.errors import DeviceError
from jitgrad.runtime.cuda import driver
from jitgrad.runtime.cuda.driver import Driver
from jitgrad.runtime.cuda.streams import Event, Stream

_PORTABLE = 1                                   # pinned for all GPUs
_SMALLEST = 512


class Pinned:
    """Pinned memory that is lent as long as this object, or an array made of it, lives."""

    __slots__ = ("__weakref__", "_pool", "address", "capacity", "nbytes", "streams")

    def __init__(self, pool: PinnedPool, address: int, capacity: int, nbytes: int):
        self._pool, self.address, self.capacity, self.nbytes = pool, address, capacity, nbytes
        self.streams: list[Stream] = []

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """It as an array, which keeps it alive."""
        return np.asarray(self).view(dtype).reshape(shape)

    def record_stream(self, stream: Stream) -> None:
        """`stream` reads or writes it."""
        if stream not in self.streams:
            self.streams.append(stream)

    def __del__(self) -> None:
        self._pool.take_back(self.address, self.capacity, self.streams)


class PinnedPool:
    """Pinned memory that is not in use, by sizes that are powers of two."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self._idle: dict[int, list[int]] = {}
        self._waiting: list[tuple[int, int, list[Event]]] = []
        self._returned: deque[tuple[int, int, list[Stream]]] = deque()      # given back, but not yet entered
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> Pinned:
        """Memory of `nbytes`, whose contents are whatever they are."""
        capacity = max(_SMALLEST, 1 << (max(nbytes, 1) - 1).bit_length())
        with self._lock:
            self._settle()
            idle = self._idle.get(capacity)
            return Pinned(self, idle.pop() if idle else self._ask(capacity), capacity, nbytes)

    def take_back(self, address: int, capacity: int, streams: list[Stream]) -> None:
        """What nobody refers to any more. Python's collector may call this anywhere, in the middle of `allocate`, too:
        then, and while another thread is at it, it is only noted."""
        self._returned.append((address, capacity, streams))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def empty_cache(self) -> None:
        """Give idle memory back to the system."""
        with self._lock:
            self._settle()
            driver.gpu()                                    # a context has to be current
            for addresses in self._idle.values():
                while addresses:
                    self._driver.call("cuMemFreeHost", addresses.pop())

    def _ask(self, capacity: int) -> int:
        driver.gpu()                                        # likewise
        found = c_void_p()
        self._driver.call("cuMemHostAlloc", found, capacity, _PORTABLE)
        assert found.value is not None
        return found.value

    def _settle(self) -> None:
        """Enter what was given back, once the work in all streams that use it is done."""
        while self._returned:
            address, capacity, streams = self._returned.popleft()
            with suppress(DeviceError):                   # a driver that is gone has taken the memory along
                self._waiting.append((address, capacity, [stream.record_event() for stream in streams]))
        waiting, self._waiting = self._waiting, []
        for address, capacity, events in waiting:
            if all(event.query() for event in events):
                self._idle.setdefault(capacity, []).append(address)
            else:
                self._waiting.append((address, capacity, events))


def pool() -> PinnedPool:
    """The pool of this process."""
    found = driver.current()
    if found.pinned is None:
        found.pinned = PinnedPool(found)
    pool: PinnedPool = found.pinned
    return pool


def allocate(nbytes: int) -> Pinned:
    """Pinned memory of `nbytes`; DeviceError without a driver."""
    return pool().allocate(nbytes)


def owner(array: np.ndarray) -> Pinned | None:
    """The pinned memory that a NumPy array lies in, if it does."""
    base: Any = array
    while base is not None and type(base) is not Pinned:
        base = getattr(base, "base", None)
    return base
