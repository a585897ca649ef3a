"""GPU lowering of index ops."""

from __future__ import annotations

from jitgrad.codegen.call import Call, split
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.kernel import CudaLowered
from jitgrad.kernels.cuda import index


@lowers_on_gpu("take")
def lower_take(call: Call, aligned: bool) -> CudaLowered:
    x, places = call.inputs
    outer, size, inner = split(x.shape, call.attrs["axis"])
    elements, wide = outer * places.size * inner, is_wide(call)
    source = kernel_text(index.take, wide, T=x.dtype.short, I=places.dtype.short)
    return CudaLowered((gpu_launch(source, blocks_for(elements), call.input(0), call.input(1), call.output(), elements, size,
                                   places.size, inner, wide=wide, alignment=x.dtype.itemsize),))
