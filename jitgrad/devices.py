"""Devices: what `jitgrad.device` is, how a description of one is read, and which one is the default.

A description is a `device`, a text such as ``"cuda:1"``, or a number, which is that of a GPU. Nothing here asks a driver:
whether a device exists is seen when something is to be put on it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from jitgrad.errors import DeviceError, complain

TYPES = ("cpu", "cuda")
_TEXT = re.compile(r"([a-z]+)(?::(\d+))?$")


class device:
    """A place for tensors: ``device("cuda:1")``, ``device("cuda", 1)``, ``device(1)``, ``device("cpu")``.

    Without an index "cuda" is the GPU that is current where it is used. Two are equal when type and index are; as in
    PyTorch a device is never equal to a text: compare `type`, or ``str(x.device)``. As a context manager it is the
    default device of the block, on this thread. DeviceError for a text that names no device."""

    __slots__ = ("_index", "_type")

    def __init__(self, type: Any, index: int | None = None):
        if isinstance(type, device):
            type, index = type.type, type.index if index is None else index
        elif isinstance(type, int) and not isinstance(type, bool) and index is None:
            type, index = "cuda", type
        elif isinstance(type, str):
            type, index = _read(type, index)
        else:
            raise complain(DeviceError, "device", f"expected a text such as 'cuda:1', a number or a device, got {type!r}")
        if index is not None and index < 0:
            raise complain(DeviceError, "device", f"the index of a device is 0 or more, got {index}")
        self._type: str = type
        self._index: int | None = index

    @property
    def type(self) -> str:
        """ "cpu" or "cuda"."""
        return self._type

    @property
    def index(self) -> int | None:
        """The number of the GPU, or None."""
        return self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, device) and self.type == other.type and self.index == other.index

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __repr__(self) -> str:
        return f"device(type={self.type!r})" if self.index is None else f"device(type={self.type!r}, index={self.index})"

    def __reduce__(self) -> Any:
        return device, (self.type, self.index)

    def __enter__(self) -> device:
        _here.outer.append(_here.default)
        _here.default = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.default = _here.outer.pop()


def _read(text: str, index: int | None) -> tuple[str, int | None]:
    """Type and index that `text` names, or that it names together with `index`."""
    match = _TEXT.match(text)
    if match is None or match[1] not in TYPES:
        raise complain(DeviceError, "device", f"{text!r} names no device",
                       fix="The devices are: cpu, cuda, cuda:0, cuda:1 …")
    if match[2] is None:
        return match[1], index
    if index is not None:
        raise complain(DeviceError, "device", f"{text!r} has an index already, {index} is given beside it")
    return match[1], int(match[2])


class _Here(threading.local):
    """The default of a thread, and those of the blocks around the one that it is in."""

    default: device | None = None

    def __init__(self) -> None:
        self.outer: list[device | None] = []


_here = _Here()
CPU = device("cpu")

current_gpu: Callable[[], int] = lambda: 0
"""The number of the GPU that "cuda" stands for; the runtime, which knows it, says so."""


def install_current_gpu(find: Callable[[], int]) -> None:
    """Say how the number of the current GPU is found (the layer above calls this)."""
    global current_gpu
    current_gpu = find


def set_default_device(device_: Any) -> None:
    """Let creation functions and layers that are given no device use this one, on this thread; None: the CPU."""
    _here.default = None if device_ is None else device(device_)


def get_default_device() -> device:
    """The device that creation functions and layers use which are given none."""
    return placed(_here.default) if _here.default is not None else CPU


def default() -> device | None:
    """What `set_default_device` or a ``with`` block said, as it was said; None: nothing, which is the CPU."""
    return _here.default


def chosen(given: Any) -> device | None:
    """Where something is to be made, from a ``device=`` argument: exact (with an index for a GPU), and None for the CPU,
    which is where it is made anyway."""
    wanted = _here.default if given is None else given
    if wanted is None:
        return None
    exact = placed(wanted)
    return None if exact.type == "cpu" else exact


def placed(given: Any) -> device:
    """The exact device of a description: "cuda" gets the number of the current GPU, any "cpu" is `CPU`."""
    if given is CPU or given == "cpu":
        return CPU
    wanted = given if isinstance(given, device) else device(given)
    if wanted.type == "cpu":
        if wanted.index:
            raise complain(DeviceError, "device", f"there is one CPU, {wanted} names another")
        return CPU
    return wanted if wanted.index is not None else device(wanted.type, current_gpu())
