"""The array-level program: values, nodes, graphs, and the builder that makes them.

A `Graph` is frozen, ordered and in single-assignment form. It knows no particular op: what a node means is in its
`Op` record. Attributes may hold Graphs (a fused region, the body of a foreach, a checkpointed block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jitgrad.dtypes import DType
from jitgrad.ir.interpreter import interpret
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType

Where = tuple[str, int] | None


class Value:
    """The result of a node or an input of a graph. Compared by identity; `id` only names it in print."""

    __slots__ = ("id", "type")

    def __init__(self, id: int, type: TensorType):
        self.id = id
        self.type = type

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    def __repr__(self) -> str:
        return f"%{self.id}: {self.type}"


@dataclass(slots=True, eq=False)
class Node:
    """One application of an op. `where` is the user's file and line. Graphs share nodes, so none is ever changed; that the
    class does not see to it halves the time that making one takes."""

    op: Op
    inputs: tuple[Value, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    where: Where = None

    @property
    def output(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value


@dataclass(frozen=True, eq=False)
class Graph:
    """inputs -> nodes -> outputs. `writes` says which inputs are overwritten, and with what, when the graph has run:
    pairs (position of the input, value)."""

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    name: str = "graph"
    writes: tuple[tuple[int, Value], ...] = ()

    @property
    def results(self) -> tuple[Value, ...]:
        """Everything that must be computed: outputs, then written values."""
        return self.outputs + tuple(v for _, v in self.writes)

    def producers(self) -> dict[Value, Node]:
        return {v: node for node in self.nodes for v in node.outputs}

    def uses(self) -> dict[Value, list[Node]]:
        """For every value the nodes that read it, in order (a node that reads it twice stands there twice)."""
        found: dict[Value, list[Node]] = {v: [] for v in self.inputs}
        for node in self.nodes:
            for v in node.inputs:
                found[v].append(node)
            for v in node.outputs:
                found[v] = []
        return found

    def replace(self, **changes: Any) -> Graph:
        fields = {k: getattr(self, k) for k in ("inputs", "nodes", "outputs", "name", "writes")}
        return Graph(**{**fields, **changes})

    def __str__(self) -> str:
        from jitgrad.ir.printer import print_graph
        return print_graph(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from jitgrad.ir.printer import graph_html
        return graph_html(self)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Hashable; equal for graphs that compute the same from the same types (names and lines do not count).
        It is also the identity of a graph that stands in an attribute."""
        return graph_key(self.inputs, self.nodes, self.outputs, self.writes)

    @cached_property
    def effects(self) -> frozenset[str]:
        """Those of all nodes, inner ones included."""
        inner = [graph.effects for node in self.nodes for _, graph in inner_graphs(node)]
        return frozenset().union(*[node.op.effects for node in self.nodes if node.op.effects], *inner)

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self is other or self.key == other.key)


def graph_key(inputs: Iterable[Value], nodes: Iterable[Node], outputs: Iterable[Value],
              writes: Iterable[tuple[int, Value]]) -> tuple[Any, ...]:
    """See `Graph.key`."""
    number: dict[Value, int] = {}
    types = []
    for v in inputs:
        number[v] = len(number)
        types.append((v.type.dtype.short, v.type.shape, v.type.device))
    body = []
    for node in nodes:
        body.append((node.op.name, tuple([number[v] for v in node.inputs]), attrs_key(node.attrs)))
        for v in node.outputs:
            number[v] = len(number)
    return (tuple(types), tuple(body), tuple([number[v] for v in outputs]),
            tuple([(i, number[v]) for i, v in writes]))


def attrs_key(attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Attributes as a hashable tuple; floats by their bits, so that 0.0, -0.0 and nan are told apart; no bool is equal
    to an int."""
    return tuple([(k, _attr_key(v)) for k, v in sorted(attrs.items())]) if attrs else ()


def _attr_key(value: Any) -> Any:
    kind = type(value)
    if kind is int or kind is str:
        return value
    if kind is tuple:
        return value if _PLAIN.issuperset(map(type, value)) else tuple([_attr_key(v) for v in value])
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, complex):
        return "complex", value.real.hex(), value.imag.hex()
    if isinstance(value, DType):
        return value.short
    if isinstance(value, Graph):
        return value.key
    if isinstance(value, tuple):
        return tuple([_attr_key(v) for v in value])
    return value


_PLAIN = frozenset({int, str})


class GraphBuilder:
    """The interpreter that appends nodes; also the tool of every transform.

        builder = GraphBuilder()
        x = builder.input(TensorType(float32, (3,)))
        with builder:                      # primitives called in here append nodes
            y = ops.exp(x)
        graph = builder.build([y])
    """

    def __init__(self, name: str = "graph"):
        self.name = name
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.count = 0
        self.where: Where = None            # given to nodes appended from now on

    def value(self, type: TensorType) -> Value:
        self.count += 1
        return Value(self.count - 1, type)

    def input(self, type: TensorType) -> Value:
        """A new input. A graph says what is computed, and nothing about where: the device of `type` is left out."""
        v = self.value(type if type.device == "cpu" else TensorType(type.dtype, type.shape))
        self.inputs.append(v)
        return v

    def run(self, op: Op, inputs: tuple[Value, ...], attrs: dict[str, Any]) -> Any:
        """Append one node; its output, or the tuple of its outputs for ops with several."""
        types = op.infer(*[v.type for v in inputs], **attrs)
        if isinstance(types, TensorType):   # nearly always
            out = self.value(types)
            self.nodes.append(Node(op, tuple(inputs), attrs, (out,), self.where))
            return out if op.outputs == 1 else (out,)
        outputs = tuple([self.value(t) for t in types])
        self.nodes.append(Node(op, tuple(inputs), attrs, outputs, self.where))
        return outputs[0] if op.outputs == 1 else outputs

    def keep(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """Append `node` of another graph, reading `inputs` of the same types; its outputs stay the values that they are."""
        same = inputs == node.inputs
        self.nodes.append(node if same else Node(node.op, inputs, node.attrs, node.outputs, node.where))
        return node.outputs

    def copy(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """Append `node` on other inputs of the same types; its outputs."""
        outputs = tuple([self.value(v.type) for v in node.outputs])
        self.nodes.append(Node(node.op, inputs, node.attrs, outputs, self.where))
        return outputs

    def build(self, outputs: Iterable[Value], writes: Iterable[tuple[int, Value]] = ()) -> Graph:
        return Graph(tuple(self.inputs), tuple(self.nodes), tuple(outputs), self.name, tuple(writes))

    def __enter__(self) -> GraphBuilder:
        self._context = interpret(self)
        self._context.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)


def inner_graphs(node: Node) -> Sequence[tuple[str, Graph]]:
    """The attributes of a node that are graphs."""
    return [(name, value) for name, value in node.attrs.items() if type(value) is Graph] if node.attrs else ()


def run_node(node: Node, environment: dict[Value, Any]) -> None:
    """Carry out one node with the current interpreter, on the values that `environment` holds for its inputs."""
    result = node.op(*[environment[v] for v in node.inputs], **node.attrs)
    for v, r in zip(node.outputs, result if len(node.outputs) > 1 or node.op.outputs != 1 else (result,), strict=True):
        environment[v] = r


def next_id(graph: Graph) -> int:
    """An id above those of all values of `graph`."""
    return 1 + max([v.id for values in (graph.inputs, *[node.outputs for node in graph.nodes]) for v in values], default=-1)


Visit = Callable[[Node, tuple[Value, ...], GraphBuilder], Any]


def rebuild(graph: Graph, visit: Visit, builder: GraphBuilder | None = None) -> Graph:
    """Go over `graph` node by node. `visit(node, inputs, builder)` may return the outputs to use instead (one value, or
    a tuple for ops with several outputs), or None to keep the node; it runs with the builder current. The shape of
    every local rewrite. Values are never changed, so the two graphs share those that stay; where all stay, the graph
    comes back as it is."""
    builder = builder or GraphBuilder(graph.name)
    builder.inputs, builder.count = list(graph.inputs), next_id(graph)
    replaced: dict[Value, Value] = {}
    with builder:
        for node in graph.nodes:
            builder.where, inputs = node.where, node.inputs
            if not replaced.keys().isdisjoint(inputs):
                inputs = tuple([replaced.get(v, v) for v in inputs])
            result = visit(node, inputs, builder)
            if result is None:
                result = builder.keep(node, inputs)
            results = result if isinstance(result, tuple) else (result,)
            if results != node.outputs:
                replaced.update(zip(node.outputs, results, strict=True))
    if not replaced and tuple(builder.nodes) == graph.nodes:
        return graph
    return builder.build([replaced.get(v, v) for v in graph.outputs], [(i, replaced.get(v, v)) for i, v in graph.writes])
