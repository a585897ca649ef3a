"""The end of a sealed call: what became of the outputs of its plans, and how the next calls do the same.

Every Tensor of the recorded call that is alive at its end must be held by the result, by a ``.grad``, by an attribute of
a Module or by optimizer state, and by nothing else; then a call without the body can put its outputs there too.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from jitgrad import changes
from jitgrad.autograd import OpNode, SpentNode, TapeNode
from jitgrad.compile.edge import EdgeNode
from jitgrad.compile.evaluator import Findings
from jitgrad.compile.guards import read_number
from jitgrad.compile.number import Number, evaluate
from jitgrad.compile.places import Places, as_fetch, moved_view
from jitgrad.compile.recorder import Recorder
from jitgrad.compile.stage import moved
from jitgrad.compile.trace import Made
from jitgrad.compile.values import SIMPLE, Impure
from jitgrad.tensor import Tensor, _wrap
from jitgrad.tree import unflatten


class Ending:
    """What a call leaves behind: its result, gradients, attributes and state, in terms of the outputs of its plans.
    With `alters` the state that guards are about is not the one that the call started from."""

    def __init__(self, findings: Findings, recorder: Recorder, places: Places, leaves: list[Any], structure: Any,
                 returned: list[Any], alters: bool):
        self.findings = findings
        self.places = places
        self.recorder = recorder
        self.structure = structure
        self.alters = alters
        self.draws = [(generator, count) for generator, _, count in recorder.draws.values()]
        revived = [t for t in (r() for r in recorder.revived) if t is not None]
        self._divide(revived, recorder)
        self.histories = [(self.output_of[id(t)], h) for t, h in ((t, _history(t)) for t in revived)
                          if h is not None and id(t) in self.output_of]
        self.result = [self._item_leaf(leaf, recorder.deferred[k]) if k in recorder.deferred else self._result_leaf(leaf)
                       for k, leaf in enumerate(returned)]
        held = dict.fromkeys(map(id, revived), 0)
        for key in map(id, returned):                 # not by name: a name would be one more reference
            if key in held:
                held[key] += 1
        self._find_bindings(recorder, leaves, held)
        for key in self._holders(returned, recorder):
            if key in held:
                held[key] += 1
        for t in revived:
            if sys.getrefcount(t) > held[id(t)] + _REFERENCES_HERE:
                raise Impure(f"keeps a tensor ({t.tensor_type}) in a place that is not known to belong to the call", None)
        del self.output_of, self.views, self.places, self.findings, self.recorder
        plain = len(self.result) == 1 and structure is None and self.result[0][0] == "output"
        self.single = self.result[0][1] if plain else None
        self.bound = bool(self.gradient_bindings or self.table_bindings)

    def _divide(self, revived: list[Tensor], recorder: Recorder) -> None:
        """Those that are outputs, and those that are views or aliases of them."""
        self.output_of: dict[int, int] = {}           # id(Tensor) -> output
        self.views: list[Tensor] = []
        known: set[int] = set()
        for t in revived:
            source: Any = recorder.source(t)
            if type(source) is Made and t._root is None and source.output not in known:
                self.output_of[id(t)] = source.output
                known.add(source.output)
            else:
                self.views.append(t)

    def _holders(self, returned: list[Any], recorder: Recorder) -> list[int]:
        """The ids of Tensors that views of them, this object and the recorder hold, and histories that will be spent."""
        views = {id(t): t for t in [*self.views, *(t for t in returned if isinstance(t, Tensor))]}
        nodes = [_unwalked(t._node) or () for t in views.values() if t._node is not None]
        saved = [node.saved for node in set().union(*nodes) if isinstance(node, OpNode) and type(node.saved) is tuple]
        return [*(id(t._root) for t in views.values()), *map(id, self.views), *(id(t) for kept in saved for t in kept),
                *(id(t) for s in recorder.segments for t in s.inputs), *(id(t) for pair in recorder.merged for t in pair)]

    # --- where the outputs went ----------------------------------------------------------------------------------------

    def _made(self, t: Tensor) -> Any:
        """What the sealed call makes for a Tensor of this one: an output; of a view the memory and its history; None for
        one that was there before."""
        source = self.recorder.source(t)
        return self.output_of.get(id(t), (source, _history(t)) if type(source) is Made else None)

    def _item_leaf(self, leaf: Any, source: Any) -> Any:
        if type(source) is not Made or type(leaf) not in (float, int, bool):
            raise Impure("Python reads a value", None)
        return "item", (source, type(leaf))

    def _result_leaf(self, leaf: Any) -> Any:
        if type(leaf) is Number:
            return "number", leaf.expression
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, SIMPLE):
                raise Impure(f"returns a {type(leaf).__name__}", None)
            return "constant", leaf
        made = self._made(leaf)
        if made is not None:
            return ("output" if type(made) is int else "view"), made
        place = self.places.find(leaf)
        if place is not None:
            detached = not leaf._chain and leaf not in self.places
            return ("alias" if detached else "same"), (as_fetch(place), _history(leaf))
        raise Impure(f"returns a tensor ({leaf.tensor_type}) that cannot be found again", None)

    def _find_bindings(self, recorder: Recorder, leaves: list[Any], held: dict[int, int]) -> None:
        """What the body put into a ``.grad``, an attribute of a Module or optimizer state: how to make the same."""
        self.gradient_bindings: list[tuple[Any, Any]] = []      # a Tensor (or its place), what to put there
        self.cleared: dict[int, Tensor] = {}                    # those whose old gradient the body drops first of all
        self.table_bindings: list[tuple[Any, Any, Any]] = []    # table, name, what to put there
        reachable = self._reachable_tensors(recorder, leaves)
        optimizers = self.findings.optimizers.values()
        if any(t._hooks for t in reachable) or any(o._pre_hooks or o._post_hooks for o in optimizers):
            raise Impure("a tensor or an optimizer has hooks", None)
        if any((t if t._root is None else t._root)._node is not None for t in reachable):
            raise Impure("gives a history to a tensor that outlives the call", None)
        for t in {id(t): t for t in reachable}.values():
            if t._grad is not self.places.gradients.get(id(t)):
                place = self.places.find(t)
                owner = t if place is None or type(place) is tuple else place
                self.gradient_bindings.append((owner, self._binding(t._grad, held)))
                if owner is t and id(t) in recorder.cleared_first:
                    self.cleared[id(t)] = t
        tables = [table for m in self.findings.modules.values() for table in (m.__dict__["_buffers"], m.__dict__)]
        tables += [entry for o in optimizers for entry in o.state.values()]
        for table in tables:
            for name, value in table.items():
                before = self.places.entry(table, name)
                if value is before or (before is None and not isinstance(value, Tensor)):
                    continue
                if not isinstance(value, Tensor):
                    raise Impure(f"puts a {type(value).__name__} where a tensor was ({name})", None)
                self.table_bindings.append((table, name, self._binding(value, held)))

    def _binding(self, value: Tensor | None, held: dict[int, int]) -> Any:
        if value is None:
            return "constant", None
        spec = self._result_leaf(value)
        key = id(value) if id(value) in held else id(value._root)     # of a view made of an array the root is held
        if key in held:
            held[key] += 1
        return spec

    def _reachable_tensors(self, recorder: Recorder, leaves: list[Any]) -> list[Tensor]:
        tensors = [t for s in recorder.segments for t in s.inputs if isinstance(t, Tensor)]
        tensors += [t for t in leaves if isinstance(t, Tensor)]
        for module in self.findings.modules.values():
            tensors.extend(t for t in module._parameters.values() if t is not None)
        for optimizer in self.findings.optimizers.values():
            tensors.extend(p for g in optimizer.param_groups for p in g["params"])
        return tensors

    # --- the call ------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop old gradients before the plan makes new ones, as the body does."""
        for t in self.cleared.values():
            t._grad = None

    def finish(self, call: Any, arrays: list[np.ndarray], changed: list[Tensor], node: Any) -> Any:
        """Put the outputs where the body would have put them, and give the result."""
        for t in changed:
            (t if t._root is None else t._root)._version += 1
        for generator, count in self.draws:
            generator.advance(count)
        made = [_wrap(a) for a in arrays]
        for j, history in self.histories:
            _with_history(made[j], history, node)
        if self.single is not None:
            if self.bound:
                self._bind(made, call, node)
            return made[self.single]
        result = [self._deliver(spec, made, call, node) for spec in self.result]
        if self.bound:
            self._bind(made, call, node)
        return unflatten(self.structure, result)

    def _bind(self, made: list[Tensor], call: Any, node: Any) -> None:
        bindings = [(table, name, self._deliver(spec, made, call, node)) for table, name, spec in self.table_bindings]
        for owner, spec in self.gradient_bindings:
            target = owner if isinstance(owner, Tensor) else as_fetch(owner)(call)
            if id(target) in self.cleared:            # what the guards know of it stays true, or `alters`
                target._grad = self._deliver(spec, made, call, node)
            else:
                target._set_grad(self._deliver(spec, made, call, node))
        for table, name, value in bindings:
            table[name] = value
        if self.alters:
            changes.bump()

    def _deliver(self, spec: Any, made: list[Tensor], call: Any, node: Any) -> Any:
        kind, what = spec
        if kind in ("output", "view"):
            return self._value(what, made, node)
        if kind == "constant":
            return what
        if kind in ("same", "alias"):
            fetch, history = what
            return _with_history(fetch(call) if kind == "same" else fetch(call)._alias(), history, node)
        if kind == "item":
            source, type_ = what
            return type_(moved([t._array for t in made], source).item())
        return evaluate(what, lambda origin: read_number(origin, call[0]))

    @staticmethod
    def _value(what: Any, made: list[Tensor], node: Any) -> Tensor:
        if type(what) is int:
            return made[what]
        source, history = what
        return _with_history(moved_view(made[source.output], source.chain), history, node)


# In `Ending`: the list that is walked, the loop's name, and getrefcount's argument.
_REFERENCES_HERE = 3


def _history(t: Tensor) -> Any:
    """What the sealed call attaches to this output: None, a spent node, or the position among the outputs of the
    call's node."""
    node = t._node
    if node is None:
        return None
    if type(node) is EdgeNode:
        return t._index
    if _unwalked(node) is None:
        raise Impure("returns or keeps tensors whose gradients are still to be computed", None)
    return SpentNode(node.name, t.tensor_type)


def _unwalked(node: TapeNode) -> set[TapeNode] | None:
    """The nodes between this one and those that a walk back has freed, such as that of a sum of losses after it; None if
    there is another way back, to a leaf or over a hook."""
    waiting, found = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.freed:
            found.discard(node)
            continue
        targets = [edge[0] for edge in node.edges if edge is not None]
        if node.hooks or not targets or not all([isinstance(target, TapeNode) for target in targets]):
            return None
        waiting += [target for target in targets if target not in found]
        found.update(targets)
    return found


def _with_history(tensor: Tensor, history: Any, node: Any) -> Tensor:
    if type(history) is int:
        tensor._node, tensor._index = node, history
    elif history is not None:
        tensor._node = history
    return tensor
