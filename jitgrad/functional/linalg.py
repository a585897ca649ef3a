"""Linear algebra on the matmul primitive: products of tensors of every rank, einsum, the linear layer.

Operands must have one dtype, as in PyTorch; batch dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import (
    Operand,
    Tensor,
    broadcast_shape,
    cast,
    describe,
    from_array,
    matched,
    one_dim,
    require_shape,
    size,
)
from jitgrad.functional.elementwise import add, mul, where
from jitgrad.functional.reduce import norm, sum
from jitgrad.functional.shape import diagonal, diagonal_distance, movedim, permute
from jitgrad.ops.builders import broadcast, expand_dims, full, full_like, ones_like
from jitgrad.ops.derived import derived

__all__ = [
    "_int_mm", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "cdist", "chain_matmul", "cross", "dot", "einsum",
    "ger", "inner", "kron", "matmul", "matrix_power", "mm", "mv", "outer", "pdist", "renorm", "tensordot", "vdot",
]


@casts(cpu="lower", cuda="lower")
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """The matrix product ``input @ other``. 1-d operands count as a row on the left, a column on the right; dimensions
    before the last two are batch dimensions, which broadcast."""
    x, y = input.shape, other.shape
    if len(x) == 2 and len(y) == 2:
        _check("matmul", input, other, x[1], y[0])
        return ops.matmul(input, other)
    if not x or not y:
        raise complain(ShapeError, "matmul", f"0-d operands: {_both(input, other)}", fix="Did you mean x * y?")
    _check("matmul", input, other, x[-1], y[-2] if len(y) > 1 else y[0])
    if len(y) == 1:
        return _matrix_vector(input, other)
    if len(x) == 1:
        product = matmul(expand_dims(input, (0,)), other)
        return ops.reshape(product, shape=product.shape[:-2] + product.shape[-1:])
    if len(y) == 2:
        return _rows_times_matrix(input, other)
    batch = broadcast_shape("matmul", x[:-2], y[:-2])
    return ops.matmul(broadcast(input, batch + x[-2:]), broadcast(other, batch + y[-2:]))


def _rows_times_matrix(x: Tensor, y: Tensor) -> Tensor:
    """A batch of matrices times one matrix is one large product."""
    if len(x.shape) == 2:
        return ops.matmul(x, y)
    return ops.reshape(ops.matmul(_rows(x), y), shape=x.shape[:-1] + y.shape[1:])


def _rows(x: Tensor) -> Tensor:
    """All dimensions but the last one as one."""
    return x if len(x.shape) == 2 else ops.reshape(x, shape=(size(x.shape[:-1]), x.shape[-1]))


def _matrix_vector(x: Tensor, y: Tensor) -> Tensor:
    column = ops.reshape(y, shape=(y.shape[0], 1))
    rows = ops.reshape(x, shape=(size(x.shape[:-1]), x.shape[-1]))
    return ops.reshape(ops.matmul(rows, column), shape=x.shape[:-1])


def _both(x: Tensor, y: Tensor) -> str:
    return f"{describe(x)} @ {describe(y)}"


def _check(op: str, x: Tensor, y: Tensor, inner: int, other_inner: int) -> None:
    if x.dtype is not y.dtype:
        raise complain(DTypeError, op, f"operands differ in dtype: {_both(x, y)}", fix="Did you mean x.to(y.dtype)?")
    if inner != other_inner:
        fix = "Did you mean x @ w.mT?" if len(y.shape) > 1 and y.shape[-1] == inner else ""
        raise complain(ShapeError, op, f"inner dimensions differ: {_both(x, y)}", fix=fix)


def _ranks(op: str, x: Tensor, y: Tensor, x_rank: int, y_rank: int) -> None:
    require_shape(op, len(x.shape) == x_rank and len(y.shape) == y_rank,
                  f"expected {x_rank}-d and {y_rank}-d operands, got {_both(x, y)}", fix="Did you mean matmul?")


@casts(cpu="lower", cuda="lower")
def mm(input: Tensor, mat2: Tensor) -> Tensor:
    """The product of two matrices."""
    _ranks("mm", input, mat2, 2, 2)
    return matmul(input, mat2)


def _int_mm(input: Tensor, mat2: Tensor) -> Tensor:
    """The product of two int8 matrices, summed up in int32, which wraps around. DTypeError for other dtypes."""
    _ranks("_int_mm", input, mat2, 2, 2)
    if not input.dtype is mat2.dtype is dtypes.int8:
        raise complain(DTypeError, "_int_mm", f"operands must be int8, got {_both(input, mat2)}",
                       fix="Did you mean matmul?")
    _check("_int_mm", input, mat2, input.shape[1], mat2.shape[0])
    return ops.int_matmul(input, mat2)


@casts(cpu="lower", cuda="lower")
def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """The products of two equally long batches of matrices."""
    _ranks("bmm", input, mat2, 3, 3)
    require_shape("bmm", input.shape[0] == mat2.shape[0], f"batch sizes differ: {_both(input, mat2)}")
    return matmul(input, mat2)


@casts(cpu="plain", cuda="lower")
def mv(input: Tensor, vec: Tensor) -> Tensor:
    """A matrix times a vector."""
    _ranks("mv", input, vec, 2, 1)
    return matmul(input, vec)


@casts(cuda="widest")
def dot(input: Tensor, tensor: Tensor) -> Tensor:
    """The inner product of two vectors."""
    _ranks("dot", input, tensor, 1, 1)
    _check("dot", input, tensor, input.shape[0], tensor.shape[0])
    return ops.sum(ops.mul(input, tensor), axes=(0,))


vdot = dot


def inner(input: Tensor, other: Tensor) -> Tensor:
    """Products summed over the last dimension of both."""
    if not input.shape or not other.shape:
        return mul(input, other)
    if len(input.shape) == len(other.shape) == 1:
        return dot(input, other)
    return tensordot(input, other, ((-1,), (-1,)))


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """All products of elements of two vectors, as a matrix."""
    _ranks("outer", input, vec2, 1, 1)
    return mul(expand_dims(input, (1,)), expand_dims(vec2, (0,)))


ger = outer


@casts(cpu="lower", cuda="lower")
def addmm(input: Operand, mat1: Tensor, mat2: Tensor, *, beta: Operand = 1, alpha: Operand = 1) -> Tensor:
    """``beta * input + alpha * (mat1 @ mat2)``."""
    return _scaled_sum(input, mm(mat1, mat2), beta, alpha)


@casts(cpu="plain", cuda="lower")
def addmv(input: Operand, mat: Tensor, vec: Tensor, *, beta: Operand = 1, alpha: Operand = 1) -> Tensor:
    """``beta * input + alpha * (mat @ vec)``."""
    return _scaled_sum(input, mv(mat, vec), beta, alpha)


@casts(cpu="lower", cuda="lower")
def baddbmm(input: Operand, batch1: Tensor, batch2: Tensor, *, beta: Operand = 1, alpha: Operand = 1) -> Tensor:
    """``beta * input + alpha * (batch1 @ batch2)``, for batches of matrices."""
    return _scaled_sum(input, bmm(batch1, batch2), beta, alpha)


@casts(cpu="lower", cuda="lower")
def addbmm(input: Operand, batch1: Tensor, batch2: Tensor, *, beta: Operand = 1, alpha: Operand = 1) -> Tensor:
    """``beta * input + alpha * (batch1 @ batch2).sum(0)``, for batches of matrices."""
    product = bmm(batch1, batch2)
    return _scaled_sum(input, sum(product, 0, dtype=product.dtype), beta, alpha)


@casts(cuda="lower")
def addr(input: Operand, vec1: Tensor, vec2: Tensor, *, beta: Operand = 1, alpha: Operand = 1) -> Tensor:
    """``beta * input + alpha * outer(vec1, vec2)``."""
    return _scaled_sum(input, outer(vec1, vec2), beta, alpha)


def _scaled_sum(x: Operand, product: Tensor, beta: Operand, alpha: Operand) -> Tensor:
    if type(alpha) is not int or alpha != 1:
        product = mul(product, alpha)
    if type(beta) is not int or beta != 1:
        if type(beta) in (int, float) and beta == 0:
            return _with_zero_gradient(product, x)
        x = mul(x, beta)
    return add(x, product)


def _with_zero_gradient(product: Tensor, x: Operand) -> Tensor:
    """`product`; the gradient of `x` is zeros rather than None. No value of `x` matters, not even NaN."""
    if not getattr(x, "requires_grad", False):
        return product
    return where(full((), False, dtypes.bool_), cast(x, product.dtype), product)


@casts(cpu="lower", cuda="lower")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``: `input` [*, in], `weight` [out, in] (or [in]), `bias` [out]."""
    if len(weight.shape) == 2 and input.shape and input.shape[-1] != weight.shape[1]:
        raise complain(ShapeError, "linear", f"the input has {input.shape[-1]} features, the weight expects "
                                             f"{weight.shape[1]}: {describe(input)}, {describe(weight)}")
    if len(input.shape) > 1 and bias is not None and len(weight.shape) == 2 and bias.shape == weight.shape[:1] \
            and input.dtype is weight.dtype is bias.dtype:
        return _affine(input, weight, bias)
    product = matmul(input, ops.permute(weight, axes=(1, 0)) if len(weight.shape) == 2 else weight)
    if bias is None:
        return product
    return ops.add(*matched("linear", product, bias))


def _affine_arrays(x: Any, weight: Any, bias: Any) -> Any:
    out = x @ weight.T
    out += bias
    return out


@derived(_affine_arrays, vjp=(lambda g, weight: _rows_times_matrix(g, weight),
                              lambda g, x: ops.matmul(ops.permute(_rows(g), axes=(1, 0)), _rows(x)),
                              lambda g: ops.sum(g, axes=tuple(range(len(g.shape) - 1)))))
def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual case of `linear`: rows, with a bias."""
    product = _rows_times_matrix(x, ops.permute(weight, axes=(1, 0)))
    return ops.add(product, broadcast(bias, product.shape))


@casts(cpu="plain", cuda="widest")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input1 @ weight[k] @ input2 + bias[k]`` for each output feature k."""
    product = einsum("...i,kij,...j->...k", input1, weight, input2)
    return product if bias is None else add(product, bias)


@casts(cuda="widest")
def tensordot(a: Tensor, b: Tensor, dims: int | Sequence[Sequence[int]] = 2) -> Tensor:
    """Products summed over the last `dims` dimensions of `a` and the first of `b`, or over the listed pairs."""
    if isinstance(dims, int):
        of_a, of_b = list(range(len(a.shape) - dims, len(a.shape))), list(range(dims))
    else:
        of_a = [one_dim("tensordot", d, len(a.shape)) for d in dims[0]]
        of_b = [one_dim("tensordot", d, len(b.shape)) for d in dims[1]]
    require_shape("tensordot", [a.shape[d] for d in of_a] == [b.shape[d] for d in of_b],
                  f"contracted dimensions differ: {_both(a, b)} over {of_a} and {of_b}")
    free_a = [d for d in range(len(a.shape)) if d not in of_a]
    free_b = [d for d in range(len(b.shape)) if d not in of_b]
    contracted = size([a.shape[d] for d in of_a])
    shape_a, shape_b = tuple([a.shape[d] for d in free_a]), tuple([b.shape[d] for d in free_b])
    left = ops.reshape(permute(a, free_a + of_a), shape=(size(shape_a), contracted))
    right = ops.reshape(permute(b, of_b + free_b), shape=(contracted, size(shape_b)))
    return ops.reshape(matmul(left, right), shape=shape_a + shape_b)


def kron(input: Tensor, other: Tensor) -> Tensor:
    """The Kronecker product."""
    ndim = max(len(input.shape), len(other.shape))
    x = ops.reshape(input, shape=(1,) * (ndim - len(input.shape)) + tuple(input.shape))
    y = ops.reshape(other, shape=(1,) * (ndim - len(other.shape)) + tuple(other.shape))
    shape = tuple([m * n for m, n in zip(x.shape, y.shape)])
    left = expand_dims(x, tuple(range(1, 2 * ndim, 2)))
    return ops.reshape(mul(left, expand_dims(y, tuple(range(0, 2 * ndim, 2)))), shape=shape)


# einsum

@casts(cuda="lower")
def einsum(equation: str, *operands: Any) -> Tensor:
    """Einstein's summation: ``einsum("bij,bjk->bik", x, y)``. Repeated letters within an operand take its diagonal,
    letters that the result lacks are summed over, ``...`` stands for broadcast dimensions. Operands are contracted from
    left to right, each pair as one (batched) matrix product."""
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else list(operands)
    inputs, output = _parse(equation, tensors)
    terms = [_take_diagonals(letters, x) for letters, x in zip(inputs, tensors)]
    letters, result = terms[0]
    for k, (other_letters, other) in enumerate(terms[1:], start=1):
        later = set(output).union(*[term[0] for term in terms[k + 1:]])
        letters, result = _contract(letters, result, other_letters, other, later)
    return _arrange(letters, result, output)


def _parse(equation: str, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, ``...`` written out with digits as letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    require_shape("einsum", len(inputs) == len(tensors),
                  f"{equation!r} names {len(inputs)} operands, but {len(tensors)} were given")
    widths = [len(x.shape) - len(term.replace("...", "")) for term, x in zip(inputs, tensors)]
    for term, x, width in zip(inputs, tensors, widths):
        require_shape("einsum", width == 0 or (width > 0 and "..." in term),
                      f"the term {term!r} does not fit the dimensions of {describe(x)}")
    ellipsis = "".join(chr(ord("\u0400") + k) for k in range(max(widths)))
    written = [term.replace("...", ellipsis[len(ellipsis) - width:]) for term, width in zip(inputs, widths)]
    if arrow:
        output = right.replace("...", ellipsis)
    else:
        counted = "".join(written)
        output = ellipsis + "".join(sorted(c for c in set(counted) - set(ellipsis) if counted.count(c) == 1))
    require_shape("einsum", set(output) <= set("".join(written)) and len(set(output)) == len(output),
                  f"the result of {equation!r} must name letters of the operands, each once")
    return written, output


def _take_diagonals(letters: str, x: Tensor) -> tuple[str, Tensor]:
    """Dimensions that share a letter as one: their diagonal."""
    for c in dict.fromkeys(letters):
        while letters.count(c) > 1:
            first = letters.index(c)
            second = letters.index(c, first + 1)
            require_shape("einsum", x.shape[first] == x.shape[second],
                          f"the letter {c!r} stands for sizes {x.shape[first]} and {x.shape[second]}")
            x = diagonal(x, 0, first, second)
            letters = letters[:first] + letters[first + 1:second] + letters[second + 1:] + c
    return letters, x


def _contract(a: str, x: Tensor, b: str, y: Tensor, later: set[str]) -> tuple[str, Tensor]:
    """Two operands as one: letters that nothing later needs are summed over."""
    a, x = _sum_out(a, x, set(b) | later)
    b, y = _sum_out(b, y, set(a) | later)
    x, y = _common_sizes(a, x, b, y)
    shared = [c for c in a if c in b]
    batch = [c for c in shared if c in later]
    summed = [c for c in shared if c not in later]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    sizes = dict(zip(a + b, tuple(x.shape) + tuple(y.shape)))
    if not summed:
        left, right = _aligned(a, x, batch + rows + columns), _aligned(b, y, batch + rows + columns)
        return "".join(batch + rows + columns), mul(left, right)
    left, right = _as_matrices(a, x, batch, rows, summed, sizes), _as_matrices(b, y, batch, summed, columns, sizes)
    product = _batched_product(left, right)
    order = batch + rows + columns
    return "".join(order), _in_shape(product, tuple([sizes[c] for c in order]))


def _in_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A reshape where one is needed: attention is recognized by what stands between its products."""
    return x if tuple(x.shape) == shape else ops.reshape(x, shape=shape)


@casts(cpu="lower")
def _batched_product(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype is not y.dtype:
        raise complain(DTypeError, "einsum", f"operands differ in dtype: {describe(x)} and {describe(y)}")
    return ops.matmul(x, y)


def _sum_out(letters: str, x: Tensor, needed: set[str]) -> tuple[str, Tensor]:
    axes = [k for k, c in enumerate(letters) if c not in needed]
    if not axes:
        return letters, x
    return "".join(c for c in letters if c in needed), sum(x, axes, dtype=x.dtype)


def _common_sizes(a: str, x: Tensor, b: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """Dimensions of size 1 grown to the size that the other operand has under the same letter."""
    of_x, of_y = dict(zip(a, x.shape)), dict(zip(b, y.shape))
    for c in set(a) & set(b):
        if 1 not in (of_x[c], of_y[c]) and of_x[c] != of_y[c]:
            raise complain(ShapeError, "einsum", f"the letter {c!r} stands for sizes {of_x[c]} and {of_y[c]}")
    grown_x = tuple([max(n, of_y.get(c, n)) if n == 1 else n for c, n in of_x.items()])
    grown_y = tuple([max(n, of_x.get(c, n)) if n == 1 else n for c, n in of_y.items()])
    return broadcast(x, grown_x), broadcast(y, grown_y)


def _as_matrices(letters: str, x: Tensor, batch: list[str], rows: list[str], columns: list[str],
                 sizes: dict[str, int]) -> Tensor:
    """`x` as [*batch, product of rows, product of columns]."""
    moved = permute(x, [letters.index(c) for c in batch + rows + columns])
    return _in_shape(moved, (*[sizes[c] for c in batch], size([sizes[c] for c in rows]), size([sizes[c] for c in columns])))


def _aligned(letters: str, x: Tensor, order: list[str]) -> Tensor:
    """`x` with its dimensions in `order`, and size 1 for letters that it lacks."""
    moved = permute(x, [letters.index(c) for c in order if c in letters])
    return expand_dims(moved, tuple([k for k, c in enumerate(order) if c not in letters]))


def _arrange(letters: str, x: Tensor, output: str) -> Tensor:
    letters, x = _sum_out(letters, x, set(output))
    return permute(x, [letters.index(c) for c in output])


# other

@casts(cuda="widest")
def cross(input: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """The cross product of 3-vectors along `dim`."""
    x, y = matched("cross", input, other)
    axis = one_dim("cross", dim, len(x.shape))
    require_shape("cross", x.shape[axis] == 3, f"expected vectors of 3 along dimension {dim}, got {describe(x)}")
    x, y = movedim(x, axis, 0), movedim(y, axis, 0)
    turned = [_rotated(x, 1), _rotated(y, 2), _rotated(x, 2), _rotated(y, 1)]
    result = ops.sub(ops.mul(turned[0], turned[1]), ops.mul(turned[2], turned[3]))
    return movedim(result, 0, axis)


def _rotated(x: Tensor, by: int) -> Tensor:
    low = (0,) * len(x.shape)
    one = (1,) * len(x.shape)
    head = ops.slice(x, start=low, stop=(by, *x.shape[1:]), step=one)
    return ops.concat(ops.slice(x, start=(by, *low[1:]), stop=tuple(x.shape), step=one), head, axis=0)


@casts(cpu="full", cuda="full")
def cdist(x1: Tensor, x2: Tensor) -> Tensor:
    """The Euclidean distances between all rows of `x1` and of `x2` (of each batch)."""
    x, y = expand_dims(x1, (len(x1.shape) - 1,)), expand_dims(x2, (len(x2.shape) - 2,))
    difference = ops.sub(*matched("cdist", x, y))
    return norm(difference, 2, -1)


@casts(cuda="full")
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """The `p`-norms of the differences of all pairs of rows of a matrix, row 0 with all others first: 1-d."""
    require_shape("pdist", len(input.shape) == 2, f"expected a matrix, got {describe(input)}")
    rows = input.shape[0]
    pairs = np.triu_indices(rows, 1)
    first, second = [ops.take(input, from_array(side.astype(np.int64), input), axis=0) for side in pairs]
    return norm(ops.sub(first, second), p, -1)


@casts(cuda="full")
def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """`input` with every slice along `dim` whose `p`-norm is above `maxnorm` scaled down to it."""
    axis = one_dim("renorm", dim, len(input.shape))
    require_shape("renorm", len(input.shape) > 1, f"expected at least 2 dimensions, got {describe(input)}")
    length = norm(input, p, [d for d in range(len(input.shape)) if d != axis], True)
    limit, one = full_like(length, float(maxnorm)), ones_like(length)
    factor = ops.where(ops.gt(length, limit), ops.div(limit, ops.add(length, full_like(length, 1e-7))), one)
    return mul(input, factor)


# powers and chains

def matrix_power(input: Tensor, n: int) -> Tensor:
    """Square matrices multiplied by themselves, `n` factors in all; `n` must not be negative."""
    shape = tuple(input.shape)
    require_shape("matrix_power", len(shape) >= 2 and shape[-1] == shape[-2], f"expected squares, got {describe(input)}")
    require_shape("matrix_power", n >= 0, f"n must not be negative, got {n}: there is no inverse")
    if n == 0:
        distance = diagonal_distance(*shape[-2:])
        return broadcast(ops.cast(ops.eq(distance, full_like(distance, 0)), dtype=input.dtype), shape)
    half = input if n == 1 else matrix_power(input, n // 2)
    return half if n == 1 else matmul(matmul(half, half), input) if n % 2 else matmul(half, half)


@casts(cuda="lower")
def chain_matmul(*matrices: Tensor) -> Tensor:
    """The product of several matrices, in the order that needs the fewest multiplications."""
    require_shape("chain_matmul", len(matrices) > 0, "expected at least one matrix")
    for x in matrices:
        require_shape("chain_matmul", len(x.shape) == 2, f"expected matrices, got {describe(x)}")
    sizes = [matrices[0].shape[0], *[x.shape[1] for x in matrices]]
    best: dict[tuple[int, int], tuple[int, int]] = {(k, k): (0, k) for k in range(len(matrices))}
    for length in range(1, len(matrices)):
        for i in range(len(matrices) - length):
            j = i + length
            best[i, j] = min((best[i, k][0] + best[k + 1, j][0] + sizes[i] * sizes[k + 1] * sizes[j + 1], k)
                             for k in range(i, j))

    def product(i: int, j: int) -> Tensor:
        k = best[i, j][1]
        return matrices[i] if i == j else mm(product(i, k), product(k + 1, j))

    return product(0, len(matrices) - 1)
