"""Local rewriting: what a rule is, and the interpreter that applies rules while a graph is rebuilt.

A rule is a function of an op's operands and attributes, taken by the names of its parameters. It returns the value to
use instead, or None. Ops that it calls are rewritten in turn, so a pass over the nodes in order reaches the end; every
rule must make its program smaller or move it towards the normal form of constants, `Rewriter.full`.

    @rule("mul")
    def drop_multiply_by_one(x, y):
        "x * 1 -> x"
        return x if is_constant(y, 1) else None

A rule keeps every bit of every result. Only NaNs count as one value: their sign and payload may change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, attrs_key
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import REGISTRY, Op
from jitgrad.ir.types import TensorType

Result = Any            # a Value, a tuple of them for an op with several outputs, or None
Match = Callable[[tuple[Value, ...], dict[str, Any]], Result]

RULES: dict[str, list[Match]] = {}                  # by the name of the op
GENERIC: list[Callable[[Op, tuple[Value, ...], dict[str, Any]], Result]] = []       # tried for every elementwise op


def rule(*names: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register the function below for the ops called `names`."""

    def enter(function: Callable[..., Result]) -> Callable[..., Result]:
        for name in names:
            RULES.setdefault(name, []).append(_by_name(REGISTRY[name], function))
        return function

    return enter


def elementwise_rule(function: Callable[[Op, tuple[Value, ...], dict[str, Any]], Result]) -> Any:
    """Register a rule ``(op, operands, attrs)`` for all elementwise ops."""
    GENERIC.append(function)
    return function


def _by_name(op: Op, function: Callable[..., Result]) -> Match:
    """`function` called with operands and attributes by the names of its parameters."""
    names = tuple(inspect.signature(function).parameters)

    def match(inputs: tuple[Value, ...], attrs: dict[str, Any]) -> Result:
        given: dict[str, Any] = {op.operands[0]: inputs} if op.variadic else dict(zip(op.operands, inputs))
        given.update(attrs)
        return function(*[given[name] for name in names])

    return match


class Rewriter(GraphBuilder):
    """A builder that tries the rules before it appends, and remembers who made each value."""

    def __init__(self, name: str = "graph"):
        super().__init__(name)
        self.made_by: dict[Value, Node] = {}
        self.uniform: dict[Value, np.ndarray] = {}          # values all of whose elements are one constant
        self.fulls: dict[tuple[Any, ...], Value] = {}

    def run(self, op: Op, inputs: tuple[Value, ...], attrs: dict[str, Any]) -> Any:
        for match in RULES.get(op.name, ()):
            result = match(inputs, attrs)
            if result is not None:
                return result
        if op.kind == "elementwise":
            for generic in GENERIC:
                result = generic(op, inputs, attrs)
                if result is not None:
                    return result
        return self.append(op, inputs, attrs)

    def append(self, op: Op, inputs: tuple[Value, ...], attrs: dict[str, Any]) -> Any:
        """Append the node as it is."""
        if op.name == "constant":
            return self.constant(attrs)
        result = super().run(op, inputs, attrs)
        node = self.nodes[-1]
        self.made_by.update((v, node) for v in node.outputs)
        if op.kind == "movement" and len(inputs) == 1 and op.view and inputs[0] in self.uniform:
            self.uniform[result] = self.uniform[inputs[0]]
        return result

    def constant(self, attrs: dict[str, Any]) -> Value:
        key = attrs_key(attrs)
        if key not in self.fulls:
            v = super().run(ops.constant, (), attrs)
            self.made_by[v] = self.nodes[-1]
            self.uniform[v] = ops.constant.eager(**attrs)
            self.fulls[key] = v
        return self.fulls[key]

    def full(self, type: TensorType, value: np.ndarray) -> Value:
        """The normal form of a uniform value: a constant, reshaped to ones, broadcast. One per content."""
        key = (type, attrs_key({"value": value.item()}))
        if key not in self.fulls:
            v = self.constant({"value": value.item(), "dtype": type.dtype})
            if type.ndim:
                v = self.append(ops.reshape, (v,), {"shape": (1,) * type.ndim})
            if type.size != 1:
                v = self.append(ops.broadcast_to, (v,), {"shape": type.shape})
            self.fulls[key] = v
        return self.fulls[key]


def rewriter() -> Rewriter:
    """The one that is applying rules now."""
    return cast(Rewriter, state.current)


def made_by(v: Value, *names: str) -> Node | None:
    """The node that made `v`, if its op is one of `names`."""
    node = rewriter().made_by.get(v)
    return node if node is not None and node.op.name in names else None


def operand_of(v: Value, name: str) -> Value | None:
    """x when `v` is op `name` of x."""
    node = made_by(v, name)
    return node.inputs[0] if node else None


def constant_value(v: Value) -> np.ndarray | None:
    """The 0-d array that all elements of `v` are equal to, if that is known."""
    return rewriter().uniform.get(v)


def is_constant(v: Value, value: float) -> bool:
    """All elements of `v` are `value`; 0.0 and -0.0 are told apart for floats, and NaN is no constant."""
    found = constant_value(v)
    if found is None or not bool(found == value):
        return False
    if v.dtype.is_complex:
        return bool(np.signbit(found.real) == np.signbit(value)) and not np.signbit(found.imag)
    return v.dtype.category != "f" or bool(np.signbit(found) == np.signbit(value))


def full_like(v: Value, value: float) -> Value:
    return rewriter().full(v.type, np.asarray(value, v.dtype.numpy))


def rewrite(graph: Graph) -> Graph:
    """`graph` and the graphs in its attributes under all registered rules, in one pass over the nodes."""
    builder = Rewriter(graph.name)
    mapped: dict[Value, Value] = {v: builder.input(v.type) for v in graph.inputs}
    with builder:
        for node in graph.nodes:
            builder.where = node.where
            attrs = {k: rewrite(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
            result = builder.run(node.op, tuple([mapped[v] for v in node.inputs]), attrs)
            mapped.update(zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True))
    return builder.build([mapped[v] for v in graph.outputs], [(i, mapped[v]) for i, v in graph.writes])
