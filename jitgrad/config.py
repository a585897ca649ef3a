"""The few knobs, where their values come from, and how they are changed for a while.

What goes in: environment variables, read once at import; `update` for the whole process; `scope` for a block of code on
this thread (or task). What comes out: `current()`, one frozen `Settings`, cheap enough to ask for on every call.

    with config.scope(check=True, debug="kernels,times"):
        step(x, y)

A wrong name or value is refused with the list of legal ones, wherever it comes from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jitgrad import processors
from jitgrad.processors import Processor

DEBUG_WORDS = ("kernels", "times", "graphs", "source")


@dataclass(frozen=True, slots=True)
class Settings:
    """One value per knob; the environment variable of `name` is JITGRAD_NAME.

    cache         folder of compiled kernels and plans
    num_threads   threads of a plan; None: as many as affinity and the container's quota allow
    debug         what to print while compiling: any of `DEBUG_WORDS`
    check         verify every graph after every pass, and bounds-check what can be checked
    disable       run decorated functions eagerly
    plain         carry out kernels as plain Python, every access checked: slow, for finding errors in kernels
    cublas        let NVIDIA's library compute matrix products on GPUs, where it is installed and faster
    cudnn         whether NVIDIA's other library computes convolutions and attention on GPUs, where it is installed:
                  "never", where it is faster ("measured"), or wherever it can ("always")
    cpu           the processor that kernels are generated for, a name of `processors.NAMED`; None: this machine's. It is
                  the same for the whole process, so the environment alone can set it
    """

    cache: Path
    num_threads: int | None = None
    debug: frozenset[str] = frozenset()
    check: bool = False
    disable: bool = False
    plain: bool = False
    cublas: bool = True
    cudnn: str = "measured"
    cpu: str | None = None


def current() -> Settings:
    """The settings that hold here: those of the innermost `scope`, or the process's."""
    return _scoped.get() or _process


def processor() -> Processor:
    """The processor that kernels are generated for."""
    return processors.find(_process.cpu)


@contextmanager
def scope(**changes: Any) -> Iterator[Settings]:
    """Other settings inside of the block, on this thread only."""
    token = _scoped.set(_changed(current(), changes))
    try:
        yield current()
    finally:
        _scoped.reset(token)


def update(**changes: Any) -> None:
    """Other settings from now on for every thread that is in no `scope`."""
    global _process
    _process = _changed(_process, changes)


def _changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    if "cpu" in changes:
        raise TypeError("config: cpu is the same for the whole process. Set JITGRAD_CPU before jitgrad is imported")
    for name in changes:
        if name not in _ACCEPT:
            raise TypeError(f"config: there is no knob {name!r}. The knobs are {', '.join(_ACCEPT)}")
    return replace(settings, **{name: _ACCEPT[name](name, value) for name, value in changes.items()})


# One function per knob: any legal spelling of its value (Python's or an environment variable's) -> the value.

def _refuse(name: str, value: object, legal: str) -> ValueError:
    return ValueError(f"config: {name} cannot be {value!r}. Legal: {legal}")


def _folder(name: str, value: object) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise _refuse(name, value, "the path of a folder")
    return Path(os.fspath(value)).expanduser()


def _count(name: str, value: object) -> int | None:
    if value is None or value == "":
        return None
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or int(text) == 0:
        raise _refuse(name, value, "a whole number from 1 up, or None (empty) for all that are available")
    return int(text)


def _words(name: str, value: object) -> frozenset[str]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple, set, frozenset)):
        raise _refuse(name, value, f"a comma list of {', '.join(DEBUG_WORDS)}")
    found = frozenset(word.strip() for word in words if word.strip())
    if not found <= set(DEBUG_WORDS):
        raise _refuse(name, value, f"a comma list of {', '.join(DEBUG_WORDS)}")
    return found


_SWITCH = {"": False, "0": False, "false": False, "off": False, "no": False,
           "1": True, "true": True, "on": True, "yes": True}


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _SWITCH:
        raise _refuse(name, value, "True, False, or 1, 0, on, off, yes, no in the environment")
    return _SWITCH[str(value).lower()]


_HOW_OFTEN = ("never", "measured", "always")


def _how_often(name: str, value: object) -> str:
    word = str(value).lower()
    if word in _HOW_OFTEN:
        return word
    if word not in _SWITCH:
        raise _refuse(name, value, f"{', '.join(_HOW_OFTEN)}; off is never, on is measured")
    return "measured" if _SWITCH[word] else "never"


def _processor(name: str, value: object) -> str:
    if value not in processors.NAMED:
        raise _refuse(name, value, ", ".join(processors.NAMED))
    return str(value)


_ACCEPT: dict[str, Callable[[str, Any], Any]] = {"cache": _folder, "num_threads": _count, "debug": _words,
                                                 "check": _switch, "disable": _switch, "plain": _switch, "cublas": _switch,
                                                 "cudnn": _how_often, "cpu": _processor}


def from_environment(environment: Mapping[str, str]) -> Settings:
    """The settings that the variables JITGRAD_* of `environment` ask for."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    settings = Settings(cache=Path(base).expanduser() / "jitgrad")
    for field in fields(Settings):
        variable = f"JITGRAD_{field.name.upper()}"
        if environment.get(variable):
            value = _ACCEPT[field.name](variable, environment[variable])
            settings = replace(settings, **{field.name: value})
    return settings


_process: Settings = from_environment(os.environ)
_scoped: ContextVar[Settings | None] = ContextVar("jitgrad settings", default=None)
