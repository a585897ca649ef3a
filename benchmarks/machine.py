"""The machine that is measured: its description for the results, and equal thread counts for all contenders."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jitgrad", "numpy", "numba", "llvmlite", "torch", "jax", "jaxlib")


def use_threads(count: int | None) -> int:
    """Bind this process to `count` processors and every library to as many threads; call it before they are imported.

    None stands for all processors that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:count])
        count = len(allowed[:count])
    count = count or os.cpu_count() or 1
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JITGRAD_NUM_THREADS", "NPROC"):
        os.environ[variable] = str(count)
    return count


def describe() -> dict[str, Any]:
    """Processor, threads, memory, versions, load and date."""
    return {"processor": _processor(), "processors": os.cpu_count(), "threads": os.environ.get("JITGRAD_NUM_THREADS"),
            "memory_gib": _memory(), "system": platform.platform(), "python": platform.python_version(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "date": datetime.now().astimezone().isoformat(timespec="seconds")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _proc_field(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _processor() -> str:
    name = _proc_field("/proc/cpuinfo", "model name")
    return name or platform.processor() or platform.machine()


def _memory() -> float | None:
    total = _proc_field("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None
