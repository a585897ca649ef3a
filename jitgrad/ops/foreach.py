"""One elementwise program over many groups of tensors: an optimizer's step over all parameters as one node.

`body` is a Graph over 0-d values, made of elementwise ops. Its inputs are `shared` scalars, then k operands. Operands
of the op: the shared scalars, then operand 0 of all groups, operand 1 of all groups, and so on. Within a group
operand 0 has the shape of the group; any other has that shape or is 0-d. Results: output 0 of the body for all
groups, then output 1, and so on, each in its group's shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.graph import Graph, Value
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops import blocks
from jitgrad.ops.builders import full, sum_to, zero_of
from jitgrad.ops.gradient import continue_graph, reverse

__all__ = ["foreach"]


def group_operands(xs: Sequence[Any], groups: int, shared: int) -> list[list[Any]]:
    """For each group its operands, in the order of the body's inputs behind the shared ones."""
    own = xs[shared:]
    return [list(own[group::groups]) for group in range(groups)]


def _infer_foreach(*xs: TensorType, body: Graph, groups: int, shared: int) -> tuple[TensorType, ...]:
    count = len(body.inputs) - shared
    if groups < 1 or count < 1 or len(xs) != shared + groups * count:
        raise complain(ShapeError, "foreach", f"{len(xs)} operands for {groups} group(s) of {count}, {shared} shared")
    if any(x.shape for x in xs[:shared]):
        raise complain(ShapeError, "foreach", "shared operands are 0-d")
    first = xs[shared:shared + groups]
    for k, parameter in enumerate(body.inputs):
        begin = k if k < shared else shared + (k - shared) * groups
        column = xs[begin:begin + (1 if k < shared else groups)]
        for x in column:
            if x.dtype is not parameter.dtype:
                raise complain(DTypeError, "foreach", f"the body takes {parameter.dtype.short}, got {x}")
        for x, leader in zip(column, first) if k > shared else ():
            if x.shape and x.shape != leader.shape:
                raise complain(ShapeError, "foreach", f"{x} in a group of {leader}")
    return tuple([x.with_dtype(v.dtype) for v in body.outputs for x in first])


def _foreach(*xs: np.ndarray, body: Graph, groups: int, shared: int,
             into: Sequence[np.ndarray] | None = None) -> tuple[np.ndarray, ...]:
    """With `into` the results are written to that memory, which may be that of operands."""
    members = group_operands(xs, groups, shared)
    results: list[Any] = [None] * groups
    for batch in _batches(members):
        first = members[batch[0]]
        scalar = tuple([x.ndim < first[0].ndim for x in first])
        ones = tuple([x.item() == 1 for x in xs[:shared]])
        program = _program(body, ones, scalar)
        wanted = None if into is None else into[batch[0]::groups]
        if wanted is not None and len(batch) == 1 and _apart([*first, *wanted]):
            program.run([*xs[:shared], *[x.reshape(-1) if not s else x for x, s in zip(first, scalar)]],
                        [x.reshape(-1) for x in wanted])
            results[batch[0]] = wanted
            continue
        operands = [first[k] if is_scalar else _joined([members[g][k] for g in batch])
                    for k, is_scalar in enumerate(scalar)]
        outputs = program.run([*xs[:shared], *operands])
        begin = 0
        for g in batch:
            shape, size = members[g][0].shape, members[g][0].size
            results[g] = [out[begin:begin + size].reshape(shape) for out in outputs]
            begin += size
            for place, result in zip(into[g::groups] if into is not None else (), results[g]):
                np.copyto(place, result)
    return tuple([result[k] for k in range(len(body.outputs)) for result in results])


def _apart(arrays: Sequence[np.ndarray]) -> bool:
    """True when the arrays are dense, and each has memory of its own or all of another one's."""
    if not all([x.flags.c_contiguous for x in arrays]):
        return False
    spans = sorted({(x.__array_interface__["data"][0], x.nbytes) for x in arrays if x.size})
    return all([begin + size <= after for (begin, size), (after, _) in pairwise(spans)])


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """All elements in one dimension."""
    flat = [x.reshape(-1) for x in arrays]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def _batches(members: Sequence[Sequence[np.ndarray]]) -> Iterable[list[int]]:
    """Groups that are carried out as one: small ones whose 0-d operands are equal."""
    batches: dict[Any, list[int]] = {}
    for g, operands in enumerate(members):
        ndim = operands[0].ndim
        alone = operands[0].size > blocks.BLOCK // 8
        key = g if alone else tuple([x.item() if x.ndim < ndim else None for x in operands])
        batches.setdefault(key, []).append(g)
    return batches.values()


class _Step(NamedTuple):
    """One NumPy call: values are numbered; `into` is one that is no longer needed and takes the result."""

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    output: int
    attrs: dict[str, Any]
    into: int | None


class _Program:
    """A body as lists of NumPy calls: first what depends on 0-d operands alone, then, block by block, the rest. `ones`
    says which of the shared operands are 1: what is multiplied by them stays as it is."""

    def __init__(self, body: Graph, ones: tuple[bool, ...], scalar: tuple[bool, ...]):
        body = _without_products(body, {v for v, is_one in zip(body.inputs, ones) if is_one})
        number = {v: k for k, v in enumerate([*body.inputs, *[v for node in body.nodes for v in node.outputs]])}
        self.count = len(number)
        self.elements = [len(ones) + k for k, is_scalar in enumerate(scalar) if not is_scalar]
        self.outputs = [(number[v], v.dtype.numpy) for v in body.outputs]
        self.once: list[_Step] = []
        self.per_block: list[_Step] = []
        last = {number[v]: k for k, node in enumerate(body.nodes) for v in node.inputs}
        varying = set(self.elements)
        temporary: dict[int, DType] = {}
        for k, node in enumerate(body.nodes):
            inputs, output = tuple([number[v] for v in node.inputs]), number[node.outputs[0]]
            varies = not varying.isdisjoint(inputs)
            dtype, is_ufunc = node.outputs[0].dtype, isinstance(node.op.eager, np.ufunc)
            free = [i for i in inputs if varies and is_ufunc and last[i] == k and temporary.get(i) is dtype]
            (self.per_block if varies else self.once).append(
                _Step(node.op.eager, inputs, output, dict(node.attrs), free[0] if free else None))
            if varies:
                varying.add(output)
            if varies and is_ufunc and node.outputs[0] not in body.outputs:
                temporary[output] = dtype
        makers = {step.output: k for k, step in enumerate(self.per_block) if isinstance(step.function, np.ufunc)}
        self.direct = [(k, number[v], makers[number[v]]) for k, v in enumerate(body.outputs) if number[v] in makers]
        self.last = {i: k for k, step in enumerate(self.per_block) for i in step.inputs}

    def run(self, inputs: Sequence[np.ndarray], into: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """The outputs, in one dimension, like the operands that are not 0-d. `into` is memory for them, in which
        operands may lie."""
        values: list[Any] = [*inputs, *[None] * (self.count - len(inputs))]
        _carry_out(self.once, values)
        size = values[self.elements[0]].size
        results = into if into is not None else [np.empty(size, dtype) for _, dtype in self.outputs]
        direct = {output: k for k, output, step in self.direct if into is None or self._may_write(values, into[k], step)}

        def work(begin: int, end: int) -> None:
            block = list(values)
            for k in self.elements:
                block[k] = values[k][begin:end]
            wanted = [result[begin:end] for result in results]
            _carry_out(self.per_block, block, {output: wanted[k] for output, k in direct.items()})
            for place, (k, _) in zip(wanted, self.outputs):
                if block[k] is not place:
                    place[...] = block[k]

        blocks.in_blocks(size, work)
        return list(results)

    def _may_write(self, values: Sequence[Any], place: np.ndarray, step: int) -> bool:
        """True when no later step reads an operand that lies at `place`, which `step` writes."""
        address = place.__array_interface__["data"][0]
        here = [k for k in self.elements if values[k].__array_interface__["data"][0] == address]
        outputs = [number for number, _ in self.outputs]
        return all([self.last.get(k, -1) <= step and k not in outputs for k in here])


def _without_products(body: Graph, ones: set[Value]) -> Graph:
    """`body` without multiplications by values of `ones`."""
    replaced: dict[Value, Value] = {}
    nodes = []
    for node in body.nodes:
        inputs = tuple([replaced.get(v, v) for v in node.inputs])
        if node.op is ops.mul and not ones.isdisjoint(inputs):
            replaced[node.output] = inputs[1] if inputs[0] in ones else inputs[0]
            continue
        if node.op is ops.cast and inputs[0] in ones:
            ones = {*ones, node.output}
        nodes.append(dataclasses.replace(node, inputs=inputs))
    return body.replace(nodes=tuple(nodes), outputs=tuple([replaced.get(v, v) for v in body.outputs]))


_programs: dict[tuple[int, tuple[bool, ...], tuple[bool, ...]], tuple[Graph, _Program]] = {}


def _program(body: Graph, ones: tuple[bool, ...], scalar: tuple[bool, ...]) -> _Program:
    """One program per body *object*: to compare bodies would take longer than a step. It keeps its body alive."""
    key = id(body), ones, scalar
    found = _programs.get(key)
    if found is None:
        if len(_programs) >= 256:
            _programs.clear()
        found = _programs[key] = body, _Program(body, ones, scalar)
    return found[1]


def _carry_out(steps: list[_Step], values: list[Any], places: Mapping[int, np.ndarray] = MappingProxyType({})) -> None:
    """`places`: where some values are wanted."""
    for function, inputs, output, attrs, into in steps:
        operands = [values[k] for k in inputs]
        place = places.get(output)
        if place is None and into is not None:
            place = values[into]
        values[output] = function(*operands, **attrs) if place is None else function(*operands, out=place)


def body_gradient(body: Graph) -> Graph:
    """Over 0-d values: the inputs of `body` and a gradient for each of its outputs -> a gradient for each input."""
    builder = continue_graph(body)
    with builder:
        seeds: dict[Any, Any] = {}
        for v in body.outputs:
            g = builder.input(v.type)
            seeds[v] = ops.add(seeds[v], g) if v in seeds else g
        found = reverse(body.nodes, seeds, body.inputs)
        gradients = [found[v] if v in found else full((), zero_of(v.dtype), v.dtype) for v in body.inputs]
    return builder.build(gradients)


def _foreach_gradient(gs: tuple[Any, ...], xs: tuple[Any, ...], body: Graph, groups: int,
                      shared: int) -> tuple[Any, ...]:
    """One foreach over the body's backward pass; what was 0-d gets the sum over where it was used."""
    spread = ops.foreach(*xs, *gs, body=body_gradient(body), groups=groups, shared=shared)
    totals = []
    for k in range(shared):
        total, *others = [sum_to(g, ()) for g in spread[k * groups:(k + 1) * groups]]
        for g in others:
            total = ops.add(total, g)
        totals.append(total)
    own = [sum_to(g, x.shape) for g, x in zip(spread[shared * groups:], xs[shared:], strict=True)]
    return (*totals, *own)


foreach: Op = register(Op(
    "foreach", ("xs",), _infer_foreach, _foreach, "foreach", vjp=_foreach_gradient, variadic=True, outputs=0,
    doc="`body` carried out for each of `groups` groups of operands; as many results as body outputs times groups."))
