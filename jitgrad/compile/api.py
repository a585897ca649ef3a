"""`compile`: what a user puts on a function, a method or a Module.

The Python function runs on every call; that is the meaning, and compiling only makes it faster. A call is *replayed*
(the body runs under a `Recorder`, its graph runs as one plan) or, when nothing but ops can have happened in it,
*sealed* (guards, then the plan; the body does not run). See `recorder` and `seal`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from jitgrad import autograd, config, devices, dtypes
from jitgrad.compile.analysis import analyze
from jitgrad.compile.edge import Edge, EdgeNode
from jitgrad.compile.evaluator import Findings
from jitgrad.compile.guards import compile_guard
from jitgrad.compile.location import CPU, ON_CPU, Location, bare, plan_for, settings
from jitgrad.compile.number import Number, trace_number
from jitgrad.compile.recorder import GOES_ON, READ, Recorder
from jitgrad.compile.seal import NESTED, Sealed, Start, Unfinished, signature_of
from jitgrad.compile.stage import run_on_memory
from jitgrad.compile.trace import Outcome, Segment
from jitgrad.compile.values import Impure
from jitgrad.errors import CompileError, complain, describe_location
from jitgrad.functional import autocast
from jitgrad.garbage import Uncollected
from jitgrad.ir.graph import Graph
from jitgrad.ir.interpreter import interpret, state
from jitgrad.ir.types import TensorType
from jitgrad.tree import flatten, unflatten

if TYPE_CHECKING:
    from jitgrad.inspect import Explanation, KernelView, PlanView

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(slots=True)
class Compilation:
    """One graph of a function that became a plan: why, what it cost, and what it is."""

    graph: Graph
    plan: Any
    reason: str
    where: Any
    seconds: float
    location: Location = ON_CPU


@dataclass(slots=True)
class Statistics:
    """What happened in the calls of one compiled function so far."""

    sealed_calls: int = 0
    replayed_calls: int = 0
    compilations: list[Compilation] = field(default_factory=list)
    cuts: list[tuple[Any, str]] = field(default_factory=list)
    replayed_because: str = ""

    @property
    def calls(self) -> int:
        return self.sealed_calls + self.replayed_calls


class Candidate:
    """Calls that may be sealed when another one like them gives the same graphs. `defers`: values are read only to be
    returned; the calls to come read them at the end."""

    def __init__(self, findings: Findings, call: Any, path: Any, seen: set[Any], defers: bool):
        self.findings = findings
        self.guard = compile_guard(findings.guards.values())
        self.held = call                # the arguments: their ids are in the key, so they must not be used again
        self.last = path
        self.seen = seen
        self.defers = defers

    def start(self, call: Any) -> Start | None:
        """What the next call starts from; None when something is not there any more, or is another thing."""
        try:
            return Start(self.findings, call) if self.guard(call[0]) else None
        except (KeyError, AttributeError, IndexError, TypeError, ValueError, NameError):
            return None


_PATIENCE = 12                          # what a call that cannot be sealed yet, or not at all, may cost before it is left
_REFUSED = 4
_SEALED_KEYS = 256                      # signatures of arguments (shapes, objects) remembered per function
_SEALED_FORMS = 8                       # per signature of the arguments: train and eval, with and without gradients …


def _path(recorder: Recorder) -> Any:
    """The key of what a call recorded: its graphs and, in between, what Python learned. `Impure` when it learned more
    than a bool or an int, although values that are only returned were deferred."""
    if recorder.reads and recorder.defers:
        raise Impure("Python reads a value", recorder.reads[0])
    for where, why in recorder.cuts:
        if why != READ and not why.startswith(GOES_ON):
            raise Impure(why, where)
    if not recorder.segments:
        raise Impure("nothing is computed", None)
    return tuple([event.value if isinstance(event, Outcome) else event.graph.key for event in recorder.trace])


def _make_room(remembered: dict[Any, Any], key: Any) -> None:
    """Forget what was remembered first, when the limit is reached and `key` is new."""
    while key not in remembered and len(remembered) >= _SEALED_KEYS:
        remembered.pop(next(iter(remembered)))


def _numbered(arguments: Any) -> dict[Any, Any]:
    return arguments if isinstance(arguments, dict) else dict(enumerate(arguments))


class CompiledFunction:
    """A function whose calls run as plans. Made by `compile`; call it like the function."""

    def __init__(self, function: Callable[..., Any], *, fullgraph: bool = False, pure: bool = False,
                 name: str | None = None, memory_budget: float = 1.0, mode: str = "default"):
        functools.update_wrapper(self, function)
        self.function = function
        self.fullgraph = fullgraph
        self.pure = pure
        self.memory_budget = memory_budget
        self.mode = mode
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.statistics = Statistics()
        self._plans: dict[Any, Any] = {}
        self._edges: dict[Any, Edge] = {}
        self._candidates: dict[Any, Candidate] = {}
        self._patience: dict[Any, int] = {}           # how much of it calls like that have used up
        self._sealed: dict[Any, list[Sealed]] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(state.current, "records", False) or config.current().disable:
            return self.function(*args, **kwargs)     # compiled inside compiled is inlined
        leaves: Sequence[Any] = args
        structure: Any = len(args)
        signature = NESTED if kwargs else signature_of(args)
        if signature is NESTED:
            leaves = []
            structure = flatten((args, kwargs), leaves)
            signature = signature_of(leaves)
        call = (args if not kwargs else {**_numbered(args), **kwargs}), leaves
        key = None
        if signature is not None:
            mode = autograd.mode
            key = (structure, signature, mode.enabled, mode.inference, dtypes.get_default_dtype(), devices.default(),
                   devices.current_gpu(), autocast.key())
            for sealed in self._sealed.get(key, ()):
                if sealed.matches(call):
                    result = sealed.run(call)
                    if type(result) is not Unfinished:
                        self.statistics.sealed_calls += 1
                        return result
                    if result.stages:
                        return self._replay(args, kwargs, call, key, sealed, result)
        return self._replay(args, kwargs, call, key)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"<compiled {self.name}>"

    # --- looking inside ------------------------------------------------------------------------------------------------

    def explain(self, times: bool = True) -> Explanation:
        """What became of this function: sealed or replayed and why, recompiles and their reasons, and for each plan its
        steps with bytes, arithmetic and (unless `times` is False) measured time."""
        done = self.statistics
        look: Any = import_module("jitgrad.inspect")  # loads the passes, which calls from the cache do without
        mode = "sealed" if done.sealed_calls else "replayed"
        reasons: tuple[str, ...] = (done.replayed_because,) if done.replayed_because else ()
        if not done.sealed_calls:
            reasons += tuple([f"cut at {describe_location(where)}: {why}" for where, why in dict.fromkeys(done.cuts)])
        views = [look.PlanView(c.graph, bare(c.plan), memory_budget=self.memory_budget) for c in done.compilations]
        if times:
            views = [view.time([_sample(v.type) for v in view.graph.inputs]) for view in views]
        recompiles = tuple([look.Recompile(c.reason, describe_location(c.where), c.seconds) for c in done.compilations])
        calls = {"sealed": done.sealed_calls, "replayed": done.replayed_calls}
        explanation: Explanation = look.Explanation(self.name, mode, reasons, tuple(views), recompiles, calls)
        return explanation

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs as traced, one per compilation."""
        return tuple([c.graph for c in self.statistics.compilations])

    @property
    def kernels(self) -> tuple[KernelView, ...]:
        """All kernels, each with its ``source``."""
        return self.explain(times=False).kernels

    @property
    def plan(self) -> PlanView:
        """The latest plan: steps, memory, predicted peak."""
        if not self.statistics.compilations:
            raise complain(CompileError, self.name, "it has not been called, so there is no plan yet",
                           fix="Call it once with real arguments")
        last = self.statistics.compilations[-1]
        view: PlanView = import_module("jitgrad.inspect").PlanView(last.graph, bare(last.plan),
                                                                        memory_budget=self.memory_budget)
        return view

    # --- replayed calls ----------------------------------------------------------------------------------------------

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Any, key: Any, sealed: Sealed | None = None,
                unfinished: Unfinished | None = None) -> Any:
        """Run the body. With `unfinished`, a part of the call has been carried out by a sealed form."""
        with Uncollected() as collector:
            return self._record(collector, args, kwargs, call, key, sealed, unfinished)

    def _record(self, collector: Uncollected, args: tuple[Any, ...], kwargs: dict[str, Any], call: Any, key: Any,
                sealed: Sealed | None, unfinished: Unfinished | None) -> Any:
        """See `_replay`."""
        self.statistics.replayed_calls += 1
        hopeful = key is not None and self._patience.get(key, 0) < _PATIENCE
        candidate = self._candidates.get(key) if hopeful else None
        if sealed is not None:
            start: Start | None = Start(sealed.findings, call)
        else:
            start = candidate.start(call) if candidate else None
        recorder = Recorder(self._execute, self.name, self.fullgraph, unfinished.given() if unfinished else None,
                            collector)
        recorder.defers = sealed.defers if sealed else candidate is not None and candidate.defers
        traced = [trace_number(recorder, a, ("argument", k)) for k, a in enumerate(args)]
        traced_kw = {k: trace_number(recorder, a, ("argument", k)) for k, a in kwargs.items()}
        returned: list[Any] = []                      # its leaves; nothing else may hold them when they are counted
        with interpret(recorder):
            try:
                with autograd.keeping(None):          # what is recorded has no tape in the end, but one node
                    structure = flatten(self.function(*traced, **traced_kw), returned)
            except BaseException as error:
                self._settle_after(error, recorder)
                raise
            recorder.finish(returned)
        recorder.settle(returned)
        self.statistics.cuts.extend(recorder.cuts)
        if hopeful:
            try:
                if sealed is None:
                    self._consider(candidate, start, recorder, call, key, structure, returned)
                elif unfinished is not None and unfinished.new and start is not None:
                    sealed.extend(unfinished, start, recorder, call, structure, returned)
            except Impure as impure:
                self.statistics.replayed_because = str(impure)
                self._candidates.pop(key, None)
                self._lose_patience(key, _REFUSED)
        recorder.close()
        return unflatten(structure, [leaf.value if type(leaf) is Number else leaf for leaf in returned])

    def _consider(self, candidate: Candidate | None, start: Start | None, recorder: Recorder, call: Any, key: Any,
                  structure: Any, returned: list[Any]) -> None:
        """After a replayed call: may the next ones like it be sealed?"""
        path = _path(recorder)
        if candidate is None or start is None or recorder.reads or path != candidate.last:
            findings = analyze(self.function, _numbered(call[0]), trusted=self.pure)
            known = candidate is not None and start is not None and findings.same_as(candidate.findings)
            seen = candidate.seen if candidate is not None and known else set()
            if recorder.reads or path not in seen:
                _make_room(self._candidates, key)
                defers = recorder.defers or bool(recorder.reads)
                self._candidates[key] = Candidate(findings, call, path, seen | {path}, defers)
                self._lose_patience(key, 1)
                return
        assert candidate is not None and start is not None
        _make_room(self._sealed, key)
        forms = self._sealed.setdefault(key, [])
        forms.insert(0, Sealed(self, candidate.findings, candidate.guard, start, recorder, call, structure, returned))
        del forms[_SEALED_FORMS:]
        self._patience.pop(key, None)
        self.statistics.replayed_because = ""

    def _lose_patience(self, key: Any, amount: int) -> None:
        _make_room(self._patience, key)
        self._patience[key] = self._patience.get(key, 0) + amount
        if self._patience[key] >= _PATIENCE:
            self._candidates.pop(key, None)           # and with it the arguments that it holds

    @staticmethod
    def _settle_after(error: BaseException, recorder: Recorder) -> None:
        """An exception leaves the function: first what was recorded runs, as eager execution would have run it."""
        try:
            recorder.flush()
        except Exception as second:
            raise second from error

    def _execute(self, recorder: Recorder, segment: Segment,
                 arrays: list[np.ndarray]) -> tuple[list[np.ndarray], EdgeNode | None]:
        """Run a recorded graph; where gradients go through it (`Segment.edge`) also its tape node."""
        graph, crossing = segment.graph, segment.edge
        if crossing is None:
            return run_on_memory(self._plan(graph, segment.location), arrays, [k for k, _ in graph.writes]), None
        key = graph.key, crossing
        edge = self._edges.get(key)
        if edge is None:
            edge = self._edges[key] = Edge(graph, *crossing)
        tensors = [unit.tensor for unit in recorder.units]
        return self._run_forward(edge, segment.location, tensors, arrays)

    def _run_forward(self, edge: Edge, location: Location, tensors: list[Any],
                     arrays: list[np.ndarray]) -> tuple[Any, EdgeNode]:
        results = run_on_memory(self._plan(edge.forward, location), arrays, [k for k, _ in edge.graph.writes])
        count = len(edge.graph.outputs)
        run = self._run_backward if location.device == CPU else functools.partial(self._run_backward, location=location)
        return results[:count], edge.node(tensors, results[count:], run, location.device)

    def _run_backward(self, graph: Graph, arrays: list[np.ndarray], location: Location = ON_CPU) -> list[np.ndarray]:
        return run_on_memory(self._plan(graph, Location(location.device)), arrays, [])

    def _plan(self, graph: Graph, location: Location) -> Any:
        key = graph.key, location, settings(location)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._compile(graph, location)
        return plan

    def _compile(self, graph: Graph, location: Location) -> Any:
        start = time.perf_counter()
        plan = plan_for(graph, location, self.memory_budget, self.mode)
        seconds = time.perf_counter() - start
        where = graph.nodes[0].where if graph.nodes else None
        reason = self._reason(graph, location)
        self.statistics.compilations.append(Compilation(graph, plan, reason, where, seconds, location))
        return plan

    def _reason(self, graph: Graph, location: Location) -> str:
        """Why this graph is not one of those compiled before."""
        if not self.statistics.compilations:
            return "first call"
        last = self.statistics.compilations[-1].graph
        before = self.statistics.compilations[-1].location.device
        if before != location.device:
            return f"it ran on {before}, now it runs on {location.device}"
        if last.key == graph.key:
            return "the precision of float32 products, or what may compute them, was changed"
        for k, (a, b) in enumerate(zip(last.inputs, graph.inputs)):
            if a.type != b.type:
                return f"input {k} was {a.type}, now it is {b.type}"
        for old, new in zip(last.nodes, graph.nodes):
            if old.op is not new.op or dict(old.attrs) != dict(new.attrs):
                return f"{describe_location(new.where)} recorded {new.op.name}, where {old.op.name} was recorded before"
        return f"{len(graph.nodes)} ops were recorded, {len(last.nodes)} before"


def _sample(type: TensorType) -> np.ndarray:
    """Some memory of that type, for timing: valid as an index, and free of special values."""
    array = np.zeros(type.shape, type.dtype.numpy)
    if type.dtype.is_floating_point:
        array += np.asarray(0.5, array.dtype)
    return array


def compile(function: Any = None, *, mode: str = "default", dynamic: bool | None = None, fullgraph: bool = False,
            pure: bool = False, memory_budget: float = 1.0) -> Any:
    """Make `function` (a function, a method or a Module) run as compiled plans; usable as ``@compile``.

    fullgraph   a value that Python reads in the middle is an error instead of a cut
    pure        the user's word that the function does nothing but Tensor work, so that its calls may be sealed
    mode        as in PyTorch. "max-autotune" (and "max-autotune-no-cudagraphs"): what products and convolutions leave open
                is measured on this machine when a plan is made, and kept in the cache (`jitgrad.tuning`); the first call
                takes seconds to minutes longer. Results may differ from other modes in last bits, as sums are taken in
                another order. On a CPU the other modes mean the same; on a GPU calls become CUDA graphs, but for the mode
                "max-autotune-no-cudagraphs", and what is measured is which products NVIDIA's library computes faster
                (`jitgrad.gpu_tuning`)
    memory_budget   what may wait in memory between the forward and the backward part of a step, as a fraction of what
                keeping everything takes: 1 keeps all, less computes some of it again, 0 as much as can be. PyTorch's
                ``activation_memory_budget``. Results are equal up to rounding
    dynamic     accepted; a new shape never compiles a kernel anew here, so there is nothing to choose

    A new shape, dtype or branch records a new graph; kernels are reused. `explain()` on the result says what happened."""
    if mode not in MODES:
        raise complain(CompileError, "compile", f"mode={mode!r}; the modes are {', '.join(MODES)}")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, float)) or not 0 <= memory_budget <= 1:
        raise complain(CompileError, "compile", f"memory_budget={memory_budget!r}; it is a fraction from 0 to 1")
    options: dict[str, Any] = {"fullgraph": fullgraph, "pure": pure, "memory_budget": float(memory_budget), "mode": mode}
    if function is None:
        return functools.partial(compile, dynamic=dynamic, **options)
    if hasattr(function, "named_parameters") and not isinstance(function, type):
        return _compile_module(function, options)
    if not callable(function):
        raise complain(CompileError, "compile", f"needs a function or a Module, got {type(function).__name__}")
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function) \
            or inspect.isasyncgenfunction(function):
        raise complain(CompileError, "compile", f"{function.__name__} is a generator or coroutine, whose body is not one "
                       "call", fix="Compile the function that does the work of one step, and call it from there")
    return function if isinstance(function, CompiledFunction) else \
        CompiledFunction(function, **options)


def _compile_module(module: Any, options: dict[str, Any]) -> Any:
    """A Module of a subclass whose calls are compiled. It shares all state with `module`: parameters, mode, attributes."""
    if isinstance(getattr(type(module), "_compiled_call", None), CompiledFunction):
        return module
    kind = type(module)
    call = CompiledFunction(kind.__call__, name=kind.__name__, **options)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return _compile_module(copy.deepcopy(module, memo), options)

    def __reduce__(self: Any) -> Any:
        return _compile_module, (module, options)

    compiled_class = type(kind.__name__, (kind,), {
        "__call__": __call__, "__deepcopy__": __deepcopy__, "__reduce__": __reduce__, "__module__": kind.__module__,
        "__doc__": kind.__doc__, "_compiled_call": call, "_original": module, "explain": lambda self: call.explain()})
    compiled: Any = object.__new__(compiled_class)
    object.__setattr__(compiled, "__dict__", module.__dict__)
    return compiled
