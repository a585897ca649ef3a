"""The methods of a Tensor about where it is: devices, moves between them, pinned memory, exchange with other libraries.

What it holds is a NumPy array on the CPU and a `DeviceArray` on a GPU; while a function is being compiled it may hold
nothing, and its type says where it will be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad import devices
from jitgrad.devices import device as Device
from jitgrad.errors import AutogradError, DeviceError, complain
from jitgrad.functional.core import from_array
from jitgrad.ir import interpreter
from jitgrad.runtime.cuda import dlpack, pinned, streams
from jitgrad.runtime.cuda.array import DeviceArray

_ndarray = np.ndarray


class HostMemoryError(DeviceError, TypeError):
    """Memory of a GPU where memory of the CPU is needed."""


class Placement:
    """What `Tensor` inherits."""

    _array: Any
    _type: Any
    _forced: Any
    numpy: Any
    shape: Any
    requires_grad: Any
    tensor_type: Any

    @property
    def device(self) -> Device:
        """Where it is. As in PyTorch a device equals no text: ask for its `type`, or compare ``str(x.device)``."""
        array = self._array
        if type(array) is _ndarray:
            return devices.CPU
        return devices.placed(self._type.device) if array is None else array.device

    @property
    def device_name(self) -> str:
        """The device as types have it: "cpu", "cuda:0"."""
        return str(self.device)

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        array = self._array
        return type(array) is DeviceArray if array is not None else self._type.device != "cpu"

    @property
    def is_cpu(self) -> bool:
        """Whether it is in the computer's own memory."""
        return not self.is_cuda

    def get_device(self) -> int:
        """The number of the GPU that it is on, -1 on the CPU."""
        index = self.device.index
        return -1 if index is None else index

    def data_ptr(self) -> int:
        """The address of the first element, on a GPU in its memory."""
        array: Any = self._forced()
        return array.address if type(array) is DeviceArray else int(array.ctypes.data)

    def cpu(self) -> Any:
        """It, or a copy of it, in the computer's own memory; Python waits for the values."""
        return self._moved(devices.CPU)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:
        """It, or a copy of it, on a GPU, by default the current one."""
        wanted = devices.device("cuda" if device is None else device)
        if wanted.type != "cuda":
            raise complain(DeviceError, "cuda", f"{wanted} is no GPU", fix="Did you mean x.to(device)?")
        return self._moved(wanted, non_blocking)

    def _moved(self, device: Any, non_blocking: bool = False) -> Any:
        """It, or a copy of it that gradients flow through, on `device`."""
        exact = devices.placed(device)
        if exact == self.device:
            return self
        return interpreter.state.current.move(self, exact, non_blocking)  # type: ignore[union-attr]

    def pin_memory(self, device: Any = None) -> Any:
        """It, or a copy of it, in pinned memory, which GPUs read while Python goes on: ``x.cuda(non_blocking=True)``."""
        array: Any = self._forced()
        if type(array) is DeviceArray:
            raise complain(DeviceError, "pin_memory", f"only memory of the CPU can be pinned, this is {self.tensor_type}")
        if pinned.owner(array) is not None:
            return self
        copied = pinned.allocate(array.nbytes).array(array.shape, array.dtype)
        np.copyto(copied, array)
        return from_array(copied, self)

    def is_pinned(self, device: Any = None) -> bool:
        """Whether it is in pinned memory."""
        array = self._array
        return type(array) is _ndarray and pinned.owner(array) is not None

    def record_stream(self, stream: streams.Stream) -> None:
        """`stream` uses it, too: its memory is not used again before that work is done."""
        array: Any = self._forced()
        if type(array) is not DeviceArray:
            raise complain(DeviceError, "record_stream", f"{self.tensor_type} is on no GPU")
        array.record_stream(stream)

    # --- other libraries -------------------------------------------------------------------------------------------

    def __dlpack__(self, *, stream: Any = None, dl_device: Any = None, copy: bool | None = None, **kwargs: Any) -> Any:
        if not self.is_cuda:
            asked = {"stream": stream, "dl_device": dl_device, "copy": copy}
            return self.numpy().__dlpack__(**kwargs, **{name: v for name, v in asked.items() if v is not None})
        if self.requires_grad:
            raise complain(AutogradError, "dlpack", "this tensor requires gradients, which the other library would not see",
                           fix="Use x.detach()")
        if dl_device not in (None, self.__dlpack_device__()):
            raise complain(DeviceError, "dlpack", f"{self.tensor_type} is asked for on device {dl_device}",
                           fix="Move it first")
        return dlpack.export(self._array.copy() if copy else self._array, stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CUDA, self.get_device()) if self.is_cuda else (1, 0)

    @property
    def __array_interface__(self) -> Any:
        if self.is_cuda:
            raise AttributeError(f"{self.tensor_type} has no __array_interface__: use x.cpu()")
        return self.numpy().__array_interface__

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Where the array is in the memory of its GPU (version 3 of the interface), for Numba, CuPy and others."""
        array = self._array
        if type(array) is not DeviceArray or self.requires_grad:
            raise AttributeError("only a tensor on a GPU that requires no gradients has a __cuda_array_interface__")
        stream = streams.current_stream(array.gpu.index)
        return {"shape": array.shape, "typestr": array.dtype.str, "strides": None if array.flags.c_contiguous
                else array.strides, "data": (array.address, False), "version": 3, "stream": stream.handle or 1}
