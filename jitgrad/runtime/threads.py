"""The threads that carry out plans: how many, their memory, their start and end.

They are plain C threads made through ctypes, which never touch Python; what they run is `kernels.cpu.tape.worker`. They
start when the first plan asks for them, sleep in the kernel when there is nothing to do, end with the interpreter, and
are made anew in the child of a fork, which inherits none. `limit()` says how many threads a plan may use here.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import platform
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jitgrad import config
from jitgrad.kernels.cpu import tape
from jitgrad.runtime import build, native

_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}
_MOVE_NUMBERS = {"x86_64": 203, "aarch64": 122}             # of sched_setaffinity

ITEMS = tuple.__basicsize__
"""Where in a tuple object the references to its items begin."""

_lock = threading.Lock()
_handles: list[ctypes.c_size_t] = []
_seen: tuple[config.Settings | None, int] = (None, 1)


def limit() -> int:
    """How many threads a plan may use, the caller's included."""
    global _seen
    settings = config.current()
    if _seen[0] is not settings:
        _seen = settings, (settings.num_threads or available()) if _supported() else 1
    return _seen[1]


@cache
def available() -> int:
    """The processors that this process may use at once: its affinity, cut to the container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _quota()))


@cache
def pool() -> int:
    """The address of the pool's memory, which lasts as long as the process."""
    words = aligned(tape.POOL_BYTES)
    words[tape.TICKET // 8] = tape.CLOSED
    words[tape.CLOCK // 8] = native.symbol_address("clock_gettime")
    words[tape.SYSCALL // 8] = native.symbol_address("syscall")
    words[tape.FUTEX // 8] = _FUTEX_NUMBERS.get(platform.machine(), 0)
    words[tape.PROCESSOR // 8] = native.symbol_address("sched_getcpu")
    words[tape.MOVE // 8] = _MOVE_NUMBERS.get(platform.machine(), 0)
    words[tape.DATA_OFFSET // 8] = _data_offset()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(words))
    return words.ctypes.data


@cache
def walk() -> Any:
    """The loop over a plan's entries, `kernels.cpu.tape.run`, ready to be called."""
    return native.function(build.kernel(tape.source("run"), "tape"))


@cache
def side_by_side() -> int:
    """The address of the kernel that carries out others which do not depend on each other."""
    return build.kernel(tape.source("side_by_side"), "side_by_side")


def sources(grouped: bool = False) -> list[tuple[str, str]]:
    """Text and name of the kernels that carry out all others: whoever compiles kernels can compile these along. `grouped`:
    for a plan in which kernels run side by side, too."""
    names = {"run": "tape"} | ({"side_by_side": "side_by_side"} if grouped else {})
    return [*[(tape.source(text), name) for text, name in names.items()], *(_thread_sources() if limit() > 1 else [])]


def _thread_sources() -> list[tuple[str, str]]:
    """What a thread runs, and what wakes it at the end."""
    return [(tape.source(name), name) for name in ("worker", "wake")]


def start(count: int) -> int:
    """Have `count` - 1 threads beside the caller's, or as many as the system gives; how many can be used now."""
    with _lock:
        while len(_handles) < count - 1:
            if not _handles:
                _allow_processors()
            handle = _create_thread()
            if handle is None:
                break
            _handles.append(handle)
            _word(tape.WORKERS).value = len(_handles)
        return len(_handles) + 1


def stop() -> None:
    """End all threads of the pool and wait until they have gone: when the interpreter ends, or while no plan runs. They
    start again when a plan wants them."""
    with _lock:
        if not _handles:
            return
        _word(tape.STOP).value = 1
        native.function(_thread_kernels()[1])(pool(), 0, 0, 0)
        for handle in _handles:
            _libc().pthread_join(handle, None)
        _forget()


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed int64 memory of at least `nbytes`, on a cache line of its own."""
    words = np.zeros(-(-nbytes // 64) * 8 + 8, np.int64)
    shift = -words.ctypes.data % 64 // 8
    return words[shift:shift + -(-nbytes // 64) * 8]


def _create_thread() -> ctypes.c_size_t | None:
    handle = ctypes.c_size_t()
    body = ctypes.c_void_p(_thread_kernels()[0])
    if _libc().pthread_create(ctypes.byref(handle), None, body, ctypes.c_void_p(pool())) != 0:
        return None
    return handle


@cache
def _thread_kernels() -> tuple[int, ...]:
    """Both, while threads start: nothing is compiled while the interpreter shuts down."""
    return tuple(build.kernels(_thread_sources()).values())


def _word(offset: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(pool() + offset)


def _allow_processors() -> None:
    """Workers may go wherever the process may, but to where a job comes from."""
    allowed = [p for p in os.sched_getaffinity(0) if p < 8 * tape.ELSEWHERE_BYTES]
    for k in range(0, tape.ELSEWHERE_BYTES, 8):
        bits = sum(1 << (p % 64) for p in allowed if p // 64 == k // 8)
        _word(tape.ELSEWHERE + k).value = bits - (1 << 64) if bits >> 63 else bits
    _word(tape.CALLER).value = allowed[0]
    _word(tape.ELSEWHERE + allowed[0] // 64 * 8).value &= ~(1 << (allowed[0] % 64))


def _forget() -> None:
    """Bring the pool back to its first state: nobody else is using it."""
    _handles.clear()
    for offset in (tape.STOP, tape.WORKERS, tape.STARTED, tape.OWNER, tape.SLEEPERS, tape.WAITING):
        _word(offset).value = 0
    _word(tape.TICKET).value |= tape.CLOSED


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    if pool.cache_info().currsize:
        _forget()


def _supported() -> bool:
    """Sleeping and waking needs Linux's futex; elsewhere plans run on the caller's thread."""
    return platform.system() == "Linux" and platform.machine() in _FUTEX_NUMBERS


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _data_offset() -> int:
    """Where in an array object the address of its elements is."""
    array = np.zeros(1)
    if ctypes.c_int64.from_address(id(row := (array,)) + ITEMS).value != id(row[0]):
        raise RuntimeError("this Python keeps the items of a tuple where jitgrad does not find them")
    for offset in range(object.__basicsize__, np.ndarray.__basicsize__, 8):
        if ctypes.c_int64.from_address(id(array) + offset).value == array.ctypes.data:
            return offset
    raise RuntimeError("this NumPy keeps the address of an array's elements where jitgrad does not find it")


def _quota() -> int:
    """Whole processors that the container's quota pays for, rounded up; a large number without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]              # cgroup 2
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()         # cgroup 1
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return 1 << 16
    if not quota.isdigit() or int(quota) == 0:
        return 1 << 16
    return math.ceil(int(quota) / int(period))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(stop)
