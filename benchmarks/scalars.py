"""Scalar math in kernels: nanoseconds per element and errors, beside NumPy and, where it is installed, PyTorch.

    python -m benchmarks.scalars [f32|f64]

One elementwise op over a million elements per call; all libraries take turns. Errors are in units in the last place of
the exact result, which is taken in the next wider type: mean, then largest.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable

import numpy as np

from benchmarks.measure import interleave
from benchmarks.report import Table
from jitgrad.dtypes import BY_SHORT, DType
from jitgrad.ir import REGISTRY, GraphBuilder, TensorType
from jitgrad.plans import compile_graph

COUNT = 1 << 20
NUMPY_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
RANGES = {"exp": (-80, 80), "exp2": (-100, 100), "expm1": (-5, 5), "log": (1e-3, 1e3), "log2": (1e-3, 1e3),
          "log1p": (-0.9, 10), "tanh": (-5, 5), "sigmoid": (-20, 20), "sqrt": (0, 100), "sin": (-100, 100),
          "cos": (-100, 100), "tan": (-100, 100), "asin": (-1, 1), "atan": (-10, 10), "sinh": (-10, 10),
          "erf": (-4, 4), "erfc": (-3, 8), "erfinv": (-1, 1), "lgamma": (3, 100), "digamma": (0.1, 100)}

Array = np.ndarray
Call = Callable[[], object]


def plan_call(name: str, x: Array, out: Array, dtype: DType) -> Call:
    builder = GraphBuilder(name)
    value = builder.input(TensorType(dtype, x.shape))
    with builder:
        plan = compile_graph(builder.build([REGISTRY[name](value)]))
    plan.pointers[:] = [x.ctypes.data, out.ctypes.data]

    def call(keep: object = (x, out)) -> None:      # the plan knows addresses only
        plan.execute()

    return call


def calls(name: str, x: Array, results: dict[str, Array], dtype: DType) -> dict[str, Call]:
    """What each library does, into its own result."""
    found = {"jitgrad": plan_call(name, x, results["jitgrad"], dtype)}
    if hasattr(np, NUMPY_NAMES.get(name, name)):
        function = getattr(np, NUMPY_NAMES.get(name, name))
        found["numpy"] = lambda: function(x, out=results["numpy"])
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        operand, result = torch.from_numpy(x), torch.from_numpy(results["torch"])
        found["torch"] = lambda: getattr(torch, name)(operand, out=result)
    return found


def errors(name: str, x: Array, y: Array) -> str:
    """Mean and largest error where NumPy has the function in a wider type."""
    if not hasattr(np, NUMPY_NAMES.get(name, name)):
        return "–"
    exact = getattr(np, NUMPY_NAMES.get(name, name))(x.astype("f8" if x.itemsize == 4 else "g"))
    wrong = np.abs(y - exact) / np.spacing(np.abs(exact).astype(x.dtype)).astype(exact.dtype)
    return f"{wrong.mean():.2f} {wrong.max():.2f}"


def table(dtype: DType, seconds: float = 0.1) -> Table:
    """One row per function."""
    rows, names = [], ["jitgrad", "numpy", "torch"]
    for name, (low, high) in RANGES.items():
        x = np.random.default_rng(0).uniform(low, high, COUNT).astype(dtype.numpy)
        results = {library: np.empty_like(x) for library in names}
        found = calls(name, x, results, dtype)
        taken = {k: 1e9 * statistics.median(v) / COUNT for k, v in interleave(found, budget=seconds).items()}
        rows.append([name, *(f"{taken[k]:.2f}" if k in found else "–" for k in names),
                     *(errors(name, x, results[k]) if k in found else "–" for k in names)])
    return Table(f"scalar functions, {dtype}, all threads", ["function", *(f"{k} ns" for k in names),
                                                           *(f"{k} error" for k in names)], rows)


if __name__ == "__main__":
    print(table(BY_SHORT[sys.argv[1] if len(sys.argv) > 1 else "f32"]))
