"""Products of narrow numbers and of few rows, by one thread.

Square products of 16-bit floats and int8, as multiples of the rate in float32; int8 is ``_int_mm``, which sums up in int32.
Products with the weight of a linear layer, ``x @ w.T``, of few rows, as inference makes them, and of more: the weight is
float32, bfloat16 that becomes float32 for the product, or int8 with a factor per row. Products of all kinds take turns,
PyTorch's too where it is installed, and the fastest call of each counts, so that others on the machine matter less.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.measure import interleave, seconds as clock
from benchmarks.report import Table, Tables

SIZES = (256, 512, 1024, 2048)
DTYPES = ("float32", "bfloat16", "float16", "int8")
SHAPES = ((1, 768, 768), (1, 4096, 1024), (4, 768, 3072), (8, 1024, 1024), (16, 1024, 1024), (32, 1024, 1024),
          (32, 1024, 4096), (128, 1024, 4096), (1024, 1024, 4096))
"""Rows, depth, columns."""

LONG = 2.0                                      # seconds; what takes longer is carried out once
WEIGHTS = {"float32": 4, "bfloat16": 2, "int8": 1}

Call = Callable[[], object]
Result = dict[str, Any]


def run(seconds: float, only: Sequence[str] = ()) -> Result:
    """The fastest call in seconds, by "square" or "few rows", size, library and dtype; and in "reading" that of summing up
    the float32 weights in order. `seconds` are for each call."""
    with _single_threads(only) as libraries:
        return {"square": {str(size): _fastest(libraries, partial(_square, size=size), seconds) for size in SIZES},
                "few rows": {"x".join(map(str, shape)): _fastest(libraries, partial(_few_rows, shape=shape), seconds)
                             for shape in SHAPES}}


@contextmanager
def _single_threads(only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The libraries by name, with one thread each."""
    jitgrad = importlib.import_module("jitgrad")
    libraries = {"jitgrad": jitgrad}
    if importlib.util.find_spec("torch"):
        libraries["PyTorch"] = torch = importlib.import_module("torch")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    with jitgrad.config.scope(num_threads=1):
        yield {name: library for name, library in libraries.items() if not only or name in only}
    if "PyTorch" in libraries:
        torch.set_num_threads(threads)


def _fastest(libraries: dict[str, Any], make: Callable[[Any], dict[str, Call]],
             seconds: float) -> dict[str, dict[str, float]]:
    calls = {(name, kind): call for name, library in libraries.items() for kind, call in make(library).items()}
    found: dict[str, dict[str, float]] = {name: {} for name in libraries}
    for (name, kind), call in list(calls.items()):
        if name == "jitgrad":
            call()                                                      # compiles
        taken = clock(call)
        if taken > LONG:
            found[name][kind] = taken
            del calls[name, kind]
    for key, times in interleave({" ".join(key): call for key, call in calls.items()}, budget=seconds).items():
        name, kind = key.split(" ")
        found[name][kind] = min(times)
    return found


def _square(library: Any, size: int) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name in DTYPES:
        whole, ours = name == "int8", library.__name__ == "jitgrad"
        x, y = [library.randint(-128, 128, (size, size), dtype=library.int8) if whole else
                library.randn(size, size).to(getattr(library, name)) for _ in range(2)]
        product = library._int_mm if whole else library.mm
        calls[name] = partial(_compiled(product) if ours else product, x, y)
    return calls


def _compiled(product: Callable[..., Any]) -> Callable[..., Any]:
    import jitgrad
    return jitgrad.compile(lambda a, b: product(a, b))


def plain(x: Any, w: Any) -> Any:
    """With a weight of float32."""
    return x @ w.T


def widened(x: Any, w: Any) -> Any:
    """With one that becomes float32."""
    return x @ w.float().T


def scaled(x: Any, w: Any, scale: Any) -> Any:
    """With one that has factors, too."""
    return x @ (w.float() * scale).T


def total(w: Any) -> Any:
    """All numbers in order."""
    return w.sum()


def _few_rows(library: Any, shape: tuple[int, int, int]) -> dict[str, Call]:
    rows, depth, columns = shape
    compiled = library.compile if library.__name__ == "jitgrad" else (lambda function: function)
    x, w, scale = library.randn(rows, depth), library.randn(columns, depth), library.rand(columns, 1)
    whole = library.randint(-127, 128, (columns, depth), dtype=library.int8)
    return {"float32": partial(compiled(plain), x, w), "bfloat16": partial(compiled(widened), x, w.to(library.bfloat16)),
            "int8": partial(compiled(scaled), x, whole, scale), "reading": partial(compiled(total), w)}


def table(results: Result) -> Tables:
    """Rates and multiples; then microseconds, and the rate of reading weights compared with summing float32 up."""
    square = [[f"{size} {name}", f"{2e-9 * int(size) ** 3 / times['float32']:.0f}",
               *[f"{times['float32'] / times[dtype]:.2f}" for dtype in DTYPES[1:]]]
              for size, found in results["square"].items() for name, times in found.items()]
    few = []
    for shape, found in results["few rows"].items():
        for name, times in found.items():
            shares = [times["reading"] * width / 4 / times[kind] for kind, width in WEIGHTS.items()]
            few.append([f"{shape} {name}", *[f"{1e6 * times[kind]:.1f}" for kind in WEIGHTS],
                        *[f"{share:.2f}" for share in shares]])
    return Tables([
        Table("square products, one thread", ["size", "float32, GFLOP/s", *[f"{d}, times" for d in DTYPES[1:]]], square),
        Table("x @ w.T, one thread",
              ["rows x depth x columns", *[f"{k}, us" for k in WEIGHTS], *[f"{k}, of reading" for k in WEIGHTS]], few)])
