"""Ops with hand-written GPU kernels: the registry, and what their lowerings are written with.

A lowering takes the node as a `Call` and whether pointers are multiples of 16 bytes, and gives its launches, or None where
there is no kernel for such operands: those are carried out by the computer. Kernels are functions in `kernels.cuda`; sizes
are arguments, never part of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_templates import THREADS, WIDE
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLibraryCall, CudaLowered, ErrorWord, Table
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu.template import text

GpuLowering = Callable[[Call, bool], CudaLowered | None]

GPU_LIBRARY: dict[str, GpuLowering] = {}
"""What lowers each op that has GPU kernels of its own."""

GPU_IN_PLACE: set[str] = set()
"""Those whose result may share a slot with operand 0."""

GPU_ANY_TYPE: set[str] = set()
"""Those whose kernels take complex numbers, too."""

_HEADER = re.compile(r"def (\w+)\((args: )?.*?-> block\[(\d+)\]", re.DOTALL)


def lowers_on_gpu(name: str, *, in_place: bool = False, any_type: bool = False) -> Callable[[GpuLowering], GpuLowering]:
    """Enter a function into `GPU_LIBRARY` under the name of an op."""

    def enter(function: GpuLowering) -> GpuLowering:
        GPU_LIBRARY[name] = function
        if in_place:
            GPU_IN_PLACE.add(name)
        if any_type:
            GPU_ANY_TYPE.add(name)
        return function

    return enter


def lower_library(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any], shared: tuple[tuple[int, int], ...],
                  aligned: bool, tf32: bool = False) -> CudaLowered | None:
    """The launches of a node by its own kernels; None where there are none for it. `tf32`: float32 factors may be rounded
    to TF32."""
    function = GPU_LIBRARY.get(op.name)
    if function is None or (any(t.dtype.is_complex for t in inputs) and op.name not in GPU_ANY_TYPE):
        return None
    if shared and (op.name not in GPU_IN_PLACE or shared != ((0, 0),)):
        return None
    lowered = function(Call(inputs, op.result_types(inputs, dict(attrs)), attrs, dict(shared), tf32), aligned)
    launches = [k for k in lowered.launches if isinstance(k, CudaLibraryCall) or k.grid] if lowered else []
    return lowered and replace(lowered, launches=tuple(launches))


def is_wide(call: Call) -> bool:
    """Whether some operand needs an index in int64."""
    return any(t.size >= WIDE for t in (*call.inputs, *call.outputs))


def kernel_text(kernel: Callable[..., Any], wide: bool = False, **types: str) -> str:
    """The text of a kernel for element types by their short names, with indices in int32, in int64 if `wide`."""
    made: str = text(kernel, **types, N="i64" if wide else "i32")
    return made


def gpu_launch(source: str, grid: int, *arguments: Buffer | Table | int, wide: bool = False,
               alignment: int = 16) -> CudaLaunch:
    """A launch of the one function in `source` with `grid` blocks; the error word is added where it takes one.
    `alignment`: of all its pointers, in bytes."""
    header = _HEADER.match(source)
    assert header is not None, "the text has no header of a GPU kernel"
    name, takes_word, threads = header.groups()
    word = (ErrorWord(),) if takes_word else ()
    return CudaLaunch(name, source, grid, int(threads), (*word, *arguments), alignment, wide)


def blocks_for(threads: int) -> int:
    """How many blocks of the usual size have so many threads."""
    return -(-threads // THREADS)
