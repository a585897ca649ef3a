"""GPU lowering of running sums and products: cumsum, cumprod."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jitgrad.codegen.call import Call, split
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.dtypes import DType, float32, float64, int64
from jitgrad.kernels.cuda import scan

SHORT = 16
"""A line of at most so many elements is a thread's."""

PIECE, PIECES = 512, 8192
"""The least elements of a piece, and how many pieces keep all multiprocessors busy."""

WARPS = 8
"""Of a block."""


@dataclass
class Scan:
    """The launches of a scan so far, and the scratch memory of the totals, behind any that there is."""

    call: Call
    product: bool
    launches: list[CudaLaunch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def lower(self, x: Buffer, o: Buffer, dtypes: tuple[DType, DType], outer: int, size: int, inner: int) -> None:
        """Scan x[outer, size, inner] into o; `dtypes` are theirs."""
        lines, total = outer * inner, accumulated(dtypes[0])
        if size <= SHORT or (inner > 1 and lines >= PIECES):
            self.launch(scan.scan_columns, blocks_for(lines), dtypes, x, o, lines, size, inner)
            return
        length = max(PIECE, -(-size * lines // PIECES))
        length = size if lines >= PIECES // 2 else -(-length // 128) * 128
        count = -(-size // length)
        before, numbers = x, (lines * count, count, size, inner, length)
        if count > 1:
            totals, before = self.new_scratch(total, lines * count), self.new_scratch(total, lines * count)
            self.launch(scan.piece_totals, -(-lines * count // WARPS), dtypes, x, totals, *numbers)
            self.lower(totals, before, (total, total), lines, count, 1)
        self.launch(scan.scan_pieces, -(-lines * count // WARPS), dtypes, x, before, o, *numbers)

    def new_scratch(self, dtype: DType, count: int) -> Buffer:
        self.scratch.append(dtype.itemsize * count)
        return self.call.scratch(len(self.scratch) - 1)

    def launch(self, kernel: Callable[..., Any], grid: int, dtypes: tuple[DType, DType],
               *arguments: Buffer | int) -> None:
        dtype, result = dtypes
        total, wide = accumulated(dtype), is_wide(self.call)
        identity = "1" if self.product else "-0.0" if dtype.is_floating_point else "0"
        source = kernel_text(kernel, wide, T=dtype.short, O=result.short, A=total.short, IDENTITY=identity)
        self.launches.append(gpu_launch(scan.for_products(source) if self.product else source, grid, *arguments, wide=wide,
                                        alignment=max(dtype.itemsize, result.itemsize)))


def accumulated(dtype: DType) -> DType:
    """What sums are kept in on the way: integers in int64, of which a result has the lower bits."""
    return (float64 if dtype is float64 else float32) if dtype.is_floating_point else int64


def lower_scan(call: Call, product: bool) -> CudaLowered:
    x = call.inputs[0]
    if not x.size:
        return CudaLowered(())
    lowering = Scan(call, product)
    lowering.lower(call.input(0), call.output(), (x.dtype, x.dtype), *split(x.shape, call.attrs["axis"]))
    return CudaLowered(tuple(lowering.launches), tuple(lowering.scratch))


@lowers_on_gpu("cumsum")
def lower_cumsum(call: Call, aligned: bool) -> CudaLowered:
    return lower_scan(call, False)


@lowers_on_gpu("cumprod")
def lower_cumprod(call: Call, aligned: bool) -> CudaLowered:
    return lower_scan(call, True)
