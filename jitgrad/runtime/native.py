"""Object code -> addresses of functions that can be called. Needs llvmlite, never Numba.

Every object gets a library of its own inside one ORC JIT, so all of them may define the same symbol `kernel`. What they
need from outside comes from a short list of C library functions. An object is checked before LLVM's loader sees it,
because that loader crashes on malformed files. Code that was loaded stays until the process ends: threads may still be
in it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import platform
import threading
from functools import cache
from typing import Any

from jitgrad import config, objectfile
from jitgrad.errors import CompileError, complain

Kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

_numbers = itertools.count()
_lock = threading.Lock()


def load(data: bytes, name: str) -> int:
    """The address of `kernel` in an object file; CompileError, naming the kernel, when it is not fit to be loaded."""
    try:
        objectfile.check(data, platform.machine())
    except objectfile.ObjectError as error:
        raise complain(CompileError, name, f"its object code cannot be loaded: {error}") from None
    with _lock:
        return _link(data)


def assemble(text: str, symbol: str) -> int:
    """The address of the function `symbol` in LLVM text, which must need nothing from outside."""
    import llvmlite.binding as llvm
    with _lock:
        builder = llvm.JITLibraryBuilder().add_ir(text).export_symbol(symbol)
        return int(_immortal(builder.link(_linker(), f"jitgrad_{next(_numbers)}"))[symbol])


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
def _linker() -> Any:
    import llvmlite.binding as llvm
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return _immortal(llvm.create_lljit_compiler(machine, suppress_errors=True))


def _link(data: bytes) -> int:
    import llvmlite.binding as llvm
    _, needed = objectfile.symbols(data, platform.machine())
    builder = llvm.JITLibraryBuilder().add_object_img(data).export_symbol(objectfile.SYMBOL)
    for symbol in sorted(needed):
        builder.import_symbol(symbol, symbol_address(symbol))
    library = _immortal(builder.link(_linker(), f"jitgrad_{next(_numbers)}"))
    return int(library[objectfile.SYMBOL])


def _immortal(thing: Any) -> Any:
    """`thing`, never to be freed, not even while the interpreter shuts down."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return thing
