"""Compiling several kernels at once, with the help of forked processes.

Numba holds the interpreter's lock, so threads would not help. A child inherits everything that is loaded, compiles,
sends machine code (or text for a GPU) through a pipe and is gone. Another pipe holds the numbers of the kernels, longest
first: each process takes the next one when it is done with the last. Whatever the children do not deliver, for any
reason, is compiled here.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

Compile = Callable[[str, str], bytes]
Compiled = tuple[bytes, float]              # what the compiler gave, seconds

WORTH_A_PROCESS = 4                         # kernels; below that forking and a second start of Numba cost as much
MOST_PROCESSES = 8                          # each takes memory of its own for what it compiles
PIPE_HOLDS = 2048                           # claims, in the smallest pipe that there is; any others are compiled here
_HEADER = struct.Struct("<qqd")             # position, length, seconds
_CLAIM = struct.Struct("<H")                # position


def compile_all(compile: Compile, sources: Sequence[tuple[str, str]], processes: int) -> list[Compiled]:
    """``compile(*source)`` of all `sources`, of which the first part is the text, and how long it took. What `compile`
    raises for a text that cannot be compiled is raised."""
    found: dict[int, Compiled] = {}
    children = min(processes, MOST_PROCESSES, len(sources) // WORTH_A_PROCESS + 1) - 1
    if children > 0 and sys.platform == "linux":
        claims = _queue(sorted(range(len(sources)), key=lambda k: -len(sources[k][0])))
        started = [_start_child(compile, sources, claims) for _ in range(children)]
        readers = [threading.Thread(target=_receive, args=(read_end, found), daemon=True) for _, read_end in started]
        for reader in readers:
            reader.start()
        try:
            for k in _claimed(claims):
                found[k] = _compile(compile, sources[k])
        finally:
            os.close(claims)
            for (child, _), reader in zip(started, readers, strict=True):
                _end_child(child, reader)
    return [found[k] if k in found else _compile(compile, sources[k]) for k in range(len(sources))]


def _compile(compile: Compile, source: tuple[str, str]) -> Compiled:
    begin = time.perf_counter()
    return compile(*source), time.perf_counter() - begin


def _queue(order: Sequence[int]) -> int:
    """A pipe to read the numbers of the kernels from; it is at its end when all are taken."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"".join(_CLAIM.pack(k) for k in order[:PIPE_HOLDS]))
    os.close(write_end)
    return read_end


def _claimed(claims: int) -> Iterator[int]:
    while len(data := os.read(claims, _CLAIM.size)) == _CLAIM.size:
        yield _CLAIM.unpack(data)[0]


def _start_child(compile: Compile, sources: Sequence[tuple[str, str]], claims: int) -> tuple[int, int]:
    """A process that compiles what it claims, and where it can be read what it sends."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that a process with threads forks: the child only compiles
        child = os.fork()
    if child == 0:
        os.close(read_end)
        _work(compile, sources, claims, write_end)
    os.close(write_end)
    return child, read_end


def _work(compile: Compile, sources: Sequence[tuple[str, str]], claims: int, write_end: int) -> None:
    """The child: compile, send, and leave without any of the parent's clean-up."""
    try:
        with os.fdopen(write_end, "wb") as pipe:
            for k in _claimed(claims):
                data, seconds = _compile(compile, sources[k])
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
