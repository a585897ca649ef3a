"""cuDNN, NVIDIA's library of convolutions, by ctypes: the backend API of its version 9.

    planned = cudnn.accepts(gpu, convolved)                     # loads the library at its first question
    call = ConvolutionCall(planned, slots, gpu)                 # an entry of a `LaunchPlan`

How it is found is said in `libraries`; beside NVIDIA's packages, PyTorch and CuPy may have brought it. A `Convolved`
(`jitgrad.products`) becomes a graph of one operation. The library's heuristics rank the ways to compute it; the first one
is taken that can be built, needs no more memory than is allowed, and computes what we promise: the same bits in every run,
sums in float32, and float32 as float32 unless TF32 is allowed. The plan that comes out is made once per GPU and question.
The workspace is the caller's, so a call may be captured into a CUDA graph.

Everything in this API is a descriptor: it is created, gets attributes, and is finalized. Numbers of descriptors, attributes
and types are those of its header, cudnn_graph.h.
"""

from __future__ import annotations

import ctypes as c
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_int, c_int64, c_void_p
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice
from math import prod
from pathlib import Path
from typing import Any

from jitgrad.products import KINDS, SLACK, Convolved
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import Slot
from jitgrad.runtime.cuda.libraries import Connection, Library, LibraryError, declared
from jitgrad.runtime.cuda.streams import Stream

ALIGNMENT = 16                                  # of the address of every operand, in bytes
WORKSPACE = 1 << 30                             # bytes of memory that a convolution may need beside its operands: in our
                                                # layout they are often copied
SHARE = 16                                      # and it may need the GPU's memory divided by this
TRIED = 16                                      # ways that are built, at most, until one is found

NOT_SUPPORTED = 3000                                                           # cudnnStatus_t
TYPES = {"f32": 0, "f16": 2, "bf16": 9}                                        # cudnnDataType_t
CROSS_CORRELATION = 1                                                          # cudnnConvolutionMode_t
BEST_FIRST, FALLBACK = 3, 2                                                    # cudnnBackendHeurMode_t: A, FALLBACK
ON_TENSOR_CORES, SHORTER_INPUTS, SHORTER_SUMS, NOT_THE_SAME = 0, 1, 2, 4       # cudnnBackendNumericalNote_t
NOTES = 64                                                                     # there are fewer of them

# cudnnBackendDescriptorType_t
CONVOLUTION, ENGINE, CONFIGURATION, HEURISTICS, PLAN = 1, 2, 3, 4, 5
OPERATIONS = dict(zip(KINDS, (10, 12, 11), strict=True))
GRAPH, OPERANDS, TENSOR = 15, 16, 17

# cudnnBackendAttributeType_t, each with the C type of an element
HANDLE, DATA_TYPE, INT64, FLOAT, POINTER_TYPE, MODE, HEURISTIC_MODE, NOTE, DESCRIPTOR = 0, 1, 3, 4, 6, 7, 8, 11, 15
ELEMENTS: dict[int, Any] = {HANDLE: c_void_p, DATA_TYPE: c_int, INT64: c_int64, FLOAT: c.c_float, POINTER_TYPE: c_void_p,
                            MODE: c_int, HEURISTIC_MODE: c_int, NOTE: c_int, DESCRIPTOR: c_void_p}

# cudnnBackendAttributeName_t
_COMPUTED_IN, _MODE, _DILATIONS, _STRIDES, _HIGH, _LOW, _AXES = range(100, 107)                  # of a convolution
_HEURISTIC_MODE, _ASKED_GRAPH, _RESULTS = 200, 201, 202                                          # of heuristics
_ENGINE, _NOTES = 300, 1303                                     # of a configuration, and of the engine that it is one of
_PLAN_HANDLE, _CONFIGURATION, _WORKSPACE = 400, 401, 402                                         # of a plan
_GRAPH_HANDLE, _GRAPH_OPERATIONS = 800, 801                                                      # of a graph
_ALIGNMENT, _TYPE, _SHAPE, _PITCHES, _NUMBER = 900, 901, 902, 903, 906                           # of a tensor
_NUMBERS, _ADDRESSES, _MEMORY = 1000, 1001, 1003                                                 # of a set of operands
_OPERATION = {                          # of an operation: alpha, beta, the convolution, image, weights, result
    KINDS[0]: (700, 701, 702, 704, 703, 705), KINDS[1]: (706, 707, 708, 710, 709, 711),
    KINDS[2]: (712, 713, 714, 716, 715, 717)}
_IMAGE, _WEIGHTS, _RESULT = 1, 2, 3     # how we number tensors
_CALLED_WITH = {KINDS[0]: (_IMAGE, _WEIGHTS, _RESULT), KINDS[1]: (_RESULT, _WEIGHTS, _IMAGE),
                KINDS[2]: (_IMAGE, _RESULT, _WEIGHTS)}

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

FIX = "Set JITGRAD_CUDNN=never, then convolutions run without this library"


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


connection = Connection(Cudnn, "convolutions")
library, identity, connect = connection.library, connection.identity, connection.connect


def disconnect() -> None:
    """Forget the library and its plans; the next use looks for it again."""
    connection.disconnect()
    _plan_of.cache_clear()


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


# ---- the question ------------------------------------------------------------------------------------------------------


def spread(sizes: Sequence[int], filler: int) -> list[int]:
    """Sizes of two axes at least: the library knows no images of one."""
    return [filler] * (2 - len(sizes)) + list(sizes)


def describe_tensor(library: Cudnn, number: int, dtype: str, shape: Sequence[int]) -> Descriptor:
    """A dense array of images, weights or results."""
    sizes = [*shape[:2], *spread(shape[2:], 1)]
    made = Descriptor(library, TENSOR)
    made.set(_NUMBER, INT64, number)
    made.set(_TYPE, DATA_TYPE, TYPES[dtype])
    made.set(_ALIGNMENT, INT64, ALIGNMENT)
    made.set(_SHAPE, INT64, *sizes)
    made.set(_PITCHES, INT64, *[prod(sizes[k + 1:]) for k in range(len(sizes))])
    return made.finalize()


def describe_geometry(library: Cudnn, asked: Convolved) -> Descriptor:
    """Strides, padding and dilation. Groups follow from the channels of images and weights."""
    made = Descriptor(library, CONVOLUTION)
    made.set(_AXES, INT64, max(2, len(asked.stride)))
    made.set(_COMPUTED_IN, DATA_TYPE, TYPES["f32"])
    made.set(_MODE, MODE, CROSS_CORRELATION)
    for attribute, sizes, filler in ((_DILATIONS, asked.dilation, 1), (_STRIDES, asked.stride, 1), (_LOW, asked.low, 0),
                                     (_HIGH, asked.high, 0)):
        made.set(attribute, INT64, *spread(sizes, filler))
    return made.finalize()


def describe_operation(library: Cudnn, asked: Convolved) -> Descriptor:
    """The convolution or its gradient, as an operation on three tensors. It may be finalized without a GPU."""
    made = Descriptor(library, OPERATIONS[asked.kind])
    alpha, beta, geometry, *tensors = _OPERATION[asked.kind]
    made.set(alpha, FLOAT, 1.0)
    made.set(beta, FLOAT, 0.0)
    parts = [describe_geometry(library, asked)]
    parts += [describe_tensor(library, number, asked.dtype, shape) for number, shape in
              ((_IMAGE, asked.image), (_WEIGHTS, asked.weights), (_RESULT, asked.result))]
    for attribute, part in zip((geometry, *tensors), parts, strict=True):
        made.set(attribute, DESCRIPTOR, part)
    return made.finalize()


# ---- the answer --------------------------------------------------------------------------------------------------------


class Plan:
    """A way to compute a `Convolved`, ready to run on a GPU; LibraryError where there is none that we allow."""

    def __init__(self, library: Cudnn, gpu: Gpu, asked: Convolved):
        self.library, self.asked, self.handle = library, asked, library.handle(gpu)
        self.workspace, self.limit = 0, min(WORKSPACE, gpu.total_memory // SHARE)
        with library.lock:
            self.graph = Descriptor(library, GRAPH)
            self.graph.set(_GRAPH_HANDLE, HANDLE, self.handle)
            self.graph.set(_GRAPH_OPERATIONS, DESCRIPTOR, describe_operation(library, asked))
            self.graph.finalize()
            self.built = self._build()

    def _build(self) -> Descriptor:
        """The first plan that can be built and fits, from what is allowed."""
        problem = self.library.error(NOT_SUPPORTED, "cudnnBackendFinalize")
        ranked = chain.from_iterable(map(self._ranked, (BEST_FIRST, FALLBACK)))
        allowed = (configuration for configuration in ranked if not self._notes(configuration) & self._refused)
        for configuration in islice(allowed, TRIED):
            try:
                made = Descriptor(self.library, PLAN)
                made.set(_PLAN_HANDLE, HANDLE, self.handle)
                made.set(_CONFIGURATION, DESCRIPTOR, configuration)
                made.finalize()
            except LibraryError as error:
                problem = error
                continue
            (self.workspace,) = made.get(_WORKSPACE, INT64, [0])
            if self.workspace <= self.limit:
                return made
        raise problem

    @property
    def _refused(self) -> set[int]:
        exact = self.asked.dtype == "f32" and not self.asked.tf32
        return {SHORTER_SUMS, NOT_THE_SAME, *[SHORTER_INPUTS] * (self.asked.dtype == "f32"), *[ON_TENSOR_CORES] * exact}

    def _ranked(self, mode: int) -> Iterator[Descriptor]:
        """The ways to compute it, the fastest first, as far as the library knows; none if it has no answer."""
        asked = Descriptor(self.library, HEURISTICS)
        try:
            asked.set(_ASKED_GRAPH, DESCRIPTOR, self.graph)
            asked.set(_HEURISTIC_MODE, HEURISTIC_MODE, mode)
            asked.finalize()
            empty = [Descriptor(self.library, CONFIGURATION) for _ in asked.get(_RESULTS, DESCRIPTOR, [])]
            handles = [one.handle for one in empty]
            filled = asked.get(_RESULTS, DESCRIPTOR, handles) if handles else []
        except LibraryError:
            return
        by_handle = dict(zip(handles, empty, strict=True))
        yield from [by_handle[handle] for handle in filled]

    def _notes(self, configuration: Descriptor) -> set[int]:
        """What its engine says about the numbers that it gives."""
        engine = Descriptor(self.library, ENGINE)
        configuration.get(_ENGINE, DESCRIPTOR, [engine.handle])
        return set(engine.get(_NOTES, NOTE, [0] * NOTES))


_plan_of = lru_cache(maxsize=1024)(Plan)
"""The plan for a question; building one can take a second, where a kernel is compiled."""


def accepts(gpu: Gpu, asked: Convolved) -> Convolved | None:
    """`asked` with the memory that the library needs for it; None where it is not there, cannot be used on `gpu` (which is
    said once), or has no way that we allow."""
    found = connection.usable(gpu)
    if found is None:
        return None
    try:
        return replace(asked, workspace=_plan_of(found, gpu, asked).workspace)
    except LibraryError:
        return None


class ConvolutionCall:
    """An entry of a `LaunchPlan`: `asked` on `slots`, those of both operands, the result and the workspace. `where`: the
    user's line, for errors."""

    def __init__(self, asked: Convolved, slots: Sequence[Slot], gpu: Gpu, where: tuple[str, int] | None = None):
        found = connection.needed("Set JITGRAD_CUDNN=never, or install nvidia-cudnn again", where)
        try:
            self.plan = _plan_of(found, gpu, replace(asked, workspace=0))
            if self.plan.workspace > asked.workspace:
                raise found.error(NOT_SUPPORTED, "cudnnBackendFinalize")
        except LibraryError as error:
            raise found.error(error.code, "building a plan", FIX, where) from None
        self.library, self.slots, self.where = found, tuple(slots), where
        self.operands: Descriptor | None = None

    def bind(self, addresses: Sequence[int]) -> None:
        """Take the addresses of the slots."""
        *tensors, workspace = [addresses[slot.index] + slot.offset for slot in self.slots]
        self.operands = Descriptor(self.library, OPERANDS)
        self.operands.set(_NUMBERS, INT64, *_CALLED_WITH[self.plan.asked.kind])
        self.operands.set(_ADDRESSES, POINTER_TYPE, *tensors)
        self.operands.set(_MEMORY, POINTER_TYPE, -(-workspace // SLACK) * SLACK)
        self.operands.finalize()

    def enqueue(self, stream: Stream) -> None:
        """Put it into `stream`."""
        assert self.operands is not None
        with self.library.lock:
            self.library.call("cudnnSetStream", self.plan.handle, stream.handle, fix=FIX, where=self.where)
            self.library.call("cudnnBackendExecute", self.plan.handle, self.plan.built.handle, self.operands.handle,
                              fix=FIX, where=self.where)
