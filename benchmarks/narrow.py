"""Rates of square matrix products of narrow numbers: 16-bit floats and int8, as multiples of the float32 product.

    python -m benchmarks.narrow [sizes]

One thread. For each size the products of all dtypes take turns, PyTorch's too where it is installed, and the fastest call
of each counts, so that others on the machine matter less. int8 is ``_int_mm``, which sums up in int32.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.measure import interleave
from benchmarks.report import Table

DTYPES = ("float32", "bfloat16", "float16", "int8")
SECONDS = 2                                     # per product

Call = Callable[[], object]


def jitgrad_calls(size: int) -> dict[str, Call]:
    """The compiled product of each dtype, called once."""
    import jitgrad as jg
    jg.config.update(num_threads=1)
    calls: dict[str, Call] = {}
    for name in DTYPES:
        whole = name == "int8"
        x, y = [jg.randint(-128, 128, (size, size), dtype=jg.int8) if whole else
                jg.randn(size, size).to(getattr(jg, name)) for _ in range(2)]
        product = jg.compile((lambda a, b: jg._int_mm(a, b)) if whole else (lambda a, b: a @ b))
        product(x, y)
        calls[name] = partial(product, x, y)
    return calls


def torch_calls(size: int) -> dict[str, Call]:
    """The same by PyTorch."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    calls: dict[str, Call] = {}
    for name in DTYPES:
        whole = name == "int8"
        x, y = [torch.randint(-128, 128, (size, size), dtype=torch.int8) if whole else
                torch.randn(size, size).to(getattr(torch, name)) for _ in range(2)]
        calls[name] = partial(torch._int_mm if whole else torch.mm, x, y)
    return calls


def measure(size: int) -> list[list[str]]:
    """A row of text per library: float32's rate, then the multiples."""
    libraries = {"jitgrad": jitgrad_calls, **({"PyTorch": torch_calls} if importlib.util.find_spec("torch") else {})}
    calls = {(library, name): call for library, make in libraries.items() for name, call in make(size).items()}
    taken = interleave({f"{library} {name}": call for (library, name), call in calls.items()}, budget=SECONDS)
    rows = []
    for library in libraries:
        times = [min(taken[f"{library} {name}"]) for name in DTYPES]
        rows.append([f"{size} {library}", f"{2e-9 * size ** 3 / times[0]:.0f}", *[f"{times[0] / t:.2f}" for t in times[1:]]])
    return rows


def main(sizes: list[int]) -> None:
    rows = [row for size in sizes for row in measure(size)]
    columns = ["size", "float32, GFLOP/s", *[f"{name}, times" for name in DTYPES[1:]]]
    print(Table("square products, one thread", columns, rows))


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [256, 512, 1024, 2048])
