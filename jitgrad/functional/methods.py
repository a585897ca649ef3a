"""The methods of a Tensor that compute: operators, named methods, in-place forms, conversions.

Nearly all are the functions of this package under PyTorch's names: a plain function in a class body is a method. An
in-place form computes the new contents and stores them with ``Tensor._assign``; nothing here touches memory otherwise.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes, ops, shapes
from jitgrad.devices import chosen, placed
from jitgrad.dtypes import DType
from jitgrad.errors import AutogradError, ShapeError, complain
from jitgrad.functional import (
    activation,
    arithmetic,
    arrangement,
    complex_numbers,
    elementwise,
    index,
    linalg,
    logic,
    queries,
    random,
    reduce,
    scattering,
    shape,
    sorting,
    statistics,
)
from jitgrad.functional.core import (
    Operand,
    Tensor,
    as_operand,
    cast,
    describe,
    from_array,
    from_values,
    is_number,
    one_dim,
    require_shape,
    sizes_of,
)
from jitgrad.functional.in_place import InPlaceMethods, in_place, reading, reading_for_others, store
from jitgrad.ops.builders import broadcast


def _reflected(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def method(self: Tensor, other: Operand) -> Tensor:
        return function(other, self)

    return method


def _to_dtype(dtype: DType) -> Callable[..., Tensor]:
    def method(self: Tensor) -> Tensor:
        return cast(self, dtype)

    method.__doc__ = f"As {dtype.name}; the tensor itself when it is that already."
    return method


class TensorMethods(InPlaceMethods):
    """What `Tensor` inherits."""

    # operators
    __add__, __radd__, __iadd__ = elementwise.add, elementwise.add, in_place(elementwise.add)
    __sub__, __rsub__, __isub__ = elementwise.sub, elementwise.rsub, in_place(elementwise.sub)
    __mul__, __rmul__, __imul__ = elementwise.mul, elementwise.mul, reading_for_others(elementwise.mul)
    __truediv__, __rtruediv__, __itruediv__ = elementwise.div, _reflected(elementwise.div), in_place(elementwise.div)
    __floordiv__, __rfloordiv__ = elementwise.floor_divide, _reflected(elementwise.floor_divide)
    __ifloordiv__ = in_place(elementwise.floor_divide)
    __mod__, __rmod__ = elementwise.remainder, _reflected(elementwise.remainder)
    __imod__ = in_place(elementwise.remainder)
    __pow__, __rpow__, __ipow__ = elementwise.pow, _reflected(elementwise.pow), reading(elementwise.pow)
    __matmul__, __rmatmul__, __imatmul__ = linalg.matmul, _reflected(linalg.matmul), reading_for_others(linalg.matmul)
    __and__, __rand__, __iand__ = logic.bitwise_and, logic.bitwise_and, in_place(logic.bitwise_and)
    __or__, __ror__, __ior__ = logic.bitwise_or, logic.bitwise_or, in_place(logic.bitwise_or)
    __xor__, __rxor__, __ixor__ = logic.bitwise_xor, logic.bitwise_xor, in_place(logic.bitwise_xor)
    __lshift__, __rlshift__ = logic.bitwise_left_shift, _reflected(logic.bitwise_left_shift)
    __rshift__, __rrshift__ = logic.bitwise_right_shift, _reflected(logic.bitwise_right_shift)
    __neg__, __pos__, __abs__, __invert__ = elementwise.neg, elementwise.positive, elementwise.abs, logic.bitwise_not
    __lt__, __le__, __gt__, __ge__ = logic.lt, logic.le, logic.gt, logic.ge
    __getitem__, __setitem__ = index.getitem, index.setitem

    def __eq__(self, other: Any) -> Any:
        return logic.eq(self, other) if _comparable(other) else NotImplemented

    def __ne__(self, other: Any) -> Any:
        return logic.ne(self, other) if _comparable(other) else NotImplemented

    __hash__ = object.__hash__

    def __len__(self: Tensor) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return int(self.shape[0])

    def __contains__(self: Tensor, element: Any) -> bool:
        return bool(reduce.any(logic.eq(self, element)))

    # elementwise
    add, add_ = elementwise.add, in_place(elementwise.add)
    sub, sub_ = elementwise.sub, in_place(elementwise.sub)
    subtract, subtract_, rsub = sub, sub_, elementwise.rsub
    mul, mul_ = elementwise.mul, reading_for_others(elementwise.mul)
    multiply, multiply_ = mul, mul_
    div, div_ = elementwise.div, in_place(elementwise.div)
    divide, divide_, true_divide, true_divide_ = div, div_, div, div_
    floor_divide, floor_divide_ = elementwise.floor_divide, in_place(elementwise.floor_divide)
    remainder, remainder_ = elementwise.remainder, in_place(elementwise.remainder)
    fmod, fmod_ = elementwise.fmod, in_place(elementwise.fmod)
    pow, pow_ = elementwise.pow, reading(elementwise.pow)
    neg, neg_ = elementwise.neg, in_place(elementwise.neg)
    negative, positive = neg, elementwise.positive
    abs, abs_ = elementwise.abs, reading(elementwise.abs)
    absolute, absolute_ = abs, abs_
    sign, sign_, sgn = elementwise.sign, in_place(elementwise.sign), elementwise.sgn
    exp, exp_ = elementwise.exp, in_place(elementwise.exp)
    exp2, exp2_ = elementwise.exp2, in_place(elementwise.exp2)
    expm1, expm1_ = elementwise.expm1, in_place(elementwise.expm1)
    log, log_ = elementwise.log, reading(elementwise.log)
    log2, log2_ = elementwise.log2, reading(elementwise.log2)
    log10, log10_ = elementwise.log10, reading(elementwise.log10)
    log1p, log1p_ = elementwise.log1p, reading(elementwise.log1p)
    sqrt, sqrt_ = elementwise.sqrt, in_place(elementwise.sqrt)
    rsqrt, rsqrt_ = elementwise.rsqrt, in_place(elementwise.rsqrt)
    square, square_ = elementwise.square, reading(elementwise.square)
    reciprocal, reciprocal_ = elementwise.reciprocal, in_place(elementwise.reciprocal)
    sin, sin_, cos, cos_ = elementwise.sin, reading(elementwise.sin), elementwise.cos, reading(elementwise.cos)
    tan, tan_ = elementwise.tan, in_place(elementwise.tan)
    asin, acos, atan = elementwise.asin, elementwise.acos, elementwise.atan
    arcsin, arccos, arctan = asin, acos, atan
    sinh, cosh, asinh, acosh, atanh = (elementwise.sinh, elementwise.cosh, elementwise.asinh, elementwise.acosh,
                                       elementwise.atanh)
    arcsinh, arccosh, arctanh = asinh, acosh, atanh
    tanh, tanh_ = elementwise.tanh, in_place(elementwise.tanh)
    sigmoid, sigmoid_ = elementwise.sigmoid, in_place(elementwise.sigmoid)
    erf, erfc, erfinv, lgamma, digamma = (elementwise.erf, elementwise.erfc, elementwise.erfinv, elementwise.lgamma,
                                          elementwise.digamma)
    erf_, erfinv_ = in_place(elementwise.erf), in_place(elementwise.erfinv)
    floor, floor_ = elementwise.floor, in_place(elementwise.floor)
    ceil, ceil_ = elementwise.ceil, in_place(elementwise.ceil)
    round, round_ = elementwise.round, in_place(elementwise.round)
    trunc, trunc_, fix = elementwise.trunc, in_place(elementwise.trunc), elementwise.fix
    frac, frac_ = elementwise.frac, in_place(elementwise.frac)
    nan_to_num, nan_to_num_ = elementwise.nan_to_num, in_place(elementwise.nan_to_num)
    logit = elementwise.logit
    maximum, minimum, fmax, fmin = elementwise.maximum, elementwise.minimum, elementwise.fmax, elementwise.fmin
    atan2, arctan2, copysign, hypot = elementwise.atan2, elementwise.arctan2, elementwise.copysign, elementwise.hypot
    logaddexp, xlogy, heaviside = elementwise.logaddexp, elementwise.xlogy, elementwise.heaviside
    deg2rad, rad2deg, sinc, signbit = arithmetic.deg2rad, arithmetic.rad2deg, arithmetic.sinc, arithmetic.signbit
    gcd, lcm, ldexp, frexp = arithmetic.gcd, arithmetic.lcm, arithmetic.ldexp, arithmetic.frexp
    float_power, nextafter, logaddexp2 = arithmetic.float_power, arithmetic.nextafter, arithmetic.logaddexp2
    lerp, lerp_ = elementwise.lerp, in_place(elementwise.lerp)
    addcmul, addcmul_ = elementwise.addcmul, in_place(elementwise.addcmul)
    addcdiv, addcdiv_ = elementwise.addcdiv, in_place(elementwise.addcdiv)
    clamp, clamp_ = elementwise.clamp, in_place(elementwise.clamp)
    clip, clip_ = clamp, clamp_
    clamp_min, clamp_min_ = elementwise.clamp_min, in_place(elementwise.clamp_min)
    clamp_max, clamp_max_ = elementwise.clamp_max, in_place(elementwise.clamp_max)
    eq, ne, lt, le, gt, ge = (logic.eq, logic.ne, logic.lt, logic.le, logic.gt,
                              logic.ge)
    not_equal, less, less_equal, greater, greater_equal = ne, lt, le, gt, ge
    isposinf, isneginf, isreal = arithmetic.isposinf, arithmetic.isneginf, arithmetic.isreal
    isclose, isnan, isinf, isfinite = logic.isclose, logic.isnan, logic.isinf, logic.isfinite
    logical_and, logical_or, logical_xor, logical_not = (logic.logical_and, logic.logical_or,
                                                         logic.logical_xor, logic.logical_not)
    logical_and_, logical_or_ = in_place(logic.logical_and), in_place(logic.logical_or)
    logical_xor_, logical_not_ = in_place(logic.logical_xor), in_place(logic.logical_not)
    bitwise_and, bitwise_or, bitwise_xor, bitwise_not = (logic.bitwise_and, logic.bitwise_or,
                                                         logic.bitwise_xor, logic.bitwise_not)
    bitwise_left_shift, bitwise_right_shift = logic.bitwise_left_shift, logic.bitwise_right_shift

    # complex numbers
    conj, conj_physical, angle = complex_numbers.conj, complex_numbers.conj_physical, complex_numbers.angle
    resolve_conj, resolve_neg = complex_numbers.resolve_conj, complex_numbers.resolve_neg
    real, imag = property(complex_numbers.real), property(complex_numbers.imag)

    # activations
    relu, relu_ = activation.relu, in_place(activation.relu)
    softmax, log_softmax = activation.softmax, activation.log_softmax
    prelu, hardshrink = activation.prelu, activation.hardshrink

    # reductions and scans
    sum, nansum, mean, nanmean, prod = reduce.sum, reduce.nansum, reduce.mean, reduce.nanmean, reduce.prod
    var, std = reduce.var, reduce.std
    max, min, amax, amin, aminmax = reduce.max, reduce.min, reduce.amax, reduce.amin, reduce.aminmax
    argmax, argmin, median, kthvalue = reduce.argmax, reduce.argmin, reduce.median, reduce.kthvalue
    any, all, count_nonzero = reduce.any, reduce.all, reduce.count_nonzero
    norm, dist, logsumexp, trace, diff = reduce.norm, reduce.dist, reduce.logsumexp, reduce.trace, reduce.diff
    quantile, nanquantile, nanmedian = statistics.quantile, statistics.nanquantile, statistics.nanmedian
    mode, cov, corrcoef, histogram = statistics.mode, statistics.cov, statistics.corrcoef, statistics.histogram
    cummax, cummin, logcumsumexp = statistics.cummax, statistics.cummin, statistics.logcumsumexp
    cumsum, cumprod = reduce.cumsum, reduce.cumprod
    cumsum_, cumprod_ = in_place(reduce.cumsum), in_place(reduce.cumprod)
    equal, allclose = reduce.equal, reduce.allclose

    # shape
    reshape, flatten, ravel, unflatten = shape.reshape, shape.flatten, shape.ravel, shape.unflatten
    squeeze, unsqueeze = shape.squeeze, shape.unsqueeze
    permute, transpose, swapaxes, swapdims = shape.permute, shape.transpose, shape.swapaxes, shape.swapdims
    t, adjoint, movedim, moveaxis = shape.t, shape.adjoint, shape.movedim, shape.moveaxis
    expand, expand_as, broadcast_to = shape.expand, shape.expand_as, shape.broadcast_to
    repeat, tile, repeat_interleave = shape.repeat, shape.tile, shape.repeat_interleave
    narrow, select, split, chunk, tensor_split = (shape.narrow, shape.select, shape.split, shape.chunk,
                                                  shape.tensor_split)
    unbind, unfold = shape.unbind, shape.unfold
    flip, fliplr, flipud, roll, rot90 = shape.flip, shape.fliplr, shape.flipud, shape.roll, shape.rot90
    tril, triu, diag, diagonal, diag_embed = shape.tril, shape.triu, shape.diag, shape.diagonal, shape.diag_embed
    hsplit, vsplit, dsplit = arrangement.hsplit, arrangement.vsplit, arrangement.dsplit
    split_with_sizes, diagflat, sum_to_size = (arrangement.split_with_sizes, arrangement.diagflat,
                                               arrangement.sum_to_size)
    diagonal_scatter, select_scatter = scattering.diagonal_scatter, scattering.select_scatter
    slice_scatter = scattering.slice_scatter
    tril_, triu_ = in_place(shape.tril), in_place(shape.triu)
    clone = shape.clone

    # linear algebra
    matmul, mm, bmm, mv, dot = linalg.matmul, linalg.mm, linalg.bmm, linalg.mv, linalg.dot
    inner, outer, kron, cross = linalg.inner, linalg.outer, linalg.kron, linalg.cross
    addmm, addmv, baddbmm = linalg.addmm, linalg.addmv, linalg.baddbmm
    addmm_ = in_place(linalg.addmm)
    addr, addbmm, ger, vdot = linalg.addr, linalg.addbmm, linalg.ger, linalg.vdot
    matrix_power, renorm = linalg.matrix_power, linalg.renorm

    # indexing
    gather, take, take_along_dim = index.gather, index.take, index.take_along_dim
    scatter, scatter_ = index.scatter, in_place(index.scatter)
    scatter_add, scatter_add_ = index.scatter_add, in_place(index.scatter_add)
    scatter_reduce, index_reduce, put = scattering.scatter_reduce, scattering.index_reduce, scattering.put
    index_select = index.index_select
    index_add, index_add_ = index.index_add, in_place(index.index_add)
    index_copy, index_copy_ = index.index_copy, in_place(index.index_copy)
    index_fill, index_fill_ = index.index_fill, in_place(index.index_fill)
    index_put, index_put_ = index.index_put, in_place(index.index_put)
    masked_fill, masked_fill_ = index.masked_fill, in_place(index.masked_fill)
    masked_scatter, masked_scatter_ = index.masked_scatter, in_place(index.masked_scatter)
    masked_select, nonzero, argwhere = index.masked_select, sorting.nonzero, sorting.argwhere
    sort, argsort, topk, msort = sorting.sort, sorting.argsort, sorting.topk, statistics.msort
    unique_consecutive = sorting.unique_consecutive
    unique, bincount, histc = sorting.unique, sorting.bincount, sorting.histc

    def polygamma(self: Tensor, n: int) -> Tensor:
        """See `jitgrad.polygamma`."""
        return elementwise.polygamma(n, self)

    def where(self: Tensor, condition: Tensor, other: Operand) -> Tensor:
        """`self` where `condition` is True, `other` elsewhere."""
        return elementwise.where(condition, self, other)

    # random
    multinomial, bernoulli = random.multinomial, random.bernoulli

    def normal_(self: Tensor, mean: Operand = 0.0, std: Operand = 1.0, *, generator: Any = None) -> Tensor:
        """Fill with normal numbers."""
        return store(self, random.normal(mean, std, self.shape, dtype=self.dtype, generator=generator,
                                         device=self.device))

    def uniform_(self: Tensor, a: Operand = 0.0, b: Operand = 1.0, *, generator: Any = None) -> Tensor:
        """Fill with uniform numbers from [a, b)."""
        return store(self, random.uniform(self.shape, a, b, self.dtype, generator, self.device))

    def bernoulli_(self: Tensor, p: Operand = 0.5, *, generator: Any = None) -> Tensor:
        """Fill with 1 (with probability `p`) and 0."""
        drawn = random.uniform(self.shape, 0.0, 1.0, dtypes.float32, generator, self.device)
        return self._assign(cast(logic.lt(drawn, p), self.dtype))

    def exponential_(self: Tensor, lambd: Operand = 1.0, *, generator: Any = None) -> Tensor:
        """Fill with exponentially distributed numbers."""
        return store(self, random.exponential(self.shape, lambd, self.dtype, generator, self.device))

    def random_(self: Tensor, low: int = 0, high: int | None = None, *, generator: Any = None) -> Tensor:
        """Fill with uniform integers from [low, high), or [0, low)."""
        low, high = (0, low or 1 << 24) if high is None else (low, high)
        return self._assign(random.integers(low, high, self.shape, self.dtype, generator, self.device))

    # filling and copying
    def fill_(self: Tensor, value: Operand) -> Tensor:
        """Every element set to a number or a 0-d tensor."""
        return self._assign(_filled(self, value))

    def zero_(self: Tensor) -> Tensor:
        """Every element set to 0."""
        return self._assign(_filled(self, 0))

    def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
        """The elements of `src`, which may be on another device, converted and broadcast, copied in."""
        if src.device != self.device:
            src = src.to(self.device, self.dtype, non_blocking=non_blocking)
        return store(self, cast(src, self.dtype))

    def new_full(self: Tensor, size: Any, fill_value: Operand, *, dtype: DType | None = None,
                 device: Any = None) -> Tensor:
        """A tensor of that shape filled with `fill_value`, with the dtype and on the device of `self`."""
        wanted = self.dtype if dtype is None else dtype
        return filled(broadcast(cast(as_operand(fill_value, wanted), wanted), sizes_of((size,))),
                      self.device if device is None else device)

    def new_zeros(self: Tensor, *size: Any, dtype: DType | None = None, device: Any = None) -> Tensor:
        """Zeros of that shape, with the dtype and on the device of `self`."""
        return self.new_full(sizes_of(size), 0, dtype=dtype, device=device)

    def new_ones(self: Tensor, *size: Any, dtype: DType | None = None, device: Any = None) -> Tensor:
        """Ones of that shape, with the dtype and on the device of `self`."""
        return self.new_full(sizes_of(size), 1, dtype=dtype, device=device)

    new_empty = new_zeros

    def new_tensor(self: Tensor, data: Any, *, dtype: DType | None = None, device: Any = None,
                   requires_grad: Any = False) -> Tensor:
        """A tensor with a copy of `data`, as `jitgrad.tensor` makes it, with the dtype and on the device of `self` unless
        others are given."""
        made = from_values(data, dtype=self.dtype if dtype is None else dtype,
                           device=self.device if device is None else device)
        return made.requires_grad_() if requires_grad else made

    def apply_(self: Tensor, callable: Callable[[Any], Any]) -> Tensor:
        """Every element replaced by what a Python function gives for it, one after the other: slow. Reads the values."""
        return _computed(self, [callable(v) for v in _elements(self)])

    def map_(self: Tensor, tensor: Tensor, callable: Callable[[Any, Any], Any]) -> Tensor:
        """Every element replaced by what a Python function gives for it and the element of `tensor`, which broadcasts:
        slow. Reads the values."""
        other = shape.expand(tensor, self.shape)
        return _computed(self, [callable(v, w) for v, w in zip(_elements(self), _elements(other))])

    def fill_diagonal_(self: Tensor, fill_value: Operand) -> Tensor:
        """The main diagonal of a matrix set to `fill_value`."""
        distance = shape.diagonal_distance(*self.shape)
        return self._assign(index.masked_fill(self, logic.eq(distance, 0), fill_value))

    # sizes
    def size(self: Tensor, dim: int | None = None) -> Any:
        """The shape, or the size of one dimension."""
        return shapes.Size(self.shape) if dim is None else self.shape[one_dim("size", dim, len(self.shape))]

    def dim(self: Tensor) -> int:
        """The number of dimensions."""
        return len(self.shape)

    numel = queries.numel
    ndimension, nelement = dim, numel

    @property
    def ndim(self: Tensor) -> int:
        return len(self.shape)

    @property
    def itemsize(self: Tensor) -> int:
        return int(self.dtype.itemsize)

    @property
    def T(self: Tensor) -> Tensor:
        """All dimensions reversed."""
        ndim = len(self.shape)
        return ops.permute(self, axes=tuple(range(ndim - 1, -1, -1))) if ndim > 1 else self

    @property
    def mT(self: Tensor) -> Tensor:
        """The last two dimensions exchanged."""
        return shape.transpose(self, -2, -1)

    @property
    def mH(self: Tensor) -> Tensor:
        """The last two dimensions exchanged, complex numbers conjugated."""
        return shape.adjoint(self)

    @property
    def H(self: Tensor) -> Tensor:
        """A matrix transposed, complex numbers conjugated; 0-d tensors as they are."""
        require_shape("H", len(self.shape) in (0, 2), f"expected a matrix, got {describe(self)}", fix="Did you mean x.mH?")
        return shape.adjoint(self) if self.shape else complex_numbers.conj(self)

    is_floating_point, is_complex, is_signed = queries.is_floating_point, queries.is_complex, queries.is_signed
    is_nonzero, is_same_size, is_conj, is_neg = (queries.is_nonzero, queries.is_same_size, queries.is_conj,
                                                 queries.is_neg)

    # memory order
    def view(self: Tensor, *shape_: Any) -> Tensor:
        """The same memory at another shape; ShapeError when strides do not allow that."""
        target = shape.known_shape("view", self, sizes_of(shape_))
        if target == self.shape:
            target_strides: Any = True
        else:
            target_strides = shapes.reshape_strides(self.shape, self.stride(), target)
        if target_strides is None:
            raise complain(ShapeError, "view", f"shape {list(target)} is no view of {describe(self)} with strides "
                                               f"{self.stride()}", fix="Use reshape, which copies where it must")
        return ops.reshape(self, shape=target)

    def view_as(self: Tensor, other: Tensor) -> Tensor:
        """`view` at the shape of `other`."""
        return self.view(other.shape)

    def reshape_as(self: Tensor, other: Tensor) -> Tensor:
        """`reshape` to the shape of `other`."""
        return shape.reshape(self, other.shape)

    def contiguous(self: Tensor) -> Tensor:
        """A copy in row-major order, or the tensor itself when it is so already."""
        if self.is_contiguous():
            return self
        flat = shape.ravel(self)
        return shape.reshape(flat if flat.is_contiguous() else shape.clone(flat), self.shape)

    # dtypes
    float, double, half, bfloat16 = (_to_dtype(dtypes.float32), _to_dtype(dtypes.float64), _to_dtype(dtypes.float16),
                                     _to_dtype(dtypes.bfloat16))
    long, int, short, char, byte = (_to_dtype(dtypes.int64), _to_dtype(dtypes.int32), _to_dtype(dtypes.int16),
                                    _to_dtype(dtypes.int8), _to_dtype(dtypes.uint8))
    bool, cfloat, cdouble = _to_dtype(dtypes.bool_), _to_dtype(dtypes.complex64), _to_dtype(dtypes.complex128)

    def to(self: Tensor, *args: Any, dtype: DType | None = None, device: Any = None, copy: Any = False,
           non_blocking: Any = False) -> Tensor:
        """As another dtype, on another device, each given by itself or by keyword, or both as those of another tensor. It
        is the tensor itself if it is so already and no `copy` is asked for. With `non_blocking` Python does not wait for a
        copy between pinned memory and a GPU. Positional flags are `non_blocking` and `copy`, as in PyTorch."""
        flags = [arg for arg in args if isinstance(arg, builtins.bool)]
        non_blocking, copy = (flags + [non_blocking, copy][len(flags):])[:2]
        for arg in args:
            if isinstance(arg, DType):
                dtype = arg
            elif hasattr(arg, "dtype"):
                dtype, device = arg.dtype, arg.device
            elif arg is not None and not isinstance(arg, builtins.bool):
                device = arg
        target = self.dtype if dtype is None else dtype
        where = self.device if device is None else placed(device)
        if where == self.device:
            return ops.cast(self, dtype=target) if copy else cast(self, target)
        if where.type == "cpu":                          # convert where every conversion can be done
            return cast(self._moved(where, non_blocking and target is self.dtype), target)
        return cast(self, target)._moved(where, non_blocking)

    def type(self: Tensor, dtype: DType | None = None) -> Any:
        """The dtype, or the tensor as another one."""
        return self.dtype if dtype is None else cast(self, dtype)

    def type_as(self: Tensor, other: Tensor) -> Tensor:
        """As the dtype of `other`."""
        return cast(self, other.dtype)


def filled(expanded: Tensor, device: Any = None) -> Tensor:
    """A number that was expanded, with memory of its own, on `device` (by default the CPU)."""
    where = chosen(device)
    return shape.clone(expanded) if where is None else expanded._moved(where)


def _comparable(other: Any) -> bool:
    return is_number(other) or isinstance(getattr(other, "dtype", None), DType)


def _filled(x: Tensor, value: Operand) -> Tensor:
    return broadcast(cast(as_operand(value, x.dtype), x.dtype), x.shape)


def _elements(x: Tensor) -> Any:
    """All elements as Python numbers, in row-major order. Through them no gradient flows."""
    if x.requires_grad:
        raise complain(AutogradError, "apply_ and map_", "a Python function has no gradient",
                       fix="Use x.detach(), or jitgrad's functions")
    return shape.ravel(x).tolist()


def _computed(x: Tensor, values: list[Any]) -> Tensor:
    """`x` with these elements stored into it."""
    array = np.array(values, dtype=x.dtype.numpy).reshape(x.shape)
    return x._assign(from_array(array, x))
