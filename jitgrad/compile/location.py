"""Where the memory of a call lies: the device of an op's operands, and which bytes an array takes up.

A graph says nothing of devices. A recorder keeps the one that its graph runs on, lazy Tensors know their own, and a plan is
made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jitgrad import devices, gpu_plans, plans
from jitgrad.errors import DeviceError, complain
from jitgrad.ir.graph import Graph
from jitgrad.runtime.cuda import driver
from jitgrad.runtime.cuda.array import Array, DeviceArray, copy_into, span, to_host
from jitgrad.tensor import Tensor

CPU = "cpu"


class Location(NamedTuple):
    """Where a graph runs, and which of its outputs are brought to the computer's own memory (those of numbers)."""

    device: str = CPU
    homeward: tuple[int, ...] = ()


ON_CPU = Location()


def common_device(op: str, tensors: Sequence[Tensor]) -> tuple[str, bool]:
    """The device of the operands of an op, "" if none of them lies anywhere yet, and whether it must be computed there: a
    single number of the CPU may be taken to a GPU. DeviceError when operands are on different devices."""
    gpus: list[str] = []
    host = number = False
    for t in tensors:
        if t._unplaced:
            continue
        array = t._array
        device = t._type.device if array is None else CPU if type(array) is np.ndarray else str(array.gpu.device)
        if device != CPU:
            gpus.append(device)
        elif host or not _is_number(t):
            host = True
        else:
            number = True
    if not gpus:
        return (CPU if host or number else ""), host
    names = {*gpus, CPU} if host else set(gpus)
    if len(names) > 1:
        types = ", ".join(str(t.tensor_type) for t in tensors)
        raise complain(DeviceError, op, f"operands are on different devices, {' and '.join(sorted(names))}: {types}",
                       fix=f"Move them to one, with .to({gpus[0]!r})")
    return gpus[0], True


def _is_number(t: Tensor) -> bool:
    """Whether a Tensor on the CPU is a single number, at most expanded."""
    array = t._array
    if array is None:
        return 1 in (prod(t.shape), t._pending.unit.value.type.size)
    return array.size == 1 or not any(array.strides)


def plan_for(graph: Graph, location: Location, memory_budget: float, mode: str) -> Any:
    """The plan of `graph` for where it runs; `mode` is that of `jitgrad.compile`."""
    if location.device == CPU:
        return plans.compile_graph(graph, memory_budget, tuned=mode.startswith("max-autotune"))
    gpu = driver.gpu(devices.device(location.device).index)
    plan = gpu_plans.compile_for(graph, gpu, memory_budget, mode != "max-autotune-no-cudagraphs",
                                 tuned=mode.startswith("max-autotune"))
    return Homeward(plan, location.homeward) if location.homeward else plan


def settings(location: Location) -> Any:
    """What else decides which plan a graph has there."""
    return None if location.device == CPU else gpu_plans.settings()


class Homeward:
    """A plan on a GPU of which some outputs are brought to the computer's own memory."""

    def __init__(self, plan: Any, outputs: tuple[int, ...]):
        self.plan, self.outputs, self.spec = plan, frozenset(outputs), plan.spec

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `GpuPlan.run`."""
        return [to_host(a) if k in self.outputs and type(a) is DeviceArray else a
                for k, a in enumerate(self.plan.run(inputs))]


def bare(plan: Any) -> Any:
    """The plan itself."""
    return plan.plan if isinstance(plan, Homeward) else plan


def bounds(array: Array) -> tuple[int, int]:
    """The address of an array's first byte, and of the one past its last."""
    if type(array) is not DeviceArray:
        low, high = np.lib.array_utils.byte_bounds(array)
        return int(low), int(high)
    first, count = span(array)
    return array.address + first, array.address + first + count


def owner_of(array: Array) -> int:
    """The identity of what owns the memory of an array."""
    if type(array) is DeviceArray:
        return id(array.owner)
    base = array.base
    while isinstance(base, np.ndarray):
        array, base = base, base.base
    return id(array) if base is None else id(base)


def overwrite(target: Array, source: Array) -> None:
    """Give `target` the contents of `source`."""
    if type(target) is np.ndarray and type(source) is np.ndarray:
        np.copyto(target, source)
    else:
        copy_into(target, source)
