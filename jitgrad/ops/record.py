"""Short forms for the records of common families, and the type rules that they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.dtypes import DType
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType, Typed

__all__ = ["silence_numpy", "type_of"]

NARROW = (dtypes.bfloat16.numpy, dtypes.float16.numpy)
MAY_FAIL = frozenset({"may-fail"})


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
          categories: str = "fc", exact: bool = False, doc: str = "") -> Op:
    """An elementwise op of one operand ``x`` whose result has its type."""
    return register(Op(name, ("x",), same_type(name, categories), eager, "elementwise",
                       vjp=None if vjp is None else (vjp,), spell=spell or name, exact=exact, doc=doc))


def binary(name: str, eager: Callable[..., Any], *, spell: str | None = None,
           vjp: tuple[Callable[..., Any] | None, Callable[..., Any] | None] | None = None,
           categories: str = "uifc", commutative: bool = False, effects: frozenset[str] = frozenset(),
           exact: bool = False, doc: str = "") -> Op:
    """An elementwise op of two operands ``x``, ``y`` of one type, which is the result's."""
    return register(Op(name, ("x", "y"), same_type(name, categories), eager, "elementwise", vjp=vjp,
                       spell=spell or name, commutative=commutative, effects=effects, exact=exact, doc=doc))


def predicate(name: str, operands: tuple[str, ...], eager: Callable[..., Any], *, spell: str | None = None,
              categories: str = "buif", commutative: bool = False, doc: str = "") -> Op:
    """An elementwise op with a bool result."""
    return register(Op(name, operands, to_bool(name, categories), eager, "elementwise", spell=spell or name,
                       commutative=commutative, doc=doc))


def keep_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its result cast back to the first operand's dtype where NumPy widened it."""

    def eager(x: np.ndarray, *others: Any, **attrs: Any) -> Any:
        out = function(x, *others, **attrs)
        return out if out.dtype == x.dtype else out.astype(x.dtype)

    return eager


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with 16-bit floats widened to float32 on the way in and rounded once on the way out: for ops that
    accumulate, where NumPy would round after every step."""

    def eager(x: np.ndarray, *others: Any, **attrs: Any) -> Any:
        if x.dtype not in NARROW:
            return function(x, *others, **attrs)
        found = function(*[y.astype(np.float32) if y.dtype in NARROW else y for y in (x, *others)], **attrs)
        return tuple([y.astype(x.dtype) for y in found]) if isinstance(found, tuple) else found.astype(x.dtype)

    return eager


def checked_first(infer: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`eager` after a look at the types by the type rule, for ops whose NumPy form would carry out what the rule refuses.
    What was found to be right once is not looked at again."""

    @lru_cache(maxsize=4096)
    def look(types: tuple[Any, ...], attrs: tuple[Any, ...]) -> None:
        infer(*[TensorType(dtypes.from_numpy(dtype), shape) for dtype, shape in types], **dict(attrs))

    def checked(*arrays: np.ndarray, **attrs: Any) -> Any:
        look(tuple([(x.dtype, x.shape) for x in arrays]), tuple(attrs.items()))
        return eager(*arrays, **attrs)

    return checked


_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def choose(condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`np.where` for operands of one dtype and shape. NumPy's own loop branches at every element; where that would be
    felt, bits are chosen instead: y ^ ((x ^ y) & condition)."""
    kind = _BITS.get(x.dtype.itemsize)
    if kind is None or condition.size < 1024:
        return np.where(condition, x, y)
    mask = condition.astype(kind)
    np.negative(mask, out=mask)
    mask &= x.view(kind) ^ y.view(kind)          # in the memory of the mask: x and y may both be one element for all
    mask ^= y.view(kind)
    chosen: np.ndarray = mask.view(x.dtype)
    return chosen


def require_axes(name: str, axes: tuple[int, ...], x: TensorType) -> None:
    """ShapeError unless `axes` are distinct dimensions of `x`, counted from the front."""
    ndim = len(x.shape)
    if any(not 0 <= a < ndim for a in axes) or len(set(axes)) != len(axes):
        which = f"axis {axes[0]} is" if len(axes) == 1 else f"axes {axes} are"
        raise complain(ShapeError, name, f"{which} not among the {ndim} dimensions of {x}")


def type_of(x: Typed) -> TensorType:
    """The TensorType of an operand of any kind."""
    return x if isinstance(x, TensorType) else TensorType(x.dtype, tuple(x.shape), getattr(x, "device_name", "cpu"))


def silence_numpy() -> None:
    """Floating-point operations of this thread give inf and nan without a warning, as in PyTorch. NumPy keeps this
    setting per thread: eager execution calls this once on each."""
    np.seterr(all="ignore")
