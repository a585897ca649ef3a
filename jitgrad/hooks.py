"""Tables of hooks, as Modules and optimizers keep them, and the handles that remove them.

Registering or removing one is a change of structure: `changes` is told, so that a compiled step is traced anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jitgrad import changes

_identifiers = itertools.count()


class Hook(NamedTuple):
    """A user's function and how it wants to be called."""

    function: Callable[..., Any]
    with_kwargs: bool = False
    always_call: bool = False
    after_accumulation: bool = False        # of a leaf: called with it once its ``.grad`` is complete


class HookTable:
    """Hooks of one kind, by identifier, in running order."""

    def __init__(self) -> None:
        self.entries: dict[int, Hook] = {}

    def add(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        handle = RemovableHandle(self)
        self.entries = {handle.id: hook, **self.entries} if prepend else {**self.entries, handle.id: hook}
        changes.bump()
        return handle

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.entries.values())      # adding and removing replaces the dict, so a running loop is safe

    def __len__(self) -> int:
        return len(self.entries)


class RemovableHandle:
    """What registering a hook returns; ``remove()`` (or leaving a ``with``) takes the hook away again."""

    def __init__(self, table: HookTable):
        self.id = next(_identifiers)
        self._table = weakref.ref(table)

    def remove(self) -> None:
        table = self._table()
        if table is not None and self.id in table.entries:
            table.entries = {key: hook for key, hook in table.entries.items() if key != self.id}
            changes.bump()

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
