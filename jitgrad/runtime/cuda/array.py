"""`DeviceArray`: what a Tensor on a GPU holds, as one on the CPU holds a NumPy array; and the copies from, to and between.

It knows shape, dtype, byte strides and address, and makes views of itself as NumPy does. Values are reached by copying
only. All copies go to the current stream of the GPU; those that Python waits for say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jitgrad import devices
from jitgrad.errors import DeviceError, complain
from jitgrad.runtime.cuda import driver, memory, pinned, streams
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.streams import Stream
from jitgrad.shapes import contiguous_strides, is_contiguous, reshape_strides

Shape = tuple[int, ...]


class Flags(NamedTuple):
    """What NumPy calls the flags of an array."""

    c_contiguous: bool
    owndata: bool
    writeable: bool


class DeviceArray:
    """An array in the memory of `gpu`, which `owner` keeps alive. `strides` are bytes, as NumPy's."""

    __slots__ = ("__weakref__", "address", "dtype", "gpu", "is_view", "owner", "shape", "strides")

    def __init__(self, owner: Any, gpu: Gpu, address: int, shape: Shape, strides: Shape, dtype: np.dtype[Any],
                 is_view: bool = False):
        self.owner, self.gpu, self.address, self.is_view = owner, gpu, address, is_view
        self.shape, self.strides, self.dtype = shape, strides, dtype

    @property
    def device(self) -> devices.device:
        """Where it is."""
        return self.gpu.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def flags(self) -> Flags:
        expanded = any(stride == 0 and n > 1 for stride, n in zip(self.strides, self.shape, strict=True))
        return Flags(self._is_contiguous(), not self.is_view, not expanded)

    def _elements(self) -> Shape:
        return tuple([stride // self.itemsize for stride in self.strides])

    def _is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self._elements())

    # --- views -----------------------------------------------------------------------------------------------------

    def _view(self, shape: Shape, strides: Shape, offset: int = 0) -> DeviceArray:
        return DeviceArray(self.owner, self.gpu, self.address + offset, shape, strides, self.dtype, True)

    def reshape(self, shape: Shape) -> DeviceArray:
        """The same elements in row-major order at another shape; a copy where strides allow no view."""
        strides = reshape_strides(self.shape, self._elements(), tuple(shape))
        if strides is None:
            return self.copy().reshape(shape)
        return self._view(tuple(shape), tuple([stride * self.itemsize for stride in strides]))

    def transpose(self, axes: Shape) -> DeviceArray:
        """Dimensions reordered."""
        return self._view(tuple([self.shape[a] for a in axes]), tuple([self.strides[a] for a in axes]))

    def __getitem__(self, slices: tuple[slice, ...]) -> DeviceArray:
        """One slice per dimension."""
        shape, strides, offset = [], [], 0
        for part, size, stride in zip(slices, self.shape, self.strides, strict=True):
            places = range(size)[part]
            shape.append(len(places))
            strides.append(stride * places.step)
            offset += stride * places.start if len(places) else 0
        return self._view(tuple(shape), tuple(strides), offset)

    def __array_function__(self, function: Any, _: Any, args: Any, options: Any) -> Any:
        """NumPy's way to ask another kind of array: of its functions `broadcast_to` is one that makes a view."""
        if function is not np.broadcast_to:
            return NotImplemented
        (array, shape) = args
        strides = tuple([0 if have == 1 != want else stride
                         for have, want, stride in zip(array.shape, shape, array.strides, strict=True)])
        return array._view(tuple(shape), strides)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise complain(DeviceError, "numpy", f"an array on {self.device} cannot be read by NumPy", fix="Use x.cpu() first")

    # --- copies ----------------------------------------------------------------------------------------------------

    def copy(self, keep_order: bool = False) -> DeviceArray:
        """A copy in row-major order, or with the order of dimensions in memory that this one has."""
        if keep_order and 0 not in self.strides:
            order = tuple(sorted(range(self.ndim), key=lambda k: -abs(self.strides[k])))
            dense = self.transpose(order).copy()
            back = tuple([order.index(k) for k in range(self.ndim)])
            return DeviceArray(dense.owner, self.gpu, dense.address, self.shape, tuple([dense.strides[k] for k in back]),
                               self.dtype)
        fresh = empty(self.shape, self.dtype, self.gpu)
        copy_into(fresh, self)
        return fresh

    def item(self) -> Any:
        """The value of an array of one element as a Python number; Python waits for it."""
        return to_host(self).item()

    def record_stream(self, stream: Stream) -> None:
        """`stream` uses its memory, too."""
        if isinstance(self.owner, memory.Memory):
            self.owner.record_stream(stream)


Array = Any                                       # np.ndarray or DeviceArray

_gather: Callable[[DeviceArray, DeviceArray], bool] | None = None


def install_gather(gather: Callable[[DeviceArray, DeviceArray], bool] | None) -> None:
    """Say who copies an array whose elements lie in another order into a contiguous one; who cannot, answers False. Without
    it such an array is copied by way of the host."""
    global _gather
    _gather = gather


def empty(shape: Shape, dtype: np.dtype[Any], gpu: Gpu) -> DeviceArray:
    """Memory of that shape on `gpu` for the current stream, whose contents are whatever they are."""
    dtype = np.dtype(dtype)
    stream = streams.current_stream(gpu.index)
    count = int(np.prod(shape, dtype=np.int64))
    lent = memory.allocate(count * dtype.itemsize, stream)
    strides = tuple([stride * dtype.itemsize for stride in contiguous_strides(tuple(shape))])
    return DeviceArray(lent, gpu, lent.address, tuple(shape), strides, dtype)


def moved(array: Array, device: devices.device, non_blocking: bool = False) -> Array:
    """A copy of `array` on `device`, which must be exact."""
    if device.type == "cpu":
        return to_host(array, non_blocking) if type(array) is DeviceArray else array.copy()
    target = empty(array.shape, array.dtype, driver.gpu(device.index))
    copy_into(target, array, non_blocking)
    return target


def copy_into(target: Array, source: Array, non_blocking: bool = False) -> None:
    """Overwrite `target` with `source`, of one shape and dtype; one of them is a DeviceArray. Python waits when host
    memory is read or written, unless it is pinned and `non_blocking`."""
    if not target.size:
        return
    if type(target) is not DeviceArray:
        np.copyto(target, to_host(source))
    elif not target._is_contiguous():
        _update(target, source)
    elif type(source) is not DeviceArray:
        _upload(target, source, non_blocking)
    elif source.gpu is not target.gpu:
        _copy_between(target, source)
    elif source._is_contiguous() and not _overlap(target, source):
        stream = streams.current_stream(target.gpu.index)
        target.gpu.driver.call("cuMemcpyDtoDAsync_v2", target.address, source.address, source.nbytes, stream.handle)
    elif _overlap_spans(target, source) or _gather is None or not _gather(target, source):
        _upload(target, to_host(source), False)


def _overlap_spans(one: DeviceArray, other: DeviceArray) -> bool:
    """`_overlap` for an `other` with gaps."""
    low, nbytes = span(other)
    return one.address < other.address + low + nbytes and other.address + low < one.address + one.nbytes


def _overlap(one: DeviceArray, other: DeviceArray) -> bool:
    """Whether two contiguous arrays share bytes, which the driver does not copy in any order that one could rely on."""
    return one.address < other.address + other.nbytes and other.address < one.address + one.nbytes


def to_host(array: DeviceArray, non_blocking: bool = False) -> np.ndarray:
    """The values as a NumPy array with the same order of dimensions in memory. With `non_blocking` into pinned memory,
    without waiting: the values are there after the stream is synchronized."""
    if not array.size:
        return np.empty(array.shape, array.dtype)
    low, nbytes = span(array)
    buffer = pinned.allocate(nbytes) if non_blocking else None              # which may make another GPU current
    stream = streams.current_stream(array.gpu.index)
    if buffer is not None:
        buffer.record_stream(stream)
    raw = np.empty(nbytes, np.uint8) if buffer is None else np.asarray(buffer)
    array.gpu.driver.call("cuMemcpyDtoHAsync_v2", raw.ctypes.data, array.address + low, nbytes, stream.handle)
    if not non_blocking:
        stream.synchronize()
    return np.ndarray(array.shape, array.dtype, raw, -low, array.strides)


def fill(target: DeviceArray, element: bytes) -> bool:
    """Set every element of a contiguous array to these bytes, if the driver can; whether it could."""
    for width, function in ((1, "cuMemsetD8Async"), (2, "cuMemsetD16Async"), (4, "cuMemsetD32Async")):
        part = element[:width]
        if len(element) % width == 0 and part * (len(element) // width) == element:
            stream = streams.current_stream(target.gpu.index)
            value = int.from_bytes(part, "little")
            target.gpu.driver.call(function, target.address, value, target.nbytes // width, stream.handle)
            return True
    return False


def upload(target: DeviceArray, source: np.ndarray) -> None:
    """From the host into a contiguous array, without waiting: by way of pinned memory, so that `source` may change at
    once."""
    if source.size:
        staging = pinned.allocate(source.nbytes).array(source.shape, source.dtype)
        np.copyto(staging, source)
        _upload(target, staging, True)


def _upload(target: DeviceArray, source: np.ndarray, non_blocking: bool) -> None:
    """From the host into a contiguous array."""
    if not any(source.strides) and source.size > 1 and _upload_one(target, source.reshape(-1)[:1]):
        return
    whole = source if source.flags.c_contiguous else np.ascontiguousarray(source)
    stream = streams.current_stream(target.gpu.index)
    buffer = pinned.owner(whole)
    target.gpu.driver.call("cuMemcpyHtoDAsync_v2", target.address, whole.ctypes.data, whole.nbytes, stream.handle)
    if buffer is not None:
        buffer.record_stream(stream)
    if buffer is None or not non_blocking:
        stream.synchronize()


def _upload_one(target: DeviceArray, element: np.ndarray) -> bool:
    """Set every element to the one of `element`: by the driver, or by a kernel that expands it; False where neither can."""
    if fill(target, element.tobytes()):
        return True
    if _gather is None or target.dtype.kind == "c":          # there are no kernels of complex numbers
        return False
    one = empty((1,), target.dtype, target.gpu)
    _upload(one, element, False)
    expanded = DeviceArray(one.owner, one.gpu, one.address, target.shape, (0,) * target.ndim, target.dtype, True)
    return _gather(target, expanded)


def _update(target: DeviceArray, source: Array) -> None:
    """Into an array with gaps: what lies around it is read and written back unchanged."""
    low, nbytes = span(target)
    values = to_host(source) if type(source) is DeviceArray else source
    around = DeviceArray(target.owner, target.gpu, target.address + low, (nbytes,), (1,), np.dtype(np.uint8), True)
    raw = to_host(around)
    np.copyto(np.ndarray(target.shape, target.dtype, raw, -low, target.strides), values)
    _upload(around, raw, False)


def _copy_between(target: DeviceArray, source: DeviceArray) -> None:
    """From one GPU to another, in the source's stream; the target's stream waits for it."""
    whole = source if source._is_contiguous() else source.copy()
    here, there = (streams.current_stream(a.gpu.index) for a in (source, target))
    here.wait_stream(there)
    whole.record_stream(here)
    whole.gpu.activate().driver.call("cuMemcpyPeerAsync", target.address, target.gpu.context, whole.address,
                                     whole.gpu.context, whole.nbytes, here.handle)
    there.wait_stream(here)


def span(array: DeviceArray) -> tuple[int, int]:
    """Where the array's lowest byte is, seen from its first element, and how many bytes there are to its highest."""
    ends = [stride * (n - 1) for stride, n in zip(array.strides, array.shape, strict=True)]
    low, high = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
    return low, high - low + array.itemsize
