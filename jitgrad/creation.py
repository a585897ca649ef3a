"""Functions that make Tensors: from Python values and NumPy arrays, filled, counted, random.

Dtypes are inferred as PyTorch does: floats become the default dtype, ints int64, bools bool; a NumPy array keeps its
own. Filled and random Tensors are results of ops, so under ``compile`` they are part of the graph. """

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.devices import chosen
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.functional import random
from jitgrad.functional.core import (
    Operand,
    as_operand,
    cast,
    install_tensor,
    is_number,
    made_on,
    number_category,
    number_dtype,
    require_shape,
    sizes_of,
)
from jitgrad.functional.elementwise import add, mul
from jitgrad.functional.methods import filled
from jitgrad.ops.builders import broadcast
from jitgrad.runtime.cuda import dlpack, streams
from jitgrad.tensor import Tensor

__all__ = [
    "arange", "as_tensor", "asarray", "empty", "empty_like", "eye", "from_dlpack", "from_numpy", "full", "full_like",
    "linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like",
]


def _unplaced(array: np.ndarray) -> Tensor:
    """A Tensor for `functional`, which makes tables of numbers that go where they are needed."""
    made = Tensor(array)
    made._unplaced = True
    return made


def _finish(x: Tensor, requires_grad: bool, device: Any = None) -> Tensor:
    """A leaf with what was asked for."""
    where = chosen(device)
    if where is not None:
        x = x._moved(where)
    x._unplaced = False
    if requires_grad:
        x.requires_grad = True
    return x


# from values

def tensor(data: Any, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A new Tensor with a copy of `data`: a number, nested lists of numbers or Tensors, a NumPy array, a Tensor."""
    if isinstance(data, Tensor):
        copied = data.detach().to(data.device if device is None else device, dtype or data.dtype, copy=True)
        return _finish(copied, requires_grad, copied.device)
    if is_number(data):
        scalar = as_operand(data, dtype or _scalar_dtype(data))
        return _finish(scalar, requires_grad, device)
    array = _array_of(data)
    wanted = dtype or _inferred(data, array)
    return _finish(Tensor(np.array(array, dtype=wanted.numpy, order="C")), requires_grad, device)


install_tensor(_unplaced, tensor)


def _scalar_dtype(value: Any) -> DType:
    return dtypes.from_numpy(value.dtype) if isinstance(value, np.generic) else number_dtype(value)


def _array_of(data: Any) -> np.ndarray:
    """Nested sequences as an array; Tensors in them are read."""
    if isinstance(data, np.ndarray):
        return data
    try:
        return np.asarray(_plain(data))
    except ValueError as error:
        raise complain(ShapeError, "tensor", f"nested lists differ in length ({error})") from None


def _plain(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.numpy(force=True)
    if isinstance(data, (list, tuple)) and any(isinstance(v, (list, tuple, Tensor)) for v in data):
        return [_plain(v) for v in data]
    if is_number(data) and hasattr(data, "_traced_number"):
        return data.specialize()
    return data


def _inferred(data: Any, array: np.ndarray) -> DType:
    """The dtype of the Tensor of `data`: an array's own, or the one that its Python numbers stand for."""
    if isinstance(data, np.ndarray):
        return dtypes.from_numpy(array.dtype)
    if array.dtype.kind in "OUS":
        raise complain(DTypeError, "tensor", f"cannot make a tensor of {type(data).__name__} with elements that are no "
                                             "numbers")
    inner = data
    while isinstance(inner, (list, tuple)) and inner:
        inner = inner[0]
    if isinstance(inner, (np.ndarray, np.generic, Tensor)):
        return dtypes.from_numpy(array.dtype)
    if array.size == 0:
        return dtypes.get_default_dtype()
    return number_dtype(array.dtype.type(0))


def as_tensor(data: Any, dtype: DType | None = None, device: Any = None) -> Tensor:
    """`data` as a Tensor, sharing memory with a Tensor or array of the right dtype."""
    if isinstance(data, Tensor):
        shared: Tensor = data.to(data.device if device is None else device, dtype or data.dtype)
        return shared
    if hasattr(data, "__cuda_array_interface__"):
        return as_tensor(Tensor(dlpack.from_interface(data)), dtype, device)
    if isinstance(data, np.ndarray) and (dtype is None or dtype is dtypes.from_numpy(data.dtype)):
        return _finish(from_numpy(data), False, device)
    return tensor(data, dtype=dtype, device=device)


asarray = as_tensor


def from_numpy(ndarray: np.ndarray) -> Tensor:
    """A Tensor that shares memory with a NumPy array."""
    if not isinstance(ndarray, np.ndarray):
        raise complain(DTypeError, "from_numpy", f"expected a NumPy array, got {type(ndarray).__name__}",
                       fix="Did you mean jitgrad.tensor(x)?")
    return Tensor(ndarray)


def from_dlpack(ext_tensor: Any) -> Tensor:
    """A Tensor that shares memory with an array that speaks DLPack, in CPU memory or on a GPU: PyTorch's, JAX's, CuPy's …"""
    if not hasattr(ext_tensor, "__dlpack__"):
        raise complain(DTypeError, "from_dlpack", f"a {type(ext_tensor).__name__} does not speak DLPack",
                       fix="Did you mean jitgrad.tensor(x)?")
    kind, index = ext_tensor.__dlpack_device__()
    if kind == dlpack.CUDA:
        stream = streams.current_stream(index).handle or 1            # 1 is DLPack's number for the default stream
        return Tensor(dlpack.import_capsule(ext_tensor.__dlpack__(stream=stream)))
    return Tensor(np.from_dlpack(ext_tensor))


def scalar_tensor(value: Operand, *, dtype: DType | None = None, device: Any = None) -> Tensor:
    """A 0-d Tensor."""
    return tensor(value, dtype=dtype or dtypes.get_default_dtype(), device=device)


# filled

def _sizes(op: str, size: tuple[Any, ...]) -> tuple[int, ...]:
    shape = sizes_of(size)
    if shape and min(shape) < 0:
        require_shape(op, False, f"sizes must not be negative, got {list(shape)}")
    return shape


def full(size: Any, fill_value: Operand, *, dtype: DType | None = None, device: Any = None,
         requires_grad: bool = False) -> Tensor:
    """`fill_value` everywhere; by default with the dtype that it stands for."""
    return _filled("full", _sizes("full", (size,)), fill_value, dtype or _value_dtype(fill_value), device,
                   requires_grad)


def _value_dtype(value: Operand) -> DType:
    return number_dtype(value) if is_number(value) else value.dtype


def _filled(op: str, shape: tuple[int, ...], value: Operand, dtype: DType, device: Any, requires_grad: bool) -> Tensor:
    scalar = cast(as_operand(value, dtype, op), dtype)
    whole = broadcast(scalar, shape)
    made: Tensor = scalar if whole is scalar and chosen(device) is None else filled(whole, device)
    made._unplaced = False
    if requires_grad:
        made.requires_grad = True
    return made


def zeros(*size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """0 everywhere, by default in the default dtype."""
    return _filled("zeros", _sizes("zeros", size), 0, dtype or dtypes.get_default_dtype(), device, requires_grad)


def ones(*size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """1 everywhere, by default in the default dtype."""
    return _filled("ones", _sizes("ones", size), 1, dtype or dtypes.get_default_dtype(), device, requires_grad)


def empty(*size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A Tensor for values still to come; here it holds zeros."""
    return zeros(*size, dtype=dtype, device=device, requires_grad=requires_grad)


def full_like(input: Tensor, fill_value: Operand, *, dtype: DType | None = None, device: Any = None,
              requires_grad: bool = False) -> Tensor:
    """`fill_value` everywhere, with the shape, dtype and device of `input` unless others are given."""
    where = input.device if device is None else device
    return _filled("full_like", tuple(input.shape), fill_value, dtype or input.dtype, where, requires_grad)


def zeros_like(input: Tensor, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """0 everywhere, with the shape and dtype of `input`."""
    return full_like(input, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones_like(input: Tensor, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """1 everywhere, with the shape and dtype of `input`."""
    return full_like(input, 1, dtype=dtype, device=device, requires_grad=requires_grad)


empty_like = zeros_like


# counted

def arange(start: Any, end: Any = None, step: Any = 1, *, dtype: DType | None = None, device: Any = None,
           requires_grad: bool = False) -> Tensor:
    """start, start + step, … below `end`; one argument is the end. int64 for integers, else the default float."""
    start, end = (0, start) if end is None else (start, end)
    is_integer = all(number_category(v) in "bi" for v in (start, end, step))
    dtype = dtype or (dtypes.int64 if is_integer else dtypes.get_default_dtype())
    if step == 0 or (end - start) * step < 0:
        require_shape("arange", False, f"the step {step} does not lead from {start} to {end}")
    count = -((start - end) // step) if is_integer else math.ceil((end - start) / step)
    wide = dtypes.int64 if is_integer else dtypes.float64
    plain = is_integer and start == 0 and step == 1
    factor, first = (None, None) if plain else (step, start)
    return _finish(made_on(chosen(device), _counted, max(int(count), 0), factor, first, wide, dtype), requires_grad, device)


def _counted(count: int, step: Any, start: Any, wide: DType, dtype: DType) -> Any:
    steps = ops.iota(shape=(count,), axis=0, dtype=wide)
    return cast(steps if step is None else add(mul(steps, step), start), dtype)


def linspace(start: Any, end: Any, steps: int, *, dtype: DType | None = None, device: Any = None,
             requires_grad: bool = False) -> Tensor:
    """`steps` evenly spaced values from `start` to `end`, both included."""
    require_shape("linspace", steps >= 0, f"the number of steps must not be negative, got {steps}")
    wanted = dtype or dtypes.get_default_dtype()
    return _finish(made_on(chosen(device), _spaced, start, end, steps, wanted), requires_grad, device)


def _spaced(start: Any, end: Any, steps: int, dtype: DType) -> Any:
    numbers = ops.iota(shape=(steps,), axis=0, dtype=dtypes.float64)
    gap = (end - start) / max(steps - 1, 1)
    rising = add(mul(numbers, gap), start)                     # from both ends, so that both are exact
    falling = add(mul(add(numbers, -(steps - 1)), gap), end)
    half = broadcast(as_operand(steps / 2, dtypes.float64), numbers.shape)
    return cast(ops.where(ops.lt(numbers, half), rising, falling) if steps > 1 else rising, dtype)


def logspace(start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: DType | None = None, device: Any = None,
             requires_grad: bool = False) -> Tensor:
    """`base` to evenly spaced powers from `start` to `end`."""
    require_shape("logspace", steps >= 0, f"the number of steps must not be negative, got {steps}")
    wanted = dtype or dtypes.get_default_dtype()
    return _finish(made_on(chosen(device), _powers, start, end, steps, base, wanted), requires_grad, device)


def _powers(start: Any, end: Any, steps: int, base: float, dtype: DType) -> Any:
    powers = _spaced(start, end, steps, dtypes.float64)
    return cast(ops.pow(broadcast(as_operand(base, dtypes.float64), powers.shape), powers), dtype)


def eye(n: int, m: int | None = None, *, dtype: DType | None = None, device: Any = None,
        requires_grad: bool = False) -> Tensor:
    """1 on the diagonal of an n x m matrix (m = n by default), 0 elsewhere."""
    shape = _sizes("eye", (n, n if m is None else m))
    made = made_on(chosen(device), _diagonal, shape, dtype or dtypes.get_default_dtype())
    return _finish(made, requires_grad, device)


def _diagonal(shape: tuple[int, int], dtype: DType) -> Any:
    row, column = (ops.iota(shape=shape, axis=axis, dtype=dtypes.int64) for axis in (0, 1))
    return cast(ops.eq(row, column), dtype)


def tril_indices(row: int, col: int, offset: int = 0, *, dtype: DType = dtypes.int64, device: Any = None) -> Tensor:
    """Rows and columns of the lower triangle up to diagonal `offset`: [2, count]."""
    return _finish(Tensor(np.stack(np.tril_indices(row, offset, col)).astype(dtype.numpy)), False, device)


def triu_indices(row: int, col: int, offset: int = 0, *, dtype: DType = dtypes.int64, device: Any = None) -> Tensor:
    """Rows and columns of the upper triangle from diagonal `offset` on: [2, count]."""
    return _finish(Tensor(np.stack(np.triu_indices(row, offset, col)).astype(dtype.numpy)), False, device)


# random

def rand(*size: Any, generator: random.Generator | None = None, dtype: DType | None = None, device: Any = None,
         requires_grad: bool = False) -> Tensor:
    """Uniform numbers in [0, 1)."""
    drawn = random.uniform(_sizes("rand", size), dtype=dtype, generator=generator, device=chosen(device))
    return _finish(drawn, requires_grad, device)


def randn(*size: Any, generator: random.Generator | None = None, dtype: DType | None = None, device: Any = None,
          requires_grad: bool = False) -> Tensor:
    """Normal numbers of mean 0 and deviation 1."""
    drawn = random.standard_normal(_sizes("randn", size), dtype, generator, chosen(device))
    return _finish(drawn, requires_grad, device)


def randint(low: int, high: Any = None, size: Sequence[int] | None = None, *,
            generator: random.Generator | None = None, dtype: DType = dtypes.int64, device: Any = None) -> Tensor:
    """Uniform integers in [low, high), or in [0, low): ``randint(high, size)`` or ``randint(low, high, size)``."""
    if size is None:
        low, high, size = 0, low, high
    elif high is None:
        low, high = 0, low
    drawn = random.integers(low, high, _sizes("randint", (size,)), dtype, generator, chosen(device))
    return _finish(drawn, False, device)


def randperm(n: int, *, generator: random.Generator | None = None, dtype: DType = dtypes.int64,
             device: Any = None) -> Tensor:
    """0 … n - 1 in random order."""
    return _finish(random.permutation(n, dtype, generator, chosen(device)), False, device)


def rand_like(input: Tensor, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """`rand` with the shape, dtype and device of `input`."""
    where = input.device if device is None else device
    return rand(input.shape, dtype=dtype or input.dtype, device=where, requires_grad=requires_grad)


def randn_like(input: Tensor, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """`randn` with the shape, dtype and device of `input`."""
    where = input.device if device is None else device
    return randn(input.shape, dtype=dtype or input.dtype, device=where, requires_grad=requires_grad)


def randint_like(input: Tensor, low: int, high: int | None = None, *, dtype: DType | None = None,
                 device: Any = None) -> Tensor:
    """`randint` with the shape, dtype and device of `input`."""
    low, high = (0, low) if high is None else (low, high)
    return randint(low, high, input.shape, dtype=dtype or input.dtype, device=input.device if device is None else device)
