"""Param groups that tell `changes` when something changes that a compiled step took for granted.

Numbers (lr, betas, weight decay …) are read anew by each step, so setting one is not a change, unless it becomes zero
or stops being so: that may add or remove a part of the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad import changes


def _structure(value: Any) -> Any:
    """What of an option decides the form of the update: of a number whether it is zero, of others all."""
    if isinstance(value, tuple):
        return tuple(_structure(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return bool(value)
    return value


class ParamGroup(dict[str, Any]):
    """A dict of options, with the Parameters under "params"."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params" and not isinstance(value, WatchedList):
            value = WatchedList(value)
        old = self.get(name, changes)                         # the module stands for "nothing"
        super().__setitem__(name, value)
        if old is changes or (old is not value and (name == "params" or _structure(old) != _structure(value))):
            changes.bump()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        changes.bump()

    def update(self, *args: Any, **options: Any) -> None:
        for name, value in dict(*args, **options).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]


class WatchedList(list[Any]):
    """A list whose every change is noted."""


def _noting(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    def changed(self: WatchedList, *args: Any) -> Any:
        changes.bump()
        return method(self, *args)

    changed.__name__ = name
    return changed


for _name in ("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "__setitem__", "__delitem__",
              "__iadd__", "__imul__"):
    setattr(WatchedList, _name, _noting(_name))
