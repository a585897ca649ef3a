"""Where eager execution of an op on device memory begins: `carry_out`.

Views are made here, copies too. Everything else needs a kernel: `install(run)` says who has them. `run(op, arrays, attrs,
gpu)` gets DeviceArrays of one GPU and NumPy arrays that are one number each (0-d, or expanded), and answers with
DeviceArrays as the op's NumPy reference would with NumPy arrays, or with None when it has no kernel for the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import DeviceError, complain
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.runtime.cuda.array import Array, DeviceArray
from jitgrad.runtime.cuda.driver import Gpu

Run = Callable[[Op, Sequence[Array], dict[str, Any], Gpu], Any]

_run: Run | None = None


def install(run: Run | None) -> Run | None:
    """Let `run` carry out ops on GPUs (None: nobody does), in place of whoever did so before, who is returned."""
    global _run
    before, _run = _run, run
    return before


def carry_out(op: Op, arrays: Sequence[Array], attrs: dict[str, Any]) -> Any:
    """The results of an op of which one operand at least is a DeviceArray; DeviceError when operands are on different
    devices, or when nobody has a kernel for it."""
    gpu = common_gpu(op, arrays)
    first = arrays[0]
    if op.view:
        return op.eager(first, **attrs)
    if op is ops.cast and attrs["dtype"].numpy == first.dtype:
        return first.copy(keep_order=True)
    result = None if _run is None else _run(op, arrays, attrs, gpu)
    if result is None:
        raise complain(DeviceError, op.name, "this operation does not run on cuda yet: " + _described(arrays),
                       fix="Move its operands with .cpu() and the result back with .to(device)")
    return result


def common_gpu(op: Op, arrays: Sequence[Array]) -> Gpu:
    """The GPU that all operands are on. One on the CPU may stand beside them if it is a single number, as in PyTorch."""
    gpus = {a.gpu for a in arrays if type(a) is DeviceArray}
    if len(gpus) > 1 or any(type(a) is not DeviceArray and a.size != 1 and any(a.strides) for a in arrays):
        names = sorted({device_of(a) for a in arrays})
        raise complain(DeviceError, op.name, f"operands are on different devices, {' and '.join(names)}: "
                       + _described(arrays), fix=f"Move them to one, with .to({names[-1]!r})")
    return gpus.pop()


def device_of(array: Array) -> str:
    """The device of an array, as types have it."""
    return str(array.device) if type(array) is DeviceArray else "cpu"


def type_of(array: Array) -> TensorType:
    """The type of an array."""
    return TensorType(dtypes.from_numpy(array.dtype), tuple(array.shape), device_of(array))


def _described(arrays: Sequence[Array]) -> str:
    return ", ".join(str(type_of(a)) for a in arrays)
