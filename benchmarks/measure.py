"""Timing: several programs that do the same work, in turns, so that what disturbs the machine disturbs all of them.

In go functions without arguments that return when their work is done; out come the seconds of every timed call.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

TURN = 0.15                     # seconds of calls per turn, after one that is not timed
PAUSE = 0.15                    # seconds before a turn, in which the threads of the contender before it go to sleep


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


Clock = Callable[[Callable[[], Any]], float]
"""Carries out a call; returns the seconds that it took."""


def interleave(functions: Mapping[str, Callable[[], Any]], *, budget: float, repeats: int | None = None,
               clock: Clock = seconds, turn: float | None = None, pause: float | None = None) -> dict[str, list[float]]:
    """Seconds per call of every function, by `clock`; they take turns in random order.

    Rounds go on for `budget` seconds per function, three at least; `repeats` asks for this many rounds instead. `turn` and
    `pause`: other seconds than `TURN` and `PAUSE`."""
    turn, pause = TURN if turn is None else turn, PAUSE if pause is None else pause
    bursts = {name: _burst(turn, clock(function)) for name, function in functions.items()}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    order, end, rounds = list(functions), time.perf_counter() + budget * len(functions), 0
    while rounds < (repeats or 3) or (repeats is None and time.perf_counter() < end):
        random.shuffle(order)
        for name in order:
            taken[name].extend(_turn(functions[name], bursts[name], clock, pause))
        rounds += 1
    return taken


def _burst(turn: float, estimate: float) -> int:
    return max(1, min(300, int(turn / max(estimate, 1e-9))))


def _turn(function: Callable[[], Any], burst: int, clock: Clock, pause: float) -> list[float]:
    time.sleep(pause)                       # threads of OpenBLAS, OpenMP and XLA spin for a while when they have no work
    function()
    return [clock(function) for _ in range(burst)]


def per_call(function: Callable[[], Any], calls: int = 1000) -> float:
    """Seconds per call of something too short for the clock."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles of some timings, and how many there are."""
    ordered = sorted(times)
    return {"median": statistics.median(ordered), "quarter": ordered[len(ordered) // 4],
            "three_quarters": ordered[3 * len(ordered) // 4], "count": len(ordered)}
