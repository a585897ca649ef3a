"""Running what a recorder has recorded: the graph so far, and who gets its results.

In: a recorder, and the results whose gradients come back to this call. The graph is built, `execute` of the recorder runs
it (or the results are given already), and the lazy Tensors that are still alive become real ones.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from jitgrad.compile.location import CPU, Location
from jitgrad.compile.trace import Pending, Segment
from jitgrad.errors import CompileError, complain
from jitgrad.ir.graph import Value
from jitgrad.tensor import Tensor

if TYPE_CHECKING:
    from jitgrad.compile.recorder import Recorder


def run_recorded(recorder: Recorder, crossing: list[Tensor]) -> None:
    """Run the graph recorded so far, and give the lazy Tensors that are alive their arrays. `crossing` are those
    among them whose gradients will come back to this call."""
    roots, views, outputs = _alive(recorder)
    writes = [(k, unit.value) for k, unit in enumerate(recorder.units) if unit.dirty]
    wanted_effects = any(n.op.effects - {"random"} for n in recorder.builder.nodes)
    if not outputs and not writes and not wanted_effects and not crossing:
        for t in views:
            _settle_view(t)
        return
    units, arrays = recorder.units, [unit.tensor._array for unit in recorder.units]
    crossing_values = [recorder.read(t) for t in crossing]
    given = {unit.initial: k for k, unit in enumerate(units)}
    wanted = list(dict.fromkeys([v for v in [*outputs, *crossing_values] if v not in given]))
    graph = recorder.builder.build(wanted, writes)
    edge = None
    position = {v: k for k, v in enumerate(wanted)}
    if crossing:
        of = tuple(sorted({position[v] for v in crossing_values}))
        wrt = tuple([k for k, u in enumerate(units) if u.initial in recorder.tracked])
        edge = wrt, of, tuple(recorder.blocks)
    again = [v for k, v in enumerate(outputs) if v not in given and v in outputs[:k]]
    copied = [given[v] for v in outputs if v in given], [position[v] for v in again]
    device = recorder.device or CPU
    homeward = tuple(sorted({position[v] for t, v in zip(roots, outputs) if t._type.device == CPU and v in position})) \
        if device != CPU else ()
    segment = Segment(graph, [recorder.source(u.tensor) for u in units], all([a.flags.c_contiguous for a in arrays]), edge,
                      *copied, Location(device, homeward))
    found, node = _carry_out(recorder, segment, arrays)
    recorder.trace.append(segment)
    places = {v: [k] for v, k in position.items()}          # where among `found` the values are that Tensors wait for
    for k, v in enumerate([*[v for v in outputs if v in given], *again]):
        places.setdefault(v, []).append(len(wanted) + k)
    _hand_out(recorder, found, [(t, places[v].pop(0)) for t, v in zip(roots, outputs)], views)
    for t, v in zip(crossing, crossing_values):
        t._node, t._index = node, node.edge.halves.seeds.index(position[v])
        t._seen = t._root._renewals if t._root is not None else 0


def _hand_out(recorder: Recorder, found: list[np.ndarray], roots: list[tuple[Tensor, int]], views: list[Tensor]) -> None:
    """Give lazy Tensors their arrays: each root the one of that number, views a part of their root's."""
    for t, which in roots:
        array = t._pending.unit.array = found[which]
        t._array, t._pending, t._type = array, None, None
        recorder.made[id(array)] = weakref.ref(array), recorder.outputs + which
    recorder.outputs += len(found)
    for t in views:
        _settle_view(t)
    recorder.revived.extend(map(weakref.ref, [*[t for t, _ in roots], *views]))


def _carry_out(recorder: Recorder, segment: Segment, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
    """The outputs of a segment with its copies and, with an edge, the tape node of the call: computed now unless they
    are given."""
    if recorder.given is None or len(recorder.segments) >= len(recorder.given.segments):
        before = [arrays[k].copy() for k in segment.copied_inputs]
        outputs, node = recorder.execute(recorder, segment, arrays)
        return [*outputs, *before, *[outputs[k].copy() for k in segment.copied_outputs]], node
    key, outputs = recorder.given.segments[len(recorder.segments)]
    if segment.graph.key != key:
        raise complain(CompileError, recorder.name, "records other ops when it is run again with the same arguments and "
                       "state", fix="Do not compile this function")
    return outputs, None


def _alive(recorder: Recorder) -> tuple[list[Tensor], list[Tensor], list[Value]]:
    """One lazy root for each unit that somebody still holds (itself, a view of it, or what the tape saved of it), the
    other lazy Tensors, and the values of the roots."""
    alive = [t for t in (r() for r in recorder.live) if t is not None and t._array is None]
    roots: dict[int, Tensor] = {}
    for t in alive:
        if t._pending.unit.tensor is None and not t._pending.chain and t._root is None and t._saved_from is None:
            roots[id(t._pending.unit)] = t
    for t in alive:
        if t._saved_from is not None and not t._pending.chain and t._pending.unit.tensor is None:
            roots.setdefault(id(t._pending.unit), t)
    chosen = {id(t) for t in roots.values()}
    views = [t for t in alive if id(t) not in chosen]
    return list(roots.values()), views, [t._pending.unit.value for t in roots.values()]


def _settle_view(t: Tensor) -> None:
    """Give a lazy view its array: the same movement, on the array of its unit."""
    place: Pending = t._pending
    base = place.unit.tensor
    array = base._array if base is not None else place.unit.array
    for op, attrs in place.chain:
        array = op.eager(array, **attrs)
    t._array, t._pending, t._type = array, None, None
