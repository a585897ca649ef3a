"""A plan on a GPU: a `PlanSpec`, its kernels, and what a call of it needs in device memory.

    plan = GpuPlan(spec, gpu)
    results = plan.run([x, w, lr])          # DeviceArrays; a NumPy array is a number, or memory that comes along

A call goes to the current stream and waits for nothing, but where Python has to: at entries that NumPy carries out
(operands are copied down, results up), at kernels that may report an error, and for results in the computer's memory.

With `captures` a plan is captured into CUDA graphs at its third call, so that all kernels that follow each other are one
launch. A graph has fixed addresses: results are computed in memory of the plan and then copied to fresh memory, and an
operand that lay elsewhere in the call before is first copied to memory of the plan. Operands that are overwritten are used
where they are; when they have moved, the graph is captured anew. So a plan is not captured that is one launch, or has so
large results that copying them takes longer than the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from jitgrad.errors import DivisionByZeroError, OutOfRangeError, ShapeError, complain
from jitgrad.ir.graph import Where
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.products import Attended, Convolved, Product
from jitgrad.runtime import errors
from jitgrad.runtime.cuda import code, memory, streams
from jitgrad.runtime.cuda.array import Array, DeviceArray, copy_into, empty, moved, to_host, upload
from jitgrad.runtime.cuda.cublaslt import ProductCall
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.launch import ConstantBlock, Entry as Enqueued, Launch, LaunchPlan, MatrixMap, Slot
from jitgrad.runtime.cuda.streams import Stream
from jitgrad.runtime.spec import Argument, Boxes, Entry, Output, PlanSpec, Ref
from jitgrad.shapes import contiguous_strides

ALIGNMENT = 16                                 # of the address of every operand, which kernels rely on
WARM = 2                                       # calls before a plan is captured
COPIED = 1 << 20                               # bytes of results for each launch, up to which it is; not measured
WORD = 24                                      # bytes of an error word: code, item, value
_SPACES = ("arena", "constant", "table", "error")
_BYTES = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Host:
    """A step that NumPy carries out."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Check:
    """A step that looks whether a kernel has reported an error, before anything is overwritten."""


Step = LaunchPlan | Host | Check


@dataclass(frozen=True, slots=True)
class Ready:
    """The memory of one call: of its inputs (None: a number) and outputs, the address of every slot, and its arena."""

    places: list[DeviceArray | None]
    own: list[DeviceArray | None]
    addresses: list[int]
    lent: memory.Memory | None


class GpuPlan:
    """See the module. `captures`: whether calls may become CUDA graphs. `allowed`: what was allowed when it was made, for
    whoever looks at it. `lines`: see `jitgrad.runtime.plan.Plan`."""

    def __init__(self, spec: PlanSpec, gpu: Gpu, captures: bool = False, allowed: Any = None,
                 lines: Sequence[Where] = ()):
        self.spec, self.gpu, self.allowed, self.lines = spec, gpu, allowed, lines
        self.captures = captures and _is_worth_capturing(spec)
        self.functions = code.functions(spec.sources, gpu)
        self.constants = moved(np.frombuffer(spec.constants, np.uint8), gpu.device) if spec.constants else None
        self.failing = [k for k, entry in enumerate(spec.entries) if ("error", 0) in entry.arguments]
        self.table_starts = np.cumsum([0, *[8 * len(table) for table in spec.tables]]).tolist()
        self._frames: dict[int, Frame] = {}
        self._lock = threading.Lock()

    @property
    def host_entries(self) -> tuple[Entry, ...]:
        """What NumPy carries out."""
        return tuple([entry for entry in self.spec.entries if entry.host is not None])

    @property
    def is_captured(self) -> bool:
        """Whether some of its kernels run as a CUDA graph."""
        return any(frame.is_captured for frame in self._frames.values())

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs for `inputs`, which have the right types; those in `spec.written` are overwritten.
        OutOfRangeError or DivisionByZeroError, with the user's line, when a kernel reports it."""
        stream = streams.current_stream(self.gpu.index)
        with self._lock:
            frame = self._frames.get(stream.handle)
            if frame is None:
                frame = self._frames[stream.handle] = Frame(self, stream)
        with frame.lock:
            return frame.run(inputs)


class Frame:
    """What the calls of a plan in one stream share: launches bound to addresses, tables, numbers, error words."""

    def __init__(self, plan: GpuPlan, stream: Stream):
        self.plan, self.spec, self.gpu, self.stream = plan, plan.spec, plan.gpu, stream
        self.lock = threading.Lock()
        self.calls = 0
        if plan.constants is not None:
            plan.constants.record_stream(stream)           # the first frame's need not be this one's
        inputs, outputs = len(self.spec.inputs), len(self.spec.outputs)
        self.first = {"input": 0, "output": inputs, "arena": inputs + outputs}
        self.first |= {space: inputs + outputs + k for k, space in enumerate(_SPACES)}
        self.steps = list(self._steps())
        self.numbers_at = plan.table_starts[-1]            # behind the tables, 16 bytes for each input
        size = self.numbers_at + ALIGNMENT * inputs
        self.block = ConstantBlock(size, self.gpu) if size else None
        self.written = b""
        self.words = empty((len(plan.failing), 3), np.dtype(np.int64), self.gpu)
        self.arena: memory.Memory | None = None            # of a captured plan; otherwise it is lent to a call
        self.own: dict[int, DeviceArray] = {}              # of a captured plan: where its outputs are computed
        self.staged: dict[int, DeviceArray] = {}           # and where operands are copied that come from everywhere
        self.seen: list[int] = []                          # the addresses of the inputs of the last call

    @property
    def is_captured(self) -> bool:
        return any(type(step) is LaunchPlan and step.is_captured for step in self.steps)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        """Launches that follow each other are one step. Errors are looked for where Python waits anyway, and behind the
        last kernel that may report one."""
        launches: list[Enqueued] = []
        unchecked, last = False, max(self.plan.failing, default=-1)
        for k, entry in enumerate(self.spec.entries):
            unchecked = unchecked or k in self.plan.failing
            if entry.host is None:
                launches.append(self._launch(k, entry))
            if launches and (entry.host is not None or k == last):
                yield self._together(launches)
                launches = []
            if unchecked and (entry.host is not None or k == last):
                yield Check()
                unchecked = False
            if entry.host is not None:
                yield Host(entry)
        if launches:
            yield self._together(launches)

    def _together(self, launches: list[Enqueued]) -> LaunchPlan:
        return LaunchPlan(launches, self.first["error"] + 1, self.gpu)

    def _launch(self, position: int, entry: Entry) -> Enqueued:
        if entry.library is not None:
            slots = [Slot(*self._slot(ref)) for ref in entry.library.operands]
            return _library_call(entry.library.asked, slots, self.gpu, entry.line(self.plan.lines))
        assert entry.kernel is not None
        number = np.int64 if entry.wide else np.int32

        def argument(given: Argument) -> Any:
            assert not isinstance(given, str)
            if isinstance(given, int):
                return number(given)
            if isinstance(given, Boxes):
                slot, offset = self._slot(given.ref)
                return MatrixMap(Slot(slot, offset + given.start), given.sizes, given.pitch, given.box)
            space, place = given
            if space == "error":
                return Slot(self.first["error"], WORD * self.plan.failing.index(position))
            if space == "table":
                return Slot(self.first["table"], self.plan.table_starts[place])
            return Slot(*self._slot(given))

        return Launch(self.plan.functions[entry.kernel], (entry.items,), (entry.threads,),
                      [argument(a) for a in entry.arguments], entry.dynamic, entry.line(self.plan.lines))

    def _slot(self, ref: Ref) -> tuple[int, int]:
        """The slot of the memory at `ref`, and how many bytes behind its begin."""
        space, place = resolve(self.spec, ref)
        return (self.first[space] + place, 0) if space in ("input", "output") else (self.first[space], place)

    # --- a call ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `GpuPlan.run`."""
        captured = self.plan.captures and self.calls >= WARM
        ready = self.prepare(inputs, captured)
        for step in self.steps:
            self.carry_out(step, ready.addresses, captured)
        self.calls += 1
        self._write_back(inputs, ready.places, ready.addresses)
        return [self._result(k, output, inputs, ready, captured) for k, output in enumerate(self.spec.outputs)]

    def prepare(self, inputs: Sequence[Array], captured: bool) -> Ready:
        """The memory of a call on `inputs`."""
        places = [self._placed(k, x, captured) for k, x in enumerate(inputs)]
        if captured:
            self._stage(places)
        own = self._outputs(captured)
        lent = self._arena(captured)
        addresses = self._addresses(inputs, places, own, lent)
        if self.words.size:
            self.gpu.activate().driver.call("cuMemsetD8Async", self.words.address, 0, self.words.nbytes, self.stream.handle)
        return Ready(places, own, addresses, lent)

    def carry_out(self, step: Step, addresses: list[int], captured: bool) -> None:
        """Carry out one step."""
        if isinstance(step, Host):
            self._host_call(step.entry, addresses)
        elif isinstance(step, Check):
            self._check()
        else:
            step.bind(addresses)
            if captured and len(step.entries) > 1:
                step.replay(self.stream)
            else:
                step.run(self.stream)

    def _placed(self, k: int, array: Array, captured: bool) -> DeviceArray | None:
        """The memory that kernels use for an input: its own, if they can; None for a number. What lies elsewhere, in the
        computer's memory or on another GPU, is brought here."""
        if type(array) is DeviceArray:
            if array.gpu is self.gpu and array.flags.c_contiguous and array.address % ALIGNMENT == 0:
                return array
            home = empty(array.shape, array.dtype, self.gpu)
            copy_into(home, array)
            return home
        if array.nbytes <= ALIGNMENT:
            return None
        home = self._home(k, array) if captured else empty(array.shape, array.dtype, self.gpu)
        upload(home, array)
        return home

    def _home(self, k: int, array: Array) -> DeviceArray:
        """Where a graph finds operand `k`, wherever it comes from."""
        if k not in self.staged:
            self.staged[k] = empty(array.shape, array.dtype, self.gpu)
        return self.staged[k]

    def _stage(self, places: list[DeviceArray | None]) -> None:
        """Operands that are not where they were in the last call are copied to where a graph finds them."""
        for k, array in enumerate(places):
            if array is None or k in self.spec.written or not array.size or array is self.staged.get(k):
                continue
            if k in self.staged or (self.seen and self.seen[k] != array.address):
                places[k] = self._home(k, array)
                copy_into(places[k], array)

    def _outputs(self, captured: bool) -> list[DeviceArray | None]:
        """Memory for every output that has its own."""
        found: list[DeviceArray | None] = []
        for k, output in enumerate(self.spec.outputs):
            if output.source != ("output", k):
                found.append(None)
            elif not captured:
                found.append(empty(output.type.shape, output.type.dtype.numpy, self.gpu))
            else:
                if k not in self.own:
                    self.own[k] = empty(output.type.shape, output.type.dtype.numpy, self.gpu)
                found.append(self.own[k])
        return found

    def _arena(self, captured: bool) -> memory.Memory | None:
        """The arena, which a graph needs at one place for ever."""
        if not self.spec.arena:
            return None
        if not captured:
            return memory.allocate(self.spec.arena, self.stream)
        if self.arena is None:
            self.arena = memory.allocate(self.spec.arena, self.stream)
        return self.arena

    def _addresses(self, inputs: Sequence[Array], places: list[DeviceArray | None], own: list[DeviceArray | None],
                   lent: memory.Memory | None) -> list[int]:
        """The address of every slot. Numbers and tables are written to where kernels look for them."""
        block = self.block.address if self.block is not None else 0
        begin = block + self.numbers_at
        found = [begin + ALIGNMENT * k if a is None else a.address for k, a in enumerate(places)]
        self.seen = list(found)
        found += [0 if a is None else a.address for a in own]
        found += [0 if lent is None else lent.address, 0 if self.plan.constants is None else self.plan.constants.address,
                  block, self.words.address]
        if self.block is not None:
            self._write_block(inputs, places, found)
        return found

    def _write_block(self, inputs: Sequence[Array], places: list[DeviceArray | None], addresses: list[int]) -> None:
        """Bring tables and numbers up to date, if any has changed."""
        assert self.block is not None
        words = [e if isinstance(e, int) else self._address(e, addresses) for table in self.spec.tables for e in table]
        parts = [np.array(words, np.int64).tobytes()]
        parts += [(b"" if place is not None else array.tobytes()).ljust(ALIGNMENT, b"\0")
                  for array, place in zip(inputs, places, strict=True)]
        content = b"".join(parts)
        if content != self.written:
            self.block.write(content, self.stream)
            self.written = content

    def _address(self, ref: Ref, addresses: list[int]) -> int:
        slot, offset = self._slot(ref)
        return addresses[slot] + offset

    def _at(self, ref: Ref, type: TensorType, addresses: list[int]) -> DeviceArray:
        """The memory at `ref` as an array of `type`; whoever asks sees to it that it stays."""
        dtype = type.dtype.numpy
        strides = tuple([stride * dtype.itemsize for stride in contiguous_strides(type.shape)])
        return DeviceArray(self, self.gpu, self._address(ref, addresses), type.shape, strides, dtype, True)

    # --- what Python waits for -------------------------------------------------------------------------------------

    def _host_call(self, entry: Entry, addresses: list[int]) -> None:
        """Carry out an entry with NumPy."""
        host = entry.host
        assert host is not None
        arrays = [to_host(self._at(ref, type, addresses)) for ref, type in host.inputs]
        try:
            with np.errstate(all="ignore"):
                results = REGISTRY[host.op].eager(*arrays, **host.attrs)
        except (OutOfRangeError, DivisionByZeroError) as error:
            raise complain(type(error), entry.name, str(error).partition(": ")[2].partition("  (")[0],
                           where=entry.line(self.plan.lines)) from None
        results = results if isinstance(results, tuple) else (results,)
        for (ref, type_), result in zip(host.outputs, results, strict=True):
            if result.shape != type_.shape:
                raise complain(ShapeError, host.op, f"gave shape {result.shape} instead of {type_}",
                               where=entry.line(self.plan.lines))
            copy_into(self._at(ref, type_, addresses), np.asarray(result, type_.dtype.numpy))

    def _check(self) -> None:
        """Raise what the first kernel in the order of the program has reported."""
        for position, (number, _, value) in zip(self.plan.failing, to_host(self.words).tolist(), strict=True):
            if number:
                entry = self.spec.entries[position]
                raise errors.explain(number, value, entry.name, entry.line(self.plan.lines))

    def _write_back(self, inputs: Sequence[Array], places: list[DeviceArray | None], addresses: list[int]) -> None:
        """What was overwritten in a place of the plan's goes to where the caller has it."""
        for k in self.spec.written:
            if places[k] is not inputs[k]:
                copy_into(inputs[k], self._at(("input", k), self.spec.inputs[k], addresses))

    def _result(self, k: int, output: Output, inputs: Sequence[Array], ready: Ready, captured: bool) -> Array:
        space, place = output.source
        if space == "input":
            given = inputs[place]
            if type(given) is not DeviceArray or given.gpu is not self.gpu:
                given = moved(given, self.gpu.device)
            return given if tuple(given.shape) == output.type.shape else given.reshape(output.type.shape)
        home = ready.own[place] if space == "output" else None
        if home is not None and not captured:
            return home if home.shape == output.type.shape else home.reshape(output.type.shape)
        return self._at(output.source, output.type, ready.addresses).copy()


def _is_worth_capturing(spec: PlanSpec) -> bool:
    """Whether a graph saves more than the copies of results cost that it needs."""
    launches = sum([entry.host is None for entry in spec.entries])
    copied = sum([o.type.nbytes for k, o in enumerate(spec.outputs) if o.source == ("output", k)])
    return launches > 1 and copied <= COPIED * launches


def _library_call(asked: Product | Convolved | Attended, slots: Sequence[Slot], gpu: Gpu, where: Where) -> Enqueued:
    """The entry for what a library is asked for."""
    if isinstance(asked, Product):
        return ProductCall(asked, slots, gpu, where)
    call: Enqueued = import_module("jitgrad.runtime.cuda.cudnn").CudnnCall(asked, slots, gpu, where)
    return call


def resolve(spec: PlanSpec, ref: Ref) -> Ref:
    """Where the memory at `ref` really is: an output may have the memory of an input or of another output."""
    return spec.outputs[ref[1]].source if ref[0] == "output" else ref
