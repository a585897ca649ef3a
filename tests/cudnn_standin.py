"""A stand-in for cuDNN 9, for tests: `StandInCudnn(standin)` has the functions that `runtime.cuda.cudnn` declares.

It is called through ctypes like the real one. Every descriptor takes the attributes that the header, cudnn_graph.h, lists
for it, of their types and numbers of elements, all of them before it is finalized and none afterwards; what it is made of
must be finalized, and shapes must fit. `ways` are the engine configurations that its heuristics offer, by their mode. A
convolution or graph is queued in the handle's stream, so it can be captured, and computed by NumPy in float64: a convolution
tap by tap, a graph operation by operation (`cudnn_graphs`).
`fail["cudnnBackendExecute"] = 5000` makes a function fail with that status, once; `asked` lists what was computed."""

import ctypes
from ctypes import CFUNCTYPE, c_int
from dataclasses import dataclass

import cudnn_graphs
import ml_dtypes
import numpy as np
from cublaslt_standin import to_tf32
from cudnn_graphs import extent, laid_out, pitches
from library_standin import LibraryStandIn, Refused

from jitgrad.runtime.cuda.cudnn_descriptors import PROTOTYPES

BAD_PARAM, NOT_FINALIZED, SHAPES_DIFFER, NOT_SUPPORTED = 2000, 2004, 2008, 3000
NAMES = {1001: b"CUDNN_STATUS_NOT_INITIALIZED", 2000: b"CUDNN_STATUS_BAD_PARAM", 3000: b"CUDNN_STATUS_NOT_SUPPORTED",
         4000: b"CUDNN_STATUS_INTERNAL_ERROR", 5000: b"CUDNN_STATUS_EXECUTION_FAILED"}
TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 9: np.dtype(ml_dtypes.bfloat16)}

# CUDNN_TYPE_…
HANDLE, DATA_TYPE, INT64, FLOAT, ADDRESS, CONVOLUTION_MODE, HEUR_MODE, NOTE, DESCRIPTOR = 0, 1, 3, 4, 6, 7, 8, 11, 15
BOOLEAN, POINTWISE_MODE, REDUCTION_KIND = 2, 14, 18
ELEMENTS = {HANDLE: ctypes.c_uint64, DATA_TYPE: c_int, INT64: ctypes.c_int64, FLOAT: ctypes.c_float,
            ADDRESS: ctypes.c_uint64, CONVOLUTION_MODE: c_int, HEUR_MODE: c_int, NOTE: c_int, DESCRIPTOR: ctypes.c_uint64,
            BOOLEAN: ctypes.c_bool, POINTWISE_MODE: c_int, REDUCTION_KIND: c_int}

MANY = None
ONE_PART = (DESCRIPTOR, 1)
SETTABLE = {
    1: {100: (DATA_TYPE, 1), 101: (CONVOLUTION_MODE, 1), 102: (INT64, MANY), 103: (INT64, MANY), 104: (INT64, MANY),
        105: (INT64, MANY), 106: (INT64, 1)},                                                # CONVOLUTION
    2: {}, 3: {},                                                                            # ENGINE, ENGINECFG
    4: {200: (HEUR_MODE, 1), 201: ONE_PART},                                                 # ENGINEHEUR
    5: {400: (HANDLE, 1), 401: ONE_PART},                                                    # EXECUTION_PLAN
    10: {700: (FLOAT, 1), 701: (FLOAT, 1), **dict.fromkeys(range(702, 706), ONE_PART)},      # … CONVOLUTION_FORWARD
    11: {712: (FLOAT, 1), 713: (FLOAT, 1), **dict.fromkeys(range(714, 718), ONE_PART)},      # … BACKWARD_FILTER
    12: {706: (FLOAT, 1), 707: (FLOAT, 1), **dict.fromkeys(range(708, 712), ONE_PART)},      # … BACKWARD_DATA
    15: {800: (HANDLE, 1), 801: (DESCRIPTOR, MANY)},                                         # OPERATIONGRAPH
    16: {1000: (INT64, MANY), 1001: (ADDRESS, MANY), 1003: (ADDRESS, 1)},                    # VARIANT_PACK
    17: {900: (INT64, 1), 901: (DATA_TYPE, 1), 902: (INT64, MANY), 903: (INT64, MANY), 906: (INT64, 1), 907: (BOOLEAN, 1),
         908: (BOOLEAN, 1)},                                                                 # TENSOR
    **cudnn_graphs.SETTABLE,
}
"""The attributes of each kind of descriptor: their type, and how many elements they have."""
OPTIONAL = {17: {907, 908}, **cudnn_graphs.OPTIONAL}

PARTS = {10: {"convolution": 702, "w": 703, "x": 704, "y": 705}, 11: {"convolution": 714, "w": 715, "x": 716, "y": 717},
         12: {"convolution": 708, "w": 709, "x": 710, "y": 711}}
KINDS = {10: "convolution", 11: "convolution_weight_grad", 12: "convolution_input_grad"}
TENSOR_CORE, DOWN_CONVERT_INPUTS, REDUCED_PRECISION_REDUCTION, NONDETERMINISTIC, WINOGRAD = 0, 1, 2, 4, 5     # notes
MODE_A, MODE_FALLBACK = 3, 2


@dataclass(frozen=True)
class Way:
    """An engine configuration: what it is called, its numerical notes, its workspace, whether it can be built."""

    name: str = "usual"
    notes: tuple = ()
    workspace: int = 1000
    builds: bool = True


def require(condition, status=BAD_PARAM):
    if not condition:
        raise Refused(status)


class Thing:
    """A descriptor: its kind, its attributes by number, whether it is finalized, and whether it was destroyed. What comes
    from heuristics has a way, and the operations that they were asked about."""

    def __init__(self, kind, way=None, operations=None):
        self.kind, self.attributes, self.final, self.destroyed = kind, {}, False, False
        self.way, self.operations = way, operations

    def __getitem__(self, attribute):
        return self.attributes[attribute]

    @property
    def is_virtual(self):
        return bool(self.attributes.get(907))

    @property
    def is_value(self):
        return bool(self.attributes.get(908))

    def is_whole(self):
        """Whether it and all that it is made of is still there."""
        values = [v if type(v) is list else [v] for v in self.attributes.values()]
        return not self.destroyed and all(v.is_whole() for value in values for v in value if type(v) is Thing)


class StandInCudnn(LibraryStandIn):
    """See the module."""

    def __init__(self, standin):
        super().__init__(standin, PROTOTYPES, error=4000, first_handle=0x9000)
        self.ways, self.built = {MODE_A: [Way()], MODE_FALLBACK: []}, []
        self.streams = {}                                       # of each handle
        self.cudnnGetVersion = lambda: 92800
        self.cudnnGetLastErrorString = CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(self._last_error)
        self.cudnnGetErrorString = lambda code: NAMES.get(code)

    @staticmethod
    def _last_error(text, size):
        ctypes.memmove(text, b"count == 0\0", 11)

    def _cudnnCreate(self, out):
        self._put(out, ("handle", self.standin._context()))

    def _cudnnSetStream(self, handle, stream):
        self.streams[handle] = stream

    def _cudnnBackendCreateDescriptor(self, kind, out):
        require(kind in SETTABLE, NOT_SUPPORTED)
        self._put(out, Thing(kind))

    def _cudnnBackendDestroyDescriptor(self, handle):
        self.things.pop(handle).destroyed = True

    # ---- attributes

    def _cudnnBackendSetAttribute(self, handle, attribute, kind, count, data):
        thing = self.things[handle]
        wanted, many = SETTABLE[thing.kind].get(attribute, (None, 0))
        require(not thing.final and kind == wanted and count >= 1 and many in (MANY, count))
        values = list(ctypes.cast(data, ctypes.POINTER(ELEMENTS[kind]))[:count])
        if kind == DESCRIPTOR:
            values = [self.things[value] for value in values]
            require(all(value.final for value in values), NOT_FINALIZED)
        thing.attributes[attribute] = values[0] if many == 1 else values

    def _cudnnBackendGetAttribute(self, handle, attribute, kind, room, count, data):
        thing = self.things[handle]
        require(thing.final)
        answer = {(4, 202): self._results, (3, 300): self._engine, (2, 1303): self._notes, (5, 402): self._workspace}
        wanted, values = answer[thing.kind, attribute](thing)
        require(kind == wanted)
        count[0] = len(values) if not room else min(room, len(values))
        array = ctypes.cast(data, ctypes.POINTER(ELEMENTS[kind])) if room else None
        for k in range(count[0] if room else 0):
            if kind == DESCRIPTOR:                              # those that came are filled
                empty = self.things[array[k]]
                require(not empty.final and empty.kind == values[k].kind)
                empty.way, empty.operations, empty.final = values[k].way, values[k].operations, True
            else:
                array[k] = values[k]

    def _results(self, thing):
        return DESCRIPTOR, [Thing(3, way, thing[201][801]) for way in self.ways[thing[200]]]

    @staticmethod
    def _engine(thing):
        return DESCRIPTOR, [Thing(2, thing.way)]

    @staticmethod
    def _notes(thing):
        return NOTE, list(thing.way.notes)

    @staticmethod
    def _workspace(thing):
        return INT64, [thing.way.workspace]

    # ---- finalizing

    def _cudnnBackendFinalize(self, handle):
        thing = self.things[handle]
        left_out = set(SETTABLE[thing.kind]) - set(thing.attributes)
        require(not thing.final and left_out <= OPTIONAL.get(thing.kind, set()))
        checks = {1: self._check_convolution, 4: self._check_heuristics, 5: self._check_plan, 10: self._check_operation,
                  11: self._check_operation, 12: self._check_operation, 15: self._check_graph, 16: self._check_operands,
                  17: self._check_tensor,
                  **dict.fromkeys(cudnn_graphs.WRITTEN, lambda thing: cudnn_graphs.check(thing, require))}
        checks.get(thing.kind, lambda thing: None)(thing)
        thing.final = True

    @staticmethod
    def _check_tensor(thing):
        sizes, pitches = thing[902], thing[903]
        require(len(sizes) == len(pitches) in (4, 5) and min(*sizes, *pitches) > 0)
        require(thing[901] in cudnn_graphs.TYPES, NOT_SUPPORTED)
        require(thing[900] % cudnn_graphs.TYPES[thing[901]].itemsize == 0)

    @staticmethod
    def _check_convolution(thing):
        require(thing[100] == 0 and thing[101] == 1)                                # computed in float32, not flipped
        require({len(thing[k]) for k in (102, 103, 104, 105)} == {thing[106]})
        require(min(*thing[102], *thing[103]) > 0 and min(*thing[104], *thing[105]) >= 0)

    @staticmethod
    def _check_operation(thing):
        convolution, w, x, y = [thing[k] for k in PARTS[thing.kind].values()]
        require((convolution.kind, w.kind, x.kind, y.kind) == (1, 17, 17, 17) and len({t[901] for t in (w, x, y)}) == 1)
        require(w[901] in TYPES and not any(t.is_virtual or t.is_value for t in (w, x, y)), NOT_SUPPORTED)
        require(all(t[903] == pitches(t[902]) for t in (w, x, y)), NOT_SUPPORTED)       # ours are dense
        require(len({t[906] for t in (w, x, y)}) == 3 and {thing[min(SETTABLE[thing.kind])]} == {1.0})
        require(thing[min(SETTABLE[thing.kind]) + 1] == 0.0)
        axes = convolution[106]
        require({len(t[902]) for t in (w, x, y)} == {axes + 2}, SHAPES_DIFFER)
        (n, channels, *sizes), (rows, depth, *kernel), made = x[902], w[902], y[902]
        out = [(sizes[k] + convolution[105][k] + convolution[104][k] - convolution[102][k] * (kernel[k] - 1) - 1)
               // convolution[103][k] + 1 for k in range(axes)]
        require(made == [n, rows, *out] and channels % depth == 0 == rows % (channels // depth), SHAPES_DIFFER)

    def _check_graph(self, thing):
        require(self.things[thing[800]][0] == "handle")
        if thing[801][0].kind in KINDS:
            require(len(thing[801]) == 1)
        else:
            cudnn_graphs.check_graph(thing[801], require)

    def _check_heuristics(self, thing):
        require(thing[200] in self.ways and thing[201].kind == 15)

    def _check_plan(self, thing):
        require(self.things[thing[400]][0] == "handle" and thing[401].way is not None)
        thing.way, thing.operations = thing[401].way, thing[401].operations
        self.built.append(thing.way.name)
        require(thing.way.builds, NOT_SUPPORTED)

    @staticmethod
    def _check_operands(thing):
        require(len(set(thing[1000])) == len(thing[1001]) >= 3 and thing[1003] % 256 == 0)

    # ---- computing

    def _cudnnBackendExecute(self, handle, plan, operands):
        plan, operands = self.things[plan], self.things[operands]
        require(plan.final and operands.final and (plan.kind, operands.kind) == (5, 16) and plan.is_whole())
        require(self.things[handle] == ("handle", self.standin._context()) and plan[400] == handle)
        addresses = dict(zip(operands[1000], operands[1001], strict=True))
        compute = self._convolve if plan.operations[0].kind in KINDS else self._evaluate
        self.standin._enqueue(self.streams[handle], "cudnnBackendExecute",
                              lambda: compute(plan.way, plan.operations, addresses, operands[1003]))

    def _evaluate(self, way, operations, addresses, workspace):
        self.standin.write(workspace, b"\xc3" * way.workspace)    # it is the library's
        tensors, made = cudnn_graphs.tensors(operations)
        assert set(tensors) == set(addresses)
        arrays = {number: self._there(tensors[number], addresses[number])[1] for number in set(tensors) - made}
        cudnn_graphs.evaluate(operations, arrays)
        for number in made & set(tensors):
            memory, array = self._there(tensors[number], addresses[number])
            array[...] = arrays[number]
            self.standin.write(addresses[number], memory.tobytes())
        self.asked.append((len(operations), arrays[1].dtype, way.name))

    def _there(self, tensor, address):
        """The memory of a tensor, from its first element to its last, and the tensor in it."""
        kind, count = cudnn_graphs.TYPES[tensor[901]], extent(tensor)
        assert tensor.is_value or address % 16 == 0
        found = (ctypes.string_at if tensor.is_value else self.standin.read)(address, count * kind.itemsize)
        memory = np.frombuffer(found, kind).copy()
        return memory, laid_out(memory, tensor)

    def _convolve(self, way, operations, addresses, workspace):
        assert all(address % 16 == 0 for address in addresses.values())
        self.standin.write(workspace, b"\xc3" * way.workspace)    # it is the library's
        (operation,) = operations
        convolution, *tensors = [operation[k] for k in PARTS[operation.kind].values()]
        kind = TYPES[tensors[0][901]]
        made = {10: 2, 11: 0, 12: 1}[operation.kind]
        w, x, y = [np.zeros(t[902]) if k == made else self._read(t, addresses[t[906]], kind, TENSOR_CORE in way.notes)
                   for k, t in enumerate(tensors)]
        convolve(operation.kind, convolution, w, x, y)
        result = (w, x, y)[made].astype(kind)
        self.standin.write(addresses[tensors[made][906]], result.tobytes())
        self.asked.append((KINDS[operation.kind], kind, way.name))

    def _read(self, tensor, address, kind, on_tensor_cores):
        found = np.frombuffer(self.standin.read(address, int(np.prod(tensor[902])) * kind.itemsize), kind)
        if kind == np.float32 and on_tensor_cores:
            found = to_tf32(found)
        return found.reshape(tensor[902]).astype(np.float64)


def convolve(kind, convolution, w, x, y):
    """Add what is computed to zeros in the one that is: a tap meets every `stride`th pixel of an image with its padding."""
    dilation, stride, high, low = [convolution[k] for k in (102, 103, 104, 105)]
    groups = x.shape[1] // w.shape[1]
    padded = np.pad(x, [(0, 0), (0, 0), *zip(low, high, strict=True)])
    grouped = padded.reshape(len(x), groups, -1, *padded.shape[2:])
    rows = w.reshape(groups, -1, *w.shape[1:])
    made = y.reshape(len(y), groups, -1, *y.shape[2:])
    for tap in np.ndindex(*w.shape[2:]):
        met = (..., *[slice(t * d, t * d + (n - 1) * s + 1, s)
                      for t, d, n, s in zip(tap, dilation, y.shape[2:], stride, strict=True)])
        if kind == 10:
            made += np.einsum("ngc...,goc->ngo...", grouped[met], rows[(..., *tap)])
        elif kind == 12:
            grouped[met] += np.einsum("ngo...,goc->ngc...", made, rows[(..., *tap)])
        else:
            flat = [a.reshape(*a.shape[:3], -1) for a in (grouped[met], made)]
            rows[(..., *tap)] = np.einsum("ngcp,ngop->goc", *flat)
    if kind == 12:
        x[...] = padded[(..., *[slice(a, a + n) for a, n in zip(low, x.shape[2:], strict=True)])]
