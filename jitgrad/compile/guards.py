"""What a sealed call checks and reads before it runs, each as one compiled expression: guards, and number inputs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jitgrad.compile.values import SIMPLE, Path
from jitgrad.dtypes import DType
from jitgrad.tensor import Tensor, _wrap


class _Names:
    """Objects that a generated expression refers to, by name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, value: Any) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = value
        return name

    def path(self, path: Path) -> str:
        """The expression that fetches what is at `path`."""
        kind, place, name = path.root
        if kind == "global" and name in place:
            text = f"{self.add(place)}[{name!r}]"
        elif kind == "global":
            text = f"{self.add(place)}.get({name!r}, {self.add(Path(path.root).fetch({}))})"      # a built-in function
        elif kind == "cell":
            text = f"{self.add(place)}.cell_contents"
        elif kind == "self":
            text = f"{self.add(place)}.__self__"
        else:
            text = f"a[{name!r}]"
        for step, key in path.steps:
            text += f".{key}" if step == "attr" else f"[{self.add(key)}]"
        return text

    def function(self, body: str) -> Callable[[Any], Any]:
        return eval(f"lambda a: {body}", self.values)  # type: ignore[no-any-return]


def compile_guard(guards: Iterable[tuple[Path, Any]]) -> Callable[[Any], bool]:
    """One function of a call's arguments: True when everything is where it was, numbers and strings being equal."""
    names = _Names()
    names.values["content"] = _content
    tests = []
    for path, (value, content) in guards:
        found = names.path(path)
        if isinstance(value, (bool, type(None), type(Ellipsis), DType)) or not isinstance(value, SIMPLE):
            tests.append(f"{found} is {names.add(value)}")
            if type(content) is tuple and type(value) is not tuple:
                tests.append(f"content({found}) == {names.add(content)}")
        else:
            tests.append(f"same({found}, {names.add(value)})")
    names.values["same"] = _same_value
    return names.function(" and ".join(tests) or "True")


def _same_value(found: Any, expected: Any) -> bool:
    return found is expected or (type(found) is type(expected) and found == expected
                                 and (type(found) is not float or found.hex() == expected.hex()))


def compile_numbers(origins: list[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """One function of a call's arguments that reads all numbers."""
    names = _Names()
    parts = []
    for kind, place, *rest in origins:
        if kind == "argument":
            parts.append(f"a[{place!r}]")
        elif kind == "item":
            parts.append(names.add(place) + "".join(f"[{names.add(key)}]" for key in rest[0]))
        else:
            generator = names.add(place)
            parts.append(f"{generator}.seed_value" if kind == "seed" else f"{generator}.offset + {rest[0]}")
    return names.function(f"({', '.join(parts)},)")


def _content(found: Any) -> tuple[Any, ...]:
    if type(found) is dict:
        return tuple((k, id(v)) for k, v in found.items())
    return tuple(map(id, found))


class NumberInputs:
    """The plan's number inputs: two blocks of memory, float64 and int64, that are filled anew for each call."""

    def __init__(self, numbers: list[tuple[int, Any, Any]]):
        self.parts: list[tuple[Any, Any, Any]] = []
        by_input: dict[int, Tensor] = {}
        for code, kind in (("d", np.float64), ("q", np.int64)):
            members = [(k, origin) for k, t, origin in numbers if t._array.dtype == kind]
            block = np.zeros(len(members), kind)
            by_input.update({k: _wrap(block[i:i + 1].reshape(())) for i, (k, _) in enumerate(members)})
            if members:
                self.parts.append((struct.Struct(f"{len(members)}{code}").pack_into, block.data.cast("B"),
                                   compile_numbers([origin for _, origin in members])))
        self.tensors = [by_input[k] for k, _, _ in numbers]

    def read(self, arguments: Any) -> None:
        """Fetch all numbers from where they are now."""
        for pack, memory, fetch in self.parts:
            pack(memory, 0, *fetch(arguments))


def read_number(origin: Any, arguments: Any) -> Any:
    """The number that is at `origin` now."""
    kind, place, *rest = origin
    if kind == "argument":
        return arguments[place]
    if kind == "item":
        for key in rest[0]:
            place = place[key]
        return place
    return place.seed_value if kind == "seed" else place.offset + rest[0]
