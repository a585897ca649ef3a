"""What this machine can do at best: float32 operations per second, and bytes per second of memory.

Both are measured by plans of our own on all threads: one that does nothing but multiply and add in registers, and a
copy. `explain()` and the benchmarks say how near to them a kernel comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from jitgrad import config, ops, plans
from jitgrad.dtypes import float32
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm, peak
from jitgrad.runtime import build, threads
from jitgrad.runtime.plan import Entry, Output, Plan, PlanSpec

ITEMS, DEPTH = 32, 16384                    # of the multiply-adds: so many tiles, some 0.1 ms each
COPIED = 32 << 20                           # bytes


@dataclass(frozen=True)
class Limit:
    """A plan with the memory that it runs on (inputs, then outputs); a call does `work`: float32 operations, or bytes
    read and written."""

    plan: Plan
    memory: Sequence[np.ndarray]
    work: int

    @cached_property
    def addresses(self) -> np.ndarray:
        """Where `memory` is: asking a hundred arrays takes longer than a small product."""
        return np.array([array.ctypes.data for array in self.memory], np.int64)

    def __call__(self) -> None:
        self.plan.pointers[:] = self.addresses              # equal graphs have one plan
        self.plan.execute()


def multiply_adds() -> Limit:
    """Multiply-adds of float32 in registers; each counts as two operations."""
    tile = gemm.element_tile("f32")
    text = peak.source("f32")
    key = build.kernel_key(text)
    memory = [np.full(n, 1 / 256, np.float32) for n in (tile.rows, tile.columns, ITEMS * tile.rows * tile.columns)]
    types = [TensorType(float32, array.shape) for array in memory]
    entry = Entry("multiply_add", key, None, ITEMS, (("input", 0), ("input", 1), ("output", 0), DEPTH))
    spec = PlanSpec(tuple(types[:2]), (Output(types[2], ("output", 0)),), (), b"", 0, (entry,), {key: text})
    plan = Plan(spec, build.kernels([(text, entry.name), *threads.sources()]))
    return Limit(plan, memory, 2 * memory[2].size * DEPTH)


def copy(nbytes: int) -> Limit:
    """A copy of an array of `nbytes` bytes, a multiple of 4."""
    builder = GraphBuilder("copy")
    x = builder.input(TensorType(float32, (nbytes // 4,)))
    with builder, config.scope(plain=False):
        plan = plans.compile_graph(builder.build([ops.cast(x, dtype=float32)]))
    assert isinstance(plan, Plan)
    return Limit(plan, [np.ones(x.shape, np.float32), np.zeros(x.shape, np.float32)], 2 * nbytes)


@cache
def machine_bandwidth() -> float:
    """Bytes per second of memory."""
    return _best(copy(COPIED))


@cache
def machine_flops() -> float:
    """Float32 operations per second."""
    return _best(multiply_adds())


def _best(limit: Limit, repeats: int = 6) -> float:
    """The work per second of the fastest call."""
    return limit.work / min(_seconds(limit) for _ in range(repeats))


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
