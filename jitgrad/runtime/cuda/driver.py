"""The CUDA driver by ctypes: found at first use, every call checked.

    driver.available()                  # is there a driver, and a GPU?
    gpu = driver.gpu(0)                 # a `Gpu`: its context is current on this thread from here on
    driver.call("cuMemFree_v2", address)

`call` raises `DriverError` (or `OutOfMemoryError`) with the driver's own name for what went wrong. `connect` puts another
object with the same functions in the driver's place, which is what the tests do.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from jitgrad import devices
from jitgrad.errors import DeviceError, complain

SUCCESS, OUT_OF_MEMORY, NOT_READY = 0, 2, 600
NO_DEVICE = 100

_ADDRESS = c_uint64
_OUT_ADDRESS, _OUT_INT, _OUT_SIZE, _OUT_HANDLE = POINTER(c_uint64), POINTER(c_int), POINTER(c_size_t), POINTER(c_void_p)

PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_OUT_INT,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (_OUT_INT,),
    "cuDeviceGet": (_OUT_INT, c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (_OUT_SIZE, c_int),
    "cuDeviceGetAttribute": (_OUT_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT_HANDLE, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_OUT_SIZE, _OUT_SIZE),
    "cuMemAlloc_v2": (_OUT_ADDRESS, c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuPointerGetAttribute": (c_void_p, c_int, _ADDRESS),
    "cuMemHostAlloc": (_OUT_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _ADDRESS, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, c_size_t, c_void_p),
    "cuMemcpyPeerAsync": (_ADDRESS, c_void_p, _ADDRESS, c_void_p, c_size_t, c_void_p),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuMemsetD16Async": (_ADDRESS, ctypes.c_ushort, c_size_t, c_void_p),
    "cuMemsetD32Async": (_ADDRESS, c_uint, c_size_t, c_void_p),
    "cuStreamCreateWithPriority": (_OUT_HANDLE, c_uint, c_int),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _OUT_HANDLE),
    "cuEventCreate": (_OUT_HANDLE, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventQuery": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuModuleLoadData": (_OUT_HANDLE, c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_OUT_HANDLE, c_void_p, c_char_p),
    "cuFuncGetAttribute": (_OUT_INT, c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (_OUT_INT, c_void_p, c_int, c_size_t),
    "cuLaunchKernel": (c_void_p, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_void_p, c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint, _ADDRESS, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int,
                               c_int, c_int),
    "cuGraphInstantiateWithFlags": (_OUT_HANDLE, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
"""The parameters of every function that is used; all return an error code."""

ATTRIBUTES = {"max_threads_per_block": 1, "warp_size": 10, "multi_processor_count": 16, "l2_cache_size": 38,
              "max_threads_per_multi_processor": 39, "shared_memory_per_block": 8, "shared_memory_per_multiprocessor": 81,
              "shared_memory_per_block_optin": 97, "regs_per_multiprocessor": 82, "major": 75, "minor": 76}
"""What a `Gpu` knows of itself, by the driver's numbers (CUdevice_attribute)."""


class DriverError(DeviceError):
    """A call of the driver that failed; `code` is the driver's number, `name` its name."""

    code: int = 0
    name: str = ""


class OutOfMemoryError(DriverError):
    """Device memory that is used up."""


class Gpu:
    """One GPU: its number, primary context, and what the driver says of it. `memory` keeps its pool for
    this GPU here."""

    major: int
    minor: int
    max_threads_per_block: int
    warp_size: int
    multi_processor_count: int
    l2_cache_size: int
    max_threads_per_multi_processor: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    regs_per_multiprocessor: int

    def __init__(self, driver: Driver, index: int):
        self.driver, self.index = driver, index
        self.device = devices.device("cuda", index)
        handle, context = c_int(), c_void_p()
        driver.call("cuDeviceGet", handle, index)
        driver.call("cuDevicePrimaryCtxRetain", context, handle)
        self.context = context.value
        name = ctypes.create_string_buffer(256)
        driver.call("cuDeviceGetName", name, 256, handle)
        self.name = name.value.decode()
        total = c_size_t()
        driver.call("cuDeviceTotalMem_v2", total, handle)
        self.total_memory = total.value
        for field, number in ATTRIBUTES.items():
            value = c_int()
            driver.call("cuDeviceGetAttribute", value, number, handle)
            setattr(self, field, value.value)
        self.pool: Any = None

    def activate(self) -> Gpu:
        """Make its context current on this thread, whatever another library has made current since."""
        self.driver.call("cuCtxSetCurrent", self.context)
        return self


class _Thread(threading.local):
    index = 0                               # the user's current device


class Driver:
    """A driver library with its functions declared, initialized; and the GPUs in use."""

    def __init__(self, library: Any):
        self.here = _Thread()
        self.process = os.getpid()
        self._functions = {name: _declared(library, name, types) for name, types in PROTOTYPES.items()}
        self._gpus: dict[int, Gpu] = {}
        self._lock = threading.RLock()
        self.call("cuInit", 0)
        count = c_int()
        self.call("cuDeviceGetCount", count)
        self.count = count.value
        self.pinned: Any = None

    @property
    def version(self) -> str:
        """The newest CUDA that the driver knows, such as "13.0"."""
        found = c_int()
        self.call("cuDriverGetVersion", found)
        return f"{found.value // 1000}.{found.value % 1000 // 10}"

    def status(self, name: str, *arguments: Any) -> int:
        """Call a function; its error code."""
        if self.process != os.getpid():
            raise complain(DeviceError, "cuda", "CUDA cannot be used in a process that was forked after its first use",
                           fix="Start the process with the method 'spawn', or use CUDA in it only")
        code: int = self._functions[name](*arguments)
        return code

    def address(self, name: str) -> int:
        """The address of a function, for native code that calls it."""
        return ctypes.cast(self._functions[name], c_void_p).value or 0

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; DriverError unless it succeeds."""
        code = self.status(name, *arguments)
        if code != SUCCESS:
            raise self.error(code, name)

    def release(self, name: str, *arguments: Any) -> None:
        """Give something back to the driver, from a finalizer: where that fails there is nothing left to do. In a forked
        process the driver's things are those of the parent."""
        if self.process == os.getpid():
            self._functions[name](*arguments)

    def error(self, code: int, name: str, problem: str = "", fix: str = "",
              where: tuple[str, int] | None = None) -> DriverError:
        """The exception for an error code that the function `name` gave; `where`: the user's line, by default the one
        that is executing."""
        words = [self._text(function, code) for function in ("cuGetErrorName", "cuGetErrorString")]
        text = f"{name} failed: {words[0] or f'error {code}'}" + (f" ({words[1]})" if words[1] else "")
        raised = complain(OutOfMemoryError if code == OUT_OF_MEMORY else DriverError, "cuda",
                          f"{problem}: {text}" if problem else text, fix=fix, where=where)
        assert isinstance(raised, DriverError)
        raised.code, raised.name = code, words[0]
        return raised

    def _text(self, function: str, code: int) -> str:
        found = c_char_p()
        self._functions[function](code, found)
        return found.value.decode() if found.value else ""

    def gpu(self, index: int) -> Gpu:
        """That GPU, with its context current on this thread."""
        found = self._gpus.get(index)
        if found is None:
            if not 0 <= index < self.count:
                there = "there is none" if not self.count else "there is one, cuda:0" if self.count == 1 \
                    else f"there are cuda:0 … cuda:{self.count - 1}"
                raise complain(DeviceError, "cuda", f"there is no device cuda:{index}: {there}")
            with self._lock:
                found = self._gpus.get(index)
                if found is None:
                    found = self._gpus[index] = Gpu(self, index)
        return found.activate()


def _declared(library: Any, name: str, types: tuple[Any, ...]) -> Any:
    """The function, with the types of its parameters; one that this driver lacks raises when it is called."""
    try:
        function = getattr(library, name)
    except AttributeError:
        def missing(*_: Any) -> int:
            raise complain(DeviceError, "cuda", f"this driver has no function {name}", fix="Update the NVIDIA driver")
        return missing
    function.argtypes, function.restype = types, c_int
    return function


class _Connection:
    """The driver of this process, once it was looked for: the `Driver`, or why there is none."""

    driver: Driver | None = None
    problem: str | None = None
    lock = threading.Lock()


_connection = _Connection()


def _open() -> Any:
    if sys.platform == "win32":
        return ctypes.WinDLL("nvcuda.dll")
    return ctypes.CDLL("libcuda.so.1")


def _look() -> Driver | None:
    """The driver, looked for at the first call; None when there is none or it cannot be initialized."""
    if _connection.driver is None and _connection.problem is None:
        with _connection.lock:
            if _connection.driver is None and _connection.problem is None:
                try:
                    _connection.driver = Driver(_open())
                except OSError:
                    _connection.problem = "no NVIDIA driver was found on this machine"
                except DriverError as error:
                    _connection.problem = "there is an NVIDIA driver, but " + (
                        "it finds no GPU" if error.code == NO_DEVICE else f"it cannot be used: {error.name or error.code}")
    return _connection.driver


def connect(library: Any) -> Driver:
    """Use `library`, an object with the driver's functions, from now on; returns what it became."""
    _connection.driver, _connection.problem = Driver(library), None
    return _connection.driver


def disconnect() -> None:
    """Forget the driver; the next use looks for it again."""
    _connection.driver = _connection.problem = None


def available() -> bool:
    """Whether there are a driver and a GPU."""
    return count() > 0


def count() -> int:
    """The number of GPUs, 0 without a driver."""
    found = _look()
    return 0 if found is None else found.count


def why_not() -> str:
    """Why there is no GPU to use; for callers that have looked for one in vain."""
    return _connection.problem or "there is an NVIDIA driver, but it finds no GPU"


def is_initialized() -> bool:
    """Whether a GPU is in use by this process."""
    return _connection.driver is not None and bool(_connection.driver._gpus)


def in_use() -> list[int]:
    """The numbers of the GPUs that this process uses."""
    return list(_connection.driver._gpus) if _connection.driver is not None else []


def current() -> Driver:
    """The driver; DeviceError when there is none."""
    found = _look()
    if found is None or not found.count:
        raise complain(DeviceError, "cuda", f"no GPU can be used: {why_not()}",
                       fix="Use the device 'cpu', or ask jitgrad.cuda.is_available() first")
    return found


def current_index() -> int:
    """The number of this thread's current GPU."""
    return 0 if _connection.driver is None else _connection.driver.here.index


def gpu(index: int | None = None) -> Gpu:
    """A GPU by number, this thread's current one by default; its context is current on this thread from here on."""
    found = current()
    return found.gpu(found.here.index if index is None else index)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver; DriverError unless it succeeds."""
    current().call(name, *arguments)


devices.install_current_gpu(current_index)
