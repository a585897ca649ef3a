"""DLPack for device memory: arrays go to and come from other libraries without a copy.

`export` makes the capsule that ``from_dlpack`` of another library takes, `import_capsule` a `DeviceArray` of a capsule.
The structures are those of dlpack.h, version 0.8 (https://dmlc.github.io/dlpack). Streams are ordered as the Python
array API says: the consumer names its stream, the producer lets it wait.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p, py_object
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.errors import DeviceError, DTypeError, complain
from jitgrad.runtime.cuda import driver, streams
from jitgrad.runtime.cuda.array import DeviceArray
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.shapes import contiguous_strides

CUDA = 2                                         # kDLCUDA
NOBODY, LEGACY = -1, 1                           # of the array API's numbers of streams: no order, the default stream
_MEMORY_OF = 9                                   # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}           # by category; bfloat16 has a code of its own
_BFLOAT16 = 4


class _Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]


class _Managed(ctypes.Structure):
    pass


_Deleter = CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", c_void_p), ("deleter", _Deleter)]

_api = ctypes.pythonapi
_new_capsule = _api.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = py_object, (c_void_p, c_char_p, c_void_p)
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = c_int, (py_object, c_char_p)
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = c_void_p, (py_object, c_char_p)
# In the destructor of a capsule a reference to it would bring it back to life: there it is an address.
_is_valid_at, _pointer_at = _api["PyCapsule_IsValid"], _api["PyCapsule_GetPointer"]
_is_valid_at.restype, _is_valid_at.argtypes = c_int, (c_void_p, c_char_p)
_pointer_at.restype, _pointer_at.argtypes = c_void_p, (c_void_p, c_char_p)
_rename = _api.PyCapsule_SetName
_rename.restype, _rename.argtypes = c_int, (py_object, c_char_p)
_FRESH, _USED = b"dltensor", b"used_dltensor"                # the capsule keeps the pointer to its name

_exported: dict[int, Any] = {}
"""What has been given away and not been given back: address of the structure -> all that it needs to stay alive."""


def _forget(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _forget_capsule(capsule: int) -> None:
    """A capsule that nobody consumed takes its tensor along."""
    if _is_valid_at(capsule, _FRESH):
        _exported.pop(_pointer_at(capsule, _FRESH), None)


_delete, _destroy_capsule = _Deleter(_forget), CFUNCTYPE(None, c_void_p)(_forget_capsule)


def export(array: DeviceArray, stream: int | None = None) -> Any:
    """A capsule of `array`, whose memory it keeps alive. `stream` is the handle of the consumer's stream, which waits for
    ours; None: the default stream does; -1: nobody does."""
    if stream == 0:
        raise complain(DeviceError, "dlpack", "stream 0 may be the default stream of all threads or of one",
                       fix="Say 1 for the first, 2 for the second")
    ours = streams.current_stream(array.gpu.index)
    if stream != NOBODY and (theirs := _stream_of(stream, array.gpu)) != ours:
        theirs.wait_stream(ours)
    dtype = dtypes.from_numpy(array.dtype)
    code = _BFLOAT16 if dtype is dtypes.bfloat16 else _CODES[dtype.category]
    shape = (c_int64 * array.ndim)(*array.shape)
    strides = (c_int64 * array.ndim)(*[s // array.itemsize for s in array.strides])
    tensor = _Tensor(array.address, CUDA, array.gpu.index, array.ndim, code, 8 * array.itemsize, 1, shape, strides, 0)
    managed = _Managed(tensor, None, _delete)
    _exported[ctypes.addressof(managed)] = managed, shape, strides, array
    return _new_capsule(ctypes.addressof(managed), _FRESH, ctypes.cast(_destroy_capsule, c_void_p))


def _stream_of(number: int | None, gpu: Gpu) -> streams.Stream:
    """The stream with that number of the array API's, which the driver's handles are but for the default stream."""
    return streams.Stream(gpu.index, _handle=0 if number in (None, 0, LEGACY) else number)


class _Foreign:
    """Memory of another library, given back when nothing refers to it any more."""

    def __init__(self, managed: Any):
        self._managed = managed

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def pointer_to(capsule: Any) -> Any:
    """To the structure in a capsule that nobody has used."""
    return ctypes.cast(_pointer(capsule, _FRESH), POINTER(_Managed))


def import_capsule(capsule: Any) -> DeviceArray:
    """The array of a capsule in the memory of a GPU."""
    if not _is_valid(capsule, _FRESH):
        raise complain(DeviceError, "from_dlpack", "the capsule has been used already, or is none of DLPack")
    managed = pointer_to(capsule)
    tensor = managed.contents.tensor
    if tensor.device_type != CUDA:
        raise complain(DeviceError, "from_dlpack", f"the array is on a device of DLPack's type {tensor.device_type}, which "
                       "is no GPU of CUDA")
    dtype, gpu = _dtype_of(tensor), driver.gpu(tensor.device_id)        # behind errors the capsule is still the producer's
    shape = tuple(tensor.shape[:tensor.ndim])
    elements = tuple(tensor.strides[:tensor.ndim]) if tensor.strides else contiguous_strides(shape)
    _rename(capsule, _USED)
    return DeviceArray(_Foreign(managed), gpu, (tensor.data or 0) + tensor.byte_offset, shape,
                       tuple([s * dtype.itemsize for s in elements]), dtype)


def _dtype_of(tensor: _Tensor) -> np.dtype[Any]:
    if tensor.code == _BFLOAT16 and tensor.bits == 16 and tensor.lanes == 1:
        return dtypes.bfloat16.numpy
    for category, code in _CODES.items():
        if code == tensor.code and tensor.lanes == 1:
            found = np.dtype(bool) if category == "b" else np.dtype(f"{category}{tensor.bits // 8}")
            return dtypes.from_numpy(found).numpy
    raise complain(DTypeError, "from_dlpack", f"no dtype for DLPack's type {tensor.code} with {tensor.bits} bits and "
                   f"{tensor.lanes} lanes")


def from_interface(source: Any) -> DeviceArray:
    """The array of an object with ``__cuda_array_interface__`` (version 3), which is kept alive. It is on the GPU that has
    its memory, whose current stream waits for the stream that the object names."""
    described = source.__cuda_array_interface__
    if described.get("mask") is not None:
        raise complain(DTypeError, "as_tensor", f"a {type(source).__name__} with a mask has values that are none",
                       fix="Fill them in first")
    dtype = dtypes.from_numpy(np.dtype(described["typestr"])).numpy
    shape, address = tuple(described["shape"]), described["data"][0]
    strides = described.get("strides") or tuple([s * dtype.itemsize for s in contiguous_strides(shape)])
    gpu, stream = _gpu_of(address), described.get("stream")
    if stream is not None and (theirs := _stream_of(stream, gpu)) != (ours := streams.current_stream(gpu.index)):
        ours.wait_stream(theirs)
    return DeviceArray(source, gpu, address, shape, tuple(strides), dtype)


def _gpu_of(address: int) -> Gpu:
    """The GPU that has the memory at an address; an empty array has none and is on the current one."""
    gpu, found = driver.gpu(), c_int()
    if not address:
        return gpu
    if gpu.driver.status("cuPointerGetAttribute", ctypes.addressof(found), _MEMORY_OF, address):
        raise complain(DeviceError, "as_tensor", f"at {address:#x} is no memory of a GPU")
    return driver.gpu(found.value)
