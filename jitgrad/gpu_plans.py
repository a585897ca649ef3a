"""Plans for GPUs by graph: in memory, in the cache folder, or made; what `plans` is for the CPU.

A graph says what is computed, and nothing about where: equal graphs have one specification for all GPUs of an
architecture, and one `GpuPlan` for each GPU. A process that finds specification and machine code in the folder loads
neither Numba nor NVIDIA's packages.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from dataclasses import replace
from importlib import import_module
from typing import Any

from jitgrad import config, plans, precision
from jitgrad.codegen.cuda_product import EXACT, Products
from jitgrad.ir.graph import Graph
from jitgrad.runtime import cache, threads
from jitgrad.runtime.cuda import code, cublaslt
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.plan import GpuPlan
from jitgrad.runtime.spec import PlanSpec

_plans: OrderedDict[tuple[Gpu, str, bool], GpuPlan] = OrderedDict()
_lock = threading.RLock()


def compile_for(graph: Graph, gpu: Gpu, memory_budget: float = 1.0, captures: bool = False, *,
                tuned: bool = False) -> GpuPlan:
    """A plan that computes `graph` on `gpu`. `captures`: its calls may become CUDA graphs. `tuned`: what can be chosen is
    measured (`jitgrad.gpu_tuning`)."""
    allowed = _allowed(gpu)
    tuned = tuned and allowed.leave_choices                 # without a library there is nothing to choose
    key = plan_key(graph, code.architecture(gpu), memory_budget, allowed, tuned=tuned)
    with _lock:
        plan = _plans.get((gpu, key, captures))
        if plan is None:
            spec = _specification(graph, key, gpu, memory_budget, allowed, tuned)
            plan = _plans[gpu, key, captures] = GpuPlan(spec, gpu, captures, allowed, plans.lines(graph))
            if len(_plans) > plans.PLANS_IN_MEMORY:
                _plans.popitem(last=False)
        _plans.move_to_end((gpu, key, captures))
        return plan


def settings() -> tuple[bool, bool, str]:
    """All settings that decide which plan a graph has, in a form that can be compared quickly."""
    current = config.current()
    return precision.allows_less(), current.cublas, current.cudnn


def _allowed(gpu: Gpu) -> Products:
    """What may be done about products, convolutions and attention on `gpu` as things are set."""
    tf32, for_products, often = settings()
    cudnn: Any = import_module("jitgrad.runtime.cuda.cudnn")
    found = {cublaslt: cublaslt.identity() if for_products else "",
             cudnn: cudnn.identity() if often != "never" else ""}
    accepts = [functools.partial(library.accepts, gpu) if name else None for library, name in found.items()]
    identity = ", ".join([*filter(None, found.values()), gpu.name]) if any(accepts) else ""
    return Products(tf32, accepts[0], identity, convolving=accepts[1], attending=accepts[1], always=often == "always")


def plan_key(graph: Graph, arch: str, memory_budget: float = 1.0, allowed: Products = EXACT, *,
             tuned: bool = False) -> str:
    """The key of a graph's plan: the graph, everything that made the plan, what was allowed, and the architecture."""
    text = f"{graph.key!r}\0{memory_budget!r}\0{plans.fingerprint()}\0{code.fingerprint()}\0{allowed.key}\0{arch}"
    text += "\0tuned" if tuned else ""
    return hashlib.sha256(text.encode()).hexdigest()


def clear_plans() -> None:
    """Forget the plans in memory; those in the cache folder stay."""
    with _lock:
        _plans.clear()


def _specification(graph: Graph, key: str, gpu: Gpu, memory_budget: float, allowed: Products, tuned: bool) -> PlanSpec:
    """The plan stored under `key`, or one that is made and stored."""
    data = cache.current().get("plans", key)
    if data is not None:
        try:
            return PlanSpec.from_json(data.decode())
        except ValueError:
            pass                                            # damaged: as good as absent
    build = import_module("jitgrad.pipeline").build_for_gpu
    tuner: Any = import_module("jitgrad.gpu_tuning").GpuTuner(gpu=gpu) if tuned else None
    spec: PlanSpec = build(graph, code.architecture(gpu), memory_budget, allowed, tuner and tuner.for_step).spec
    if tuner:
        spec = replace(spec, choices=tuple(tuner.decisions.values()))
        if not tuner.complete:
            return spec
    cache.current().put("plans", key, spec.to_json().encode())
    return spec


def _compile(texts: list[str], arch: str) -> list[str]:
    compile_ptx = import_module("jitgrad.codegen.cuda_native").compile_ptx

    def compile(text: str, arch: str) -> bytes:
        data: bytes = compile_ptx(text, arch).encode()
        return data

    compiled: list[tuple[bytes, float]] = import_module("jitgrad.codegen.parallel").compile_all(
        compile, [(text, arch) for text in texts], threads.limit())
    return [data.decode() for data, _ in compiled]


def _link(texts: list[str], arch: str) -> bytes:
    cubin: bytes = import_module("jitgrad.codegen.cuda_toolchain").link(texts, arch).code
    return cubin


code.set_compiler(_compile, _link)
