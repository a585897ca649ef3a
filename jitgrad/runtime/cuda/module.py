"""Machine code on a GPU: a cubin is loaded once per GPU, its kernels are found by name.

    code = Module(cubin, gpu)
    kernel = code.function("fused_add_f32")     # registers, shared and local memory, what fits on a multiprocessor
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p

from jitgrad.errors import DeviceError, complain
from jitgrad.runtime.cuda import driver
from jitgrad.runtime.cuda.driver import Gpu

INVALID_IMAGE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX, NOT_FOUND = 200, 209, 222, 500
ATTRIBUTES = {"max_threads": 0, "shared_bytes": 1, "constant_bytes": 2, "local_bytes": 3, "registers": 4,
              "max_dynamic_shared_bytes": 8}
"""What a `Function` knows of itself, by the driver's numbers (CUfunction_attribute)."""


class Function:
    """One kernel: its `handle`, and what it needs per thread (`registers`, `local_bytes`) and block (`shared_bytes`)."""

    max_threads: int
    shared_bytes: int
    constant_bytes: int
    local_bytes: int
    registers: int
    max_dynamic_shared_bytes: int

    def __init__(self, module: Module, name: str, handle: int):
        self.module, self.name, self.handle = module, name, handle
        for field, number in ATTRIBUTES.items():
            value = c_int()
            module.gpu.driver.call("cuFuncGetAttribute", value, number, handle)
            setattr(self, field, value.value)

    def allow_shared(self, nbytes: int) -> None:
        """Let launches ask for up to `nbytes` of dynamic shared memory; more than 48 KiB have to be asked for."""
        gpu = self.module.gpu.activate()
        most = gpu.shared_memory_per_block_optin - self.shared_bytes
        if nbytes > most:
            raise complain(DeviceError, self.name, f"{nbytes} bytes of shared memory per block, but {gpu.device} has {most}")
        if nbytes > self.max_dynamic_shared_bytes:
            gpu.driver.call("cuFuncSetAttribute", self.handle, ATTRIBUTES["max_dynamic_shared_bytes"], nbytes)
            self.max_dynamic_shared_bytes = nbytes

    def blocks_per_multiprocessor(self, threads: int, shared: int = 0) -> int:
        """How many blocks of that many threads and bytes of shared memory run on a multiprocessor at once."""
        found = c_int()
        gpu = self.module.gpu.activate()
        gpu.driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", found, self.handle, threads, shared)
        return found.value

    def occupancy(self, threads: int, shared: int = 0) -> float:
        """The share of a multiprocessor's threads that blocks of that size keep busy, 0 to 1."""
        return self.blocks_per_multiprocessor(threads, shared) * threads / self.module.gpu.max_threads_per_multi_processor


class Module:
    """A loaded cubin."""

    def __init__(self, cubin: bytes, gpu: Gpu | None = None):
        self.gpu = (gpu or driver.gpu()).activate()
        image = ctypes.create_string_buffer(cubin, len(cubin) + 1)
        handle = c_void_p()
        code = self.gpu.driver.status("cuModuleLoadData", handle, ctypes.addressof(image))
        if code == NO_BINARY_FOR_GPU:
            raise self.gpu.driver.error(code, "cuModuleLoadData", "the machine code is for another kind of GPU than "
                                        f"{self.gpu.name}, sm_{self.gpu.major}{self.gpu.minor}")
        if code in (INVALID_IMAGE, UNSUPPORTED_PTX):
            raise self.gpu.driver.error(
                code, "cuModuleLoadData", f"the driver, of CUDA {self.gpu.driver.version}, does not know such machine code",
                "Update the NVIDIA driver, or install an nvidia-nvjitlink of its version")
        if code:
            raise self.gpu.driver.error(code, "cuModuleLoadData", "machine code cannot be loaded")
        self.handle = handle.value
        self._functions: dict[str, Function] = {}

    def function(self, name: str) -> Function:
        """The kernel of that name; DeviceError when there is none."""
        found = self._functions.get(name)
        if found is None:
            handle = c_void_p()
            self.gpu.activate()
            code = self.gpu.driver.status("cuModuleGetFunction", handle, self.handle, name.encode())
            if code or handle.value is None:
                raise self.gpu.driver.error(code, "cuModuleGetFunction", f"the machine code has no kernel {name}")
            found = self._functions[name] = Function(self, name, handle.value)
        return found

    def unload(self) -> None:
        """Give it back. Its functions must not be launched any more."""
        self._functions.clear()
        self.gpu.activate().driver.call("cuModuleUnload", self.handle)
