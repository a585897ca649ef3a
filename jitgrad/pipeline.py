"""From a graph to the specification of a plan: every pass by name, in order.

    graph ── transforms ──▶ graph of regions ── memory plan ──▶ link ──▶ PlanSpec

`build` compiles nothing, and keeps what lies on the way for `jitgrad.inspect`. `jitgrad.plans` calls it for graphs whose
plan is in no cache, and compiles the kernels.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from jitgrad import config, gpu_linking
from jitgrad.codegen.convolution import pools_in_cache
from jitgrad.codegen.cuda_attended import is_the_librarys
from jitgrad.codegen.cuda_product import EXACT, Products
from jitgrad.codegen.pooled import spreads_in_cache
from jitgrad.ir.graph import Graph
from jitgrad.ir.printer import print_graph
from jitgrad.ir.verify import verify
from jitgrad.linking import Choose, Linked, best_in_place, link, may_share, plan_spec
from jitgrad.runtime.spec import PlanSpec
from jitgrad.transforms.attention import recognize_attention
from jitgrad.transforms.columns import fuse_column_sums
from jitgrad.transforms.cse import eliminate_common_subexpressions
from jitgrad.transforms.dce import eliminate_dead_code
from jitgrad.transforms.fuse import fuse
from jitgrad.transforms.memory import Assignment, assign_memory, output_identities
from jitgrad.transforms.operands import read_by_a_library, read_where_they_lie
from jitgrad.transforms.pools import fuse_pools
from jitgrad.transforms.rematerialize import rematerialize
from jitgrad.transforms.simplify import simplify
from jitgrad.transforms.update import fuse_updates
from jitgrad.transforms.volumes import split_grouped_volumes

Pass = tuple[str, Callable[[Graph], Graph]]

PASSES: tuple[Pass, ...] = (
    ("attention", recognize_attention),
    ("volumes", split_grouped_volumes),
    ("simplify", simplify),
    ("cse", eliminate_common_subexpressions),
    ("dce", eliminate_dead_code),
    ("fuse", fuse),
    ("operands", read_where_they_lie),
    ("columns", fuse_column_sums),
    ("pools", functools.partial(fuse_pools, pools=pools_in_cache, spreads=spreads_in_cache)),
    ("update", fuse_updates),
)


_FUSE_FOR_GPU: Pass = "fuse", functools.partial(fuse, narrow=True, lean=True, packs=False)

GPU_PASSES: tuple[Pass, ...] = tuple([_FUSE_FOR_GPU if step[0] == "fuse" else step for step in PASSES
                                      if step[0] not in ("volumes", "operands", "columns", "pools", "update")])
"""Those whose results have GPU kernels: on the CPU kernels of products do more than that; on GPUs convolutions of 16-bit
floats have kernels, and what is elementwise costs less than memory."""


def passes(memory_budget: float = 1.0, gpu: bool = False) -> tuple[Pass, ...]:
    """Every pass; below a budget of 1 also the one that computes values again."""
    chosen = GPU_PASSES if gpu else PASSES
    again: Pass = "rematerialize", functools.partial(rematerialize, budget=memory_budget)
    before = [name for name, _ in chosen].index("fuse")
    return chosen if memory_budget >= 1 else (*chosen[:before], again, *chosen[before:])


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """The graph after a pass, and the seconds that the pass took."""

    name: str
    graph: Graph
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Build:
    """All that lies between a graph and its plan; `stages` begins with the graph as traced."""

    stages: tuple[Stage, ...]
    assignment: Assignment
    linked: Linked
    spec: PlanSpec


def build(graph: Graph, memory_budget: float = 1.0, choose: Choose | None = None) -> Build:
    """Run every pass; compiles nothing, unless `choose` does, which answers what can be chosen about a step.
    `memory_budget`: see `jitgrad.transforms.rematerialize`; where fusion alone needs less memory than what a budget makes
    of the graph, that is the result."""
    result = _run(graph, memory_budget, choose)
    if memory_budget < 1:
        result = min(result, _run(graph, 1.0, choose), key=lambda made: made.linked.arena)
    _print(result)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class GpuBuild:
    """The same for a GPU."""

    stages: tuple[Stage, ...]
    assignment: Assignment
    linked: gpu_linking.GpuLinked
    spec: PlanSpec


def build_for_gpu(graph: Graph, arch: str, memory_budget: float = 1.0, allowed: Products = EXACT,
                  choose: gpu_linking.Choose | None = None) -> GpuBuild:
    """Run the passes for GPUs of an architecture ("sm_90"); compiles nothing, unless `choose` does, which answers what can
    be chosen about a step. `allowed`: what may be done about products."""
    traced, identities = graph, output_identities(graph)
    stages = _stages(graph, (*passes(memory_budget, gpu=True), *_for_libraries(allowed)))
    graph = stages[-1].graph
    assignment = assign_memory(graph, identities, gpu_linking.may_share)
    linked = gpu_linking.link(assignment, arch, allowed, choose)
    result = GpuBuild(stages, assignment, linked, gpu_linking.plan_spec(graph, assignment, linked, traced, arch))
    _print(result)
    return result


def _for_libraries(allowed: Products) -> tuple[Pass, ...]:
    """What is done for the sake of what libraries may compute."""
    if allowed.attending is None:
        return ()
    takes = functools.partial(is_the_librarys, allowed=allowed)
    return (("operands", functools.partial(read_by_a_library, takes=takes)),)


def _stages(graph: Graph, steps: tuple[Pass, ...]) -> tuple[Stage, ...]:
    """The graph as traced, and after every pass."""
    stages = [Stage("trace", _checked(graph, "trace"), 0.0)]
    for name, step in steps:
        begin = time.perf_counter()
        graph = step(graph)
        stages.append(Stage(name, _checked(graph, name), time.perf_counter() - begin))
    return tuple(stages)


def _run(graph: Graph, memory_budget: float, choose: Choose | None) -> Build:
    traced, identities = graph, output_identities(graph)
    stages = _stages(graph, passes(memory_budget))
    graph = stages[-1].graph
    assignment = assign_memory(graph, identities, may_share, best_in_place)
    linked = link(assignment, choose)
    return Build(stages, assignment, linked, plan_spec(graph, assignment, linked, traced))


# ---- looking on --------------------------------------------------------------------------------------------------


def _checked(graph: Graph, name: str) -> Graph:
    return verify(graph, name) if config.current().check else graph


def _print(result: Build | GpuBuild) -> None:
    """What the debug setting asks for, on standard error."""
    words = config.current().debug
    for stage in result.stages:
        title = f"after {stage.name}: {len(stage.graph.nodes)} nodes, {1000 * stage.seconds:.1f} ms"
        if "graphs" in words:
            _say(print_graph(stage.graph, title))
        elif "times" in words:
            _say(f"# {title}")
    for entry in result.spec.entries if "kernels" in words else ():
        _say(f"# {entry.name}: {'NumPy' if entry.host else f'{entry.items} items'}")
    for text in result.spec.sources.values() if "source" in words else ():
        _say(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
