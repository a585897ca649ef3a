"""Where the contenders of a GPU's measurements run, and how a call is timed there.

In go calls of jitgrad and PyTorch; out come seconds between two events of the GPU, behind a read of more memory than its
cache holds, so that operands come from memory and Python has time to enqueue. On a CPU (in tests, PyTorch may run there)
seconds are the clock's.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import jitgrad as jg
from benchmarks import measure
from benchmarks.prerequisites import version
from jitgrad import gpu_plans
from jitgrad.runtime.cuda import cublaslt, cudnn, timing

CACHES = 4                                     # as many times the GPU's cache is read in front of a call
PROBES = 4096                                  # elements of each result that are compared
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Timed:
    """A call that enqueues work of `package` on a device."""

    call: Call
    package: str
    device: str

    def __call__(self) -> Any:
        return self.call()

    @property
    def lib(self) -> Any:
        return importlib.import_module(self.package)

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.device != "cpu":
            self.lib.cuda.synchronize()


@dataclass
class Bench:
    """The devices of jitgrad and PyTorch, and for how long is measured: `seconds` per contender and case, or so many
    rounds. `calls`: those that follow each other where a queue is to fill. `only`: the names of contenders, if not all.
    `cache`: bytes read in front of a call."""

    device: str = "cuda"
    torch_device: str = "cuda"
    seconds: float = 0.15
    repeats: int | None = None
    calls: int = 20
    only: Sequence[str] = ()
    cache: int | None = None
    _buffer: Any = field(default=None, repr=False)

    def device_of(self, package: str) -> str:
        """Where the contenders of a package run."""
        return self.device if package == "jitgrad" else self.torch_device

    def takes_part(self, name: str, package: str) -> bool:
        """Whether a contender does: it is wanted, and its package can."""
        return (not self.only or name in self.only) and self.has(package)

    def has(self, package: str) -> bool:
        """Whether a package can take part."""
        if package == "jitgrad":
            return True
        if importlib.util.find_spec(package) is None:
            return False
        return self.torch_device == "cpu" or bool(importlib.import_module(package).cuda.is_available())

    def timed(self, call: Call, package: str) -> Timed:
        """A call of that package."""
        return Timed(call, package, self.device_of(package))

    def compare(self, calls: dict[str, Timed], clock: measure.Clock | None = None) -> dict[str, dict[str, float]]:
        """Median and quartiles of the seconds of calls that take turns."""
        taken = measure.interleave(calls, budget=self.seconds, repeats=self.repeats, clock=clock or self.cold,
                                   turn=self.seconds / 4, pause=0.0)
        return {name: measure.summary(times) for name, times in taken.items()}

    # ---- clocks: a call -> seconds ----------------------------------------------------------------------------------

    def cold(self, call: Timed) -> float:
        """By events of the GPU, with nothing of the operands in its cache."""
        if call.device == "cpu":
            return measure.seconds(call)
        self._read_something_else()
        begin, end = (call.lib.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def steady(self, call: Timed) -> float:
        """Of one of several calls that follow each other, until the last is done: what a training loop takes."""
        return self._following(call)[1]

    def host(self, call: Timed) -> float:
        """Until Python has a call back, of several that follow each other while the GPU works."""
        return self._following(call)[0]

    def _following(self, call: Timed) -> tuple[float, float]:
        call.wait()
        begin = time.perf_counter()
        for _ in range(self.calls):
            call()
        started = time.perf_counter() - begin
        call.wait()
        return started / self.calls, (time.perf_counter() - begin) / self.calls

    def _read_something_else(self) -> None:
        if self._buffer is None:
            nbytes = self.cache or CACHES * jg.cuda.get_device_properties().l2_cache_size
            self._buffer = jg.ones(nbytes // 4, device=self.device)
        self._buffer.sum()

    # ---- operands and results -------------------------------------------------------------------------------------------

    def normal(self, *shape: int, dtype: Any = jg.float32, scale: float = 1.0) -> Any:
        """Random numbers in jitgrad, on its device."""
        return (jg.randn(*shape, device=self.device) * scale).to(dtype)

    def for_package(self, tensor: Any, package: str) -> Any:
        """A tensor of jitgrad as one of `package`, of the same memory where both are on the GPU."""
        lib, device = importlib.import_module(package), self.device_of(package)
        if package == "jitgrad":
            return tensor.detach()
        if device == self.device == "cuda":
            return lib.from_dlpack(tensor)
        array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        return lib.from_numpy(array).to(device=device, dtype=getattr(lib, str(tensor.dtype).rpartition(".")[2]))

    @staticmethod
    def probes(results: Any) -> list[np.ndarray]:
        """Some elements of every tensor that a call gave, evenly from all of it, as float32."""
        found = []
        for tensor in results if isinstance(results, (tuple, list)) else [] if results is None else [results]:
            flat = tensor.detach().reshape(-1)
            found.append(flat[::max(1, flat.shape[0] // PROBES)].float().cpu().numpy())
        return found

    # ---- between cases ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Give back what contenders held; their plans, too."""
        gpu_plans.clear_plans()
        gc.collect()
        jg.cuda.empty_cache()
        if self.has("torch"):
            torch = importlib.import_module("torch")
            torch.compiler.reset()                         # it compiles one function for eight shapes and no more
            if self.torch_device != "cpu":
                torch.cuda.empty_cache()

    def works(self) -> bool:
        """Whether the GPU still does: an error in a kernel ends what a process can do with it."""
        try:
            return float((jg.ones(8, device=self.device) + 1).sum().item()) == 16
        except Exception:
            return False


@contextmanager
def precision(tf32: bool, packages: Sequence[str]) -> Iterator[None]:
    """Float32 products and convolutions as TF32, or exact, in all packages."""
    libs = [importlib.import_module(package) for package in packages]
    before = [lib.get_float32_matmul_precision() for lib in libs]
    theirs = [lib.backends.cudnn for lib in libs if lib is not jg]
    allowed = [cudnn.allow_tf32 for cudnn in theirs]
    try:
        for lib in libs:
            lib.set_float32_matmul_precision("high" if tf32 else "highest")
        for cudnn in theirs:
            cudnn.allow_tf32 = tf32
        yield
    finally:
        for lib, was in zip(libs, before):
            lib.set_float32_matmul_precision(was)
        for cudnn, could in zip(theirs, allowed):
            cudnn.allow_tf32 = could


def describe() -> dict[str, Any]:
    """The GPU, what a copy reaches there, and the libraries that take part."""
    properties = jg.cuda.get_device_properties()
    found = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
             "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
             "l2_mib": properties.l2_cache_size / 2**20,
             "copy_bytes_per_second": timing.bandwidth(jg.cuda.current_stream().gpu),
             "cublaslt": cublaslt.identity(), "cudnn": cudnn.identity()}
    for package in ("torch", "triton", "jax"):
        found[package] = version(package)
    return found
