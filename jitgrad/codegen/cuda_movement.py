"""GPU lowering of movement that is no view: concat, pad, slice_update. Other movement belongs to regions.

Elements are only carried about, so their type does not matter: kernels see integers, of 16 bytes at once where rows, their
distances and all pointers are multiples of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered, Table
from jitgrad.codegen.library_movement import Dimension, Shape, merge, offset_of, products, strides
from jitgrad.dtypes import DType
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cuda import movement


@dataclass(frozen=True, slots=True)
class Unit:
    """What a thread carries at once: `lanes` integers of the type `short`, which are `elements` elements of an array."""

    short: str
    lanes: int
    elements: int
    nbytes: int


_INTEGERS = {1: "i8", 2: "i16", 4: "i32", 8: "i64"}


def unit_of(dtype: DType, aligned: bool, counts: Sequence[int]) -> Unit:
    """The largest unit of at most 16 bytes of which all `counts` of elements are multiples. Unless pointers are `aligned`,
    they are multiples of an element alone."""
    nbytes = gcd(16, *[n * dtype.itemsize for n in counts]) if aligned else dtype.itemsize
    width = min(nbytes, 8)
    return Unit(_INTEGERS[width], nbytes // width, nbytes // dtype.itemsize, nbytes)


def place(x: Buffer, type: TensorType, o: Buffer, shape: Shape, start: Shape, step: Shape, aligned: bool,
          wide: bool) -> CudaLaunch:
    """A launch that copies all of x into a result of `shape`, from `start` on in steps of `step`."""
    target, first = strides(shape), offset_of(start, strides(shape))
    *outer, last = merge([Dimension(*d) for d in zip(type.shape, strides(type.shape), products(target, step), strict=True)])
    unit = unit_of(type.dtype, aligned, [first, *[d.target for d in outer], last.size if last.target == 1 else 1])
    per = unit.elements
    table = Table(tuple([n for d in outer for n in (d.size, d.target // per)]) or (1, 0))
    source = kernel_text(movement.place_rows, wide, T=unit.short, LANES=str(unit.lanes))
    units = type.size // per
    return gpu_launch(source, blocks_for(units), x, o, table, units, last.size // per, first // per, last.target,
                      len(outer), wide=wide, alignment=unit.nbytes)


def copy_unless_shared(call: Call, aligned: bool) -> tuple[CudaLaunch, ...]:
    """The launch that copies operand 0 to the result; none where both are one slot."""
    x = call.inputs[0]
    whole = x.with_shape((x.size,))
    return () if 0 in call.shared else (
        place(call.input(0), whole, call.output(), whole.shape, (0,), (1,), aligned, is_wide(call)),)


@lowers_on_gpu("concat", any_type=True)
def lower_concat(call: Call, aligned: bool) -> CudaLowered:
    (out,), axis = call.outputs, call.attrs["axis"]
    launches, first = [], 0
    for i, x in enumerate(call.inputs):
        start = tuple([first if k == axis else 0 for k in range(x.ndim)])
        if x.size:
            launches.append(place(call.input(i), x, call.output(), out.shape, start, (1,) * x.ndim, aligned, is_wide(call)))
        first += x.shape[axis]
    return CudaLowered(tuple(launches))


@lowers_on_gpu("slice_update", in_place=True, any_type=True)
def lower_slice_update(call: Call, aligned: bool) -> CudaLowered:
    x, update = call.inputs
    copied = copy_unless_shared(call, aligned)
    if not update.size:
        return CudaLowered(copied)
    inside = place(call.input(1), update, call.output(), x.shape, call.attrs["start"], call.attrs["step"], aligned,
                   is_wide(call))
    return CudaLowered((*copied, inside))


@lowers_on_gpu("pad", any_type=True)
def lower_pad(call: Call, aligned: bool) -> CudaLowered:
    """Dimensions that nothing is added to are one with the dimension in front of them."""
    (x,), (out,), low = call.inputs, call.outputs, call.attrs["low"]
    dims: list[tuple[int, int, int]] = []                   # in the result, in front of x, in x
    for made, before, kept in zip(out.shape, low, x.shape, strict=True):
        if made == kept and dims:
            dims[-1] = (dims[-1][0] * kept, dims[-1][1] * kept, dims[-1][2] * kept)
        else:
            dims.append((made, before, kept))
    *outer, last = dims or [(1, 0, 1)]
    unit = unit_of(x.dtype, aligned, last)
    per = unit.elements
    dims = [*outer, (last[0] // per, last[1] // per, last[2] // per)]
    steps = strides([kept for _, _, kept in dims])
    table = Table(tuple([n for (made, before, kept), step in zip(dims, steps, strict=True)
                         for n in (made, before, kept, step)]))
    units, wide = out.size // per, is_wide(call)
    source = kernel_text(movement.pad_rows, wide, T=unit.short, LANES=str(unit.lanes))
    return CudaLowered((gpu_launch(source, blocks_for(units), call.input(0), call.output(), table, units, len(dims),
                                   wide=wide, alignment=unit.nbytes),))
