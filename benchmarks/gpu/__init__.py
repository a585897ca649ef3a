"""Everything that is measured on a GPU: kernels limited by memory, products, attention, convolutions, launches, training
steps and first calls, beside PyTorch where that is installed and can use the GPU; nothing where there is no GPU.

    python -m benchmarks gpu                              all of it, the most important first, for 8 minutes at most
    python -m benchmarks gpu attention gpt2 --minutes 3   some parts, some training steps

Cases run in another process, which is started anew when one of them ends it. After every case the results are written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import prerequisites, report
from benchmarks.report import Table, Tables
from jitgrad.runtime.cuda import driver

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0                                # seconds that a case may take
Result = dict[str, Any]
Tell = Callable[[str], None]


def run(names: Sequence[str] = (), *, minutes: float, seconds: float, repeats: int | None = None,
        only: Sequence[str] = (), small: bool = False, output: Path = report.RESULTS, tell: Tell = print) -> Result:
    """By family and case what was measured; or ``{"why": …}``: why nothing can be. `seconds` per contender and
    case, of which those called `only` take part. `small`: tiny sizes, to see whether everything runs."""
    for finding in prerequisites.findings():
        tell(f"  {finding}")
    if not driver.available():
        tell(f"  nothing is measured: {driver.why_not()}")
        return {"why": driver.why_not()}
    from benchmarks.gpu.jobs import jobs

    todo = [job.key for job in jobs(names, small)]
    options = {"names": list(names), "small": small, "seconds": seconds, "repeats": repeats, "only": list(only)}
    return Supervisor(options, time.monotonic() + 60 * minutes, output, tell).measure(todo)


class Supervisor:
    """Has cases measured by other processes until the time is up. `command`: what starts one; it is given a file for its
    results, options, and the cases."""

    command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.child")

    def __init__(self, options: dict[str, Any], end: float, output: Path, tell: Tell = print):
        self.options, self.end, self.output, self.tell = options, end, output, tell
        self.results: Result = {}

    def measure(self, todo: list[str]) -> Result:
        """The results of all cases in `todo`; "late": those that there was no time for."""
        while todo and self._left() > 0:
            with tempfile.TemporaryDirectory(prefix="jitgrad-") as folder:
                todo = self._run_child(todo, Path(folder))
        if todo:
            self.results["late"] = todo
            self._write()
        return self.results

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _run_child(self, todo: list[str], folder: Path) -> list[str]:
        """Let one process measure as long as it can; the cases that are left. A case in which it ended has failed."""
        record, printed = folder / "record", folder / "printed"
        record.touch()
        given = json.dumps({**self.options, "left": self._left()})
        with printed.open("w") as stream, record.open() as file:
            child = subprocess.Popen([*self.command, str(record), given, json.dumps(todo)], cwd=ROOT, stdout=stream,
                                     stderr=subprocess.STDOUT, start_new_session=True,
                                     env={**os.environ, "PYTHONPATH": _paths()})
            under_way, since, done, begun = "", time.monotonic(), set(), ""
            while True:
                ended = child.poll() is not None
                *lines, begun = (begun + file.read()).split("\n")
                for line in lines:
                    under_way, since = self._take(json.loads(line), done), time.monotonic()
                late = time.monotonic() - since > PATIENCE or self._left() < -20
                if ended or late:
                    break
                time.sleep(0.05)
            if not ended:
                os.killpg(child.pid, signal.SIGKILL)              # with the processes that it has begun
            child.wait()
        said = " / ".join(printed.read_text(errors="replace").strip().splitlines()[-8:])
        if under_way:
            why = "it took too long" if not ended else f"the process ended with {child.returncode}: {said}"
            self._failed(under_way, why)
            done.add(under_way)
        elif child.returncode and not done:
            self.tell(f"  the measuring process ended with {child.returncode}: {said}")
            self.results["why"] = said
            return []
        return [key for key in todo if key not in done]

    def _take(self, message: Result, done: set[str]) -> str:
        """Keep what a process says. The case that is under way now, if any."""
        if "gpu" in message:
            self.results.setdefault("gpu", message["gpu"])
            return ""
        key = message["key"]
        if "result" not in message:
            self.tell(f"  {key} ...")
            return str(key)
        done.add(key)
        self._keep(key, message["result"])
        return ""

    def _failed(self, key: str, why: str) -> None:
        self.tell(f"  {key}: {why}")
        self.results.setdefault("failed", {})[key] = why
        self._write()

    def _keep(self, key: str, result: Result) -> None:
        family, _, name = key.partition(": ")
        if "why" in result:
            self._failed(key, result["why"])
            return
        self.results.setdefault(family, {})[name] = result
        self._write()

    def _write(self) -> None:
        path = report.save("gpu", self.results, self.output)
        path.with_suffix(".md").write_text("# jitgrad on a GPU\n\n" + table(self.results).markdown(), encoding="utf-8")


def _paths() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def table(results: Result) -> Tables:
    """The GPU, and the tables of all families."""
    if "gpu" not in results:
        return Tables([Table("measured on a GPU", ["", ""], [], [f"nothing was measured: {results.get('why', 'no GPU')}"])])
    from benchmarks.gpu.jobs import tables

    gpu = results["gpu"]
    notes = [f"failed: {key}: {why.strip().splitlines()[-1]}" for key, why in results.get("failed", {}).items()]
    late = results.get("late", ())
    notes += [f"there was no time for {len(late)} cases: {'; '.join(late)}"] * bool(late)
    rows = [[key, str(value)] for key, value in gpu.items()]
    return Tables([Table("the GPU and what is installed", ["", ""], rows, notes), *tables(results)])
