"""Recording: the interpreter under which a compiled function's body runs.

Ops are not carried out but appended to a graph; their results are lazy Tensors. Memory is a value in the graph: each
`Unit` is one piece of memory (a captured Tensor's, or that of a lazy root), an in-place change gives the unit a new
value, and a view is a chain of movement ops that is applied to the unit's current value when the view is read.

When Python needs a value, and at the end of the call, `flush` turns what was recorded into a graph, has it run, and
puts the results where they belong: into the lazy Tensors that are still alive, and, for what was changed in place,
back into the same memory. Whatever is recorded afterwards is a new graph, which captures its inputs anew.
"""

from __future__ import annotations

import bisect
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from jitgrad import autograd, ops
from jitgrad.compile.location import CPU, Location, bounds, common_device
from jitgrad.compile.number import Deferred, Number, trace_number
from jitgrad.compile.overlap import movement_between
from jitgrad.compile.trace import Given, Made, Outcome, Pending, Segment, Unit
from jitgrad.eager import EagerInterpreter
from jitgrad.errors import AutogradError, CompileError, complain, user_location
from jitgrad.ir import interpreter
from jitgrad.ir.graph import GraphBuilder, Value
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops.gradient import depends_on
from jitgrad.runtime.cuda import driver
from jitgrad.shapes import contiguous_strides, reshape_strides
from jitgrad.tensor import Tensor, _new, assign, undo_movement

READ = "a value is read"
GOES_ON = "the computation goes on on "
_EAGER = EagerInterpreter()
_BYTE = np.zeros(1, np.int8)


class Fence:
    """Values of one graph that were there before a second computation, and their barriers. Numbers of one element stay
    what they are."""

    def __init__(self, builder: GraphBuilder, after: Value):
        self.builder = builder
        self.after = after
        self.first = builder.count
        self.behind: dict[Value, Value] = {}

    def pass_through(self, builder: GraphBuilder, value: Value) -> Value:
        """What the second computation reads for `value`."""
        if builder is not self.builder or value.id >= self.first or value.type.size < 2:
            return value
        if value not in self.behind:
            self.behind[value] = builder.run(ops.barrier, (value, self.after), {})
        return self.behind[value]


class Recorder:
    """See the module. `execute(recorder, segment, arrays)` runs a graph; it is given by the compiled function."""

    records = True

    def __init__(self, execute: Callable[..., Any], name: str = "graph", fullgraph: bool = False,
                 given: Given | None = None):
        self.execute = execute
        self.name = name
        self.fullgraph = fullgraph
        self.guards: list[tuple[Any, Any, Any]] = []  # (expression of numbers, its value, the user's line)
        self.origins: dict[int, Any] = {}             # id(0-d input Tensor) -> where its number comes from
        self.numbers: dict[Any, Number] = {}
        self.cuts: list[Any] = []                     # where Python asked for a value in the middle
        self.given = given
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
        place = source._pending if source._array is None else self.capture(source)
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
        place: Pending = tensor._pending if tensor._array is None else self.capture(tensor)
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
        place: Pending = target._pending if target._array is None else self.capture(target)
        new = self.read(value)
        return (place, new) if self.builder is builder else self._place_and_value(target, value)

    def capture(self, tensor: Tensor) -> Pending:
        """The place of a real Tensor: an input of the graph, shared by all Tensors over the same memory."""
        place = self.known.get(id(tensor))
        if place is None:
            tensor._history_node()                    # of a view it may have to be made again, which captures the root
            array = tensor._array
            place = self._place(tensor, array) if id(tensor) not in self.origins \
                else Pending(self._new_unit(tensor))
            if place.unit.tensor is not tensor:
                if type(self.source(tensor)) is not Made:
                    self.merged.append((place.unit.tensor, tensor))
                if tensor.requires_grad:
                    self._track(place, tensor)
            self.known[id(tensor)] = place
            self.held.append(tensor)
        return place

    def _track(self, place: Pending, tensor: Tensor) -> None:
        """`tensor` has a history, and its memory was captured before by way of another Tensor."""
        unit = place.unit
        if place.chain or unit.initial in self.tracked:
            self.entangled = True
            return
        unit.tensor = tensor                          # that other was detached, and so is what was computed from it
        self.tracked.add(unit.initial)
        self.detached_before[unit.initial] = len(self.builder.nodes)

    def _detached_values(self) -> set[Value]:
        """What was computed from memory that was captured by way of a detached Tensor, before the one with the history."""
        found: set[Value] = set()
        for k, node in enumerate(self.builder.nodes if self.detached_before else ()):
            if any([v in found or self.detached_before.get(v, 0) > k for v in node.inputs]):
                found.update(node.outputs)
        return found

    def _place(self, tensor: Tensor, array: np.ndarray) -> Pending:
        if array.size == 0:
            return Pending(self._new_unit(tensor))
        low, high = bounds(array)
        unit = self.memory.get((low, high)) if array.flags.c_contiguous else None
        if unit is not None and unit.value.dtype is tensor.dtype:
            same = unit.value.shape == array.shape
            return Pending(unit, () if same else ((ops.reshape, {"shape": array.shape}),))
        if self.flat and any([a < high and low < b for a, b in self.flat]):
            return self._place_overlapping(tensor, array)
        at = bisect.bisect_left(self.spans, (low, high))
        overlaps = (at > 0 and self.spans[at - 1][1] > low) or (at < len(self.spans) and self.spans[at][0] < high)
        if overlaps:
            return self._place_overlapping(tensor, array)
        unit = self._new_unit(tensor)
        self.spans.insert(at, (low, high))
        if array.flags.c_contiguous:
            self.memory[low, high] = unit
        return Pending(unit)

    def _place_overlapping(self, tensor: Tensor, array: np.ndarray) -> Pending:
        """Tensors that share part of their memory become views of one unit: the array that owns it. One that was
        captured alone before needs a cut; from then on all of them are views."""
        owner, chain = _owner_and_movement(tensor, array)
        low, high = bounds(owner)
        if chain is None:
            raise complain(CompileError, self.name, "two of its tensors overlap in memory in a way that cannot be compiled",
                           fix="Pass a copy of one of them, or do not compile this function")
        if (low, high) not in self.flat:
            self.flat.append((low, high))
            if self.units:
                device = self.device                  # of what is being recorded, also behind this cut
                self.flush(user_location(2), "tensors share part of their memory")
                self.device = device
        unit = self.memory.get((low, high))
        if unit is None:
            unit = self.memory[low, high] = self._new_unit(Tensor(owner))
        own = () if unit.value.shape == owner.shape else ((ops.reshape, {"shape": owner.shape}),)
        return Pending(unit, (*own, *chain))

    def _new_unit(self, tensor: Tensor) -> Unit:
        unit = Unit(self.builder.input(tensor.tensor_type), tensor)
        if tensor.requires_grad:
            self.tracked.add(unit.value)
        self.units.append(unit)
        return unit

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
        self._run([])
        self._start()

    def finish(self, results: list[Any]) -> None:
        """The end of the call: run what was recorded. `results` are the leaves of what the function returns; those
        with a history get the whole call as one node of the tape, where that is the same."""
        lazy = [t for t in results if isinstance(t, Tensor) and t._array is None]
        waiting = list({id(t): t for t in lazy if self._waits(t)}.values())
        if waiting and not self._is_plain(waiting):
            waiting = []
        nodes = self._tape_of(waiting)
        if self._held_elsewhere(nodes, waiting):
            waiting = []
        for t in waiting:
            t._node = None                            # with it goes the tape, and what it saved
        del lazy, nodes
        self._run(waiting)
        self._start()

    def _tape_of(self, tensors: list[Tensor]) -> list[autograd.OpNode]:
        """All nodes of this call that the histories of `tensors` lead to."""
        found: dict[int, Any] = {}
        stack = [t._node for t in tensors]
        while stack:
            node = stack.pop()
            if id(node) not in found and node.sequence >= self.first_sequence:
                found[id(node)] = node
                stack.extend(e[0] for e in node.edges if e is not None and isinstance(e[0], autograd.TapeNode))
        return list(found.values())

    def _held_elsewhere(self, nodes: list[autograd.OpNode], results: list[Tensor]) -> bool:
        """True when somebody outside holds a Tensor of this call whose gradient may be asked for: one that is neither a
        result nor held only by the tape and by views. A root held only by its detached aliases loses its history."""
        held: dict[int, int] = {id(t): -1000 for t in results}
        for node in nodes:
            saved = getattr(node, "saved", ())        # a move keeps nothing
            for key in map(id, saved if type(saved) is tuple else ()):
                held[key] = held.get(key, 0) + 1
        frames = {id(n.saved.frame): n.saved.frame for n in nodes if type(getattr(n, "saved", ())) is autograd.Held}
        for inputs in {id(f.tensors()): f.tensors() for f in frames.values()}.values():
            for key in map(id, inputs):
                held[key] = held.get(key, 0) + 1
        alive = [t for t in (r() for r in self.live) if t is not None]
        for key in (id(t._root) for t in alive if t._root is not None):
            held[key] = held.get(key, 0) + 1
        outside = False
        for t in alive:
            # References: the list that is walked, the loop's name, and getrefcount's argument.
            if not self._waits(t) or held.get(id(t), 0) < 0:
                continue
            if sys.getrefcount(t) > held.get(id(t), 0) + 3:
                outside = True
            elif not nodes:
                t._node = None
        return outside

    def _waits(self, t: Tensor) -> bool:
        """True when `t` has a history, made in this call, that no backward pass has gone through."""
        node = t._node
        return node is not None and not node.freed and node.sequence >= self.first_sequence

    def _is_plain(self, tensors: list[Tensor]) -> bool:
        """True when the history of `tensors` is that of the graph: no hooks, no detach or no_grad on the way."""
        if self.hooked or self.entangled or self.segments or not self.repeats:
            return False
        if any(u.dirty and u.initial in self.tracked for u in self.units):
            return False
        wanted = {self.read(t) for t in tensors}
        given = {u.initial for u in self.units}
        if wanted & given or not wanted <= depends_on(self.builder.nodes, given & self.tracked):
            return False
        partial = self.partial | self._detached_values()
        for node in reversed(self.builder.nodes):
            if any(v in wanted for v in node.outputs):
                if any(v in partial for v in node.outputs):
                    return False
                wanted.update(node.inputs)
        return True

    def _run(self, crossing: list[Tensor]) -> None:
        """Run the graph recorded so far, and give the lazy Tensors that are alive their arrays. `crossing` are those
        among them whose gradients will come back to this call."""
        roots, views, outputs = self._alive()
        writes = [(k, unit.value) for k, unit in enumerate(self.units) if unit.dirty]
        wanted_effects = any(n.op.effects - {"random"} for n in self.builder.nodes)
        if not outputs and not writes and not wanted_effects and not crossing:
            for t in views:
                self._settle_view(t)
            return
        units, arrays = self.units, [unit.tensor._array for unit in self.units]
        crossing_values = [self.read(t) for t in crossing]
        given = {unit.initial: k for k, unit in enumerate(units)}
        wanted = list(dict.fromkeys([v for v in [*outputs, *crossing_values] if v not in given]))
        graph = self.builder.build(wanted, writes)
        edge = None
        position = {v: k for k, v in enumerate(wanted)}
        if crossing:
            of = tuple(sorted({position[v] for v in crossing_values}))
            wrt = tuple([k for k, u in enumerate(units) if u.initial in self.tracked])
            edge = wrt, of, tuple(self.blocks)
        again = [v for k, v in enumerate(outputs) if v not in given and v in outputs[:k]]
        copied = [given[v] for v in outputs if v in given], [position[v] for v in again]
        device = self.device or CPU
        homeward = tuple(sorted({position[v] for t, v in zip(roots, outputs) if t._type.device == CPU and v in position})) \
            if device != CPU else ()
        segment = Segment(graph, [self.source(u.tensor) for u in units], all([a.flags.c_contiguous for a in arrays]), edge,
                          *copied, Location(device, homeward))
        found, node = self._carry_out(segment, arrays)
        self.trace.append(segment)
        unused = {v: [k] for v, k in position.items()}
        for k, v in enumerate([*[v for v in outputs if v in given], *again]):
            unused.setdefault(v, []).append(len(wanted) + k)
        for t, v in zip(roots, outputs):
            which = unused[v].pop(0)
            array = t._pending.unit.array = found[which]
            t._array, t._pending, t._type = array, None, None
            self.made[id(array)] = weakref.ref(array), self.outputs + which
        self.outputs += len(found)
        for t in views:
            self._settle_view(t)
        self.revived.extend(map(weakref.ref, roots + views))
        for t, v in zip(crossing, crossing_values):
            t._node, t._index = node, node.edge.halves.seeds.index(position[v])
            t._seen = t._root._renewals if t._root is not None else 0

    def _carry_out(self, segment: Segment, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
        """The outputs of a segment with its copies and, with an edge, the tape node of the call: computed now unless they
        are given."""
        if self.given is None or len(self.segments) >= len(self.given.segments):
            before = [arrays[k].copy() for k in segment.copied_inputs]
            outputs, node = self.execute(self, segment, arrays)
            return [*outputs, *before, *[outputs[k].copy() for k in segment.copied_outputs]], node
        key, outputs = self.given.segments[len(self.segments)]
        if segment.graph.key != key:
            raise complain(CompileError, self.name, "records other ops when it is run again with the same arguments and "
                           "state", fix="Do not compile this function")
        return outputs, None

    def _alive(self) -> tuple[list[Tensor], list[Tensor], list[Value]]:
        """One lazy root for each unit that somebody still holds (itself, a view of it, or what the tape saved of it), the
        other lazy Tensors, and the values of the roots."""
        alive = [t for t in (r() for r in self.live) if t is not None and t._array is None]
        roots: dict[int, Tensor] = {}
        for t in alive:
            if t._pending.unit.tensor is None and not t._pending.chain and t._root is None and t._saved_from is None:
                roots[id(t._pending.unit)] = t
        for t in alive:
            if t._saved_from is not None and not t._pending.chain and t._pending.unit.tensor is None:
                roots.setdefault(id(t._pending.unit), t)
        chosen = {id(t) for t in roots.values()}
        views = [t for t in alive if id(t) not in chosen]
        return list(roots.values()), views, [t._pending.unit.value for t in roots.values()]

    def _settle_view(self, t: Tensor) -> None:
        """Give a lazy view its array: the same movement, on the array of its unit."""
        place: Pending = t._pending
        base = place.unit.tensor
        array = base._array if base is not None else place.unit.array
        for op, attrs in place.chain:
            array = op.eager(array, **attrs)
        t._array, t._pending, t._type = array, None, None


def _is_dense(tensor: Tensor) -> bool:
    """True when the memory of `tensor` is known to be dense, so that it can be seen at any shape."""
    if tensor._array is not None:
        return bool(tensor._array.flags.c_contiguous)
    place: Pending = tensor._pending
    return place.unit.tensor is None and all([op is ops.reshape for op, _ in place.chain])


def _owner_and_movement(tensor: Tensor, array: Any) -> tuple[Any, Any]:
    """The array that owns the memory of a Tensor's, and how it is reached from there; None: not by movement ops."""
    if type(array) is not np.ndarray:                 # an array on a GPU knows no other one, but the Tensor its root
        root = tensor if tensor._root is None else tensor._root
        return root._array, tensor._chain if root._array.flags.c_contiguous else None
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner, movement_between(owner, array)


def _store_through(base: Value, chain: Any, value: Value) -> Value:
    if not chain:
        return value
    (op, attrs), rest = chain[0], chain[1:]
    inner = _store_through(op(base, **attrs), rest, value) if rest else value
    result: Value = undo_movement(op, attrs, base, inner)
    return result
