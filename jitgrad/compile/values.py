"""The values of the abstract evaluation of a user's function: what is known, how it is reached, what is fresh."""

from __future__ import annotations

import builtins
import types
from dataclasses import dataclass
from typing import Any

from jitgrad.devices import device
from jitgrad.dtypes import DType
from jitgrad.errors import describe_location
from jitgrad.ir.types import TensorType
from jitgrad.tensor import Tensor


class Impure(Exception):
    """Why a function must be replayed."""

    def __init__(self, why: str, where: tuple[str, int] | None):
        super().__init__(f"{describe_location(where)}: {why}" if where else why)
        self.where = where


@dataclass(frozen=True, slots=True)
class Path:
    """How the function gets to an object: from a root (a dict of globals, a closure cell, an argument, the object that a
    method is bound to) by steps."""

    root: tuple[str, Any, Any]                  # ("global", dict, name) ("cell", cell, name) ("argument", None, k)
                                                # ("self", bound method, "self")
    steps: tuple[tuple[str, Any], ...] = ()     # ("attr", name) ("item", key)

    def then(self, kind: str, key: Any) -> Path:
        return Path(self.root, (*self.steps, (kind, key)))

    def fetch(self, arguments: Any) -> Any:
        """The object that is there now; KeyError, AttributeError … when there is none."""
        kind, place, name = self.root
        if kind == "global":
            found = place[name] if name in place else getattr(builtins, name)
        elif kind == "cell":
            found = place.cell_contents
        elif kind == "self":
            found = place.__self__
        else:
            found = arguments[name]
        for step, key in self.steps:
            found = getattr(found, key) if step == "attr" else found[key]
        return found

    @property
    def is_leaf(self) -> bool:
        """True for what is an argument, or lies in its lists, tuples and dicts: a leaf of the call's arguments."""
        return self.root[0] == "argument" and all(kind == "item" for kind, _ in self.steps)

    @property
    def identity(self) -> tuple[Any, ...]:
        kind, place, name = self.root
        return kind, id(place), name, self.steps

    def __str__(self) -> str:
        text = str(self.root[2])
        for step, key in self.steps:
            text += f".{key}" if step == "attr" else f"[{key!r}]"
        return text


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """An object that exists. `path` is None for literals and for what is reached through trusted code only."""

    value: Any
    path: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Several:
    """One of several known objects: the variable of a loop over a known container."""

    options: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """A function defined inside of the analyzed one."""

    node: Any
    scope: Any


class _Kind:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


FRESH, OPAQUE = _Kind("FRESH"), _Kind("OPAQUE")

SIMPLE = (bool, int, float, complex, str, bytes, type(None), DType, TensorType, device, type(Ellipsis), slice, range)


class Scope:
    """The names of one function: locals, and how to find the others."""

    def __init__(self, function: types.FunctionType | None, parent: Scope | None, names: dict[str, Any], file: str,
                 path: Path | None):
        self.function = function
        self.parent = parent
        self.names = names
        self.file = file
        self.path = path
        self.returned: list[Any] = []

    def lookup(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            if scope.function is not None:
                return free_variable(scope.function, name)
            scope = scope.parent
        raise KeyError(name)


def free_variable(function: types.FunctionType, name: str) -> Known:
    code = function.__code__
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        return Known(cell.cell_contents, Path(("cell", cell, name)))
    if name in function.__globals__:
        return Known(function.__globals__[name], Path(("global", function.__globals__, name)))
    return Known(getattr(builtins, name), Path(("global", function.__globals__, name)))


def harmless(value: Any) -> bool:
    """True when holding this value in a new container cannot let somebody change an outside object through it."""
    if type(value) is Several:
        return all(harmless(v) for v in value.options)
    if type(value) is tuple:
        return all(harmless(v) for v in value)
    if type(value) is Known:
        return isinstance(value.value, (*SIMPLE, Tensor))
    return value is FRESH


def join(values: list[Any]) -> Any:
    """A value that stands for any of these."""
    if not values:
        return FRESH
    first = values[0]
    if all(signature(v) == signature(first) for v in values[1:]):
        return first
    if any(v is OPAQUE for v in values):
        return OPAQUE
    options: list[Any] = []
    for v in values:
        options.extend(v.options if type(v) is Several else (v,))
    return Several(tuple(options))


def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: a[k] if k not in b else b[k] if k not in a else join([a[k], b[k]]) for k in {**a, **b}}


def signature(value: Any) -> Any:
    if type(value) is Known:
        return "known", id(value.value), value.path.identity if value.path else None
    if type(value) is tuple:
        return tuple(signature(v) for v in value)
    if type(value) is Several:
        return "several", tuple(signature(v) for v in value.options)
    return id(value)
