"""The error word of a call -> the exception that eager mode raises."""

from __future__ import annotations

from jitgrad.errors import DivisionByZeroError, JitgradError, OutOfRangeError, complain

INDEX_OUT_OF_RANGE, DIVISION_BY_ZERO = 1, 2


def explain(code: int, value: int, op: str, where: tuple[str, int] | None) -> JitgradError:
    """The exception for an error that a kernel reported; `value` is the index that was out of range."""
    if code == INDEX_OUT_OF_RANGE:
        return complain(OutOfRangeError, op, f"index {value} is out of range", where=where)
    if code == DIVISION_BY_ZERO:
        return complain(DivisionByZeroError, op, "integer division by zero", where=where)
    return complain(JitgradError, op, f"the kernel reported the unknown error {code} (value {value})", where=where)
