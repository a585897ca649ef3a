"""Simplification: a Graph in, an equal and smaller Graph out, bit for bit (`rewrite` says what that means)."""

from jitgrad.ir.graph import Graph
from jitgrad.transforms import algebra, movement  # noqa: F401  (they register their rules)
from jitgrad.transforms.rewrite import rewrite


def simplify(graph: Graph) -> Graph:
    """`graph` under every rule of `algebra` and `movement`, in one pass."""
    return rewrite(graph)
