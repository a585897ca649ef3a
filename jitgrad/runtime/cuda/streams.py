"""Streams and events: the order of work on a GPU.

A `Stream` is a queue of work; work on different streams is unordered unless an `Event`, a mark in one stream, is waited
for in another. Every thread has a current stream per GPU, at first the default one.
"""

from __future__ import annotations

import threading
import weakref
from ctypes import c_float, c_void_p
from typing import Any

from jitgrad import devices
from jitgrad.errors import DeviceError, complain
from jitgrad.runtime.cuda import driver
from jitgrad.runtime.cuda.driver import NOT_READY, SUCCESS, Gpu

_NON_BLOCKING = 1                                # a stream that does not wait for the default one
_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2


class Event:
    """A mark in a stream: ``record`` sets it, ``wait`` lets a stream wait for it, ``synchronize`` the caller.

    It belongs to the GPU of the stream that it is first recorded in. `enable_timing` lets `elapsed_time` measure."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        if interprocess:
            raise complain(DeviceError, "Event", "events cannot be shared with other processes")
        self.enable_timing = enable_timing
        self._flags = (0 if enable_timing else _DISABLE_TIMING) | (_BLOCKING_SYNC if blocking else 0)
        self._gpu: Gpu | None = None
        self.handle: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Mark the point that `stream` (by default the current one) has come to."""
        stream = stream or current_stream()
        gpu = stream.gpu.activate()
        if self.handle is None:
            handle = c_void_p()
            gpu.driver.call("cuEventCreate", handle, self._flags)
            self.handle, self._gpu = handle.value, gpu
            weakref.finalize(self, gpu.driver.release, "cuEventDestroy_v2", self.handle).atexit = False
        if self._gpu is not gpu:
            raise complain(DeviceError, "Event.record", f"the event belongs to {self._of.device}, the stream to "
                           f"{gpu.device}")
        gpu.driver.call("cuEventRecord", self.handle, stream.handle)

    def wait(self, stream: Stream | None = None) -> None:
        """What comes next in `stream` (by default the current one) waits for this event."""
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Whether all work before the mark is done; True for an event that was never recorded."""
        if self.handle is None:
            return True
        return _is_done(self._of.activate(), "cuEventQuery", self.handle)

    def synchronize(self) -> None:
        """Wait until all work before the mark is done."""
        if self.handle is not None:
            self._of.activate().driver.call("cuEventSynchronize", self.handle)

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds on the GPU from this event to `end_event`; both must have been reached."""
        for event in (self, end_event):
            if not event.enable_timing or event.handle is None:
                raise complain(DeviceError, "Event.elapsed_time", "both events must have been made with "
                               "enable_timing=True and recorded")
            if not event.query():
                raise complain(DeviceError, "Event.elapsed_time", "an event has not been reached yet",
                               fix="Call synchronize() on it first")
        result = c_float()
        self._of.driver.call("cuEventElapsedTime", result, self.handle, end_event.handle)
        return result.value

    @property
    def _of(self) -> Gpu:
        assert self._gpu is not None
        return self._gpu

    @property
    def device(self) -> Any:
        """The device that it was recorded on, None before that."""
        return None if self._gpu is None else self._gpu.device


class Stream:
    """A queue of work on one GPU: ``Stream()`` on the current one, ``Stream("cuda:1")``. Lower priority numbers go
    first. It is destroyed when nothing refers to it any more; the driver finishes its work before."""

    def __init__(self, device: Any = None, priority: int = 0, *, _handle: int | None = None):
        self.gpu = driver.gpu(device if isinstance(device, int) or device is None else _index_of(device))
        self.priority = priority
        if _handle is None:
            handle = c_void_p()
            self.gpu.driver.call("cuStreamCreateWithPriority", handle, _NON_BLOCKING, priority)
            assert handle.value is not None
            self.handle: int = handle.value
            weakref.finalize(self, self.gpu.driver.release, "cuStreamDestroy_v2", self.handle).atexit = False
        else:
            self.handle = _handle

    @property
    def device(self) -> Any:
        """The device that it belongs to."""
        return self.gpu.device

    @property
    def cuda_stream(self) -> int:
        """The driver's handle, as a number."""
        return self.handle

    def synchronize(self) -> None:
        """Wait until all work in it is done."""
        self.gpu.activate().driver.call("cuStreamSynchronize", self.handle)

    def query(self) -> bool:
        """Whether all work in it is done."""
        return _is_done(self.gpu.activate(), "cuStreamQuery", self.handle)

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, by default a new one, and return it."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """What comes next waits for `event`."""
        if event.handle is not None:
            self.gpu.activate().driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def wait_stream(self, stream: Stream) -> None:
        """What comes next waits for all that is in `stream` now."""
        self.wait_event(stream.record_event())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.gpu is other.gpu and self.handle == other.handle

    def __hash__(self) -> int:
        return hash((self.gpu.index, self.handle))

    def __repr__(self) -> str:
        return f"<jitgrad.cuda.Stream device={self.device} cuda_stream={self.handle:#x}>"


def _index_of(device: Any) -> int:
    exact = devices.placed(device)
    if exact.index is None:
        raise complain(DeviceError, "Stream", f"{exact} has no streams", fix="Name a GPU, such as 'cuda:0'")
    return exact.index


def _is_done(gpu: Gpu, function: str, handle: int) -> bool:
    code = gpu.driver.status(function, handle)
    if code not in (SUCCESS, NOT_READY):
        raise gpu.driver.error(code, function)
    return code == SUCCESS


class _Current(threading.local):
    def __init__(self) -> None:
        self.streams: dict[Gpu, Stream] = {}


_current = _Current()


def default_stream(index: int | None = None) -> Stream:
    """The stream 0 of a GPU."""
    gpu = driver.gpu(index)
    return Stream(gpu.index, _handle=0)


def current_stream(index: int | None = None) -> Stream:
    """The stream of this thread that work on a GPU goes to."""
    gpu = driver.gpu(index)
    found = _current.streams.get(gpu)
    if found is None:
        found = _current.streams[gpu] = default_stream(gpu.index)
    return found


def set_stream(stream: Stream) -> None:
    """Send the work of this thread on that GPU to `stream` from now on."""
    _current.streams[stream.gpu] = stream


def synchronize(index: int | None = None) -> None:
    """Wait until a GPU has done all its work."""
    driver.gpu(index).driver.call("cuCtxSynchronize")
