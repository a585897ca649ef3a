"""Products of few rows with the weight of a linear layer, x @ w.T, as inference makes them: microseconds per call.

    python -m benchmarks.few_rows [rows,depth,columns ...]

One thread. The weight is float32, bfloat16 that becomes float32 for the product, or int8 with a factor per row. Products of
all kinds take turns, PyTorch's too where it is installed, and the fastest call of each counts, so that others on the machine
matter less. The last columns compare the bytes of the weights with reading as many float32 in order (their sum).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.measure import interleave
from benchmarks.report import Table

SHAPES = ((1, 768, 768), (1, 4096, 1024), (4, 768, 3072), (8, 1024, 1024), (16, 1024, 1024), (32, 1024, 1024))
SECONDS = 0.5                                   # per product
KINDS = {"float32": 4, "bfloat16": 2, "int8": 1}

Call = Callable[[], object]


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


def calls(library: Any, shape: tuple[int, int, int]) -> dict[str, Call]:
    """A call for each kind of weight, and the sum of the float32 weights, each done once."""
    rows, depth, columns = shape
    compiled = library.compile if library.__name__ == "jitgrad" else (lambda function: function)
    x, w, scale = library.randn(rows, depth), library.randn(columns, depth), library.rand(columns, 1)
    whole = library.randint(-127, 128, (columns, depth), dtype=library.int8)
    made: dict[str, Call] = {
        "float32": partial(compiled(plain), x, w), "bfloat16": partial(compiled(widened), x, w.to(library.bfloat16)),
        "int8": partial(compiled(scaled), x, whole, scale), "sum": partial(compiled(total), w)}
    for call in made.values():
        call()
    return made


def measure(shape: tuple[int, int, int]) -> list[list[str]]:
    """A row of text per library."""
    import jitgrad as jg
    jg.config.update(num_threads=1)
    libraries = {"jitgrad": jg}
    if importlib.util.find_spec("torch"):
        libraries["PyTorch"] = importlib.import_module("torch")
        libraries["PyTorch"].set_num_threads(1)
    every = {f"{name} {kind}": call for name, library in libraries.items() for kind, call in calls(library, shape).items()}
    taken = interleave(every, budget=SECONDS)
    read = 4 * shape[1] * shape[2] / min(taken["jitgrad sum"])
    rows = []
    for name in libraries:
        times = [min(taken[f"{name} {kind}"]) for kind in KINDS]
        shares = [size * shape[1] * shape[2] / t / read for t, size in zip(times, KINDS.values(), strict=True)]
        rows.append([f"{'x'.join(map(str, shape))} {name}", *[f"{1e6 * t:.1f}" for t in times],
                     *[f"{share:.2f}" for share in shares]])
    return rows


def main(shapes: list[tuple[int, int, int]]) -> None:
    rows = [row for shape in shapes for row in measure(shape)]
    columns = ["rows x depth x columns", *[f"{kind}, us" for kind in KINDS], *[f"{kind}, of reading" for kind in KINDS]]
    print(Table("x @ w.T of few rows, one thread", columns, rows))


if __name__ == "__main__":
    wanted = [text.split(",") for text in sys.argv[1:]]
    main([(int(m), int(k), int(n)) for m, k, n in wanted] or list(SHAPES))
