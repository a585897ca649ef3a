"""GPU kernel text -> functions that can be launched, by way of the cache and, where something is in no cache, the compiler.

What is stored: the PTX of every kernel, by its text; and one cubin per set of kernels, which is what a plan loads. Keys
hold the architecture and the versions of everything that takes part, so a warm start loads no compiler. The compiler and
NVIDIA's linker are no part of the runtime: `set_compiler` says which functions they are.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from functools import cache as remember, lru_cache
from importlib import metadata
from pathlib import Path

import jitgrad.kernels.cuda
from jitgrad.errors import CompileError, complain
from jitgrad.runtime import build, cache
from jitgrad.runtime.cuda.driver import Gpu
from jitgrad.runtime.cuda.module import Function, Module

Compile = Callable[[list[str], str], list[str]]
Link = Callable[[list[str], str], bytes]

ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90", 100: "sm_100", 120: "sm_120"}
"""What machine code is made for, by capability. It runs on later GPUs of the same generation, too."""

EXACT = {90: "sm_90a"}
"""What it is made for instead, where GPUs of exactly that capability have instructions of their own."""

_LINKERS = ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "cuda-bindings")
_COMMENT = re.compile(r"[ \t]*#[^\n]*")
_DEFINITION = re.compile(r"\bdef (\w+)\(")
_lock = threading.RLock()
_compile: Compile | None = None
_link: Link | None = None
linked = 0
"""How many cubins this process has linked: what tests of caching count."""


def set_compiler(compile: Compile, link: Link) -> None:
    """``compile(texts, architecture)`` gives PTX of each; ``link(texts of PTX, architecture)`` one cubin."""
    global _compile, _link
    _compile, _link = compile, link


def architecture(gpu: Gpu) -> str:
    """What machine code for `gpu` is made for; CompileError where that is nothing."""
    capability = 10 * gpu.major + gpu.minor
    fitting = [number for number in ARCHITECTURES if number <= capability and number // 10 == gpu.major]
    if not fitting:
        raise complain(CompileError, "cuda", f"there are no kernels for {gpu.name}, a GPU of capability {gpu.major}."
                       f"{gpu.minor}", fix="The oldest that is supported is 8.0; use the device 'cpu'")
    return EXACT.get(capability) or ARCHITECTURES[max(fitting)]


@lru_cache(maxsize=4096)
def kernel_key(source: str, arch: str) -> str:
    """The key of a kernel's PTX, as hexadecimal text. Comments do not count."""
    return hashlib.sha256(f"{_COMMENT.sub('', source).strip()}\0{fingerprint()}\0{arch}".encode()).hexdigest()


def entry_name(source: str, key: str) -> str:
    """What the kernel is called in machine code: kernels of one module differ in name."""
    match = _DEFINITION.search(source)
    assert match is not None, "the text defines no function"
    return f"{match[1]}_{key[:12]}"


@remember
def fingerprint() -> str:
    """What PTX depends on beside the text: the compilers' versions and our own sources."""
    digest = hashlib.sha256(build.fingerprint().encode())
    folder = Path(next(iter(jitgrad.kernels.cuda.__path__)))
    for path in [*sorted(folder.glob("*.py")), Path(__file__).parents[2] / "codegen" / "cuda_native.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@remember
def linker_version() -> str:
    """What machine code depends on beside PTX."""
    found = []
    for name in _LINKERS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def functions(sources: Mapping[str, str], gpu: Gpu) -> dict[str, Function]:
    """The kernels of a plan by key, loaded on `gpu` as one module. `sources` are their texts by key."""
    if not sources:
        return {}
    module = _load(dict(sources), gpu)
    return {key: module.function(entry_name(text, key)) for key, text in sources.items()}


_modules: dict[tuple[int, str], tuple[Gpu, Module]] = {}


def _load(sources: dict[str, str], gpu: Gpu) -> Module:
    arch = architecture(gpu)
    parts = "\0".join(sorted(sources))
    key = hashlib.sha256(f"{parts}\0{linker_version()}\0{arch}".encode()).hexdigest()
    with _lock:
        found = _modules.get((id(gpu), key))
        if found is None or found[0] is not gpu:
            data = cache.current().get("kernels", key)
            if data is None:
                data = _make(sources, arch)
                cache.current().put("kernels", key, data)
            found = _modules[id(gpu), key] = gpu, Module(data, gpu)
        return found[1]


def _make(sources: dict[str, str], arch: str) -> bytes:
    """The cubin of the kernels, from their PTX, which is compiled where it is in no cache."""
    global linked
    if _compile is None or _link is None:
        raise complain(CompileError, "cuda", "no compiler for GPUs has been set")
    stored = {key: cache.current().get("kernels", key) for key in sorted(sources)}
    missing = [key for key, data in stored.items() if data is None]
    renamed = [_DEFINITION.sub(f"def {entry_name(sources[key], key)}(", sources[key], count=1) for key in missing]
    for key, text in zip(missing, _compile(renamed, arch) if missing else [], strict=True):
        stored[key] = text.encode()
        cache.current().put("kernels", key, text.encode())
    texts = [data.decode() for data in stored.values() if data is not None]
    linked += 1
    return _link(texts, arch)


def forget() -> None:
    """Look in the cache folder again, as a new process would."""
    with _lock:
        _modules.clear()
