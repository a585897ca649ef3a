"""Ops that multiply and add up along shared dimensions: matrix products and convolutions.

16-bit floats accumulate in float32 and round once. Integers wrap around in their own type; `int_matmul` sums int8 up in
int32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import conjugate
from jitgrad.ops.record import checked_first, in_float32, require_category, require_same

__all__ = ["convolution", "convolution_input_grad", "convolution_output_shape", "convolution_weight_grad",
           "int_matmul", "matmul", "transposed"]


def _infer_matmul(x: TensorType, y: TensorType, op: str = "matmul") -> TensorType:
    shown = f"{x} @ {y}"
    if x.dtype is not y.dtype:
        raise complain(DTypeError, op, f"operands differ in dtype: {shown}",
                       fix=f"Did you mean y.to(jitgrad.{x.dtype.name})?")
    require_category(op, x.dtype, "uifc")
    if x.ndim < 2 or x.ndim != y.ndim:
        raise complain(ShapeError, op, f"operands need the same number of dimensions, at least two: {shown}")
    if x.shape[-1] != y.shape[-2]:
        fix = "Did you mean x @ w.T?" if x.shape[-1] == y.shape[-1] else ""
        raise complain(ShapeError, op, f"inner dimensions differ: {shown}", fix=fix)
    if x.shape[:-2] != y.shape[:-2]:
        raise complain(ShapeError, op, f"batch dimensions differ: {shown}")
    return x.with_shape(x.shape[:-1] + y.shape[-1:])


def _infer_int_matmul(x: TensorType, y: TensorType) -> TensorType:
    if x.dtype is not dtypes.int8 or y.dtype is not dtypes.int8:
        raise complain(DTypeError, "int_matmul", f"operands must be int8: {x} @ {y}",
                       fix="Did you mean x.to(jitgrad.int8)?")
    return _infer_matmul(x, y, "int_matmul").with_dtype(dtypes.int32)


def _int_matmul(x: np.ndarray, y: np.ndarray) -> Any:
    """The product in float64, where sums of products of bytes are exact up to a depth of 2**39, cut to int32."""
    return np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(np.int64).astype(np.int32)


def transposed(x: Any) -> Any:
    """The last two dimensions swapped."""
    n = len(x.shape)
    return ops.permute(x, axes=(*range(n - 2), n - 1, n - 2))


matmul: Op = register(Op(
    "matmul", ("x", "y"), _infer_matmul, in_float32(np.matmul), "contraction", epilogue="matmul",
    vjp=(lambda g, y: ops.matmul(g, conjugate(transposed(y))), lambda g, x: ops.matmul(conjugate(transposed(x)), g)),
    doc="Matrix product of the last two dimensions; leading (batch) dimensions are equal."))

int_matmul: Op = register(Op(
    "int_matmul", ("x", "y"), _infer_int_matmul, _int_matmul, "contraction", epilogue="matmul",
    doc="Matrix product of the last two dimensions of int8, summed up in int32, which wraps around."))

PRODUCTS = (matmul, int_matmul)
"""The matrix products."""

# ---- convolution: x[N, C, *sizes], w[O, C / groups, *kernel] -> [N, O, *out] ------------------------------------

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]                   # (before, after) of each spatial dimension
RANKS = (1, 2, 3)


def convolution_output_shape(x: Ints, w: Ints, stride: Ints, padding: Padding, dilation: Ints) -> Ints:
    """[N, O, *out] for the shapes of x and w."""
    sizes = [(size + low + high - d * (k - 1) - 1) // s + 1
             for size, k, s, (low, high), d in zip(x[2:], w[2:], stride, padding, dilation, strict=True)]
    return (x[0], w[0], *sizes)


def _check_convolution(name: str, x: TensorType, w: TensorType, *, stride: Ints, padding: Padding, dilation: Ints,
                       groups: int) -> TensorType:
    """The type of convolution(x, w), or the error that it deserves."""
    shown = f"x {x} with w {w}"
    if x.dtype is not w.dtype:
        raise complain(DTypeError, name, f"operands differ in dtype: {shown}")
    require_category(name, x.dtype, "f")
    rank = w.ndim - 2
    if x.ndim != w.ndim or rank not in RANKS:
        raise complain(ShapeError, name, f"needs x[N, C, *sizes] and w[O, C / groups, *kernel], with one, two or three "
                                         f"sizes in both: {shown}")
    if not len(stride) == len(padding) == len(dilation) == rank:
        raise complain(ShapeError, name, f"stride {stride}, padding {padding} and dilation {dilation} need one entry for "
                                         f"each of {rank} dimension(s): {shown}")
    if groups < 1 or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise complain(ShapeError, name, f"channels do not fit {groups} group(s): {shown}")
    if min(*stride, *dilation) < 1 or min(p for side in padding for p in side) < 0:
        raise complain(ShapeError, name, f"stride {stride} and dilation {dilation} are at least 1, padding {padding} "
                                         "at least 0")
    shape = convolution_output_shape(x.shape, w.shape, stride, padding, dilation)
    if min(shape[2:]) < 1:
        raise complain(ShapeError, name, f"the kernel is larger than the padded input: {shown}, padding {padding}")
    return x.with_shape(shape)


def _infer_convolution(x: TensorType, w: TensorType, **geometry: Any) -> TensorType:
    return _check_convolution("convolution", x, w, **geometry)


def _infer_input_grad(gradient: TensorType, w: TensorType, *, input_shape: Ints, **geometry: Any) -> TensorType:
    name = "convolution_input_grad"
    x = w.with_shape(tuple(input_shape))
    require_same(name, _check_convolution(name, x, w, **geometry), gradient)
    return x


def _infer_weight_grad(x: TensorType, gradient: TensorType, *, weight_shape: Ints, **geometry: Any) -> TensorType:
    name = "convolution_weight_grad"
    w = x.with_shape(tuple(weight_shape))
    require_same(name, _check_convolution(name, x, w, **geometry), gradient)
    return w


def _columns(x: np.ndarray, kernel: Ints, out: Ints, stride: Ints, padding: Padding, dilation: Ints,
             groups: int) -> np.ndarray:
    """[N, groups, C / groups * taps, positions]: what each output position multiplies (im2col)."""
    if any(p for side in padding for p in side):
        x = np.pad(x, ((0, 0), (0, 0), *padding))
    n, c = x.shape[:2]
    along = x.strides[2:]
    taps = [size * d for size, d in zip(along, dilation, strict=True)]
    steps = [size * s for size, s in zip(along, stride, strict=True)]
    windows = np.ndarray((n, c, *kernel, *out), x.dtype, np.asarray(x), 0, (*x.strides[:2], *taps, *steps))
    return windows.reshape(n, groups, c // groups * math.prod(kernel), math.prod(out))


def _convolution(x: np.ndarray, w: np.ndarray, *, stride: Ints, padding: Padding, dilation: Ints,
                 groups: int) -> Any:
    shape = convolution_output_shape(x.shape, w.shape, stride, padding, dilation)
    columns = _columns(np.ascontiguousarray(x), w.shape[2:], shape[2:], stride, padding, dilation, groups)
    return np.matmul(w.reshape(groups, w.shape[0] // groups, columns.shape[2]), columns).reshape(shape)


def _convolution_input_grad(gradient: np.ndarray, w: np.ndarray, *, input_shape: Ints, stride: Ints,
                            padding: Padding, dilation: Ints, groups: int) -> np.ndarray:
    (n, c), sizes = input_shape[:2], input_shape[2:]
    kernel, out = w.shape[2:], gradient.shape[2:]
    rows = w.reshape(groups, w.shape[0] // groups, -1).swapaxes(1, 2)
    taps = np.matmul(rows, gradient.reshape(n, groups, w.shape[0] // groups, math.prod(out)))
    taps = taps.reshape(n, c, *kernel, *out)
    padded = np.zeros((n, c, *[size + low + high for size, (low, high) in zip(sizes, padding, strict=True)]),
                      gradient.dtype)
    for tap in np.ndindex(*kernel):
        reached: Any = [slice(k * d, k * d + (count - 1) * s + 1, s)
                        for k, d, count, s in zip(tap, dilation, out, stride, strict=True)]
        padded[..., *reached] += taps[:, :, *tap]
    inside: Any = [slice(low, low + size) for size, (low, _) in zip(sizes, padding, strict=True)]
    return np.ascontiguousarray(padded[..., *inside])


def _convolution_weight_grad(x: np.ndarray, gradient: np.ndarray, *, weight_shape: Ints, stride: Ints,
                             padding: Padding, dilation: Ints, groups: int) -> np.ndarray:
    columns = _columns(np.ascontiguousarray(x), weight_shape[2:], gradient.shape[2:], stride, padding, dilation, groups)
    rows = gradient.reshape(x.shape[0], groups, weight_shape[0] // groups, columns.shape[3])
    total = np.zeros((groups, rows.shape[2], columns.shape[2]), x.dtype)
    for image_rows, image_columns in zip(rows, columns, strict=True):       # one image at a time bounds the memory
        total += np.matmul(image_rows, image_columns.swapaxes(1, 2))
    return total.reshape(weight_shape)


def _geometry(stride: Ints, padding: Padding, dilation: Ints, groups: int) -> dict[str, Any]:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def _forward(x: Any, w: Any, *geometry: Any) -> Any:
    return ops.convolution(x, w, **_geometry(*geometry))


def _input_grad(gradient: Any, w: Any, shape: Ints, *geometry: Any) -> Any:
    return ops.convolution_input_grad(gradient, w, input_shape=shape, **_geometry(*geometry))


def _weight_grad(x: Any, gradient: Any, shape: Ints, *geometry: Any) -> Any:
    return ops.convolution_weight_grad(x, gradient, weight_shape=shape, **_geometry(*geometry))


# The three are linear in each operand, and each is the gradient of the two others.
convolution: Op = register(Op(
    "convolution", ("x", "w"), _infer_convolution, checked_first(_infer_convolution, in_float32(_convolution)),
    "contraction",
    vjp=(lambda g, w, x_type, stride, padding, dilation, groups:
         _input_grad(g, w, x_type.shape, stride, padding, dilation, groups),
         lambda g, x, w_type, stride, padding, dilation, groups:
         _weight_grad(x, g, w_type.shape, stride, padding, dilation, groups)),
    epilogue="convolution",
    doc="Cross-correlation of x[N, C, *sizes] with w[O, C / groups, *kernel] over one, two or three dimensions, "
        "zero-padded: [N, O, *out]."))
convolution_input_grad: Op = register(Op(
    "convolution_input_grad", ("gradient", "w"), _infer_input_grad,
    checked_first(_infer_input_grad, in_float32(_convolution_input_grad)), "contraction",
    vjp=(lambda g, w, stride, padding, dilation, groups: _forward(g, w, stride, padding, dilation, groups),
         lambda g, gradient, w_type, stride, padding, dilation, groups:
         _weight_grad(g, gradient, w_type.shape, stride, padding, dilation, groups)),
    epilogue="convolution",
    doc="Gradient of convolution in x; also the transposed convolution of `gradient`."))
convolution_weight_grad: Op = register(Op(
    "convolution_weight_grad", ("x", "gradient"), _infer_weight_grad, in_float32(_convolution_weight_grad),
    "contraction",
    vjp=(lambda g, gradient, x_type, stride, padding, dilation, groups:
         _input_grad(gradient, g, x_type.shape, stride, padding, dilation, groups),
         lambda g, x, stride, padding, dilation, groups: _forward(x, g, stride, padding, dilation, groups)),
    doc="Gradient of convolution in w."))
