"""`verify`: eager, compiled and float64 side by side, and the first of the user's lines where they part."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.compile.api import CompiledFunction
from jitgrad.compile.location import CPU, Location, overwrite, plan_for
from jitgrad.compile.recorder import Recorder
from jitgrad.compile.state import State
from jitgrad.compile.trace import Segment
from jitgrad.devices import device
from jitgrad.dtypes import DType
from jitgrad.errors import describe_location, source_line
from jitgrad.ir import evaluate
from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.interpreter import interpret
from jitgrad.ir.types import TensorType
from jitgrad.runtime.cuda.array import DeviceArray, moved, to_host


@dataclass(frozen=True)
class Divergence:
    """One value that differs from the float64 one by more than rounding explains."""

    op: str
    type: TensorType
    where: str
    line: str
    side: str                       # "compiled" or "eager"
    error: float                    # relative to the largest value
    allowed: float

    def __str__(self) -> str:
        return (f"{self.where}: {self.side} {self.op} ({self.type}) is off by {self.error:.2g}, "
                f"allowed {self.allowed:.2g}" + (f"\n    {self.line}" if self.line else ""))


@dataclass(frozen=True)
class Verification:
    """The outcome: `divergences` in program order, the first one first."""

    name: str
    graphs: int
    values: int
    divergences: tuple[Divergence, ...]

    @property
    def ok(self) -> bool:
        return not self.divergences

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.name}: {self.values} values of {self.graphs} graph(s) agree: eager, compiled, float64"
        return f"{self.name}: the first divergence is at\n  {self.divergences[0]}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def verify(function: Any, *args: Any, tolerance: float = 64.0, **kwargs: Any) -> Verification:
    """Record one call of `function`, and compute every value of its graphs three times: by the eager reference, by
    compiled kernels (those of the GPU, if the function runs on one), and in float64. A value may differ from float64 by
    `tolerance` units in the last place of the largest value, in the coarsest dtype on the way to it, times the square
    root of the number of terms behind it. State is restored; what Python does besides happens once."""
    plain = function.function if isinstance(function, CompiledFunction) else function
    name = getattr(plain, "__name__", type(plain).__name__)
    state = State(plain, (args, kwargs))
    recorded: list[tuple[Graph, Location, list[np.ndarray]]] = []

    def execute(recorder: Recorder, segment: Segment, arrays: list[Any]) -> tuple[Any, None]:
        graph = segment.graph
        values = [to_host(a) if type(a) is DeviceArray else a.copy() for a in arrays]
        recorded.append((graph, segment.location, values))
        results = evaluate(graph, values)
        for (k, _), value in zip(graph.writes, results[len(graph.outputs):]):
            overwrite(arrays[k], np.asarray(value))
        found = [np.array(r) for r in results[:len(graph.outputs)]]
        place, homeward = segment.location
        return [r if place == CPU or k in homeward else moved(r, device(place)) for k, r in enumerate(found)], None

    recorder = Recorder(execute, name)
    try:
        with interpret(recorder):
            _ = plain(*args, **kwargs)                # held: what nobody holds is not computed
            recorder.flush()
    finally:
        state.restore()
    found: list[Divergence] = []
    for graph, location, arrays in recorded:
        found.extend(_compare(graph, location, arrays, tolerance))
    return Verification(name, len(recorded), sum(len(g.nodes) for g, _, _ in recorded), tuple(found))


def _compare(graph: Graph, location: Location, arrays: list[np.ndarray], tolerance: float) -> list[Divergence]:
    everything = [v for node in graph.nodes for v in node.outputs]
    eager = evaluate(graph.replace(outputs=tuple(everything), writes=()), arrays)
    exact = _in_float64(graph, arrays)
    inputs = [np.ascontiguousarray(a).reshape(a.shape) for a in arrays]
    plan = plan_for(graph.replace(outputs=tuple(everything), writes=()), Location(location.device), 1.0, "default")
    compiled = [to_host(a) if type(a) is DeviceArray else a for a in plan.run(inputs)]
    terms: dict[Value, float] = {}
    coarse: dict[Value, float] = {}                   # the widest spacing of a dtype on the way to a value
    found = []
    k = 0
    for node in graph.nodes:
        behind = max([terms.get(v, 1.0) for v in node.inputs], default=1.0)
        reduced = max([v.type.size for v in node.inputs], default=1) / max(1, node.outputs[0].type.size)
        coarsest = max([coarse.get(v, 0.0) for v in node.inputs], default=0.0)
        for v in node.outputs:
            terms[v] = behind + max(1.0, reduced) ** 0.5
            coarse[v] = max(coarsest, _precision(v.type))
            allowed = tolerance * coarse[v] * terms[v]
            for side, values in (("eager", eager[k]), ("compiled", compiled[k])):
                error = _error(values, exact[v])
                if error > allowed:
                    found.append(Divergence(node.op.name, v.type, describe_location(node.where),
                                            source_line(node.where), side, error, allowed))
            k += 1
    return found


def _in_float64(graph: Graph, arrays: list[np.ndarray]) -> dict[Value, np.ndarray]:
    """Every value of the graph, with all floating-point types widened."""
    everything = tuple([v for node in graph.nodes for v in node.outputs])
    widened = _widened(graph.replace(outputs=everything, writes=()))
    wide = [a.astype(v.type.dtype.numpy) for v, a in zip(widened.inputs, arrays)]
    return dict(zip(everything, evaluate(widened, wide)))


def _widened(graph: Graph) -> Graph:
    """The same program in float64; graphs inside of it, too."""
    builder = GraphBuilder(graph.name)
    mapped: dict[Value, Value] = {v: builder.input(_wide(v.type)) for v in graph.inputs}
    with builder:
        for node in graph.nodes:
            attrs = {name: _wide_attribute(value) for name, value in node.attrs.items()}
            result = builder.run(node.op, tuple([mapped[v] for v in node.inputs]), attrs)
            mapped.update(zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True))
    return builder.build([mapped[v] for v in graph.outputs])


def _wide_attribute(value: Any) -> Any:
    if isinstance(value, Graph):
        return _widened(value)
    return dtypes.float64 if isinstance(value, DType) and value.is_floating_point else value


def _wide(type: TensorType) -> TensorType:
    return type.with_dtype(dtypes.float64) if type.dtype.is_floating_point else type


def _precision(type: TensorType) -> float:
    if not type.dtype.is_floating_point:
        return 0.0
    return {"f64": 2.0 ** -52, "f32": 2.0 ** -23, "f16": 2.0 ** -10, "bf16": 2.0 ** -7}[type.dtype.short]


def _error(values: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference relative to the largest exact value; infinite where only one side is finite. Integers and
    bools are compared with a tie of rounding in mind: they count only through what is computed from them."""
    if values.dtype.kind in "biu":
        return 0.0
    a, b = np.asarray(values, np.float64), np.asarray(exact, np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(b)
    scale = float(np.max(np.abs(b[finite]), initial=0.0))
    gap = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return gap / scale if scale else gap
