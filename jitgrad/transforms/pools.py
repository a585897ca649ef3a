"""Graph of regions -> the same, with pooling in the regions of the convolutions beside it.

A convolution's kernel makes some planes of its result after the other, with what follows element by element. What pools
them joins it, if these are few enough: they are pooled while they are in the cache, and where nothing else reads them they
are never stored as a whole. So the region of template "convolution", or the convolution alone, becomes one of template
"pool", with the results of the pooling as outputs.

Likewise the gradient of what is pooled is spread over planes by the kernel that reads them, where this is only the one of
the gradient in a convolution's weights: both become a region of template "pool_grad".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from jitgrad.ir.graph import Graph, Node
from jitgrad.ops.region import region, region_of

POOLS = ("max_pool", "avg_pool")
GRADIENTS = ("max_pool_grad", "avg_pool_grad")


def fuse_pools(graph: Graph, pools: Callable[[Graph], bool], spreads: Callable[[Graph], bool]) -> Graph:
    """See the module's text. `pools`, `spreads`: whether the kernel of such a body has planes few enough."""
    joined, gone = dict[Node, Node](), set[Node]()
    for found, taken in (*_pooled(graph, pools), *_spread(graph, spreads)):
        joined[taken[0]] = found
        gone.update(taken[1:])
    return graph.replace(nodes=tuple([joined.get(node, node) for node in graph.nodes if node not in gone]))


def _pooled(graph: Graph, fits: Callable[[Graph], bool]) -> list[tuple[Node, list[Node]]]:
    """Regions, each with the convolution and the pools that it is made of; of a convolution with several results that are
    pooled the first."""
    producers, results = graph.producers(), set(graph.results)
    found: dict[Node, tuple[Node, list[Node]]] = {}
    for value, readers in graph.uses().items():
        pools, convolution = [node for node in readers if node.op.name in POOLS], producers.get(value)
        if not pools or not _is_convolution(convolution) or convolution in found:
            continue
        made = convolution.attrs["body"].nodes if convolution.op is region else (convolution,)
        alone = value not in results and len(pools) == len(readers)
        outputs = [v for v in convolution.outputs if v is not value or not alone] + [v for p in pools for v in p.outputs]
        together = region_of((*made, *pools), tuple(outputs), "pool", convolution)
        if fits(together.attrs["body"]):
            found[convolution] = together, [convolution, *pools]
    return list(found.values())


def _is_convolution(node: Node | None) -> TypeGuard[Node]:
    return node is not None and (node.attrs["template"] if node.op is region else node.op.epilogue) == "convolution"


def _spread(graph: Graph, fits: Callable[[Graph], bool]) -> list[tuple[Node, list[Node]]]:
    """Regions, each with the gradient in weights and the pool's gradient that it is made of."""
    producers, uses, results = graph.producers(), graph.uses(), set(graph.results)
    found = []
    for node in graph.nodes:
        spread = producers.get(node.inputs[1]) if node.op.name == "convolution_weight_grad" else None
        if spread is None or spread.op.name not in GRADIENTS or spread.output in results or len(uses[spread.output]) > 1:
            continue
        together = region_of((spread, node), node.outputs, "pool_grad", node)
        if fits(together.attrs["body"]):
            found.append((together, [node, spread]))
    return found
