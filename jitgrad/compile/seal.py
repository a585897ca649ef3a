"""Sealed calls: guards, then plans. The body of the function does not run.

A call is sealed after it was replayed twice with the same graphs, if the analysis of the source found it free of effects
and everything that the replayed call left behind is accounted for (`Ending`). From then on a call checks the guards,
runs the plan on inputs that it gathers from where they are, and puts the outputs where the body put them.

Where Python asks for a bool or an int, the call has stages, and goes on with what was recorded for that outcome. At an
outcome that was never seen the body runs once more, given what has run, and the new branch is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import changes
from jitgrad.compile.ending import Ending
from jitgrad.compile.evaluator import Findings
from jitgrad.compile.places import Places, leaf_signature
from jitgrad.compile.recorder import Recorder
from jitgrad.compile.stage import MISMATCH, Stage
from jitgrad.compile.trace import Given, Outcome, Segment
from jitgrad.compile.values import SIMPLE, Impure
from jitgrad.hooks import HookTable
from jitgrad.nn.module import Module
from jitgrad.tensor import Tensor, _wrap

NESTED = ("nested",)
_CONTAINERS = frozenset((tuple, list, dict))
_OUTCOMES = 16                            # branches after one stage
_STAGES = 256                             # in all branches of one form


def signature_of(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """What calls that one sealed form serves have in common; None when there can be none, and `NESTED` when some of
    `leaves` are containers."""
    found = []
    for leaf in leaves:
        if type(leaf) is Tensor and leaf._node is None and leaf._root is None and not leaf._requires_grad \
                and type(leaf._array) is np.ndarray:
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
    scalers = tuple([s.guarded() for s in findings.scalers.values()])
    return modules, groups, entries, tensors, scalers


def _gradient_state(t: Tensor) -> tuple[Any, ...]:
    return t._requires_grad, t._node is None, t._grad is None, t.get_device(), \
        None if t._hooks is None else tuple(t._hooks.entries)


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


class Unfinished:
    """A sealed call that has come to where it does not know how to go on: the stages that have run with all their
    outputs, and what Python learned. `new`: because it learned that for the first time."""

    def __init__(self, stages: list[Stage], made: list[np.ndarray], outcomes: list[Any], new: bool = False):
        self.stages = stages
        self.outcomes = outcomes
        self.made = made
        self.new = new

    def given(self) -> Given:
        """The same for the recorder."""
        segments, first = [], 0
        for segment in (stage.segment for stage in self.stages):
            if segment is not None:
                segments.append((segment.graph.key, self.made[first:first + segment.count]))
                first += segment.count
        return Given(segments, self.outcomes)


class Sealed:
    """One sealed form of a function's calls; `matches`, then `run`. `start` is what the call started from: `Start`."""

    def __init__(self, owner: Any, findings: Findings, guard: Any, start: Start, recorder: Recorder, call: Any,
                 structure: Any, returned: list[Any]):
        self.findings = findings
        self.owner = owner
        self.state = start.state
        self.defers = recorder.defers
        self.held = [leaf for leaf in call[1] if not isinstance(leaf, Tensor)]  # their ids are in the key
        self.guard = guard
        self.stages = 0
        self.count = changes.count                    # when the state was last seen to be that
        roots: list[Stage] = []
        self._grow(roots, stage_parts(recorder), start, recorder, call, structure, returned)
        self.first = roots[0]
        self.unguarded = not findings.guards and not self.first.conditions and not self.first.guards
        self.order = self._order_of_arguments()

    def _order_of_arguments(self) -> list[int] | None:
        """For a function of its arguments alone with one result: which leaf each input of the plan is. Such a call has
        nothing to do but to run the plan."""
        stage, ending = self.first, self.first.ending
        if ending is None or stage.segment is None or stage.copies or ending.single is None or ending.bound or ending.draws \
                or ending.histories or stage.edge is not None or stage.written or not stage.dense \
                or len(stage.leaves) != len(stage.template):
            return None
        return [leaf for _, leaf in stage.leaves]

    # --- growing -------------------------------------------------------------------------------------------------------

    def extend(self, unfinished: Unfinished, start: Start, recorder: Recorder, call: Any, structure: Any,
               returned: list[Any]) -> None:
        """Add the branch that a call took after what was `unfinished`."""
        after, outcome = unfinished.stages[-1].next, unfinished.outcomes[-1]
        refused = after.get(outcome) == []            # it was tried, and that will not change
        if refused or len(after) >= _OUTCOMES or self.stages >= _STAGES:
            return
        if recorder.reads and not self.defers:
            self.defers = True                        # values of this branch may be read at the end the next time
            return
        branch = after.setdefault(outcome, [])
        parts = stage_parts(recorder)[len(unfinished.stages):]
        self._grow(branch, parts, start, recorder, call, structure, returned)

    def _grow(self, branch: list[Stage], parts: list[Any], start: Start, recorder: Recorder, call: Any, structure: Any,
              returned: list[Any]) -> None:
        """Append stages for `parts` of a recorded call to a branch."""
        if recorder.reads:
            raise Impure("Python reads a value", recorder.reads[0])
        places = start.places
        _require_apart(recorder, places)
        after = fingerprint(self.findings, call[0])
        if after[2] != start.state[2]:
            raise Impure("an optimizer makes its state", None)
        if after[4] != start.state[4]:
            raise Impure("a GradScaler is between scale() and update()", None)
        ending = Ending(self.findings, recorder, places, call[1], structure, returned, after != start.state)
        if after != start.state:
            self.count = -1
        stages = [Stage(self.owner, segment, guards, outcome, places, recorder) for segment, guards, outcome in parts]
        stages[-1].ending = ending
        for stage, following, (_, _, outcome) in zip(stages, stages[1:], parts):
            stage.next[outcome.value] = [following]
        branch.append(stages[0])
        self.stages += len(stages)

    # --- the call ------------------------------------------------------------------------------------------------------

    def matches(self, call: Any) -> bool:
        """True when all guards hold for this call."""
        if self.unguarded and changes.count == self.count:
            return True
        try:
            if not self.guard(call[0]) or not self.first.holds(call):
                return False
            if changes.count != self.count:
                if fingerprint(self.findings, call[0]) != self.state:
                    return False
                self.count = changes.count
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, NameError):
            return False
        return True

    def run(self, call: Any) -> Any:
        """Carry out the call; None of the user's code runs. `Unfinished` when only the body knows how to go on."""
        stage = self.first
        if self.order is not None:
            leaves = call[1]
            return _wrap(stage.plan.run([leaves[k]._array for k in self.order])[stage.ending.single])
        made: list[np.ndarray] = []
        changed: list[Tensor] = []
        if stage.ending is not None and stage.ending.cleared:
            return self._run_cleared(stage, call, made, changed)
        node = stage.run(call, made, changed)
        if node is MISMATCH:
            return Unfinished([], made, [])
        if stage.ending is not None:
            return stage.ending.finish(call, made, changed, node)
        return self._walk(call, made, changed)

    def _run_cleared(self, stage: Stage, call: Any, made: list[np.ndarray], changed: list[Tensor]) -> Any:
        """The only stage of a call that first of all drops old gradients, so that the new ones may lie where they lay."""
        stage.ending.clear()
        try:
            node = stage.run(call, made, changed)
        except BaseException:
            changes.bump()                            # gradients are gone that the guards take to be there
            raise
        if node is MISMATCH:
            changes.bump()
            return Unfinished([], made, [])
        return stage.ending.finish(call, made, changed, node)

    def _walk(self, call: Any, made: list[np.ndarray], changed: list[Tensor]) -> Any:
        """After the first stage: from decision to decision."""
        walked = [self.first]
        outcomes: list[Any] = []
        while True:
            try:
                outcome = walked[-1].ask(call, made)
            except (ValueError, OverflowError):       # int() of NaN: the body meets it again, at the user's line
                return Unfinished(walked, made, outcomes)
            outcomes.append(outcome)
            stage = next((s for s in walked[-1].next.get(outcome, ()) if _holds(s, call)), None)
            if stage is None:
                return Unfinished(walked, made, outcomes, new=True)
            try:
                node = stage.run(call, made, changed)
            except Exception:                         # an index out of range: so does this
                return Unfinished(walked, made, outcomes)
            if node is MISMATCH:
                return Unfinished(walked, made, outcomes)
            if stage.ending is not None:
                return stage.ending.finish(call, made, changed, node)
            walked.append(stage)


class Start:
    """What a call starts from: the state that the counter of changes stands for, and where the Tensors are."""

    def __init__(self, findings: Findings, call: Any):
        self.state = fingerprint(findings, call[0])
        self.places = Places(findings, call)


def stage_parts(recorder: Recorder) -> list[tuple[Segment | None, list[Any], Outcome | None]]:
    """What a call recorded, divided where Python asked for something: segment, guards, what was asked."""
    parts: list[tuple[Segment | None, list[Any], Outcome | None]] = []
    segment: Segment | None = None
    known = 0
    for event in recorder.trace:
        if isinstance(event, Outcome):
            parts.append((segment, recorder.guards[known:event.guards], event))
            segment, known = None, event.guards
        elif segment is not None:
            raise Impure("Python reads a value in the middle", None)
        else:
            segment = event
    parts.append((segment, recorder.guards[known:], None))
    return parts


def _holds(stage: Stage, call: Any) -> bool:
    try:
        return stage.holds(call)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, NameError):
        return False


def _require_apart(recorder: Recorder, places: Places) -> None:
    """Tensors that are found in two places, or share memory, need not do so on the next call."""
    if places.repeated:
        raise Impure("is given one tensor in two ways", None)
    for one, other in recorder.merged:
        apart = one in places and other in places
        if apart or (one if one._root is None else one._root) is not (other if other._root is None else other._root):
            raise Impure(f"uses two tensors that share memory ({one.tensor_type}, {other.tensor_type})", None)
