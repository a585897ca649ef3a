"""Sealed calls: guards, then one plan. The body of the function does not run.

A call is sealed after it was replayed twice with the same graph, if the analysis of the source found it free of effects
and everything that the replayed call left behind is accounted for: every Tensor that came out of the plan is held by the
result, by a ``.grad``, by an attribute of a Module or by optimizer state, and by nothing else. From then on a call checks
the guards, gathers the plan's inputs from where they are, runs the plan, and puts its outputs where the body put them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jitgrad import changes
from jitgrad.autograd import SpentNode, no_grad
from jitgrad.compile.edge import EdgeNode
from jitgrad.compile.evaluator import Findings
from jitgrad.compile.guards import NumberInputs, compile_guard, read_number
from jitgrad.compile.number import Number, evaluate
from jitgrad.compile.recorder import Recorder, Segment, Unit
from jitgrad.compile.values import SIMPLE, Impure
from jitgrad.dtypes import DType
from jitgrad.hooks import HookTable
from jitgrad.nn.module import Module
from jitgrad.tensor import Tensor, _wrap
from jitgrad.tree import unflatten

NESTED = ("nested",)
_CONTAINERS = frozenset((tuple, list, dict))

Fetch = Callable[[Any], Any]              # (arguments, their leaves) of a call -> the Tensor


def leaf_signature(leaf: Any) -> Any:
    """What a sealed call takes for granted about one leaf of its arguments; None: such a call cannot be sealed."""
    if isinstance(leaf, Tensor):
        array = leaf._array
        if array is None or leaf._history_node() is not None or leaf._hooks:
            return None
        return array.dtype, array.shape, array.strides, leaf._requires_grad and (1 if leaf._grad is None else 2)
    kind = type(leaf)
    if kind is float or kind is int:
        return kind
    if kind in (bool, str, type(None), bytes, complex, DType):
        return kind, leaf
    return None if isinstance(leaf, np.ndarray) else id(leaf)


def signature_of(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """What calls that one sealed form serves have in common; None when there can be none, and `NESTED` when some of
    `leaves` are containers."""
    found = []
    for leaf in leaves:
        if type(leaf) is Tensor and leaf._node is None and leaf._root is None and not leaf._requires_grad \
                and leaf._array is not None:
            array = leaf._array                       # `leaf_signature` of the usual argument, spelled out for speed
            found.append((array.dtype, array.shape, array.strides, False))
        elif type(leaf) in _CONTAINERS:
            return NESTED
        else:
            signature = leaf_signature(leaf)
            if signature is None:
                return None
            found.append(signature)
    return tuple(found)


def fingerprint(findings: Findings, arguments: Any) -> tuple[Any, ...]:
    """The state that the counter of changes stands for: of every Module, optimizer and Tensor reached, all but values."""
    modules = tuple([_module_state(m) for m in findings.modules.values()])
    groups = tuple([_group_state(g) for o in findings.optimizers.values() for g in o.param_groups])
    entries = tuple([id(entry) for o in findings.optimizers.values() for entry in o.state.values()])
    tensors = tuple([_gradient_state(t) for t in (p.fetch(arguments) for p in findings.tensors.values())])
    return modules, groups, entries, tensors


def _gradient_state(t: Tensor) -> tuple[Any, ...]:
    return t._requires_grad, t._grad is None, None if t._hooks is None else tuple(t._hooks.entries)


def _module_state(module: Module) -> tuple[Any, ...]:
    fields = module.__dict__
    tensors = [(name, None if t is None else (t.shape, t.dtype, *_gradient_state(t)))
               for table in (fields["_parameters"], fields["_buffers"]) for name, t in table.items()]
    children = [(name, id(m)) for name, m in fields["_modules"].items()]
    others = [(name, _stable(v)) for name, v in fields.items() if name not in ("_parameters", "_buffers", "_modules")]
    return id(module), tuple(tensors), tuple(children), tuple(others)


def _group_state(group: Any) -> tuple[Any, ...]:
    params = tuple([(id(p), *_gradient_state(p)) for p in group["params"]])
    return id(group), params, tuple([(k, _option_form(v)) for k, v in group.items() if k != "params"])


def _option_form(value: Any) -> Any:
    """Of an option what decides the form of an update; numbers are inputs of the plan."""
    if type(value) is tuple:
        return tuple([_option_form(v) for v in value])
    return type(value) if type(value) in (int, float) else _stable(value)


def _stable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, *_gradient_state(value)
    if isinstance(value, HookTable):
        return tuple(value.entries)
    return value if isinstance(value, SIMPLE) and not isinstance(value, (slice, range)) else id(value)


class Sealed:
    """One sealed form of a function's calls; `matches`, then `run`."""

    def __init__(self, owner: Any, findings: Findings, recorder: Recorder, call: Any, structure: Any,
                 returned: list[Any], state: tuple[Any, ...]):
        segment = recorder.last
        assert segment is not None
        self.findings = findings
        self.owner = owner
        self.edge = owner._edges[segment.graph.key, segment.edge] if segment.edge else None
        self.plan = owner._plan(self.edge.forward if self.edge else segment.graph)
        self.state = state
        leaves = call[1]
        self.held = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self.guard = compile_guard(findings.guards.values())
        self.number_guards = [(e, expected) for e, expected, _ in recorder.guards]
        self.draws = [(generator, count) for generator, _, count in recorder.draws.values()]
        self.written = [k for k, _ in segment.graph.writes]
        self._find_inputs(recorder, segment, call)
        self._require_apart(recorder, call)
        self.structure = structure
        self._find_outputs(segment, returned, leaves, self._read_leaves(recorder))
        self._expect_memory([u.tensor._array for u in segment.units])
        self.count = changes.count
        self.unguarded = not findings.guards and not self.fetched and not self.number_guards
        self.bound = bool(self.gradient_bindings or self.table_bindings)
        self.order = self._order_of_arguments()

    def _order_of_arguments(self) -> list[int] | None:
        """For a function of its arguments alone with one result: which leaf each input of the plan is. Such a call has
        nothing to do but to run the plan."""
        alone = len(self.leaves) == len(self.template) and self.dense and self.edge is None and self.single is not None
        if not alone or self.written or self.draws or self.histories or self.bound:
            return None
        return [leaf for _, leaf in self.leaves]

    # --- where the plan's inputs are on the next call ------------------------------------------------------------------

    def _find_inputs(self, recorder: Recorder, segment: Segment, call: Any) -> None:
        self.places = _places(self.findings, call)
        self.template: list[Any] = [None] * len(segment.units)
        self.leaves: list[tuple[int, int]] = []                 # plan input, leaf of the arguments
        self.tables: list[tuple[int, Any, Any]] = []            # plan input, table[name]: protected by the counter
        self.fetched: list[tuple[int, Fetch, Any]] = []         # plan input, how to fetch it, what it must look like
        numbers: list[tuple[int, Any, Any]] = []
        for k, unit in enumerate(segment.units):
            tensor = unit.tensor
            place = self.places.get(id(tensor))
            if place is None and tensor._root is not None and tensor._array is tensor._root._array:
                place = self.places.get(id(tensor._root))       # detach() and state_dict() make such aliases
            if id(tensor) in recorder.origins:
                numbers.append((k, tensor, recorder.origins[id(tensor)]))
            elif type(place) is int:
                self.leaves.append((k, place))
            elif type(place) is tuple:
                self.tables.append((k, *place))
            elif place is not None:
                self.fetched.append((k, place, leaf_signature(tensor)))
            else:
                self.template[k] = self._private_input(unit)
        self.numbers = NumberInputs(numbers)
        self.lock = threading.Lock() if numbers else None       # the number inputs are shared by all calls
        for (k, _, _), tensor in zip(numbers, self.numbers.tensors):
            self.template[k] = tensor

    def _require_apart(self, recorder: Recorder, call: Any) -> None:
        """Tensors that are found in two places, or share memory, need not do so on the next call."""
        arguments = [id(leaf) for leaf in call[1] if isinstance(leaf, Tensor)]
        elsewhere = _places(self.findings, (call[0], []))
        if len(set(arguments)) < len(arguments) or not elsewhere.keys().isdisjoint(arguments):
            raise Impure("is given one tensor in two ways", None)
        for one, other in recorder.merged:
            apart = id(one) in self.places and id(other) in self.places
            if apart or (one if one._root is None else one._root) is not (other if other._root is None else other._root):
                raise Impure(f"uses two tensors that share memory ({one.tensor_type}, {other.tensor_type})", None)

    @staticmethod
    def _private_input(unit: Unit) -> Tensor:
        """A Tensor that the body made from guarded values (``jg.tensor([1., 2.])``) and nobody else holds."""
        tensor: Tensor = unit.tensor
        assert tensor is not None
        # References: the unit, the recorder's list of what it captured, the call's node on the tape, the local name, and
        # getrefcount's argument.
        if unit.dirty or tensor._root is not None or tensor._array.base is not None or sys.getrefcount(tensor) > 5:
            raise Impure(f"uses a tensor ({tensor.tensor_type}) that cannot be found again from its arguments, Modules or "
                         "variables", None)
        return tensor

    def _expect_memory(self, arrays: list[np.ndarray]) -> None:
        """What holds of the memory of this call must hold of the next ones: which arrays are dense, and that a plan that
        writes meets no memory twice."""
        self.dense = all(a.flags.c_contiguous for a in arrays)
        written = set(self.written)
        moving = [k for k, _ in self.leaves] + [k for k, _, _ in self.fetched]
        self.writes_moving = not written.isdisjoint(moving)     # memory that may be another one on each call
        self.known: list[int] = []
        self.known_arrays: list[np.ndarray] = []
        self.owners: set[int] = set()
        if self.written and not self._memory_is_as_expected(arrays):
            raise Impure("changes memory that several of its tensors share", None)

    def _memory_is_as_expected(self, arrays: list[np.ndarray]) -> bool:
        """True when the arrays lie apart from one another, as far as the plan writes. That of the fixed places is
        looked at only when it is not the memory of the last call."""
        fixed = [arrays[k] for k, _, _ in self.tables]
        ids = list(map(id, fixed))
        if ids != self.known:
            owners = [_owner(a) for a in fixed]
            if len(set(owners)) != len(owners) or (not all(a.flags.c_contiguous for a in fixed) and self.dense):
                return False
            self.known, self.known_arrays, self.owners = ids, fixed, set(owners)
        others = [_owner(arrays[k]) for k, _ in self.leaves] + [_owner(arrays[k]) for k, _, _ in self.fetched]
        if not self.owners.isdisjoint(others):
            return False
        return not self.writes_moving or len(set(others)) == len(others)

    # --- where the plan's outputs went -----------------------------------------------------------------------------------

    def _refuse_hooks(self, tensors: list[Tensor]) -> None:
        if any(t._hooks for t in tensors) or any(o._pre_hooks or o._post_hooks for o in self.findings.optimizers.values()):
            raise Impure("a tensor or an optimizer has hooks", None)

    def _read_leaves(self, recorder: Recorder) -> dict[int, int]:
        """The leaves of the result that are values of Tensors, with the ids of these: one that was read and returned at
        once, or any number that were deferred."""
        returned = [k for k, is_read in enumerate(self.findings.reads) if is_read]
        read = {k: tensor for k, (tensor, _) in zip(returned, recorder.reads, strict=False)} | recorder.deferred
        if sorted(read) != returned or len(recorder.reads) + len(set(recorder.deferred)) != len(returned) \
                or len(recorder.reads) > 1:
            raise Impure("Python reads a value", recorder.reads[0][1] if recorder.reads else None)
        return read

    def _find_outputs(self, segment: Segment, returned: list[Any], leaves: list[Any], read: dict[int, int]) -> None:
        index = {v: k for k, v in enumerate(segment.graph.outputs)}
        self.output_of = {id(t): index[v] for t, v in zip(segment.roots, segment.values) if v in index}
        if len(self.output_of) != len(segment.roots) or len(set(self.output_of.values())) != len(segment.roots):
            raise Impure("returns or keeps one value in several tensors", None)
        self.histories = [(self.output_of[id(t)], h) for t, h in ((t, self._history(t)) for t in segment.roots)
                          if h is not None]
        if read and len(self.findings.reads) != len(returned):
            raise Impure("Python reads a value", None)
        self.result = [self._read_leaf(leaf, read[k]) if k in read else self._result_leaf(leaf, segment)
                       for k, leaf in enumerate(returned)]
        held = {id(t): 0 for t in segment.roots + segment.views}
        for key in map(id, returned):                 # not by name: a name would be one more reference
            if key in held:
                held[key] += 1
        self._find_bindings(segment, leaves, held)
        plain = len(self.result) == 1 and self.structure is None and self.result[0][0] == "output"
        self.single = self.result[0][1] if plain else None
        for t in segment.views:
            if t._root is not None and id(t._root) in held:
                held[id(t._root)] += 1
        for t in segment.roots + segment.views:
            if sys.getrefcount(t) > held[id(t)] + _REFERENCES_HERE:
                raise Impure(f"keeps a tensor ({t.tensor_type}) in a place that is not known to belong to the call", None)

    @staticmethod
    def _history(t: Tensor) -> Any:
        """What the sealed call attaches to this output: None, a spent node, or the position among the
        outputs of the call's node."""
        node = t._node
        if node is None:
            return None
        if type(node) is EdgeNode:
            return t._index
        if not node.freed:
            raise Impure("returns or keeps tensors whose gradients are still to be computed", None)
        return SpentNode(node.name, t.tensor_type)

    def _read_leaf(self, leaf: Any, tensor: int) -> Any:
        if tensor not in self.output_of or type(leaf) not in (float, int, bool):
            raise Impure("Python reads a value", None)
        return "item", (self.output_of[tensor], type(leaf))

    def _result_leaf(self, leaf: Any, segment: Segment) -> Any:
        if type(leaf) is Number:
            return "number", leaf.expression
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, SIMPLE):
                raise Impure(f"returns a {type(leaf).__name__}", None)
            return "constant", leaf
        if id(leaf) in self.output_of:
            return "output", self.output_of[id(leaf)]
        for t in segment.views:
            if t is leaf and t._root is not None and id(t._root) in self.output_of:
                return "view", (self.output_of[id(t._root)], t._chain, self._history(t))
        if id(leaf) in self.places:
            return "same", as_fetch(self.places[id(leaf)])
        raise Impure(f"returns a tensor ({leaf.tensor_type}) that cannot be found again", None)

    def _find_bindings(self, segment: Segment, leaves: list[Any], held: dict[int, int]) -> None:
        """Which outputs are held by a ``.grad``, by an attribute of a Module or by optimizer state."""
        self.gradient_bindings: list[tuple[Any, int]] = []      # a Tensor (or its place), output
        self.table_bindings: list[tuple[Any, Any, int]] = []    # table, name, output

        def output(value: Any) -> int | None:
            if id(value) not in held:
                return None
            if id(value) not in self.output_of:
                raise Impure("keeps a view in an attribute or a gradient", None)
            held[id(value)] += 1
            return self.output_of[id(value)]

        reachable = self._reachable_tensors(segment, leaves)
        self._refuse_hooks(reachable)
        for t in {id(t): t for t in reachable}.values():
            j = output(t._grad)
            if j is not None:
                place = self.places.get(id(t))
                self.gradient_bindings.append((t if place is None or type(place) is tuple else place, j))
        tables = [table for m in self.findings.modules.values() for table in (m.__dict__["_buffers"], m.__dict__)]
        tables += [entry for o in self.findings.optimizers.values() for entry in o.state.values()]
        for table in tables:
            for name, value in table.items():
                j = output(value) if isinstance(value, Tensor) else None
                if j is not None:
                    self.table_bindings.append((table, name, j))

    def _reachable_tensors(self, segment: Segment, leaves: list[Any]) -> list[Tensor]:
        tensors = [u.tensor for u in segment.units] + [t for t in leaves if isinstance(t, Tensor)]
        for module in self.findings.modules.values():
            tensors.extend(t for t in module._parameters.values() if t is not None)
        for optimizer in self.findings.optimizers.values():
            tensors.extend(p for g in optimizer.param_groups for p in g["params"])
        return tensors

    # --- the call ----------------------------------------------------------------------------------------------------------

    def matches(self, call: Any) -> bool:
        """True when all guards hold for this call."""
        if self.unguarded and changes.count == self.count:
            return True
        arguments = call[0]
        try:
            if not self.guard(arguments):
                return False
            for _, fetch, signature in self.fetched:
                if leaf_signature(fetch(call)) != signature:
                    return False
            for expression, expected in self.number_guards:
                value = evaluate(expression, lambda origin: read_number(origin, arguments))
                if value != expected or type(value) is not type(expected):
                    return False
            if changes.count != self.count:
                if fingerprint(self.findings, arguments) != self.state:
                    return False
                self.count = changes.count
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, NameError):
            return False
        return True

    def run(self, call: Any) -> Any:
        """Carry out the call; None of the user's code runs. NotImplemented when its memory is not as it was."""
        leaves = call[1]
        if self.order is not None:
            return _wrap(self.plan.run([leaves[k]._array for k in self.order])[self.single])
        tensors = self.template.copy()
        for k, leaf in self.leaves:
            tensors[k] = leaves[leaf]
        for k, table, name in self.tables:
            tensors[k] = table[name]
        for k, fetch, _ in self.fetched:
            tensors[k] = fetch(call)
        arrays = [t._array for t in tensors]
        if self.written and not self._memory_is_as_expected(arrays):
            return NotImplemented
        if self.lock is None:
            outputs, node = self._run_plan(tensors, arrays)
        else:
            with self.lock:
                self.numbers.read(call[0])
                outputs, node = self._run_plan(tensors, arrays)
        for k in self.written:
            t = tensors[k]
            (t if t._root is None else t._root)._version += 1
        for generator, count in self.draws:
            generator.advance(count)
        made = [_wrap(a) for a in outputs]
        for j, history in self.histories:
            _give_history(made[j], history, node)
        if self.bound:
            self._bind(made, call)
        if self.single is not None:
            return made[self.single]
        return unflatten(self.structure, [self._deliver(spec, made, call, node) for spec in self.result])

    def _run_plan(self, tensors: list[Tensor], arrays: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
        if self.edge is not None:
            return self.owner._run_forward(self.edge, tensors, arrays)  # type: ignore[no-any-return]
        if self.dense:
            return self.plan.run(arrays), None
        return run_on_memory(self.plan, arrays, self.written), None

    def _bind(self, made: list[Tensor], call: Any) -> None:
        """Put outputs where the body would have put them."""
        for owner, j in self.gradient_bindings:
            target = owner if isinstance(owner, Tensor) else as_fetch(owner)(call)
            if target._grad is None:
                changes.bump()
            target._grad = made[j]
        for table, name, j in self.table_bindings:
            table[name] = made[j]

    def _deliver(self, spec: Any, made: list[Tensor], call: Any, node: Any) -> Any:
        kind, what = spec
        if kind == "output":
            return made[what]
        if kind == "constant":
            return what
        if kind == "same":
            return what(call)
        if kind == "item":
            return what[1](made[what[0]]._array.item())
        if kind == "number":
            return evaluate(what, lambda origin: read_number(origin, call[0]))
        root, chain, history = what
        t = made[root]
        with no_grad():
            for op, attrs in chain:
                t = op(t, **attrs)
        _give_history(t, history, node)
        return t


# In _find_outputs: the segment's list, the list that is walked, the loop's name, and getrefcount's argument.
_REFERENCES_HERE = 4


def _give_history(tensor: Tensor, history: Any, node: Any) -> None:
    if type(history) is int:
        tensor._node, tensor._index = node, history
    elif history is not None:
        tensor._node = history


def run_on_memory(plan: Any, arrays: list[np.ndarray], written: list[int]) -> list[np.ndarray]:
    """Run a plan on the memory of Tensors; memory that is not dense is copied in, and back where it was written."""
    dense = [a if a.flags.c_contiguous else a.copy() for a in arrays]
    results: list[np.ndarray] = plan.run(dense)
    for k in written:
        if dense[k] is not arrays[k]:
            np.copyto(arrays[k], dense[k])
    return results


def _owner(array: np.ndarray) -> int:
    """The identity of the array that owns the memory."""
    base = array.base
    while isinstance(base, np.ndarray):
        array, base = base, base.base
    return id(array) if base is None else id(base)


def as_fetch(place: Any) -> Fetch:
    """A place (a leaf's number, (table, name), or a function) as a function of the call."""
    if type(place) is int:
        return lambda call: call[1][place]
    if type(place) is tuple:
        table, name = place
        return lambda call: table[name]
    return place  # type: ignore[no-any-return]


def _places(findings: Findings, call: Any) -> dict[int, Any]:
    """Where each reachable Tensor is, by id: the number of a leaf, (table, name), or a function of the call."""
    places: dict[int, Any] = {}

    def add(tensor: Any, place: Any) -> None:
        if isinstance(tensor, Tensor):
            places.setdefault(id(tensor), place)
            if tensor._grad is not None:
                fetch = as_fetch(place)
                places.setdefault(id(tensor._grad), lambda call: fetch(call)._grad)

    for k, leaf in enumerate(call[1]):
        add(leaf, k)
    for module in findings.modules.values():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, value in table.items():
                add(value, (table, name))
    for optimizer in findings.optimizers.values():
        for group in optimizer.param_groups:
            for k, p in enumerate(group["params"]):
                add(p, (group["params"], k))
            for name, value in group.items():
                add(value, (group, name))
        for entry in optimizer.state.values():
            for name, value in entry.items():
                add(value, (entry, name))
    for path in findings.tensors.values():
        if not path.is_leaf:
            add(path.fetch(call[0]), lambda call, path=path: path.fetch(call[0]))
    return places
