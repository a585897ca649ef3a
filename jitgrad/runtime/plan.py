"""A plan that can be called: a `PlanSpec`, the addresses of its kernels, and memory to run it in.

    plan = Plan(spec, addresses)
    results = plan.run([x, w, b])

A call borrows a *frame* (the entries, argument blocks and error word that the native loop works on) and, if the plan
has intermediate values, an arena; both go back when it ends, so calls from several threads, from callbacks or from the
plan itself never share memory. Only addresses that change from call to call are written again, natively.
"""

from __future__ import annotations

import copy
import ctypes
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jitgrad.errors import ShapeError, complain
from jitgrad.ir.graph import Where
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import tape
from jitgrad.runtime import build, errors, threads
from jitgrad.runtime.memory import Arena, arenas, size_class
from jitgrad.runtime.spec import Argument, Entry, HostCall, Output, PlanSpec, Ref
from jitgrad.runtime.threads import aligned, pool, side_by_side

__all__ = ["Entry", "HostCall", "Output", "Plan", "PlanSpec", "Ref"]

_NOTHING = np.empty(0)                                      # stands for an output that has no memory of its own
SMALL_ARENA = 1 << 16                                       # bytes; up to here each frame keeps an arena of its own
_ARENA_SLOT, _CONSTANT_SLOT, _EXTRA_SLOTS = 0, 1, 2         # pointers behind those of inputs and outputs


class Plan:
    """See the module. `pointers` and `execute` are for callers that know addresses; `run` is for arrays. `lines` are those
    of the graph as traced, a place of the user's for every node."""

    def __init__(self, spec: PlanSpec, kernels: Mapping[str, int], lines: Sequence[Where] = ()):
        self.spec, self.lines = spec, lines
        self.kernels = dict(kernels)
        self.constants = Arena(len(spec.constants))
        self.constants.bytes[:] = np.frombuffer(spec.constants, np.uint8)
        self.pointers = np.zeros(len(spec.inputs) + len(spec.outputs), np.int64)
        self._own = [(output.type.shape, output.type.dtype.numpy) if output.source == ("output", k) else None
                     for k, output in enumerate(spec.outputs)]
        self._all_own = None not in self._own
        self._threaded = spec.is_grouped or any(entry.items > 1 for entry in spec.entries)
        self._walk = threads.walk()
        self.shares_arena = spec.arena + spec.private > SMALL_ARENA
        self._idle: list[Frame] = []
        self._idle_apart: list[Frame] = []                  # in which every entry is by itself

    def told_by(self, lines: Sequence[Where]) -> Plan:
        """The same plan, with all of its memory, for an equal graph that was recorded at other lines."""
        if lines == self.lines:
            return self
        other = copy.copy(self)
        other.lines = lines
        return other

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, which must be C-contiguous and of the right types; inputs in `spec.written` are
        overwritten. OutOfRangeError or DivisionByZeroError, with the user's line, when a kernel reports it."""
        own = [_NOTHING if new is None else np.empty(*new) for new in self._own]
        frame = self._borrow()
        try:
            arrays = (*inputs, *own)                        # which is what keeps them alive
            self._walk(frame.handle, 0, id(arrays) + threads.ITEMS, tape.ARRAYS)
            if frame.words[tape.STATUS]:
                _Call(self, frame, inputs, own).finish()
            if self._all_own:
                return own
            return [self._result(output, frame, inputs, own) for output in self.spec.outputs]
        finally:
            self._give_back(frame)

    def execute(self) -> None:
        """Run on the memory that `pointers` names: addresses of the inputs, then of the outputs. For plans without
        host calls; whoever calls it sees to it that no other thread does so with this plan."""
        frame = self._borrow()
        try:
            frame.memory[frame.pointers:frame.pointers + self.pointers.nbytes] = self.pointers.tobytes()
            self._walk(frame.handle, 0, 0, tape.ADDRESSES)
            if frame.words[tape.STATUS]:
                _Call(self, frame, (), ()).finish()
        finally:
            self._give_back(frame)

    def _borrow(self, apart: bool = False) -> Frame:
        limit = threads.limit()
        idle = self._idle_apart if apart else self._idle
        try:
            frame = idle.pop()
            if self.spec.private and frame.threads != limit:
                frame = Frame(self, limit, apart)
        except IndexError:
            frame = Frame(self, limit, apart)
        if self._threaded:
            frame.words[tape.LIMIT] = limit
        if self.shares_arena:
            frame.lend(arenas.lend(frame.arena_size))
        return frame

    def _give_back(self, frame: Frame) -> None:
        if self.shares_arena and frame.arena is not None:
            arenas.give_back(frame.arena)
            frame.arena = None
        (self._idle_apart if frame.apart else self._idle).append(frame)

    def _result(self, output: Output, frame: Frame, inputs: Sequence[np.ndarray],
                own: Sequence[np.ndarray]) -> np.ndarray:
        space, k = output.source
        if space == "input" and inputs[k].shape == output.type.shape:
            return inputs[k]
        array = locate(output.source, output.type, self, frame, inputs, own)
        return array if space in ("input", "output") else array.copy()


class Frame:
    """What the native loop needs for one call of a plan, in one piece of memory. Its layout is `kernels.cpu.tape`'s:
    header, entries, pointers, patches, an argument block per entry of the plan, and a table per group of them, which is one
    entry of the loop unless they are to run `apart`. `firsts`: for each entry of the loop the first one of the plan. The
    memory of `threads` threads lies behind what they share in the arena."""

    def __init__(self, plan: Plan, threads: int, apart: bool = False):
        spec = plan.spec
        groups = list(_groups(spec, apart))
        self.firsts = [group.start for group in groups]
        self.arena: Arena | None = None
        self.threads, self.apart = threads, apart
        self.arena_size = size_class(spec.arena + spec.private * threads)
        slots = plan.pointers.size + _EXTRA_SLOTS
        patches = list(_patches(spec, threads))
        entries_at = 8 * tape.FRAME_WORDS
        self.pointers = entries_at + tape.ENTRY_BYTES * len(groups)
        patches_at = self.pointers + 8 * slots
        blocks_at = patches_at + tape.PATCH_BYTES * len(patches)
        tables_at = blocks_at + 8 * sum(1 + len(entry.arguments) for entry in spec.entries)
        total = tables_at + sum(_table_bytes(group) for group in groups)
        array = aligned(total)
        self.address = array.ctypes.data
        self.words = array.data
        self.memory = self.words.cast("B")
        self._write_header(len(groups), entries_at, patches_at, len(patches), plan.pointers.size)
        starts = self._write_blocks(plan, blocks_at)
        for k, group in enumerate(groups):
            words = [_carried_out(spec.entries[position], self.address + starts[position], plan) for position in group]
            if len(group) > 1:
                rows = [word for row, position in zip(words, group) for word in (*row, spec.entries[position].pieces)]
                self._write(tables_at, self.address, len(group), *rows)
                pieces = sum(spec.entries[position].pieces for position in group)
                words = [(side_by_side(), self.address + tables_at, pieces)]
                tables_at += _table_bytes(group)
            self._write(entries_at + tape.ENTRY_BYTES * k, *words[0], 0)
        self._write(patches_at, *[word for entry_index, argument, slot, offset in patches
                                  for word in (self.address + starts[entry_index] + 8 * (1 + argument), slot, offset)])
        self.extra = self.pointers // 8 + plan.pointers.size
        self.words[self.extra + _CONSTANT_SLOT] = plan.constants.address
        if not plan.shares_arena:
            self.lend(Arena(self.arena_size))
        self.handle = ctypes.c_int64(self.address)          # passed to C faster than an int

    def lend(self, arena: Arena) -> None:
        """Use `arena` from now on."""
        self.arena = arena
        self.words[self.extra + _ARENA_SLOT] = arena.address

    def _write_blocks(self, plan: Plan, place: int) -> list[int]:
        """Write the argument blocks; where each of them is."""
        starts = []
        for entry in plan.spec.entries:
            starts.append(place)
            self._write(place, self.address, *[a if type(a) is int else _known_argument(a, plan.kernels)
                                               for a in entry.arguments])
            place += 8 * (1 + len(entry.arguments))
        return starts

    def _write_header(self, count: int, entries_at: int, patches_at: int, patches: int, objects: int) -> None:
        header = {tape.ENTRIES: self.address + entries_at, tape.COUNT: count,
                  tape.POINTERS: self.address + self.pointers, tape.OBJECTS: objects,
                  tape.PATCHES: self.address + patches_at, tape.PATCH_COUNT: patches,
                  tape.POOL: pool(), tape.LIMIT: 1}
        for word, value in header.items():
            self.words[word] = value

    def _write(self, offset: int, *values: int) -> None:
        struct.pack_into(f"{len(values)}q", self.memory, offset, *values)


class _Call:
    """The rest of a call whose native loop has returned before the end."""

    def __init__(self, plan: Plan, frame: Frame, inputs: Sequence[np.ndarray], own: Sequence[np.ndarray]):
        self.plan, self.frame, self.inputs, self.own = plan, frame, inputs, own

    def finish(self) -> None:
        """Do what the loop returned for and go on, until the last entry is done. Between two rounds Python handles
        signals: this is where Ctrl-C arrives."""
        words = self.frame.words
        while (status := words[tape.STATUS]) != tape.DONE:
            position = words[tape.POSITION]
            if status == tape.ERROR:
                entry = self.entry(position)
                raise errors.explain(words[tape.ERROR_CODE], words[tape.ERROR_VALUE], entry.name,
                                     entry.line(self.plan.lines))
            if status == tape.HOST:
                self.host_call(self.entry(position))
                position += 1
            elif status == tape.START:
                words[tape.LIMIT] = threads.start(words[tape.LIMIT])
            self.plan._walk(self.frame.address, position, 0, tape.RESUME)

    def entry(self, position: int) -> Entry:
        """The entry of the plan at which the loop is."""
        return self.plan.spec.entries[self.frame.firsts[position]]

    def host_call(self, entry: Entry) -> None:
        """Carry out an entry with NumPy."""
        host = entry.host
        assert host is not None
        arrays = [self.at(ref, type) for ref, type in host.inputs]
        with np.errstate(all="ignore"):
            results = REGISTRY[host.op].eager(*arrays, **host.attrs)
        results = results if isinstance(results, tuple) else (results,)
        for (ref, type), result in zip(host.outputs, results, strict=True):
            if result.shape != type.shape:
                raise complain(ShapeError, host.op, f"gave shape {result.shape} instead of {type}",
                               where=entry.line(self.plan.lines))
            np.copyto(self.at(ref, type), result, casting="same_kind")

    def at(self, ref: Ref, type: TensorType) -> np.ndarray:
        return locate(ref, type, self.plan, self.frame, self.inputs, self.own)


def locate(ref: Ref, type: TensorType, plan: Plan, frame: Frame, inputs: Sequence[np.ndarray],
           own: Sequence[np.ndarray]) -> np.ndarray:
    """The memory at `ref` as an array of `type`."""
    space, place = resolve(plan.spec, ref)
    if space in ("input", "output"):
        memory = (inputs if space == "input" else own)[place].reshape(-1).view(np.uint8)[:type.nbytes]
    else:
        arena = frame.arena if space == "arena" else plan.constants
        assert arena is not None
        memory = arena.bytes[place:place + type.nbytes]
    return memory.view(type.dtype.numpy).reshape(type.shape)


def resolve(spec: PlanSpec, ref: Ref) -> Ref:
    """Where the memory at `ref` really is: an output may have the memory of an input or of another output."""
    return spec.outputs[ref[1]].source if ref[0] == "output" else ref


def load_plan(spec: PlanSpec, lines: Sequence[Where] = ()) -> Plan | None:
    """The plan of `spec` for a graph with these `lines`, if all of its kernels can be had without compiling or their text
    is with it."""
    names = spec.kernels
    found = {key: build.find_kernel(key, name) for key, name in names.items()}
    missing = {key: spec.sources.get(key) for key, address in found.items() if address is None}
    if any(text is None for text in missing.values()):
        return None
    rebuilt = build.kernels([(text, names[key]) for key, text in missing.items() if text is not None])
    addresses = {key: address for key, address in {**found, **rebuilt}.items() if address is not None}
    return Plan(spec, addresses, lines) if set(names) <= set(addresses) else None


def _groups(spec: PlanSpec, apart: bool) -> Iterator[range]:
    """The positions of the entries that run side by side, for all groups in order; with `apart` each entry is one."""
    first = 0
    for position, entry in enumerate(spec.entries):
        last = position + 1 == len(spec.entries) or spec.entries[position + 1].group != entry.group
        if apart or last or not entry.group:
            yield range(first, position + 1)
            first = position + 1


def _table_bytes(group: range) -> int:
    return 16 + tape.PART_BYTES * len(group) if len(group) > 1 else 0


def _carried_out(entry: Entry, block: int, plan: Plan) -> tuple[int, int, int]:
    """The words of an entry: its function, its argument block, its items."""
    return 0 if entry.kernel is None else plan.kernels[entry.kernel], block, entry.items


def _known_argument(argument: Argument, kernels: Mapping[str, int]) -> int:
    """What an argument is before any call: a number, the address of a kernel; 0 for memory, which calls bring."""
    if isinstance(argument, str):
        return kernels[argument]
    return argument if isinstance(argument, int) else 0


def _patches(spec: PlanSpec, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """(entry, argument, pointer slot, byte offset) of every argument that is memory; `threads`: how many have memory of
    their own, which begins behind the arena."""
    inputs = len(spec.inputs)
    extra = inputs + len(spec.outputs)
    first_slot = {"arena": extra + _ARENA_SLOT, "constant": extra + _CONSTANT_SLOT}
    for k, entry in enumerate(spec.entries):
        for position, argument in enumerate(entry.arguments):
            if not isinstance(argument, tuple):
                continue
            space, place = resolve(spec, argument)
            if space == "private":
                yield k, position, first_slot["arena"], spec.arena + place * threads
            elif space in first_slot:
                yield k, position, first_slot[space], place
            else:
                yield k, position, place + (inputs if space == "output" else 0), 0
