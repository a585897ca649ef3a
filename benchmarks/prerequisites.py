"""What a machine must have to run on its GPU, and what it has: looked at without installing or importing much.

For machines that reach no package index: ``python -m benchmarks.prerequisites`` prints it, ``tests/run_on_gpu.py`` runs the
tests and training steps on what is there. Standard library only; jitgrad is imported where that can work.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 11)
RANGES = {"numpy": ((2, 0), None), "numba": ((0, 66), (0, 69)), "llvmlite": ((0, 48), (0, 51)), "ml_dtypes": ((0, 5), None)}
"""Packages that jitgrad needs: the first version that works, and the first one that is not known to. Numba 0.62 to 0.65
do for CPUs; their LLVM does not say how many threads a block has, which kernels of large blocks on GPUs rely on."""

OPTIONAL = ("pytest", "hypothesis", "torch", "numba-cuda", "cupy", "triton", "jax")


class Finding(NamedTuple):
    """One prerequisite: what was found, and what is wrong with it ("": nothing)."""

    name: str
    found: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name:<14}{self.found}{'  <-- ' + self.problem if self.problem else ''}"


def findings() -> list[Finding]:
    """All prerequisites in order. With a problem in the first ones jitgrad cannot be imported, and those behind it are left
    out."""
    link_kernels()
    found = [_python(), *[_package(name) for name in RANGES]]
    if not any(f.problem for f in found):
        found += [_linker(), _gpu(), *_libraries()]
    return found + [Finding(name, version(name)) for name in OPTIONAL if version(name)]


def version(name: str) -> str:
    """The installed version of a package, or ""."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def judge(name: str, installed: str) -> str:
    """What is wrong with a version of a package; "" where nothing is."""
    first, last = RANGES[name]
    wanted = f"{_text(first)} or newer" if last is None else f"{_text(first)} to before {_text(last)}"
    if not installed:
        return f"is not installed; {wanted} is needed"
    numbers = tuple([int(n) for n in re.findall(r"\d+", installed)[:2]])
    return "" if first <= numbers and (last is None or numbers < last) else f"is not supported; {wanted} is"


def link_kernels() -> None:
    """In a checkout that is not installed the kernels are looked for beside the other modules: put a link there."""
    place = ROOT / "jitgrad" / "kernels"
    if place.exists():
        return
    try:
        installed = importlib.util.find_spec("jitgrad.kernels") is not None
    except ImportError:
        installed = False
    if not installed:
        place.symlink_to(Path("..") / "kernels", target_is_directory=True)


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _python() -> Finding:
    problem = "" if sys.version_info >= PYTHON else f"is not supported; {_text(PYTHON)} or newer is"
    return Finding("Python", platform.python_version(), problem)


def _package(name: str) -> Finding:
    return Finding(name, version(name), judge(name, version(name)))


def _linker() -> Finding:
    from jitgrad.codegen import cuda_toolchain

    if not cuda_toolchain.is_available():
        return Finding("nvJitLink", "", "is in no package of NVIDIA's (PyTorch with CUDA brings one), in no CUDA toolkit in "
                       f"{cuda_toolchain.TOOLKITS}, and not below CUDA_HOME")
    return Finding("nvJitLink", cuda_toolchain.linker_in_use())


def _gpu() -> Finding:
    from jitgrad import cuda
    from jitgrad.runtime.cuda import driver

    if not driver.available():
        return Finding("GPU", "", driver.why_not())
    names = [f"{cuda.get_device_name(k)} ({'.'.join(map(str, cuda.get_device_capability(k)))})"
             for k in range(cuda.device_count())]
    return Finding("GPU", f"{', '.join(names)}; driver of CUDA {driver.current().version}")


def _libraries() -> list[Finding]:
    """NVIDIA's libraries that are used where they are installed: their files, or their numbers."""
    from jitgrad.runtime.cuda import cublaslt, cudnn

    found = {"cuBLASLt": cublaslt.identity(), "cuDNN": cudnn.identity()}
    return [Finding(name, identity or "not installed; kernels of ours do its work") for name, identity in found.items()]


def main() -> int:
    """Print what was found; 0 if nothing is missing."""
    found = findings()
    print("\n".join(map(str, found)))
    return int(any(f.problem for f in found))


if __name__ == "__main__":
    sys.exit(main())
