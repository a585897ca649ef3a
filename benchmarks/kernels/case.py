"""One piece of work that several libraries can do, and how they are timed on it.

In goes a `Case`: its operands, and for each library a function that makes a call without arguments. Out come the median
seconds per call, and the limit, which takes its turn like the libraries: a copy, or multiply-adds in registers. The latter
are as many as the case has, in turns with single calls of jitgrad, if these are long: the processor's clock and its other
users change from one tenth of a second to the next, and so only what lies side by side can be compared to a percent.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.measure import interleave, seconds as seconds_of
from jitgrad import limits

PACKAGES = {"jitgrad": "jitgrad", "NumPy": "numpy", "PyTorch": "torch", "JAX": "jax"}
REFERENCES = ("PyTorch", "NumPy", "JAX", "jitgrad")          # whose result the others are compared with
TOLERANCE = 1e-3                                             # of the largest number in a result

Arrays = Sequence[np.ndarray]
Call = Callable[[], Any]
Maker = Callable[[Arrays], Call]


@dataclass(frozen=True, slots=True)
class Case:
    """`operands` makes the arrays, `makers` has for each library what makes a call that returns its results.

    operations   of float32; None for work that is limited by memory
    moved        bytes read and written at least; None for those of operands and results together
    comparable   whether all libraries must give the same numbers"""

    name: str
    operands: Callable[[np.random.Generator], Arrays]
    makers: Mapping[str, Maker]
    operations: int | None = None
    moved: int | None = None
    comparable: bool = True


def taking_part(makers: Mapping[str, Any], only: Sequence[str] = ()) -> dict[str, Any]:
    """Those of `makers` whose libraries are installed and, if there are names in `only`, among them."""
    return {name: make for name, make in makers.items()
            if importlib.util.find_spec(PACKAGES[name]) and (not only or name in only)}


def measure(case: Case, seconds: float, repeats: int | None, only: Sequence[str]) -> dict[str, Any]:
    """`work` (operations or bytes), `seconds` by library, `limit` (work per second at best), and what `failed`."""
    arrays = case.operands(np.random.default_rng(0))
    calls, results, failed = first_calls(taking_part(case.makers, only), arrays)
    work = case.operations or case.moved or sum(a.nbytes for a in [*arrays, *next(iter(results.values()), [])])
    if case.comparable:
        failed |= differing(results)
    results.clear()                                          # of large operands they are large
    adds, half = limits.multiply_adds(), work // 8 * 4
    best, done = ({"multiply-adds": adds}, adds.work) if case.operations else (copies(half), 2 * half)
    calls = {name: call for name, call in calls.items() if name not in failed}
    times = interleave({**calls, **best}, budget=seconds, repeats=repeats)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    limit = done / min(medians.pop(name) for name in best)
    if case.operations and work >= adds.work and "jitgrad" in calls:
        limit = work / medians["jitgrad"] / share(calls["jitgrad"], work, adds, seconds)
    return {"work": work, "limit": limit, "seconds": medians, "failed": failed}


def share(call: Call, work: int, adds: limits.Limit, seconds: float) -> float:
    """What part of the limit a call that does so much `work` reaches: the median over `seconds` of turns in which both do
    about the same work."""
    count = max(1, round(work / adds.work))
    shares, end = list[float](), time.perf_counter() + seconds
    while not shares or time.perf_counter() < end:
        at_best = seconds_of(lambda: [adds() for _ in range(count)]) / (count * adds.work) * work
        shares.append(at_best / seconds_of(call))
    return statistics.median(shares)


def copies(nbytes: int) -> dict[str, Callable[[], Any]]:
    """A copy of an array of `nbytes` by a plan of jitgrad, by NumPy, and by PyTorch where it is installed: which is the
    fastest depends on the size."""
    plan = limits.copy(nbytes)
    source, target = plan.memory
    calls: dict[str, Callable[[], Any]] = {"jitgrad's copy": plan, "NumPy's copy": lambda: np.copyto(target, source)}
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        x, y = torch.from_numpy(source), torch.from_numpy(target)
        calls["PyTorch's copy"] = lambda: y.copy_(x)
    return calls


def first_calls(made: Mapping[str, Maker], arrays: Arrays) -> tuple[dict[str, Call], dict[str, list[np.ndarray]],
                                                                    dict[str, str]]:
    """By library: its call, the results of the first one, or else the traceback of what went wrong."""
    calls: dict[str, Call] = {}
    results: dict[str, list[np.ndarray]] = {}
    failed: dict[str, str] = {}
    for name, make in made.items():
        try:
            call = make(arrays)
            results[name], calls[name] = as_arrays(call()), call
        except Exception:
            failed[name] = traceback.format_exc()
    return calls, results, failed


def differing(results: Mapping[str, list[np.ndarray]], tolerance: float = TOLERANCE) -> dict[str, str]:
    """The libraries whose results are not those of the first of `REFERENCES` that is there, and how they differ."""
    reference = next((results[name] for name in REFERENCES if name in results), [])
    problems = {}
    for name, found in results.items():
        for k, (ours, theirs) in enumerate(zip(found, reference, strict=True)):
            apart = distance(ours, theirs)
            if not apart <= tolerance:
                problems[name] = f"result {k} is {apart:.1e} away from the reference"
    return problems


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference relative to the largest number in `y`; infinite for other shapes."""
    if x.shape != y.shape:
        return float("inf")
    return float(np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(y), initial=0), 1e-30))


def as_arrays(results: Any) -> list[np.ndarray]:
    """What a call returned (an array, or nested tuples of arrays) as NumPy arrays of its own."""
    if isinstance(results, (tuple, list)):
        return [array for result in results for array in as_arrays(result)]
    if results is None:
        return []
    return [results.detach().numpy().copy() if hasattr(results, "detach") else np.array(results)]


# ---- makers -----------------------------------------------------------------------------------------------------


def makers(function: Callable[..., Any], jax: Callable[..., Any] | None = None, numpy: Callable[..., Any] | None = None,
           wanted: Sequence[int] = (), result: bool = True) -> dict[str, Maker]:
    """Makers of a function that jitgrad and PyTorch have under one name, ``function(torch or jitgrad, *operands)``; of
    ``jax(the jax package, *operands)`` and ``numpy(*operands)`` where they are given.

    With `wanted`, the operands are followed by the gradient of the result; the call then gives the gradients of those
    operands, after the result itself if `result` is true. NumPy has none."""
    found: dict[str, Maker] = {
        "jitgrad": lambda arrays: in_framework("jitgrad", function, wanted, result, arrays),
        "PyTorch": lambda arrays: in_framework("torch", function, wanted, result, arrays)}
    if numpy is not None and not wanted:
        found["NumPy"] = lambda arrays: lambda: numpy(*arrays)
    if jax is not None:
        found["JAX"] = lambda arrays: in_jax(jax, wanted, result, arrays)
    return found


def in_framework(package: str, function: Callable[..., Any], wanted: Sequence[int], result: bool,
                 arrays: Arrays) -> Call:
    """A call of jitgrad, compiled, or of PyTorch as it is."""
    lib = importlib.import_module(package)
    tensors = [lib.from_numpy(array.copy()) for array in arrays]
    for k in wanted:
        tensors[k].requires_grad_()

    def forward(*operands: Any) -> Any:
        return function(lib, *operands)

    def both(*given: Any) -> Any:
        *operands, gradient = given
        out = function(lib, *operands)
        found = lib.autograd.grad(out, [operands[k] for k in wanted], gradient)
        return (out.detach(), *found) if result else tuple(found)

    call = both if wanted else forward
    compiled = lib.compile(call) if package == "jitgrad" else call

    def run() -> Any:
        return compiled(*tensors)

    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def in_jax(function: Callable[..., Any], wanted: Sequence[int], result: bool, arrays: Arrays) -> Call:
    """A jitted call, done when it returns."""
    jax = importlib.import_module("jax")
    operands = [jax.numpy.asarray(array) for array in arrays]

    def forward(*operands: Any) -> Any:
        return function(jax, *operands)

    def both(*given: Any) -> Any:
        *operands, gradient = given

        def of_wanted(*chosen: Any) -> Any:
            moved = dict(zip(wanted, chosen))
            return function(jax, *[moved.get(k, operand) for k, operand in enumerate(operands)])

        out, pull = jax.vjp(of_wanted, *[operands[k] for k in wanted])
        return (out, pull(gradient)) if result else pull(gradient)

    call = jax.jit(both if wanted else forward)
    return lambda: jax.block_until_ready(call(*operands))
