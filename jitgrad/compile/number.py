"""Traced numbers: Python floats and ints whose value may change from call to call without a recompile.

A `Number` knows its value in this call and how it came about: an input (an argument, an entry of a param group) or
arithmetic on other numbers. Where it meets a Tensor the arithmetic is recorded as 0-d float64/int64 ops. Where Python
needs to know (a branch, ``math.sqrt``, an index, printing) it gets the value, and the recorder notes a *guard*: the
outcome of a comparison, or the value itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jitgrad import dtypes, ops
from jitgrad.errors import user_location

if TYPE_CHECKING:
    from jitgrad.compile.recorder import Recorder
    from jitgrad.tensor import Tensor

_INT64 = 1 << 63

# How the arithmetic is recorded: for each Python operator the primitive on two 0-d operands of one dtype.
_RECORDED: dict[Callable[..., Any], Any] = {
    operator.add: ops.add, operator.sub: ops.sub, operator.mul: ops.mul, operator.truediv: ops.div,
    operator.floordiv: ops.floor_divide, operator.mod: ops.remainder, operator.pow: ops.pow,
}


class Number:
    """A traced float or int. It says that it is one (``__class__``), but C code has to ask for the value."""

    __slots__ = ("_tensor", "expression", "recorder", "value")

    def __init__(self, recorder: Recorder, value: Any, expression: tuple[Any, ...], tensor: Tensor | None = None):
        self.recorder = recorder
        self.value = value
        self.expression = expression    # ("origin", where) or (operator, operand, …), operands numbers or expressions
        self._tensor = tensor

    @property                           # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.value)

    @property
    def _traced_number(self) -> Tensor:
        """The 0-d float64 or int64 Tensor with this value, recorded at first use."""
        if self._tensor is None:
            function, *operands = self.expression
            if function == "origin":
                self._tensor = self.recorder.input_number(self.value, operands[0])
            else:
                self._tensor = _record(function, operands, isinstance(self.value, float), self)
        return self._tensor

    def specialize(self) -> Any:
        """The value, for Python; it becomes a guard."""
        self.recorder.guards.append((self.expression, self.value, user_location(2)))
        return self.value

    def _combine(self, function: Callable[..., Any], other: Any, reflected: bool = False) -> Any:
        if type(other) is Number:
            value, expression = other.value, other
        elif type(other) in (int, float, bool):
            value, expression = other, other
        else:
            return NotImplemented
        result = function(value, self.value) if reflected else function(self.value, value)
        operands = (expression, self) if reflected else (self, expression)
        if type(result) not in (int, float) or (type(result) is int and not -_INT64 <= result < _INT64) \
                or (function is operator.pow and type(result) is int):
            return function(*[o.specialize() if type(o) is Number else o for o in operands])
        return Number(self.recorder, result, (function, *operands))

    def _compare(self, function: Callable[..., bool], other: Any) -> Any:
        if type(other) is Number:
            value = other.value
        elif type(other) in (int, float, bool):
            value = other
        else:
            return NotImplemented
        outcome = function(self.value, value)
        self.recorder.guards.append(((function, self, other), outcome, user_location(2)))
        return outcome

    def __bool__(self) -> bool:
        outcome = bool(self.value)
        self.recorder.guards.append(((bool, self), outcome, user_location(2)))
        return outcome

    def __neg__(self) -> Any:
        return Number(self.recorder, -self.value, (operator.neg, self))

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return Number(self.recorder, abs(self.value), (abs, self))

    def __float__(self) -> float:
        return float(self.specialize())

    def __int__(self) -> int:
        return int(self.specialize())

    def __index__(self) -> int:
        return operator.index(self.specialize())

    def __complex__(self) -> complex:
        return complex(self.specialize())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.specialize(), digits)

    def __trunc__(self) -> int:
        return int(math.trunc(self.specialize()))

    def __floor__(self) -> int:
        return int(math.floor(self.specialize()))

    def __ceil__(self) -> int:
        return int(math.ceil(self.specialize()))

    def __divmod__(self, other: Any) -> Any:
        return divmod(self.specialize(), other.specialize() if type(other) is Number else other)

    def __hash__(self) -> int:
        return hash(self.specialize())

    def __repr__(self) -> str:
        return repr(self.specialize())

    def __str__(self) -> str:
        return str(self.specialize())

    def __format__(self, spec: str) -> str:
        return format(self.specialize(), spec)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(type(self.value), name):       # also what NumPy asks for: it takes the value by __float__
            raise AttributeError(f"{type(self.value).__name__!r} object has no attribute {name!r}")
        return getattr(self.specialize(), name)       # is_integer, as_integer_ratio, hex, real …

    def __reduce__(self) -> Any:
        return type(self.value), (self.specialize(),)


def _operator(function: Callable[..., Any], reflected: bool = False) -> Any:
    def method(self: Number, other: Any) -> Any:
        return self._combine(function, other, reflected)
    return method


def _comparison(function: Callable[..., bool]) -> Any:
    def method(self: Number, other: Any) -> Any:
        return self._compare(function, other)
    return method


for _function in _RECORDED:
    _name = _function.__name__.strip("_")
    setattr(Number, f"__{_name}__", _operator(_function))
    setattr(Number, f"__r{_name}__", _operator(_function, reflected=True))
for _function in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    setattr(Number, f"__{_function.__name__}__", _comparison(_function))


class Deferred(Number):
    """Stands for a number that the function is known to return at once: ``tensor.item()`` when the call is over. If the
    function does anything else with it, it gets the value."""

    __slots__ = ("taken", "tensor")

    def __init__(self, recorder: Recorder, tensor: Tensor):
        self.recorder = recorder
        self.tensor = tensor
        self.taken: Any = None

    @property                           # type: ignore[misc]
    def __class__(self) -> type:
        dtype = self.tensor.dtype
        return float if dtype.is_floating_point else bool if dtype is dtypes.bool_ else int

    @property
    def value(self) -> Any:
        return self.tensor._number() if self.taken is None else self.taken

    def take(self) -> None:
        """The Tensor is about to change: the value is the one before."""
        self.taken = self.value

    @property
    def _traced_number(self) -> Tensor:
        value = self.value
        return ops.constant(value=value, dtype=dtypes.float64 if type(value) is float else dtypes.int64)  # type: ignore[no-any-return]

    def specialize(self) -> Any:
        return self.value

    def _combine(self, function: Callable[..., Any], other: Any, reflected: bool = False) -> Any:
        return function(other, self.value) if reflected else function(self.value, other)

    def _compare(self, function: Callable[..., bool], other: Any) -> Any:
        return function(self.value, other)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __neg__(self) -> Any:
        return -self.value

    def __abs__(self) -> Any:
        return abs(self.value)


def trace_number(recorder: Recorder, value: Any, origin: Any) -> Any:
    """`value` as a traced number that is read from `origin` on each call; anything but a float or int unchanged."""
    if type(value) is float or (type(value) is int and -_INT64 <= value < _INT64):
        return Number(recorder, value, ("origin", origin))
    return value


def evaluate(expression: Any, fetch: Callable[[Any], Any]) -> Any:
    """The value of a number's expression in another call; `fetch(origin)` reads an input."""
    if type(expression) is Number:
        return evaluate(expression.expression, fetch)
    if type(expression) is not tuple:
        return expression
    function, *operands = expression
    if function == "origin":
        return fetch(operands[0])
    return function(*[evaluate(o, fetch) for o in operands])


def origins(expression: Any) -> list[Any]:
    """All inputs that an expression reads."""
    if type(expression) is Number:
        return origins(expression.expression)
    if type(expression) is not tuple:
        return []
    if expression[0] == "origin":
        return [expression[1]]
    return [found for operand in expression[1:] for found in origins(operand)]


def _record(function: Callable[..., Any], operands: list[Any], as_float: bool, number: Number) -> Tensor:
    """Record one operator on 0-d values of the result's dtype."""
    dtype = dtypes.float64 if as_float else dtypes.int64
    tensors = [_operand(o, dtype) for o in operands]
    if function is operator.neg:
        return ops.neg(tensors[0])      # type: ignore[no-any-return]
    if function is abs:
        return ops.abs(tensors[0])      # type: ignore[no-any-return]
    return _RECORDED[function](*tensors)  # type: ignore[no-any-return]


def _operand(o: Any, dtype: dtypes.DType) -> Tensor:
    if type(o) is Number:
        t = o._traced_number
        return t if t.dtype is dtype else ops.cast(t, dtype=dtype)
    value = float(o) if dtype is dtypes.float64 else int(o)
    return ops.constant(value=value, dtype=dtype)  # type: ignore[no-any-return]
