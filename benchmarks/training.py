"""The training steps, by all contenders, in turns: first call, time per step, and whether they compute the same.

Every contender starts from the same weights and the same batch. The losses of its first steps are compared with those
of PyTorch's eager mode (jitgrad's without PyTorch), so that nothing is fast by being wrong.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import measure
from benchmarks.contenders import CONTENDERS, Contender, equal_start, in_order, missing, taking_part
from benchmarks.report import Table, milliseconds, ratio
from benchmarks.steps import TrainingStep, chosen

CHECKED_STEPS, CHECKING_SECONDS = 10, 5.0
REFERENCE = ("PyTorch", "jitgrad eager", "jitgrad")
Result = dict[str, Any]


def run(names: Sequence[str] = (), *, budget: float, repeats: int | None = None, only: Sequence[str] = (),
        mode: str = "default", tell: Callable[[str], None] = print) -> Result:
    """Measure the steps called `names` (all without names): for each, what `measure_step` returns. In another `mode` than
    the default one jitgrad takes part twice."""
    results = {}
    for name, step in chosen(names).items():
        tell(f"  {step.title} ...")
        results[name] = measure_step(step, budget, repeats, only, mode)
    return results


def measure_step(step: TrainingStep, budget: float, repeats: int | None, only: Sequence[str],
                 mode: str = "default") -> Result:
    """Per contender its first call, its timings and its losses; what is missing or failed, with the reason."""
    result: Result = {"title": step.title, "missing": missing(step), "contenders": {}, "failed": {}}
    contenders = taking_part(only, mode)
    if result["missing"]:
        contenders = [c for c in contenders if c.package != "jitgrad"]
        if not any(c.package == "torch" for c in contenders):
            return result
    weights, batch = equal_start(step, "torch" if result["missing"] else "jitgrad")
    calls = {}
    for contender in contenders:
        try:
            calls[contender.name], result["contenders"][contender.name] = _first_steps(contender, step, weights, batch)
        except Exception:
            result["failed"][contender.name] = traceback.format_exc()
    for contender_name, times in measure.interleave(calls, budget=budget, repeats=repeats).items():
        result["contenders"][contender_name].update(measure.summary(times))
    _compare_losses(result["contenders"])
    return result


def _first_steps(contender: Contender, *case: Any) -> tuple[Callable[[], Any], Result]:
    call = contender.make(*case)
    begin = time.perf_counter()
    losses = [call().item()]
    first = time.perf_counter() - begin
    while len(losses) < CHECKED_STEPS and time.perf_counter() - begin < first + CHECKING_SECONDS:
        losses.append(call().item())
    return call, {"first_call": first, "losses": losses}


def _compare_losses(contenders: Result) -> None:
    """Note the largest relative difference from the losses of the reference."""
    reference = next((contenders[name]["losses"] for name in REFERENCE if name in contenders), None)
    if reference is None:
        return
    for record in contenders.values():
        record["difference"] = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(record["losses"], reference))


def table(results: Result) -> Table:
    """One row per step: milliseconds (first call in seconds), and what jitgrad's compiled mode gains."""
    installed = [c.name for c in CONTENDERS if c.installed]
    names = in_order([*installed, *[name for result in results.values() for name in result["contenders"]]])
    rows = []
    for result in results.values():
        cells = [_cell(result, name) for name in names]
        rows.append([result["title"], *cells, ratio(best_peer(result), _median(result, "jitgrad")),
                     ratio(_median(result, "jitgrad eager"), _median(result, "jitgrad")), _agreement(result)])
    return Table("training steps, milliseconds (first call, seconds)",
                 ["step", *names, "best peer / jitgrad", "own eager / jitgrad", "difference"], rows, _notes(results))


def best_peer(result: Result) -> float | None:
    """Median seconds of the fastest contender that is not jitgrad."""
    peers = [record["median"] for name, record in result["contenders"].items() if not name.startswith("jitgrad")]
    return min(peers, default=None)


def _median(result: Result, name: str) -> float | None:
    record = result["contenders"].get(name)
    return record["median"] if record else None


def _cell(result: Result, name: str) -> str:
    record = result["contenders"].get(name)
    if record:
        return f"{milliseconds(record['median'])} ({record['first_call']:.2f})"
    return "failed" if name in result["failed"] else "missing" if result["missing"] else "–"


def _agreement(result: Result) -> str:
    differences = [r["difference"] for r in result["contenders"].values() if "difference" in r]
    return f"{max(differences):.0e}" if differences else ""


def _notes(results: Result) -> list[str]:
    notes = [f"missing: {r['title']}: {r['missing']}" for r in results.values() if r["missing"]]
    return notes + [f"failed: {r['title']}, {name}: {trace.splitlines()[-1]}" for r in results.values()
                    for name, trace in r["failed"].items()]
