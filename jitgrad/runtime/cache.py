"""The folder of compiled kernels, plans, measured choices and what LLVM says of processors, addressed by content.

Keys and bytes go in; the same bytes come out, or None. An entry is written to a temporary file and moved into place, so
two processes never see half of one; a checksum over key and content turns damage into a miss. Object code is executed,
and a checksum says nothing about who wrote it: the folder must belong to the user and be writable by nobody else,
otherwise a private temporary folder takes its place. Where nothing can be stored, everything works without storing.
The least recently used entries go when the folder outgrows `LIMIT`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jitgrad import config, processors
from jitgrad.errors import CacheWarning

LIMIT = 1 << 30                                             # bytes
KINDS = ("kernels", "plans", "choices", "processors")
_MAGIC = b"jitgrad1"
_HEADER = len(_MAGIC) + 32
_KEY = re.compile(r"[0-9a-f]{16,64}\Z")
_PUTS_PER_TRIM = 64


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One stored kernel, plan, choice or processor: its size in bytes and when it was last used (seconds since 1970)."""

    kind: str
    key: str
    size: int
    used: float


def current() -> Cache:
    """The cache in the folder that the settings name now."""
    return _open(config.current().cache)


@lru_cache(maxsize=16)
def _open(folder: Path) -> Cache:
    return Cache(folder)


class Cache:
    """A folder of entries. `folder` is the one in use, which is another than the one asked for if that is not safe;
    `stores` turns False when writing has failed."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.limit = limit
        self.puts = 0
        self.stores = True
        self.folder = self._choose(folder)

    def get(self, kind: str, key: str, *, touch: bool = True) -> bytes | None:
        """The content stored under `key`, or None. `touch`: this counts as a use."""
        path = self._path(kind, key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if data[:_HEADER] != _header(key, data[_HEADER:]):
            _remove(path)
            return None
        if touch:
            _touch(path)
        return data[_HEADER:]

    def put(self, kind: str, key: str, content: bytes) -> None:
        """Store `content` under `key`; never fails, but warns once when nothing can be stored."""
        if not self.stores:
            return
        path = self._path(kind, key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(path, _header(key, content) + content)
        except OSError as error:
            self.stores = False
            _warn(f"nothing can be stored in {self.folder} ({error.strerror}); compiled kernels last for this process")
        self.puts += 1
        if self.puts % _PUTS_PER_TRIM == 0:
            self.trim()

    def entries(self) -> list[CacheEntry]:
        """Everything that is stored, the least recently used first."""
        found = [CacheEntry(kind, path.parent.name + path.name, state.st_size, state.st_mtime)
                 for kind, path, state in self._files()]
        return sorted(found, key=lambda entry: entry.used)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(state.st_size for _, _, state in self._files())

    def clear(self) -> None:
        """Remove every entry."""
        for kind in KINDS:
            shutil.rmtree(self.folder / kind, ignore_errors=True)

    def trim(self) -> None:
        """Remove the least recently used entries until nine tenths of the limit are left."""
        entries = self.entries()
        excess = sum(entry.size for entry in entries) - self.limit
        if excess <= 0:
            return
        excess += self.limit // 10
        for entry in entries:
            if excess <= 0:
                break
            _remove(self._path(entry.kind, entry.key))
            excess -= entry.size

    def _path(self, kind: str, key: str) -> Path:
        if kind not in KINDS or not _KEY.match(key):
            raise ValueError(f"cache: no entry can be called {kind}/{key}")
        return self.folder / kind / key[:2] / key[2:]

    def _files(self) -> Iterator[tuple[str, Path, os.stat_result]]:
        for kind in KINDS:
            for path in (self.folder / kind).glob("??/*"):
                try:
                    if _KEY.match(path.parent.name + path.name):
                        yield kind, path, path.stat()
                except OSError:                             # another process removed it
                    continue

    def _choose(self, wanted: Path) -> Path:
        """`wanted` if it is safe (made if it is missing), else a private folder that lasts for this process."""
        try:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            problem = _unsafe(wanted)
        except OSError as error:
            problem = error.strerror or "it cannot be made"
        if not problem:
            return wanted
        try:
            private = Path(tempfile.mkdtemp(prefix="jitgrad-"))
        except OSError:
            self.stores = False
            private = wanted
        _warn(f"{wanted} cannot be used ({problem}); {private} takes its place until this process ends. "
              f"Set JITGRAD_CACHE to a folder that only you can write")
        return private


def _unsafe(folder: Path) -> str:
    """Why object code from `folder` must not be run; an empty string when it may."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        return "it is not a plain folder"
    if hasattr(os, "geteuid") and state.st_uid != os.geteuid():
        return "it belongs to another user"
    if os.name == "posix" and state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others can write to it"
    return ""


def _header(key: str, content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + b"\0" + content).digest()


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        _remove(Path(temporary))
        raise


def _touch(path: Path) -> None:
    with suppress(OSError):                                 # a folder that can only be read keeps its order
        os.utime(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _warn(problem: str) -> None:
    warnings.warn(f"cache: {problem}", CacheWarning, stacklevel=4)


processors.keep(lambda key: current().get("processors", key), lambda key, answer: current().put("processors", key, answer))
