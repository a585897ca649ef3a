"""Arenas: the memory for a plan's intermediate values, lent to one call at a time.

`lend(size)` gives an arena that nobody else has, `give_back` returns it. Idle arenas are shared by all plans, up to
`LIMIT` bytes; beyond it some are freed. Where none of the right size is idle, a larger one serves, or a smaller one
grows: the system fills every new page with zeros at the first touch, which took a third of the first call of a new
shape.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading

import numpy as np

LIMIT = 1 << 30                                             # bytes of idle arenas
ALIGNMENT = 64
LARGE = 1 << 22                                             # bytes from which NumPy asks for large pages
REACH = 4                                                   # how many times as large as asked for a lent arena may be


class Arena:
    """Aligned, uninitialized memory: `bytes`, and its `address`.

    A large one begins in pages of the usual size. NumPy asks the system for pages of 2 MiB, which are free memory in one
    piece: a virtual machine gives such pieces back to its host, and each has to be had from there again at the first touch.
    1 to 6 ms a MiB were measured, more than the step takes, where 0.4 ms is usual and 0.15 ms what large pages take at
    best. So they are asked for once the arena has been used, which leaves it to the system's idle time."""

    __slots__ = ("_mapped", "_used", "address", "bytes", "size")

    def __init__(self, nbytes: int):
        self._mapped: mmap.mmap | None = None
        self._used = False
        if nbytes >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapped = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view(nbytes)

    def _view(self, nbytes: int) -> None:
        whole = np.empty(nbytes + ALIGNMENT, np.uint8) if self._mapped is None else np.frombuffer(self._mapped, np.uint8)
        shift = -whole.ctypes.data % ALIGNMENT
        self.bytes = whole[shift:shift + nbytes]
        self.address: int = self.bytes.ctypes.data
        self.size = nbytes

    def was_used(self) -> None:
        """Ask for large pages, the first time."""
        if self._mapped is not None and not self._used:
            self._used = True
            with contextlib.suppress(OSError):              # a system that has none
                self._mapped.madvise(mmap.MADV_HUGEPAGE)

    def grow(self, nbytes: int) -> bool:
        """Become so large and keep the pages that are there, at another address perhaps; False if that cannot be."""
        if self._mapped is None:
            return False
        old, self.bytes = self.size, _NOTHING               # what is looked at cannot move
        try:
            with contextlib.suppress(OSError):
                self._mapped.madvise(mmap.MADV_NOHUGEPAGE)  # those that are large already stay so
            self._mapped.resize(nbytes)
            self._used = False
        except (BufferError, OSError, SystemError):         # somebody holds `bytes`; no room; a system that cannot
            self._view(old)
            return False
        self._view(nbytes)
        return True


_NOTHING = np.empty(0, np.uint8)


class ArenaPool:
    """Idle arenas by size class; in each class the one given back last is lent first."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.idle_bytes = 0
        self._idle: dict[int, list[Arena]] = {}             # the class used last stands last
        self._lock = threading.Lock()

    def lend(self, size: int) -> Arena:
        """An arena of at least `size` bytes, which is a `size_class`."""
        with self._lock:
            stack = self._idle.get(size) or self._larger(size)
            if stack:
                arena = stack.pop()
                self.idle_bytes -= arena.size
                return arena
            smaller = self._smaller(size)
        if smaller is not None:
            if smaller.grow(size):
                return smaller
            self.give_back(smaller)
        return Arena(size)

    def _larger(self, size: int) -> list[Arena] | None:
        """The idle arenas of the next larger class that has some. Much larger ones are left to plans that need them, which
        may run at the same time."""
        fitting = [n for n, stack in self._idle.items() if stack and size < n <= REACH * size]
        return self._idle[min(fitting)] if fitting else None

    def _smaller(self, size: int) -> Arena | None:
        """An arena that may grow to `size`, taken from the largest class that has some."""
        fitting = [n for n, stack in self._idle.items() if stack and max(LARGE, size // REACH) <= n < size]
        if not fitting:
            return None
        self.idle_bytes -= max(fitting)
        return self._idle[max(fitting)].pop()

    def give_back(self, arena: Arena) -> None:
        """Take an arena back from a call that has ended."""
        size = arena.size
        arena.was_used()
        with self._lock:
            self._idle.setdefault(size, []).append(arena)
            self.idle_bytes += size
            if self.idle_bytes > self.limit:
                self._shrink(size)

    def clear(self) -> None:
        """Free every idle arena."""
        with self._lock:
            self._idle.clear()
            self.idle_bytes = 0

    def renew_lock(self) -> None:
        """In the child of a fork: a thread that no longer exists may have held the lock."""
        self._lock = threading.Lock()

    def _shrink(self, newest: int) -> None:
        """Free arenas until the limit holds, those of the class `newest` last."""
        for size in [*(size for size in self._idle if size != newest), newest]:
            stack = self._idle[size]
            while stack and self.idle_bytes > self.limit:
                del stack[0]
                self.idle_bytes -= size


def size_class(nbytes: int) -> int:
    """`nbytes` rounded up to one of eight sizes per power of two, so that plans of like size share arenas."""
    step = max(ALIGNMENT, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


arenas = ArenaPool()


def keep_freed_memory(nbytes: int = LIMIT) -> bool:
    """Have the C library keep up to `nbytes` of what is freed, where it is glibc; True if it does.

    It gives arrays of more than some MiB back to the system when they are freed, and takes new ones from there, whose every
    page then has to be filled with zeros again: of an eager step of ResNet-18 that was a fifth of the time. Whoever sets the
    C library's own variables is left alone."""
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in own):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim, map_from = -1, -3                                 # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return bool(library.mallopt(map_from, 32 << 20) and library.mallopt(trim, nbytes))


keep_freed_memory()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=arenas.renew_lock)
