"""Plans by graph: in memory, in the cache folder, or made.

A second process finds the plan of an equal graph in the folder, and its kernels beside it, so it runs no pass and loads
neither the compiler nor Numba. Otherwise `pipeline.build` makes the plan's specification, and the kernels that are in no
cache are compiled, in several processes when there are several.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache as remember
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgrad import config, precision
from jitgrad.garbage import Uncollected
from jitgrad.ir.graph import Graph, Where
from jitgrad.runtime import build as kernels, cache, native, threads
from jitgrad.runtime.plan import Plan, load_plan
from jitgrad.runtime.spec import PlanSpec

if TYPE_CHECKING:
    from jitgrad.plain import PlainPlan

PLANS_IN_MEMORY = 512


def compile_graph(graph: Graph, memory_budget: float = 1.0, *, tuned: bool = False) -> Plan | PlainPlan:
    """A plan that computes `graph`: its outputs, and its writes in place. Equal graphs have one plan for each memory
    budget (`jitgrad.transforms.rematerialize`), and one more if it is `tuned` (`jitgrad.tuning`)."""
    if config.current().plain:
        made = import_module("jitgrad.pipeline").build(graph, memory_budget)
        plain: PlainPlan = import_module("jitgrad.plain").PlainPlan(made.spec, made.linked)
        return plain
    key = plan_key(graph, memory_budget, tuned=tuned)
    with _lock:
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = _load(graph, key) or _compile(graph, key, memory_budget, tuned)
            if len(_plans) > PLANS_IN_MEMORY:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        return plan.told_by(lines(graph))


def lines(graph: Graph) -> tuple[Where, ...]:
    """The user's lines at which the nodes of a graph as traced were recorded. They are no part of its key, nor of its
    plan: code that was moved about finds the plan that it had, and errors name the line where it stands now."""
    return tuple([node.where for node in graph.nodes])


def plan_key(graph: Graph, memory_budget: float = 1.0, *, tuned: bool = False) -> str:
    """The key of a graph's plan: the graph, everything that made the plan, how exact it must be, and the processor. What was
    measured holds for a number of threads."""
    text = f"{graph.key!r}\0{memory_budget!r}\0{fingerprint()}\0{native.host_name()}"
    text += f"\0{threads.limit()} threads" if tuned else ""
    text += "\0less exact" if precision.allows_less() else ""
    return hashlib.sha256(text.encode()).hexdigest()


def clear_plans() -> None:
    """Forget the plans in memory; those in the cache folder stay."""
    with _lock:
        _plans.clear()


_plans: OrderedDict[str, Plan] = OrderedDict()
_lock = threading.RLock()


def _load(graph: Graph, key: str) -> Plan | None:
    """The plan of `graph` stored under `key`; None when there is none, or when it is damaged."""
    data = cache.current().get("plans", key)
    if data is None:
        return None
    try:
        return load_plan(PlanSpec.from_json(data.decode()), lines(graph))
    except ValueError:
        return None


def _compile(graph: Graph, key: str, memory_budget: float, tuned: bool) -> Plan:
    tuner: Any = import_module("jitgrad.tuning").Tuner() if tuned else None
    with Uncollected():
        spec: PlanSpec = import_module("jitgrad.pipeline").build(graph, memory_budget, tuner).spec
        if tuner:
            spec = replace(spec, choices=tuple(tuner.decisions.values()))
        names = spec.kernels
        sources = [(text, names[kernel]) for kernel, text in spec.sources.items()]
        addresses = kernels.kernels([*sources, *threads.sources(spec.is_grouped)])
    if tuner is None or tuner.complete:
        cache.current().put("plans", key, spec.to_json().encode())
    return Plan(spec, addresses, lines(graph))


@remember
def fingerprint() -> str:
    """Versions of the compilers, and our own code: a plan lasts until either changes."""
    digest = hashlib.sha256(kernels.fingerprint().encode())
    package = Path(__file__).parent
    for folder in ("", "ir", "ops", "transforms", "codegen", "runtime", "runtime/cuda"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- the compiler, which is loaded when a kernel is in no cache --------------------------------------------------

compile_seconds: dict[str, float] = {}
"""How long each kernel took that this process has compiled, by its key."""


def _compile_kernels(sources: Sequence[tuple[str, str]]) -> list[bytes]:
    compile_source = import_module("jitgrad.codegen.native").compile_source
    compiled: list[tuple[bytes, float]] = import_module("jitgrad.codegen.parallel").compile_all(
        compile_source, sources, threads.limit())
    for (text, name), (_, seconds) in zip(sources, compiled, strict=True):
        compile_seconds[kernels.kernel_key(text)] = seconds
        if "times" in config.current().debug:
            print(f"# compiled {name} in {1000 * seconds:.1f} ms", file=sys.stderr)
    return [data for data, _ in compiled]


kernels.set_compiler(_compile_kernels)
