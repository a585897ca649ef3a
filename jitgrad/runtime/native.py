"""Object code -> addresses of functions that can be called. Needs neither Numba nor llvmlite.

Every object gets pages of its own (`objectfile` says what is in them), so all of them may define the same symbol `kernel`.
What they need from outside comes from a short list of C library functions. They are written first and run only when nothing
can be written to them any more. Code that was loaded stays until the process ends: threads may still be in it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import platform
from functools import cache
from typing import Any

from jitgrad import config, objectfile
from jitgrad.errors import CompileError, complain

Kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def load(data: bytes, name: str) -> int:
    """The address of `kernel` in an object file; CompileError, naming the kernel, when it is not fit to be loaded."""
    try:
        file = objectfile.check(data, platform.machine())
        memory = mmap.mmap(-1, file.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[:] = file.placed_at(address, symbol_address)
    except objectfile.ObjectError as error:
        raise complain(CompileError, name, f"its object code cannot be loaded: {error}") from None
    if _protect()(address, file.size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise complain(CompileError, name, f"its code may not be run: {os.strerror(ctypes.get_errno())}")
    _immortal(memory)
    return address + file.entry


def assemble(text: str) -> int:
    """The address of `kernel` in LLVM text. Needs llvmlite."""
    import llvmlite.binding as llvm
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
    return load(machine.emit_object(llvm.parse_assembly(text)), "text")


def function(address: int) -> Any:
    """A kernel's address as something that Python can call with (args, begin, end, thread); the GIL is released."""
    return Kernel(address)


@cache
def host_name() -> str:
    """The processor that code is generated for, with its features: part of every cache key."""
    return config.processor().name


def symbol_address(name: str) -> int:
    """The address of a C library function; 0 when there is none of this name."""
    for library in _c_libraries():
        found = getattr(library, name, None)
        if found is not None:
            return ctypes.cast(found, ctypes.c_void_p).value or 0
    return 0


@cache
def _c_libraries() -> tuple[ctypes.CDLL, ...]:
    math = ctypes.util.find_library("m") if platform.system() != "Linux" else "libm.so.6"
    return ctypes.CDLL(None), ctypes.CDLL(math)


@cache
def _protect() -> Any:
    """mprotect of the C library."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return protect


def _immortal(thing: Any) -> Any:
    """`thing`, never to be freed, not even while the interpreter shuts down."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return thing
