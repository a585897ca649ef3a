"""Short forms for the records of common families, and the type rules that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType, Typed


def same_type(name: str, categories: str = "buifc") -> Callable[..., TensorType]:
    """Type rule: all operands have one type, which is the result's; its category is one of `categories`."""

    def infer(x: TensorType, *others: TensorType, **_: Any) -> TensorType:
        require_same(name, x, *others)
        require_category(name, x.dtype, categories)
        return x

    return infer


def to_bool(name: str, categories: str = "buifc") -> Callable[..., TensorType]:
    """Type rule of comparisons: operands of one type, a bool result of their shape."""

    def infer(x: TensorType, *others: TensorType, **_: Any) -> TensorType:
        require_same(name, x, *others)
        require_category(name, x.dtype, categories)
        return x.with_dtype(dtypes.bool_)

    return infer


def require_same(name: str, x: TensorType, *others: TensorType) -> None:
    for y in others:
        if y == x:
            continue
        if y.shape != x.shape:
            raise complain(ShapeError, name, f"operands differ in shape: {x} and {y}")
        raise complain(DTypeError, name, f"operands differ in type: {x} and {y}")


def require_category(name: str, dtype: DType, categories: str) -> None:
    if dtype.category not in categories:
        words = {"b": "bool", "u": "unsigned", "i": "integer", "f": "floating-point", "c": "complex"}
        legal = ", ".join(words[c] for c in categories)
        fix = "Did you mean x.float()?" if "f" in categories else ""
        raise complain(DTypeError, name, f"needs {legal} operands, got {dtype.short}", fix=fix)


def unary(name: str, eager: Callable[..., Any], *, spell: str | None = None, vjp: Callable[..., Any] | None = None,
          categories: str = "fc", doc: str = "") -> Op:
    """An elementwise op of one operand ``x`` whose result has its type."""
    return register(Op(name, ("x",), same_type(name, categories), keep_dtype(eager), "elementwise",
                       vjp=None if vjp is None else (vjp,), spell=spell or name, doc=doc))


def binary(name: str, eager: Callable[..., Any], *, spell: str | None = None,
           vjp: tuple[Callable[..., Any] | None, Callable[..., Any] | None] | None = None,
           categories: str = "uifc", commutative: bool = False, effects: frozenset[str] = frozenset(),
           doc: str = "") -> Op:
    """An elementwise op of two operands ``x``, ``y`` of one type, which is the result's."""
    return register(Op(name, ("x", "y"), same_type(name, categories), keep_dtype(eager), "elementwise", vjp=vjp,
                       spell=spell or name, commutative=commutative, effects=effects, doc=doc))


def predicate(name: str, operands: tuple[str, ...], eager: Callable[..., Any], *, spell: str | None = None,
              categories: str = "buif", commutative: bool = False, doc: str = "") -> Op:
    """An elementwise op with a bool result."""
    return register(Op(name, operands, to_bool(name, categories), eager, "elementwise", spell=spell or name,
                       commutative=commutative, doc=doc))


def keep_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its result cast back to the first operand's dtype where NumPy widened it (bfloat16, bool)."""

    def eager(x: np.ndarray, *others: Any, **attrs: Any) -> np.ndarray:
        out = function(x, *others, **attrs)
        return out if out.dtype == x.dtype else out.astype(x.dtype)

    return eager


def normalize_axes(name: str, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """`axes` counted from the front; ShapeError when one is out of range or given twice."""
    result = tuple(a + ndim if a < 0 else a for a in axes)
    if any(a < 0 or a >= ndim for a in result) or len(set(result)) != len(result):
        raise complain(ShapeError, name, f"axes {axes} of a value with {ndim} dimensions")
    return result


def type_of(x: Typed) -> TensorType:
    """The TensorType of an operand of any kind."""
    return x if isinstance(x, TensorType) else TensorType(x.dtype, tuple(x.shape), getattr(x, "device_name", "cpu"))
