"""The processors that kernels can be generated for: this machine's own, or one of a few that are known by name.

What goes in: a name of `NAMED`, or None for this machine's. What comes out: a `Processor`, which says how code for it is
asked of LLVM, and what the kernels' text depends on: the width and number of its vector registers, and the features
that some instructions need. An older processor of the same family runs on a newer one, so that what users of such machines
get can be tried here; code for another family can be looked at.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

SYSTEM = "unknown-linux-gnu"


@dataclass(frozen=True, slots=True)
class Processor:
    """`machine` as in `objectfile.MACHINES`, LLVM's name of the `model`, the names of LLVM's `features` that there are (of
    a named processor those that kernels ask for), and LLVM's list of `options`."""

    machine: str
    model: str
    features: frozenset[str]
    options: str = ""

    @property
    def triple(self) -> str:
        return f"{self.machine}-{SYSTEM}"

    @property
    def vectors(self) -> tuple[int, int]:
        """(bits of a vector register, number of vector registers)."""
        if self.features >= {"avx512f", "avx512vl"}:
            return 512, 32
        if "avx" in self.features:
            return 256, 16
        return 128, 32 if "neon" in self.features else 16

    @property
    def masks(self) -> bool:
        """Whether an instruction can load or store some elements of a vector."""
        return "avx" in self.features

    @property
    def tuned(self) -> str:
        """LLVM's name of the level of x86-64 in whose order instructions of hand-written pieces stand; "": the model's."""
        if self.machine != "x86_64" or "avx2" not in self.features:
            return ""
        return "x86-64-v4" if self.vectors[0] == 512 else "x86-64-v3"

    @property
    def halves(self) -> bool:
        """Whether an instruction makes float32 of float16."""
        return not self.features.isdisjoint(("f16c", "neon"))

    @property
    def name(self) -> str:
        """All that tells this processor from others: a part of the keys of kernels, plans and choices."""
        return f"{self.model} {','.join(sorted(self.features))}"


FULL_WIDTH = "-prefer-256-bit"
"""LLVM's default on many processors with vectors of 512 bits is to use half of them."""

_SSE4 = ("sse2", "sse3", "ssse3", "sse4.1", "sse4.2")
_AVX2 = (*_SSE4, "avx", "avx2", "fma", "f16c")


def _x86(model: str, *features: str) -> Processor:
    return Processor("x86_64", model, frozenset(features), FULL_WIDTH)


NAMED = {
    "x86-64": _x86("x86-64", "sse2"),
    "x86-64-v2": _x86("x86-64-v2", *_SSE4),
    "sandybridge": _x86("sandybridge", *_SSE4, "avx"),
    "x86-64-v3": _x86("x86-64-v3", *_AVX2),
    "x86-64-v4": _x86("x86-64-v4", *_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "znver4": _x86("znver4", *_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "aarch64": Processor("aarch64", "generic", frozenset({"neon"}), "+neon"),
    "neoverse-v1": Processor("aarch64", "neoverse-v1", frozenset({"neon", "fullfp16"})),
    "apple-m1": Processor("aarch64", "apple-m1", frozenset({"neon", "fullfp16"})),
}
"""The levels of x86-64 (v3: AVX2 and FMA, v4: AVX-512), one with AVX alone, one of AMD's with AVX-512, for which LLVM
orders instructions otherwise, and three of ARMv8 with NEON."""


def find(name: str | None) -> Processor:
    """The processor of this name; None: this machine's."""
    return _host() if name is None else NAMED[name]


@cache
def _host() -> Processor:
    """This machine's processor as LLVM sees it, or as it saw it in another process."""
    description = _description()
    key = hashlib.sha256(description.encode()).hexdigest()
    stored = _kept["get"](key) if description else None
    if stored is not None:
        machine, model, features, options = json.loads(stored)
        return Processor(machine, model, frozenset(features), options)
    found = _ask()
    if description:
        _kept["put"](key, json.dumps([found.machine, found.model, sorted(found.features), found.options]).encode())
    return found


def _ask() -> Processor:
    """This machine's processor, of LLVM, which takes 20 ms and 40 MiB to load."""
    import llvmlite.binding as llvm
    found = llvm.get_host_cpu_features()
    features = {name for name, present in found.items() if present}
    machine = platform.machine()
    if machine == "aarch64":                        # where the system does not tell LLVM: all of them have it
        features.add("neon")
    options = [found.flatten(), *[FULL_WIDTH] * (machine == "x86_64")]
    return Processor(machine, llvm.get_host_cpu_name(), frozenset(features), ",".join(filter(None, options)))


def keep(get: Callable[[str], bytes | None], put: Callable[[str, bytes], None]) -> None:
    """Say where LLVM's answers about a machine are kept: by keys for `get` and `put`."""
    _kept.update(get=get, put=put)


_kept: dict[str, Callable[..., Any]] = {"get": lambda key: None, "put": lambda key, answer: None}

_TELLING = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags",
            "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")


def _description() -> str:
    """What LLVM's answer follows from: its version, and what the system tells of the first processor; "" if nothing."""
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read(1 << 13).partition("\n\n")[0]
    except OSError:
        return ""
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in _TELLING]
    return "\n".join([metadata.version("llvmlite"), platform.machine(), *lines]) if lines else ""
