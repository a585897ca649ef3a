"""Element types: their names, their NumPy counterparts, and PyTorch's promotion rules.

A dtype is one of a dozen shared instances of `DType`; compare with ``is`` or ``==``. Short names (``f32``) are what
graphs, kernels and error messages print.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type. `category` is b(ool), u(nsigned), i(nteger), f(loat) or c(omplex)."""

    name: str
    short: str
    numpy: np.dtype
    category: str
    itemsize: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", self.numpy.itemsize)

    @property
    def is_floating_point(self) -> bool:
        return self.category == "f"

    @property
    def is_complex(self) -> bool:
        return self.category == "c"

    @property
    def is_integer(self) -> bool:
        """Signed or unsigned integers; bool is not one."""
        return self.category in "iu"

    @property
    def is_differentiable(self) -> bool:
        return self.category in "fc"

    @property
    def is_signed(self) -> bool:
        return self.category in "ifc"

    def __repr__(self) -> str:
        return f"jitgrad.{self.name}"

    def __reduce__(self) -> str:
        return self.name


bool_ = DType("bool", "bool", np.dtype(np.bool_), "b")
uint8 = DType("uint8", "u8", np.dtype(np.uint8), "u")
uint32 = DType("uint32", "u32", np.dtype(np.uint32), "u")
int8 = DType("int8", "i8", np.dtype(np.int8), "i")
int16 = DType("int16", "i16", np.dtype(np.int16), "i")
int32 = DType("int32", "i32", np.dtype(np.int32), "i")
int64 = DType("int64", "i64", np.dtype(np.int64), "i")
float16 = DType("float16", "f16", np.dtype(np.float16), "f")
bfloat16 = DType("bfloat16", "bf16", np.dtype(ml_dtypes.bfloat16), "f")
float32 = DType("float32", "f32", np.dtype(np.float32), "f")
float64 = DType("float64", "f64", np.dtype(np.float64), "f")
complex64 = DType("complex64", "c64", np.dtype(np.complex64), "c")
complex128 = DType("complex128", "c128", np.dtype(np.complex128), "c")

ALL: tuple[DType, ...] = (bool_, uint8, uint32, int8, int16, int32, int64, float16, bfloat16, float32, float64,
                          complex64, complex128)
BY_SHORT: dict[str, DType] = {d.short: d for d in ALL}
BY_NAME: dict[str, DType] = {d.name: d for d in ALL}
_BY_NUMPY: dict[np.dtype, DType] = {d.numpy: d for d in ALL}

_default = float32


def get_default_dtype() -> DType:
    """The dtype of Python floats and of creation functions that were given none."""
    return _default


def set_default_dtype(dtype: DType) -> None:
    """Set what `get_default_dtype` returns; `dtype` must be a floating-point type."""
    global _default
    if not isinstance(dtype, DType) or not dtype.is_floating_point:
        raise TypeError(f"set_default_dtype: only floating-point types can be the default, got {dtype!r}")
    _default = dtype


def from_numpy(dtype: object) -> DType:
    """The `DType` of a NumPy dtype (or anything ``np.dtype`` accepts); TypeError when there is none."""
    found = _BY_NUMPY.get(dtype)  # type: ignore[call-overload]
    if found is None:
        found = _BY_NUMPY.get(np.dtype(dtype).newbyteorder("="))  # type: ignore[call-overload]
    if found is None:
        legal = ", ".join(d.name for d in ALL)
        raise TypeError(f"no jitgrad dtype for NumPy's {dtype}; the dtypes are {legal}")
    return found


_LATTICE_ORDER = {"u8": 0, "i8": 0, "i16": 1, "i32": 2, "u32": 2, "i64": 3}
_FLOAT_ORDER = {"f16": 0, "bf16": 0, "f32": 1, "f64": 2}


def promote(a: DType, b: DType) -> DType:
    """The result dtype of two *tensors* of one or more dimensions (PyTorch's ``torch.promote_types``)."""
    if a is b:
        return a
    if a.category == "c" or b.category == "c":
        wide = any(d in (complex128, float64) for d in (a, b))
        return complex128 if wide else complex64
    if a.category == "f" and b.category == "f":
        if {a, b} == {float16, bfloat16}:
            return float32
        return a if _FLOAT_ORDER[a.short] > _FLOAT_ORDER[b.short] else b
    if a.category == "f" or b.category == "f":
        return a if a.category == "f" else b
    if a.category == "b" or b.category == "b":
        return b if a.category == "b" else a
    if uint32 in (a, b) and int64 not in (a, b):
        return int64 if "i" in (a.category, b.category) else uint32
    if uint8 in (a, b):
        other = b if a is uint8 else a
        return int16 if other is int8 else other
    return a if _LATTICE_ORDER[a.short] > _LATTICE_ORDER[b.short] else b


def can_cast(from_: DType, to: DType) -> bool:
    """Whether a result of type `from_` may be stored in place into a tensor of type `to`: not into a lower category, of
    which bool, integer, floating-point and complex are four."""
    return _CATEGORY_ORDER[from_.category] <= _CATEGORY_ORDER[to.category]


_CATEGORY_ORDER = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}


# limits

class finfo:
    """The limits of a floating-point type (of a complex one those of its parts; by default of the default dtype): `bits`,
    `eps` (from 1 to the next number), `max`, `min` (the most negative), `tiny` = `smallest_normal`, `resolution` (ten to
    minus the decimal digits that always survive) and the name `dtype`. TypeError for other types."""

    __slots__ = ("bits", "dtype", "eps", "max", "min", "resolution", "smallest_normal", "tiny")

    def __init__(self, type: DType | None = None) -> None:
        wanted = _default if type is None else type
        if not isinstance(wanted, DType) or not wanted.is_differentiable:
            raise TypeError(f"finfo: expected a floating-point or complex dtype, got {wanted!r}. Did you mean iinfo?")
        real = {complex64: float32, complex128: float64}.get(wanted, wanted)
        found = ml_dtypes.finfo(real.numpy)  # type: ignore[no-untyped-call]
        self.bits, self.dtype = 8 * real.itemsize, real.name
        self.eps, self.resolution = float(found.eps), float(f"{float(found.resolution):.3g}")
        self.max, self.min = float(found.max), float(found.min)
        self.tiny = self.smallest_normal = float(found.smallest_normal)

    def __repr__(self) -> str:
        return (f"finfo(resolution={self.resolution:g}, min={self.min:g}, max={self.max:g}, eps={self.eps:g}, "
                f"smallest_normal={self.smallest_normal:g}, tiny={self.tiny:g}, dtype={self.dtype})")


class iinfo:
    """The limits of an integer type: `bits`, `min`, `max` and the name `dtype`. TypeError for other types."""

    __slots__ = ("bits", "dtype", "max", "min")

    def __init__(self, type: DType) -> None:
        if not isinstance(type, DType) or not type.is_integer:
            raise TypeError(f"iinfo: expected an integer dtype, got {type!r}. Did you mean finfo?")
        found = np.iinfo(type.numpy)
        self.bits, self.dtype, self.min, self.max = 8 * type.itemsize, type.name, int(found.min), int(found.max)

    def __repr__(self) -> str:
        return f"iinfo(min={self.min}, max={self.max}, dtype={self.dtype})"
