"""The process that measures on a GPU: cases one after the other, what they give to a file, a line of JSON each.

    python -m benchmarks.gpu.child FILE OPTIONS CASES

It ends early where the GPU has stopped to work, so that the next process has a new one.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.jobs import Job, jobs

BROKEN = 3                                      # exit status


def measure(todo: Sequence[Job], bench: Bench, left: float, record: Path) -> int:
    """Measure as many as there is time for; the exit status."""
    end = time.monotonic() + left
    with record.open("a") as file:
        def say(**message: Any) -> None:
            file.write(json.dumps(message) + "\n")
            file.flush()

        say(gpu=describe())
        for job in todo:
            if time.monotonic() > end:
                return 0
            say(key=job.key)
            try:
                result = job.case.run(bench)
            except Exception:
                result = {"why": traceback.format_exc()}
            say(key=job.key, result=result)
            if not bench.works():
                return BROKEN
            bench.clear()
    return 0


def main() -> int:
    """See the module."""
    record, given, keys = sys.argv[1:]
    options = json.loads(given)
    wanted = json.loads(keys)
    known = {job.key: job for job in jobs(options["names"], options["small"])}
    bench = Bench(seconds=options["seconds"], repeats=options["repeats"], only=options["only"])
    return measure([known[key] for key in wanted], bench, options["left"], Path(record))


if __name__ == "__main__":
    sys.exit(main())
