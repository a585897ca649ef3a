"""PTX -> machine code, and a look at it. The only file that uses NVIDIA's packages, and it does so when it is used.

`link` makes one cubin for one architecture from any number of PTX texts, as `codegen.cuda_native` writes them, and says
what each kernel needs: registers, spilled bytes, shared memory. `disassemble` lists the instructions of a cubin. None of
this needs a GPU or its driver; where there is one, its driver assembles PTX as well.

The linker is one shared library, nvJitLink, called as its header says.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jitgrad.errors import CompileError, complain

INSTALL = "pip install 'jitgrad[cuda]'"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
"""What can be asked for. A cubin runs on its own generation; one with an ``a`` on exactly that processor."""

TOOLKITS = Path("/usr/local")
_LIBRARY = "libnvJitLink.so"

PTX = 2
"""What the linker calls a text of PTX."""


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


# --- PTX -> machine code -----------------------------------------------------------------------------------------------

def link(texts: Sequence[str], architecture: str) -> Cubin:
    """One cubin for `architecture` with the kernels of all `texts`, whose names have to differ. CompileError with what the
    assembler says, where it refuses one."""
    if architecture not in ARCHITECTURES:
        raise complain(CompileError, "cuda", f"no architecture {architecture!r}", fix=f"Use one of {ARCHITECTURES}")
    try:
        code, log = _run_linker(texts, [f"-arch={architecture}", "-Xptxas=-v"])
    except _Refused as refused:
        raise complain(CompileError, "cuda", f"not to be assembled for {architecture}: {refused}") from None
    return Cubin(code, architecture, _resources(log, _section_sizes(code)))


class _Refused(Exception):
    """What the linker says of texts that it does not take."""


class _Session:
    """One run of the linker, from the first text to the cubin. `_Refused` where a call fails."""

    def __init__(self, options: Sequence[str]):
        self.library, self.handle = _linker(), ctypes.c_void_p()
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        self.check(self.library.nvJitLinkCreate(ctypes.byref(self.handle), len(options), given))

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.nvJitLinkDestroy(ctypes.byref(self.handle))

    def add(self, text: str) -> None:
        data, kernels = text.encode(), re.findall(r"\.entry (\S+?)\(", text)
        self.check(self.library.nvJitLinkAddData(self.handle, PTX, data, ctypes.c_size_t(len(data)),
                                                 ", ".join(kernels).encode()))

    def complete(self) -> None:
        self.check(self.library.nvJitLinkComplete(self.handle))

    def read(self, what: str) -> bytes:
        """What the session has to say: ``InfoLog``, ``ErrorLog``, ``LinkedCubin``."""
        size = ctypes.c_size_t()
        if getattr(self.library, f"nvJitLinkGet{what}Size")(self.handle, ctypes.byref(size)):
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvJitLinkGet{what}")(self.handle, buffer)
        return buffer.raw

    def check(self, status: int) -> None:
        if status:
            said = self.read("ErrorLog").decode().replace("\0", "") if self.handle else ""
            raise _Refused(" ".join(said.split()) or f"nvJitLink gives the error {status}")


def _run_linker(texts: Sequence[str], options: Sequence[str]) -> tuple[bytes, str]:
    """The cubin and the report of one run."""
    with _Session(options) as session:
        for text in texts:
            session.add(text)
        session.complete()
        return session.read("LinkedCubin"), session.read("InfoLog").decode()


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


def disassemble(cubin: Cubin, labels: bool = False) -> dict[str, list[str]]:
    """The machine instructions of every kernel, and of functions that the assembler added, by name: lines such as
    ``LDG.E.128 R4, desc[UR6][R2.64]``, and with `labels` such as ``.L_x_3:`` in front of where branches go. CompileError
    where NVIDIA's nvdisasm is not installed."""
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
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;" + r"|(\.L_\w+:)" * labels, line)
        if instruction and listing:
            listing[next(reversed(listing))].append(instruction.group(1) or instruction.group(2))
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
    """True where the package that links for GPUs is installed; a GPU is not needed."""
    try:
        _linker()
    except CompileError:
        return False
    return True


def versions() -> dict[str, str]:
    """The packages whose versions decide what text compiles to; part of the key of what is stored."""
    found = {}
    for name in ("numba", "llvmlite", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _linker() -> Any:
    """The library, from wherever it can be loaded first."""
    for name in linker_places():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise complain(CompileError, "cuda", "the library nvJitLink is not installed", fix=INSTALL)


def linker_in_use() -> str:
    """The file of the library that links."""
    return str(_linker()._name)


def linker_places() -> list[str]:
    """Where nvJitLink may be, the likeliest first: in a package of NVIDIA's (ours, or one that came with PyTorch), where the
    system finds it, in a CUDA toolkit, beside Python."""
    packages = [file for folder in sys.path for file in sorted(Path(folder or ".").glob(f"nvidia/*/lib/{_LIBRARY}*"))]
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits = [*named, *sorted(TOOLKITS.glob("cuda*"), reverse=True), Path(sys.prefix)]
    installed = [file for root in toolkits for part in ("lib64", "targets/*/lib", "lib")
                 for file in sorted(root.glob(f"{part}/{_LIBRARY}*"))]
    return [*map(str, packages), f"{_LIBRARY}.13", f"{_LIBRARY}.12", *map(str, installed)]
