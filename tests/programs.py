"""Random programs: how they are drawn, run in every way that there is, and compared.

A `Program` is the text of a Python function over jitgrad, written one statement at a time: each statement is carried out
while the program is drawn, so that the next one knows the types of what it can use. `outcome` runs it; `check` runs it
eagerly, compiled, and as the float64 reference, and says where they differ. A failing program shrinks to a few lines,
which the error message shows ready to be run.

The reference carries out the recorded graphs with every float as float64 (`WidePlan`). How far results may lie from it
is measured, not guessed: the same is done again with every result that rounds moved at random by a few units in the
last place of its dtype, and what comes out shows how much rounding matters there. Where these runs do not agree on
being finite, or on an integer, nothing is compared.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import jitgrad as jg
from jitgrad import config, pipeline, plans
from jitgrad.errors import JitgradError
from jitgrad.ir import Graph, Node
from jitgrad.ir.graph import Value
from jitgrad.plain import PlainPlan

# ---- a program -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """One argument: how a fresh copy of it is made. `layout`: dense, transposed, strided, or `view of` an earlier one."""

    array: np.ndarray | float | int
    requires_grad: bool = False
    layout: str = "dense"

    def make(self, earlier: Sequence[Any]) -> Any:
        if not isinstance(self.array, np.ndarray):
            return self.array
        if self.layout == "row":                              # the first row of the argument before
            return earlier[-1][0]
        tensor = jg.from_numpy(_laid_out(self.array, self.layout))
        return tensor.requires_grad_() if self.requires_grad else tensor

    def __str__(self) -> str:
        if not isinstance(self.array, np.ndarray):
            return repr(self.array)
        if self.layout == "row":
            return "the row [0] of the argument before"
        shown = np.array2string(self.array, separator=", ", threshold=200).replace("\n", "")
        return f"{shown} {self.array.dtype}, {self.array.shape}, {self.layout}, requires_grad={self.requires_grad}"


def _laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """A fresh copy of `array` with these strides."""
    if layout == "transposed":
        return array.T.copy().T
    if layout == "strided" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    return array.copy()


@dataclass
class Program:
    """`lines` are the body, `results` the names that it returns."""

    inputs: list[Input]
    lines: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list("abcdefg"[:len(self.inputs)])

    @property
    def source(self) -> str:
        body = [*self.lines, f"return [{', '.join(self.results)}]"]
        return "\n".join([f"def program({', '.join(self.names)}):", *["    " + line for line in body], ""])

    @property
    def function(self) -> Callable[..., Any]:
        file = f"<program {abs(hash(self.source)):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"jg": jg, "F": jg.nn.functional}
        exec(compile(self.source, file, "exec"), namespace)
        return namespace["program"]

    def arguments(self) -> list[Any]:
        made: list[Any] = []
        for given in self.inputs:
            made.append(given.make(made))
        return made

    def __str__(self) -> str:
        return "\n".join([self.source, *[f"# {n} = {x}" for n, x in zip(self.names, self.inputs)]])


# ---- running it -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run left behind: the kind of its exception and its message, and named arrays (results, arguments,
    gradients)."""

    error: str
    arrays: dict[str, np.ndarray]
    message: str = ""


def outcome(program: Program, function: Callable[..., Any]) -> Outcome:
    """Run the program on fresh arguments. When it does not go back itself and its results have a history, go back
    through that: across the edge of a compiled call."""
    arguments = program.arguments()
    arrays: dict[str, np.ndarray] = {}
    error = message = ""
    try:
        results = function(*arguments)
        for name, result in zip(program.results, results, strict=True):
            arrays[f"result {name}"] = np.array(result.numpy(force=True)) if isinstance(result, jg.Tensor) \
                else np.asarray(result)
        if ".backward()" not in program.source:
            _backward([r for r in results if isinstance(r, jg.Tensor)])
    except JitgradError as found:
        error, message = type(found).__name__, str(found)
    for name, tensor in zip(program.names, arguments):
        if isinstance(tensor, jg.Tensor):
            arrays[f"argument {name}"] = np.array(tensor.numpy(force=True))
            if tensor.grad is not None:
                arrays[f"gradient {name}"] = np.array(tensor.grad.numpy(force=True))
    return Outcome(error, arrays, message)


def _backward(results: Sequence[jg.Tensor]) -> None:
    """The gradient of a sum with different weights of everything that has a history."""
    total: Any = None
    for k, r in enumerate({id(r): r for r in results}.values()):
        if r.grad_fn is not None:
            part = (r * (0.5 + k)).sum().to(jg.float64)
            total = part if total is None else total + part
    if total is not None:
        total.backward()


@contextmanager
def plans_made_by(make: Callable[[Graph], Any]):
    """Inside, compiled functions run on what `make` gives for a graph."""
    usual = plans.compile_graph
    plans.compile_graph = lambda graph, memory_budget=1.0, tuned=False: make(graph)
    try:
        yield
    finally:
        plans.compile_graph = usual


def plain_plan(graph: Graph) -> PlainPlan:
    """The kernels of `graph` as plain Python; each launch in two calls, the second half first."""
    with config.scope(check=True):
        made = pipeline.build(graph)
    return PlainPlan(made.spec, made.linked, pieces=2)


def run_with(program: Program, make: Callable[[Graph], Any]) -> Outcome:
    with plans_made_by(make):
        return outcome(program, jg.compile(program.function))


# ---- the float64 reference ---------------------------------------------------------------------------------------------

NARROW = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
EXACT = {"neg", "abs", "sign", "floor", "ceil", "round", "trunc", "relu", "maximum", "minimum", "where", "copysign", "max",
         "min", "max_pool", "max_pool_gather", "sort", "topk", "fmod"}
EXACT_KINDS = {"movement", "source"}
CORRECTLY_ROUNDED = {"add", "sub", "mul", "div", "sqrt", "cast"}
SUMS = {"sum", "cumsum", "matmul", "index_add", "scatter_add", "avg_pool", "convolution", "convolution_input_grad",
        "convolution_weight_grad", "max_pool_grad", "avg_pool_grad"}
ULPS = 4.0
"""How many units in the last place the functions of our math may be off (design, section 10)."""


class WidePlan:
    """A graph carried out with NumPy and every float as float64. With a `seed` every result that a narrow dtype would
    round is moved at random by about as much."""

    def __init__(self, graph: Graph, seed: int | None = None):
        self.graph = graph
        self.noise = None if seed is None else np.random.default_rng(seed)
        self.seed = seed

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        environment: dict[Value, Any] = {v: _wide(x) for v, x in zip(self.graph.inputs, inputs, strict=True)}
        with np.errstate(all="ignore"):
            for node in self.graph.nodes:
                self._run_node(node, environment)
            results = [self._stored(environment[v], v) for v in self.graph.outputs]
            for position, v in self.graph.writes:
                inputs[position][...] = self._stored(environment[v], v)
        return results

    def _run_node(self, node: Node, environment: dict[Value, Any]) -> None:
        operands = [environment[v] for v in node.inputs]
        results = node.op.eager(*operands, **_wide_attrs(node))
        results = results if isinstance(results, tuple) else (results,)
        for v, result in zip(node.outputs, results, strict=True):
            result = np.asarray(result)
            if v.dtype.is_floating_point:
                result = self._rounded(_wide(result), v, node, operands)
            environment[v] = result

    def _rounded(self, x: np.ndarray, v: Value, node: Node, operands: Sequence[np.ndarray]) -> np.ndarray:
        limits = ml_dtypes.finfo(NARROW[v.dtype.short])
        if not (self.seed and v.dtype.short == "f16"):           # within a kernel, float16 has float32's range
            x = np.where(np.abs(x) > float(limits.max), np.copysign(np.inf, x), x)
        if self.noise is None or node.op.name in EXACT or node.op.kind in EXACT_KINDS:
            return x
        scale = np.abs(x)
        if node.op.name in SUMS:
            scale = scale + np.nan_to_num(np.abs(np.asarray(node.op.eager(
                *[np.abs(o) if o.dtype.kind == "f" else o for o in operands], **_wide_attrs(node)), np.float64)))
        elif node.op.name in CORRECTLY_ROUNDED:
            scale = np.where(x == x.astype(NARROW[v.dtype.short]).astype(np.float64), 0.0, scale)
        size = ULPS * float(limits.eps) * scale + float(limits.smallest_subnormal) * (scale > 0)
        return x + np.where(np.isfinite(x), size, 0.0) * self.noise.uniform(-1, 1, x.shape)

    @staticmethod
    def _stored(x: np.ndarray, v: Value) -> np.ndarray:
        return np.array(x, v.dtype.numpy).reshape(v.shape)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if x.dtype.kind in "fV" else x


def _wide_attrs(node: Node) -> dict[str, Any]:
    attrs = dict(node.attrs)
    if node.op.name == "cast" and attrs["dtype"].is_floating_point:
        attrs["dtype"] = jg.float64
    if isinstance(attrs.get("body"), Graph):
        attrs["body"] = _wide_body(attrs["body"])
    return attrs


def _wide_body(body: Graph) -> Graph:
    """The body of a foreach over float64."""
    nodes = []
    for node in body.nodes:
        attrs = dict(node.attrs)
        if "dtype" in attrs and attrs["dtype"].is_floating_point:
            attrs["dtype"] = jg.float64
        nodes.append(Node(node.op, node.inputs, attrs, node.outputs, node.where))
    return body.replace(nodes=tuple(nodes))


# ---- comparing -----------------------------------------------------------------------------------------------------------

FACTOR = 8.0
"""How much more than the random runs do may differ: two runs do not find the worst."""
SEEDS = (1, 2)


@dataclass
class Reference:
    """The float64 outcome and how far from it a result may be: `check` compares another outcome with it."""

    exact: Outcome
    moved: list[Outcome]

    def complaint(self, found: Outcome) -> str:
        """What is wrong with `found`; empty when nothing is."""
        if len({o.error for o in (self.exact, *self.moved)}) > 1:
            return ""                                     # whether it fails hangs on rounding
        if found.error == "AutogradError" and not self.exact.error:
            return ""                                     # a compiled call keeps what its gradient needs from changes
        if found.error != self.exact.error:
            return f"ends with {found.error or 'no error'} {found.message} instead of {self.exact.error or 'none'} " \
                   f"{self.exact.message}"
        if found.arrays.keys() != self.exact.arrays.keys():
            return f"leaves {sorted(found.arrays)} instead of {sorted(self.exact.arrays)}"
        for name, x in found.arrays.items():
            y, others = self.exact.arrays[name], [o.arrays.get(name) for o in self.moved]
            if any(o is None or o.shape != y.shape for o in others):
                continue
            if x.dtype != y.dtype or x.shape != y.shape:
                return f"{name} is {x.dtype}{list(x.shape)} instead of {y.dtype}{list(y.shape)}"
            wrong = differences(x, y, others)
            if wrong.any():
                k = np.unravel_index(np.argmax(wrong), wrong.shape)
                return f"{name}: {x[k]!r} instead of {y[k]!r} at {tuple(map(int, k))} ({wrong.sum()} of {wrong.size} differ)"
        return ""


def differences(x: np.ndarray, y: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Where `x` is not the reference `y`, as far as the runs that were `moved` leave no doubt about it."""
    if x.dtype.kind in "biu":
        return (x != y) & np.logical_and.reduce([o == y for o in others])
    eps = float(ml_dtypes.finfo(x.dtype).eps)
    tiny = float(ml_dtypes.finfo(x.dtype).smallest_subnormal)
    x, y, *others = [a.astype(np.float64) for a in (x, y, *others)]
    with np.errstate(all="ignore"):
        same_kind = np.logical_and.reduce([_kind(o) == _kind(y) for o in others])
        spread = np.maximum.reduce([np.abs(o - y) for o in others])
        near = np.abs(x - y) <= FACTOR * spread + 4 * eps * np.abs(y) + 2 * tiny
    return same_kind & np.where(np.isfinite(y), ~near, _kind(x) != _kind(y))


def _kind(x: np.ndarray) -> np.ndarray:
    """0 finite, 1 and -1 infinite, 2 not a number."""
    return np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0))


def reference(program: Program) -> Reference:
    moved = [run_with(program, lambda graph, seed=seed: WidePlan(graph, seed)) for seed in SEEDS]
    return Reference(run_with(program, WidePlan), moved)


def check(program: Program, runs_natively: Callable[[list[Graph]], bool] = lambda graphs: False) -> None:
    """AssertionError with the program when eager, compiled and float64 differ. `runs_natively` decides, by the graphs
    that were recorded, whether it runs as machine code too: replayed, and sealed where it can be."""
    expected = reference(program)
    graphs: list[Graph] = []

    def remembered(graph: Graph) -> PlainPlan:
        graphs.append(graph)
        return plain_plan(graph)

    _compare(program, expected, "eager", lambda: outcome(program, program.function))
    _compare(program, expected, "compiled", lambda: run_with(program, remembered))
    if runs_natively(graphs):
        compiled = jg.compile(program.function)
        for call in (1, 2, 3):
            _compare(program, expected, f"native, call {call}", lambda: outcome(program, compiled))


def _compare(program: Program, expected: Reference, way: str, run: Callable[[], Outcome]) -> None:
    try:
        complaint = expected.complaint(run())
    except Exception as error:
        raise AssertionError(f"{way}: {type(error).__name__}: {error}\n\n{program}") from error
    if complaint:
        raise AssertionError(f"{way}: {complaint}\n\n{program}")
