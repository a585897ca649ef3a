"""From a graph to a plan: every pass by name, in order.

    graph ── simplify ── cse ── dce ── fuse ── memory plan ── link ──▶ PlanSpec ── kernels from the cache ──▶ Plan

`compile_graph` looks for the plan of an equal graph first: in memory, then in the cache folder, where a second process
finds it with its kernels, so that it runs no pass and never loads Numba. `build` is the way itself, and keeps what
lies on it for `jitgrad.inspect`.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as remember
from importlib import import_module
from pathlib import Path

from jitgrad import config
from jitgrad.ir.graph import Graph
from jitgrad.ir.printer import print_graph
from jitgrad.ir.verify import verify
from jitgrad.linking import Linked, begins_with_copy, link, may_share, plan_spec
from jitgrad.plain import PlainPlan
from jitgrad.runtime import build as kernels, cache, native
from jitgrad.runtime.plan import Plan, load_plan
from jitgrad.runtime.spec import PlanSpec
from jitgrad.transforms.cse import eliminate_common_subexpressions
from jitgrad.transforms.dce import eliminate_dead_code
from jitgrad.transforms.fuse import fuse
from jitgrad.transforms.memory import Assignment, assign_memory, output_identities
from jitgrad.transforms.simplify import simplify

PASSES: tuple[tuple[str, Callable[[Graph], Graph]], ...] = (
    ("simplify", simplify),
    ("cse", eliminate_common_subexpressions),
    ("dce", eliminate_dead_code),
    ("fuse", fuse),
)

PLANS_IN_MEMORY = 512


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


def compile_graph(graph: Graph) -> Plan | PlainPlan:
    """A plan that computes `graph`: its outputs, and its writes in place. Equal graphs have one plan."""
    if config.current().plain:
        made = build(graph)
        return PlainPlan(made.spec, made.linked)
    key = plan_key(graph)
    with _lock:
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = _load(key) or _compile(graph, key)
            if len(_plans) > PLANS_IN_MEMORY:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        return plan


def build(graph: Graph) -> Build:
    """Run every pass; compiles nothing."""
    identities = output_identities(graph)
    stages = [Stage("trace", _checked(graph, "trace"), 0.0)]
    for name, step in PASSES:
        begin = time.perf_counter()
        graph = step(graph)
        stages.append(Stage(name, _checked(graph, name), time.perf_counter() - begin))
    assignment = assign_memory(graph, identities, may_share, begins_with_copy)
    linked = link(assignment)
    result = Build(tuple(stages), assignment, linked, plan_spec(graph, assignment, linked))
    _print(result)
    return result


def plan_key(graph: Graph) -> str:
    """The key of a graph's plan: the graph, everything that made the plan, and the processor."""
    text = f"{graph.key!r}\0{_fingerprint()}\0{native.host_name()}"
    return hashlib.sha256(text.encode()).hexdigest()


def clear_plans() -> None:
    """Forget the plans in memory; those in the cache folder stay."""
    with _lock:
        _plans.clear()


_plans: OrderedDict[str, Plan] = OrderedDict()
_lock = threading.RLock()


def _load(key: str) -> Plan | None:
    """The plan stored under `key`; None when there is none, or when it is damaged."""
    data = cache.current().get("plans", key)
    if data is None:
        return None
    try:
        return load_plan(PlanSpec.from_json(data.decode()))
    except ValueError:
        return None


def _compile(graph: Graph, key: str) -> Plan:
    spec = build(graph).spec
    addresses = kernels.kernels([(text, spec.kernels[kernel]) for kernel, text in spec.sources.items()])
    cache.current().put("plans", key, spec.to_json().encode())
    return Plan(spec, addresses)


@remember
def _fingerprint() -> str:
    """Versions of the compilers, and our own code: a plan lasts until either changes."""
    digest = hashlib.sha256(kernels.fingerprint().encode())
    package = Path(__file__).parent
    for folder in ("", "ir", "ops", "transforms", "codegen", "runtime"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- the compiler, which is loaded when a kernel is in no cache --------------------------------------------------

compile_seconds: dict[str, float] = {}
"""How long each kernel took that this process has compiled, by its key."""


def _compile_kernels(sources: Sequence[tuple[str, str]]) -> list[bytes]:
    compiler = import_module("jitgrad.codegen.native")
    objects = []
    for text, name in sources:
        begin = time.perf_counter()
        objects.append(compiler.compile_source(text, name))
        compile_seconds[kernels.kernel_key(text)] = seconds = time.perf_counter() - begin
        if "times" in config.current().debug:
            _say(f"# compiled {name} in {1000 * seconds:.1f} ms")
    return objects


kernels.set_compiler(_compile_kernels)

# ---- looking on --------------------------------------------------------------------------------------------------


def _checked(graph: Graph, name: str) -> Graph:
    return verify(graph, name) if config.current().check else graph


def _print(result: Build) -> None:
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
