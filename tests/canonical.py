"""Canonical programs as graphs of primitives, with sizes small enough to run as plain Python. For tests of fusion and
code generation: each entry of `PROGRAMS` is (name, graph, the templates it must fuse to)."""

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import float32, int64
from jitgrad.ir import GraphBuilder, TensorType
from jitgrad.transforms.autodiff import vjp


def build(shapes, function, dtype=float32):
    """The graph of `function` over operands of these shapes (or types)."""
    builder = GraphBuilder()
    xs = [builder.input(s if isinstance(s, TensorType) else TensorType(dtype, s)) for s in shapes]
    with builder:
        result = function(*xs)
    return builder.build(result if isinstance(result, (list, tuple)) else [result])


def along_rows(v, shape):
    """A value without the last dimension, repeated along it."""
    return ops.broadcast_to(ops.reshape(v, shape=(*v.shape, 1)), shape=shape)


def along_columns(v, shape):
    return ops.broadcast_to(ops.reshape(v, shape=(*(1,) * (len(shape) - len(v.shape)), *v.shape)), shape=shape)


def mean(v, axes):
    total = ops.sum(v, axes=axes)
    count = float(np.prod([v.shape[a] for a in axes]))
    return ops.mul(total, ops.full(total.shape, 1 / count, v.dtype))


def softmax(x):
    last = (len(x.shape) - 1,)
    e = ops.exp(ops.sub(x, along_rows(ops.max(x, axes=last), x.shape)))
    return ops.div(e, along_rows(ops.sum(e, axes=last), x.shape))


def softmax_backward(y, g):
    last = (len(y.shape) - 1,)
    return ops.mul(y, ops.sub(g, along_rows(ops.sum(ops.mul(g, y), axes=last), y.shape)))


def layer_norm(x, weight, bias):
    n = x.shape
    distance = ops.sub(x, along_rows(mean(x, (1,)), n))
    variance = mean(ops.mul(distance, distance), (1,))
    scale = ops.rsqrt(ops.add(variance, ops.full(variance.shape, 1e-5, x.dtype)))
    normal = ops.mul(distance, along_rows(scale, n))
    return [ops.add(ops.mul(normal, along_columns(weight, n)), along_columns(bias, n)), scale]


def layer_norm_backward(g, x, center, scale, weight):
    n = x.shape
    normal = ops.mul(ops.sub(x, along_rows(center, n)), along_rows(scale, n))
    inner = ops.mul(g, along_columns(weight, n))
    first = along_rows(mean(inner, (1,)), n)
    second = along_rows(mean(ops.mul(inner, normal), (1,)), n)
    dx = ops.mul(ops.sub(ops.sub(inner, first), ops.mul(normal, second)), along_rows(scale, n))
    return [dx, ops.sum(ops.mul(g, normal), axes=(0,)), ops.sum(g, axes=(0,))]


def rms_norm(x, weight):
    square = mean(ops.mul(x, x), (1,))
    scale = ops.rsqrt(ops.add(square, ops.full(square.shape, 1e-6, x.dtype)))
    return ops.mul(ops.mul(x, along_rows(scale, x.shape)), along_columns(weight, x.shape))


def cross_entropy(x, target):
    """The loss, and its gradient in x."""
    n = x.shape
    distance = ops.sub(x, along_rows(ops.max(x, axes=(1,)), n))
    total = ops.sum(ops.exp(distance), axes=(1,))
    logs = ops.sub(distance, along_rows(ops.log(total), n))
    hit = ops.eq(ops.iota(shape=n, axis=1, dtype=int64), along_rows(target, n))
    loss = ops.neg(mean(ops.sum(ops.where(hit, logs, ops.zeros_like(x)), axes=(1,)), (0,)))
    return [loss, ops.sub(ops.exp(logs), ops.where(hit, ops.ones_like(x), ops.zeros_like(x)))]


def nll(x, target):
    """The same loss by gather, as the functional form has it."""
    n = x.shape
    distance = ops.sub(x, along_rows(ops.max(x, axes=(1,)), n))
    logs = ops.sub(distance, along_rows(ops.log(ops.sum(ops.exp(distance), axes=(1,))), n))
    picked = ops.gather(logs, ops.expand_dims(target, (1,)), axis=1)
    return ops.neg(mean(picked, (0, 1)))


def gelu(x):
    cube = ops.mul(ops.mul(x, x), x)
    inner = ops.tanh(ops.mul(ops.add(x, ops.mul(cube, ops.full_like(x, 0.044715))), ops.full_like(x, 0.79788)))
    return ops.mul(ops.mul(x, ops.full_like(x, 0.5)), ops.add(inner, ops.ones_like(x)))


def batch_norm_2d(x, weight):
    n = x.shape

    def up(v):
        return ops.broadcast_to(ops.reshape(v, shape=(1, n[1], 1, 1)), shape=n)

    distance = ops.sub(x, up(mean(x, (0, 2, 3))))
    variance = mean(ops.mul(distance, distance), (0, 2, 3))
    return ops.mul(ops.mul(distance, up(ops.rsqrt(variance))), up(weight))


def batch_norm_1d(x, weight):
    distance = ops.sub(x, along_columns(mean(x, (0,)), x.shape))
    variance = mean(ops.mul(distance, distance), (0,))
    scale = along_columns(ops.mul(ops.rsqrt(variance), weight), x.shape)
    return ops.mul(distance, scale)


def linear_relu(x, weight, bias, residual):
    y = ops.matmul(x, ops.permute(weight, axes=(1, 0)))
    return ops.add(ops.relu(ops.add(y, along_columns(bias, y.shape))), residual)


def mlp_step(x, w, b, w2):
    """Two layers forward, and gradients of the first layer for the gradient y of the result y."""
    hidden = ops.relu(ops.add(ops.matmul(x, w), along_columns(b, (6, 10))))
    y = ops.matmul(hidden, w2)
    zero = ops.zeros_like(hidden)
    g = ops.where(ops.le(hidden, zero), zero, ops.matmul(y, ops.permute(w2, axes=(1, 0))))
    return [ops.matmul(ops.permute(x, axes=(1, 0)), g), ops.sum(g, axes=(0,)), y]


def several_outputs(a, b):
    both = ops.add(a, b)
    return [ops.exp(both), ops.sin(both), ops.mul(a, b)]


def with_own_transpose(a):
    e = ops.exp(a)
    return ops.add(e, ops.permute(e, axes=(1, 0)))


def heads(x):
    """[2, 6, 8] -> two heads, softmax along the last dimension."""
    split = ops.permute(ops.reshape(x, shape=(2, 6, 2, 4)), axes=(0, 2, 1, 3))
    return softmax(ops.mul(split, ops.full(split.shape, 0.5, x.dtype)))


def mean_square_error(x, target):
    distance = ops.sub(x, target)
    return [mean(ops.mul(distance, distance), (0, 1)), distance]


def strided(x):
    odd = ops.slice(x, start=(1, 0), stop=(6, 8), step=(2, 1))
    return ops.mul(ops.flip(odd, axes=(1,)), odd)


PROGRAMS = [
    ("chain", build([(6, 8), (8,), ()], lambda x, y, c: ops.exp(ops.add(
        ops.mul(x, ops.broadcast(c, (6, 8))), ops.broadcast(y, (6, 8))))), ["map"]),
    ("several_outputs", build([(6, 8), (6, 8)], several_outputs), ["map"]),
    ("transposed_operand", build([(6, 8), (8, 6)], lambda a, b: ops.add(a, ops.permute(b, axes=(1, 0)))), ["map"]),
    ("own_transpose", build([(6, 6)], lambda a: ops.add(a, ops.permute(a, axes=(1, 0)))), ["map"]),
    ("computed_transpose", build([(6, 6)], with_own_transpose), ["map", "map"]),
    ("transposed_result", build([(6, 8)], lambda x: ops.permute(ops.exp(x), axes=(1, 0))), ["map"]),
    ("regrouped", build([(6, 8)], lambda x: ops.exp(ops.reshape(ops.mul(x, x), shape=(3, 2, 2, 4)))), ["map"]),
    ("strided", build([(6, 8)], strided), ["map"]),
    ("outer_product", build([(6,), (8,)], lambda a, b: ops.mul(along_rows(a, (6, 8)), along_columns(b, (6, 8)))),
     ["map"]),
    ("gated_rows", build([(6, 8), (6,)], lambda x, s: ops.mul(x, along_rows(ops.sigmoid(s), (6, 8)))), ["map"]),
    ("gelu", build([(6, 8)], gelu), ["map"]),
    ("scalars", build([(), ()], lambda a, b: ops.add(ops.exp(a), ops.mul(a, b))), ["map"]),
    ("empty", build([(0, 5)], lambda x: ops.exp(x)), ["map"]),
    ("size_one", build([(1, 1), (1, 1)], lambda x, y: ops.add(ops.exp(x), y)), ["map"]),
    ("softmax", build([(6, 8)], softmax), ["row"]),
    ("softmax_3d", build([(2, 3, 5)], softmax), ["row"]),
    ("softmax_vector", build([(50,)], softmax), ["row"]),
    ("softmax_backward", build([(6, 8), (6, 8)], softmax_backward), ["row"]),
    ("heads", build([(2, 6, 8)], heads), ["row"]),
    ("cross_entropy", build([(6, 8), TensorType(int64, (6,))], cross_entropy), ["row", "full"]),
    ("nll", build([(6, 8), TensorType(int64, (6,))], nll), ["row", "full"]),
    ("nll_backward", vjp(build([(6, 8), TensorType(int64, (6,))], nll), (0,)).graph, ["row", "full"]),
    ("layer_norm", build([(6, 8), (8,), (8,)], layer_norm), ["row"]),
    ("layer_norm_backward", build([(6, 8), (6, 8), (6,), (6,), (8,)], layer_norm_backward), ["column", "row"]),
    ("rms_norm", build([(6, 8), (8,)], rms_norm), ["row"]),
    ("batch_norm_2d", build([(3, 4, 5, 6), (4,)], batch_norm_2d), ["row"]),
    ("batch_norm_1d", build([(30, 4), (4,)], batch_norm_1d), ["column", "column", "map"]),
    ("bias_gradient", build([(300, 7)], lambda g: ops.sum(g, axes=(0,))), ["column"]),
    ("bias_gradient_3d", build([(20, 15, 7)], lambda g: ops.sum(ops.mul(g, g), axes=(0, 1))), ["column"]),
    ("loss", build([(6, 8), (6, 8)], mean_square_error), ["full"]),
    ("extremes", build([(6, 8)], lambda x: [ops.max(x, axes=(1,)), ops.argmax(x, axis=1), ops.min(x, axes=(1,))]),
     ["row"]),
    ("argmin_columns", build([(6, 8)], lambda x: ops.argmin(x, axis=0)), ["row"]),
    ("product", build([(6, 8)], lambda x: ops.prod(x, axes=(0, 1))), ["full"]),
    ("empty_sums", build([(0, 3)], lambda x: [ops.sum(x, axes=(0, 1)), ops.sum(x, axes=(0,)), ops.sum(x, axes=(1,))]),
     None),
    ("turned_product", build([(6, 8), (6, 10)], lambda x, g: ops.permute(
        ops.matmul(ops.permute(x, axes=(1, 0)), g), axes=(1, 0))), ["matmul"]),
    ("linear_relu", build([(6, 8), (10, 8), (10,), (6, 10)], linear_relu), ["matmul"]),
    ("mlp_step", build([(6, 8), (8, 10), (10,), (10, 3)], mlp_step),
     ["matmul", "matmul", "matmul", "matmul", "column"]),
]


def inputs_of(graph, seed=0):
    """Arrays for the inputs of a graph: normal numbers, or small integers."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(v.shape) if v.dtype.is_floating_point else rng.integers(0, 3, v.shape))
            .astype(v.dtype.numpy) for v in graph.inputs]
