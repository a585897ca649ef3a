"""cuBLASLt, NVIDIA's library of matrix products, by ctypes.

    if cublaslt.accepts(gpu, product):                          # loads the library at its first question
        call = ProductCall(product, slots, gpu)                 # an entry of a `LaunchPlan`

How it is found is said in `libraries`. A `Product` (`jitgrad.products`) says what is computed; everything that the library
needs beside it, descriptors and the way that its heuristics choose, is made once and kept by the entry. The workspace is
the caller's, so a call may be captured into a CUDA graph.

The library thinks column by column. Our result, row by row, is to it the transposed one, so it computes B' A' = (A B)'.
Numbers of attributes and types are those of its header, cublasLt.h.
"""

from __future__ import annotations

import ctypes as c
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from math import gcd
from typing import Any

from jitgrad.dtypes import BY_SHORT
from jitgrad.products import SLACK, WORKSPACE, Laid, Product
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import Slot
from jitgrad.runtime.cuda.libraries import SUCCESS, Connection, Library, LibraryError
from jitgrad.runtime.cuda.streams import Stream

ALIGNMENT = 16                                  # of the address of every operand, in bytes, unless it begins behind it

TYPES = {"f32": 0, "f64": 1, "f16": 2, "bf16": 14}                             # cudaDataType
_FLOAT, _TF32, _DOUBLE = 68, 77, 70                                            # cublasComputeType_t
_TURN_LEFT, _TURN_RIGHT, _EPILOGUE, _BIAS = 3, 4, 7, 8                         # of a description
_COUNT, _STRIDE = 5, 6                                                         # of a layout
_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)                      # of a preference
_IN_COMPUTE_TYPE = 2                            # parts of a sum are added up in the type that it is computed in
_EPILOGUES = {"": 1, "relu": 2, "gelu": 32}
_ADD_BIAS = 4


class Heuristic(c.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c.c_float),
                ("reserved", c_int * 4)]


_HANDLE, _OUT = c_void_p, POINTER(c_void_p)
_SET = (_HANDLE, c_int, c_void_p, c_size_t)
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_OUT,),
    "cublasLtMatmulDescCreate": (_OUT, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatmulDescDestroy": (_HANDLE,),
    "cublasLtMatrixLayoutCreate": (_OUT, c_int, c_uint64, c_uint64, c.c_int64),
    "cublasLtMatrixLayoutSetAttribute": _SET,
    "cublasLtMatrixLayoutDestroy": (_HANDLE,),
    "cublasLtMatmulPreferenceCreate": (_OUT,),
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulPreferenceDestroy": (_HANDLE,),
    "cublasLtMatmulAlgoGetHeuristic": (*[_HANDLE] * 7, c_int, POINTER(Heuristic), POINTER(c_int)),
    "cublasLtMatmul": (_HANDLE, _HANDLE, c_void_p, c_uint64, _HANDLE, c_uint64, _HANDLE, c_void_p, c_uint64, _HANDLE,
                       c_uint64, _HANDLE, c_void_p, c_uint64, c_size_t, c_void_p),
}
"""The parameters of every function that is used; all return a status."""


class CublasLt(Library):
    """See the module."""

    title, names, prototypes = "cuBLASLt", ("libcublasLt.so.13", "libcublasLt.so.12"), PROTOTYPES
    describing, numbering, creating = "cublasLtGetStatusName", "cublasLtGetVersion", "cublasLtCreate"


connection = Connection(CublasLt, "matrix products")
library, identity, connect, disconnect = (connection.library, connection.identity, connection.connect,
                                          connection.disconnect)


def accepts(gpu: Gpu, product: Product) -> bool:
    """Whether the library is there, can be used on `gpu`, and has a way to compute `product`. It is said once why not when
    the library is there and cannot be used."""
    found = connection.usable(gpu)
    if found is None:
        return False
    try:
        Prepared(found, gpu, product)
    except LibraryError:
        return False
    return True


# ---- a product -------------------------------------------------------------------------------------------------------


class Prepared:
    """A product with its descriptors, and the way to compute it that the library's heuristics put first; LibraryError where
    there is none."""

    def __init__(self, library: Library, gpu: Gpu, product: Product, where: tuple[str, int] | None = None):
        self.library, self.gpu, self.product = library, gpu, product
        self.handle = library.handle(gpu)
        double = product.dtype == "f64"
        compute = _DOUBLE if double else _TF32 if product.tf32 else _FLOAT
        self.description = self._new("cublasLtMatmulDesc", compute, TYPES["f64" if double else "f32"])
        number = c.c_double if double else c.c_float
        self.one, self.zero = number(1), number(0)
        m, n, k = product.m, product.n, product.k
        self.left = self._layout(product.b, k, n)
        self.right = self._layout(product.a, m, k)
        self.result = self._layout(Laid(False, n, m * n, 0), m, n)
        self._describe(_TURN_LEFT, c.c_int32(product.b.turned))
        self._describe(_TURN_RIGHT, c.c_int32(product.a.turned))
        self._describe(_EPILOGUE, c_uint32(_epilogue(product)))
        if product.bias:
            self.set_bias(ALIGNMENT)                        # heuristics look at how round it is, and at nothing else
        self.algorithm = self._choose(where).algorithm

    def _new(self, kind: str, *arguments: Any) -> int:
        handle = c_void_p()
        self.library.call(f"{kind}Create", handle, *arguments)
        assert handle.value is not None
        weakref.finalize(self, self.library.release, f"{kind}Destroy", handle.value).atexit = False
        return handle.value

    def _set(self, kind: str, handle: int, attribute: int, value: Any) -> None:
        self.library.call(f"{kind}SetAttribute", handle, attribute, byref(value), c.sizeof(value))

    def _describe(self, attribute: int, value: Any) -> None:
        self._set("cublasLtMatmulDesc", self.description, attribute, value)

    def set_bias(self, address: int) -> None:
        """Where the bias lies."""
        self._describe(_BIAS, c_uint64(address))

    def _layout(self, laid: Laid, rows: int, columns: int) -> int:
        """A matrix of ours as the library sees it: transposed, unless it lies column by column."""
        seen = (rows, columns) if laid.turned else (columns, rows)
        layout = self._new("cublasLtMatrixLayout", TYPES[self.product.dtype], *seen, laid.pitch)
        if self.product.batch > 1:
            self._set("cublasLtMatrixLayout", layout, _COUNT, c.c_int32(self.product.batch))
            self._set("cublasLtMatrixLayout", layout, _STRIDE, c.c_int64(laid.stride))
        return layout

    def _choose(self, where: tuple[str, int] | None) -> Heuristic:
        preference = self._new("cublasLtMatmulPreference")
        self._set("cublasLtMatmulPreference", preference, _WORKSPACE, c_uint64(WORKSPACE))
        self._set("cublasLtMatmulPreference", preference, _REDUCTIONS, c_uint32(_IN_COMPUTE_TYPE))
        itemsize = BY_SHORT[self.product.dtype].itemsize
        firsts = self.product.b.first, self.product.a.first, 0, 0
        for attribute, first in zip(_ALIGNMENTS, firsts, strict=True):
            self._set("cublasLtMatmulPreference", preference, attribute, c_uint32(gcd(ALIGNMENT, first * itemsize)))
        found, count = Heuristic(), c_int()
        fix = "Set JITGRAD_CUBLAS=0, then products run without this library"
        self.library.call("cublasLtMatmulAlgoGetHeuristic", self.handle, self.description, self.left, self.right,
                          self.result, self.result, preference, 1, found, count, fix=fix, where=where)
        if not count.value or found.state != SUCCESS:
            raise self.library.error(found.state or _NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", fix, where)
        return found


_NOT_SUPPORTED = 15


def _epilogue(product: Product) -> int:
    number = _EPILOGUES[product.activation]
    if not product.bias:
        return number
    return _ADD_BIAS if not product.activation else number | _ADD_BIAS


class ProductCall:
    """An entry of a `LaunchPlan`: `product` on `slots`, those of A, B, the result, the workspace and, where it has one, the
    bias. `where`: the user's line, for errors."""

    def __init__(self, product: Product, slots: Sequence[Slot], gpu: Gpu, where: tuple[str, int] | None = None):
        found = connection.needed("Set JITGRAD_CUBLAS=0, or install nvidia-cublas again", where)
        self.slots, self.where = tuple(slots), where
        self.prepared = Prepared(found, gpu, product, where)
        self._arguments: tuple[Any, ...] = ()

    def bind(self, addresses: Sequence[int]) -> None:
        """Take the addresses of the slots."""
        made, product = self.prepared, self.prepared.product
        a, b, result, workspace, *bias = [addresses[slot.index] + slot.offset for slot in self.slots]
        itemsize = BY_SHORT[product.dtype].itemsize
        for address in bias:
            made.set_bias(address)
        self._arguments = (
            made.handle, made.description, byref(made.one), b + product.b.first * itemsize, made.left,
            a + product.a.first * itemsize, made.right, byref(made.zero), result, made.result, result, made.result,
            byref(made.algorithm), -(-workspace // SLACK) * SLACK, WORKSPACE)

    def enqueue(self, stream: Stream) -> None:
        """Put it into `stream`."""
        self.prepared.library.call("cublasLtMatmul", *self._arguments, stream.handle, where=self.where)
