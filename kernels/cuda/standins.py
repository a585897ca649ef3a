"""The names that hand-written GPU kernels import, so that their modules read as the Python that they are. They mean
something only in compiled text (`vocabulary`); tests carry the kernels out with an interpreter of PTX.

A kernel is a function whose annotations say what its parameters are, pointers first, then numbers, and how many threads a
block has. `N` stands for the type of an index, `T` and others for element types, `LANES` and
`IDENTITY` for numbers; `codegen.cuda_call.kernel_text` replaces them."""

from __future__ import annotations

from typing import Any


def _only_in_kernels(*_: Any) -> Any:
    raise RuntimeError("this name means something only in the text of a GPU kernel")


A = I = K = O = T = N = LANES = IDENTITY = PIECE = ACROSS = _only_in_kernels  # noqa: E741
f64 = f32 = f16 = bf16 = i64 = i32 = i16 = i8 = u64 = u32 = u8 = boolean = _only_in_kernels
thread = block = barrier = warp_barrier = shared = pointer = pointer_at = shuffle = fail = _only_in_kernels
load = store = load_lanes = store_lanes = quotient = rest = multiply_add = _only_in_kernels
shared_address = pointer_as = copy_async = copy_commit = copy_wait = load_matrix_x4 = _only_in_kernels
load_matrix_x4_transposed = multiply = pack = quick_exp2 = reassociate_add = reassociate_max = _only_in_kernels
each = registers = _only_in_kernels                    # of what is written out: see `jitgrad.codegen.cuda_unroll`
atomic_max = atomic_add = order_key = count_below = sort_shared = scan_warp = select = _only_in_kernels
