"""Autocast: which functions compute in which precision while a region of mixed precision is open.

A function of this package says so where it is defined, once per type of device:

    @casts(cpu="lower", cuda="lower")
    def linear(input, weight, bias=None): ...

In come the function's operands; outside of a region nothing happens to them, inside they are cast by one of these rules
(PyTorch's, down to the lists of functions that each applies to):

    lower     to the region's dtype: products, convolutions, attention
    full      to float32: what needs range or digits
    total     float32 is the dtype to sum up in, unless the caller gives one: sums, softmax on a GPU
    widest    to the widest dtype among the operands
    plain     not at all, and neither are those of the functions that it calls
    refused   an error: what cannot be computed safely

float64, integers and complex numbers are never cast. What a rule was applied to runs without further casts inside. A
parameter is cast once per region: regions keep such casts. The casts are ordinary ops, so gradients come back in the
parameter's dtype, and compiled steps fuse them. The state is one per thread; `jitgrad.amp` is what users call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jitgrad import dtypes, ops, precision
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, complain
from jitgrad.ir.interpreter import state as interpreter

DEVICES = ("cpu", "cuda")
RULES = ("lower", "full", "total", "widest", "plain", "refused")

_HALF = (dtypes.float16, dtypes.bfloat16)
_CASTABLE = (*_HALF, dtypes.float32)

rules: dict[str, dict[str, str]] = {}
"""Of each function, by name: its rule on each type of device."""


class Setting(NamedTuple):
    """What a thread's regions amount to. Each has one entry per type of device: `active`, the dtype on which a region is
    open, or None; `chosen`, the dtype that a region has unless it says another one."""

    active: tuple[DType | None, ...] = (None, None)
    chosen: tuple[DType, ...] = (dtypes.bfloat16, dtypes.float16)
    cache_enabled: bool = True

    def dtype(self, device: str) -> DType | None:
        """The dtype of the region that is open on a type of device, or None."""
        return self.active[DEVICES.index(device)]


USUAL = Setting()


class _State(threading.local):
    """The setting of this thread, and `kept`: casts of parameters (None: they are not kept), for use under `owner`, the
    interpreter that was current when the outermost region was entered. `active`: some region is open."""

    setting = USUAL
    active = False
    kept: dict[Any, Any] | None = None
    owner: Any = None


state = _State()


def set_to(setting: Setting) -> None:
    """Let `setting` hold on this thread."""
    state.setting, state.active = setting, any(setting.active)


@contextmanager
def region(setting: Setting) -> Iterator[None]:
    """`setting` holds inside. Casts of parameters are kept until the outermost region ends, but not from one
    interpreter to another: what is recorded belongs to the recording."""
    outer, kept, owner = state.setting, state.kept, state.owner
    set_to(setting)
    if kept is None or owner is not interpreter.current:
        state.kept, state.owner = {}, interpreter.current
    try:
        yield
    finally:
        set_to(outer)
        state.kept, state.owner = kept, owner


def clear_autocast_cache() -> None:
    """Forget the casts of parameters that the open regions keep."""
    if state.kept is not None:
        state.kept.clear()


def key() -> tuple[Any, ...] | None:
    """Everything that decides which casts are made: what a compiled function must find unchanged. None, which is cheap
    to look up, where nothing was ever set."""
    exact = precision.get_float32_matmul_precision()
    return None if state.setting is USUAL and exact == "highest" else (state.setting, exact)


def casts(cpu: str | None = None, cuda: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function: its rule on each type of device, None for those that take operands as they come."""
    by_device = {"cpu": cpu, "cuda": cuda}
    assert all(rule is None or rule in RULES for rule in by_device.values())

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        rules[function.__name__] = {device: rule for device, rule in by_device.items() if rule is not None}

        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            if not state.active:
                return function(*args, **options)
            return _called(function, by_device, args, options)

        wrapper.uncast = function  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _called(function: Callable[..., Any], by_device: Mapping[str, str | None], args: tuple[Any, ...],
            options: dict[str, Any]) -> Any:
    """The function with its operands cast by the rule of their device; the casts of what it calls are off."""
    device = next((d for d in map(_device_of, _flat((*args, *options.values()))) if d is not None), None)
    rule = None if device is None else by_device[device]
    if device is None or rule is None:
        return function(*args, **options)
    outer = state.setting
    wanted = _wanted(function.__name__, rule, device, args, options)
    if wanted is not None:
        args = tuple([_cast(x, wanted, device) for x in args])
        options = {name: _cast(x, wanted, device) for name, x in options.items()}
    elif rule == "total" and _sums_in_half(args, options):
        options = {**options, "dtype": dtypes.float32}
    set_to(Setting((None, None), outer.chosen, outer.cache_enabled))
    try:
        return function(*args, **options)
    finally:
        set_to(outer)


def _sums_in_half(args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """True when the first operand is of half precision, and no dtype was given."""
    given = options.get("dtype") is not None or any(type(x) is DType for x in args)
    return not given and bool(args) and getattr(args[0], "dtype", None) in _HALF


def _wanted(name: str, rule: str, device: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> DType | None:
    """The dtype that operands are cast to, or None."""
    lower = state.setting.dtype(device)
    if rule == "refused":
        raise complain(DTypeError, name, "it is unsafe to autocast: its logarithms overflow in half precision",
                       fix="Use binary_cross_entropy_with_logits (BCEWithLogitsLoss) on what comes before the sigmoid")
    if rule == "lower":
        return lower
    if rule == "full":
        return dtypes.float32
    if rule != "widest":
        return None
    found = [x.dtype for x in _flat((*args, *options.values())) if _is_castable(x, device)]
    return dtypes.float32 if any(dtype is not lower for dtype in found) else lower


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for x in values:
        if type(x) in (list, tuple):
            yield from x
        else:
            yield x


def _device_of(x: Any) -> str | None:
    """The type of device that a Tensor lies on, if a region is open there."""
    device = getattr(x, "device", None)
    if device is None:
        return None
    kind = str(device).partition(":")[0]
    return kind if kind in DEVICES and state.setting.dtype(kind) is not None else None


def _is_castable(x: Any, device: str) -> bool:
    return getattr(x, "dtype", None) in _CASTABLE and _device_of(x) == device


def _cast(x: Any, dtype: DType, device: str) -> Any:
    """`x` in `dtype`, if it is of a dtype that may be cast; lists and tuples with each element cast."""
    if type(x) in (list, tuple):
        return type(x)([_cast(element, dtype, device) for element in x])
    if not _is_castable(x, device) or x.dtype is dtype:
        return x
    kept = state.kept if state.owner is interpreter.current and state.setting.cache_enabled else None
    if kept is not None and x.dtype is dtypes.float32 and x.requires_grad and x.is_leaf and x._root is None:
        return _kept_cast(x, dtype, kept)
    return ops.cast(x, dtype=dtype)


def _kept_cast(x: Any, dtype: DType, kept: dict[Any, Any]) -> Any:
    """The cast of a parameter, made once: until it is changed in place, or a walk back has gone through the cast."""
    _, version, cast = kept.get((id(x), dtype), (None, -1, None))
    if cast is not None and version == x._count() and not cast._node.freed:
        return cast
    cast = ops.cast(x, dtype=dtype)
    if cast._node is not None:                        # under no_grad it has no history, which later uses must have
        kept[id(x), dtype] = x, x._count(), cast
    return cast
