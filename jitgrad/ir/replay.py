"""Carrying out a Graph: with NumPy (the reference that everything is compared with), or with any interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jitgrad.ir.graph import Graph, Value, run_node
from jitgrad.ir.op import Op


class NumpyInterpreter:
    """Runs primitives on NumPy arrays by their reference implementation."""

    def run(self, op: Op, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        return op.eager(*inputs, **attrs)


def replay(graph: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of `graph` for `inputs`, then the written values, by the current interpreter."""
    environment: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        run_node(node, environment)
    return tuple(environment[v] for v in graph.results)


def evaluate(graph: Graph, arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The outputs of `graph`, then the written values, by NumPy. Nothing given is changed."""
    from jitgrad.ir.interpreter import interpret
    with interpret(NumpyInterpreter()):
        return replay(graph, list(arrays))
