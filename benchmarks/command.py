"""The command: which parts are measured, with what options, and where their results go.

    python -m benchmarks                                  everything
    python -m benchmarks steps mlp_small cnn --repeats 20
    python -m benchmarks steps --only jitgrad PyTorch
    python -m benchmarks steps gpt --only jitgrad --mode max-autotune
    python -m benchmarks kernels products
    python -m benchmarks gpu                              everything on a GPU, beside PyTorch, for 8 minutes
    python -m benchmarks gpu bandwidth gpt2 --minutes 3   some parts and training steps of it
    python -m benchmarks shapes gpt                       what a new size of the batch costs

Every part prints a table and leaves NAME.json (results and a description of the machine) and NAME.png in the folder of
results; that of a GPU leaves gpu.md, too.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, report

PARTS = ("steps", "curves", "kernels", "narrow", "attention", "calls", "first", "scaling", "shapes", "memory")
ON_REQUEST = ("gpu",)
"""What is measured only when it is named."""

NAMED = {"steps": "training steps", "curves": "training steps", "first": "training steps",
         "memory": "training steps", "shapes": "training steps", "kernels": "families (products, convolutions, bandwidth)",
         "gpu": "parts (launches, steps, bandwidth, products, attention, convolutions, first) and training steps"}
"""Parts that may be followed by names, and of what."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something to measure: options -> results, results -> table, results -> plot in a file."""

    measure: Callable[[argparse.Namespace], Any]
    table: Callable[[Any], report.Table | report.Tables]
    plot: Callable[[Any, Path], None]


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    chosen, options = _parse(arguments)
    threads = machine.use_threads(options.threads)
    print(f"{machine.describe()['processor']}, {threads} threads")
    with tempfile.TemporaryDirectory(prefix="jitgrad-") as cache:
        os.environ["JITGRAD_CACHE"] = cache                   # so that first calls are cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/torch"
        for name, part in _parts().items():
            if name in chosen:
                _measure(name, part, options)


def _no_plot(results: Any, path: Path) -> None:
    """For a part whose table says it all."""


def _measure(name: str, part: Part, options: argparse.Namespace) -> None:
    results = part.measure(options)
    print(part.table(results), flush=True)
    path = report.save(name, results, options.output)
    part.plot(results, path.with_suffix(".png"))


def _parse(arguments: list[str] | None) -> tuple[tuple[str, ...], argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part or name",
                        help=f"of {', '.join(PARTS + ON_REQUEST)}; "
                             f"after {', '.join(f'{p!r} {what}' for p, what in NAMED.items())}")
    parser.add_argument("--repeats", type=int, help="rounds per measurement, instead of a time")
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender and training step (3)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all that is measured on a GPU (8)")
    parser.add_argument("--small", action="store_true", help="on a GPU: tiny sizes, to see whether everything runs")
    parser.add_argument("--steps", type=int, default=200, help="of a learning curve (200)")
    parser.add_argument("--threads", type=int, help="of every contender (all processors)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help='such as jitgrad "torch.compile" JAX')
    parser.add_argument("--mode", default="default", help="of compiling steps, beside the default one: max-autotune")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    before, gpu, behind = options.parts, [], []
    if "gpu" in before:                                       # it has parts of its own, some of the same names
        place = before.index("gpu")
        before, gpu, behind = before[:place], ["gpu"], before[place + 1:]
    options.names = [word for word in before if word not in PARTS] + behind
    chosen = (*[word for word in before if word in PARTS], *gpu)
    if options.names and not set(NAMED) & set(chosen):
        parser.error(f"{options.names[0]!r} is no part; the parts are {', '.join(PARTS + ON_REQUEST)}")
    return chosen or PARTS, options


def _parts() -> dict[str, Part]:
    """The parts, imported after the thread counts are set."""
    from benchmarks import attention, calls, curves, first_call, gpu, memory, narrow, plots, scaling, shapes, training
    from benchmarks.kernels import run as kernels
    return {
        "steps": Part(lambda o: training.run(o.names, budget=o.seconds, repeats=o.repeats, only=o.only, mode=o.mode),
                      training.table, plots.steps),
        "curves": Part(lambda o: curves.run(o.names, o.steps), curves.table, plots.curves),
        "kernels": Part(lambda o: kernels.run(o.names, seconds=o.seconds / 10, repeats=o.repeats, only=o.only),
                        kernels.table, plots.kernels),
        "narrow": Part(lambda o: narrow.run(o.seconds / 10, o.only), narrow.table, _no_plot),
        "attention": Part(lambda o: attention.run(o.seconds, o.only), attention.table, plots.attention),
        "calls": Part(lambda o: calls.run(o.repeats or 15, o.only), calls.table, plots.calls),
        "first": Part(lambda o: first_call.run(o.names, o.repeats or 3), first_call.table, plots.first),
        "scaling": Part(lambda o: scaling.run(), scaling.table, plots.scaling),
        "memory": Part(lambda o: memory.run(o.names), memory.table, plots.memory),
        "shapes": Part(lambda o: shapes.run(o.names), shapes.table, _no_plot),
        "gpu": Part(lambda o: gpu.run(o.names, minutes=o.minutes, seconds=o.seconds / 20, repeats=o.repeats, only=o.only,
                                      small=o.small, output=o.output), gpu.table, _no_plot),
    }
