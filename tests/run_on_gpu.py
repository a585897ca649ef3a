"""Everything that needs a GPU on a machine as it is, where pip reaches no index: ``python tests/run_on_gpu.py``.

It looks at what is there, runs the tests for real hardware and the CPU's tests with ``--device cuda`` (by pytest, where
that is installed; without it the programs of `gpu_programs`), then the benchmarks, and writes one report. The standard
library is enough to start it; what jitgrad needs is in `benchmarks/prerequisites.py`. It ends with 0 when all went well,
with 1 when something failed, with 2 where nothing could be run.

    python tests/run_on_gpu.py [report.md] [--quick] [--tests]     two cases of each test of the CPU; no benchmarks
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import prerequisites  # noqa: E402

TAIL, TABLES = 60, 400                          # lines of the output of a part, and of benchmarks, that go into the report
HOUR = 3600


@dataclass(frozen=True)
class Part:
    """One command: what it is, how many seconds it may take, and how many lines of its output go into the report."""

    title: str
    arguments: Sequence[str]
    seconds: int = HOUR
    lines: int = TAIL


@dataclass(frozen=True)
class Outcome:
    """How a part went: its exit status (None: it took too long), seconds, and output."""

    part: Part
    status: int | None
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        how = "passed" if self.ok else "took too long" if self.status is None else f"failed ({self.status})"
        return f"{self.part.title}: {how} after {self.seconds:.0f} s"


def parts(quick: bool) -> list[Part]:
    """The tests, in order."""
    if importlib.util.find_spec("pytest") is None:
        found = [Part("programs (pytest is not installed)", ["tests/run_on_gpu.py", "--programs"])]
    else:
        pytest = ["-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider",
                  "-o", "filterwarnings=default"]           # other versions of packages warn of other things
        cases = ["--cases", "2"] if quick else []
        found = [Part("tests for real hardware", [*pytest, "-m", "gpu", *test_files()]),
                 Part("tests of the CPU on the GPU", [*pytest, "--device", "cuda", *cases, *test_files()])]
    return found


def test_files() -> list[str]:
    """The files of tests that can be read without what is not installed."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")
                  if importlib.util.find_spec("hypothesis") is not None or "hypothesis" not in path.read_text("utf-8"))


def run(part: Part) -> Outcome:
    """Run a part in a process of its own; what it prints is shown and kept."""
    print(f"\n=== {part.title}", flush=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin, lines = time.monotonic(), []
    process = subprocess.Popen([sys.executable, *part.arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
        if time.monotonic() - begin > part.seconds:
            process.kill()
            break
    status = process.wait()
    process.stdout.close()
    taken = time.monotonic() - begin
    return Outcome(part, None if taken > part.seconds else status, taken, "".join(lines))


def run_programs() -> int:
    """Without pytest: the programs of `gpu_programs` and training on the GPU, beside the CPU. The number that failed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gpu_programs import OPTIMIZERS, PROGRAMS, training

    checks = {name: (lambda device, program=program: program(device)) for name, program in PROGRAMS.items()}
    for name in OPTIMIZERS:
        for compiled in (False, True):
            checks[f"training with {name}{', compiled' if compiled else ''}"] = \
                lambda device, name=name, compiled=compiled: training(device, name, compiled)[0]
    failed = 0
    for name, check in checks.items():
        try:
            compare(check("cuda"), check("cpu"))
            print(f"passed  {name}")
        except Exception as problem:
            failed += 1
            print(f"FAILED  {name}: {type(problem).__name__}: {problem}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return failed


def compare(ours: Sequence[object], theirs: Sequence[object]) -> None:
    """AssertionError unless results on the GPU are those of the CPU."""
    import numpy as np

    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        x, y = (t.numpy(force=True) for t in (a, b))                                        # type: ignore[attr-defined]
        assert x.dtype == y.dtype, f"result {k} is {x.dtype} instead of {y.dtype}"
        limit = 2e-2 if x.dtype.kind in "fV" and x.dtype.itemsize == 2 else 1e-3
        np.testing.assert_allclose(x.astype(complex), y.astype(complex), rtol=limit, atol=limit, err_msg=f"result {k}")


def report(found: Iterable[prerequisites.Finding], outcomes: Sequence[Outcome]) -> str:
    """All of it as Markdown."""
    lines = ["# jitgrad on a GPU", "", f"{time.strftime('%Y-%m-%d %H:%M')}, {platform.platform()}", "", "```",
             *map(str, found), "```", "", *[f"- {outcome}" for outcome in outcomes], ""]
    for outcome in outcomes:
        tail = outcome.output.rstrip().splitlines()[-outcome.part.lines:]
        command = " ".join(outcome.part.arguments)[:300]
        lines += [f"## {outcome.part.title}", "", f"`python {command}`", "", "```", *tail, "```", ""]
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", nargs="?", default="gpu-report.md", type=Path)
    parser.add_argument("--quick", action="store_true", help="two cases of each test of the CPU")
    parser.add_argument("--tests", action="store_true", help="no benchmarks")
    parser.add_argument("--programs", action="store_true", help="only the programs, without pytest")
    options = parser.parse_args()
    if options.programs:
        return int(run_programs() > 0)
    found = prerequisites.findings()
    print("\n".join(map(str, found)))
    benchmarks = Part("benchmarks", ["-m", "benchmarks", "gpu"], lines=TABLES)
    chosen = parts(options.quick) + [benchmarks] * (not options.tests)
    outcomes = [] if any(f.problem for f in found) else [run(part) for part in chosen]
    options.report.write_text(report(found, outcomes), encoding="utf-8")
    print("", *outcomes, f"written to {options.report}", sep="\n")
    if not outcomes:
        print("nothing could be run: " + "; ".join(f"{f.name} {f.problem}" for f in found if f.problem))
        return 2
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
