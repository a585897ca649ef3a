"""Graph of regions -> the same, with the pooling of a convolution's result in the region of that convolution.

A convolution's kernel makes some planes of its result after the other, with what follows element by element. What pools
them joins it, if these are few enough: they are pooled while they are in the cache, and where nothing else reads them they
are never stored as a whole. So the region of template "convolution", or the convolution alone, becomes one of template
"pool", with the results of the pooling as outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ops.region import region, region_of

POOLS = ("max_pool", "avg_pool")


def fuse_pools(graph: Graph, fits: Callable[[Node], bool]) -> Graph:
    """See the module's text. `fits`: whether a region of template "pool" has planes few enough."""
    producers, uses = graph.producers(), graph.uses()
    joined: dict[Node, Node] = {}
    gone: set[Node] = set()
    for value, readers in uses.items():
        pools = [node for node in readers if node.op.name in POOLS]
        convolution = producers.get(value)
        if pools and convolution not in joined and _is_convolution(convolution):
            needed = {v for v in convolution.outputs if v is not value or v in graph.results or len(pools) < len(readers)}
            region = _join(convolution, pools, needed)
            if fits(region):
                joined[convolution] = region
                gone.update(pools)
    return graph.replace(nodes=tuple([joined.get(node, node) for node in graph.nodes if node not in gone]))


def _is_convolution(node: Node | None) -> TypeGuard[Node]:
    return node is not None and (node.attrs["template"] if node.op is region else node.op.epilogue) == "convolution"


def _join(convolution: Node, pools: list[Node], needed: set[Value]) -> Node:
    """Both as one region, of which outputs are what is `needed` of the convolution's, and all that pools make."""
    made = convolution.attrs["body"].nodes if convolution.op is region else (convolution,)
    outputs = [v for v in convolution.outputs if v in needed] + [v for pool in pools for v in pool.outputs]
    return region_of((*made, *pools), tuple(outputs), "pool", convolution)
