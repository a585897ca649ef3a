"""Plots of the results, as PNG files; one function per part, which gets the part's results and the file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.contenders import in_order
from benchmarks.kernels import run
from benchmarks.kernels.case import PACKAGES
from benchmarks.training import best_peer

COLORS = {"jitgrad": "#d1495b", "jitgrad eager": "#edae49", "PyTorch": "#00798c", "torch.compile": "#30638e",
          "JAX": "#66a182", "NumPy": "#8d96a3"}


def steps(results: Mapping[str, Any], path: Path) -> None:
    """Speed of every contender relative to the best peer."""
    measured = {r["title"]: r for r in results.values() if best_peer(r)}
    names = in_order([name for r in measured.values() for name in r["contenders"]])
    heights = {name: [best_peer(r) / r["contenders"][name]["median"] if name in r["contenders"] else 0
                      for r in measured.values()] for name in names}
    _bars(path, list(measured), heights, "speed relative to the best peer", line=1.0)


def kernels(results: Mapping[str, Any], path: Path) -> None:
    """Share of the machine's limit by case and library, one panel per family."""
    families = {family: cases for family, cases in results.items() if family != "limits"}
    figure, panels = pyplot.subplots(len(families), 1, figsize=(max(map(len, families.values())) / 2 + 2,
                                     6 * len(families)), squeeze=False, layout="constrained")
    for panel, (family, cases) in zip(panels.flat, families.items()):
        heights = {name: [run.share(r, name) or 0 for r in cases.values()] for name in PACKAGES
                   if any(name in r["seconds"] for r in cases.values())}
        _draw_bars(panel, list(cases), heights, f"{run.TITLES[family]}: share of {run.LIMITS[family]}", line=1.0)
    _write(figure, path)


def attention(results: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Speed relative to PyTorch's by number of tokens."""
    names = [name for name in next(iter(results.values())) if name != "memory"]
    reference = "PyTorch" if "PyTorch" in names else names[0]
    heights = {name: [r[reference] / r[name] if name in r else 0 for r in results.values()] for name in names}
    _bars(path, list(results), heights, f"speed relative to {reference}, causal attention by tokens", line=1.0)


def curves(results: Mapping[str, Any], path: Path) -> None:
    """The losses of jitgrad and of what it is compared with, one panel per training step."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(results):]:
        panel.set_axis_off()
    for panel, result in zip(panels.flat, results.values()):
        for (name, losses), style in zip(sorted(result["curves"].items()), ("-", "--")):
            panel.plot(losses, style, label=name, color=COLORS[name])
        panel.set_yscale("log" if min(map(min, result["curves"].values())) > 0 else "linear")
        panel.set_title(f"{result['title']}: {'pass' if result['passed'] else 'FAIL'}", fontsize=8)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    _write(figure, path)


def calls(results: Mapping[str, float], path: Path) -> None:
    """Microseconds per call of a 2x2 addition."""
    _bars(path, list(results), {"jitgrad": [1e6 * value for value in results.values()]}, "us per call", line=5.0)


def first(results: Mapping[str, Any], path: Path) -> None:
    """Seconds of the first call, cold and warm."""
    heights = {state: [r[state]["first_call"] for r in results.values()] for state in ("cold", "warm")}
    _bars(path, list(results), heights, "first call, s")


def scaling(results: Mapping[str, Any], path: Path) -> None:
    """Milliseconds of the first call of every batch size, in the order in which they came."""
    shapes = results["batch_sizes"]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axes.semilogy([1000 * t for t in shapes["first_call"]], ".", color=COLORS["jitgrad"])
    axes.axhline(20, color="gray", linewidth=0.8)
    axes.set(xlabel="batch sizes 1 to 64, in random order", ylabel="first call, ms")
    _write(figure, path)


def memory(results: Mapping[str, Any], path: Path) -> None:
    """Peak memory of a step: predicted, and measured compiled and eager, relative to eager."""
    heights = {name: [r[key] / r["eager"] for r in results.values()]
               for name, key in (("predicted", "predicted"), ("jitgrad", "measured"), ("jitgrad eager", "eager"))}
    _bars(path, [r["title"] for r in results.values()], heights, "peak memory relative to eager", line=1.0)


def _bars(path: Path, groups: Sequence[str], heights: Mapping[str, Sequence[float]], label: str,
          line: float | None = None) -> None:
    """A figure of `_draw_bars`."""
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.4 * len(groups)), 5), layout="constrained")
    _draw_bars(axes, groups, heights, label, line)
    _write(figure, path)


def _draw_bars(axes: Any, groups: Sequence[str], heights: Mapping[str, Sequence[float]], label: str,
               line: float | None) -> None:
    """Groups of bars side by side, one bar per key of `heights`."""
    width = 0.8 / max(1, len(heights))
    for k, (name, values) in enumerate(heights.items()):
        axes.bar([g + k * width for g in range(len(groups))], values, width, label=name, color=COLORS.get(name))
    if line is not None:
        axes.axhline(line, color="gray", linewidth=0.8)
    axes.set_xticks([g + 0.4 - width / 2 for g in range(len(groups))], groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(label)
    if len(heights) > 1:
        axes.legend(fontsize=8)


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
