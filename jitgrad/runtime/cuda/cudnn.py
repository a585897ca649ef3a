"""What cuDNN computes: convolutions and attention, each by a plan of the library's that is made once.

    planned = cudnn.accepts(gpu, convolved)                     # None where it does not
    call = CudnnCall(planned, slots, gpu)                       # an entry of a `LaunchPlan`

A `Convolved` (`jitgrad.products`) becomes a graph of one operation, an `Attended` one of many (`cudnn_attention`). The
library's heuristics rank the ways to compute it; the first one is taken that can be built, needs no more memory than is
allowed, and computes what we promise: the same bits in every run, sums in float32, and float32 as float32 unless TF32 is
allowed. The plan that comes out is made once per GPU and question. The workspace is the caller's, so a call may be captured
into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import addressof
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar

from jitgrad.products import KINDS, SLACK, Attended, Convolved
from jitgrad.runtime.cuda import cudnn_attention
from jitgrad.runtime.cuda.cudnn_descriptors import (
    DATA_TYPE,
    DESCRIPTOR,
    FLOAT,
    HANDLE,
    HEURISTIC_MODE,
    INT64,
    MODE,
    NOTE,
    POINTER_TYPE,
    TYPES,
    Cudnn,
    Descriptor,
    Drawn,
    connection,
    describe_tensor,
)
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import Slot
from jitgrad.runtime.cuda.libraries import LibraryError
from jitgrad.runtime.cuda.streams import Stream

WORKSPACE = 1 << 30                             # bytes of memory that a call may need beside its operands: images in our
                                                # layout are often copied, gradients of scores kept for equal bits
SHARE = 16                                      # and it may need the GPU's memory divided by this
TRIED = 16                                      # ways that are built, at most, until one is found

NOT_SUPPORTED = 3000                                                           # cudnnStatus_t
CROSS_CORRELATION = 1                                                          # cudnnConvolutionMode_t
BEST_FIRST, FALLBACK = 3, 2                                                    # cudnnBackendHeurMode_t: A, FALLBACK
ON_TENSOR_CORES, SHORTER_INPUTS, SHORTER_SUMS, NOT_THE_SAME = 0, 1, 2, 4       # cudnnBackendNumericalNote_t
NOTES = 64                                                                     # there are fewer of them

# cudnnBackendDescriptorType_t
CONVOLUTION, ENGINE, CONFIGURATION, HEURISTICS, PLAN = 1, 2, 3, 4, 5
OPERATIONS = dict(zip(KINDS, (10, 12, 11), strict=True))
GRAPH, OPERANDS = 15, 16

# cudnnBackendAttributeName_t
_COMPUTED_IN, _MODE, _DILATIONS, _STRIDES, _HIGH, _LOW, _AXES = range(100, 107)                  # of a convolution
_HEURISTIC_MODE, _ASKED_GRAPH, _RESULTS = 200, 201, 202                                          # of heuristics
_ENGINE, _NOTES = 300, 1303                                     # of a configuration, and of the engine that it is one of
_HANDLE_OF = {GRAPH: 800, PLAN: 400}
_CONFIGURATION, _WORKSPACE = 401, 402                                                            # of a plan
_GRAPH_OPERATIONS = 801                                                                          # of a graph
_NUMBERS, _ADDRESSES, _MEMORY = 1000, 1001, 1003                                                 # of a set of operands
_OPERATION = {                          # of an operation: alpha, beta, the convolution, image, weights, result
    KINDS[0]: (700, 701, 702, 704, 703, 705), KINDS[1]: (706, 707, 708, 710, 709, 711),
    KINDS[2]: (712, 713, 714, 716, 715, 717)}
_IMAGE, _WEIGHTS, _RESULT = 1, 2, 3     # how we number tensors
_CALLED_WITH = {KINDS[0]: (_IMAGE, _WEIGHTS, _RESULT), KINDS[1]: (_RESULT, _WEIGHTS, _IMAGE),
                KINDS[2]: (_IMAGE, _RESULT, _WEIGHTS)}

FIX = "Set JITGRAD_CUDNN=never, then convolutions and attention run without this library"
library, identity, connect = connection.library, connection.identity, connection.connect
Asked = TypeVar("Asked", Convolved, Attended)


def disconnect() -> None:
    """Forget the library and its plans; the next use looks for it again."""
    connection.disconnect()
    _plan_of.cache_clear()


# ---- the question ------------------------------------------------------------------------------------------------------


def spread(sizes: Sequence[int], filler: int) -> list[int]:
    """Sizes of two axes at least: the library knows no images of one."""
    return [filler] * (2 - len(sizes)) + list(sizes)


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
    parts += [describe_tensor(library, number, asked.dtype, [*shape[:2], *spread(shape[2:], 1)]) for number, shape in
              ((_IMAGE, asked.image), (_WEIGHTS, asked.weights), (_RESULT, asked.result))]
    for attribute, part in zip((geometry, *tensors), parts, strict=True):
        made.set(attribute, DESCRIPTOR, part)
    return made.finalize()


# ---- the answer --------------------------------------------------------------------------------------------------------


def draw(library: Cudnn, asked: Convolved | Attended) -> Drawn:
    """A question as the library is asked it."""
    if isinstance(asked, Attended):
        return cudnn_attention.draw(library, asked)
    return Drawn([describe_operation(library, asked)], _CALLED_WITH[asked.kind], (0, 0, 0))


class Plan:
    """A way to compute what is asked for, ready to run on a GPU; LibraryError where there is none that we allow.
    `workspace`: the bytes of memory that it needs; tensors in between begin at `places` of it, by number."""

    def __init__(self, library: Cudnn, gpu: Gpu, asked: Convolved | Attended):
        self.library, self.asked, self.handle = library, asked, library.handle(gpu)
        self.workspace, self.limit = 0, min(WORKSPACE, gpu.total_memory // SHARE)
        self.places: dict[int, int] = {}
        with library.lock:
            self.drawn = draw(library, asked)
            self.graph = Descriptor(library, GRAPH)
            self._aim(self.graph, GRAPH)
            self.graph.set(_GRAPH_OPERATIONS, DESCRIPTOR, *self.drawn.operations)
            self.graph.finalize()
            self.built = self._build()

    def _aim(self, made: Descriptor, kind: int) -> None:
        """Say which GPU it is for."""
        if kind in _HANDLE_OF:
            made.set(_HANDLE_OF[kind], HANDLE, self.handle)

    def _build(self) -> Descriptor:
        """The first plan that can be built and fits, from what is allowed."""
        problem = self.library.error(NOT_SUPPORTED, "cudnnBackendFinalize")
        ranked = chain.from_iterable(map(self._ranked, (BEST_FIRST, FALLBACK)))
        allowed = (configuration for configuration in ranked if not self._notes(configuration) & self._refused)
        for configuration in islice(allowed, TRIED):
            try:
                made = Descriptor(self.library, PLAN)
                self._aim(made, PLAN)
                made.set(_CONFIGURATION, DESCRIPTOR, configuration)
                made.finalize()
            except LibraryError as error:
                problem = error
                continue
            self._place(made.get(_WORKSPACE, INT64, [0])[0])
            if self.workspace <= self.limit:
                return made
        raise problem

    def _place(self, nbytes: int) -> None:
        """Tensors in between lie behind the memory that is the library's alone."""
        self.workspace = nbytes
        for number, size in self.drawn.beside.items():
            self.places[number] = -(-self.workspace // SLACK) * SLACK
            self.workspace = self.places[number] + size

    @property
    def _refused(self) -> set[int]:
        exact = isinstance(self.asked, Convolved) and self.asked.dtype == "f32" and not self.asked.tf32
        return {SHORTER_SUMS, NOT_THE_SAME, *[SHORTER_INPUTS] * (self.asked.dtype == "f32"), *[ON_TENSOR_CORES] * exact}

    def _ranked(self, mode: int) -> Iterator[Descriptor]:
        """The ways to compute it, the fastest first, as far as the library knows; none if it has no answer."""
        asked = Descriptor(self.library, HEURISTICS)
        try:
            asked.set(_ASKED_GRAPH, DESCRIPTOR, self.graph)
            asked.set(_HEURISTIC_MODE, HEURISTIC_MODE, mode)
            self._aim(asked, HEURISTICS)
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


def accepts(gpu: Gpu, asked: Asked) -> Asked | None:
    """`asked` with the memory that the library needs for it; None where it is not there, cannot be used on `gpu` (which is
    said once), or has no way that we allow."""
    found = connection.usable(gpu)
    if found is None or (isinstance(asked, Attended) and not cudnn_attention.is_known(found, gpu, asked)):
        return None
    try:
        return replace(asked, workspace=_plan_of(found, gpu, asked).workspace)
    except LibraryError:
        return None


class CudnnCall:
    """An entry of a `LaunchPlan`: `asked` on `slots`, those of the operands, the results and the workspace. `where`: the
    user's line, for errors."""

    def __init__(self, asked: Convolved | Attended, slots: Sequence[Slot], gpu: Gpu, where: tuple[str, int] | None = None):
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
        drawn, memory = self.plan.drawn, -(-workspace // SLACK) * SLACK
        self.operands.set(_NUMBERS, INT64, *drawn.numbers, *drawn.beside, *drawn.values)
        tensors = [address + begin for address, begin in zip(tensors, drawn.begins, strict=True)]
        self.operands.set(_ADDRESSES, POINTER_TYPE, *tensors, *[memory + self.plan.places[k] for k in drawn.beside],
                          *map(addressof, drawn.values.values()))
        self.operands.set(_MEMORY, POINTER_TYPE, memory)
        self.operands.finalize()

    def enqueue(self, stream: Stream) -> None:
        """Put it into `stream`."""
        assert self.operands is not None
        with self.library.lock:
            self.library.call("cudnnSetStream", self.plan.handle, stream.handle, fix=FIX, where=self.where)
            self.library.call("cudnnBackendExecute", self.plan.handle, self.plan.built.handle, self.operands.handle,
                              fix=FIX, where=self.where)
