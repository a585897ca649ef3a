"""The command line: ``jitgrad info`` and ``jitgrad cache list|size|build|clear``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module, metadata

from jitgrad import config, cuda
from jitgrad.kernels.cpu import ahead
from jitgrad.runtime import build, cache, threads
from jitgrad.runtime.cuda import driver
from jitgrad.runtime.spec import Decision

LIBRARIES = ("jitgrad", "numpy", "numba", "llvmlite", "ml_dtypes", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; the exit status."""
    options = parser().parse_args(arguments)
    command: Callable[[], None] = options.command
    command()
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("jitgrad", description="A JIT-compiling deep-learning array framework.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, processor, threads, cache: for a bug report")
    info.set_defaults(command=print_info)
    folder = commands.add_parser("cache", help="compiled kernels, plans and measured choices")
    actions = folder.add_subparsers(required=True, metavar="ACTION")
    for name, (action, text) in CACHE_ACTIONS.items():
        actions.add_parser(name, help=text).set_defaults(command=action)
    return top


# ---- info -------------------------------------------------------------------------------------------------------


def print_info() -> None:
    for name, value in information().items():
        print(f"{name:<14}{value}")


def information() -> dict[str, str]:
    """What a bug report needs, by name."""
    processor = config.processor()
    store = cache.current()
    return {
        **{name: version(name) for name in LIBRARIES},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor.model,
        "vector width": f"{processor.vectors[0]} bits",
        "features": " ".join(sorted(processor.features)),
        "gpus": gpus(),
        "threads": f"{threads.limit()} (available: {threads.available()})",
        "cache": f"{store.folder} ({show_size(store.size())} in {len(store.entries())} entries)",
        "settings": str(config.current()),
    }


def gpus() -> str:
    """The GPUs by name and capability, or why there are none."""
    found = [f"{cuda.get_device_name(k)} (sm_{''.join(map(str, cuda.get_device_capability(k)))})"
             for k in range(cuda.device_count())]
    return ", ".join(found) or driver.why_not()


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- cache ------------------------------------------------------------------------------------------------------


def list_entries() -> None:
    """One line per entry, the least recently used first; of choices also what was chosen."""
    for entry in cache.current().entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.kind:<8} {entry.key[:16]} {show_size(entry.size):>10}  last used {used}{describe(entry)}")


def describe(entry: cache.CacheEntry) -> str:
    """What was chosen, if that is what the entry says; else nothing."""
    data = cache.current().get(entry.kind, entry.key, touch=False) if entry.kind == "choices" else None
    try:
        return "" if data is None else f"  {Decision.from_data(json.loads(data))}"
    except ValueError:
        return "  damaged"


def print_size() -> None:
    store = cache.current()
    for kind in cache.KINDS:
        sizes = [entry.size for entry in store.entries() if entry.kind == kind]
        print(f"{kind:<8} {len(sizes):>6} {show_size(sum(sizes)):>10}")


def build_kernels() -> None:
    """Compile the hand-written kernels that most programs meet, so that no first call waits for them."""
    import_module("jitgrad.plans")
    begin, before = time.perf_counter(), build.compiled
    addresses = build.kernels(ahead.sources())
    seconds = time.perf_counter() - begin
    print(f"{len(addresses)} kernels, {build.compiled - before} of them new, in {seconds:.2f} s: {cache.current().folder}")


def clear_cache() -> None:
    store = cache.current()
    size = store.size()
    store.clear()
    print(f"removed {show_size(size)} from {store.folder}")


CACHE_ACTIONS: dict[str, tuple[Callable[[], None], str]] = {
    "list": (list_entries, "every entry with its size and last use"),
    "size": (print_size, "number and size of kernels, plans and choices"),
    "build": (build_kernels, "compile ahead the hand-written kernels that most programs meet"),
    "clear": (clear_cache, "remove all entries"),
}


def show_size(n: float) -> str:
    """``1.5 MiB``"""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


if __name__ == "__main__":
    sys.exit(main())
