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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, attrs_key, inner_graphs, rebuild
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import REGISTRY, Op
from jitgrad.ir.types import TensorType

Result = Any            # a Value, a tuple of them for an op with several outputs, or None
Match = Callable[[tuple[Value, ...], Mapping[str, Any]], Result]

RULES: dict[str, list[Match]] = {}                  # by the name of the op
GENERIC: list[Callable[[Op, tuple[Value, ...], Mapping[str, Any]], Result]] = []       # tried for every elementwise op


def rule(*names: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register the function below for the ops called `names`."""

    def enter(function: Callable[..., Result]) -> Callable[..., Result]:
        for name in names:
            RULES.setdefault(name, []).append(_by_name(REGISTRY[name], function))
        return function

    return enter


def elementwise_rule(function: Callable[[Op, tuple[Value, ...], Mapping[str, Any]], Result]) -> Any:
    """Register a rule ``(op, operands, attrs)`` for all elementwise ops."""
    GENERIC.append(function)
    return function


def _by_name(op: Op, function: Callable[..., Result]) -> Match:
    """`function` called with operands and attributes by the names of its parameters."""
    names = tuple(inspect.signature(function).parameters)
    if op.variadic:
        return lambda inputs, attrs: function(*[inputs if name == op.operands[0] else attrs[name] for name in names])
    places = [(op.operands.index(name) if name in op.operands else -1, name) for name in names]
    return lambda inputs, attrs: function(*[inputs[k] if k >= 0 else attrs[name] for k, name in places])


class Rewriter(GraphBuilder):
    """A builder that tries the rules before it appends, and remembers who made each value."""

    def __init__(self, name: str = "graph"):
        super().__init__(name)
        self.made_by: dict[Value, Node] = {}
        self.uniform: dict[Value, np.ndarray] = {}          # values all of whose elements are one constant
        self.fulls: dict[tuple[Any, ...], Value] = {}

    def run(self, op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Any:
        result = self.simplified(op, inputs, attrs)
        return self.append(op, inputs, attrs) if result is None else result

    def simplified(self, op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Result:
        """What the first rule that applies makes of it."""
        for match in RULES.get(op.name, ()):
            result = match(inputs, attrs)
            if result is not None:
                return result
        for generic in GENERIC if op.kind == "elementwise" else ():
            result = generic(op, inputs, attrs)
            if result is not None:
                return result
        return None

    def append(self, op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Any:
        """Append the node as it is."""
        if op.name == "constant":
            return self.constant(attrs)
        result = super().run(op, inputs, dict(attrs))
        self._remember(self.nodes[-1])
        return result

    def keep(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """`node` as it is, unless it is a constant that is there already."""
        key = attrs_key(node.attrs) if node.op.name == "constant" else None
        if key is not None and key in self.fulls:
            return (self.fulls[key],)
        outputs = super().keep(node, inputs)
        self._remember(self.nodes[-1])
        if key is not None:
            self.fulls[key] = node.output
        return outputs

    def _remember(self, node: Node) -> None:
        for v in node.outputs:
            self.made_by[v] = node
        if node.op.name == "constant":
            self.uniform[node.output] = ops.constant.eager(**node.attrs)
        elif node.op.kind == "movement" and len(node.inputs) == 1 and node.op.view and node.inputs[0] in self.uniform:
            self.uniform[node.output] = self.uniform[node.inputs[0]]

    def constant(self, attrs: Mapping[str, Any]) -> Value:
        key = attrs_key(attrs)
        if key not in self.fulls:
            self.fulls[key] = super().run(ops.constant, (), dict(attrs))
            self._remember(self.nodes[-1])
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
    return state.current  # type: ignore[return-value]


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
    return rebuild(graph, _visit, Rewriter(graph.name))


def _visit(node: Node, inputs: tuple[Value, ...], builder: Any) -> Result:
    graphs = inner_graphs(node)
    rewritten = {name: rewrite(inner) for name, inner in graphs}
    if any([rewritten[name] is not inner for name, inner in graphs]):
        return builder.run(node.op, inputs, {**node.attrs, **rewritten})
    return builder.simplified(node.op, inputs, node.attrs)
