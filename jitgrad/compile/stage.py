"""The stages of a sealed call: a plan whose inputs are fetched from where they are, then a decision of Python's, or
the end.

A call in which Python asks for no value has one stage. ``bool(tensor)`` and ``int(tensor)`` divide it: what comes next
depends on the outcome and on nothing else, so the stages form a tree, with one branch for each outcome that was seen. So
does a change of the device that is computed on, which has one outcome: None.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from jitgrad.compile.guards import NumberInputs, read_number
from jitgrad.compile.location import overwrite, owner_of
from jitgrad.compile.number import evaluate
from jitgrad.compile.places import Fetch, Places, as_fetch, leaf_signature
from jitgrad.compile.recorder import Recorder
from jitgrad.compile.trace import Made, Outcome, Segment
from jitgrad.compile.values import Impure
from jitgrad.tensor import Tensor, _wrap

MISMATCH = object()                       # the memory of a call is not as it was in the call that was recorded


class Stage:
    """One stage: `holds`, then `run`; then its `ending`, or `ask` and one of the stages that `next` has for the outcome."""

    def __init__(self, owner: Any, segment: Segment | None, guards: list[Any], outcome: Outcome | None, places: Places,
                 recorder: Recorder):
        self.owner = owner
        self.guards = [(expression, expected) for expression, expected, _ in guards]
        self.ending: Any = None
        self.next: dict[Any, list[Stage]] = {}
        self.asks: tuple[type, Fetch | Made] | None = None
        self.segment = segment
        self.conditions: list[tuple[Fetch, Any]] = []           # how to fetch a Tensor, what it must look like
        self.goes_on = outcome is not None                      # there is a stage behind it
        if outcome is not None and outcome.kind is not None:
            self._ask_for(outcome.kind, outcome.source, places)
        if segment is None:
            return
        self.edge = owner._edges[segment.graph.key, segment.edge] if segment.edge else None
        self.location = segment.location
        self.plan = owner._plan(self.edge.forward if self.edge else segment.graph, segment.location)
        self.written = [k for k, _ in segment.graph.writes]
        self.copies = bool(segment.copied_inputs or segment.copied_outputs)
        self._find_inputs(segment, places, recorder)
        self._expect_memory(segment)

    # --- where the plan's inputs are on the next call ------------------------------------------------------------------

    def _find_inputs(self, segment: Segment, places: Places, recorder: Recorder) -> None:
        self.template: list[Any] = [None] * len(segment.inputs)
        self.leaves: list[tuple[int, int]] = []                 # plan input, leaf of the arguments
        self.tables: list[tuple[int, Any, Any]] = []            # plan input, table[name]: protected by the counter
        self.fetched: list[tuple[int, Fetch]] = []              # plan input, how to fetch it
        self.made: list[tuple[int, Made]] = []                  # plan input, what an earlier stage made
        numbers: list[tuple[int, Any, Any]] = []
        for k, tensor in enumerate(segment.inputs):
            if isinstance(tensor, Made):
                self.made.append((k, tensor))
                continue
            place = places.find(tensor)
            if id(tensor if tensor._root is None else tensor._root) in places.with_history:
                raise Impure(f"uses a tensor ({tensor.tensor_type}) with a history", None)
            if id(tensor) in recorder.origins:
                numbers.append((k, tensor, recorder.origins[id(tensor)]))
            elif type(place) is int:
                self.leaves.append((k, place))
            elif type(place) is tuple:
                self.tables.append((k, *place))
            elif place is not None:
                self.fetched.append((k, place))
                self.conditions += places.conditions(tensor)
            else:
                self.template[k] = self._private_input(tensor, recorder)
        self.numbers = NumberInputs(numbers)
        self.lock = threading.Lock() if numbers else None       # the number inputs are shared by all calls
        for (k, _, _), tensor in zip(numbers, self.numbers.tensors):
            self.template[k] = tensor

    def _private_input(self, tensor: Tensor, recorder: Recorder) -> Tensor:
        """A Tensor that the body made from guarded values (``jg.tensor([1., 2.])``) and nobody else holds."""
        written = any(t is tensor for s in recorder.segments for t in (s.inputs[k] for k, _ in s.graph.writes))
        inputs = sum(t is tensor for s in recorder.segments for t in s.inputs)
        # References: the segments' inputs, the call's node on the tape, two local names, and getrefcount's argument.
        if written or tensor._root is not None or _is_part(tensor._array) or sys.getrefcount(tensor) > inputs + 5:
            raise Impure(f"uses a tensor ({tensor.tensor_type}) that cannot be found again from its arguments, Modules or "
                         "variables", None)
        return tensor

    def _expect_memory(self, segment: Segment) -> None:
        """What holds of the memory of this call must hold of the next ones: which arrays are dense, and that a plan meets
        no memory twice that writes, or after which the body may have to be recorded again."""
        self.dense = segment.dense
        moving = [k for k, _ in self.leaves] + [k for k, _ in self.fetched]
        self.apart = bool(self.written) or self.goes_on
        self.moving_apart = self.goes_on or not set(self.written).isdisjoint(moving)   # another one on each call
        self.outer = [k for k in self.written if type(segment.inputs[k]) is Tensor]
        self.known: list[int] = []
        self.known_arrays: list[np.ndarray] = []
        self.owners: set[int] = set()
        arrays = [t._array if isinstance(t, Tensor) else None for t in segment.inputs]
        if self.apart and not self._memory_is_as_expected(arrays):
            raise Impure("changes memory that several of its tensors share", None)

    def _memory_is_as_expected(self, arrays: list[Any]) -> bool:
        """True when the arrays lie apart from one another, as far as the plan writes. That of the fixed places is
        looked at only when it is not the memory of the last call."""
        fixed = [arrays[k] for k, _, _ in self.tables]
        ids = list(map(id, fixed))
        if ids != self.known:
            owners = [owner_of(a) for a in fixed]
            if len(set(owners)) != len(owners) or (not all(a.flags.c_contiguous for a in fixed) and self.dense):
                return False
            self.known, self.known_arrays, self.owners = ids, fixed, set(owners)
        others = [owner_of(arrays[k]) for k, _ in self.leaves] + [owner_of(arrays[k]) for k, _ in self.fetched]
        if not self.owners.isdisjoint(others):
            return False
        return not self.moving_apart or len(set(others)) == len(others)

    def _ask_for(self, kind: type, source: Any, places: Places) -> None:
        """After this stage Python asks for a value of `kind`."""
        if type(source) is not Made:
            place = places.find(source)
            if place is None:
                raise Impure("Python reads a value of a tensor that cannot be found again", None)
            self.conditions += places.conditions(source)
            source = as_fetch(place)
        self.asks = kind, source

    # --- the call ------------------------------------------------------------------------------------------------------

    def holds(self, call: Any) -> bool:
        """True when what was known before the stage was recorded is so in this call too."""
        arguments = call[0]
        for fetch, signature in self.conditions:
            if leaf_signature(fetch(call)) != signature:
                return False
        for expression, expected in self.guards:
            value = evaluate(expression, lambda origin: read_number(origin, arguments))
            if value != expected or type(value) is not type(expected):
                return False
        return True

    def run(self, call: Any, made: list[np.ndarray], changed: list[Tensor]) -> Any:
        """Run the plan; its outputs are added to `made`, outer Tensors that it writes to `changed`. The tape's node of
        the call, if there is one; MISMATCH, and nothing has happened, when memory is not as it was."""
        if self.segment is None:
            return None
        leaves = call[1]
        tensors = self.template.copy()
        for k, leaf in self.leaves:
            tensors[k] = leaves[leaf]
        for k, table, name in self.tables:
            tensors[k] = table[name]
        for k, fetch in self.fetched:
            tensors[k] = fetch(call)
        for k, source in self.made:
            tensors[k] = _wrap(moved(made, source))
        arrays = [t._array for t in tensors]
        if self.apart and not self._memory_is_as_expected(arrays):
            return MISMATCH
        before = [arrays[k].copy() for k in self.segment.copied_inputs] if self.copies else []
        if self.lock is None:
            outputs, node = self._run_plan(tensors, arrays)
        else:
            with self.lock:
                self.numbers.read(call[0])
                outputs, node = self._run_plan(tensors, arrays)
        made += outputs
        if self.copies:
            made += [*before, *[outputs[k].copy() for k in self.segment.copied_outputs]]
        for k in self.outer:
            changed.append(tensors[k])
        return node

    def _run_plan(self, tensors: list[Tensor], arrays: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
        if self.edge is not None:
            return self.owner._run_forward(self.edge, self.location, tensors, arrays)  # type: ignore[no-any-return]
        if self.dense:
            return self.plan.run(arrays), None
        return run_on_memory(self.plan, arrays, self.written), None

    def ask(self, call: Any, made: list[np.ndarray]) -> Any:
        """What Python learns after this stage: nothing where the call only goes on on another device."""
        if self.asks is None:
            return None
        kind, source = self.asks
        array = moved(made, source) if isinstance(source, Made) else source(call)._array
        return kind(array.item())


def moved(made: list[np.ndarray], source: Made) -> np.ndarray:
    """The memory at `source`."""
    array = made[source.output]
    for op, attrs in source.chain:
        array = op.eager(array, **attrs)
    return array


def _is_part(array: Any) -> bool:
    """Whether the memory of an array is part of another one's."""
    return array.base is not None if type(array) is np.ndarray else array.is_view


def run_on_memory(plan: Any, arrays: list[np.ndarray], written: list[int]) -> list[np.ndarray]:
    """Run a plan on the memory of Tensors; memory that is not dense is copied in, and back where it was written."""
    dense = [a if a.flags.c_contiguous else a.copy() for a in arrays]
    results: list[np.ndarray] = plan.run(dense)
    for k in written:
        if dense[k] is not arrays[k]:
            overwrite(arrays[k], dense[k])
    return results
