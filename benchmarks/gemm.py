"""GFLOP/s of matrix products: jitgrad's plans beside NumPy and, where they are installed, PyTorch and JAX.

    python -m benchmarks gemm

Every product is float32. All libraries take turns on the same operands; medians are printed. In the names ``T`` marks
an operand that is the transpose of a contiguous array, as in the gradients of a linear layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.measure import interleave
from benchmarks.report import Table
from jitgrad import ops
from jitgrad.dtypes import float32
from jitgrad.ir import GraphBuilder, TensorType
from jitgrad.ops.contraction import transposed
from jitgrad.plans import compile_graph

SHAPES = [(128, 784, 512, ""), (128, 512, 512, ""), (784, 128, 512, "left"), (512, 128, 512, "left"),
          (128, 512, 512, "right"), (128, 512, 10, ""), (32, 64, 32, ""),
          *[(n, n, n, "") for n in (64, 128, 256, 512, 1024, 2048)]]
"""m, k, n and which operand is transposed: products of an MLP step and its gradients, then squares."""

Call = Callable[[], object]


def plan_call(a: np.ndarray, b: np.ndarray, side: str) -> Call:
    builder = GraphBuilder("matmul")
    x, y = [builder.input(TensorType(float32, array.shape)) for array in (a, b)]
    with builder:
        left, right = (transposed(x) if side == "left" else x), (transposed(y) if side == "right" else y)
        plan = compile_graph(builder.build([ops.matmul(left, right)]))
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    memory = (a, b, out)
    plan.pointers[:] = [array.ctypes.data for array in memory]
    np.testing.assert_allclose(plan.run([a, b])[0], numpy_call(a, b, side)(), rtol=1e-3, atol=1e-3)

    def call(keep: object = memory) -> None:        # the plan knows addresses only
        plan.execute()

    return call


def numpy_call(a: np.ndarray, b: np.ndarray, side: str) -> Call:
    left, right = (a.T if side == "left" else a), (b.T if side == "right" else b)
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    return lambda: np.matmul(left, right, out=out)


def torch_call(a: np.ndarray, b: np.ndarray, side: str) -> Call:
    torch = importlib.import_module("torch")
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    left, right = (left.T if side == "left" else left), (right.T if side == "right" else right)
    out = torch.empty(left.shape[0], right.shape[1])
    return lambda: torch.mm(left, right, out=out)


def jax_call(a: np.ndarray, b: np.ndarray, side: str) -> Call:
    jax = importlib.import_module("jax")
    product = jax.jit(lambda x, y: (x.T if side == "left" else x) @ (y.T if side == "right" else y))
    left, right = jax.numpy.asarray(a), jax.numpy.asarray(b)
    return lambda: product(left, right).block_until_ready()


def libraries(only: Sequence[str] = ()) -> dict[str, Callable[[np.ndarray, np.ndarray, str], Call]]:
    """Those that are installed, of those called `only` if there are any."""
    found: dict[str, Callable[[np.ndarray, np.ndarray, str], Call]] = {"jitgrad": plan_call, "NumPy": numpy_call}
    for name, package, call in (("PyTorch", "torch", torch_call), ("JAX", "jax", jax_call)):
        if importlib.util.find_spec(package):
            found[name] = call
    return {name: call for name, call in found.items() if not only or name in only}


def measure(m: int, k: int, n: int, side: str, seconds: float, only: Sequence[str]) -> dict[str, float]:
    """GFLOP/s by library."""
    random = np.random.default_rng(0)
    a = random.standard_normal((k, m) if side == "left" else (m, k), dtype=np.float32)
    b = random.standard_normal((n, k) if side == "right" else (k, n), dtype=np.float32)
    times = interleave({name: make(a, b, side) for name, make in libraries(only).items()}, budget=seconds)
    return {name: 2e-9 * m * k * n / statistics.median(taken) for name, taken in times.items()}


def run(seconds: float, only: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """GFLOP/s by product and library; `seconds` per product and library."""
    return {_name(*shape): measure(*shape, seconds, only) for shape in SHAPES}


def _name(m: int, k: int, n: int, side: str) -> str:
    return f"{m}x{k}{' T' if side == 'left' else ''} @ {k}x{n}{' T' if side == 'right' else ''}"


def table(results: dict[str, dict[str, float]]) -> Table:
    """One row per product."""
    rows = [[name, *(f"{rate:.0f}" for rate in rates.values())] for name, rates in results.items()]
    return Table("matrix products, GFLOP/s, float32", ["product", *next(iter(results.values()))], rows)
