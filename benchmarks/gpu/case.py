"""One piece of work that several contenders do on a GPU, and how they are compared.

In goes a `Case`: operands, and for each contender what makes a call of them. Out come seconds by contender, with the names
of those that failed: by an exception, or by another result than the reference's.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jitgrad as jg
from benchmarks.gpu.bench import Bench, Call, Timed, precision
from benchmarks.kernels.case import differing
from jitgrad import config

WARM = 3                                        # calls before it is timed: jitgrad's third one makes a CUDA graph
TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 4e-2}   # of the largest number in a result
COPY = "copy"

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
Maker = Callable[[Any, Compiler, Sequence[Any]], Call]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """How a package does it: eager, or compiled in a mode; with other `settings` of jitgrad's, or by a `make` of its own."""

    package: str
    compiles: bool = False
    mode: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    make: Maker | None = None

    def compiler(self) -> Compiler:
        """What a function goes through."""
        if not self.compiles:
            return lambda function: function
        options = {} if self.package == "jitgrad" else {"dynamic": False}
        lib = importlib.import_module(self.package)
        return lambda function: lib.compile(function, mode=self.mode, **options)


OURS = Way("jitgrad", True)
EAGER, COMPILED = Way("torch"), Way("torch", True)
USUAL = {"jitgrad eager": Way("jitgrad"), "jitgrad": OURS, "PyTorch": EAGER, "torch.compile": COMPILED}


@dataclass(frozen=True, slots=True)
class Case:
    """See the module.

    operands   bench -> tensors of jitgrad
    make       for all ways that have none of their own: (jitgrad or torch, compiler, operands) -> call
    work       operations, or bytes moved at least where `moves`: then a copy of as many takes its turn
    kind       of numbers, which says how far results may be apart: a key of `TOLERANCES`; None: they are not compared
    rank       what is measured first: 0, then 1, 2"""

    name: str
    operands: Callable[[Bench], Sequence[Any]]
    make: Maker
    work: int
    moves: bool = False
    ways: Mapping[str, Way] = field(default_factory=lambda: USUAL)
    kind: str | None = "float32"
    rank: int = 1

    def run(self, bench: Bench) -> Result:
        """`work`, `seconds` by contender and what `failed`; `limit`, the work per second of the copy; `first`, the seconds
        of first calls."""
        packages = [p for p in ("jitgrad", "torch") if bench.has(p)]
        with precision(self.kind == "tf32", packages):
            operands = list(self.operands(bench))
            result: Result = {"work": self.work, "failed": {}, "first": {}}
            calls = self._prepared(bench, operands, result)
            if self.moves:
                calls[COPY] = copying(self.work // 2, bench)
            found = bench.compare(calls)
        result["seconds"] = {name: record["median"] for name, record in found.items() if name != COPY}
        result["quartiles"] = {name: [record["quarter"], record["three_quarters"]] for name, record in found.items()}
        if COPY in found:
            result["limit"] = self.work / found[COPY]["median"]
        return result

    def _prepared(self, bench: Bench, operands: list[Any], result: Result) -> dict[str, Timed]:
        """The calls that work, after those that are not timed."""
        calls: dict[str, Timed] = {}
        probes = {}
        for name, way in self.ways.items():
            if not bench.takes_part(name, way.package):
                continue
            try:
                calls[name] = self._call(way, bench, operands)
                begin = time.perf_counter()
                probes[name] = bench.probes(calls[name]())
                result["first"][name] = time.perf_counter() - begin
                for _ in range(WARM):
                    calls[name]()
                calls[name].wait()
            except Exception:
                result["failed"][name] = traceback.format_exc()
                probes.pop(name, None)
        if self.kind is not None:
            result["failed"] |= differing(probes, TOLERANCES[self.kind])
        return {name: call for name, call in calls.items() if name not in result["failed"]}

    def _call(self, way: Way, bench: Bench, operands: list[Any]) -> Timed:
        lib = importlib.import_module(way.package)
        given = [bench.for_package(x, way.package) for x in operands]
        call = (way.make or self.make)(lib, way.compiler(), given)
        return bench.timed(_with(way.settings, call) if way.settings else call, way.package)


def _with(settings: Mapping[str, Any], call: Call) -> Call:
    def run() -> Any:
        with ExitStack() as stack:
            stack.enter_context(config.scope(**settings))
            return call()
    return run


def copying(nbytes: int, bench: Bench) -> Timed:
    """A copy of so many bytes by the driver."""
    source, target = (jg.zeros(max(nbytes // 4, 1), device=bench.device) for _ in range(2))
    return bench.timed(lambda: target.copy_(source), "jitgrad")


def applied(function: Callable[..., Any], wanted: Sequence[int] = (), result: bool = True) -> Maker:
    """A maker of ``function(jitgrad or torch, *operands)``. With `wanted` the operands are followed by the gradient of the
    result, and a call gives the gradients of those operands, after the result itself if `result` is true. jitgrad compiles
    both directions as one; torch.compile the function, whose gradient it compiles by itself."""
    def make(lib: Any, compiler: Compiler, operands: Sequence[Any]) -> Call:
        for k in wanted:
            operands[k].requires_grad_()

        def forward(*given: Any) -> Any:
            return function(lib, *given)

        inner = forward if lib is jg else compiler(forward)

        def both(*given: Any) -> Any:
            *inputs, gradient = given
            out = inner(*inputs)
            found = lib.autograd.grad(out, [inputs[k] for k in wanted], gradient)
            return (out.detach(), *found) if result else tuple(found)

        call = both if wanted else inner
        compiled = compiler(call) if lib is jg else call
        return lambda: compiled(*operands)
    return make


