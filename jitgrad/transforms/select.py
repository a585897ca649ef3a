"""Selections of one element per row as arithmetic, so that they are part of the kernel that makes the row.

``gather`` with one index per row becomes a sum over ``where(position == index, x, 0)``, and adding one element per row
to zeros becomes that ``where`` itself: the two halves of the negative log likelihood. Only where the row is computed
(or made) by a kernel anyway; the range of the index is checked as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, rebuild
from jitgrad.ops.check import check_index


def select_in_rows(graph: Graph) -> Graph:
    """`graph` with its gathers and scatters of one element per row, where it pays, spelled elementwise."""
    if not any(node.op.name in _SPELLINGS for node in graph.nodes):
        return graph
    producers = graph.producers()

    def visit(node: Node, inputs: tuple[Value, ...], builder: GraphBuilder) -> Any:
        spelling = _SPELLINGS.get(node.op.name)
        if spelling is None or not _is_one_per_row(node):
            return None
        return spelling(_maker(node.inputs[0], producers), *inputs, **node.attrs)

    return rebuild(graph, visit)


def _is_one_per_row(node: Node) -> bool:
    x, index = node.inputs[:2]
    axis = node.attrs["axis"]
    return x.type.size > 0 and not x.dtype.is_complex and index.shape == (*x.shape[:axis], 1, *x.shape[axis + 1:])


def _maker(value: Value, producers: dict[Value, Node]) -> Node | None:
    """The node that computes `value`, behind movement ops."""
    node = producers.get(value)
    while node is not None and node.op.kind == "movement" and node.op.view:
        node = producers.get(node.inputs[0])
    return node


def _gather(maker: Node | None, x: Any, index: Any, *, axis: int) -> Any:
    if maker is None or maker.op.kind != "elementwise":
        return None
    chosen = ops.where(_hit(x, index, axis), x, ops.zeros_like(x))
    return ops.reshape(ops.sum(chosen, axes=(axis,)), shape=index.shape)


def _scatter_add(maker: Node | None, x: Any, index: Any, source: Any, *, axis: int) -> Any:
    if maker is None or maker.op.name != "constant" or maker.attrs["value"] != 0:
        return None
    return ops.where(_hit(x, index, axis), ops.broadcast_to(source, shape=x.shape), x)


def _hit(x: Any, index: Any, axis: int) -> Any:
    """True at the position along `axis` that `index` names."""
    checked = check_index(index, ops.full(index.shape, x.shape[axis], index.dtype))
    position = ops.iota(shape=x.shape, axis=axis, dtype=index.dtype)
    return ops.eq(position, ops.broadcast_to(checked, shape=x.shape))


_SPELLINGS: dict[str, Callable[..., Any]] = {"gather": _gather, "scatter_add": _scatter_add}
