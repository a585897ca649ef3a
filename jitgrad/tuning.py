"""``mode="max-autotune"``: what the lowering of a node leaves open is measured on this machine, once.

In goes a step of a plan; out come answers to the questions that its lowering asks (`jitgrad.codegen.choice`). Question by
question, all candidates run by themselves in memory of the true sizes, in turns; one replaces the usual one if it is
faster by more than `MARGIN` in most rounds, and the answers together must be so, too. What was found is a `Decision`. It
is kept in the cache folder under the step, the processor, the number of threads and our own code; damage is a miss. A plan
holds the decisions that it was made by, so nothing is measured when a plan comes from the cache.

Other programs disturb measuring: then the usual way stays. What is chosen can change last bits of results, since sums are
taken in another order; accuracy is that of the usual way.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jitgrad import plans
from jitgrad.codegen.choice import answering
from jitgrad.errors import JitgradError
from jitgrad.ir.graph import Graph
from jitgrad.ir.types import TensorType
from jitgrad.linking import Choose, link, lower_once, lower_step, plan_spec, step_key
from jitgrad.runtime import build as kernels, cache, native, threads
from jitgrad.runtime.plan import Plan
from jitgrad.runtime.spec import Decision
from jitgrad.transforms.memory import Assignment, Slot, Step

MARGIN = 0.97                   # of the time of what it replaces, which a candidate must stay below
MOST = 2 / 3                    # of the rounds, in which it must
SECONDS = 0.25                  # for one question; but `ROUNDS[0]` rounds are made
ROUNDS = 5, 25
TURN = 300e-6                   # seconds that a turn of one candidate lasts at least
HOPELESS = 1.25                 # times the shortest turn of all, after `TRIAL` rounds: such a candidate leaves
TRIAL = 3
ALL_SECONDS = 60.0              # for one plan, compiling of candidates included; what is left is as usual, until a next time


class Timed(ABC):
    """What can be measured and is no plan of this processor's."""

    @abstractmethod
    def seconds(self, calls: int) -> float:
        """Of one call, from `calls` of them."""


@dataclass(eq=False)
class Contender:
    """A way of carrying out a step, ready to run: its answers, and the seconds of its turns."""

    answers: Mapping[str, str]
    plan: Plan | Timed
    turns: list[float] = field(default_factory=list)

    def over(self, other: Contender) -> float:
        """Its time as a fraction of the other's: the shortest turns, which were disturbed least."""
        return min(self.turns) / min(other.turns)

    def beats(self, other: Contender) -> bool:
        """True when it is faster by more than the margin, and was so in most rounds."""
        rounds = [a < MARGIN * b for a, b in zip(self.turns, other.turns, strict=True)]
        return self.over(other) < MARGIN and sum(rounds) >= MOST * len(rounds)


def stopwatch(contender: Contender, calls: int) -> float:
    """Seconds of one call, from `calls` of them. Tests put a clock of their own in its place."""
    if isinstance(contender.plan, Timed):
        return contender.plan.seconds(calls)
    begin = time.perf_counter()
    for _ in range(calls):
        contender.plan.execute()
    return (time.perf_counter() - begin) / calls


@dataclass
class Tuner:
    """Decides for the steps of one plan: call it for the answers of a step. `decisions` are those that were made or
    found, by key; `complete` is False when there was no time for all."""

    decisions: dict[str, Decision] = field(default_factory=dict)
    complete: bool = True
    end: float = field(default_factory=lambda: time.perf_counter() + ALL_SECONDS)

    def __call__(self, step: Step) -> Mapping[str, str]:
        return self.decide(Bench(step))

    def decide(self, bench: Bench) -> Mapping[str, str]:
        """The answers for the step on `bench`."""
        if not bench.questions({}):
            return {}
        key = decision_key(bench.step)
        found = self.decisions.get(key) or _read(bench.stored_as(key))
        if found is None and time.perf_counter() > self.end:
            self.complete = False
            return {}
        self.decisions[key] = found = found or _decide(bench, key)
        return dict(found.answers)


def chooser(decisions: Sequence[Decision]) -> Choose | None:
    """The answers that were decided on before, if there are any; nothing is measured."""
    known = {decision.key: dict(decision.answers) for decision in decisions if decision.answers}
    return (lambda step: known.get(decision_key(step), {})) if known else None


def decision_key(step: Step) -> str:
    """The key of what is decided about a step; equal for steps that are lowered alike."""
    return hashlib.sha256(repr(step_key(step)).encode()).hexdigest()


# ---- the cache ---------------------------------------------------------------------------------------------------


def load(key: str) -> Decision | None:
    """The decision about steps of this key that was made on such a machine; None when there is none, or a damaged one."""
    return _read(machine_key(key))


def _read(stored_as: str) -> Decision | None:
    data = cache.current().get("choices", stored_as)
    try:
        return None if data is None else Decision.from_data(json.loads(data))
    except ValueError:
        return None


def machine_key(key: str) -> str:
    """The key in the cache of a decision about steps of this key: with it our own code and its compilers, the processor,
    and the number of threads."""
    text = f"{key}\0{plans.fingerprint()}\0{native.host_name()}\0{threads.limit()} threads"
    return hashlib.sha256(text.encode()).hexdigest()


# ---- deciding ----------------------------------------------------------------------------------------------------


def _decide(bench: Bench, key: str) -> Decision:
    """Measure what there is to choose, and keep the outcome."""
    begin = time.perf_counter()
    try:
        best, gain = _best(bench)
    except JitgradError:                                    # on operands that are made up, some steps report an error
        best, gain = bench.contender({}), 1.0
    decision = Decision(key, bench.title, tuple(sorted(best.answers.items())), gain, len(bench.contenders),
                        time.perf_counter() - begin)
    cache.current().put("choices", bench.stored_as(key), json.dumps(decision.to_data()).encode())
    return decision


def _best(bench: Bench) -> tuple[Contender, float]:
    """The way of carrying out a step that is best question by question, and how many times as fast it is as the usual
    one."""
    usual = best = bench.contender({})
    done: set[str] = set()
    while question := next((q for q in bench.questions(best.answers) if q not in done), None):
        done.add(question)
        names = bench.questions(best.answers)[question]
        best = _race(best, [bench.contender({**best.answers, question: name}) for name in names])
    if best is not usual:
        best = _race(usual, [best])                         # all answers together, so that luck does not add up
    return best, usual.over(best) if best is not usual else 1.0


class Bench:
    """A step by itself: a plan for every way of lowering it, on one set of operands and results."""

    def __init__(self, step: Step):
        node = step.node
        self.contenders: dict[Any, Contender] = {}
        self.graph, self.step = _alone(step)
        name = node.attrs["body"].name if node.op.kind == "region" else node.op.name
        self.title = f"{name}({', '.join(str(v.type) for v in node.inputs)})"

    @cached_property
    def memory(self) -> list[np.ndarray]:
        """Operands and results."""
        return [operand(v.type) for v in (*self.graph.inputs, *self.step.node.outputs)]

    def stored_as(self, key: str) -> str:
        """The key in the cache of what is decided about steps of this key."""
        return machine_key(key)

    def questions(self, answers: Mapping[str, str]) -> dict[str, list[str]]:
        """What the lowering of the step asks, given these answers, where there is more than one candidate."""
        with answering(answers) as found:
            self.ask()
        return {question: names for question, names in found.asked.items() if len(names) > 1}

    def ask(self) -> None:
        """Lower the step, so that it asks."""
        lower_step(self.step)

    def lower(self, answers: Mapping[str, str]) -> Any:
        """What the step is lowered to with these answers; equal for ways that are the same."""
        return lower_once(self.step, answers)

    def contender(self, answers: Mapping[str, str]) -> Contender:
        """The one for these answers; ways that are lowered alike are one contender."""
        lowered = self.lower(answers)
        if lowered not in self.contenders:
            self.contenders[lowered] = Contender(answers, self._plan(answers))
        return self.contenders[lowered]

    def _plan(self, answers: Mapping[str, str]) -> Plan | Timed:
        assignment = Assignment([self.step], list(self.step.outputs))
        spec = plan_spec(self.graph, assignment, link(assignment, lambda step: answers), self.graph)
        texts = [(text, spec.kernels[key]) for key, text in spec.sources.items()]
        plan = Plan(spec, kernels.kernels([*texts, *threads.sources()]))
        plan.pointers[:] = [array.ctypes.data for array in self.memory]
        return plan


def _alone(step: Step) -> tuple[Graph, Step]:
    """A program of this one step, with the memory that its operands share with its results."""
    node, shared = step.node, dict(step.shared)
    inputs = tuple(dict.fromkeys(node.inputs))
    slots = {v: Slot("input", k, v.type.nbytes) for k, v in enumerate(inputs)}
    outputs = tuple([slots[node.inputs[shared[k]]] if k in shared else Slot("output", k, v.type.nbytes)
                     for k, v in enumerate(node.outputs)])
    writes = tuple([(inputs.index(node.inputs[operand]), node.outputs[k]) for k, operand in step.shared])
    graph = Graph(inputs, (node,), node.outputs, "alone", writes)
    return graph, Step(node, tuple([slots[v] for v in node.inputs]), outputs, step.shared)


def operand(type: TensorType) -> np.ndarray:
    """Memory of a type, with ordinary contents: arithmetic on special values can be slow, and zeros cannot divide."""
    return np.full(type.shape, 0.5 if type.dtype.is_floating_point else 1, type.dtype.numpy)


def _race(current: Contender, others: Sequence[Contender]) -> Contender:
    """The fastest of `others`, if it beats `current` as it must, else `current`."""
    racing = list(dict.fromkeys([current, *others]))
    if len(racing) == 1:
        return current
    for contender in racing:
        contender.turns.clear()
        stopwatch(contender, 1)                             # the first run meets cold memory
    calls = max(1, math.ceil(TURN / max(stopwatch(current, 1), 1e-7)))
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            break
        racing = [*racing[1:], racing[0]]                   # nobody always runs behind the same one
        for contender in racing:
            contender.turns.append(stopwatch(contender, calls))
        if number + 1 == TRIAL:
            least = min(min(c.turns) for c in racing)
            racing = [c for c in racing if c is current or min(c.turns) < HOPELESS * least]
    winners = [c for c in racing if c is not current and c.beats(current)]
    return min(winners, key=lambda c: min(c.turns), default=current)
