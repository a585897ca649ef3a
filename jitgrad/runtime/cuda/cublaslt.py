"""cuBLASLt, NVIDIA's library of matrix products, by ctypes: found at run time, needed by nothing.

    if cublaslt.accepts(gpu, product):                          # loads the library at its first question
        call = ProductCall(product, slots, gpu)                 # an entry of a `LaunchPlan`

It is looked for in the folders of NVIDIA's packages, then where the system looks. A `Product` (`jitgrad.products`) says what
is computed; everything that the library needs beside it, descriptors and the way that its heuristics choose, is made once
and kept by the entry. The workspace is the caller's, so a call may be captured into a CUDA graph. `connect` puts another
object with the same functions in the library's place, which is what the tests do.

The library thinks column by column. Our result, row by row, is to it the transposed one, so it computes B' A' = (A B)'.
Numbers of attributes and types are those of its header, cublasLt.h.
"""

from __future__ import annotations

import ctypes as c
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

from jitgrad.dtypes import BY_SHORT
from jitgrad.errors import DeviceError, complain
from jitgrad.products import SLACK, WORKSPACE, Laid, Product
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import Slot
from jitgrad.runtime.cuda.streams import Stream

NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
SUCCESS = 0
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


class LibraryError(DeviceError):
    """A call of cuBLASLt that failed; `code` is its status."""

    code: int = 0


class Library:
    """The library with its functions declared. `version`: its own number, such as 130100."""

    def __init__(self, functions: Any):
        self._functions = {name: _declared(functions, name, types, c_int) for name, types in PROTOTYPES.items()}
        self._name = _declared(functions, "cublasLtGetStatusName", (c_int,), c.c_char_p)
        self.version: int = _declared(functions, "cublasLtGetVersion", (), c_size_t)()
        self._handles: weakref.WeakKeyDictionary[Gpu, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def call(self, name: str, *arguments: Any, fix: str = "", where: tuple[str, int] | None = None) -> None:
        """Call a function; LibraryError unless it succeeds."""
        code = self._functions[name](*arguments)
        if code != SUCCESS:
            raise self.error(code, name, fix, where)

    def release(self, name: str, handle: int) -> None:
        """Give something back, from a finalizer: where that fails there is nothing left to do."""
        self._functions[name](handle)

    def error(self, code: int, name: str, fix: str = "", where: tuple[str, int] | None = None) -> LibraryError:
        """The exception for a status that the function `name` gave."""
        text = self._name(code)
        raised = complain(LibraryError, "cuda", f"cuBLASLt {self.version}: {name} failed: "
                          f"{text.decode() if text else f'status {code}'}", fix=fix, where=where)
        assert isinstance(raised, LibraryError)
        raised.code = code
        return raised

    def handle(self, gpu: Gpu) -> int:
        """The library's handle for `gpu`, whose context is current from here on."""
        gpu.activate()
        with self._lock:
            found = self._handles.get(gpu)
            if found is None:
                handle = c_void_p()
                self.call("cublasLtCreate", handle)
                found = self._handles[gpu] = handle.value or 0
            return found


def _declared(functions: Any, name: str, types: tuple[Any, ...], result: Any) -> Any:
    function = getattr(functions, name)
    function.argtypes, function.restype = types, result
    return function


# ---- where it is -----------------------------------------------------------------------------------------------------


class _Connection:
    library: Library | None = None
    looked = False                              # for it
    given = False                               # by `connect`
    warned = False                              # that it cannot be used
    lock = threading.Lock()


_connection = _Connection()


@cache
def _packaged() -> str | None:
    """The library's file in a package of NVIDIA's, the newest; nothing is loaded."""
    for name in NAMES:
        for folder in sys.path:
            for file in sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}")):
                return str(file)
    return None


def library() -> Library | None:
    """The library, loaded at the first call; None when there is none."""
    if not _connection.looked:
        with _connection.lock:
            if not _connection.looked:
                _connection.library, _connection.looked = _load(), True
    return _connection.library


def _load() -> Library | None:
    for name in filter(None, (_packaged(), *NAMES)):
        try:
            return Library(c.CDLL(name))
        except (OSError, AttributeError):                  # it is not there, or another one of that name
            continue
    return None


def identity() -> str:
    """What tells one library from another, for keys; empty where there is none. A package's is not loaded for that."""
    file = None if _connection.given else _packaged()
    if file is not None:
        return _signature(file)
    found = library()
    return "" if found is None else str(found.version)


@cache
def _signature(file: str) -> str:
    return f"{file} {Path(file).stat().st_size}"


def connect(functions: Any) -> Library:
    """Use `functions`, an object with the library's functions, from now on; returns what it became."""
    _connection.library, _connection.looked, _connection.given = Library(functions), True, True
    return _connection.library


def disconnect() -> None:
    """Forget the library; the next use looks for it again."""
    _connection.library, _connection.looked, _connection.given, _connection.warned = None, False, False, False


def accepts(gpu: Gpu, product: Product) -> bool:
    """Whether the library is there, can be used on `gpu`, and has a way to compute `product`. It is said once why not when
    the library is there and cannot be used."""
    found = library()
    if found is None:
        return False
    try:
        found.handle(gpu)
    except LibraryError as error:
        if not _connection.warned:
            _connection.warned = True
            warnings.warn(f"matrix products run without cuBLASLt: {error}", RuntimeWarning, stacklevel=2)
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
        found = library()
        if found is None:
            raise complain(LibraryError, "cuda", "this plan needs cuBLASLt, which is not here any more",
                           fix="Set JITGRAD_CUBLAS=0, or install nvidia-cublas again", where=where)
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
