"""Sealed calls: guards, then one plan. The body of the function does not run.

A call is sealed after it was replayed twice with the same graph, if the analysis of the source found it free of effects
and everything that the replayed call left behind is accounted for: every Tensor that came out of the plan is held by the
result, by a ``.grad``, by an attribute of a Module or by optimizer state, and by nothing else. From then on a call checks
the guards, gathers the plan's inputs from where they are, runs the plan, and puts its outputs where the body put them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import changes
from jitgrad.autograd import SpentNode, no_grad
from jitgrad.compile.analysis import SIMPLE, Findings, Impure
from jitgrad.compile.edge import EdgeNode
from jitgrad.compile.number import Number, evaluate
from jitgrad.compile.recorder import Recorder, Segment, Unit
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Value
from jitgrad.nn.module import Module
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor, _wrap
from jitgrad.tree import unflatten

Fetch = Callable[[Any], Any]              # (arguments, their leaves) of a call -> the Tensor


def leaf_signature(leaf: Any) -> Any:
    """What a sealed call takes for granted about one leaf of its arguments; None: such a call cannot be sealed."""
    if isinstance(leaf, Tensor):
        array = leaf._array
        if array is None or leaf._history_node() is not None:
            return None
        return array.dtype, array.shape, array.strides, leaf._requires_grad and (1 if leaf._grad is None else 2)
    kind = type(leaf)
    if kind is float or kind is int:
        return kind
    if kind in (bool, str, type(None), bytes, complex, DType):
        return kind, leaf
    if isinstance(leaf, (Module, Optimizer)) or callable(leaf):
        return id(leaf)
    return None


def fingerprint(findings: Findings, arguments: Any) -> tuple[Any, ...]:
    """The state that the counter of changes stands for: of every Module, optimizer and Tensor reached, all but values."""
    modules = tuple([_module_state(m) for m in findings.modules.values()])
    groups = tuple([_group_state(g) for o in findings.optimizers.values() for g in o.param_groups])
    tensors = tuple([(t._requires_grad, t._grad is None) for t in (p.fetch(arguments) for p in findings.tensors.values())])
    return modules, groups, tensors


def _module_state(module: Module) -> tuple[Any, ...]:
    fields = module.__dict__
    tensors = [(name, None if t is None else (t.shape, t.dtype, t._requires_grad, t._grad is None))
               for table in (fields["_parameters"], fields["_buffers"]) for name, t in table.items()]
    children = [(name, id(m)) for name, m in fields["_modules"].items()]
    others = [(name, _stable(v)) for name, v in fields.items() if name not in ("_parameters", "_buffers", "_modules")]
    return id(module), tuple(tensors), tuple(children), tuple(others)


def _group_state(group: Any) -> tuple[Any, ...]:
    params = tuple([(id(p), p._requires_grad, p._grad is None) for p in group["params"]])
    return id(group), params, tuple([(k, _option_form(v)) for k, v in group.items() if k != "params"])


def _option_form(value: Any) -> Any:
    """Of an option what decides the form of an update; numbers are inputs of the plan."""
    if type(value) is tuple:
        return tuple([_option_form(v) for v in value])
    return type(value) if type(value) in (int, float) else _stable(value)


def _stable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor"
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
        self.number_guards = [(e, expected) for e, expected, _ in recorder.guards]
        self.paths = [(path, expected) for path, expected in findings.guards.values()]
        self.draws = [(generator, count) for generator, _, count in recorder.draws.values()]
        self._find_inputs(recorder, segment, call)
        self.structure = structure
        self._find_outputs(segment, returned, leaves)
        self.written = [k for k, _ in segment.graph.writes]
        self.owners = self._memory_pattern([u.tensor._array for u in segment.units]) if self.written else None
        self.count = changes.count

    # --- where the plan's inputs are on the next call ------------------------------------------------------------------

    def _find_inputs(self, recorder: Recorder, segment: Segment, call: Any) -> None:
        places = _places(self.findings, call)
        self.inputs: list[Fetch] = []
        self.numbers: list[tuple[int, Any]] = []
        for k, unit in enumerate(segment.units):
            origin = recorder.origins.get(id(unit.tensor))
            if origin is not None:
                self.numbers.append((k, origin))
                self.inputs.append(_number_input(unit.tensor))
            elif id(unit.tensor) in places:
                self.inputs.append(places[id(unit.tensor)])
            else:
                self.inputs.append(self._private_input(unit))
        self.places = places

    @staticmethod
    def _private_input(unit: Unit) -> Fetch:
        """A Tensor that the body made from guarded values (``jg.tensor([1., 2.])``) and nobody else holds."""
        tensor = unit.tensor
        # References: the unit, the recorder's list of what it captured, the call's node on the tape, the local name, and
        # getrefcount's argument.
        if unit.dirty or sys.getrefcount(tensor) > 5:
            raise Impure(f"uses a tensor ({tensor.tensor_type}) that cannot be found again from its arguments, Modules or "
                         "variables", None)
        return lambda _: tensor

    # --- where the plan's outputs went -----------------------------------------------------------------------------------

    def _find_outputs(self, segment: Segment, returned: list[Any], leaves: list[Any]) -> None:
        index = {v: k for k, v in enumerate(segment.graph.outputs)}
        self.output_of = {id(t): index[v] for t, v in zip(segment.roots, segment.values) if v in index}
        if len(self.output_of) != len(segment.roots) or len(set(self.output_of.values())) != len(segment.roots):
            raise Impure("returns or keeps one value in several tensors", None)
        self.histories = {self.output_of[id(t)]: self._history(t) for t in segment.roots}
        self.result = [self._result_leaf(leaf, segment) for leaf in returned]
        held = {id(t): 0 for t in segment.roots + segment.views}
        for key in map(id, returned):                 # not by name: a name would be one more reference
            if key in held:
                held[key] += 1
        self.bindings = self._find_bindings(segment, leaves, held)
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
            return "same", self.places[id(leaf)]
        raise Impure(f"returns a tensor ({leaf.tensor_type}) that cannot be found again", None)

    def _find_bindings(self, segment: Segment, leaves: list[Any], held: dict[int, int]) -> list[tuple[str, Any, Any, int]]:
        bindings: list[tuple[str, Any, Any, int]] = []

        def bind(kind: str, owner: Any, name: Any, value: Any) -> None:
            if value is not None and id(value) in held:
                if id(value) not in self.output_of:
                    raise Impure("keeps a view in an attribute or a gradient", None)
                held[id(value)] += 1
                bindings.append((kind, owner, name, self.output_of[id(value)]))

        seen: set[int] = set()
        for t in self._reachable_tensors(segment, leaves):
            if id(t) not in seen:
                seen.add(id(t))
                where = self.places.get(id(t))
                bind("grad", where or (lambda _, t=t: t), None, t._grad)
        for module in self.findings.modules.values():
            for table in (module.__dict__["_buffers"], module.__dict__):
                for name, value in table.items():
                    if isinstance(value, Tensor):
                        bind("table", table, name, value)
        for optimizer in self.findings.optimizers.values():
            for entry in optimizer.state.values():
                for name, value in entry.items():
                    if isinstance(value, Tensor):
                        bind("table", entry, name, value)
        return bindings

    def _reachable_tensors(self, segment: Segment, leaves: list[Any]) -> list[Tensor]:
        tensors = [u.tensor for u in segment.units] + [t for t in leaves if isinstance(t, Tensor)]
        for module in self.findings.modules.values():
            tensors.extend(t for t in module._parameters.values() if t is not None)
        for optimizer in self.findings.optimizers.values():
            tensors.extend(p for g in optimizer.param_groups for p in g["params"])
        return tensors  # type: ignore[return-value]

    # --- the call ----------------------------------------------------------------------------------------------------------

    def matches(self, call: Any) -> bool:
        """True when all guards hold for this call."""
        try:
            for path, (identity, content) in self.paths:
                found = path.fetch(call[0])
                if found is not identity and not (isinstance(found, SIMPLE) and type(found) is type(identity)
                                                  and found == identity):
                    return False
                if type(content) is tuple and type(found) is not tuple and content != _content(found):
                    return False
            for expression, expected in self.number_guards:
                value = evaluate(expression, lambda origin: read_number(origin, call[0]))
                if value != expected or type(value) is not type(expected):
                    return False
            if changes.count != self.count:
                if fingerprint(self.findings, call[0]) != self.state:
                    return False
                self.count = changes.count
        except Exception:
            return False
        return True

    def run(self, call: Any) -> Any:
        """Carry out the call. None of the user's code runs."""
        tensors = [fetch(call) for fetch in self.inputs]
        for k, origin in self.numbers:
            tensors[k]._array[()] = read_number(origin, call[0])
        arrays = [t._array for t in tensors]
        if self.owners is not None and self._memory_pattern(arrays) != self.owners:
            return NotImplemented
        if self.edge is None:
            outputs, node = run_on_memory(self.plan, arrays, self.written), None
        else:
            outputs, node = self.owner._run_forward(self.edge, tensors, arrays)
        for k in self.written:
            t = tensors[k]
            (t._root or t)._version += 1
        for generator, count in self.draws:
            generator.advance(count)
        made = [_wrap(a) for a in outputs]
        for j, history in self.histories.items():
            _give_history(made[j], history, node)
        for kind, owner, name, j in self.bindings:
            if kind == "grad":
                target = owner(call)
                if target._grad is None:
                    changes.bump()
                target._grad = made[j]
            else:
                owner[name] = made[j]
        return unflatten(self.structure, [self._deliver(spec, made, call, node) for spec in self.result])

    def _deliver(self, spec: Any, made: list[Tensor], call: Any, node: Any) -> Any:
        kind, what = spec
        if kind == "output":
            return made[what]
        if kind == "constant":
            return what
        if kind == "same":
            return what(call)
        if kind == "number":
            return evaluate(what, lambda origin: read_number(origin, call[0]))
        root, chain, history = what
        t = made[root]
        with no_grad():
            for op, attrs in chain:
                t = op(t, **attrs)
        _give_history(t, history, node)
        return t

    @staticmethod
    def _memory_pattern(arrays: list[np.ndarray]) -> tuple[int, ...]:
        """Which arrays share an owner of memory: for each the first one that has the same."""
        first: dict[int, int] = {}
        pattern = []
        for k, a in enumerate(arrays):
            owner = a
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            pattern.append(first.setdefault(id(owner), k))
        return tuple(pattern)


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


def _content(found: Any) -> tuple[Any, ...]:
    if type(found) is dict:
        return tuple((k, id(v)) for k, v in found.items())
    return tuple(map(id, found))


def _number_input(tensor: Tensor) -> Fetch:
    own = Tensor(tensor._array.copy())
    return lambda _: own


def read_number(origin: Any, arguments: Any) -> Any:
    """The number that is at `origin` now."""
    kind, place, *rest = origin
    if kind == "argument":
        return arguments[place]
    if kind == "item":
        for key in rest[0]:
            place = place[key]
        return place
    return place.seed_value if kind == "seed" else place.offset + rest[0]


def _places(findings: Findings, call: Any) -> dict[int, Fetch]:
    """How to get at each Tensor that is reachable: by id."""
    places: dict[int, Fetch] = {}

    def add(tensor: Any, fetch: Fetch) -> None:
        if isinstance(tensor, Tensor):
            places.setdefault(id(tensor), fetch)
            if tensor._grad is not None:
                places.setdefault(id(tensor._grad), lambda a: fetch(a)._grad)

    for k, leaf in enumerate(call[1]):
        add(leaf, lambda a, k=k: a[1][k])
    for module in findings.modules.values():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, value in table.items():
                add(value, lambda a, table=table, name=name: table[name])
    for optimizer in findings.optimizers.values():
        for group in optimizer.param_groups:
            for k, p in enumerate(group["params"]):
                add(p, lambda a, members=group["params"], k=k: members[k])
            for name, value in group.items():
                add(value, lambda a, group=group, name=name: group[name])
        for entry in optimizer.state.values():
            for name, value in entry.items():
                add(value, lambda a, entry=entry, name=name: entry[name])
    for path in findings.tensors.values():
        add(path.fetch(call[0]), lambda a, path=path: path.fetch(a[0]))
    return places
