"""Reverse-mode differentiation of what a program does: the tape, and the walk back over it.

Every op on a Tensor that requires gradients leaves a node on the tape (`OpNode`); a custom `Function` and a compiled
call leave nodes of their own. `backward` and `grad` walk the nodes in reverse order of their making and call the
gradient rules of the op records. The rules are ops: run by the eager interpreter they compute, run while a function is
being compiled they are recorded, and with ``create_graph`` they leave nodes themselves, so that any order follows.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jitgrad import ops
from jitgrad.errors import AutogradError, complain, source_line, user_location
from jitgrad.hooks import Hook, HookTable, RemovableHandle
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops import gradient

if TYPE_CHECKING:
    from jitgrad.tensor import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# --- modes ---------------------------------------------------------------------------------------------------------


class _Mode(threading.local):
    """What is switched per thread: `enabled` (ops leave nodes), `inference`, `anomaly` (nodes keep the user's line)."""

    enabled = True
    inference = False
    anomaly = False

    def __init__(self) -> None:
        ops.silence_numpy()                           # a setting of each thread: inf and NaN are results, not warnings


mode = _Mode()


class _Switch(ContextDecorator):
    """Sets attributes of `mode` for a block or for a function."""

    settings: dict[str, bool] = {}

    def __init__(self) -> None:
        self._outer: list[dict[str, bool]] = []

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        self = super().__new__(cls)
        if callable(function):                        # a bare decorator: @no_grad
            cls.__init__(self)
            return ContextDecorator.__call__(self, function)
        return self

    def _recreate_cm(self) -> _Switch:
        fresh = object.__new__(type(self))
        fresh.settings, fresh._outer = self.settings, []
        return fresh

    def __enter__(self) -> _Switch:
        self._outer.append({k: getattr(mode, k) for k in self.settings})
        for k, v in self.settings.items():
            setattr(mode, k, v)
        return self

    def __exit__(self, *exc: object) -> None:
        for k, v in self._outer.pop().items():
            setattr(mode, k, v)


class no_grad(_Switch):
    """Inside, nothing is recorded for gradients."""

    settings = {"enabled": False}


class enable_grad(_Switch):
    """Inside, ops are recorded again, also within ``no_grad``."""

    settings = {"enabled": True}


class inference_mode(_Switch):
    """``no_grad`` whose results can never enter a recorded computation by accident; ``inference_mode(False)`` undoes
    it."""

    settings = {"enabled": False, "inference": True}

    def __new__(cls, function: Callable[..., Any] | bool | None = None) -> Any:
        self = super().__new__(cls, function if callable(function) else None)
        if function is False:
            self.settings = {"enabled": True, "inference": False}
        return self

    def __init__(self, function: Callable[..., Any] | bool | None = None) -> None:
        super().__init__()


class set_grad_enabled(_Switch):
    """Switch gradients on or off, at once, for a ``with`` block or for a function."""

    _at_once = False

    def __new__(cls, value: bool) -> set_grad_enabled:
        return object.__new__(cls)

    def __init__(self, value: bool) -> None:
        super().__init__()
        self.settings = {"enabled": bool(value)}
        super().__enter__()
        self._at_once = True

    def __enter__(self) -> _Switch:
        if self._at_once:                             # the constructor has switched already; the block only restores
            self._at_once = False
            return self
        return super().__enter__()

    def __call__(self, function: _Function) -> _Function:
        if self._at_once:                             # a decorator: nothing is switched before the function is called
            self._at_once = False
            self.__exit__()
        return super().__call__(function)


class detect_anomaly(_Switch):
    """Inside, tape nodes remember the user's line, and a gradient that becomes NaN is an error that names it."""

    settings = {"anomaly": True}


def is_grad_enabled() -> bool:
    return mode.enabled


def is_inference_mode_enabled() -> bool:
    return mode.inference


# --- the tape ------------------------------------------------------------------------------------------------------

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
        return _add_hook(self, -1, hook)

    def __repr__(self) -> str:
        return f"<{self.name}>"


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
        self.saved: tuple[tuple[Any, ...], tuple[Any, ...]] | None = (saved_in, saved_out)
        self.versions = tuple([t._count() for t in saved_in + saved_out if t is not None])

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
        saved_in, saved_out = self.saved
        for t, version in zip([t for t in saved_in + saved_out if t is not None], self.versions):
            if t._count() != version:
                raise complain(AutogradError, self.op.name, f"a value needed for its gradient ({t.tensor_type}) was changed "
                               f"in place after it was used (version {t._count()}, expected {version})",
                               where=self.where or user_location(),
                               fix="Use the out-of-place form of that change, or clone() the value before it")
        if mode.enabled:                              # create_graph: an output that is read again has its history
            saved_out = tuple([None if t is None else self._with_history(t, k) for k, t in enumerate(saved_out)])
        needed = tuple([e is not None for e in self.edges])
        return gradient.operand_gradients(self.op, self.attrs, self.types[0], saved_in, saved_out, gradients, needed)

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


def _add_hook(node: TapeNode, index: int, hook: Callable[..., Any]) -> RemovableHandle:
    if node.hooks is None:
        node.hooks = {}
    return node.hooks.setdefault(index, HookTable()).add(Hook(hook))


# --- the walk back -------------------------------------------------------------------------------------------------


class _Walk:
    """Gradients on their way: per node those of its outputs, and a queue of nodes, latest first."""

    def __init__(self, keep: set[int] | None):
        self.pending: dict[int, tuple[TapeNode, list[Any]]] = {}
        self.queue: list[int] = []
        self.keep = keep                              # ids of nodes worth walking; None: all
        self.leaves: dict[int, tuple[Tensor, Any]] = {}

    def send(self, edge: Edge, arriving: Any) -> None:
        if edge is None or arriving is None:
            return
        target, index = edge
        if self.keep is not None and id(target) not in self.keep:
            return
        if not isinstance(target, TapeNode):
            earlier = self.leaves.get(id(target))
            self.leaves[id(target)] = (target, arriving if earlier is None else ops.add(earlier[1], arriving))
            return
        entry = self.pending.get(target.sequence)
        if entry is None:
            entry = self.pending[target.sequence] = (target, [None] * len(target.output_types))
            heapq.heappush(self.queue, -target.sequence)
        gradients = entry[1]
        gradients[index] = arriving if gradients[index] is None else ops.add(gradients[index], arriving)

    def next(self) -> tuple[TapeNode, list[Any]]:
        return self.pending.pop(-heapq.heappop(self.queue))


def _walk(roots: Sequence[tuple[Edge, Any]], retain: bool, keep: set[int] | None,
          catch: dict[tuple[int, int], int] | None = None, caught: list[Any] | None = None) -> dict[int, Any]:
    """Walk back from `roots` (edge, gradient). Gradients of the (node id, output) in `catch` are put into `caught`;
    those of leaves are returned."""
    walk = _Walk(keep)
    for edge, start in roots:
        walk.send(edge, start)
    anomaly = mode.anomaly
    while walk.queue:
        node, gradients = walk.next()
        if node.hooks:
            _run_hooks(node, gradients)
        if catch is not None and caught is not None:
            for k, g in enumerate(gradients):
                if (id(node), k) in catch:
                    caught[catch[id(node), k]] = g
        if keep is not None and not any(e is not None and _wanted(e, keep) for e in node.edges):
            continue
        results = node.pull(gradients)
        if not retain:
            node.free()
        for edge, g in zip(node.edges, results):
            if anomaly and g is not None:
                _check_anomaly(node, g)
            walk.send(edge, g)
    for key, (leaf, arriving) in walk.leaves.items():
        for hook in leaf._hooks or ():
            changed = hook.function(arriving)
            if changed is not None:
                arriving = changed
                walk.leaves[key] = leaf, changed
    return walk.leaves


def _wanted(edge: Any, keep: set[int]) -> bool:
    return id(edge[0]) in keep


def _run_hooks(node: TapeNode, gradients: list[Any]) -> None:
    assert node.hooks is not None
    for hook in node.hooks.get(-1, ()):
        hook.function(tuple(gradients))
    for k, g in enumerate(gradients):
        if g is None:
            continue
        for hook in node.hooks.get(k, ()):
            changed = hook.function(g)
            if changed is not None:
                g = gradients[k] = changed


def _check_anomaly(node: TapeNode, found: Tensor) -> None:
    if found.dtype.is_floating_point and bool(ops.max(ops.isnan(found), axes=tuple(range(len(found.shape))))):
        line = source_line(node.where)
        raise complain(AutogradError, node.name, "its gradient contains NaN", where=node.where,
                       fix=f"The forward pass was: {line}" if line else "")


def _starts(name: str, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[tuple[Edge, Any]]:
    """The roots of a walk, with default gradients of one for single-element tensors."""
    roots: list[tuple[Edge, Any]] = []
    for t, g in zip(tensors, gradients, strict=True):
        edge = edge_of(t)
        if edge is None:
            raise complain(AutogradError, name, f"a tensor of type {t.tensor_type} does not require gradients and "
                           "has no history", where=user_location(),
                           fix="Was it made under no_grad(), or detached? Set requires_grad=True on what it depends on")
        if g is None:
            if t.tensor_type.size != 1:
                raise complain(AutogradError, name, f"gradients start by themselves only from a single element, not "
                               f"from {t.tensor_type}", where=user_location(), fix="Pass gradient=, or reduce it first")
            g = ops.ones_like(t)
        elif tuple(g.shape) != tuple(t.shape):
            raise complain(AutogradError, name, f"the gradient given is {g.tensor_type} for an output {t.tensor_type}",
                           where=user_location())
        roots.append((edge, g if g.dtype is t.dtype else ops.cast(g, dtype=t.dtype)))
    return roots


def _listed(tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if isinstance(tensors, (list, tuple)) else [cast("Tensor", tensors)]


def backward(tensors: Tensor | Sequence[Tensor], grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
             retain_graph: bool | None = None, create_graph: bool = False,
             inputs: Sequence[Tensor] | None = None) -> None:
    """Add the gradient of `tensors` to ``.grad`` of every leaf they depend on (or of `inputs` only).

    A tensor of one element needs no gradient given; others need one of their own shape in `grad_tensors`.
    What the tape saved is freed unless `retain_graph` (default: as `create_graph`)."""
    tensors = _listed(tensors)
    if grad_tensors is None or not isinstance(grad_tensors, (list, tuple)):
        grad_tensors = [grad_tensors] * len(tensors)  # type: ignore[list-item]
    if inputs is not None:
        results = grad(tensors, list(inputs), grad_tensors, retain_graph, create_graph, allow_unused=True)
        for t, g in zip(inputs, results):
            if g is not None:
                _accumulate(t, g, create_graph)
        return
    with _grad_mode(create_graph):
        roots = _starts("backward", tensors, grad_tensors)
        leaves = _walk(roots, create_graph if retain_graph is None else retain_graph, None)
        for tensor, total in leaves.values():
            _accumulate(tensor, total, create_graph)


def _grad_mode(create_graph: bool) -> Any:
    return enable_grad() if create_graph else no_grad()


def _accumulate(leaf: Tensor, arriving: Tensor, create_graph: bool) -> None:
    """Add to ``leaf.grad``: in place when there is one, else as a Tensor with memory of its own."""
    existing = leaf._grad
    if existing is None:
        leaf._set_grad(arriving if create_graph else arriving._own())
    elif create_graph:
        leaf._set_grad(ops.add(existing, arriving))
    else:
        existing._assign(ops.add(existing, arriving))


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Tensor | Sequence[Tensor | None] | None = None, retain_graph: bool | None = None,
         create_graph: bool = False, allow_unused: bool = False) -> tuple[Any, ...]:
    """The gradients of `outputs` in `inputs`, as new tensors; ``.grad`` is left alone.

    An input that `outputs` do not depend on is an error, or None with `allow_unused`."""
    outputs, inputs = _listed(outputs), _listed(inputs)
    if grad_outputs is None or not isinstance(grad_outputs, (list, tuple)):
        grad_outputs = [grad_outputs] * len(outputs)  # type: ignore[list-item]
    targets = [edge_of(t) for t in inputs]
    for t, edge in zip(inputs, targets):
        if edge is None:
            raise complain(AutogradError, "grad", f"an input of type {t.tensor_type} does not require gradients",
                           fix="Call requires_grad_() on it before it is used")
    catch = {(id(e[0]), e[1]): k for k, e in enumerate(targets) if e is not None and isinstance(e[0], TapeNode)}
    caught: list[Any] = [None] * len(inputs)
    with _grad_mode(create_graph):
        roots = _starts("grad", outputs, grad_outputs)
        keep = _reaching([e for e, _ in roots], {id(e[0]) for e in targets if e is not None})
        leaves = _walk(roots, create_graph if retain_graph is None else retain_graph, keep, catch, caught)
    for k, edge in enumerate(targets):
        if edge is not None and id(edge[0]) in leaves:
            caught[k] = leaves[id(edge[0])][1]
        elif edge is not None and isinstance(edge[0], TapeNode):
            caught[k] = caught[catch[id(edge[0]), edge[1]]]
        if caught[k] is None and not allow_unused:
            raise complain(AutogradError, "grad", f"an input of type {inputs[k].tensor_type} was not used to compute "
                           "the outputs", fix="Pass allow_unused=True to get None for it")
    return tuple(caught)


def _reaching(roots: Sequence[Edge], targets: set[int]) -> set[int]:
    """The ids of nodes and leaves on a path from `roots` to `targets` (both included)."""
    order: list[TapeNode] = []
    seen: set[int] = set()
    stack = [e[0] for e in roots if e is not None and isinstance(e[0], TapeNode)]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        order.append(node)
        stack.extend(e[0] for e in node.edges if e is not None and isinstance(e[0], TapeNode))
    keep = set(targets)
    for node in sorted(order, key=lambda n: n.sequence):
        if any(e is not None and id(e[0]) in keep for e in node.edges):
            keep.add(id(node))
    return keep


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """All leaves that the history of `tensor` leads to and that still require gradients."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    stack = [edge_of(tensor)]
    while stack:
        edge = stack.pop()
        if edge is None or id(edge[0]) in seen:
            continue
        seen.add(id(edge[0]))
        if isinstance(edge[0], TapeNode):
            stack.extend(edge[0].edges)
        elif edge[0]._requires_grad:
            found[id(edge[0])] = edge[0]
    return list(found.values())


# --- custom functions ----------------------------------------------------------------------------------------------


class FunctionNode(TapeNode):
    """The application of a custom `Function`; doubles as its context (`ctx`)."""

    __slots__ = ("__dict__", "_materialize", "_non_differentiable", "_saved", "_versions", "function",
                 "needs_input_grad", "types")

    def __init__(self, function: type[Function], edges: tuple[Edge, ...]):
        super().__init__(edges)
        self.function = function
        self._saved: tuple[Any, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._materialize = True
        self._non_differentiable: tuple[Any, ...] = ()
        self.needs_input_grad = tuple([e is not None for e in edges])
        self.types: tuple[TensorType, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__ + "Backward"

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return self.types

    def save_for_backward(self, *tensors: Any) -> None:
        self._saved = tensors
        self._versions = tuple([0 if t is None else t._count() for t in tensors])

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        if self.freed:
            raise complain(AutogradError, self.name, "its saved tensors were freed by an earlier backward",
                           fix="Pass retain_graph=True to the first backward() or grad()")
        for t, version in zip(self._saved, self._versions):
            if t is not None and t._count() != version:
                raise complain(AutogradError, self.name, f"a saved tensor ({t.tensor_type}) was changed in place")
        return self._saved

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self._non_differentiable = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Inputs changed in place are found by their versions; nothing to do."""

    def set_materialize_grads(self, value: bool) -> None:
        self._materialize = value

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        if self.freed:
            raise complain(AutogradError, self.name, "backward through this part of the graph a second time",
                           fix="Pass retain_graph=True to the first backward() or grad()")
        if self._materialize:
            gradients = [ops.zeros_like(t) if g is None else g for g, t in zip(gradients, self.types)]
        results = self.function.backward(self, *gradients)
        results = results if isinstance(results, tuple) else (results,)
        if len(results) < len(self.edges):
            raise complain(AutogradError, self.name, f"backward returned {len(results)} gradients for "
                           f"{len(self.edges)} inputs", fix="Return one per input of forward, None where there is none")
        return results

    def free(self) -> None:
        self.freed = True
        self._saved = ()


class Function:
    """A custom differentiable function: subclass it with static `forward` and `backward`, call `apply`.

        class Square(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x
            @staticmethod
            def backward(ctx, g):
                x, = ctx.saved_tensors
                return 2 * x * g
        y = Square.apply(x)

    With a `setup_context(ctx, inputs, output)` method, `forward` takes no ctx."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        raise NotImplementedError("a Function needs a static forward(ctx, *args)")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("a Function needs a static backward(ctx, *gradients)")

    setup_context: Any = None

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run `forward` without recording; gradients flow through `backward`."""
        edges = tuple([edge_of(a) if hasattr(a, "_history_node") else None for a in args])
        node = FunctionNode(cls, edges)
        with no_grad():
            if cls.setup_context is not None:
                result = cls.forward(*args)
                cls.setup_context(node, args, result)
            else:
                result = cls.forward(node, *args)
        if mode.enabled and any(edges):
            results = result if isinstance(result, tuple) else (result,)
            taken = {id(a) for a in args}
            outs = tuple([t._alias() if id(t) in taken else t for t in results])
            node.types = tuple([t.tensor_type for t in outs])
            skip = {id(t) for t in node._non_differentiable}
            for k, (t, original) in enumerate(zip(outs, results)):
                if t.dtype.is_differentiable and id(original) not in skip:
                    t._node, t._index = node, k
            result = outs if isinstance(result, tuple) else outs[0]
        return result


# --- what optimizers and layers ask for -----------------------------------------------------------------------------

def number(mapping: Any, *keys: Any) -> Any:
    """``mapping[key]`` (for several keys ``mapping[key][key]…``) as a number: a Python one, or a traced one while a
    function is being compiled, so that a scheduler may change it without a recompile."""
    return state.current.number(mapping, *keys)  # type: ignore[union-attr]


def eager_state(make: Callable[[], Any]) -> Any:
    """``make()``, run eagerly even while a function is being compiled: the first-step state of optimizers."""
    return state.current.eagerly(make)  # type: ignore[union-attr]
