"""The tape: a node for every step that gradients flow through, saving exactly what its gradient rules read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jitgrad import ops
from jitgrad.autograd.modes import mode
from jitgrad.errors import AutogradError, complain, user_location
from jitgrad.hooks import Hook, HookTable, RemovableHandle
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops import gradient

if TYPE_CHECKING:
    from jitgrad.tensor import Tensor

_sequence = itertools.count()


def next_sequence() -> int:
    """A number above that of every node so far and below that of every later one."""
    return next(_sequence)


Edge = tuple[Any, int] | None          # (TapeNode, which output) | (leaf Tensor, 0) | None: no gradient wanted


class TapeNode:
    """One step that gradients flow through. `edges` has an entry per input; nodes made later have a larger
    `sequence`, which is the order that the walk back follows."""

    __slots__ = ("__weakref__", "edges", "freed", "hooks", "sequence", "where")

    def __init__(self, edges: tuple[Edge, ...]):
        self.edges = edges
        self.sequence = next(_sequence)
        self.hooks: dict[int, HookTable] | None = None
        self.freed = False
        self.where = user_location(2) if mode.anomaly else None

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        raise NotImplementedError

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        """The gradient of every input (None where there is none), given that of every output (None: zero)."""
        raise NotImplementedError

    def free(self) -> None:
        """Let go of what was saved; a second walk over this node is an error."""
        self.freed = True

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        return tuple((None, 0) if e is None else e for e in self.edges)

    def register_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """`hook(gradients_of_outputs)` is called before this node is walked."""
        return add_hook(self, -1, hook)

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, slots=True)
class Part:
    """The gradient of a slice, `given`, before it becomes one of all that was sliced, of type `whole`: eager execution adds
    it to what arrives there, and neither writes nor reads the zeros around it."""

    given: Any
    whole: TensorType
    start: tuple[int, ...]
    step: tuple[int, ...]
    put: Callable[..., Any]

    def alone(self) -> Any:
        """With zeros around it."""
        return self.put(None, self.given, self.whole, self.start, self.step)

    def added_to(self, total: Any) -> Any:
        """`total`, which has changed."""
        return self.put(total, self.given, self.whole, self.start, self.step)


class OpNode(TapeNode):
    """The application of a primitive. Saves exactly what the rules of the needed gradients read."""

    __slots__ = ("attrs", "op", "saved", "types", "versions")

    def __init__(self, op: Op, attrs: dict[str, Any], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...],
                 edges: tuple[Edge, ...]):
        super().__init__(edges)
        self.op = op
        self.attrs = attrs
        read_inputs, read_outputs = _reads(op, tuple([e is not None for e in edges]))
        self.types = tuple([t.tensor_type for t in inputs]), tuple([t.tensor_type for t in outputs])
        saved_in = tuple([t if k in read_inputs else None for k, t in enumerate(inputs)])
        saved_out = tuple([t._for_tape() if k in read_outputs else None for k, t in enumerate(outputs)])
        self.saved: Any = saved_in + saved_out        # a tuple; None when freed; else who can compute it again
        self.versions = tuple([t._count() for t in self.saved if t is not None])
        if mode.keeper is not None and self.versions:
            self.saved = mode.keeper.keep(self.name, self.saved, (*edges, *[None] * len(outputs)), True)

    @property
    def name(self) -> str:
        return "".join(word.capitalize() for word in self.op.name.split("_")) + "Backward"

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return self.types[1]

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        if self.saved is None:
            raise complain(AutogradError, self.op.name, "backward through this part of the graph a second time, but "
                           "what it saved was freed by the first", where=self.where or user_location(),
                           fix="Pass retain_graph=True to the first backward() or grad()")
        if type(self.saved) is not tuple:
            saved = self.saved.fetch(gradients)
        else:
            saved = self.saved
            self._check_versions(saved)
        saved_in, saved_out = saved[:len(self.edges)], saved[len(self.edges):]
        if mode.enabled:                              # create_graph: an output that is read again has its history
            saved_out = tuple([None if t is None else self._with_history(t, k) for k, t in enumerate(saved_out)])
        if self.op is ops.slice and gradients[0] is not None:
            put = getattr(state.current, "put_part", None)
            if put is not None and not mode.enabled and not mode.anomaly and gradients[0].device.type == "cpu":
                return (Part(gradients[0], self.types[0][0], self.attrs["start"], self.attrs["step"], put),)
        needed = tuple([e is not None for e in self.edges])
        return gradient.operand_gradients(self.op, self.attrs, self.types[0], saved_in, saved_out, gradients, needed)

    def _check_versions(self, saved: tuple[Any, ...]) -> None:
        for t, version in zip([t for t in saved if t is not None], self.versions):
            if t._count() != version:
                raise complain(AutogradError, self.op.name, f"a value needed for its gradient ({t.tensor_type}) was changed "
                               f"in place after it was used (version {t._count()}, expected {version})",
                               where=self.where or user_location(),
                               fix="Use the out-of-place form of that change, or clone() the value before it")

    def _with_history(self, saved: Tensor, k: int) -> Tensor:
        tensor = saved._for_tape()
        tensor._node, tensor._index = self, k
        return tensor

    def free(self) -> None:
        self.freed = True
        self.saved = None


_reads = functools.lru_cache(maxsize=None)(gradient.reads)


class SpentNode(TapeNode):
    """The history of a result whose backward pass was part of the compiled call that made it."""

    __slots__ = ("_name", "_type")

    def __init__(self, name: str, type: TensorType):
        super().__init__(())
        self._name, self._type = name, type
        self.freed = True

    @property
    def name(self) -> str:
        return self._name

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return (self._type,)

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        raise complain(AutogradError, self._name, "backward a second time: the compiled call that made this tensor has "
                       "gone back through it already", fix="Pass retain_graph=True to the backward() inside of it")


def record(op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any], outputs: tuple[Tensor, ...]) -> None:
    """Put one application on the tape; every interpreter of Tensors calls this for ops on inputs that require grad."""
    if op.variadic:
        edges = tuple([edge_of(t) for t in inputs]) if op.differentiable else (None,) * len(inputs)
    else:
        edges = tuple([None if r is None else edge_of(t) for t, r in zip(inputs, op.rules)])
    if not any([e is not None for e in edges]):
        return
    node = OpNode(op, attrs, inputs, outputs, edges)
    for k, out in enumerate(outputs):
        if out.dtype.is_differentiable:
            out._node, out._index = node, k


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of `tensor` goes; None when it needs none."""
    node = tensor._history_node()
    if node is not None:
        return node, tensor._index
    return (tensor, 0) if tensor._requires_grad else None


def add_hook(node: TapeNode, index: int, hook: Callable[..., Any]) -> RemovableHandle:
    if node.hooks is None:
        node.hooks = {}
    return node.hooks.setdefault(index, HookTable()).add(Hook(hook))
