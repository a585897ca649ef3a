"""Measurements in processes of their own, where nothing has been imported and nothing compiled.

`run` starts one function of this package in a new process with the kernel cache of its choice. In the child, NumPy is
imported before the clock starts and the function prints its result as JSON.
"""

from __future__ import annotations

import compileall
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ChildFailed(RuntimeError):
    """A measuring process ended with an error; the message is the end of what it printed."""


def run(function: Callable[..., Any], *arguments: object, cache: str) -> Any:
    """The result of ``function(*arguments)`` in a new process whose kernels, PyTorch's too, are cached in the folder
    `cache`."""
    command = [sys.executable, "-m", "benchmarks.fresh", function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "JITGRAD_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
                               "TRITON_CACHE_DIR": f"{cache}/triton"})
    if done.returncode:
        raise ChildFailed(done.stderr.strip()[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compile_modules() -> None:
    """Bytecode of all modules of jitgrad, which an installation has: without it every process translates their sources."""
    for folder in ("jitgrad", "kernels"):
        compileall.compile_dir(ROOT / folder, quiet=2)


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start or the last lap."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed


def kernels_compiled() -> int:
    """How many kernels this process has compiled."""
    count: int = importlib.import_module("jitgrad.runtime.build").compiled
    return count


def main() -> None:
    """The child's side."""
    import numpy  # noqa: F401  before any clock starts
    module, function, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(arguments))))


if __name__ == "__main__":
    main()
