"""Plans carried out as plain Python: the same kernels in the same memory, without machine code.

In goes what the last step of compiling made (`jitgrad.linking`), out come the arrays that the native plan would give.
Every pointer is typed and knows its bounds, memory starts as garbage, and the buffers of a launch are seen not to
overlap, so that a wrong index, a value that was never written and a bad memory plan are found where they happen, and
breakpoints in the text of a kernel work. ``JITGRAD_PLAIN=1`` carries out all compiled functions this way: thousands of
times slower, for small sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from jitgrad.codegen.kernel import Argument, Buffer, Function, Private
from jitgrad.codegen.plain import define, run_plain
from jitgrad.dtypes import uint8
from jitgrad.errors import CompileError, complain
from jitgrad.ir.graph import Node
from jitgrad.ir.types import TensorType
from jitgrad.linking import Linked, LinkedStep, Turn
from jitgrad.runtime import errors
from jitgrad.runtime.spec import PlanSpec
from jitgrad.transforms.memory import Slot

GARBAGE = 0xA5


class PlainPlan:
    """A plan that is called like `runtime.plan.Plan`. `pieces`: the items of every launch are done in so many calls,
    the last ones first, which shows whether they depend on each other."""

    def __init__(self, spec: PlanSpec, linked: Linked, pieces: int = 1):
        self.spec = spec
        self.linked = linked
        self.pieces = pieces

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`; see `runtime.plan.Plan.run`. IndexError names a kernel that reads or writes outside
        of its memory."""
        memory = _Memory(self.spec, self.linked, inputs)
        for group in self.linked.turns:
            launched = [turn for turn in group if turn.launch]
            _require_disjoint(" beside ".join([turn.launch.name for turn in launched if turn.launch]),
                              [taken for turn in launched for taken in _taken(turn, memory)])
            for turn in reversed(group) if self.pieces > 1 else group:
                self._carry_out(turn, memory)
        return [memory.result(k) for k in range(len(self.spec.outputs))]

    def _carry_out(self, turn: Turn, memory: _Memory) -> None:
        step, launch = turn.step, turn.launch
        node, buffers = step.step.node, _buffers(step, memory)
        if launch is None:
            inputs = len(node.inputs)
            _call_numpy(node, buffers[:inputs], buffers[inputs:])
            return
        private = _private(turn, memory)
        arguments = [_argument(a, buffers, private) for a in launch.arguments]
        bounds = [launch.items * k // self.pieces for k in range(self.pieces + 1)]
        found = [run_plain(launch.source, launch.name, arguments, begin, end)
                 for begin, end in reversed(list(pairwise(bounds)))]
        failures = [f for f in found if f is not None]
        if failures:
            code, _, value = failures[-1]
            raise errors.explain(code, value, launch.name, node.where)


class _Memory:
    """All memory of one call: inputs as they come, outputs and the arena full of garbage, constants."""

    def __init__(self, spec: PlanSpec, linked: Linked, inputs: Sequence[np.ndarray]):
        self.spec = spec
        self.arrays = {("input", k): x for k, x in enumerate(inputs)}
        for k, output in enumerate(spec.outputs):
            if output.source == ("output", k):
                new = np.empty(output.type.shape, output.type.dtype.numpy)
                new.reshape(-1).view(np.uint8).fill(GARBAGE)
                self.arrays["output", k] = new
        self.blocks = {"arena": np.full(linked.arena, GARBAGE, np.uint8),
                       "private": np.full(linked.private, GARBAGE, np.uint8),
                       "constant": np.frombuffer(spec.constants, np.uint8)}

    def at(self, slot: Slot, type: TensorType) -> np.ndarray:
        """The memory of `slot` as an array of `type`."""
        if slot.space in self.blocks:
            found = self.blocks[slot.space][slot.index:slot.index + type.nbytes]
        else:
            found = self.arrays[slot.space, slot.index].reshape(-1).view(np.uint8)[:type.nbytes]
        return found.view(type.dtype.numpy).reshape(type.shape)

    def result(self, k: int) -> np.ndarray:
        """Output `k`: memory of its own, that of another output, or an input."""
        output = self.spec.outputs[k]
        space, place = output.source
        if space in self.blocks:
            return self.at(Slot(space, place, output.type.nbytes), output.type).copy()
        found = self.arrays[space, place]
        return found if found.shape == output.type.shape else found.reshape(output.type.shape)


def _buffers(step: LinkedStep, memory: _Memory) -> list[np.ndarray]:
    """The memory of a step: operands, results, scratch."""
    node, slots = step.step.node, (*step.step.inputs, *step.step.outputs)
    values = [memory.at(slot, v.type) for slot, v in zip(slots, (*node.inputs, *node.outputs), strict=True)]
    return [*values, *[memory.at(slot, _bytes(slot)) for slot in step.scratch]]


def _bytes(slot: Slot) -> TensorType:
    return TensorType(uint8, (slot.nbytes,))


def _private(turn: Turn, memory: _Memory) -> dict[int, np.ndarray]:
    """The memory that a thread has of its own for a launch, by number."""
    return {k: memory.at(slot, _bytes(slot)) for k, slot in turn.private.items()}


def _taken(turn: Turn, memory: _Memory) -> list[tuple[np.ndarray, bool]]:
    """The memory that a launch uses, and whether it only reads it."""
    assert turn.launch is not None
    step, buffers = turn.step.step, _buffers(turn.step, memory)
    only_read = set(range(len(step.node.inputs))) - {operand for _, operand in step.shared}
    taken = sorted({a.index for a in turn.launch.arguments if isinstance(a, Buffer)})
    return [*[(buffers[k], k in only_read) for k in taken], *[(array, False) for array in _private(turn, memory).values()]]


def _call_numpy(node: Node, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    with np.errstate(all="ignore"):
        results = node.op.eager(*inputs, **node.attrs)
    for target, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
        np.copyto(target, result, casting="same_kind")


def _argument(given: Argument, buffers: Sequence[np.ndarray], private: Mapping[int, np.ndarray]) -> Any:
    if isinstance(given, Buffer | Private):
        return (buffers if isinstance(given, Buffer) else private)[given.index]
    return define(given.source, given.name) if isinstance(given, Function) else given


def _require_disjoint(kernel: str, buffers: Iterable[tuple[np.ndarray, bool]]) -> None:
    """What the kernel's loads and stores promise to LLVM: operands share memory only where none of them is written.
    `buffers` are arrays, and whether they are only read."""
    spans = sorted((x.__array_interface__["data"][0], x.nbytes, read) for x, read in buffers if x.size)
    for (a, n, a_read), (b, _, b_read) in combinations(spans, 2):
        if b < a + n and not (a_read and b_read):
            raise complain(CompileError, kernel, f"two of its operands share memory ({a + n - b} bytes)")
