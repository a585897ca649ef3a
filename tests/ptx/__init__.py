"""An interpreter of PTX: runs compiled GPU kernels without a GPU, and says what is wrong with them.

In goes PTX, as the compiler wrote it, with a grid and arguments; out come the arrays after the kernel. Every instruction
has the result that the PTX ISA defines, to the bit, but for approximations and tensor cores, which are more accurate here.

    y = execute(ptx, 4, 256, [x, Garbage(x.shape, x.dtype), len(x)])[1]

All accesses are checked: bounds, alignment, memory that was never written, races between threads. `execute` runs a kernel
under several schedules of its warps and compares the results, so that a missing barrier shows in one way or another.
`Machine` is the way to do it step by step: buffers that stay, tables of addresses, pointers that are not aligned.

    errors       what can be wrong
    parse        text -> instructions
    values       types, roundings, conversions
    operations   what instructions on registers compute
    registers, access, warp   moves and carries; memory; shuffles, votes, matrices
    warpgroup, boxes          products in the background; the copy engine and what counts its bytes
    memory       buffers with bounds; shadow: the detector of races
    machine      threads, divergence, barriers, schedules
    sass         what the machine code of a kernel must be like
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import errors
from ptx.errors import Deadlock, Misaligned, OutOfBounds, PtxError, Race, Uninitialized, Unsupported
from ptx.machine import SCHEDULES, launch
from ptx.memory import Buffer, Memory
from ptx.parse import Module, parse

__all__ = ["SCHEDULES", "Buffer", "Deadlock", "Garbage", "Machine", "Misaligned", "OutOfBounds", "PtxError", "Race",
           "Uninitialized", "Unsupported", "errors", "execute", "parse"]


@dataclass(frozen=True, slots=True)
class Garbage:
    """An argument of `execute` that holds nothing before: the kernel has to write all of it, unless it is `partial`."""

    shape: int | tuple[int, ...]
    dtype: Any
    partial: bool = False


Size = int | tuple[int, ...]


class Machine:
    """A GPU with memory of its own: `put` arrays, `launch` kernels, `get` arrays."""

    def __init__(self, text: str | Module, *, races: bool = True):
        self.module = parse(text) if isinstance(text, str) else text
        self.memory = Memory()
        self.memory.races = races
        self.executed = 0
        for variable in self.module.variables.values():
            if variable.data is not None:
                data = np.frombuffer(variable.data, np.uint8)
                self.memory.add(data, variable.name, writable=variable.space != "const")

    def put(self, array: np.ndarray, name: str = "", skew: int = 0) -> Buffer:
        """A buffer with a copy of `array`; its address is `skew` bytes behind a multiple of 2**31."""
        return self.memory.add(np.asarray(array), name or f"buffer {len(self.memory.buffers)}", skew=skew)

    def empty(self, shape: Size, dtype: Any, name: str = "", skew: int = 0) -> Buffer:
        """A buffer of which nothing has been written."""
        return self.memory.add(np.empty(shape, dtype), name or f"buffer {len(self.memory.buffers)}", garbage=True,
                               skew=skew)

    def get(self, buffer: Buffer, partial: bool = False) -> np.ndarray:
        """What a buffer holds; Uninitialized where it was never written, unless `partial`."""
        return buffer.array(partial)

    def launch(self, grid: Size, block: Size, arguments: Sequence[Buffer | int | float], *, name: str | None = None,
               dynamic: int = 0, schedule: str = "together", seed: int = 0, wave: int = 16384) -> None:
        """Run a kernel, the only one of the module or the one called `name`. `dynamic` bytes of shared memory are added;
        blocks run side by side as long as they have at most `wave` threads."""
        name = name or next(iter(self.module.kernels))
        self.executed += launch(self.module, name, self.memory, _three(grid), _three(block), list(arguments),
                                dynamic=dynamic, schedule=schedule, seed=seed, wave=wave)


def _three(size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*sizes, 1, 1, 1)[:3]
    return x, y, z


def execute(text: str | Module, grid: Size, block: Size, arguments: Sequence[Any], *, name: str | None = None,
            dynamic: int = 0, schedules: Sequence[str] = SCHEDULES, races: bool = True, seed: int = 0) -> list[np.ndarray]:
    """The array arguments (arrays and `Garbage`, in order) after a kernel has run. It runs once under each schedule, from
    the same arguments; PtxError where results differ by a bit."""
    module = parse(text) if isinstance(text, str) else text
    results: list[list[np.ndarray]] = []
    for schedule in schedules:
        machine = Machine(module, races=races)
        given = [_give(machine, argument, f"argument {k}") for k, argument in enumerate(arguments)]
        machine.launch(grid, block, given, name=name, dynamic=dynamic, schedule=schedule, seed=seed)
        results.append([machine.get(buffer, isinstance(argument, Garbage) and argument.partial)
                        for buffer, argument in zip(given, arguments) if isinstance(buffer, Buffer)])
        _compare(results[0], results[-1], schedules[0], schedule)
    return results[0]


def _give(machine: Machine, argument: Any, name: str) -> Buffer | int | float:
    if isinstance(argument, Garbage):
        return machine.empty(argument.shape, argument.dtype, name)
    return machine.put(argument, name) if isinstance(argument, np.ndarray) else argument


def _compare(first: list[np.ndarray], second: list[np.ndarray], one: str, other: str) -> None:
    for k, (a, b) in enumerate(zip(first, second)):
        if a.tobytes() != b.tobytes():
            x, y = (v.reshape(-1).view(np.uint8).reshape(a.size, -1) for v in (a, b))
            place = int(np.argmax((x != y).any(1)))
            raise PtxError(f"array {k} differs between the schedules {one!r} and {other!r}, first at element {place}: "
                           f"{a.reshape(-1)[place]} and {b.reshape(-1)[place]}")
