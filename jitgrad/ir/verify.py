"""Checks that hold for every graph: single assignment, nothing unbound, recorded types are the recomputed ones."""

from __future__ import annotations

from jitgrad.errors import VerifyError
from jitgrad.ir.graph import Graph, Value, inner_graphs


def verify(graph: Graph, after: str = "") -> Graph:
    """`graph` itself, or VerifyError naming the node and the pass (`after`) that broke it."""
    bound: set[Value] = set()
    suffix = f" (after {after})" if after else ""

    def bind(values: tuple[Value, ...]) -> None:
        for v in values:
            if v in bound:
                raise VerifyError(f"{graph.name}: %{v.id} is assigned twice{suffix}")
            bound.add(v)

    bind(graph.inputs)
    for node in graph.nodes:
        for v in node.inputs:
            if v not in bound:
                raise VerifyError(f"{graph.name}: {node.op.name} reads %{v.id} before it is assigned{suffix}")
        for _, inner in inner_graphs(node):
            verify(inner, after)
        computed = node.op.result_types(tuple(v.type for v in node.inputs), dict(node.attrs))
        recorded = tuple(v.type for v in node.outputs)
        if computed != recorded:
            raise VerifyError(f"{graph.name}: {node.op.name} is recorded as {recorded} but gives {computed}{suffix}")
        bind(node.outputs)
    for v in graph.results:
        if v not in bound:
            raise VerifyError(f"{graph.name}: the result %{v.id} is never assigned{suffix}")
    for position, v in graph.writes:
        if graph.inputs[position].type != v.type:
            raise VerifyError(f"{graph.name}: input {position} is {graph.inputs[position].type}, "
                              f"but {v.type} is written to it{suffix}")
    return graph
