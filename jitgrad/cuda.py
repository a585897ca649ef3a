"""What a user says about GPUs: PyTorch's ``torch.cuda``.

`is_available` and `device_count` can be asked anywhere; everything else raises DeviceError, with the reason, where there
is no driver or no GPU. Importing this loads nothing and asks no driver.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from jitgrad import devices
from jitgrad.errors import DeviceError, complain
from jitgrad.functional import random
from jitgrad.runtime.cuda import driver, memory, pinned, streams
from jitgrad.runtime.cuda.driver import OutOfMemoryError
from jitgrad.runtime.cuda.streams import Event, Stream, set_stream

__all__ = [
    "Event", "OutOfMemoryError", "Stream", "current_device", "current_stream", "default_stream", "device", "device_count",
    "empty_cache", "get_device_capability", "get_device_name", "get_device_properties", "init", "is_available",
    "is_bf16_supported", "is_initialized", "manual_seed", "manual_seed_all", "max_memory_allocated", "max_memory_reserved",
    "mem_get_info", "memory_allocated", "memory_reserved", "memory_stats", "memory_summary", "reset_peak_memory_stats",
    "set_device", "set_stream", "stream", "synchronize",
]


# devices

def is_available() -> bool:
    """Whether there are a driver and a GPU."""
    return driver.available()


def device_count() -> int:
    """The number of GPUs, 0 without a driver."""
    return driver.count()


def init() -> None:
    """Set up the current GPU, which otherwise happens at its first use."""
    driver.gpu()


def is_initialized() -> bool:
    """Whether a GPU is in use by this process."""
    return driver.is_initialized()


def current_device() -> int:
    """The number of the GPU that this thread uses where none is named."""
    return driver.gpu().index


def set_device(device: Any) -> None:
    """Let this thread use another GPU where none is named: a number, a text, or a device. Negative: nothing changes."""
    if isinstance(device, int) and device < 0:
        return
    gpu = driver.gpu(_index(device))
    gpu.driver.here.index = gpu.index


class device:
    """Context manager: another current GPU for a block of code. ``with jg.cuda.device(1): …``"""

    def __init__(self, device: Any):
        self.idx = device if isinstance(device, int) and device < 0 else _index(device)
        self._outer: list[int] = []

    def __enter__(self) -> device:
        self._outer.append(driver.current_index())
        set_device(self.idx)
        return self

    def __exit__(self, *_: object) -> None:
        set_device(self._outer.pop())


def get_device_name(device: Any = None) -> str:
    """The name of a GPU, such as "NVIDIA H100 80GB HBM3"."""
    return driver.gpu(_index(device)).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Its compute capability: (9, 0) for sm_90."""
    gpu = driver.gpu(_index(device))
    return gpu.major, gpu.minor


def is_bf16_supported() -> bool:
    """Whether the current GPU computes with bfloat16 by itself, which those of capability 8.0 and later do."""
    return get_device_capability() >= (8, 0)


def get_device_properties(device: Any = None) -> SimpleNamespace:
    """What the driver says of a GPU: name, total_memory (bytes), major, minor, multi_processor_count, and more."""
    gpu = driver.gpu(_index(device))
    return SimpleNamespace(name=gpu.name, total_memory=gpu.total_memory,
                           **{field: getattr(gpu, field) for field in driver.ATTRIBUTES})


def synchronize(device: Any = None) -> None:
    """Wait until a GPU has done all its work."""
    streams.synchronize(_index(device))


# streams

def current_stream(device: Any = None) -> Stream:
    """The stream that this thread's work on a GPU goes to."""
    return streams.current_stream(_index(device))


def default_stream(device: Any = None) -> Stream:
    """The stream that is current where no other was chosen."""
    return streams.default_stream(_index(device))


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Send the work of a block of code to `stream`, whose GPU is current in it; None: nothing changes."""
    if stream is None:
        yield
        return
    with device(stream.gpu.index):
        outer = streams.current_stream(stream.gpu.index)
        set_stream(stream)
        try:
            yield
        finally:
            set_stream(outer)


# memory

def memory_allocated(device: Any = None) -> int:
    """Bytes in tensors."""
    return _count(device, "allocated", "current")


def max_memory_allocated(device: Any = None) -> int:
    """The most that `memory_allocated` ever was, or since `reset_peak_memory_stats`."""
    return _count(device, "allocated", "peak")


def memory_reserved(device: Any = None) -> int:
    """Bytes held from the driver, in tensors or idle."""
    return _count(device, "reserved", "current")


def max_memory_reserved(device: Any = None) -> int:
    """The most that `memory_reserved` ever was, or since `reset_peak_memory_stats`."""
    return _count(device, "reserved", "peak")


def reset_peak_memory_stats(device: Any = None) -> None:
    """Let all peaks begin again from what is now."""
    memory.pool(_index(device)).reset_peaks()


def memory_stats(device: Any = None) -> dict[str, Any]:
    """Counts of bytes, allocations and segments under PyTorch's names: ``allocated_bytes.all.peak`` …; empty before the
    first use of a GPU."""
    return memory.statistics(memory.pool(_index(device))) if _in_use() else {}


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """The same as a table for people."""
    pool = memory.pool(_index(device))
    lines = [f"memory of {pool.gpu.device}, {pool.gpu.name}", f"{'':<14}{'now':>14}{'peak':>14}"]
    for name, counter in (("in tensors", pool.allocated), ("reserved", pool.reserved)):
        lines.append(f"{name:<14}{memory.amount(counter.current):>14}{memory.amount(counter.peak):>14}")
    if not abbreviated:
        for name, counter in (("allocations", pool.allocations), ("segments", pool.segments)):
            lines.append(f"{name:<14}{counter.current:>14}{counter.peak:>14}")
        lines.append(f"out of memory: {pool.failures}; idle segments given back for want of memory: {pool.retries}")
    return "\n".join(lines)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of a GPU, by the driver."""
    return memory.pool(_index(device)).information()


def empty_cache() -> None:
    """Give idle memory of all GPUs, and idle pinned memory, back."""
    if not _in_use():
        return
    for index in driver.in_use():
        memory.pool(index).empty_cache()
    pinned.pool().empty_cache()


# random numbers

def manual_seed(seed: int) -> None:
    """Seed the stream of random numbers. There is one for all devices: a seed means the same numbers everywhere."""
    random.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """The same."""
    random.manual_seed(seed)


def _index(given: Any) -> int | None:
    """The number of a GPU from a number, a text, a device; None: the current one."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    exact = devices.placed(given)
    if exact.type != "cuda":
        raise complain(DeviceError, "cuda", f"{exact} is no GPU", fix="Name one, such as 'cuda:0' or 0")
    return exact.index


def _in_use() -> builtins.bool:
    return driver.is_initialized()


def _count(given: Any, quantity: str, value: str) -> int:
    """A figure of a pool: 0 before the first use of a GPU, as in PyTorch."""
    if not _in_use():
        return 0
    return int(getattr(getattr(memory.pool(_index(given)), quantity), value))
