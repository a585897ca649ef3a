"""Which results of a call keep their history: those whose gradients may be asked for outside, and go back to the call.

In: a recorder at the end of the call, and the results. Out: the results for which the whole call becomes one node of the
tape, because that is the same; none where it is not, and then the nodes of the recording stay on the tape.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from jitgrad import autograd
from jitgrad.ir.graph import Value
from jitgrad.ops.gradient import depends_on
from jitgrad.tensor import Tensor

if TYPE_CHECKING:
    from jitgrad.compile.recorder import Recorder


def waiting_results(recorder: Recorder, results: list[Any]) -> list[Tensor]:
    """The results with a history that becomes one node. `results` are the leaves of what the function returns."""
    lazy = [t for t in results if isinstance(t, Tensor) and t._array is None]
    waiting = list({id(t): t for t in lazy if _waits(recorder, t)}.values())
    if waiting and not _is_plain(recorder, waiting):
        waiting = []
    return [] if _held_elsewhere(recorder, _tape_of(recorder, waiting), waiting) else waiting


def _tape_of(recorder: Recorder, tensors: list[Tensor]) -> list[autograd.OpNode]:
    """All nodes of this call that the histories of `tensors` lead to."""
    found: dict[int, Any] = {}
    stack = [t._node for t in tensors]
    while stack:
        node = stack.pop()
        if id(node) not in found and node.sequence >= recorder.first_sequence:
            found[id(node)] = node
            stack.extend(e[0] for e in node.edges if e is not None and isinstance(e[0], autograd.TapeNode))
    return list(found.values())


def _held_elsewhere(recorder: Recorder, nodes: list[autograd.OpNode], results: list[Tensor]) -> bool:
    """True when somebody outside holds a Tensor of this call whose gradient may be asked for: one that is neither a
    result nor held only by the tape and by views. A root held only by its detached aliases loses its history."""
    held: dict[int, int] = {id(t): -1000 for t in results}
    for node in nodes:
        saved = getattr(node, "saved", ())        # a move keeps nothing
        for key in map(id, saved if type(saved) is tuple else ()):
            held[key] = held.get(key, 0) + 1
    frames = {id(n.saved.frame): n.saved.frame for n in nodes if type(getattr(n, "saved", ())) is autograd.Held}
    for inputs in {id(f.tensors()): f.tensors() for f in frames.values()}.values():
        for key in map(id, inputs):
            held[key] = held.get(key, 0) + 1
    alive = [t for t in (r() for r in recorder.live) if t is not None]
    for key in (id(t._root) for t in alive if t._root is not None):
        held[key] = held.get(key, 0) + 1
    outside = False
    for t in alive:
        # References: the list that is walked, the loop's name, and getrefcount's argument.
        if not _waits(recorder, t) or held.get(id(t), 0) < 0:
            continue
        if sys.getrefcount(t) > held.get(id(t), 0) + 3:
            outside = True
        elif not nodes:
            t._node = None
    return outside


def _waits(recorder: Recorder, t: Tensor) -> bool:
    """True when `t` has a history, made in this call, that no backward pass has gone through."""
    node = t._node
    return node is not None and not node.freed and node.sequence >= recorder.first_sequence


def _is_plain(recorder: Recorder, tensors: list[Tensor]) -> bool:
    """True when the history of `tensors` is that of the graph: no hooks, no detach or no_grad on the way."""
    if recorder.hooked or recorder.entangled or recorder.segments or not recorder.repeats:
        return False
    if any(u.dirty and u.initial in recorder.tracked for u in recorder.units):
        return False
    wanted = {recorder.read(t) for t in tensors}
    given = {u.initial for u in recorder.units}
    if wanted & given or not wanted <= depends_on(recorder.builder.nodes, given & recorder.tracked):
        return False
    partial = recorder.partial | _detached_values(recorder)
    for node in reversed(recorder.builder.nodes):
        if any(v in wanted for v in node.outputs):
            if any(v in partial for v in node.outputs):
                return False
            wanted.update(node.inputs)
    return True


def _detached_values(recorder: Recorder) -> set[Value]:
    """What was computed from memory that was captured by way of a detached Tensor, before the one with the history."""
    found: set[Value] = set()
    for k, node in enumerate(recorder.builder.nodes if recorder.detached_before else ()):
        if any([v in found or recorder.detached_before.get(v, 0) > k for v in node.inputs]):
            found.update(node.outputs)
    return found
