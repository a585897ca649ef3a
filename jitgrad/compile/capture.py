"""Capturing: the memory of a real Tensor becomes an input of the graph that is being recorded.

In: a recorder and a Tensor that something recorded reads or changes. Out: its place (`Pending`): a unit, and the movement
from there. Tensors over the same memory get one unit; those that share a part of it become views of the array that owns
it, which may take a cut.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np

from jitgrad import ops
from jitgrad.compile.location import bounds
from jitgrad.compile.overlap import movement_between
from jitgrad.compile.trace import Made, Pending, Unit
from jitgrad.errors import CompileError, complain, user_location
from jitgrad.tensor import Tensor

if TYPE_CHECKING:
    from jitgrad.compile.recorder import Recorder


def capture(recorder: Recorder, tensor: Tensor) -> Pending:
    """The place of a real Tensor: an input of the graph, shared by all Tensors over the same memory."""
    place = recorder.known.get(id(tensor))
    if place is not None:
        return place
    tensor._history_node()                        # of a view it may have to be made again, which captures the root
    array = tensor._array
    place = _place(recorder, tensor, array) if id(tensor) not in recorder.origins else Pending(_new_unit(recorder, tensor))
    if place.unit.tensor is not tensor:
        if type(recorder.source(tensor)) is not Made:
            recorder.merged.append((place.unit.tensor, tensor))
        if tensor.requires_grad:
            _track(recorder, place, tensor)
    recorder.known[id(tensor)] = place
    recorder.held.append(tensor)
    return place


def _track(recorder: Recorder, place: Pending, tensor: Tensor) -> None:
    """`tensor` has a history, and its memory was captured before by way of another Tensor."""
    unit = place.unit
    if place.chain or unit.initial in recorder.tracked:
        recorder.entangled = True
        return
    unit.tensor = tensor                          # that other was detached, and so is what was computed from it
    recorder.tracked.add(unit.initial)
    recorder.detached_before[unit.initial] = len(recorder.builder.nodes)


def _place(recorder: Recorder, tensor: Tensor, array: np.ndarray) -> Pending:
    if array.size == 0:
        return Pending(_new_unit(recorder, tensor))
    low, high = bounds(array)
    unit = recorder.memory.get((low, high)) if array.flags.c_contiguous else None
    if unit is not None and unit.value.dtype is tensor.dtype:
        same = unit.value.shape == array.shape
        return Pending(unit, () if same else ((ops.reshape, {"shape": array.shape}),))
    if recorder.flat and any([a < high and low < b for a, b in recorder.flat]):
        return _place_overlapping(recorder, tensor, array)
    at = bisect.bisect_left(recorder.spans, (low, high))
    overlaps = (at > 0 and recorder.spans[at - 1][1] > low) or (at < len(recorder.spans) and recorder.spans[at][0] < high)
    if overlaps:
        return _place_overlapping(recorder, tensor, array)
    unit = _new_unit(recorder, tensor)
    recorder.spans.insert(at, (low, high))
    if array.flags.c_contiguous:
        recorder.memory[low, high] = unit
    return Pending(unit)


def _place_overlapping(recorder: Recorder, tensor: Tensor, array: np.ndarray) -> Pending:
    """Tensors that share part of their memory become views of one unit: the array that owns it. One that was
    captured alone before needs a cut; from then on all of them are views."""
    owner, chain = _owner_and_movement(tensor, array)
    low, high = bounds(owner)
    if chain is None:
        raise complain(CompileError, recorder.name, "two of its tensors overlap in memory in a way that cannot be compiled",
                       fix="Pass a copy of one of them, or do not compile this function")
    if (low, high) not in recorder.flat:
        recorder.flat.append((low, high))
        if recorder.units:
            device = recorder.device                  # of what is being recorded, also behind this cut
            recorder.flush(user_location(2), "tensors share part of their memory")
            recorder.device = device
    unit = recorder.memory.get((low, high))
    if unit is None:
        unit = recorder.memory[low, high] = _new_unit(recorder, Tensor(owner))
    own = () if unit.value.shape == owner.shape else ((ops.reshape, {"shape": owner.shape}),)
    return Pending(unit, (*own, *chain))


def _new_unit(recorder: Recorder, tensor: Tensor) -> Unit:
    unit = Unit(recorder.builder.input(tensor.tensor_type), tensor)
    if tensor.requires_grad:
        recorder.tracked.add(unit.value)
    recorder.units.append(unit)
    return unit


def _owner_and_movement(tensor: Tensor, array: Any) -> tuple[Any, Any]:
    """The array that owns the memory of a Tensor's, and how it is reached from there; None: not by movement ops."""
    if type(array) is not np.ndarray:                 # an array on a GPU knows no other one, but the Tensor its root
        root = tensor if tensor._root is None else tensor._root
        return root._array, tensor._chain if root._array.flags.c_contiguous else None
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner, movement_between(owner, array)
