"""Dispatch by context: the one call point of every primitive.

What a primitive *does* is decided by the interpreter that is current on this thread: eager execution, recording for
`compile`, or building a `Graph` inside a transform. No operand is inspected to find out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Interpreter(Protocol):
    """Carries out one primitive. `inputs` are values of the interpreter's own kind; one result, or a tuple of them
    for ops with several outputs."""

    def run(self, op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any: ...


class _State(threading.local):
    current: Interpreter | None = None


state = _State()


def set_default(interpreter: Interpreter) -> None:
    """The interpreter of every thread that has entered no other: eager execution installs itself here."""
    _State.current = interpreter


@contextmanager
def interpret(interpreter: Interpreter) -> Iterator[None]:
    """Make `interpreter` current on this thread."""
    outer = state.current
    state.current = interpreter
    try:
        yield
    finally:
        state.current = outer
