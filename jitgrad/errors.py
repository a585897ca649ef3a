"""Exceptions, and the one way their messages are put together.

Every message has the same form: *op and problem; what came, with types; the user's line; the fix.* The classes derive
from the built-in exception that PyTorch raises in the same place, so code that catches those keeps working.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_KERNELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernels") + os.sep


class JitgradError(Exception):
    """Base of everything that jitgrad raises on purpose."""


class ShapeError(JitgradError, RuntimeError, ValueError):
    """Sizes that do not fit together."""


class DTypeError(JitgradError, RuntimeError, TypeError):
    """An element type that the op does not accept."""


class DeviceError(JitgradError, RuntimeError):
    """A device that does not exist, or operands on different devices."""


class OutOfRangeError(JitgradError, IndexError):
    """An index outside of the dimension it addresses."""


class DivisionByZeroError(JitgradError, RuntimeError, ZeroDivisionError):
    """Integer division by zero."""


class AutogradError(JitgradError, RuntimeError):
    """A backward pass that cannot be carried out."""


class CheckpointError(AutogradError):
    """A checkpointed function that does other things when it runs again."""


class CompileError(JitgradError, RuntimeError):
    """A function that cannot be compiled as asked."""


class CacheWarning(UserWarning):
    """The kernel cache cannot be used as configured; a private one takes its place."""


class VerifyError(JitgradError, AssertionError):
    """A graph that breaks a rule of the representation; always a bug of jitgrad."""


def is_internal(code: CodeType) -> bool:
    """True for code of the package itself, so that a frame walk can step over it."""
    return code.co_filename.startswith((_PACKAGE, _KERNELS))


def user_location(depth: int = 1) -> tuple[str, int] | None:
    """File and line of the innermost caller outside of jitgrad, or None when there is none."""
    frame = sys._getframe(depth)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _internal_files:
            if not file.startswith((_PACKAGE, _KERNELS)):
                return file, frame.f_lineno
            _internal_files.add(file)
        frame = frame.f_back  # type: ignore[assignment]
    return None


_internal_files: set[str] = set()


def describe_location(where: tuple[str, int] | None) -> str:
    """``train.py:31``, or ``cell 4:7`` in a notebook, for a location from `user_location`."""
    if where is None:
        return ""
    file, line = where
    cell = _notebook_cell(file)
    return f"{cell or os.path.basename(file)}:{line}"


def source_line(where: tuple[str, int] | None) -> str:
    """The text of that line, stripped, or an empty string."""
    return linecache.getline(*where).strip() if where else ""


def _notebook_cell(file: str) -> str | None:
    """``cell 4`` for the temporary file name that IPython compiled a cell under."""
    shell = sys.modules.get("IPython")
    if shell is None:
        return None
    instance = shell.get_ipython()
    names = getattr(getattr(instance, "compile", None), "_filename_map", {}) if instance else {}
    return f"cell {names[file]}" if file in names else None


def complain(kind: type[JitgradError], op: str, problem: str, *, where: tuple[str, int] | None = None,
             fix: str = "") -> JitgradError:
    """An exception of class `kind` in the common form; the caller raises it.

    `where` defaults to the user's line that is executing now."""
    place = describe_location(where or user_location(2))
    text = f"{op}: {problem}"
    if place:
        text += f"  ({place})"
    if fix:
        text += f". {fix}"
    return kind(text)
