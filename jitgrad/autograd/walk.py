"""The walk back over the tape: `backward` and `grad`."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jitgrad import ops
from jitgrad.autograd.modes import enable_grad, mode, no_grad
from jitgrad.autograd.tape import Edge, Part, TapeNode, edge_of
from jitgrad.errors import AutogradError, DeviceError, complain, source_line, user_location

if TYPE_CHECKING:
    from jitgrad.tensor import Tensor

class _Walk:
    """Gradients on their way: per node those of its outputs, and a queue of nodes, latest first."""

    def __init__(self, keep: set[int] | None):
        self.pending: dict[int, tuple[TapeNode, list[Any]]] = {}
        self.queue: list[int] = []
        self.keep = keep                              # ids of nodes worth walking; None: all
        self.leaves: dict[int, tuple[Tensor, Any]] = {}
        self.own: set[Any] = set()                    # where the gradient so far is known to nothing but this walk

    def send(self, edge: Edge, arriving: Any) -> None:
        if edge is None or arriving is None:
            return
        target, index = edge
        if self.keep is not None and id(target) not in self.keep:
            return
        if not isinstance(target, TapeNode):
            _, earlier = self.leaves.get(id(target), (None, None))
            self.leaves[id(target)] = (target, self.total(id(target), earlier, arriving))
            return
        entry = self.pending.get(target.sequence)
        if entry is None:
            entry = self.pending[target.sequence] = (target, [None] * len(target.output_types))
            heapq.heappush(self.queue, -target.sequence)
        gradients = entry[1]
        gradients[index] = self.total((target.sequence, index), gradients[index], arriving)

    def total(self, place: Any, earlier: Any, arriving: Any) -> Any:
        """Their sum. The gradient of a slice is added to its part of the others, in place where that is safe."""
        if type(arriving) is not Part:
            return arriving if earlier is None else ops.add(earlier, arriving)
        if place in self.own:
            return arriving.added_to(earlier)
        self.own.add(place)
        return arriving.alone() if earlier is None else ops.add(earlier, arriving.alone())

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
            changed = None if hook.after_accumulation else hook.function(arriving)
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
            if t.device != g.device:
                g = g._moved(t.device)
        elif tuple(g.shape) != tuple(t.shape):
            raise complain(AutogradError, name, f"the gradient given is {g.tensor_type} for an output {t.tensor_type}",
                           where=user_location())
        if g.device != t.device:
            raise complain(DeviceError, name, f"the gradient given is {g.tensor_type} for an output {t.tensor_type}",
                           where=user_location(), fix="Move it to the device of the output")
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
    for hook in leaf._hooks or ():
        if hook.after_accumulation:
            hook.function(leaf)


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
