"""`save` and `load`: nested values with Tensors in a file that holds data only, no code.

What goes in: dicts, lists, tuples, sets, numbers, strings, None, dtypes, Tensors and NumPy arrays, nested at will:
the state dicts of Modules, optimizers and schedulers, and whatever stands around them. The Tensors become a
safetensors file under names that tell where they stood; the structure becomes JSON in its metadata. A dict of Tensors
is thereby a plain safetensors file that other programs can read, and any safetensors file can be loaded. Tensors that
shared memory share it again, where one contains the other.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from jitgrad import dtypes, safetensors
from jitgrad.dtypes import DType
from jitgrad.errors import DeviceError, DTypeError, complain
from jitgrad.nn.parameter import Parameter
from jitgrad.safetensors import FileFormatError
from jitgrad.tensor import Tensor, tensor_on

_FORMAT = "jitgrad"
_VERSION = "1"
File = str | os.PathLike[str] | BinaryIO


def save(obj: Any, f: File) -> None:
    """Write `obj` to a path (atomically) or to an open binary file."""
    encoder = _Encoder()
    structure = json.dumps(encoder.encode(obj, ""), separators=(",", ":"))
    arrays = encoder.stored_arrays()
    metadata = {_FORMAT: _VERSION, "structure": structure, "shared": json.dumps(encoder.shared)}
    if isinstance(f, (str, os.PathLike)):
        safetensors.write(f, arrays, metadata)
    else:
        safetensors.write_to(f, arrays, metadata)


def load(f: File, map_location: Any = None, *, weights_only: bool = True) -> Any:
    """What `save` wrote; from any other safetensors file, the dict of its Tensors.

    Tensors go to the devices that they were saved from, or where `map_location` says: one device for all of them, or a
    dict from a device's text to another one (``{"cuda:0": "cpu"}``). `weights_only` stands for PyTorch's: there is nothing
    but data.
    Raises FileFormatError for a file that is damaged or of another kind."""
    if isinstance(f, (str, os.PathLike)):
        arrays, metadata = safetensors.read(f)
    else:
        arrays, metadata = safetensors.read_from(f)
    if _FORMAT not in metadata:
        return {name: tensor_on(array, _location(map_location, "cpu")) for name, array in arrays.items()}
    if metadata[_FORMAT] != _VERSION:
        raise complain(FileFormatError, "load", f"the file has format {metadata[_FORMAT]}, this jitgrad reads "
                       f"{_VERSION}", fix="Update jitgrad")
    try:
        shared = json.loads(metadata["shared"])
        return _Decoder(arrays, shared, map_location).decode(json.loads(metadata["structure"]))
    except DeviceError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise complain(FileFormatError, "load", f"the structure in the file is malformed: {error!r}") from error


class _Encoder:
    """Values to JSON; arrays go to `arrays` under unique names, and those inside others to `shared`."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.shared: dict[str, Any] = {}
        self._names: dict[int, str] = {}                      # id of a Tensor or array that has been seen
        self._open: set[int] = set()                          # containers that contain what is being encoded

    def encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return _plain(value)
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self._array(value, path)
        if isinstance(value, DType):
            return {"dtype": value.name}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        return self._container(value, path)

    def _container(self, value: Any, path: str) -> Any:
        if id(value) in self._open:
            raise ValueError(f"save: the value at {path or 'the top'!r} contains itself")
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return {"dict": [[self.encode(key, path), self.encode(item, _below(path, key))]
                                 for key, item in value.items()]}
            for kind in (list, tuple, set):
                if isinstance(value, kind):
                    items = [self.encode(item, _below(path, k)) for k, item in enumerate(value)]
                    return items if kind is list else {kind.__name__: items}
        finally:
            self._open.discard(id(value))
        fix = "Save its state_dict()" if hasattr(value, "state_dict") else "Save numbers, strings and Tensors"
        raise complain(DTypeError, "save", f"a {type(value).__name__} at {path or 'the top'!r} cannot be saved as data",
                       fix=fix)

    def _array(self, value: Any, path: str) -> dict[str, Any]:
        name = self._names.get(id(value))
        if name is None:
            name = self._unused(path or "value")
            self._names[id(value)] = name
            self.arrays[name] = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
        kind = "tensor" if isinstance(value, Tensor) else "array" if isinstance(value, np.ndarray) else "scalar"
        entry: dict[str, Any] = {kind: name}
        if isinstance(value, Parameter):
            entry["parameter"] = True
        if isinstance(value, Tensor) and value.requires_grad:
            entry["requires_grad"] = True
        if isinstance(value, Tensor) and value.is_cuda:
            entry["device"] = str(value.device)
        return entry

    def _unused(self, name: str) -> str:
        candidate, k = name, 1
        while candidate in self.arrays or candidate == "__metadata__":
            k += 1
            candidate = f"{name}#{k}"
        return candidate

    def stored_arrays(self) -> dict[str, np.ndarray]:
        """The arrays to write: those that lie inside of another are left out and described in `shared`."""
        inside = _containment(self.arrays)
        for name, outer in inside.items():
            array, container = self.arrays[name], self.arrays[outer]
            offset = (_start(array) - _start(container)) // array.itemsize
            self.shared[name] = {"in": outer, "offset": offset, "shape": list(array.shape),
                                 "stride": [s // array.itemsize for s in array.strides]}
        return {name: array for name, array in self.arrays.items() if name not in inside}


class _Decoder:
    """The inverse of `_Encoder`; one object per name, so that what was one object is one again."""

    def __init__(self, arrays: dict[str, np.ndarray], shared: dict[str, Any], location: Any = None):
        self.arrays, self.location = dict(arrays), location
        for name, view in shared.items():
            self.arrays[name] = _view(arrays[view["in"]], view["offset"], tuple(view["shape"]), tuple(view["stride"]))
        self._made: dict[tuple[str, str], Any] = {}

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        kind, content = next(iter(node.items()))
        if kind in ("tensor", "array", "scalar"):
            key = (kind, content)
            if key not in self._made:
                self._made[key] = self._make(node, self.arrays[content])
            return self._made[key]
        return self._rebuild(kind, content)

    def _rebuild(self, kind: str, content: Any) -> Any:
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if kind in ("tuple", "set"):
            return (tuple if kind == "tuple" else set)(self.decode(item) for item in content)
        if kind == "dtype":
            return dtypes.BY_NAME[content]
        if kind == "bytes":
            return base64.b64decode(content)
        if kind == "complex":
            return complex(*content)
        raise ValueError(f"unknown kind of value {kind!r}")

    def _make(self, node: dict[str, Any], array: np.ndarray) -> Any:
        if "array" in node:
            return array
        if "scalar" in node:
            return array[()]
        tensor = tensor_on(array, _location(self.location, node.get("device", "cpu")))
        if node.get("parameter"):
            return Parameter(tensor, bool(node.get("requires_grad")))
        return tensor.requires_grad_(bool(node.get("requires_grad")))


def _location(given: Any, saved: str) -> Any:
    """Where a Tensor goes that was saved from the device `saved`."""
    if callable(given):
        raise complain(DeviceError, "load", "map_location is a device, its text, or a dict of them, not a function")
    if isinstance(given, Mapping):
        return given.get(saved, saved)
    return saved if given is None else given


def _plain(value: Any) -> Any:
    """A subclass of a plain type, such as an enum's, as that type."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _start(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _containment(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """name -> name of the array that holds its memory, for each that lies inside of a contiguous one of its dtype."""
    spans = [(*_span(array), name) for name, array in arrays.items() if array.size and _keeps_direction(array)]
    spans.sort(key=lambda span: (span[0], -span[1]))                # an outer span comes before those inside of it
    inside: dict[str, str] = {}
    outer: tuple[int, int, str] | None = None
    for begin, end, name in spans:
        array = arrays[name]
        if outer and end <= outer[1] and array.dtype == arrays[outer[2]].dtype:
            inside[name] = outer[2]
        elif array.flags.c_contiguous and (outer is None or end > outer[1]):
            outer = (begin, end, name)
    return inside


def _keeps_direction(array: np.ndarray) -> bool:
    return all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)


def _span(array: np.ndarray) -> tuple[int, int]:
    """First byte and the byte behind the last one."""
    begin = _start(array)
    return begin, begin + sum(s * (n - 1) for s, n in zip(array.strides, array.shape)) + array.itemsize


def _view(container: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """The described part of `container`; ValueError unless it lies inside."""
    last = offset + sum(s * (n - 1) for s, n in zip(stride, shape))
    if min((offset, *stride, *shape)) < 0 or last >= container.size:
        raise ValueError("a shared tensor reaches beyond its container")
    flat = container.reshape(-1)[offset:]
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(s * container.itemsize for s in stride))
