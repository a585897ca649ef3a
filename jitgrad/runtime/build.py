"""Kernel text -> callable address, by way of what is loaded already, the cache, and the compiler, in this order.

The compiler needs Numba and is no part of the runtime: `set_compiler` says which function it is, and it is called only
for text that is in no cache. A key is made of the text without comments, its function's name and line breaks at the
end, of everything that the compiler builds in (versions, our own intrinsics and math), and of the exact processor.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache as remember, lru_cache
from importlib import metadata
from pathlib import Path

import jitgrad.kernels.cpu
from jitgrad.errors import CompileError, complain
from jitgrad.runtime import cache, native

Compiler = Callable[[Sequence[tuple[str, str]]], list[bytes]]

_NAME = re.compile(r"\bdef \w+\(")
_addresses: dict[str, int] = {}
_lock = threading.RLock()
_compiler: Compiler | None = None
compiled = 0
"""How many kernels this process has compiled: what tests of caching count."""


def set_compiler(compiler: Compiler) -> None:
    """`compiler([(text, name), …])` gives object code for each."""
    global _compiler
    _compiler = compiler


@lru_cache(maxsize=4096)
def kernel_key(source: str) -> str:
    """The key of a kernel for this machine, as hexadecimal text. Equal kernels of many plans are hashed once."""
    text = _NAME.sub("def kernel(", _without_comments(source), count=1).strip()
    return hashlib.sha256(f"{text}\0{fingerprint()}\0{native.host_name()}".encode()).hexdigest()


def _without_comments(source: str) -> str:
    return "\n".join([line[:line.index("#")].rstrip(" \t") if "#" in line else line for line in source.split("\n")])


@remember
def fingerprint() -> str:
    """What code depends on beside its text: the versions of the compilers and our own sources of kernels."""
    digest = hashlib.sha256()
    folder = Path(next(iter(jitgrad.kernels.cpu.__path__)))
    for path in [*sorted(folder.glob("*.py")), Path(__file__).parent.parent / "codegen" / "native.py"]:
        digest.update(path.read_bytes())
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("numba", "llvmlite"))
    return f"{versions} {digest.hexdigest()}"


def kernels(sources: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The address of every kernel in `sources`, pairs of text and name, by its key; compiles what is in no cache."""
    wanted = {kernel_key(source): (source, name) for source, name in sources}
    with _lock:
        missing = {key: pair for key, pair in wanted.items() if find_kernel(key, pair[1]) is None}
        if missing:
            _compile(missing)
        return {key: _addresses[key] for key in wanted}


def kernel(source: str, name: str) -> int:
    """The address of one kernel."""
    return next(iter(kernels([(source, name)]).values()))


def find_kernel(key: str, name: str) -> int | None:
    """The address of the kernel with this key, from memory or from the cache; None when it must be compiled."""
    with _lock:
        if key not in _addresses:
            data = cache.current().get("kernels", key)
            if data is None:
                return None
            try:
                _addresses[key] = native.load(data, name)
            except CompileError:                            # stored by something else: as good as absent
                return None
        return _addresses[key]


def forget() -> None:
    """Look in the cache folder again for every kernel, as a new process would. Plans keep the addresses they have."""
    with _lock:
        _addresses.clear()


def _compile(missing: dict[str, tuple[str, str]]) -> None:
    global compiled
    if _compiler is None:
        raise complain(CompileError, next(iter(missing.values()))[1], "no compiler has been set")
    for (key, (_, name)), data in zip(missing.items(), _compiler(list(missing.values())), strict=True):
        cache.current().put("kernels", key, data)
        _addresses[key] = native.load(data, name)
        compiled += 1


def _after_fork() -> None:
    """A thread that no longer exists may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
