"""Keeping what tape nodes save: by computing it again.

A tape node keeps what its gradient rules read. While a `Frame` is the keeper (`keeping`), nodes get a `Held` for it
instead, which keeps nothing. When the walk back asks the first of them for its tensors, the frame runs its function
again; every node that this makes stands for the node of the same number in the first run, and hands over its tensors.
What the frame itself keeps is the inputs of the function, which, inside of another frame, that one keeps.

Captured Tensors get their gradients because the nodes of the first run stay on the tape: only what they save is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from jitgrad.autograd.modes import enable_grad, mode
from jitgrad.autograd.tape import Edge, TapeNode, edge_of
from jitgrad.errors import CheckpointError, complain, user_location
from jitgrad.ir import interpreter

if TYPE_CHECKING:
    from jitgrad.tensor import Tensor

Tensors = tuple[Any, ...]               # Tensors, and None where nothing is saved
Run = Callable[[Tensors], Any]


class Enough(BaseException):
    """All that the walk back needs has been computed again. No `Exception`, so that users' handlers let it pass."""


class Held:
    """What stands in a tape node for what it would save. `edges`: where the gradients of these tensors go."""

    __slots__ = ("__weakref__", "edges", "frame", "tensors", "versions")

    def __init__(self, frame: Frame, edges: Sequence[Edge]):
        self.frame = frame
        self.edges = edges
        self.tensors: Tensors | None = None
        self.versions: tuple[int, ...] = ()

    def fetch(self, gradients: Sequence[Any]) -> Tensors:
        """The tensors, with their histories where gradients are recorded. `gradients` have arrived at the node."""
        if self.tensors is None:
            self.frame.recompute(gradients)
        assert self.tensors is not None
        tensors, self.tensors = self.tensors, None    # they are needed once; another walk computes them again
        for t, version in zip([t for t in tensors if t is not None], self.versions):
            if t._count() != version:
                raise complain(CheckpointError, "checkpoint", f"a value needed for a gradient ({t.tensor_type}) was changed "
                               "in place after it was used", where=self.frame.where,
                               fix="Use the out-of-place form of that change, or clone() the value before it")
        if not mode.enabled:
            return tensors
        return tuple([_with_history(t, edge) for t, edge in zip(tensors, self.edges, strict=True)])


def _with_history(tensor: Tensor | None, edge: Edge) -> Tensor | None:
    if tensor is None or edge is None:
        return tensor
    target, index = edge
    if not isinstance(target, TapeNode):
        return target
    tensor = tensor._for_tape()
    tensor._node, tensor._index = target, index
    return tensor


class Frame:
    """One application of a function whose nodes save nothing.

    `run` calls the function with other Tensors in the places of `inputs`; `again` gives the context (random state, the
    user's) that it runs in for the second time. `check`: compare what the two runs save. `stop_early`: end the second
    run when all is there."""

    def __init__(self, run: Run, inputs: Tensors, again: Callable[[], AbstractContextManager[Any]], check: bool,
                 debug: bool, stop_early: bool):
        self.run = run
        self.again = again
        self.check = check
        self.debug = debug
        self.stop_early = stop_early
        self.where = user_location()
        self.recorded: bool = interpreter.state.current.records  # type: ignore[union-attr]
        self.held: list[weakref.ref[Held]] = []
        self.saved: list[tuple[str, Tensors]] = []    # per node: its name, and the types of what it saves
        self.lines: list[Any] = []                    # for `debug`: the user's line of each
        self.trees = tuple([t.requires_grad for t in inputs])
        self.versions = tuple([t._count() for t in inputs])
        self.finished = False
        self.inputs: Tensors | Held = keep("checkpoint", inputs, [edge_of(t) for t in inputs])

    def tensors(self) -> Tensors:
        """The inputs that this frame and those around it keep."""
        return self.inputs.frame.tensors() if isinstance(self.inputs, Held) else self.inputs

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """What the function runs in for the first time."""
        with keeping(self):
            yield
        self.finished = True

    def keep(self, name: str, tensors: Tensors, edges: Sequence[Edge], may_end: bool) -> Held:
        """What a node that would save `tensors` gets."""
        held = Held(self, edges)
        self.held.append(weakref.ref(held))
        self.saved.append((name, _types_of(tensors)))
        if self.debug:
            self.lines.append(user_location(2))
        return held

    def recompute(self, gradients: Sequence[Any]) -> None:
        """Run the function again, and give every `Held` that is still there its tensors."""
        inputs = self.inputs.fetch(gradients) if isinstance(self.inputs, Held) else self.inputs
        if not isinstance(self.inputs, Held) and self.versions != tuple([t._count() for t in inputs]):
            raise complain(CheckpointError, "checkpoint", "an input of the function was changed in place after the function "
                           "ran, so it cannot run again", where=self.where, fix="Pass a clone() of it")
        second = _SecondRun(self)
        leaves = tuple([_leaf(t, wants) for t, wants in zip(inputs, self.trees)])
        arrived = [g for g in gradients if g is not None]
        fence = interpreter.state.current.fence       # type: ignore[union-attr]
        with fence(arrived, self.recorded), enable_grad(), self.again(), keeping(second), suppress(Enough):
            self.run(leaves)
        second.finish()


class _SecondRun:
    """The keeper while a frame's function runs again."""

    def __init__(self, frame: Frame):
        self.frame = frame
        self.count = 0
        self.expected = len(frame.held)

    def keep(self, name: str, tensors: Tensors, edges: Sequence[Edge], may_end: bool) -> Tensors:
        """Hand `tensors` over to the node of the same number; this one keeps them, too, as nodes do."""
        k, self.count = self.count, self.count + 1
        if k < self.expected:
            self._compare(k, name, tensors)
            held = self.frame.held[k]()
            if held is not None:
                held.tensors = tuple([None if t is None else _without_tape(t) for t in tensors])
                held.versions = tuple([t._count() for t in tensors if t is not None])
        elif self.frame.check and self.frame.finished:
            self._refuse(f"{_describe(name, _types_of(tensors))} was recorded, where the first run had ended")
        if may_end and self.frame.stop_early and self.count >= self.expected:
            raise Enough
        return tensors

    def finish(self) -> None:
        """After the run: all that is needed must have come."""
        if self.count < self.expected:
            name, types = self.frame.saved[self.count]
            self._refuse(f"it ended before {_describe(name, types)}, the {_ordinal(self.count)} of {self.expected} values "
                         "to be computed again")

    def _compare(self, k: int, name: str, tensors: Tensors) -> None:
        expected, types = self.frame.saved[k]
        found = _types_of(tensors)
        if self.frame.check and (name, found) != (expected, types):
            line = self.frame.lines[k] if self.frame.debug else None
            first = _describe(expected, types)
            self._refuse(f"{_describe(name, found)} was recorded, where the first run had {first}", line)

    def _refuse(self, what: str, line: Any = None) -> None:
        shown = f" (line {line[1]} of {line[0]})" if line else ""
        fix = "Let the function do the same whenever it gets the same inputs" if self.frame.debug else \
            "Let the function do the same whenever it gets the same inputs; debug=True names the line"
        raise complain(CheckpointError, "checkpoint", f"the function did other things when it ran again: {what}{shown}",
                       where=self.frame.where, fix=fix)


def keep(name: str, tensors: Tensors, edges: Sequence[Edge], may_end: bool = True) -> Tensors | Held:
    """What a tape node keeps of the `tensors` that it has to save, whose gradients go to `edges`. With `may_end` a second
    run that is complete ends here, by `Enough`."""
    keeper = mode.keeper
    if keeper is None:
        return tensors
    kept: Tensors | Held = keeper.keep(name, tensors, edges, may_end)
    return kept


@contextmanager
def keeping(keeper: Any) -> Iterator[None]:
    """Inside, `keeper` keeps what nodes save (None: the nodes do)."""
    outer, mode.keeper = mode.keeper, keeper
    try:
        yield
    finally:
        mode.keeper = outer


def _leaf(tensor: Tensor, wants_gradient: bool) -> Tensor:
    """The same memory as a leaf: the history of the second run begins here."""
    leaf = tensor._alias()
    leaf._requires_grad = wants_gradient
    return leaf


def _without_tape(tensor: Tensor) -> Tensor:
    """The same memory, not the history of the second run, which is over then."""
    return tensor if tensor._history_node() is None else tensor._for_tape()


def _edges_of(tensors: Tensors) -> list[Edge]:
    return [None if t is None else edge_of(t) for t in tensors]


def _types_of(tensors: Tensors) -> Tensors:
    return tuple([None if t is None else t.tensor_type for t in tensors])


def _describe(name: str, types: Tensors) -> str:
    return f"{name} of {', '.join([str(t) for t in types if t is not None])}"


def _ordinal(k: int) -> str:
    return f"{k + 1}th" if k % 10 > 2 or k // 10 % 10 == 1 else f"{k + 1}{('st', 'nd', 'rd')[k % 10]}"
