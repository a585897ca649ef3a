"""Launches of kernels: prepared once, run many times, captured into a CUDA graph so that a whole step is one launch.

    add = Launch(function, grid=(64,), block=(256,), arguments=[Slot(0), Slot(1), np.int32(n)])
    plan = LaunchPlan([add, …], slots=2)
    plan.bind([x.address, y.address])
    plan.run()                      # one call for kernels that follow each other
    plan.replay()                   # one call: the graph is captured at the first one, and anew when addresses change

What changes from step to step (step count, learning rate, random offset) is no argument, for a graph freezes those:
it lies in a `ConstantBlock`, a piece of device memory that one small copy overwrites before each replay.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np

from jitgrad.errors import DeviceError, complain
from jitgrad.runtime.cuda import memory, pinned, streams, walk
from jitgrad.runtime.cuda.array import DeviceArray
from jitgrad.runtime.cuda.driver import DriverError, Gpu
from jitgrad.runtime.cuda.module import Function
from jitgrad.runtime.cuda.streams import Event, Stream

_RELAXED = 2                                    # capture mode: nothing that is called meanwhile breaks the capture
_UINT16, _PLAIN, _SWIZZLE_128, _PROMOTE_256, _ZEROS = 1, 0, 3, 3, 0           # of the driver's tensor maps
MAP_BYTES = 128
LARGEST_GRID = 2**31 - 1, 65535, 65535


@dataclass(frozen=True, slots=True)
class Slot:
    """An argument that is memory: the address that slot `index` of a plan is bound to, plus `offset` bytes."""

    index: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class MatrixMap:
    """An argument that tells the copy engine of a matrix of 16-bit elements at `slot`: elements of a line and lines, bytes
    from line to line, elements and lines of a box. Boxes arrive swizzled by 128 bytes."""

    slot: Slot
    sizes: tuple[int, int]
    pitch: int
    box: tuple[int, int]

    def encode(self, address: int, gpu: Gpu) -> bytes:
        """The 128 bytes that a kernel takes, for a matrix at `address`."""
        room = ctypes.create_string_buffer(2 * MAP_BYTES)
        place = -(-ctypes.addressof(room) // MAP_BYTES) * MAP_BYTES
        numbers: list[Any] = [(ctypes.c_uint64 * 2)(*self.sizes), (ctypes.c_uint64 * 1)(self.pitch),
                              (ctypes.c_uint32 * 2)(*self.box), (ctypes.c_uint32 * 2)(1, 1)]
        gpu.driver.call("cuTensorMapEncodeTiled", place, _UINT16, 2, address, *[ctypes.addressof(n) for n in numbers],
                        _PLAIN, _SWIZZLE_128, _PROMOTE_256, _ZEROS)
        return ctypes.string_at(place, MAP_BYTES)


Argument = Any
"""A `Slot`, a `MatrixMap`, a `DeviceArray`, an address (int), or a NumPy scalar of the parameter's type."""


class Entry(Protocol):
    """One step of a plan."""

    def enqueue(self, stream: Stream) -> None:
        """Put its work into `stream`."""

    def bind(self, addresses: Sequence[int]) -> None:
        """Take the addresses that its slots stand for."""


class Launch:
    """A kernel with its grid, its blocks, `shared` bytes of dynamic shared memory, and its arguments, laid out as the
    driver reads them. `where` is the user's line, for errors."""

    def __init__(self, function: Function, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument],
                 shared: int = 0, where: tuple[str, int] | None = None):
        self.function, self.where, self.shared = function, where, shared
        self.grid, self.block = _three(grid), _three(block)
        self._check()
        if shared:
            function.allow_shared(shared)
        sizes = [MAP_BYTES if isinstance(argument, MatrixMap) else 8 for argument in arguments]
        self._places = list(itertools.accumulate(sizes, initial=0))
        self._words = ctypes.create_string_buffer(max(self._places[-1], 8))
        start = ctypes.addressof(self._words)
        self._parameters = (c_void_p * max(len(arguments), 1))(*[start + place for place in self._places[:-1]])
        self._slots: list[tuple[int, Slot]] = []
        self._maps: list[tuple[int, MatrixMap]] = []
        self._kept: list[DeviceArray] = []                                   # what arguments lie in
        for k, argument in enumerate(arguments):
            self._write(k, argument)
        self.row = (function.handle, *self.grid, *self.block, shared, ctypes.addressof(self._parameters))

    def _check(self) -> None:
        threads = self.block[0] * self.block[1] * self.block[2]
        most = self.function.max_threads
        fits = all(1 <= size <= limit for size, limit in zip(self.grid, LARGEST_GRID, strict=True))
        if not fits or min(self.block) < 1 or threads > most:
            raise complain(DeviceError, self.function.name, f"a grid of {self.grid} blocks of {self.block} threads cannot "
                           f"be launched: sizes are 1 or more, a grid is at most {LARGEST_GRID}, a block of this kernel has "
                           f"at most {most} threads")

    def _write(self, k: int, argument: Argument) -> None:
        if isinstance(argument, Slot):
            self._slots.append((self._places[k], argument))
            data = bytes(8)
        elif isinstance(argument, MatrixMap):
            self._maps.append((self._places[k], argument))
            return
        elif type(argument) is DeviceArray:
            self._kept.append(argument)
            data = struct.pack("Q", argument.address)
        elif isinstance(argument, (np.generic, np.ndarray)):
            data = np.asarray(argument).tobytes()
        else:
            data = struct.pack("Q", argument)
        if len(data) > 8:
            raise complain(DeviceError, self.function.name, f"argument {k} has {len(data)} bytes, at most 8 can be passed")
        ctypes.memmove(ctypes.addressof(self._words) + self._places[k], data, len(data))

    def bind(self, addresses: Sequence[int]) -> None:
        for place, slot in self._slots:
            struct.pack_into("Q", self._words, place, addresses[slot.index] + slot.offset)
        for place, matrix in self._maps:
            address = addresses[matrix.slot.index] + matrix.slot.offset
            struct.pack_into(f"{MAP_BYTES}s", self._words, place, matrix.encode(address, self.function.module.gpu))

    def enqueue(self, stream: Stream) -> None:
        self._alone.enqueue(stream)

    @cached_property
    def _alone(self) -> Batch:
        return Batch([self])

    def failed(self, code: int) -> DriverError:
        """The exception for an error code that the driver gave."""
        return self.function.module.gpu.driver.error(code, "cuLaunchKernel", f"{self.function.name} with a grid of "
                                                     f"{self.grid} blocks of {self.block} threads", where=self.where)


class Batch:
    """Launches that follow each other, enqueued by one call of native code."""

    def __init__(self, launches: Sequence[Launch]):
        self.launches = tuple(launches)
        self._table = np.array([launch.row for launch in launches], np.int64).reshape(-1, walk.COLUMNS)
        self._address = self._table.ctypes.data
        self._launch = launches[0].function.module.gpu.driver.address("cuLaunchKernel")
        self._walk = walk.walker()

    def enqueue(self, stream: Stream) -> None:
        """Put all of them into `stream`; DriverError for the first that fails, which is the last."""
        failure = self._walk(self._address, len(self.launches), stream.handle, self._launch)
        if failure:
            raise self.launches[failure >> 32].failed(failure & 0xFFFFFFFF)


@dataclass(slots=True)
class Copy:
    """An entry that copies bytes from one place in device memory to another."""

    target: Slot | int
    source: Slot | int
    nbytes: int
    _addresses: tuple[int, int] = (0, 0)

    def bind(self, addresses: Sequence[int]) -> None:
        found = [addresses[p.index] + p.offset if isinstance(p, Slot) else p for p in (self.target, self.source)]
        self._addresses = found[0], found[1]

    def enqueue(self, stream: Stream) -> None:
        stream.gpu.driver.call("cuMemcpyDtoDAsync_v2", *self._addresses, self.nbytes, stream.handle)


class LaunchPlan:
    """Entries that run one after the other in one stream of `gpu`; `slots`: how many addresses they are bound to."""

    def __init__(self, entries: Sequence[Entry], slots: int, gpu: Gpu):
        self.entries, self.slots, self.gpu = tuple(entries), slots, gpu
        self._steps = list(_batched(self.entries))
        self._addresses: tuple[int, ...] | None = None
        self._graph: Graph | None = None
        if not slots:
            self.bind(())

    def bind(self, addresses: Sequence[int]) -> None:
        """Take the addresses of the slots. A captured graph stays if they are the same."""
        found = tuple(addresses)
        if len(found) != self.slots:
            raise complain(DeviceError, "plan", f"{len(found)} addresses for {self.slots} slots")
        if found != self._addresses:
            self._addresses, self._graph = found, None
            for entry in self.entries:
                entry.bind(found)

    def run(self, stream: Stream | None = None) -> None:
        """Enqueue all entries in `stream`, by default the current one: one call per run of launches."""
        stream = self._ready(stream)
        for step in self._steps:
            step.enqueue(stream)

    def replay(self, stream: Stream | None = None) -> None:
        """The same by one launch of a graph, which is captured first if there is none for these addresses."""
        stream = self._ready(stream)
        if self._graph is None:
            self._graph = capture(self.run, self.gpu)
        self._graph.launch(stream)

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph for the addresses that the plan is bound to."""
        return self._graph is not None

    def _ready(self, stream: Stream | None) -> Stream:
        if self._addresses is None:
            raise complain(DeviceError, "plan", "its slots have not been bound", fix="Call bind(addresses) first")
        self.gpu.activate()
        return stream or streams.current_stream(self.gpu.index)


class Graph:
    """A captured graph, ready to be launched."""

    def __init__(self, gpu: Gpu, handle: int):
        self.gpu, self._handle = gpu, handle
        executable = c_void_p()
        try:
            gpu.driver.call("cuGraphInstantiateWithFlags", executable, handle, 0)
        finally:
            gpu.driver.release("cuGraphDestroy", handle)
        self.executable = executable.value

    def launch(self, stream: Stream) -> None:
        """Run it in `stream`."""
        self.gpu.activate().driver.call("cuGraphLaunch", self.executable, stream.handle)

    def __del__(self) -> None:
        if getattr(self, "executable", None):
            self.gpu.driver.release("cuGraphExecDestroy", self.executable)


def capture(enqueue: Callable[[Stream], None], gpu: Gpu) -> Graph:
    """What `enqueue(stream)` puts into a stream, as a graph; nothing of it runs. When it raises, the capture ends.

    In the stricter modes of capture this thread may not ask whether an event has come, nor ask for memory; Python's
    collector does both, whenever it likes, when it gives back what a capture has nothing to do with."""
    stream = Stream(gpu.index)                            # the default stream cannot be captured
    gpu.driver.call("cuStreamBeginCapture_v2", stream.handle, _RELAXED)
    handle = c_void_p()
    try:
        enqueue(stream)
    except BaseException:
        gpu.driver.status("cuStreamEndCapture", stream.handle, handle)
        if handle.value:
            gpu.driver.release("cuGraphDestroy", handle.value)
        raise
    gpu.driver.call("cuStreamEndCapture", stream.handle, handle)
    assert handle.value is not None
    return Graph(gpu, handle.value)


class ConstantBlock:
    """`nbytes` of device memory at `address` for what changes from step to step. `write` overwrites it by one copy in
    stream order. Several steps may be under way: the host's side is a ring of `depth` pinned pieces, each used again
    only when its copy is done."""

    def __init__(self, nbytes: int, gpu: Gpu, depth: int = 4):
        self.gpu, self.nbytes = gpu, nbytes
        self.memory = memory.allocate(nbytes, streams.current_stream(gpu.index))
        self.address = self.memory.address
        self._ring = [(pinned.allocate(nbytes), Event()) for _ in range(depth)]
        self._next = 0

    def write(self, data: bytes | np.ndarray, stream: Stream | None = None) -> None:
        """Overwrite it with `data`, at most `nbytes`, for all that comes next in `stream` (by default the current one)."""
        raw = data.tobytes() if isinstance(data, np.ndarray) else data
        if len(raw) > self.nbytes:
            raise complain(DeviceError, "ConstantBlock.write", f"{len(raw)} bytes into a block of {self.nbytes}")
        stream = stream or streams.current_stream(self.gpu.index)
        piece, done = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        done.synchronize()
        piece.record_stream(stream)                        # which may still read it when this block is gone
        ctypes.memmove(piece.address, raw, len(raw))
        self.gpu.activate().driver.call("cuMemcpyHtoDAsync_v2", self.address, piece.address, len(raw), stream.handle)
        done.record(stream)


def _batched(entries: Sequence[Entry]) -> Iterator[Any]:
    """The entries, with launches that follow each other put together."""
    for is_launch, group in itertools.groupby(entries, lambda entry: type(entry) is Launch):
        if is_launch:
            yield Batch(cast("list[Launch]", list(group)))
        else:
            yield from group


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Grid or block sizes, filled up with ones."""
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)
