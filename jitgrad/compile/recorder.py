"""Recording: the interpreter under which a compiled function's body runs.

Ops are not carried out but appended to a graph; their results are lazy Tensors. Memory is a value in the graph: each
`Unit` is one piece of memory (a captured Tensor's, or that of a lazy root), an in-place change gives the unit a new
value, and a view is a chain of movement ops that is applied to the unit's current value when the view is read.

When Python needs a value, and at the end of the call, `flush` turns what was recorded into a graph, has it run, and
puts the results where they belong: into the lazy Tensors that are still alive, and, for what was changed in place,
back into the same memory. Whatever is recorded afterwards is a new graph, which captures its inputs anew. How inputs
are captured, which results keep a history, and how what was recorded is run is in `capture`, `crossing` and `running`;
all of them work on the state that a Recorder keeps.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from jitgrad import autograd, ops
from jitgrad.compile.capture import capture
from jitgrad.compile.crossing import waiting_results
from jitgrad.compile.location import CPU, common_device
from jitgrad.compile.number import Deferred, Number, trace_number
from jitgrad.compile.running import run_recorded
from jitgrad.compile.trace import Fence, Given, Made, Outcome, Pending, Segment, Unit
from jitgrad.eager import EagerInterpreter
from jitgrad.errors import AutogradError, CompileError, complain, user_location
from jitgrad.garbage import Uncollected
from jitgrad.ir import interpreter
from jitgrad.ir.graph import GraphBuilder, Value
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.runtime.cuda import driver
from jitgrad.shapes import contiguous_strides, reshape_strides
from jitgrad.tensor import Tensor, _new, assign, undo_movement

READ = "a value is read"
GOES_ON = "the computation goes on on "
_EAGER = EagerInterpreter()
_BYTE = np.zeros(1, np.int8)


class Recorder:
    """See the module. `execute(recorder, segment, arrays)` runs a graph; it is given by the compiled function."""

    records = True

    def __init__(self, execute: Callable[..., Any], name: str = "graph", fullgraph: bool = False,
                 given: Given | None = None, collector: Uncollected | None = None):
        self.execute = execute
        self.name = name
        self.fullgraph = fullgraph
        self.guards: list[tuple[Any, Any, Any]] = []  # (expression of numbers, its value, the user's line)
        self.origins: dict[int, Any] = {}             # id(0-d input Tensor) -> where its number comes from
        self.numbers: dict[Any, Number] = {}
        self.cuts: list[Any] = []                     # where Python asked for a value in the middle
        self.given = given
        self.collector = collector                    # garbage waits until Python goes on with a value
        self.trace: list[Segment | Outcome] = []      # what was run and decided so far
        self.reads: list[Any] = []                    # where Python took a value for anything but a decision
        self.draws: dict[int, list[Any]] = {}         # generator, its offset before the call, draws taken
        self.defers = False                           # item() gives a `Deferred` to the user's code
        self.deferrals: list[Deferred] = []
        self.deferred: dict[int, Any] = {}            # leaf of the result: the memory whose value it is
        self.made: dict[int, tuple[Any, int]] = {}    # id(array) -> the array (weakly), which of all outputs it is
        self.outputs = 0                              # of all segments
        self.revived: list[weakref.ref[Tensor]] = []  # lazy Tensors that got their arrays
        self.hooked = False                           # a hook was put on a lazy Tensor
        self.entangled = False                        # two Tensors with a history share memory
        self.merged: list[tuple[Any, Tensor]] = []    # Tensors that became one unit: the unit's, and another
        self.first_sequence = autograd.next_sequence()
        self.forever: list[Tensor] = []               # inputs of numbers: their ids must not be used again
        self.cleared_first: set[int] = set()          # ids of Tensors whose gradients went before anything was recorded
        self.fenced: Fence | None = None              # while something is computed a second time
        self.repeats = True                           # all blocks were noted
        self.flat: list[tuple[int, int]] = []         # memory (first, last byte) whose tensors overlap oddly
        self._start()

    def _start(self) -> None:
        self.builder = GraphBuilder(self.name)
        self.units: list[Unit] = []                   # captured, in the order of the graph's inputs
        self.known: dict[int, Pending] = {}           # id(real Tensor) -> its place; the Tensor is held by `held`
        self.held: list[Tensor] = []
        self.memory: dict[tuple[int, int], Unit] = {}  # contiguous captured memory by (address, bytes)
        self.spans: list[tuple[int, int]] = []        # the same, as sorted (first byte, past the last)
        self.live: list[weakref.ref[Tensor]] = []
        self.tracked: set[Value] = set()              # values with a history
        self.device = ""                              # where the graph runs, as far as is known
        self.detached_before: dict[Value, int] = {}   # inputs that gained a history late: after how many nodes
        self.blocks: list[tuple[int, int]] = []       # nodes (first, past the last) that the walk back computes again
        self.partial: set[Value] = set()              # values whose history is not just that of the graph

    @property
    def segments(self) -> list[Segment]:
        """What was run so far."""
        return [event for event in self.trace if type(event) is Segment]

    def close(self) -> None:
        """Let go of everything: traced numbers that outlive the call still know their recorder."""
        self._start()
        self.trace, self.merged, self.given = [], [], None
        self.numbers, self.origins, self.forever, self.draws = {}, {}, [], {}

    # --- ops -------------------------------------------------------------------------------------------------------

    def run(self, op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any]) -> Any:
        """Record one op on Tensors; lazy Tensors come out."""
        if op.view:
            out = self._view(op, inputs[0], attrs)
            if out is not None:
                if inputs[0].requires_grad and autograd.mode.enabled:
                    autograd.record(op, inputs, attrs, (out,))
                return out
        self.builder.where = where = user_location(2)
        device = self._locate(op.name, inputs)
        read = self.read_all(inputs)
        self.builder.where = where                    # reading may have cut: then this is another builder
        values = self.builder.run(op, read, attrs)
        outs = tuple([self.lazy(v, device) for v in ((values,) if op.outputs == 1 else values)])
        history = [t.requires_grad for t in inputs]
        if any(history):
            if autograd.mode.enabled:
                autograd.record(op, inputs, attrs, outs)
                self.tracked.update([t._pending.unit.value for t in outs if t._node is not None])
            else:
                self.partial.update([t._pending.unit.value for t in outs])
        if any([v in self.tracked and not h for v, h in zip(read, history)]):
            self.partial.update([t._pending.unit.value for t in outs])
        return outs[0] if op.outputs == 1 else outs

    def lazy(self, value: Value, device: str = CPU) -> Tensor:
        """A lazy root on `device` whose contents are `value`; "": it lies nowhere yet."""
        t = _new(Tensor)
        t._type = value.type
        if device not in (CPU, ""):
            t._type = TensorType(value.dtype, value.shape, device)
        t._unplaced = not device
        t._pending = Pending(Unit(value))
        self.live.append(weakref.ref(t))
        return t

    def _view(self, op: Op, source: Tensor, attrs: dict[str, Any]) -> Tensor | None:
        """A lazy view of `source`, or None where eager execution would copy."""
        (type_,) = op.result_types((source.tensor_type,), attrs)
        if op is ops.reshape and not _is_dense(source) \
                and reshape_strides(source.shape, self.strides(source), type_.shape) is None:
            return None
        place = source._pending if source._array is None else capture(self, source)
        t = _new(Tensor)
        t._type = type_
        t._unplaced = source._unplaced
        t._pending = Pending(place.unit, (*place.chain, (op, attrs)))
        root = source._root
        t._root = root if root is not None else source
        t._chain = (*source._chain, (op, attrs))
        t._seen = t._root._renewals
        t._differentiable_view = source._differentiable_view
        self.live.append(weakref.ref(t))
        return t

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """The strides, in elements, that eager execution would give `tensor`."""
        if tensor._array is not None:
            return tuple([s // tensor._array.itemsize for s in tensor._array.strides])
        place: Pending = tensor._pending
        base = place.unit.tensor
        shape = place.unit.value.shape
        strides = self.strides(base) if base is not None and base.shape == shape else contiguous_strides(shape)
        for op, attrs in place.chain:
            if op is ops.reshape:
                shape, strides = attrs["shape"], reshape_strides(shape, strides, attrs["shape"]) or ()
            else:                       # the strides that NumPy gives; the memory behind is never touched
                moved = op.eager(as_strided(_BYTE, shape, strides), **attrs)
                shape, strides = moved.shape, moved.strides
        return strides

    # --- devices ---------------------------------------------------------------------------------------------------

    def _locate(self, op: str, tensors: Sequence[Tensor]) -> str:
        """The device of the operands of an op, which becomes that of the graph; "" if they lie nowhere yet."""
        device, binding = common_device(op, tensors)
        if binding:
            self._enter(device)
        return device

    def _enter(self, device: str) -> None:
        """What is recorded next runs on `device`. A graph runs on one; another one begins a new graph."""
        if self.device and self.device != device:
            self.flush(user_location(2), f"{GOES_ON}{device}")
            self.trace.append(Outcome(None, None, None, len(self.guards)))
        self.device = device

    def move(self, tensor: Tensor, where: Any, non_blocking: bool) -> Tensor:
        """A copy of `tensor` on another device. A backward pass that has been through its history goes no further."""
        history = tensor._history_node()
        if history is not None and history.freed:
            moved = self.transfer(tensor, where, non_blocking)
            moved._node, moved._index = history, tensor._index
            return moved
        moved = _EAGER.move(tensor, where, non_blocking)
        if tensor.requires_grad:
            (self.tracked if autograd.mode.enabled else self.partial).add(moved._pending.unit.value)
        return moved

    def transfer(self, tensor: Tensor, where: Any, non_blocking: bool) -> Tensor:
        """`move` without history. It is part of the graph of the GPU: what comes from elsewhere is an input that the plan
        takes to itself, what goes to the CPU an output that is brought there."""
        there = str(where)
        if there != CPU:
            driver.gpu(where.index)                              # there must be such a GPU
            self._enter(there)
        elif tensor._array is not None or tensor._type.device != CPU:
            self._enter(tensor.device_name)
        value = self.read(tensor)
        self.builder.where = user_location(2)
        return self.lazy(self.builder.run(ops.cast, (value,), {"dtype": tensor.dtype}), there)

    # --- memory ----------------------------------------------------------------------------------------------------

    def read(self, tensor: Tensor) -> Value:
        """The graph's value for the contents of `tensor` now."""
        place: Pending = tensor._pending if tensor._array is None else capture(self, tensor)
        unit = place.unit
        if self.fenced is not None:
            base = self.fenced.pass_through(self.builder, unit.value)
            if base is not unit.value or not place.chain:
                return self._moved(base, place)
        if not place.chain:
            return unit.value
        if place.value is None or place.seen != unit.writes:
            place.value, place.seen = self._moved(unit.value, place), unit.writes
        return place.value

    def _moved(self, value: Value, place: Pending) -> Value:
        for op, attrs in place.chain:
            value = self.builder.run(op, (value,), attrs)
        return value

    def read_all(self, tensors: tuple[Tensor, ...]) -> tuple[Value, ...]:
        """The values of several Tensors. Capturing one may cut; then those read before it are of another graph."""
        builder = self.builder
        values = tuple([self.read(t) for t in tensors])
        return values if self.builder is builder else self.read_all(tensors)

    def store(self, target: Tensor, value: Tensor) -> None:
        """Give the memory of `target` new contents."""
        root = target if target._root is None else target._root
        for deferred in self.deferrals:
            if root is deferred.tensor or root is deferred.tensor._root:
                deferred.take()                       # which may cut, so that what follows is another graph
        self._locate("in-place operation", (target, value))
        place, new = self._place_and_value(target, value)
        unit = place.unit
        if unit.tensor is not None and not unit.tensor._array.flags.writeable:
            _EAGER.store(unit.tensor, Tensor(np.empty(0)))    # raises what eager execution raises
        with interpreter.interpret(self.builder):
            self.builder.where = user_location(2)
            unit.value = _store_through(unit.value, place.chain, new)
        unit.dirty = True
        unit.writes += 1

    def rewrite(self, op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any], targets: Sequence[Tensor]) -> None:
        """An op whose results replace the contents of `targets`."""
        assign(op(*inputs, **attrs), targets)

    def _place_and_value(self, target: Tensor, value: Tensor) -> tuple[Pending, Value]:
        builder = self.builder
        place: Pending = target._pending if target._array is None else capture(self, target)
        new = self.read(value)
        return (place, new) if self.builder is builder else self._place_and_value(target, value)

    def adopt(self, tensor: Tensor) -> None:
        """A Tensor that was made over the same place as another lazy one."""
        self.live.append(weakref.ref(tensor))

    def own(self, tensor: Tensor) -> Tensor:
        """A lazy root with the contents of `tensor`."""
        if tensor._array is None:
            return self.lazy(self.read(tensor), "" if tensor._unplaced else tensor._type.device)
        device = self._locate("copy", (tensor,))      # first: it may begin a new graph
        return self.lazy(self.read(tensor), device)

    # --- numbers, state, random offsets ------------------------------------------------------------------------------

    def input_number(self, value: Any, origin: Any) -> Tensor:
        """A 0-d float64 or int64 input that is read from `origin` on every call."""
        real = Tensor(np.array(value, dtype=np.float64 if isinstance(value, float) else np.int64))
        real._unplaced = True
        self.origins[id(real)] = origin
        self.forever.append(real)
        return real

    def number(self, mapping: Any, *keys: Any) -> Any:
        """``mapping[key]…``, traced (`autograd.number`)."""
        value = mapping
        for key in keys:
            value = value[key]
        known = self.numbers.get((id(mapping), keys))
        if known is None or known.value is not value:
            known = trace_number(self, value, ("item", mapping, keys))
            self.numbers[id(mapping), keys] = known
        return known

    def draw(self, generator: Any, count: int) -> tuple[Tensor, Tensor]:
        """Key and first offset of `count` random draws, as inputs of the graph (`functional.random.next_offset`)."""
        before = generator.offset
        key, first = generator.advance(count)
        base = self.draws.setdefault(id(generator), [generator, before, 0])
        base[2] = max(base[2], first - base[1] + count)       # what is computed again draws the same again
        return (self.input_number(key, ("seed", generator)),
                self.input_number(first, ("offset", generator, first - base[1])))

    def eagerly(self, make: Callable[[], Any]) -> Any:
        """Run `make` outside of the recording (`autograd.eager_state`)."""
        with interpreter.interpret(_EAGER):
            return make()

    def cleared(self, tensor: Tensor) -> None:
        """The gradient of `tensor` was taken away."""
        if not self.builder.nodes and not self.trace:
            self.cleared_first.add(id(tensor))

    # --- what is computed a second time --------------------------------------------------------------------------------

    @contextmanager
    def block(self, repeatable: bool) -> Iterator[None]:
        """Around the first run of a function that the walk back runs again. A backward pass outside of this call does so
        in terms of nodes, which is the same only if the function is `repeatable` and changes nothing in place."""
        builder, first, writes = self.builder, len(self.builder.nodes), self._count_writes()
        yield
        if builder is self.builder and repeatable and writes == self._count_writes():
            self.blocks.append((first, len(builder.nodes)))
        else:
            self.repeats = False

    def _count_writes(self) -> int:
        return sum(unit.writes for unit in self.units)

    @contextmanager
    def fence(self, after: Sequence[Tensor], recorded: bool) -> Iterator[None]:
        """Around a second run: what was there before is read through barriers behind the first of `after`, so that no
        pass takes the two runs for one. A first run that was not `recorded` is repeated as it was, eagerly."""
        if not recorded:
            if any(unit.dirty for unit in self.units):
                self.flush(user_location(2), "a checkpointed function from outside runs again")
            with interpreter.interpret(_EAGER):
                yield
            return
        outer = self.fenced
        token = self.read(after[0]) if after else None
        self.fenced = None if token is None else Fence(self.builder, token)
        try:
            yield
        finally:
            self.fenced = outer

    # --- running what was recorded -----------------------------------------------------------------------------------

    def force(self, tensor: Tensor) -> np.ndarray:
        """The values of `tensor`, for Python: runs what was recorded so far if they depend on it."""
        where = user_location(2)
        self._bring_about(tensor, where)
        self.reads.append(where)
        array: np.ndarray = tensor._array
        return array

    def decide(self, tensor: Tensor, kind: type) -> Any:
        """``kind(tensor)`` for Python, a bool or an int: all that Python learns, so that the call may be sealed."""
        self._bring_about(tensor, user_location(2))
        done = len(self.trace) - len(self.segments)
        if self.given is not None and done < len(self.given.outcomes):
            value = self.given.outcomes[done]
        else:
            value = kind(tensor._element())
        self.trace.append(Outcome(kind, value, self.source(tensor), len(self.guards)))
        return value

    def _bring_about(self, tensor: Tensor, where: Any, reason: str = READ) -> None:
        """Run what was recorded so far if the values of `tensor` depend on it."""
        if tensor._array is None:
            if tensor._pending is None:
                raise complain(AutogradError, "reading a value", "this tensor's computation failed earlier")
            self.flush(where, reason)
        else:
            place = self.known.get(id(tensor))
            if any(unit.dirty for unit in self.units) and (place is None or place.unit.dirty):
                self.flush(where, reason)

    def source(self, tensor: Tensor) -> Tensor | Made:
        """Where the memory of a real Tensor comes from: `Made` by this call, or the Tensor itself."""
        for t, chain in ((tensor, ()), (tensor._root, tensor._chain)):
            array, output = self.made.get(id(t._array), (None, 0)) if t is not None else (None, 0)
            if array is not None and array() is t._array:    # type: ignore[union-attr]
                return Made(output, chain)
        return tensor

    def defer(self, tensor: Tensor) -> Deferred | None:
        """What stands for the value of `tensor` when it is known that the user's code, which asks, only returns it."""
        asks = sys._getframe(2).f_globals.get("__name__", "")
        if not self.defers or math.prod(tensor.shape) != 1 or asks.startswith("jitgrad.") \
                or (tensor._array is not None and type(self.source(tensor)) is not Made):
            return None
        self.deferrals.append(Deferred(self, tensor))
        return self.deferrals[-1]

    def settle(self, results: list[Any]) -> None:
        """After the call: values that were deferred take the place of what stands for them among its results."""
        for k, leaf in enumerate(results):
            if type(leaf) is Deferred:
                results[k] = leaf.value
                self.deferred[k] = self.source(leaf.tensor)
        self.deferrals = []

    def flush(self, where: Any = None, reason: str = "") -> None:
        """Run everything recorded so far. With a `where` this is a cut; without, the end of the call. Going on on another
        device is no reading: such a call can be sealed."""
        if where is not None:
            if self.fullgraph and not reason.startswith(GOES_ON):
                raise complain(CompileError, self.name, f"{reason} in the middle of the function, but fullgraph=True",
                               where=where, fix="Return the tensor and read it outside, or compile without fullgraph")
            self.cuts.append((where, reason))
            if self.collector is not None:
                self.collector.end()
        run_recorded(self, [])
        self._start()

    def finish(self, results: list[Any]) -> None:
        """The end of the call: run what was recorded. `results` are the leaves of what the function returns; those
        with a history get the whole call as one node of the tape, where that is the same."""
        waiting = waiting_results(self, results)
        for t in waiting:
            t._node = None                            # with it goes the tape, and what it saved
        run_recorded(self, waiting)
        self._start()


def _is_dense(tensor: Tensor) -> bool:
    """True when the memory of `tensor` is known to be dense, so that it can be seen at any shape."""
    if tensor._array is not None:
        return bool(tensor._array.flags.c_contiguous)
    place: Pending = tensor._pending
    return place.unit.tensor is None and all([op is ops.reshape for op, _ in place.chain])


def _store_through(base: Value, chain: Any, value: Value) -> Value:
    if not chain:
        return value
    (op, attrs), rest = chain[0], chain[1:]
    inner = _store_through(op(base, **attrs), rest, value) if rest else value
    result: Value = undo_movement(op, attrs, base, inner)
    return result
