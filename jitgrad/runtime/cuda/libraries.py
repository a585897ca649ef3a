"""NVIDIA's libraries by ctypes: found at run time, needed by nothing.

A subclass of `Library` says what a library is called, where it may lie and which functions it has; a `Connection` looks for
it at the first question and keeps it. It is looked for in the folders of NVIDIA's packages, then where the subclass says,
then where the system looks. `connect` puts another object with the same functions in the library's place, which is what
the tests do.
"""

from __future__ import annotations

import ctypes as c
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from ctypes import c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from jitgrad.errors import DeviceError, complain
from jitgrad.runtime.cuda.driver import Gpu

SUCCESS = 0


class LibraryError(DeviceError):
    """A call of one of NVIDIA's libraries that failed; `code` is its status."""

    code: int = 0


class Library:
    """A library with its functions declared. `version`: its own number, such as 130100."""

    title: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """Of its file, the newest first."""
    prototypes: ClassVar[Mapping[str, tuple[Any, ...]]]
    """The parameters of every function that is used; all return a status."""
    describing: ClassVar[str]
    """The function that gives the text of a status."""
    numbering: ClassVar[str]
    """The function that gives the version."""
    creating: ClassVar[str]
    """The function that makes a handle for the GPU whose context is current."""

    def __init__(self, functions: Any):
        self._functions = {name: declared(functions, name, types, c_int) for name, types in self.prototypes.items()}
        self._text = declared(functions, self.describing, (c_int,), c.c_char_p)
        self.version: int = declared(functions, self.numbering, (), c_size_t)()
        self._handles: weakref.WeakKeyDictionary[Gpu, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def files(cls) -> Iterator[Path]:
        """Its files in folders of packages, best first."""
        for name in cls.names:
            for folder in sys.path:
                yield from sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}"))

    def call(self, name: str, *arguments: Any, fix: str = "", where: tuple[str, int] | None = None) -> None:
        """Call a function; LibraryError unless it succeeds."""
        code = self._functions[name](*arguments)
        if code != SUCCESS:
            raise self.error(code, name, fix, where, self.details())

    def details(self) -> str:
        """What the library says of its last error beside the status; "" where it says no more."""
        return ""

    def release(self, name: str, handle: int) -> None:
        """Give something back, from a finalizer: where that fails there is nothing left to do."""
        self._functions[name](handle)

    def error(self, code: int, name: str, fix: str = "", where: tuple[str, int] | None = None,
              details: str = "") -> LibraryError:
        """The exception for a status that the function `name` gave."""
        text = self._text(code)
        status = text.decode() if text else f"status {code}"
        raised = complain(LibraryError, "cuda", f"{self.title} {self.version}: {name} failed: {status}"
                          f"{f' ({details})' if details else ''}", fix=fix, where=where)
        assert isinstance(raised, LibraryError)
        raised.code = code
        return raised

    def handle(self, gpu: Gpu) -> int:
        """The library's handle for `gpu`, whose context is current from here on."""
        gpu.activate()
        with self._lock:
            found = self._handles.get(gpu)
            if found is None:
                handle = c_void_p()
                self.call(self.creating, handle)
                found = self._handles[gpu] = handle.value or 0
            return found


def declared(functions: Any, name: str, types: tuple[Any, ...], result: Any) -> Any:
    """The function `name` of a library, with the types of its parameters and its result."""
    function = getattr(functions, name)
    function.argtypes, function.restype = types, result
    return function


L = TypeVar("L", bound=Library)


class Connection(Generic[L]):
    """The one library of a kind. `without`: what goes on without it, for a warning."""

    def __init__(self, kind: type[L], without: str):
        self.kind, self.without = kind, without
        self._lock = threading.Lock()
        self.packaged = cache(self._packaged)
        self.disconnect()

    def disconnect(self) -> None:
        """Forget the library; the next use looks for it again."""
        self.found: L | None = None
        self.looked = self.given = self.warned = False
        self.packaged.cache_clear()

    def connect(self, functions: Any) -> L:
        """Use `functions`, an object with the library's functions, from now on; returns what it became."""
        self.found, self.looked, self.given = self.kind(functions), True, True
        return self.found

    def library(self) -> L | None:
        """The library, loaded at the first call; None when there is none."""
        if not self.looked:
            with self._lock:
                if not self.looked:
                    self.found, self.looked = self._load(), True
        return self.found

    def needed(self, fix: str, where: tuple[str, int] | None) -> L:
        """The library for a plan that was made with it; LibraryError where it is gone."""
        found = self.library()
        if found is None:
            raise complain(LibraryError, "cuda", f"this plan needs {self.kind.title}, which is not here any more", fix=fix,
                           where=where)
        return found

    def _packaged(self) -> str | None:
        """The library's file in a package; nothing is loaded."""
        return next((str(file) for file in self.kind.files()), None)

    def _load(self) -> L | None:
        for name in filter(None, (self.packaged(), *self.kind.names)):
            try:
                return self.kind(c.CDLL(name))
            except (OSError, AttributeError):              # it is not there, or another one of that name
                continue
        return None

    def identity(self) -> str:
        """What tells one library from another, for keys; empty where there is none. A package's is not loaded for that."""
        file = None if self.given else self.packaged()
        if file is not None:
            return _signature(file)
        found = self.library()
        return "" if found is None else str(found.version)

    def usable(self, gpu: Gpu) -> L | None:
        """The library, if it is there and can be used on `gpu`. When it is there and cannot be used, it is said once why."""
        found = self.library()
        if found is None:
            return None
        try:
            found.handle(gpu)
        except LibraryError as error:
            if not self.warned:
                self.warned = True
                warnings.warn(f"{self.without} run without {self.kind.title}: {error}", RuntimeWarning, stacklevel=3)
            return None
        return found


@cache
def _signature(file: str) -> str:
    return f"{file} {Path(file).stat().st_size}"
