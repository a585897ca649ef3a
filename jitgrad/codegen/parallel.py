"""Compiling several kernels at once, with the help of a forked process.

Numba holds the interpreter's lock, so threads would not help. The child inherits everything that is loaded, compiles,
sends object code through a pipe and is gone. Another pipe holds the numbers of the kernels, longest first: each process
takes the next one when it is done with the last. Whatever the child does not deliver, for any reason, is compiled here.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence

from jitgrad.codegen.native import compile_source

Compiled = tuple[bytes, float]              # object code, seconds

WORTH_A_PROCESS = 4                         # kernels; below that forking and a second start of Numba cost as much
PIPE_HOLDS = 2048                           # claims, in the smallest pipe that there is; any others are compiled here
_HEADER = struct.Struct("<qqd")             # position, length, seconds
_CLAIM = struct.Struct("<H")                # position


def compile_all(sources: Sequence[tuple[str, str]], processes: int) -> list[Compiled]:
    """Object code of every ``(source, name)`` and how long it took; CompileError for a text that cannot be compiled."""
    found: dict[int, Compiled] = {}
    if processes > 1 and len(sources) >= WORTH_A_PROCESS and sys.platform == "linux":
        claims = _queue(sorted(range(len(sources)), key=lambda k: -len(sources[k][0])))
        child, reader = _start_child(sources, claims, found)
        try:
            for k in _claimed(claims):
                found[k] = _compile(*sources[k])
        finally:
            os.close(claims)
            _end_child(child, reader)
    return [found[k] if k in found else _compile(*sources[k]) for k in range(len(sources))]


def _compile(source: str, name: str) -> Compiled:
    begin = time.perf_counter()
    return compile_source(source, name), time.perf_counter() - begin


def _queue(order: Sequence[int]) -> int:
    """A pipe to read the numbers of the kernels from; it is at its end when all are taken."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"".join(_CLAIM.pack(k) for k in order[:PIPE_HOLDS]))
    os.close(write_end)
    return read_end


def _claimed(claims: int) -> Iterator[int]:
    while len(data := os.read(claims, _CLAIM.size)) == _CLAIM.size:
        yield _CLAIM.unpack(data)[0]


def _start_child(sources: Sequence[tuple[str, str]], claims: int,
                 found: dict[int, Compiled]) -> tuple[int, threading.Thread]:
    """A process that compiles what it claims, and the thread that puts what it sends into `found`."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that a process with threads forks: the child only compiles
        child = os.fork()
    if child == 0:
        os.close(read_end)
        _work(sources, claims, write_end)
    os.close(write_end)
    reader = threading.Thread(target=_receive, args=(read_end, found), daemon=True)
    reader.start()
    return child, reader


def _work(sources: Sequence[tuple[str, str]], claims: int, write_end: int) -> None:
    """The child: compile, send, and leave without any of the parent's clean-up."""
    try:
        with os.fdopen(write_end, "wb") as pipe:
            for k in _claimed(claims):
                data, seconds = _compile(*sources[k])
                pipe.write(_HEADER.pack(k, len(data), seconds) + data)
                pipe.flush()
    finally:
        os._exit(0)


def _receive(read_end: int, found: dict[int, Compiled]) -> None:
    with os.fdopen(read_end, "rb") as pipe:
        while len(header := pipe.read(_HEADER.size)) == _HEADER.size:
            position, length, seconds = _HEADER.unpack(header)
            data = pipe.read(length)
            if len(data) == length:
                found[position] = data, seconds


def _end_child(child: int, reader: threading.Thread) -> None:
    """Wait for the child, as long as it goes on delivering; one that hangs is ended."""
    reader.join(timeout=60)
    if reader.is_alive():
        os.kill(child, signal.SIGKILL)
        reader.join()
    os.waitpid(child, 0)
