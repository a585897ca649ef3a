"""`autocast` regions, the settings behind them, and what custom autograd functions need to take part.

Which function computes in which dtype stands at its definition (`functional.autocast`); here is what opens and closes
regions. Settings are those of the calling thread, as in PyTorch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from typing import Any

from jitgrad import dtypes
from jitgrad.dtypes import DType
from jitgrad.errors import DeviceError, DTypeError, complain
from jitgrad.functional.autocast import DEVICES, Setting, region, set_to, state
from jitgrad.runtime.cuda import driver
from jitgrad.tensor import Tensor

LOWER = (dtypes.bfloat16, dtypes.float16)


def _place(op: str, device_type: str) -> int:
    """Which entry of a `Setting` is that of a type of device."""
    if not isinstance(device_type, str):
        raise ValueError(f"{op}: device_type is a string, got {type(device_type).__name__}")
    if device_type not in DEVICES:
        raise complain(DeviceError, op, f"device_type={device_type!r} is none of {', '.join(map(repr, DEVICES))}")
    return DEVICES.index(device_type)


def _replaced(entries: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*entries[:place], value, *entries[place + 1:])


def is_autocast_available(device_type: str) -> bool:
    """Whether regions can be open on a type of device: whether there is one to compute on."""
    _place("is_autocast_available", device_type)
    return device_type == "cpu" or driver.available()


def is_autocast_enabled(device_type: str = "cuda") -> bool:
    """Whether a region is open on a type of device."""
    return state.setting.active[_place("is_autocast_enabled", device_type)] is not None


def set_autocast_enabled(device_type: str, enabled: bool) -> None:
    """Open a region that nothing closes, or close it. Casts of parameters are not kept in it."""
    place = _place("set_autocast_enabled", device_type)
    setting = state.setting
    dtype = setting.chosen[place] if enabled else None
    set_to(setting._replace(active=_replaced(setting.active, place, dtype)))


def get_autocast_dtype(device_type: str) -> DType:
    """The dtype of a region on a type of device that says none, and inside of one its dtype."""
    return state.setting.chosen[_place("get_autocast_dtype", device_type)]


def set_autocast_dtype(device_type: str, dtype: DType) -> None:
    """Set what `get_autocast_dtype` returns; an open region goes on in it."""
    place = _place("set_autocast_dtype", device_type)
    if dtype not in LOWER:
        raise complain(DTypeError, "set_autocast_dtype", f"{dtype!r} is neither bfloat16 nor float16")
    setting = state.setting
    active = _replaced(setting.active, place, dtype) if setting.active[place] is not None else setting.active
    set_to(setting._replace(active=active, chosen=_replaced(setting.chosen, place, dtype)))


def is_autocast_cache_enabled() -> bool:
    """Whether regions keep the casts of parameters."""
    return state.setting.cache_enabled


def set_autocast_cache_enabled(enabled: bool) -> None:
    """Say whether regions keep the casts of parameters."""
    set_to(state.setting._replace(cache_enabled=bool(enabled)))


class autocast(ContextDecorator):
    """A region of mixed precision, as a ``with`` block or as a decorator of a function.

    device_type     "cpu" or "cuda": where the Tensors lie that are cast
    dtype           bfloat16 or float16: what products, convolutions and attention compute in. Left out, it is
                    `get_autocast_dtype`: bfloat16 on a CPU, float16 on a GPU
    enabled         False: a region without casts, inside of another one
    cache_enabled   whether a parameter is cast once per region, or once per use

    Casts apply to float32, float16 and bfloat16; what is written into given memory (in-place forms) stays as it is.
    Regions nest; the inner one holds. Only the forward pass belongs inside: gradients have the dtypes of what they are
    the gradients of. UserWarning, and a region without casts, for another dtype and for a device that is not there."""

    def __init__(self, device_type: str, dtype: DType | None = None, enabled: bool = True,
                 cache_enabled: bool | None = None):
        self._place = _place("autocast", device_type)
        self.device = device_type
        self.fast_dtype = state.setting.chosen[self._place] if dtype is None else dtype
        self._enabled = bool(enabled)
        self._cache_enabled = state.setting.cache_enabled if cache_enabled is None else bool(cache_enabled)
        self._open: list[Any] = []
        if self._enabled and not is_autocast_available(device_type):
            self._disable(f"no GPU can be used: {driver.why_not()}")
        if self._enabled and self.fast_dtype not in LOWER:
            self._disable(f"its dtype is bfloat16 or float16, not {self.fast_dtype!r}")

    def _disable(self, why: str) -> None:
        warnings.warn(f"autocast on {self.device!r}: {why}. Nothing will be cast.", stacklevel=3)
        self._enabled = False

    def _recreate_cm(self) -> autocast:
        return autocast(self.device, self.fast_dtype, self._enabled, self._cache_enabled)

    def _setting(self) -> Setting:
        outer = state.setting
        active = _replaced(outer.active, self._place, self.fast_dtype if self._enabled else None)
        chosen = _replaced(outer.chosen, self._place, self.fast_dtype) if self._enabled else outer.chosen
        return Setting(active, chosen, self._cache_enabled)

    def __enter__(self) -> autocast:
        self._open.append(region(self._setting()))
        self._open[-1].__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def custom_fwd(fwd: Callable[..., Any] | None = None, *, device_type: str, cast_inputs: DType | None = None) -> Any:
    """Decorates ``forward`` of an `autograd.Function`, whose ``backward`` then runs in the same region (`custom_bwd`).
    With `cast_inputs`, floating-point Tensors come in that dtype when a region is open, and the region is closed inside."""
    _place("custom_fwd", device_type)
    if fwd is None:
        return functools.partial(custom_fwd, device_type=device_type, cast_inputs=cast_inputs)

    @functools.wraps(fwd)
    def forward(ctx: Any, *args: Any, **options: Any) -> Any:
        opened = is_autocast_enabled(device_type)
        ctx._autocast_dtype = get_autocast_dtype(device_type)
        ctx._autocast_enabled = opened and cast_inputs is None
        if not opened or cast_inputs is None:
            return fwd(ctx, *args, **options)
        with autocast(device_type, enabled=False):
            return fwd(ctx, *_as(args, cast_inputs), **_as(options, cast_inputs))

    return forward


def custom_bwd(bwd: Callable[..., Any] | None = None, *, device_type: str) -> Any:
    """Decorates ``backward`` of an `autograd.Function`: it runs in the region that ``forward`` ran in (`custom_fwd`)."""
    _place("custom_bwd", device_type)
    if bwd is None:
        return functools.partial(custom_bwd, device_type=device_type)

    @functools.wraps(bwd)
    def backward(ctx: Any, *args: Any, **options: Any) -> Any:
        with autocast(device_type, ctx._autocast_dtype, ctx._autocast_enabled):
            return bwd(ctx, *args, **options)

    return backward


def _as(value: Any, dtype: DType) -> Any:
    """`value` with its floating-point Tensors in `dtype`, but for float64."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype.is_floating_point and value.dtype is not dtypes.float64 else value
    if isinstance(value, Mapping):
        return {name: _as(entry, dtype) for name, entry in value.items()}
    return type(value)(_as(entry, dtype) for entry in value) if type(value) in (list, tuple) else value
