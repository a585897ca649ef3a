"""What every derived operation stands on: Python numbers, type promotion, broadcasting, dimension arguments.

Operands are anything with a ``shape`` and a ``dtype`` (Tensors, values of a graph that is being built), Python numbers,
or traced numbers. What comes out are operands that strict primitives accept: one dtype, one shape. The rules are
PyTorch's, so that a program gives the same dtypes and the same errors as there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, JitgradError, ShapeError, complain
from jitgrad.ir import interpreter
from jitgrad.ops.builders import broadcast, full

Operand = Any                    # a Tensor or another Typed value, or a number
Tensor = Any                     # a Tensor or another Typed value
Dims = int | Sequence[int] | None

_PYTHON_NUMBERS = frozenset((bool, int, float, complex))
_NUMBERS = (int, float, complex, np.number, np.bool_)
HALF = (dtypes.float16, dtypes.bfloat16)
_CATEGORY_OF_KIND = {"b": "b", "i": "i", "u": "i", "f": "f", "c": "c"}


class DimensionError(ShapeError, IndexError):
    """A dimension that a tensor does not have."""


# numbers

def is_number(x: object) -> bool:
    """A Python number, a NumPy scalar, or a traced number (which says that it is a float or an int)."""
    return type(x) in _PYTHON_NUMBERS or isinstance(x, _NUMBERS)


def number_category(x: Any) -> str:
    """b, i, f or c."""
    if isinstance(x, np.generic):
        return _CATEGORY_OF_KIND[x.dtype.kind]
    if isinstance(x, bool):
        return "b"
    if isinstance(x, int):
        return "i"
    return "f" if isinstance(x, float) else "c"


def number_dtype(x: Any) -> DType:
    """The dtype that a number alone becomes: bool, int64, the default float, or the complex type of its width."""
    category = number_category(x)
    if category == "b":
        return dtypes.bool_
    if category == "i":
        return dtypes.int64
    default = dtypes.get_default_dtype()
    if category == "f":
        return default
    return dtypes.complex128 if default is dtypes.float64 else dtypes.complex64


def constant(value: Any, dtype: DType) -> Tensor:
    """A 0-d value of `dtype` from a Python number; integers wrap around."""
    return ops.constant(value=_convert(value, dtype), dtype=dtype)


def _convert(value: Any, dtype: DType) -> Any:
    category = dtype.category
    if category == "f":
        return float(value)
    if category == "b":
        return bool(value)
    if category == "c":
        return complex(value)
    value, bits = int(value), 8 * dtype.itemsize
    low = -(1 << (bits - 1)) if category == "i" else 0
    return (value - low) % (1 << bits) + low


def as_operand(x: Operand, dtype: DType | None = None, op: str = "operand") -> Tensor:
    """`x` as something that primitives accept: a number becomes a 0-d value of `dtype` (by default, of the dtype that
    it has by itself). A tensor is returned as it is, whatever its dtype."""
    if type(x) in _PYTHON_NUMBERS:
        return constant(x, dtype or number_dtype(x))
    traced = getattr(x, "_traced_number", None)
    if traced is not None:
        return cast(traced, dtype or number_dtype(x))
    if isinstance(x, np.generic):
        return constant(x.item(), dtype or number_dtype(x))
    if isinstance(getattr(x, "dtype", None), DType):
        return x
    fix = "Did you mean jitgrad.from_numpy(x)?" if isinstance(x, np.ndarray) else "Did you mean jitgrad.tensor(x)?"
    raise complain(DTypeError, op, f"expected a Tensor or a number, got {type(x).__name__}", fix=fix)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """`x` itself when it has that dtype, otherwise a converted copy."""
    return x if x.dtype is dtype else ops.cast(x, dtype=dtype)


# promotion

def result_type(*operands: Operand) -> DType:
    """The dtype that PyTorch would compute in. Tensors with dimensions come first; 0-d tensors, and after them numbers,
    count only when they are of a higher category (bool < integer < float < complex)."""
    dimensioned: DType | None = None
    scalar: DType | None = None
    number: DType | None = None
    for x in operands:
        if is_number(x):
            number = _promote_known(number, number_dtype(x))
        elif x.shape:
            dimensioned = _promote_known(dimensioned, x.dtype)
        else:
            scalar = _promote_known(scalar, x.dtype)
    found = _by_category(dimensioned, _by_category(scalar, number))
    assert found is not None
    return found


def _promote_known(a: DType | None, b: DType | None) -> DType | None:
    if a is None or b is None:
        return a or b
    return dtypes.promote(a, b)


_RANK = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
_NUMBER_RANK = {bool: 0, int: 1, float: 2, complex: 3}


def _by_category(high: DType | None, low: DType | None) -> DType | None:
    if high is None or low is None:
        return high or low
    return high if _RANK[high.category] >= _RANK[low.category] else dtypes.promote(high, low)


def largest_finite(dtype: DType) -> float:
    """The largest finite value of a floating-point dtype."""
    return float(ml_dtypes.finfo(dtype.numpy).max)  # type: ignore[no-untyped-call]


def float_type(dtype: DType) -> DType:
    """`dtype` when it is floating-point or complex, otherwise the default float: what ``exp`` of integers gives."""
    return dtype if dtype.category in "fc" else dtypes.get_default_dtype()


def as_float(x: Operand) -> Tensor:
    """`x` as a tensor, integers and bools converted to the default float."""
    x = as_operand(x)
    return x if x.dtype.category in "fc" else ops.cast(x, dtype=dtypes.get_default_dtype())


# broadcasting

def matched(op: str, x: Operand, y: Operand, to_float: bool = False) -> tuple[Tensor, Tensor]:
    """Two operands with one dtype (promoted) and one shape (broadcast)."""
    x_type, y_type = getattr(x, "dtype", None), getattr(y, "dtype", None)
    if type(x_type) is DType:
        if x_type is y_type and (not to_float or x_type.category in "fc"):  # type: ignore[union-attr]
            return (x, y) if x.shape == y.shape else broadcast_all(op, x, y)
        if type(y) in _PYTHON_NUMBERS:
            return _with_number(x, y, to_float)
    elif type(x) in _PYTHON_NUMBERS and type(y_type) is DType:
        y, x = _with_number(y, x, to_float)
        return x, y
    x, y = checked(op, x), checked(op, y)
    dtype = result_type(x, y)
    return on_dtype(op, float_type(dtype) if to_float else dtype, x, y)


def _with_number(x: Tensor, number: Any, to_float: bool) -> tuple[Tensor, Tensor]:
    """A tensor and a Python number as operands of one type."""
    dtype = x.dtype
    if _RANK[dtype.category] < _NUMBER_RANK[type(number)]:
        dtype = dtypes.promote(dtype, number_dtype(number))
    if to_float:
        dtype = float_type(dtype)
    return cast(x, dtype), full(x.shape, _convert(number, dtype), dtype)


def checked(op: str, x: Operand) -> Operand:
    """`x`, which is a number or a tensor; DTypeError for anything else."""
    return x if is_number(x) else as_operand(x, None, op)


def on_dtype(op: str, dtype: DType, *operands: Operand) -> tuple[Tensor, ...]:
    """All operands converted to `dtype` and broadcast to their common shape."""
    tensors = [as_operand(x, dtype, op) for x in operands]
    tensors = [cast(x, dtype) for x in tensors]
    return broadcast_all(op, *tensors)


def broadcast_all(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors broadcast to their common shape; a tensor that has it already is returned as it is."""
    shape = broadcast_shape(op, *[x.shape for x in tensors])
    return tuple([broadcast(x, shape) for x in tensors])


def broadcast_shape(op: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape by NumPy's rules; ShapeError when there is none."""
    result = shapes[0]
    for shape in shapes[1:]:
        if shape != result and shape:
            result = _broadcast_two(op, result, shape) if result else shape
    return result


def _broadcast_two(op: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    lead = len(longer) - len(shorter)
    sizes = list(longer)
    for i, (m, n) in enumerate(zip(longer[lead:], shorter)):
        if m != n and m != 1 and n != 1:
            raise complain(ShapeError, op, f"the shapes {list(a)} and {list(b)} do not broadcast: dimension "
                                           f"{lead + i} has sizes {m} and {n}")
        sizes[lead + i] = n if m == 1 else m
    return tuple(sizes)


# arguments

def one_dim(op: str, dim: int, ndim: int) -> int:
    """`dim` counted from the front. As in PyTorch, a 0-d tensor has the dimensions 0 and -1."""
    index = operator.index(dim)
    extent = ndim or 1
    if not -extent <= index < extent:
        raise complain(DimensionError, op, f"dimension out of range (expected to be in [{-extent}, {extent - 1}], "
                                           f"but got {index})")
    return index + extent if index < 0 else index


def many_dims(op: str, dim: Dims, ndim: int) -> tuple[int, ...]:
    """`dim` as a sorted tuple of dimensions counted from the front; None and () mean all."""
    if dim is None or (not isinstance(dim, int) and len(tuple(dim)) == 0):
        return tuple(range(ndim))
    if isinstance(dim, int):
        return (one_dim(op, dim, ndim),) if ndim else _none_of(op, dim)
    found = [one_dim(op, d, ndim) for d in dim]
    if len(set(found)) != len(found):
        raise complain(ShapeError, op, f"dimension appears twice in dim={tuple(dim)}")
    return tuple(sorted(found)) if ndim else ()


def _none_of(op: str, dim: int) -> tuple[int, ...]:
    one_dim(op, dim, 0)
    return ()


def sizes_of(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes or dimensions given one by one or as one sequence: ``f(2, 3)`` or ``f((2, 3))``."""
    if len(args) == 1 and not hasattr(args[0], "__index__"):
        args = tuple(args[0])
    return tuple([a if type(a) is int else operator.index(a) for a in args])


def size(shape: Sequence[int]) -> int:
    """The number of elements."""
    n = 1
    for s in shape:
        n *= s
    return n


def require_shape(op: str, condition: bool, problem: str, fix: str = "") -> None:
    """ShapeError with `problem` unless `condition`."""
    if not condition:
        raise complain(ShapeError, op, problem, fix=fix)


def require_floating(op: str, x: Tensor) -> Tensor:
    """`x`; DTypeError when it is neither floating-point nor complex."""
    if x.dtype.category not in "fc":
        raise complain(DTypeError, op, f"needs a floating-point tensor, got {describe(x)}",
                       fix="Did you mean x.float()?")
    return x


def describe(x: Tensor) -> str:
    """``f32[64, 10]``, for messages."""
    return f"{x.dtype.short}[{', '.join(map(str, x.shape))}]"


def describe_all(*tensors: Tensor) -> str:
    """The types of several operands, for messages."""
    return ", ".join(describe(x) for x in tensors)


def unknown_choice(op: str, name: str, value: object, legal: Sequence[object]) -> JitgradError:
    """The error for an argument that must be one of `legal`."""
    return complain(ShapeError, op, f"{name}={value!r} is none of {', '.join(map(repr, legal))}")


def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of a half-precision first argument computes in float32 and rounds once, at the end: what PyTorch's
    kernels do. For other dtypes nothing changes."""

    @functools.wraps(function)
    def wrapper(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if x.dtype not in HALF:
            return function(x, *args, **options)
        wide = [ops.cast(a, dtype=dtypes.float32) if getattr(a, "dtype", None) in HALF else a for a in args]
        result = function(ops.cast(x, dtype=dtypes.float32), *wide, **options)
        return cast(result, x.dtype)

    return wrapper


def is_on_gpu(x: Any) -> bool:
    """Whether `x` lies on a GPU, eagerly or while something is recorded."""
    return str(getattr(x, "device", "cpu")).startswith("cuda")


def wide_on_cpu(op: Callable[..., Any], *operands: Tensor, **attrs: Any) -> Any:
    """``op(*operands, **attrs)`` of a primitive whose kernels on CPUs are of float32 and float64, and on GPUs of half
    precision, too: on a CPU half precision is computed in float32 and rounded once."""
    dtype = operands[0].dtype
    if dtype not in HALF or is_on_gpu(operands[0]):
        return op(*operands, **attrs)
    found = op(*[cast(x, dtypes.float32) if x.dtype is dtype else x for x in operands], **attrs)
    return tuple([cast(x, dtype) for x in found]) if isinstance(found, (tuple, list)) else cast(found, dtype)


# values

def made_on(where: Any, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``make(*arguments)``, which computes a Tensor out of no other. If `where`, a device, is a GPU it is made there, by one
    kernel where that can be; but not while something is recorded or an argument is a tensor: then it lies nowhere yet."""
    at = getattr(interpreter.state.current, "make_on", None)
    if at is None or where is None or where.type == "cpu" or any([hasattr(a, "shape") for a in arguments]):
        return make(*arguments)
    made: Tensor = at(where, make, arguments)
    return made


def is_eager_on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU, and ops are carried out at once."""
    return hasattr(interpreter.state.current, "make_on") and x.is_cuda is True


_from_array: Callable[[np.ndarray], Tensor] | None = None
_from_values: Callable[..., Tensor] | None = None


def install_tensor(make: Callable[[np.ndarray], Tensor], from_values: Callable[..., Tensor]) -> None:
    """Say how a Tensor is made of a NumPy array, and of Python values (the layer above calls this)."""
    global _from_array, _from_values
    _from_array, _from_values = make, from_values


def from_values(data: Any, **options: Any) -> Tensor:
    """What `jitgrad.tensor` makes of numbers, lists and arrays."""
    assert _from_values is not None, "jitgrad.creation has not been imported"
    return _from_values(data, **options)


def from_array(array: np.ndarray, like: Tensor | None = None) -> Tensor:
    """A Tensor around a NumPy array: for what no op computes, such as results whose size depends on values. It is put
    where `like` is; without, it goes to wherever it is used."""
    assert _from_array is not None, "jitgrad.creation has not been imported"
    made = _from_array(array)
    if like is not None:
        made = made._moved(like.device)
        made._unplaced = False
    return made


def read(x: Tensor) -> np.ndarray:
    """The values of a Tensor now. While compiling this makes a cut."""
    return x.numpy(force=True)
