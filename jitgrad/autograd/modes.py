"""What is switched per thread: whether ops leave nodes on the tape, inference, anomaly detection."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any, TypeVar

from jitgrad import ops

if TYPE_CHECKING:
    pass

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Mode(threading.local):
    """What is switched per thread: `enabled` (ops leave nodes), `inference`, `anomaly` (nodes keep the user's line), and
    `keeper`: who keeps what nodes save (`autograd.saved`; None: the nodes themselves)."""

    enabled = True
    inference = False
    anomaly = False
    keeper: Any = None

    def __init__(self) -> None:
        ops.silence_numpy()                           # a setting of each thread: inf and NaN are results, not warnings


mode = _Mode()


class _Switch(ContextDecorator):
    """Sets attributes of `mode` for a block or for a function."""

    settings: dict[str, bool] = {}

    def __init__(self) -> None:
        self._outer: list[dict[str, bool]] = []

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        self = super().__new__(cls)
        if callable(function):                        # a bare decorator: @no_grad
            cls.__init__(self)
            return ContextDecorator.__call__(self, function)
        return self

    def _recreate_cm(self) -> _Switch:
        fresh = object.__new__(type(self))
        fresh.settings, fresh._outer = self.settings, []
        return fresh

    def __enter__(self) -> _Switch:
        self._outer.append({k: getattr(mode, k) for k in self.settings})
        for k, v in self.settings.items():
            setattr(mode, k, v)
        return self

    def __exit__(self, *exc: object) -> None:
        for k, v in self._outer.pop().items():
            setattr(mode, k, v)


class no_grad(_Switch):
    """Inside, nothing is recorded for gradients."""

    settings = {"enabled": False}


class enable_grad(_Switch):
    """Inside, ops are recorded again, also within ``no_grad``."""

    settings = {"enabled": True}


class inference_mode(_Switch):
    """``no_grad`` whose results can never enter a recorded computation by accident; ``inference_mode(False)`` undoes
    it."""

    settings = {"enabled": False, "inference": True}

    def __new__(cls, function: Callable[..., Any] | bool | None = None) -> Any:
        self = super().__new__(cls, function if callable(function) else None)
        if function is False:
            self.settings = {"enabled": True, "inference": False}
        return self

    def __init__(self, function: Callable[..., Any] | bool | None = None) -> None:
        super().__init__()


class _AtOnce(_Switch):
    """A switch that is on from when it is made; for a ``with`` block or a function it is restored afterwards."""

    _at_once = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        super().__enter__()
        self._at_once = True

    def __enter__(self) -> _Switch:
        if self._at_once:                             # the constructor has switched already; the block only restores
            self._at_once = False
            return self
        return super().__enter__()

    def __call__(self, function: _Function) -> _Function:
        if self._at_once:                             # a decorator: nothing is switched before the function is called
            self._at_once = False
            self.__exit__()
        return super().__call__(function)


class set_grad_enabled(_AtOnce):
    """Switch gradients on or off, at once, for a ``with`` block or for a function."""

    def __init__(self, value: bool) -> None:
        super().__init__(enabled=bool(value))


class detect_anomaly(_Switch):
    """Inside, tape nodes remember the user's line, and a gradient that becomes NaN is an error that names it."""

    settings = {"anomaly": True}


class set_detect_anomaly(_AtOnce):
    """Switch `detect_anomaly` on or off, at once, for a ``with`` block or for a function."""

    def __init__(self, value: bool, check_nan: bool = True) -> None:
        super().__init__(anomaly=bool(value) and check_nan)


def is_grad_enabled() -> bool:
    return mode.enabled


def is_inference_mode_enabled() -> bool:
    return mode.inference
