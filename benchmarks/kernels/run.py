"""The kernels' tables: what the machine can do, and by family each case with its rates, jitgrad's share of the limit, and
how many times as fast as the fastest other library it is.

    python -m benchmarks kernels
    python -m benchmarks kernels products bandwidth --only jitgrad PyTorch

Rates of products and convolutions are GFLOP/s, beside multiply-adds in registers; the others GB/s, beside the fastest
copy of as many bytes, which comes from the same cache. The limit takes its turn with the libraries; jitgrad's share of the
multiply-adds is, for long calls, the median over short turns, in which it and they do the same work.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import bandwidth, convolutions, products
from benchmarks.kernels.case import PACKAGES, copies, measure
from benchmarks.measure import interleave
from benchmarks.report import Table, Tables, ratio
from jitgrad import config, limits
from jitgrad.runtime import threads

FAMILIES = {"products": products.cases, "convolutions": convolutions.cases, "bandwidth": bandwidth.cases}
TITLES = {"products": "matrix products, GFLOP/s", "convolutions": "convolutions, GFLOP/s",
          "bandwidth": "kernels limited by memory, GB/s"}
LIMITS = {"products": "multiply-adds", "convolutions": "multiply-adds", "bandwidth": "the fastest copy"}
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Result = dict[str, Any]


def run(names: Sequence[str] = (), *, seconds: float, repeats: int | None = None, only: Sequence[str] = (),
        tell: Callable[[str], None] = print) -> Result:
    """The machine's limits, and by family and case what `case.measure` returns; `seconds` per case and library."""
    unknown = set(names) - set(FAMILIES)
    if unknown:
        raise SystemExit(f"no family of kernels is called {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    results: Result = {"limits": machine_limits(seconds, repeats)}
    for family in names or FAMILIES:
        tell(f"  {TITLES[family]} ...")
        results[family] = {case.name: measure(case, seconds, repeats, only) for case in FAMILIES[family]()}
    return results


# ---- the machine ------------------------------------------------------------------------------------------------


def machine_limits(seconds: float, repeats: int | None) -> dict[str, float]:
    """Operations per second on one thread and on all, and bytes per second of copies, measured in turns."""
    count = threads.limit()
    near, far = copied_bytes(count)
    adds = limits.multiply_adds()

    def alone() -> None:
        with config.scope(num_threads=1):
            adds()

    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "GFLOP/s, one thread": (alone, adds.work), f"GFLOP/s, {count} threads": (adds, adds.work)}
    for place, nbytes in ((f"in the second cache ({nbytes_text(near)} each)", near),
                          (f"in memory ({nbytes_text(far)} each)", far)):
        calls |= {f"GB/s, {name} {place}": (call, 2 * nbytes) for name, call in copies(nbytes).items()}
    times = interleave({name: call for name, (call, _) in calls.items()}, budget=seconds, repeats=repeats)
    return {name: calls[name][1] / statistics.median(taken) for name, taken in times.items()}


def copied_bytes(processors: int) -> tuple[int, int]:
    """Sizes of arrays of which two fill half of the second caches of so many processors, and of such as are four times
    the last cache (a sixteenth of the memory at most)."""
    sizes = cache_bytes()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return processors * sizes.get(2, 1 << 20) // 4, min(4 * max([1 << 26, *sizes.values()]), memory // 16 // 4096 * 4096)


def cache_bytes(folder: Path = CACHES) -> dict[int, int]:
    """Bytes of the caches for data of one processor by level, as Linux describes them; {} where it does not."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = [(index / name).read_text().strip() for name in ("level", "type", "size")]
        if kind != "Instruction":
            found[int(level)] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return found


def nbytes_text(nbytes: int) -> str:
    """``1.0 MiB``"""
    return f"{nbytes / 2**20:.1f} MiB"


# ---- tables -----------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> Tables:
    """One table for the machine and one per family."""
    machine = Table("what this machine can do", ["", "measured"],
                    [[name, f"{1e-9 * rate:.1f}"] for name, rate in results["limits"].items()])
    return Tables([machine, *[family_table(family, cases) for family, cases in results.items() if family != "limits"]])


def family_table(family: str, cases: Mapping[str, Result]) -> Table:
    """Rates by library, the limit's rate, jitgrad's share of it, and how often as fast as the best other it is."""
    return rates_table(TITLES[family], cases, list(PACKAGES), LIMITS[family])


def rates_table(title: str, cases: Mapping[str, Result], order: Sequence[str], limit: str = "", unit: float = 1e9) -> Table:
    """The same for contenders in this `order`, of which those called jitgrad are ours; without a `limit` its columns are
    left out. Rates are in multiples of `unit`."""
    names = [name for name in order if any(name in r["seconds"] for r in cases.values())]
    rows = []
    for case, r in cases.items():
        rates, own = [rate(r, name) for name in names], share(r, "jitgrad") if limit else None
        limits = [figures(r["limit"] / unit), "–" if own is None else f"{own:.0%}"] if limit else []
        rows.append([case, *["–" if x is None else figures(x / unit) for x in rates], *limits,
                     ratio(best_peer(r), r["seconds"].get("jitgrad"))])
    more = [limit, "jitgrad's share"] if limit else []
    return Table(title, ["", *names, *more, "best peer / jitgrad"], rows, failures(cases))


def failures(cases: Mapping[str, Result]) -> list[str]:
    """A line for everything that failed."""
    return [f"failed: {case}, {name}: {(trace.strip() or '?').splitlines()[-1]}" for case, r in cases.items()
            for name, trace in r["failed"].items()]


def rate(result: Result, library: str) -> float | None:
    """Work per second."""
    seconds = result["seconds"].get(library)
    return result["work"] / seconds if seconds else None


def share(result: Result, library: str) -> float | None:
    """What part of the limit a library reaches."""
    reached = rate(result, library)
    return None if reached is None else reached / result["limit"]


def best_peer(result: Result) -> float | None:
    """Seconds of the fastest library that is not jitgrad."""
    return min([seconds for name, seconds in result["seconds"].items() if not name.startswith("jitgrad")], default=None)


def figures(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
