"""A stand-in for cuBLASLt, for tests: `StandInLibrary(standin)` has the functions that `runtime.cuda.cublaslt` declares.

It is called through ctypes like the real one. Attributes must have the sizes that its header gives, operands the alignment
that was promised, matrices must lie in memory of the GPU's stand-in, and so must the workspace. A product is queued in the
stream that it is given, so it can be captured, and computed by NumPy, column by column as the real one thinks.
`fail["cublasLtMatmul"] = 13` makes a function fail with that status, once; `asked` lists the products that were computed."""

import ctypes

import ml_dtypes
import numpy as np
from library_standin import LibraryStandIn, Refused

from jitgrad.runtime.cuda.cublaslt import PROTOTYPES, Heuristic

INVALID_VALUE, NOT_SUPPORTED = 7, 15
NAMES = {1: b"CUBLAS_STATUS_NOT_INITIALIZED", 7: b"CUBLAS_STATUS_INVALID_VALUE", 13: b"CUBLAS_STATUS_EXECUTION_FAILED",
         15: b"CUBLAS_STATUS_NOT_SUPPORTED"}
TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
SIZES = {"description": {3: 4, 4: 4, 7: 4, 8: 8}, "layout": {5: 4, 6: 8}, "preference": {1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4}}
"""Bytes of the attributes that may be set, by their numbers."""

COMPUTES = {68: (0, {0, 2, 14}), 77: (0, {0}), 70: (1, {1})}
"""Of each way to compute: the type of alpha and beta, and those of matrices."""


def to_tf32(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


class StandInLibrary(LibraryStandIn):
    """See the module. `supports`: a function of a description's attributes that says whether there is a way."""

    def __init__(self, standin, supports=lambda attributes: True):
        super().__init__(standin, PROTOTYPES, error=14, first_handle=0x5000)
        self.supports, self.heuristics = supports, 0
        self.cublasLtGetVersion = lambda: 130100
        self.cublasLtGetStatusName = lambda code: NAMES.get(code)

    def _destroy(self, handle):
        del self.things[handle]

    _cublasLtMatmulDescDestroy = _cublasLtMatrixLayoutDestroy = _cublasLtMatmulPreferenceDestroy = _destroy

    def _set(self, handle, attribute, data, size):
        kind, attributes = self.things[handle]
        if SIZES[kind].get(attribute) != size:
            raise Refused(INVALID_VALUE)
        attributes[attribute] = int.from_bytes(ctypes.string_at(data, size), "little")

    _cublasLtMatmulDescSetAttribute = _cublasLtMatrixLayoutSetAttribute = _cublasLtMatmulPreferenceSetAttribute = _set

    def _cublasLtCreate(self, out):
        self._put(out, ("handle", self.standin._context()))

    def _cublasLtMatmulDescCreate(self, out, compute, scale):
        if COMPUTES[compute][0] != scale:
            raise Refused(INVALID_VALUE)
        self._put(out, ("description", {"compute": compute, 3: 0, 4: 0, 7: 1}))

    def _cublasLtMatrixLayoutCreate(self, out, kind, rows, columns, pitch):
        if pitch < rows or not rows or not columns:
            raise Refused(INVALID_VALUE)
        self._put(out, ("layout", {"type": TYPES[kind], "kind": kind, "shape": (rows, columns), "pitch": pitch, 5: 1, 6: 0}))

    def _cublasLtMatmulPreferenceCreate(self, out):
        self._put(out, ("preference", {}))

    def _attributes(self, *handles):
        return [self.things[handle][1] for handle in handles]

    def _cublasLtMatmulAlgoGetHeuristic(self, handle, description, left, right, c, d, preference, wanted, results, count):
        described, one, other, _, result, preferred = self._attributes(description, left, right, c, d, preference)
        self.heuristics += 1
        self._check(described, one, other, result)
        if preferred.keys() != {1, 3, 5, 6, 7, 8} or preferred[3] != 2 or wanted != 1:
            raise Refused(INVALID_VALUE)
        if not self.supports(described):
            count[0] = 0
            return
        count[0], results[0].state = 1, 0
        promised = [preferred[k] for k in (5, 6, 8)]
        for k, number in enumerate((described["compute"], described[7], preferred[1], *promised)):
            results[0].algorithm[k] = number

    @staticmethod
    def _check(described, one, other, result):
        (rows, depth), (again, columns) = [x["shape"][::-1] if described[k] else x["shape"]
                                           for x, k in ((one, 3), (other, 4))]
        fits = depth == again and result["shape"] == (rows, columns) and len({x[5] for x in (one, other, result)}) == 1
        if not fits or not {x["kind"] for x in (one, other, result)} <= COMPUTES[described["compute"]][1]:
            raise Refused(INVALID_VALUE)
        if (described["compute"] == 70 and described[7] != 1) or (described[7] & 4 and not described.get(8)):
            raise Refused(NOT_SUPPORTED)

    def _cublasLtMatmul(self, handle, description, alpha, a, left, b, right, beta, c, c_layout, d, d_layout, algorithm,
                        workspace, size, stream):
        described, one, other, result = self._attributes(description, left, right, d_layout)
        self._check(described, one, other, result)
        compute, epilogue, promised_size, *promised = ctypes.cast(
            algorithm, ctypes.POINTER(type(Heuristic().algorithm))).contents[:6]
        number = np.float64 if described["compute"] == 70 else np.float32
        scales = [np.frombuffer(ctypes.string_at(p, np.dtype(number).itemsize), number)[0] for p in (alpha, beta)]
        if (compute, epilogue) != (described["compute"], described[7]) or scales != [1, 0] or (c, c_layout) != (d, d_layout):
            raise Refused(INVALID_VALUE)
        if any(p % align for p, align in zip((a, b, d), promised, strict=True)) or workspace % 256 or size < promised_size:
            raise Refused(INVALID_VALUE)
        if self.things[handle][1] != self.standin._context():
            raise Refused(INVALID_VALUE)
        frozen = dict(described)
        self.standin._enqueue(stream, "cublasLtMatmul", lambda: self._compute(
            frozen, one, a, other, b, result, d, workspace, size))

    def _compute(self, described, one, a, other, b, result, d, workspace, size):
        self.standin.write(workspace, b"\xc3" * size)         # it is the library's
        x, y = self._matrices(one, a), self._matrices(other, b)
        x, y = (z.swapaxes(1, 2) if described[k] else z for z, k in ((x, 3), (y, 4)))
        if described["compute"] == 77:
            x, y = to_tf32(x), to_tf32(y)
        made = x.astype(np.float64) @ y.astype(np.float64)
        epilogue = described[7]
        if epilogue & 4:
            kind = result["type"]
            bias = np.frombuffer(self.standin.read(described[8], result["shape"][0] * kind.itemsize), kind)
            made = made + bias.astype(np.float64)[:, None]
        if epilogue & 2:
            made = np.maximum(made, 0)
        if epilogue & 32:
            made = 0.5 * made * (1 + np.tanh(np.sqrt(2 / np.pi) * (made + 0.044715 * made ** 3)))
        for k, matrix in enumerate(made.astype(result["type"])):
            for j, column in enumerate(matrix.T):
                self.standin.write(d + (k * result[6] + j * result["pitch"]) * result["type"].itemsize, column.tobytes())
        self.asked.append({**described, "type": result["type"], "shape": made.shape})

    def _matrices(self, layout, address):
        """A batch of matrices, (batch, rows, columns), read column by column."""
        (rows, columns), kind = layout["shape"], layout["type"]

        def column(k, j):
            place = address + (k * layout[6] + j * layout["pitch"]) * kind.itemsize
            return np.frombuffer(self.standin.read(place, rows * kind.itemsize), kind)

        return np.stack([np.stack([column(k, j) for j in range(columns)], 1) for k in range(layout[5])])
