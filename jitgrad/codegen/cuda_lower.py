"""A node -> the launches of its GPU kernels: `lower` of `codegen.lower`, for a GPU.

Templates are those that fusion chose, each spelled for blocks of threads. Ops with kernels of their own are lowered in the
modules of `FAMILIES`, which enter them into the registry of `cuda_call` when they are imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jitgrad.codegen import (
    cuda_attended,
    cuda_attention,
    cuda_convolution,
    cuda_index,
    cuda_movement,
    cuda_pooling,
    cuda_recurrence,
    cuda_scan,
    cuda_sort,
)
from jitgrad.codegen.cuda_call import lower_library
from jitgrad.codegen.cuda_convolved import lower_alone_by_library, lower_by_library
from jitgrad.codegen.cuda_foreach import lower_foreach
from jitgrad.codegen.cuda_matmul import lower_matmul
from jitgrad.codegen.cuda_product import EXACT, Products
from jitgrad.codegen.cuda_reduce import lower_column, lower_full, lower_row
from jitgrad.codegen.cuda_templates import lower_map
from jitgrad.codegen.kernel import CudaLaunch, CudaLowered
from jitgrad.codegen.region import Region, analyse
from jitgrad.errors import CompileError, complain
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType

FAMILIES = (cuda_attention, cuda_convolution, cuda_index, cuda_movement, cuda_pooling, cuda_recurrence, cuda_scan, cuda_sort)

TEMPLATES: dict[str, Callable[[Region, bool], list[CudaLaunch]]] = {
    "map": lower_map, "row": lower_row, "column": lower_column, "full": lower_full}


def lower_cuda(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any],
               shared: tuple[tuple[int, int], ...] = (), aligned: bool = True, allowed: Products = EXACT,
               arch: str = "sm_80") -> CudaLowered:
    """The kernels of a region or foreach node, or of an op that has its own. `shared` holds pairs (output, input) that
    are one memory. `aligned`: the address of every operand is a multiple of 16 bytes, which accesses of several elements
    need. `allowed`: what may be done about products and convolutions. `arch`: what machine code is made for, all of which
    the kernels may use. CompileError for what has no GPU kernel."""
    if op.kind == "foreach":
        return lower_foreach(inputs, attrs, shared, aligned)
    if op.name in ("matmul", "int_matmul"):
        builder = GraphBuilder(op.name)
        product = builder.run(op, tuple([builder.input(t) for t in inputs]), dict(attrs))
        return lower_matmul(builder.build([product]), (), aligned, allowed, arch)
    if op.kind != "region":
        lowered = (lower_alone_by_library(op, inputs, attrs, aligned, allowed)
                   or cuda_attended.lower_alone_by_library(op, inputs, attrs, aligned, allowed)
                   or lower_library(op, inputs, attrs, shared, aligned, allowed.tf32))
        if lowered is None:
            raise complain(CompileError, op.name, "there is no GPU kernel for it", fix="keep this part on the CPU")
        return lowered
    if attrs["template"] in ("matmul", "update"):
        return lower_matmul(attrs["body"], shared, aligned, allowed, arch)
    if attrs["template"] == "convolution":
        return (lower_by_library(attrs["body"], shared, aligned, allowed)
                or cuda_convolution.lower_convolution(attrs["body"], shared, aligned, allowed.tf32))
    if attrs["template"] == "attention" and (whole := cuda_attended.lower_attention(attrs["body"], aligned, allowed)):
        return whole
    if attrs["template"] not in TEMPLATES:
        raise complain(CompileError, op.name, f"there is no GPU kernel for the template {attrs['template']!r}",
                       fix="keep this part on the CPU")
    region = analyse(attrs["body"], shared)
    launches = TEMPLATES[attrs["template"]](region, aligned)
    return CudaLowered(tuple([launch for launch in launches if launch.grid]), tuple(region.scratch))
