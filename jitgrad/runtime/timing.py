"""How long each entry of a plan takes: the plan is run on one frame, entry by entry; nothing runs side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from jitgrad.kernels.cpu import tape
from jitgrad.runtime import threads
from jitgrad.runtime.plan import Plan, _Call


def time_entries(plan: Plan, inputs: Sequence[np.ndarray]) -> list[float]:
    """Seconds of each entry of `plan.spec.entries`, in one run. Inputs that the plan writes are overwritten."""
    own = [np.empty(output.type.shape, output.type.dtype.numpy) for output in plan.spec.outputs]
    frame = plan._borrow(apart=True)
    count = frame.words[tape.COUNT]
    found = []
    try:
        arrays = (*inputs, *own)
        for position in range(count):
            frame.words[tape.COUNT] = position + 1
            begin = time.perf_counter()
            plan._walk(frame.address, position, id(arrays) + threads.ITEMS, tape.RESUME if position else tape.ARRAYS)
            if frame.words[tape.STATUS] != tape.DONE:
                _Call(plan, frame, inputs, own).finish()
            found.append(time.perf_counter() - begin)
    finally:
        frame.words[tape.COUNT] = count
        plan._give_back(frame)
    return found
