"""GPU kernel text -> PTX -> machine code. The only file that imports NVIDIA's packages, and it does so when it is used.

In goes the text of one Python function with plain parameters, pointers and numbers, and their types as short names
(``("f32*", "f32*", "i32")``); `compile_ptx` gives the PTX of a kernel of that name. `link` makes one cubin for one
architecture from any number of PTX texts and says what each kernel needs: registers, spilled bytes, shared memory.
`disassemble` lists the instructions of a cubin. None of this needs a GPU or its driver.

The text may use ``cuda`` (``cuda.threadIdx.x``, ``cuda.shared.array`` …), the element types as casts (``f32(0.5)``), and
the names of `kernels.cuda.intrinsics`, besides those that the caller gives. Literals have to be cast: a bare ``0.5`` is a
float64 in Numba's eyes. Multiplications and additions are contracted only where the text says ``multiply_add``, so that
results are those of the CPU.

Numba's CUDA target is a package of its own, numba-cuda, and changes between versions: what is not its public interface
is touched in `_stand_ins` alone, and only where it is there.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np

from jitgrad.errors import CompileError, complain
from jitgrad.kernels.cuda import intrinsics, matrix

INSTALL = "pip install 'jitgrad[cuda]'"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
"""What can be asked for. A cubin runs on its own generation; one with an ``a`` on exactly that processor."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes: registers per thread; bytes of its stack, written and read for spilled registers,
    per thread; bytes of shared memory per block that are known at compile time, with the 1,024 that processors from sm_90 on
    keep for themselves."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code for one architecture, with the kernels in it by name."""

    code: bytes
    architecture: str
    kernels: Mapping[str, Resources]


# --- text -> PTX -------------------------------------------------------------------------------------------------------

def compile_ptx(source: str, name: str, signature: Sequence[str], *, architecture: str = "sm_80",
                names: Mapping[str, Any] | None = None, threads: int | None = None, blocks: int | None = None,
                contract: bool = False, fast: bool = False) -> str:
    """PTX of the one function in `source`, as a kernel called `name`.

    `signature` has one short name per parameter, with ``*`` for a pointer. `names` are more names that the text may use;
    plain Python functions among them are compiled with it. `threads` is the largest number of threads of a block that it
    will be launched with, `blocks` how many blocks a multiprocessor should hold. `contract` lets the compiler contract
    ``a * b + c``; `fast` allows approximations and flushes subnormal numbers as well. CompileError names the kernel."""
    cuda = _numba_cuda()
    capability = _capability(architecture)
    function = _define(source, name, {**vocabulary(), **_device_functions(names or {})})
    types = tuple(_parameter_type(spelled, name) for spelled in signature)
    bounds = threads if threads is None or blocks is None else (threads, blocks)
    try:
        with _stand_ins(capability, contract or fast):
            text, _ = cuda.compile_ptx(function, types, cc=capability, fastmath=fast, launch_bounds=bounds)
    except Exception as error:
        raise _explain(error, name, source) from None
    return _rename(text, name, architecture)


@cache
def vocabulary() -> dict[str, Any]:
    """Every name that the text of a GPU kernel may use, but for those that its caller gives."""
    definitions = {**intrinsics.NAMES, **matrix.NAMES}
    casts = {short: kind for short, kind in intrinsics.ELEMENTS.items() if short not in ("bool", "bf16", "f16")}
    taught = {name: intrinsic(definition) for name, definition in definitions.items()}
    return {"cuda": _numba_cuda(), **casts, "boolean": intrinsics.ELEMENTS["bool"], **taught}


def intrinsic(definition: Callable[..., Any]) -> Any:
    """A name for kernel text from a definition as in `kernels.cuda.intrinsics`."""
    return _extending().intrinsic(definition)


def _device_functions(names: Mapping[str, Any]) -> dict[str, Any]:
    """`names`, with plain Python functions known to the compiler."""
    for value in names.values():
        if isinstance(value, type(_device_functions)):
            _register(value)
    return dict(names)


@cache
def _register(function: Callable[..., Any]) -> None:
    found = _extending()
    register = getattr(found, "register_jitable", None)          # older versions leave it to Numba
    (register or import_module("numba.extending").register_jitable)(function)


def _define(source: str, name: str, names: dict[str, Any]) -> Callable[..., None]:
    """The function that `source` defines; its text is only known to the compiler."""
    known = set(names)
    try:
        exec(compile(source, f"<kernel {name}>", "exec"), names)
    except SyntaxError as error:
        raise complain(CompileError, name, f"kernel text is not Python: {error}") from None
    defined = [value for key, value in names.items() if key not in known and key != "__builtins__"]
    if len(defined) != 1:
        raise complain(CompileError, name, f"kernel text must define one function, it defines {len(defined)}")
    return cast("Callable[..., None]", defined[0])


def _parameter_type(spelled: str, name: str) -> Any:
    """The compiler's type for ``f32`` (a number) or ``f32*`` (a pointer)."""
    elements = intrinsics.ELEMENTS
    element = elements.get(spelled.removesuffix("*"))
    if element is None or (spelled in ("bf16", "f16")):
        raise complain(CompileError, name, f"{spelled!r} is no type of a parameter",
                       fix=f"Use one of {', '.join(elements)}, with * for a pointer; 16-bit floats only as pointers")
    return intrinsics.types.CPointer(element) if spelled.endswith("*") else element


def _rename(text: str, name: str, architecture: str) -> str:
    """The kernel and what belongs to it called `name` in place of the compiler's own mangled names, which count
    compilations; so it can be found in a cubin, shares no memory with others, and equal kernels have equal texts."""
    mangled = re.findall(r"\.visible \.entry (\S+?)\(", text)
    if len(mangled) != 1:
        raise complain(CompileError, name, f"one kernel was to be compiled, there are {len(mangled)}")
    text = text.replace(mangled[0], name)
    text = re.sub(r"(?m)^\.common \.global [^\n]*NumbaEnv[^\n]*\n", "", text)
    text = re.sub(r"(?m)^\.visible (\.shared )", r"\1", text)
    for k, shared in enumerate(dict.fromkeys(re.findall(r"\w*_cudapy_smem_\d+", text))):
        text = re.sub(rf"\b{shared}\b", f"{name}_shared{k}", text)
    return re.sub(r"\.target sm_\w+", f".target {architecture}", text)


def _capability(architecture: str) -> tuple[int, int]:
    if architecture not in ARCHITECTURES:
        raise complain(CompileError, "cuda", f"no architecture {architecture!r}", fix=f"Use one of {ARCHITECTURES}")
    number = int(re.sub(r"\D", "", architecture))
    return number // 10, number % 10


def _explain(error: Exception, name: str, source: str) -> CompileError:
    """A CompileError with the gist of the compiler's message; the whole of it and the text go into notes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Failed in", "File ", "def ", "-", "^"))]
    problem = complain(CompileError, name, f"the kernel cannot be compiled: {telling[0] if telling else error!r}")
    problem.add_note("\n".join(lines))
    problem.add_note(source)
    return cast(CompileError, problem)


# --- PTX -> machine code -----------------------------------------------------------------------------------------------

def link(texts: Sequence[str], architecture: str) -> Cubin:
    """One cubin for `architecture` with the kernels of all `texts`, whose names have to differ. CompileError with what the
    assembler says, where it refuses one."""
    _capability(architecture)
    try:
        code, log = _run_linker(texts, [f"-arch={architecture}", "-Xptxas=-v"])
    except _Refused as refused:
        raise complain(CompileError, "cuda", f"not to be assembled for {architecture}: {refused}") from None
    return Cubin(code, architecture, _resources(log, _section_sizes(code)))


class _Refused(Exception):
    """What the linker says of texts that it does not take."""


def _run_linker(texts: Sequence[str], options: list[str]) -> tuple[bytes, str]:
    """The cubin and the report of one run. The library is asked directly: layers above it look for a driver first."""
    linker = _linker()

    def read(size: Callable[[int], int], get: Callable[[int, bytearray], None]) -> bytes:
        buffer = bytearray(size(handle))
        get(handle, buffer)
        return bytes(buffer)

    try:
        handle = linker.create(len(options), options)
    except linker.nvJitLinkError as error:                   # an architecture that this version does not know
        raise _Refused(str(error)) from None
    try:
        for text in texts:
            data, kernels = text.encode(), re.findall(r"\.entry (\S+?)\(", text)
            linker.add_data(handle, linker.InputType.PTX, data, len(data), ", ".join(kernels))
        linker.complete(handle)
        log = read(linker.get_info_log_size, linker.get_info_log).decode()
        return read(linker.get_linked_cubin_size, linker.get_linked_cubin), log
    except linker.nvJitLinkError as error:
        said = read(linker.get_error_log_size, linker.get_error_log).decode().replace("\0", "").strip()
        raise _Refused(" ".join(said.split()) or str(error)) from None
    finally:
        linker.destroy(handle)


def _section_sizes(elf: bytes) -> dict[str, int]:
    """Bytes of every section of a cubin, which is a little-endian ELF64 file."""
    start, = struct.unpack_from("<Q", elf, 0x28)
    step, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + k * step) for k in range(count)]
    strings = elf[headers[names][4]:]
    return {strings[at:strings.index(0, at)].decode(): size for at, _, _, _, _, size in headers}


def _resources(log: str, sections: dict[str, int]) -> dict[str, Resources]:
    """The assembler's report, one entry per kernel. Shared memory gets its place when all is linked, so the report does not
    have it; sections do."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match.group(1)) if match else 0

        name = part[:part.index("'")]
        found[name] = Resources(
            number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"), sections.get(f".nv.shared.{name}", 0))
    return found


def disassemble(cubin: Cubin) -> dict[str, list[str]]:
    """The machine instructions of every kernel, and of functions that the assembler added, by name: lines such as
    ``LDG.E.128 R4, desc[UR6][R2.64]``. CompileError where NVIDIA's nvdisasm is not installed."""
    tool = _disassembler()
    if tool is None:
        raise complain(CompileError, "cuda", "nvdisasm is not installed", fix="pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin.code)
        done = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=True)
    listing: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            listing[section.group(1)] = []
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if instruction and listing:
            listing[next(reversed(listing))].append(instruction.group(1))
    return listing


@cache
def _disassembler() -> str | None:
    """The program of NVIDIA's package, which puts it beside its libraries, or the one on the path."""
    for folder in sys.path:
        found = sorted(Path(folder or ".").glob("nvidia/*/bin/nvdisasm*"))
        if found:
            return str(found[0])
    return shutil.which("nvdisasm")


# --- NVIDIA's packages -------------------------------------------------------------------------------------------------

def is_available() -> bool:
    """True where the packages that compile for GPUs are installed; a GPU is not needed."""
    try:
        _numba_cuda()
        _linker()
    except CompileError:
        return False
    return True


def versions() -> dict[str, str]:
    """The packages whose versions decide what text compiles to; part of the key of what is stored."""
    wanted = ("numba", "numba-cuda", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink",
              "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
    return {name: metadata.version(name) for name in wanted if _installed(name)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def _numba_cuda() -> ModuleType:
    """numba-cuda, which takes the place of Numba's own, deprecated target."""
    if not _installed("numba-cuda"):
        raise complain(CompileError, "cuda", "the package numba-cuda is not installed", fix=INSTALL)
    with warnings.catch_warnings(), _numpy_names():
        warnings.simplefilter("ignore")
        try:
            from numba import cuda
        except Exception as error:
            raise complain(CompileError, "cuda", f"numba-cuda cannot be imported: {error}", fix=INSTALL) from error
    _register_models()
    return cuda


def _extending() -> ModuleType:
    _numba_cuda()
    from numba.cuda import extending

    return extending


def _register_models() -> None:
    """In memory, 16-bit floats are integers of 16 bits."""
    found: Any = import_module("numba.cuda.extending")
    base: Any = found.models.PrimitiveModel

    def initialize(self: Any, manager: Any, frontend_type: Any) -> None:
        base.__init__(self, manager, frontend_type, intrinsics.I16)

    model = type("StorageFloatModel", (base,), {"__init__": initialize})
    found.register_model(intrinsics.StorageFloat)(model)


@cache
def _linker() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cuda.bindings import nvjitlink
            nvjitlink.version()                              # finds the library
    except (ImportError, RuntimeError) as error:
        raise complain(CompileError, "cuda", f"nvJitLink cannot be loaded: {error}", fix=INSTALL) from None
    return nvjitlink


@contextmanager
def _numpy_names() -> Iterator[None]:
    """numba-cuda uses a name that NumPy 2.5 has removed."""
    missing = not hasattr(np, "row_stack")
    if missing:
        setattr(np, "row_stack", np.vstack)  # noqa: B010
    try:
        yield
    finally:
        if missing:
            delattr(np, "row_stack")


@contextmanager
def _stand_ins(capability: tuple[int, int], contract: bool) -> Iterator[None]:
    """For the time of one compilation: device functions ask for a device, and are told the one compiled for; NVVM is told
    whether it may contract, for which numba-cuda has no option."""
    dispatcher: Any = import_module("numba.cuda.dispatcher")
    nvvm: Any = import_module("numba.cuda.cudadrv.nvvm")
    with _compiler_lock(), _numpy_names(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        device, compile_ir = dispatcher.get_current_device, nvvm.compile_ir
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        nvvm.compile_ir = lambda text, **options: compile_ir(text, **{"fma": contract, **options})
        try:
            yield
        finally:
            dispatcher.get_current_device, nvvm.compile_ir = device, compile_ir


def _compiler_lock() -> Any:
    """numba-cuda has a lock of its own; versions before it use Numba's."""
    try:
        return import_module("numba.cuda.core.compiler_lock").global_compiler_lock
    except ImportError:
        return import_module("numba.core.compiler_lock").global_compiler_lock
