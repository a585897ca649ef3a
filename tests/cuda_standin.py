"""A CUDA driver without a GPU, for tests: `StandIn(gpus=2)` has the functions that `runtime.cuda.driver` declares.

It is called through ctypes like the real one, with the declared parameter types. Device memory is host memory that is
reached only by addresses of a range of its own, so that anybody who takes one for the other is found out. Work in a
stream is queued and carried out when someone waits, never before, so that a missing wait shows as stale values; a queue
waits for the events that it was told to wait for. Kernels are Python functions: ``standin.kernels["add"] = function``,
called with the driver and the 64-bit words of the arguments. `fail["cuMemAlloc_v2"] = 2` makes a function fail with that
code, once, a list says what the next calls answer; `log` lists what was carried out, in order."""

import ctypes
import itertools
import threading
from ctypes import CFUNCTYPE, POINTER, c_int

from ptx.boxes import MAP_BYTES, encode

from jitgrad.runtime.cuda.driver import PROTOTYPES

BASE = 0x7_0000_0000_0000                        # where device memory seems to be; 64 GiB of addresses per GPU
ROOM = 1 << 36
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS = 1, 2, 201, 400, 600, 700
NAMES = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE",
         201: "CUDA_ERROR_INVALID_CONTEXT", 209: "CUDA_ERROR_NO_BINARY_FOR_GPU",
         400: "CUDA_ERROR_INVALID_HANDLE", 500: "CUDA_ERROR_NOT_FOUND",
         700: "CUDA_ERROR_ILLEGAL_ADDRESS", 719: "CUDA_ERROR_LAUNCH_FAILED", 900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
         901: "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, RELAXED = 900, 901, 2
UNSAFE = {"cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuEventQuery", "cuEventSynchronize",
          "cuStreamQuery", "cuStreamSynchronize", "cuModuleLoadData", "cuModuleUnload"}
"""What ends a capture, unless it is a relaxed one, wherever in the thread it is called."""
ATTRIBUTES = {1: 1024, 8: 49152, 10: 32, 16: 132, 38: 50 << 20, 39: 2048, 75: 9, 76: 0, 81: 233472, 82: 65536, 97: 232448}


class Failure(Exception):
    """What a function of the stand-in answers with: an error code."""


class Queue:
    """A stream: actions that were enqueued, how many of them are done, and the clock of its GPU in milliseconds."""

    def __init__(self, gpu):
        self.gpu, self.actions, self.done = gpu, [], 0
        self.captured = None                                # a list while it is being captured
        self.relaxed = self.broken = False                  # how it is captured, and whether that cannot go on


class StandIn:
    """See the module. `memory`: bytes per GPU."""

    def __init__(self, gpus=1, memory=1 << 30):
        self.gpus, self.memory = gpus, memory
        self.kernels, self.fail, self.log, self.calls = {}, {}, [], []
        self.used = [0] * gpus
        self.clock = 0.0
        self.blocks = {}                                    # address -> bytearray
        self.pinned = {}                                    # address -> ctypes buffer
        self._thread = threading.local()                    # its current context
        self.handles = {}
        self.allowed = {}                                   # (function, attribute) -> what it was set to
        self.problems = []                                  # exceptions of the stand-in itself
        self._numbers = itertools.count(0x1000)
        self._next = [BASE + g * ROOM for g in range(gpus)]
        self._defaults = [Queue(g) for g in range(gpus)]
        self._functions = {}

    def __getattr__(self, name):
        if name not in PROTOTYPES or f"_{name}" not in dir(type(self)):
            raise AttributeError(name)
        if name not in self._functions:
            self._functions[name] = CFUNCTYPE(c_int, *PROTOTYPES[name])(self._guarded(name))
        return self._functions[name]

    def _guarded(self, name):
        function = getattr(self, f"_{name}")

        def call(*arguments):
            self.calls.append(name)
            try:
                code = self._injected(name)
                if code:
                    return code
                self._protect_captures(name)
                function(*arguments)
            except Failure as failure:
                return failure.args[0]
            except KeyError:
                return INVALID_HANDLE
            except BaseException as problem:                # ctypes would print and forget it
                self.problems.append(problem)
                return 999
            return 0

        return call

    def _injected(self, name):
        codes = self.fail.get(name, 0)
        if type(codes) is list:
            return codes.pop(0) if codes else 0
        return self.fail.pop(name, 0)

    def _protect_captures(self, name):
        strict = [queue for queue in self.queues() if queue.captured is not None and not queue.relaxed]
        if strict and name in UNSAFE:
            for queue in strict:
                queue.broken = True
            raise Failure(CAPTURE_UNSUPPORTED)

    # --- memory ------------------------------------------------------------------------------------------------------

    def find(self, address, nbytes):
        """The block that holds these bytes, and where in it."""
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return block, address - start
        raise Failure(ILLEGAL_ADDRESS)

    def read(self, address, nbytes):
        """Device memory now, whatever is still queued."""
        block, at = self.find(address, nbytes)
        return bytes(block[at:at + nbytes])

    def write(self, address, data):
        """Overwrite device memory now."""
        block, at = self.find(address, len(data))
        block[at:at + len(data)] = data

    def _cuMemAlloc_v2(self, out, size):
        gpu = self._context()
        if self.used[gpu] + size > self.memory:
            raise Failure(OUT_OF_MEMORY)
        self.used[gpu] += size
        out[0] = self._next[gpu]
        self.blocks[self._next[gpu]] = bytearray(b"\xa5" * size)        # contents are garbage
        self._next[gpu] += size + 4096

    def _cuMemFree_v2(self, address):
        self._context()
        for queue in self._queues(self._gpu_of(address)):              # the real one waits, too
            self._drain(queue)
        self.used[self._gpu_of(address)] -= len(self.blocks.pop(address))

    @staticmethod
    def _gpu_of(address):
        return (address - BASE) // ROOM

    def _cuPointerGetAttribute(self, out, number, address):
        if number != 9 or not any(start <= address < start + len(block) for start, block in self.blocks.items()):
            raise Failure(INVALID_VALUE)
        ctypes.c_int.from_address(out).value = self._gpu_of(address)

    def _cuMemHostAlloc(self, out, size, flags):
        self._context()
        buffer = ctypes.create_string_buffer(b"\xa5" * size, size)
        self.pinned[ctypes.addressof(buffer)] = buffer
        out[0] = ctypes.addressof(buffer)

    def _cuMemFreeHost(self, address):
        self._context()
        del self.pinned[address]

    def _is_pinned(self, address):
        return any(start <= address < start + len(buffer) for start, buffer in self.pinned.items())

    def _cuMemGetInfo_v2(self, free, total):
        gpu = self._context()
        free[0], total[0] = self.memory - self.used[gpu], self.memory

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        if source >= BASE:
            raise Failure(INVALID_VALUE)
        data = None if self._is_pinned(source) else ctypes.string_at(source, size)
        self._enqueue(stream, "upload", lambda: self.write(target, data or ctypes.string_at(source, size)))

    def _cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        if target >= BASE:
            raise Failure(INVALID_VALUE)
        self._enqueue(stream, "download", lambda: ctypes.memmove(target, self.read(source, size), size))

    def _cuMemcpyDtoDAsync_v2(self, target, source, size, stream):
        self._enqueue(stream, "copy", lambda: self.write(target, self.read(source, size)))

    def _cuMemcpyPeerAsync(self, target, target_context, source, source_context, size, stream):
        if (target_context, source_context) != (self._gpu_of(target) + 1, self._gpu_of(source) + 1):
            raise Failure(INVALID_CONTEXT)
        self._enqueue(stream, "peer", lambda: self.write(target, self.read(source, size)))

    def _cuMemsetD8Async(self, target, value, count, stream, width=1):
        self._enqueue(stream, "fill", lambda: self.write(target, value.to_bytes(width, "little") * count))

    def _cuMemsetD16Async(self, target, value, count, stream):
        self._cuMemsetD8Async(target, value, count, stream, 2)

    def _cuMemsetD32Async(self, target, value, count, stream):
        self._cuMemsetD8Async(target, value, count, stream, 4)

    # --- devices -----------------------------------------------------------------------------------------------------

    def _cuInit(self, flags):
        if not self.gpus:
            raise Failure(100)

    def _cuDriverGetVersion(self, out):
        out[0] = 13000

    def _cuGetErrorName(self, code, out):
        out[0] = NAMES.get(code, f"ERROR_{code}").encode()

    def _cuGetErrorString(self, code, out):
        out[0] = b"said by the stand-in"

    def _cuDeviceGetCount(self, out):
        out[0] = self.gpus

    def _cuDeviceGet(self, out, index):
        out[0] = index

    def _cuDeviceGetName(self, out, length, gpu):
        ctypes.memmove(out, b"Stand-in\0", 9)

    def _cuDeviceTotalMem_v2(self, out, gpu):
        out[0] = self.memory

    def _cuDeviceGetAttribute(self, out, number, gpu):
        out[0] = ATTRIBUTES[number]

    def _cuDevicePrimaryCtxRetain(self, out, gpu):
        out[0] = gpu + 1

    def _cuCtxSetCurrent(self, context):
        self._thread.current = context - 1

    def _cuCtxSynchronize(self):
        for queue in self._queues(self._context()):
            self._drain(queue)

    def _context(self):
        """The GPU whose context is current on this thread."""
        current = getattr(self._thread, "current", None)
        if current is None:
            raise Failure(INVALID_CONTEXT)
        return current

    # --- streams and events ------------------------------------------------------------------------------------------

    def _queue(self, stream):
        if stream in (None, 0, 1, 2):                        # 1 and 2 are the default streams by name
            return self._defaults[self._context()]
        queue = self.handles[stream]
        if queue.gpu != self._context():
            raise Failure(INVALID_CONTEXT)
        return queue

    def queues(self):
        """Those of all GPUs."""
        return [queue for gpu in range(self.gpus) for queue in self._queues(gpu)]

    def _queues(self, gpu):
        return [self._defaults[gpu], *[q for q in self.handles.values() if type(q) is Queue and q.gpu == gpu]]

    def _enqueue(self, stream, name, action):
        queue = self._queue(stream)
        (queue.actions if queue.captured is None else queue.captured).append((name, action))

    def _drain(self, queue, upto=None):
        """Carry out what is queued, up to position `upto`."""
        if queue.captured is not None:
            raise Failure(CAPTURE_UNSUPPORTED)
        while queue.done < (len(queue.actions) if upto is None else upto):
            name, action = queue.actions[queue.done]
            queue.done += 1
            self.clock += 1.0
            self.log.append(name)
            action()

    def _handle(self, out, thing):
        out[0] = next(self._numbers)
        self.handles[out[0]] = thing

    def _cuStreamCreateWithPriority(self, out, flags, priority):
        self._handle(out, Queue(self._context()))

    def _cuStreamDestroy_v2(self, stream):
        self._drain(self.handles.pop(stream))

    def _cuStreamSynchronize(self, stream):
        self._drain(self._queue(stream))

    def _cuStreamQuery(self, stream):
        queue = self._queue(stream)
        if queue.done < len(queue.actions):
            raise Failure(NOT_READY)

    def _cuStreamWaitEvent(self, stream, event, flags):
        point = self.handles[event].get("point")
        if point is not None:
            self._enqueue(stream, "wait", lambda: self._drain(*point))

    def _cuEventCreate(self, out, flags):
        self._handle(out, {"flags": flags})

    def _cuEventDestroy_v2(self, event):
        del self.handles[event]

    def _cuEventRecord(self, event, stream):
        queue, state = self._queue(stream), self.handles[event]
        self._enqueue(stream, "mark", lambda: state.update(time=self.clock))
        state["point"] = queue, len(queue.actions)

    def _cuEventSynchronize(self, event):
        self._drain(*self.handles[event]["point"])

    def _cuEventQuery(self, event):
        queue, position = self.handles[event]["point"]
        if queue.done < position:
            raise Failure(NOT_READY)

    def _cuEventElapsedTime(self, out, start, end):
        out[0] = self.handles[end]["time"] - self.handles[start]["time"]

    # --- code and launches -------------------------------------------------------------------------------------------

    def _cuModuleLoadData(self, out, image):
        text = ctypes.string_at(image).decode()              # the stand-in's machine code: names of kernels and sizes
        if text.startswith("sm_80"):
            raise Failure(209)
        self._handle(out, text.split())

    def _cuModuleUnload(self, module):
        del self.handles[module]

    def _cuModuleGetFunction(self, out, module, name):
        found = dict(entry.split("/") for entry in self.handles[module]).get(name.decode())
        if found is None:
            raise Failure(500)
        self._handle(out, (name.decode(), int(found)))

    def _cuFuncGetAttribute(self, out, number, function):
        out[0] = {0: 1024, 1: 0, 2: 0, 3: 0, 4: 32, 8: 49152}[number]

    def _cuFuncSetAttribute(self, function, number, value):
        if number == 8 and value > ATTRIBUTES[97]:
            raise Failure(INVALID_VALUE)
        self.allowed[function, number] = value

    def _check_shared(self, function, nbytes):
        """More than 48 KiB of dynamic shared memory have to be asked for."""
        if nbytes > self.allowed.get((function, 8), ATTRIBUTES[8]):
            raise Failure(INVALID_VALUE)

    def _cuOccupancyMaxActiveBlocksPerMultiprocessor(self, out, function, threads, shared):
        out[0] = 2048 // threads if not shared else min(2048 // threads, 233472 // shared)

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        self._check_shared(function, shared)
        name, count = self.handles[function]
        places = ctypes.cast(parameters, POINTER(ctypes.c_void_p))
        words = [int.from_bytes(ctypes.string_at(places[k], 8), "little") for k in range(count)]    # frozen here
        self._enqueue(stream, name, lambda: self.kernels[name](self, *words))

    def _cuTensorMapEncodeTiled(self, out, kind, rank, address, sizes, pitches, box, steps, layout, swizzle, _, fill):
        lengths, lines = ((ctypes.c_uint64 * n).from_address(place) for n, place in ((2, sizes), (1, pitches)))
        shape, apart = ((ctypes.c_uint32 * 2).from_address(place) for place in (box, steps))
        if out % 64 or (kind, rank, layout, swizzle, fill, *apart) != (1, 2, 0, 3, 0, 1, 1):
            raise Failure(INVALID_VALUE)
        try:
            ctypes.memmove(out, encode(address, tuple(lengths), lines[0], tuple(shape)), MAP_BYTES)
        except ValueError:
            raise Failure(INVALID_VALUE) from None

    def _cuStreamBeginCapture_v2(self, stream, mode):
        if not stream:
            raise Failure(CAPTURE_UNSUPPORTED)
        queue = self._queue(stream)
        queue.captured, queue.relaxed, queue.broken = [], mode == RELAXED, False

    def _cuStreamEndCapture(self, stream, out):
        queue = self._queue(stream)
        captured, queue.captured = queue.captured, None
        if queue.broken:
            raise Failure(CAPTURE_INVALIDATED)
        self._handle(out, captured)

    def _cuGraphInstantiateWithFlags(self, out, graph, flags):
        self._handle(out, list(self.handles[graph]))

    def _cuGraphLaunch(self, executable, stream):
        for name, action in self.handles[executable]:
            self._enqueue(stream, name, action)

    def _cuGraphExecDestroy(self, executable):
        del self.handles[executable]

    def _cuGraphDestroy(self, graph):
        del self.handles[graph]
