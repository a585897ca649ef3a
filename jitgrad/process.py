"""Settings of the whole process that PyTorch has at its top level: threads, deterministic algorithms, printing.

The number of threads is the knob `num_threads` of `config`. Results here are always deterministic, so that a wish for
it is granted already; it is remembered for programs that ask. Printing is NumPy's, with PyTorch's options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jitgrad import config
from jitgrad.errors import DTypeError, complain
from jitgrad.runtime import threads

__all__ = ["are_deterministic_algorithms_enabled", "get_num_threads", "is_deterministic_algorithms_warn_only_enabled",
           "set_num_threads", "set_printoptions", "use_deterministic_algorithms"]


def get_num_threads() -> int:
    """How many threads computations use, the caller's included."""
    return threads.limit()


def set_num_threads(num: int) -> None:
    """Use that many threads from now on, at least 1: the knob `num_threads`. No result depends on it."""
    if type(num) is not int:
        raise TypeError(f"set_num_threads: expected an int, got {type(num).__name__}")
    config.update(num_threads=num)


_wish = (False, False)                              # deterministic, and whether a warning would do


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """Ask for results that are equal in every run. They are so in any case: this is only remembered."""
    global _wish
    if not isinstance(mode, bool):
        raise complain(DTypeError, "use_deterministic_algorithms", f"True or False, not {mode!r}")
    _wish = mode, bool(mode and warn_only)


def are_deterministic_algorithms_enabled() -> bool:
    """What `use_deterministic_algorithms` was last called with."""
    return _wish[0]


def is_deterministic_algorithms_warn_only_enabled() -> bool:
    """Whether `use_deterministic_algorithms` was last called with `warn_only`."""
    return _wish[1]


# printing

@dataclass(frozen=True)
class PrintOptions:
    """How tensors are printed: digits after the point, from how many elements on they are abridged, how many are left at
    either end of a dimension then, characters in a line, and powers of ten always (True), never (False), or where they
    are needed (None)."""

    precision: int = 4
    threshold: float = 1000
    edgeitems: int = 3
    linewidth: int = 75
    sci_mode: bool | None = None


_PROFILES = {"default": PrintOptions(), "short": PrintOptions(precision=2, edgeitems=2),
             "full": PrintOptions(threshold=float("inf"))}
_options = PrintOptions()


def set_printoptions(precision: int | None = None, threshold: float | None = None, edgeitems: int | None = None,
                     linewidth: int | None = None, profile: str | None = None, sci_mode: bool | None = None) -> None:
    """Change how tensors are printed (see `PrintOptions`); what is not given stays. A `profile` ("default", "short",
    "full") comes first. As in PyTorch, every call sets `sci_mode`."""
    global _options
    if profile is not None and profile not in _PROFILES:
        raise complain(DTypeError, "set_printoptions", f"profile={profile!r} is none of {', '.join(_PROFILES)}")
    base = _options if profile is None else _PROFILES[profile]
    given = {"precision": precision, "threshold": threshold, "edgeitems": edgeitems, "linewidth": linewidth}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    _options = replace(base, sci_mode=sci_mode, **changes)


def numpy_options(is_float: bool) -> dict[str, Any]:
    """The options that stand, as NumPy's ``array2string`` takes them, for floats or other numbers."""
    o = _options
    found: dict[str, Any] = {"precision": o.precision, "threshold": o.threshold, "edgeitems": o.edgeitems,
                             "max_line_width": o.linewidth, "suppress_small": o.sci_mode is False,
                             "floatmode": "maxprec_equal" if is_float else "maxprec"}
    if o.sci_mode and is_float:
        found["formatter"] = {"float_kind": lambda value: f"{value:.{o.precision}e}"}
    return found
