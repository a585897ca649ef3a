"""How long a plan on a GPU takes: every entry of it, by events of the GPU, and the calls as Python sees them.

What is enqueued while the GPU waits for Python would be measured with that wait. So the queue gets something to do first,
fills of a piece of memory, while Python enqueues the kernels and the events around them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from jitgrad.runtime.cuda import streams
from jitgrad.runtime.cuda.array import Array, empty, fill, moved
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import LaunchPlan
from jitgrad.runtime.cuda.plan import ALIGNMENT, WARM, Frame, GpuPlan, Host
from jitgrad.runtime.cuda.streams import Event

BUSY = 64 << 20                                 # bytes of a fill; more than a GPU's cache holds, so it is cold behind it
COPIED = 256 << 20                              # bytes
_CALLS, _ENOUGH = 20, 1.0                       # of a plan, and seconds


def time_entries(plan: GpuPlan, inputs: Sequence[Array]) -> list[float]:
    """Seconds of each entry of `plan.spec.entries` in one run: of a kernel by events before and behind it, of what NumPy
    carries out until its results are on the GPU. Inputs that the plan writes are overwritten."""
    frame = Frame(plan, streams.current_stream(plan.gpu.index))
    ready = frame.prepare(inputs, False)
    found: list[Callable[[], float]] = []
    for step in frame.steps:
        if isinstance(step, Host):
            streams.synchronize(plan.gpu.index)
            begin = time.perf_counter()
            frame.carry_out(step, ready.addresses, False)
            streams.synchronize(plan.gpu.index)
            taken = time.perf_counter() - begin
            found.append(lambda taken=taken: taken)  # type: ignore[misc]
        elif isinstance(step, LaunchPlan):
            step.bind(ready.addresses)
            found += _enqueue(step, plan.gpu)
    streams.synchronize(plan.gpu.index)
    return [seconds() for seconds in found]


def _enqueue(step: LaunchPlan, gpu: Gpu) -> list[Callable[[], float]]:
    """Put launches into the stream with events between them; who can say afterwards how long each took."""
    stream = streams.current_stream(gpu.index)
    _keep_busy(gpu, len(step.entries))
    events = [Event(enable_timing=True) for _ in range(len(step.entries) + 1)]
    events[0].record(stream)
    for entry, event in zip(step.entries, events[1:], strict=True):
        entry.enqueue(stream)
        event.record(stream)
    return [lambda k=k: events[k].elapsed_time(events[k + 1]) / 1000 for k in range(len(step.entries))]  # type: ignore[misc]


def _keep_busy(gpu: Gpu, launches: int) -> None:
    """Work for as long as Python takes to enqueue so many launches."""
    piece = empty((min(BUSY, gpu.total_memory // 256),), np.dtype(np.uint8), gpu)
    for _ in range(2 + launches):
        fill(piece, b"\0")


def time_call(plan: GpuPlan, inputs: Sequence[Array]) -> tuple[float, float]:
    """Seconds of a call until Python has it back, which is what launching costs, and until the GPU is done: the medians of
    some calls, behind those after which the plan is a CUDA graph, if it may become one."""
    for _ in range(WARM + 1):
        plan.run(inputs)
    streams.synchronize(plan.gpu.index)
    started: list[float] = []
    done: list[float] = []
    while not done or (len(done) < _CALLS and sum(done) < _ENOUGH):
        begin = time.perf_counter()
        plan.run(inputs)
        started.append(time.perf_counter() - begin)
        streams.synchronize(plan.gpu.index)
        done.append(time.perf_counter() - begin)
    return statistics.median(started), statistics.median(done)


@lru_cache(maxsize=16)
def bandwidth(gpu: Gpu) -> float:
    """Bytes per second, read and written, of a copy within the memory of `gpu`: the best of some, by events."""
    size = min(COPIED, gpu.total_memory // 64)
    source, target = (empty((size,), np.dtype(np.uint8), gpu) for _ in range(2))
    stream, best = streams.current_stream(gpu.index), float("inf")
    for _ in range(6):
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        fill(source, b"\0")
        begin.record(stream)
        gpu.driver.call("cuMemcpyDtoDAsync_v2", target.address, source.address, size, stream.handle)
        end.record(stream)
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return 2 * size / best


def on_gpu(arrays: Sequence[np.ndarray], gpu: Gpu) -> list[Array]:
    """Copies of arrays for a plan: in device memory, numbers as they are."""
    return [a if a.nbytes <= ALIGNMENT else moved(np.ascontiguousarray(a), gpu.device) for a in arrays]
