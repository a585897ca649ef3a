"""A stand-in for a GPU that carries kernels out: the driver of `cuda_standin`, launches by the PTX interpreter.

The linker hands PTX through, so that what is loaded as machine code is the text of the kernels. Device memory is seen by the
interpreter as it lies in the stand-in: an address outside of what was allocated is an error, as is one that is not
aligned."""

import ctypes
from functools import lru_cache

import numpy as np
from cuda_standin import Failure, StandIn
from ptx import parse
from ptx.boxes import MAP_BYTES
from ptx.errors import OutOfBounds
from ptx.machine import launch
from ptx.memory import LOCAL, SHARED, WINDOW, Memory, Region

SEPARATOR = "\n// ---- next kernel\n"


def hand_through(texts, arch):
    """In place of NVIDIA's linker."""
    assert arch == "sm_90a"
    return SEPARATOR.join(texts).encode()


@lru_cache(maxsize=4096)
def parsed(text):
    return parse(text)


class Executing(StandIn):
    """`launches` counts the kernels that ran, by name without the key behind it; `downloads` has the bytes of every copy
    into the computer's memory."""

    def __init__(self, **options):
        super().__init__(**options)
        self.launches, self.downloads = {}, []

    def _cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        self.downloads.append(size)
        super()._cuMemcpyDtoHAsync_v2(target, source, size, stream)

    def _cuModuleLoadData(self, out, image):
        modules = [parsed(text) for text in ctypes.string_at(image).decode().split(SEPARATOR)]
        self._handle(out, {name: module for module in modules for name in module.kernels})

    def _cuModuleGetFunction(self, out, module, name):
        found = self.handles[module].get(name.decode())
        if found is None:
            raise Failure(500)
        self._handle(out, (name.decode(), found))

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        self._check_shared(function, shared)
        name, module = self.handles[function]
        places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        words = [ctypes.string_at(places[k], MAP_BYTES) if kind == "map" else
                 int.from_bytes(ctypes.string_at(places[k], 8), "little")
                 for k, kind in enumerate(module.kernels[name].parameters.values())]
        self._enqueue(stream, name, lambda: self._execute(module, name, (gx, gy, gz), (bx, by, bz), words, shared))

    def _execute(self, module, name, grid, block, words, shared):
        short = name.rpartition("_")[0]
        self.launches[short] = self.launches.get(short, 0) + 1
        memory = DeviceMemory(self, module)
        launch(module, name, memory, grid, block, words, dynamic=shared, schedule="together", seed=0, wave=16384)


class DeviceMemory(Memory):
    """What a launch sees: the blocks of the stand-in, and the variables of the module."""

    def __init__(self, standin, module):
        super().__init__()
        self.races = False
        self.blocks = [Block(address, data) for address, data in sorted(standin.blocks.items())]
        self.starts = np.array([block.base for block in self.blocks])
        for variable in module.variables.values():
            if variable.data is not None:
                self.add(np.frombuffer(variable.data, np.uint8), variable.name, writable=variable.space != "const")

    def split(self, addresses, space, fail):
        if space in ("shared", "local"):
            return super().split(addresses, space, fail)
        numbers = np.searchsorted(self.starts, addresses.astype(np.int64), side="right") - 1
        device = (addresses >> WINDOW).astype(np.int64) >= self.starts[0] >> WINDOW
        if not device.all():
            return super().split(addresses, space, fail)
        if (numbers == numbers[0]).all():
            return [(self.blocks[numbers[0]], None, addresses - self.blocks[numbers[0]].base)]
        found = []
        for number in np.unique(numbers):
            lanes = np.flatnonzero(numbers == number)
            found.append((self.blocks[number], lanes, addresses[lanes] - self.blocks[number].base))
        return found

    def region(self, window, fail, lane, address):
        if window in (SHARED, LOCAL) or window >= 0x7F00:
            return super().region(window, fail, lane, address)
        fail(OutOfBounds, lane, f"address {address:#x} is in no memory of the GPU")
        raise AssertionError


class Block(Region):
    """Memory of the stand-in's as the interpreter sees it."""

    def __init__(self, address, data):
        self.name, self.size, self.skew, self.writable, self.granule = f"block {address:#x}", len(data), 0, True, 4
        self.base, self.stride = address, len(data)
        self.bytes = np.frombuffer(data, np.uint8)
        self.known, self.all_known = np.broadcast_to(True, len(data)), True
        self.shadow, self.views = None, {1: self.bytes}
