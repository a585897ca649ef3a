"""cuDNN, NVIDIA's library of convolutions and attention, by ctypes: its functions and its descriptors.

    found = connection.library()                                # loads the library at its first question
    tensor = describe_tensor(found, 1, "bf16", (8, 64, 32, 32))

How it is found is said in `libraries`; beside NVIDIA's packages, PyTorch and CuPy may have brought it. Used is the backend
API of its version 9. Everything in it is a descriptor: it is created, gets attributes, and is finalized. Numbers of
descriptors, attributes and types are those of its header, cudnn_graph.h.
"""

from __future__ import annotations

import ctypes as c
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from jitgrad.runtime.cuda.libraries import Connection, Library, declared

ALIGNMENT = 16                                  # of the address of every operand, in bytes
TYPES = {"f32": 0, "f16": 2, "i32": 4, "bf16": 9, "bool": 11}                  # cudnnDataType_t
TENSOR = 17                                                                    # cudnnBackendDescriptorType_t

# cudnnBackendAttributeType_t, each with the C type of an element
HANDLE, DATA_TYPE, BOOLEAN, INT64, FLOAT, POINTER_TYPE, MODE, HEURISTIC_MODE, NOTE = 0, 1, 2, 3, 4, 6, 7, 8, 11
POINTWISE_MODE, DESCRIPTOR, REDUCTION_KIND = 14, 15, 18
ELEMENTS: dict[int, Any] = {HANDLE: c_void_p, DATA_TYPE: c_int, BOOLEAN: c.c_bool, INT64: c_int64, FLOAT: c.c_float,
                            POINTER_TYPE: c_void_p, MODE: c_int, HEURISTIC_MODE: c_int, NOTE: c_int,
                            POINTWISE_MODE: c_int, DESCRIPTOR: c_void_p, REDUCTION_KIND: c_int}

# cudnnBackendAttributeName_t, of a tensor
_ALIGNMENT, _TYPE, _SHAPE, _PITCHES, _NUMBER, _IS_VIRTUAL, _IS_VALUE = 900, 901, 902, 903, 906, 907, 908

_DESCRIPTOR, _OUT = c_void_p, POINTER(c_void_p)
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cudnnCreate": (_OUT,),
    "cudnnSetStream": (c_void_p, c_void_p),
    "cudnnBackendCreateDescriptor": (c_int, _OUT),
    "cudnnBackendDestroyDescriptor": (_DESCRIPTOR,),
    "cudnnBackendSetAttribute": (_DESCRIPTOR, c_int, c_int, c_int64, c_void_p),
    "cudnnBackendGetAttribute": (_DESCRIPTOR, c_int, c_int, c_int64, POINTER(c_int64), c_void_p),
    "cudnnBackendFinalize": (_DESCRIPTOR,),
    "cudnnBackendExecute": (c_void_p, _DESCRIPTOR, _DESCRIPTOR),
}
"""The parameters of every function that is used; all return a status."""


class Cudnn(Library):
    """See the module. `lock`: a handle is used by one thread at a time, and has one stream."""

    title, names, prototypes = "cuDNN", ("libcudnn.so.9", "libcudnn_graph.so.9"), PROTOTYPES
    describing, numbering, creating = "cudnnGetErrorString", "cudnnGetVersion", "cudnnCreate"

    def __init__(self, functions: Any):
        super().__init__(functions)
        self.lock = threading.Lock()
        self._last_error = declared(functions, "cudnnGetLastErrorString", (c.c_char_p, c.c_size_t), None)

    def details(self) -> str:
        text = c.create_string_buffer(1024)
        self._last_error(text, len(text))
        return text.value.decode(errors="replace").strip()

    @classmethod
    def files(cls) -> Iterator[Path]:
        yield from super().files()
        cupy = Path(os.environ.get("CUPY_CUDA_LIB_PATH") or os.path.expanduser("~/.cupy/cuda_lib"))
        for name in cls.names:
            yield from sorted(cupy.glob(f"*/cudnn/*/lib*/{name}"), reverse=True)


connection = Connection(Cudnn, "convolutions and attention")


class Descriptor:
    """One of the library's descriptors, which lives as long as this, and so do its parts."""

    def __init__(self, library: Cudnn, kind: int):
        self.library = library
        handle = c_void_p()
        library.call("cudnnBackendCreateDescriptor", kind, handle)
        assert handle.value is not None
        self.handle = handle.value
        self.parts: list[Descriptor] = []
        weakref.finalize(self, library.release, "cudnnBackendDestroyDescriptor", self.handle).atexit = False

    def set(self, attribute: int, kind: int, *values: Any) -> None:
        """Give it an attribute of the type `kind`."""
        self.parts += [value for value in values if isinstance(value, Descriptor)]
        array = (ELEMENTS[kind] * len(values))(*[getattr(value, "handle", value) for value in values])
        self.library.call("cudnnBackendSetAttribute", self.handle, attribute, kind, len(values), array)

    def get(self, attribute: int, kind: int, values: Sequence[Any]) -> list[Any]:
        """An attribute of the type `kind`: as many elements as there are, up to those of `values`, which are handed in."""
        array, count = (ELEMENTS[kind] * max(1, len(values)))(*values), c_int64()
        self.library.call("cudnnBackendGetAttribute", self.handle, attribute, kind, len(values), count,
                          array if values else None)
        return list(array[:count.value]) if values else [None] * count.value

    def finalize(self) -> Descriptor:
        """Have it checked and closed; returns it."""
        self.library.call("cudnnBackendFinalize", self.handle)
        return self


def dense(sizes: Sequence[int]) -> list[int]:
    """From neighbour to neighbour along each axis, where the last one is that of memory."""
    return [prod(sizes[k + 1:]) for k in range(len(sizes))]


def describe_tensor(library: Cudnn, number: int, dtype: str, sizes: Sequence[int], pitches: Sequence[int] = (), *,
                    virtual: bool = False, value: bool = False) -> Descriptor:
    """An array of any layout, dense unless `pitches` are given. `virtual`: it is nowhere in memory; `value`: it is a number
    in the computer's own memory."""
    made = Descriptor(library, TENSOR)
    made.set(_NUMBER, INT64, number)
    made.set(_TYPE, DATA_TYPE, TYPES[dtype])
    made.set(_ALIGNMENT, INT64, ALIGNMENT)
    made.set(_SHAPE, INT64, *sizes)
    made.set(_PITCHES, INT64, *(pitches or dense(sizes)))
    for attribute, given in ((_IS_VIRTUAL, virtual), (_IS_VALUE, value)):
        if given:
            made.set(attribute, BOOLEAN, True)
    return made.finalize()


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A question as the library is asked it: its operations; the `numbers` of tensors that are operands and results, in the
    order of a call, and in how many bytes of their memory each begins. `beside`: the bytes of memory of tensors in between,
    by number; `values`: numbers that are handed in."""

    operations: Sequence[Descriptor]
    numbers: tuple[int, ...]
    begins: tuple[int, ...]
    beside: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[int, c.c_float] = field(default_factory=dict)
