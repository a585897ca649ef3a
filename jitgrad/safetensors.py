"""The safetensors file format: named arrays behind a JSON header, nothing that could run.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__": strings by name; padded with spaces
    data      the arrays, row-major and little-endian, without gaps

See https://github.com/huggingface/safetensors. It is written out here because bfloat16 and a checksum need more than
its NumPy interface offers.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from jitgrad import dtypes
from jitgrad.dtypes import DType
from jitgrad.errors import JitgradError, complain

_NAMES: dict[DType, str] = {
    dtypes.bool_: "BOOL", dtypes.uint8: "U8", dtypes.int8: "I8", dtypes.int16: "I16", dtypes.int32: "I32",
    dtypes.uint32: "U32", dtypes.int64: "I64", dtypes.float16: "F16", dtypes.bfloat16: "BF16", dtypes.float32: "F32",
    dtypes.float64: "F64", dtypes.complex64: "C64"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHECKSUM = "crc32"
_ALIGNMENT = 64
_LONGEST_HEADER = 100_000_000


class FileFormatError(JitgradError, RuntimeError):
    """A file that is damaged, or of another kind."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file, all of it or none: a temporary file beside it takes its name when everything is on the disk."""
    path = os.path.abspath(os.fspath(path))
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            write_to(file, arrays, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    """Make the new name durable, where folders can be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_to(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write to an open binary file. The widest elements come first, so that all arrays are aligned."""
    parts = sorted(((name, _row_major(array)) for name, array in arrays.items()), key=lambda part: -part[1].itemsize)
    checksum = 0
    for _, array in parts:
        checksum = zlib.crc32(_bytes_of(array), checksum)
    header = _header(parts, {**metadata, _CHECKSUM: f"{checksum:08x}"})
    file.write(struct.pack("<Q", len(header)) + header)
    for _, array in parts:
        file.write(_bytes_of(array))


def _row_major(array: np.ndarray) -> np.ndarray:
    """`array` as the file holds it (`ascontiguousarray` would make a 0-d array 1-d)."""
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _header(parts: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in parts:
        dtype = _NAMES.get(dtypes.from_numpy(array.dtype))
        if dtype is None:
            raise complain(FileFormatError, "save", f"safetensors files have no {array.dtype} ({name!r})",
                           fix="Save the real and imaginary parts")
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % _ALIGNMENT)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, each with memory of its own, and its metadata; FileFormatError if anything is wrong."""
    with open(path, "rb") as file:
        return read_from(file, os.fspath(path))


def read_from(file: BinaryIO, what: str = "the file") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """As `read`, from an open binary file."""
    entries = _read_header(file, what)
    metadata = entries.pop("__metadata__", {})
    layout = sorted((_check_entry(name, entry, what) for name, entry in entries.items()), key=lambda part: part[1])
    arrays: dict[str, np.ndarray] = {}
    position = checksum = 0
    for name, (begin, end), array in layout:
        if begin != position or file.readinto(_bytes_of(array)) != end - begin:  # type: ignore[attr-defined]
            raise _damaged(what, f"the data of {name!r} is cut off or out of place")
        checksum, position = zlib.crc32(_bytes_of(array), checksum), end
        arrays[name] = array
    if file.read(1):
        raise _damaged(what, "there is more data than the header says")
    if metadata.pop(_CHECKSUM, f"{checksum:08x}") != f"{checksum:08x}":
        raise _damaged(what, "the checksum of the data is wrong")
    return {name: arrays[name] for name in entries}, metadata


def _read_header(file: BinaryIO, what: str) -> dict[str, Any]:
    start = file.read(8)
    if start[:2] in (b"PK", b"\x80\x02"):
        raise complain(FileFormatError, "load", f"{what} is a zip or pickle file, as torch.save writes; loading "
                       f"one could run any code", fix="Write it with safetensors.torch.save_file instead")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
    if length > _LONGEST_HEADER:
        raise _damaged(what, "it does not begin with the length of a header")
    text = file.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(what, "its header is not JSON") from None
    if len(text) != length or not isinstance(entries, dict) or not _is_strings(entries.get("__metadata__", {})):
        raise _damaged(what, "its header is cut off or malformed")
    return entries


def _is_strings(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _check_entry(name: str, entry: Any, what: str) -> tuple[str, tuple[int, int], np.ndarray]:
    """Name, place in the data, and an array to read into."""
    try:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        sizes_are_sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        count = dtype.itemsize
        for n in shape:
            count *= n
    except (KeyError, TypeError, ValueError):
        raise _damaged(what, f"the header's entry {name!r} is malformed or has an unknown dtype") from None
    if not sizes_are_sane or end - begin != count:
        raise _damaged(what, f"the header's entry {name!r} does not fit its shape {list(shape)}")
    try:
        return name, (begin, end), np.empty(shape, dtype.numpy)
    except (MemoryError, ValueError):
        raise _damaged(what, f"the header's entry {name!r} asks for {count} bytes") from None


def _damaged(what: str, problem: str) -> JitgradError:
    return complain(FileFormatError, "load", f"{what} is damaged or not a safetensors file: {problem}")
