"""Functions and methods beside PyTorch's: one expression, carried out by both, must give equal values, dtypes, shapes
and gradients, or fail in both. Skipped where PyTorch is not installed."""

from __future__ import annotations

import itertools
import operator

import ml_dtypes
import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")          # PyTorch warns of what it will change

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
FLOATS = DTYPES[:4]
SHAPES = ((), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 3, 4))
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 6e-3, "bfloat16": 5e-2}


def numbers(shape, dtype="float32", low=-3.0, high=3.0, seed=0):
    """The same numbers as a Tensor of each library."""
    values = np.asarray(np.random.default_rng([seed, *shape]).uniform(low, high, shape))
    if dtype == "bool":
        values = values > 0
    elif "int" in dtype:
        values = np.floor(np.abs(values) if dtype[0] == "u" else values)
    array = np.asarray(values).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return pair(array)


def pair(array):
    if array.dtype == ml_dtypes.bfloat16:
        return jg.from_numpy(array.copy()), torch.tensor(array.astype(np.float32)).bfloat16()
    return jg.from_numpy(array.copy()), torch.tensor(array)


def to_numpy(x):
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype is torch.bfloat16 else x).numpy()
    x = x.detach()
    return (x.float() if x.dtype is jg.bfloat16 else x).numpy()


def assert_same(ours, theirs, note=""):
    if isinstance(theirs, (tuple, list)) and not isinstance(theirs, torch.Size):
        assert len(ours) == len(theirs), note
        for a, b in zip(ours, theirs):
            assert_same(a, b, note)
        return
    if not isinstance(theirs, torch.Tensor):
        assert str(ours).replace("jitgrad", "torch") == str(theirs) or (type(ours), ours) == (tuple, theirs), note
        return
    assert str(ours.dtype).split(".")[1] == str(theirs.dtype).split(".")[1], f"{note}: {ours.dtype}, {theirs.dtype}"
    assert tuple(ours.shape) == tuple(theirs.shape), f"{note}: {ours.shape}, {theirs.shape}"
    tolerance = TOLERANCE.get(str(theirs.dtype).split(".")[1], 0)
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=tolerance, atol=tolerance, err_msg=str(note))


def run(function, library, tensors):
    try:
        return function(library, *tensors), None
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError) as error:
        return None, error


def check(function, *pairs, note="", may_differ_in_failing=False):
    """`function(library, *tensors)` for both."""
    theirs, their_error = run(function, torch, [p[1] if isinstance(p, tuple) else p for p in pairs])
    ours, our_error = run(function, jg, [p[0] if isinstance(p, tuple) else p for p in pairs])
    if their_error is not None:
        assert may_differ_in_failing or our_error is not None, f"{note}: PyTorch says {their_error}, we give {ours}"
        return
    assert our_error is None, f"{note}: {type(our_error).__name__}: {our_error}"
    assert_same(ours, theirs, note)


def check_gradient(function, *pairs, note=""):
    """Values, and gradients of a weighted sum of all floating-point results."""
    ours = [p[0].detach().clone() if isinstance(p, tuple) else p for p in pairs]
    theirs = [p[1].detach().clone() if isinstance(p, tuple) else p for p in pairs]
    for a, b in zip(ours, theirs):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            a.requires_grad_()
            b.requires_grad_()
    results = function(jg, *ours), function(torch, *theirs)
    assert_same(*results, note=note)
    for result, library in zip(results, (jg, torch)):
        parts = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if r.requires_grad]
        total = 0
        for k, part in enumerate(parts):
            weight = np.random.default_rng(k).uniform(0.5, 1.5, tuple(part.shape)).astype(to_numpy(part).dtype)
            total = total + (part * library.from_numpy(np.asarray(weight))).sum()
        if parts:
            total.backward()
    for a, b in zip(ours, theirs):
        if isinstance(b, torch.Tensor) and b.grad is not None:
            if a.grad is None:
                assert not b.grad.any(), f"{note}: no gradient"
                continue
            assert_same(a.grad, b.grad, f"{note}: gradient")


# elementwise

UNARY = [
    "abs", "neg", "sign", "floor", "ceil", "round", "trunc", "exp", "exp2", "expm1", "log", "log2", "log10",
    "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma", "digamma", "sigmoid", "square", "relu", "isnan",
    "isinf", "isfinite", "logical_not", "bitwise_not", "frac", "nan_to_num", "logit", "positive", "deg2rad", "rad2deg",
    "sinc", "signbit", "isposinf", "isneginf", "isreal", "angle", "conj", "real",
]


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        inside = name in ("asin", "acos", "atanh", "erfinv", "logit")
        x = numbers(shape, dtype, 0.1, 0.9) if inside else numbers(shape, dtype)
        check(lambda t, x: getattr(t, name)(x), x, note=f"{name} {dtype}{shape}",
              may_differ_in_failing=dtype not in FLOATS)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_polygamma(n):
    for dtype in ("float32", "float64", "int64"):
        check(lambda t, x: t.polygamma(n, x), numbers((3, 4), dtype, 0.5, 4), note=f"polygamma {n} {dtype}")
    check(lambda t, x: x.polygamma(n), numbers((5,), "float64", 0.5, 4))


BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "mod": operator.mod,
    "floordiv": operator.floordiv, "pow": operator.pow, "eq": operator.eq, "lt": operator.lt, "ge": operator.ge,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}


@pytest.mark.parametrize("name", BINARY)
def test_operators_promote(name):
    function = BINARY[name]
    for a, b in itertools.product(DTYPES, DTYPES):
        for shapes in (((2, 3), (3,)), ((2, 3), ()), ((), ())):
            if name == "pow" and (("int" in a and "int" in b) or "bool" in (a, b)):
                continue
            x, y = numbers(shapes[0], a, 1, 4), numbers(shapes[1], b, 1, 4, seed=1)
            check(lambda t, x, y: function(x, y), x, y, note=f"{name} {a}{shapes[0]} {b}{shapes[1]}",
                  may_differ_in_failing="bool" in (a, b))
        for number in (2, 2.5, True):
            if name == "pow" and ("int" in a or a == "bool" or number is True):
                continue
            x = numbers((2, 3), a, 1, 4)
            lenient = number is True or a == "bool"
            check(lambda t, x, number=number: function(x, number), x, note=f"{name} {a} {number}",
                  may_differ_in_failing=lenient)
            check(lambda t, x, number=number: function(number, x), x, note=f"{name} {number} {a}",
                  may_differ_in_failing=lenient)


TWO = [
    "maximum", "minimum", "fmax", "fmin", "atan2", "copysign", "hypot", "logaddexp", "xlogy", "fmod", "remainder",
    "floor_divide", "true_divide", "logical_and", "logical_or", "logical_xor", "bitwise_and", "isclose",
    "heaviside", "rsub",
]


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two(name):
    for a, b in itertools.product(("float32", "float64", "bfloat16", "int64", "uint8", "bool"), repeat=2):
        x, y = numbers((2, 3), a), numbers((2, 1), b, 1, 4, seed=1)
        check(lambda t, x, y: getattr(t, name)(x, y), x, y, note=f"{name} {a} {b}", may_differ_in_failing=True)


@pytest.mark.parametrize("name", ["add", "mul", "div", "pow", "sub", "remainder"])
def test_in_place(name):
    for a, b in itertools.product(("float32", "float16", "int64", "bool"), ("float32", "float64", "int32")):
        x, y = numbers((2, 3), a, 1, 4), numbers((3,), b, 1, 4, seed=1)
        check(lambda t, x, y: getattr(x.clone(), name + "_")(y), x, y, note=f"{name}_ {a} {b}")
    check(lambda t, x, y: x.add_(y), numbers((3,)), numbers((2, 3)), note="grows")


# everything else: expressions over x [2, 3, 4], y [2, 3, 4], m [4, 5], v [4], i (integers), b (bools)

def given(dtype):
    return {"x": numbers((2, 3, 4), dtype), "y": numbers((2, 3, 4), dtype, seed=1), "m": numbers((4, 5), dtype, seed=2),
            "v": numbers((4,), dtype, seed=3), "p": numbers((2, 3, 4), dtype, 0.1, 0.9, seed=4),
            "s": numbers((), dtype, 0.5, 2), "e": numbers((0, 3), dtype), "w": holed((2, 3, 4), dtype)}


def holed(shape, dtype):
    """Numbers, those that are large replaced by NaN where the type has it."""
    ours, theirs = numbers(shape, dtype, seed=5)
    if ours.is_floating_point():
        ours, theirs = ours.masked_fill(ours > 1.5, float("nan")), theirs.masked_fill(theirs > 1.5, float("nan"))
    return ours, theirs


INTEGERS = {"i": pair(np.array([[2, 0, 1, -1], [1, 1, 0, 2]])), "j": pair(np.array([0, 2, 1])),
            "g": pair(np.random.default_rng(0).integers(0, 3, (2, 3, 4))), "b": pair(np.array([True, False, True])),
            "c": pair(np.random.default_rng(1).random((2, 3, 4)) > 0.5), "k": pair(np.array([1, 0])),
            "u": pair(np.array(1)), "n": pair(np.array([[2, 0, 1, -100], [1, 1, 0, 2]]))}

REDUCTIONS = """
x.sum() | x.sum(1) | x.sum((0, 2)) | x.sum(-1, keepdim=True) | x.sum(()) | x.mean() | x.mean(1) | x.mean((0, 1), True)
x.var() | x.var(1) | x.var(0, unbiased=False) | x.var((1, 2), correction=0, keepdim=True) | x.std() | x.std(2)
t.var_mean(x, 1) | t.std_mean(x, 1) | x.max() | x.max(1) | x.max(2, keepdim=True) | x.min(0) | x.min()
x.amax((0, 1)) | x.amin(1, True) | x.argmax() | x.argmax(1) | x.argmin(2, keepdim=True) | x.argmax(keepdim=True)
x.prod() | x.prod(1) | x.any() | x.all(1) | x.any((0, 1)) | x.count_nonzero() | x.count_nonzero(1) | x.norm()
x.norm(1, 2) | x.norm(3, 1) | x.norm(float("inf"), 0) | x.norm(p=2, dim=(1, 2), keepdim=True) | x.norm(0)
x.logsumexp(1) | x.logsumexp((0, 2), True) | x.cumsum(1) | x.cumprod(2) | x.median() | x.median(1) | x.kthvalue(2, 1)
x.diff() | x.diff(2, 1) | m.trace() | t.dist(x, y) | x.nansum(1) | s.sum() | s.max(0) | s.sum(0) | s.cumsum(0)
e.sum() | e.sum(0) | e.mean(1) | e.prod() | e.any() | e.all(0) | e.max() | e.amax(1) | e.argmax() | x.sum(3)
x.sum((0, 0)) | x.std(5) | x.aminmax() | x.nanmean(1) | x.max(y) | x.sum(dtype=t.float64) | t.sum(x, 0)
"""

SHAPES_OF = """
x.reshape(6, 4) | x.reshape(-1) | x.reshape((4, -1)) | x.reshape(5, -1) | x.reshape(-1, -1) | x.view(2, 12)
x.transpose(0, 1).view(-1) | x.flatten() | x.flatten(1) | x.flatten(0, 1) | s.flatten() | x.unflatten(2, (2, -1))
x.squeeze() | x[:, :1].squeeze(1) | x[:, :1].squeeze() | x.squeeze(0) | x.unsqueeze(0) | x.unsqueeze(-1)
x.unsqueeze(5) | s.unsqueeze(0) | x.permute(2, 0, 1) | x.permute((1, 2, 0)) | x.permute(0, 1) | x.transpose(0, 2)
x.transpose(-1, -2) | m.t() | m.T | x.mT | x.movedim(0, 2) | x.movedim((0, 1), (2, 0)) | x.swapaxes(0, 1)
x.unsqueeze(0).expand(5, -1, -1, -1) | v.expand(3, 4) | v.expand(3, 5) | v.expand_as(x) | x.repeat(2, 1, 3)
v.repeat(2, 2) | v.tile(2, 2) | x.tile(2) | v.repeat_interleave(3) | x.repeat_interleave(2, 1) | x.narrow(1, 1, 2)
x.narrow(1, 2, 2) | x.select(1, 2) | x.split(2, 2) | x.split(3, 2) | x.split([1, 3], -1) | x.split([1, 1], -1)
x.chunk(2, 1) | x.chunk(5, 2) | x.tensor_split(3, 2) | x.tensor_split((1, 3), 2) | x.unbind() | x.unbind(2)
s.unbind() | t.cat([x, y]) | t.cat([x, y], 2) | t.cat((x, m)) | t.stack([x, y]) | t.stack([x, y], -1)
t.stack([x, m]) | t.vstack([x, y]) | t.hstack([v, v]) | x.flip(0) | x.flip(0, 2) | x.flip((1,)) | x.roll(1, 2)
x.roll(5) | x.roll((1, -1), (0, 2)) | x.rot90() | m.rot90(1) | m.rot90(2) | m.rot90(3) | m.tril() | m.triu(1)
m.tril(-1) | x.tril() | v.triu() | m.diag() | v.diag() | v.diag(1) | v.diag(-2) | m.diag(1) | m.diag(-1)
x.diagonal(0, 1, 2) | x.diagonal(1, 2, 0) | x.diag_embed() | x.diag_embed(1) | t.nn.functional.pad(x, (1, 2))
t.nn.functional.pad(x, (1, 0, 2, 1), value=3) | t.nn.functional.pad(x, (-1, 1))
t.nn.functional.pad(x, (2, 1), mode="reflect") | t.nn.functional.pad(x, (2, 1), mode="replicate")
t.nn.functional.pad(x, (2, 1), mode="circular") | t.meshgrid(v, m[0], indexing="xy") | t.broadcast_tensors(x, v)
x.contiguous() | x.transpose(0, 1).contiguous() | x.clone() | t.atleast_2d(v) | x.unfold(2, 2, 1) | x.unfold(1, 2, 2)
x.ravel() | e.reshape(3, 0) | e.reshape(-1) | e.transpose(0, 1) | e.flatten() | t.cat([e, e])
x.new_zeros(2) | x.new_full((2,), 3) | x.new_ones((2, 1), dtype=t.int64) 
x.size() | x.size(1)
x.dim() | x.numel() | x.ndim | x.element_size() | x.is_floating_point() | len(x) | t.fliplr(m) | t.adjoint(x)
"""

INDEXING = """
x[0] | x[-1] | x[2] | x[0, 1] | x[:, 1] | x[..., 0] | x[1:] | x[:, ::2] | x[:, 1:1] | x[None] | x[:, None, :, None]
x[0, ..., 1:3] | x[::-1] | x[0, 1, 2] | x[0, 1, 2, 3] | x[i[0, :2].abs() % 2] | x[:, i] | x[:, :, i] | x[k, j[:2]]
x[k, :, j[:2]] | x[:, j, j] | x[k[:, None], j] | x[1, :, j] | x[:, 0, j] | x[j] | x[u] | x[:, u] | x[[0, 1]]
x[[0, 1], [2, 0]] | x[:, [True, False, True]] | x[:, b] | x[c] | x[c.any(2)] | x[0, b] | x[:, b, 1:]
x[k, b[:3].nonzero()[:, 0]] | x[x > 0] | x[..., None, j] | x[b] | x[1][b] | x[u, u] | x[True] | x.gather(1, g)
x.gather(2, g) | x.gather(1, g[:1, :2]) | x.gather(0, g) | x.take_along_dim(g, 1) | x.take(j) | x.index_select(1, j)
x.index_select(0, k) | x.index_select(1, u) | x.masked_fill(c, 2) | x.masked_fill(b, 2) | x.masked_fill(x > 0, s)
x.masked_select(c) | x.scatter(1, g[:, :2], y) | x.scatter(1, g, 2) | x.scatter_add(1, g, y)
x.scatter_add(0, g % 2, y) | x.index_add(1, j, y) | x.index_add(1, j, y, alpha=2) | x.index_copy(1, j, y)
x.index_fill(1, j, 2) | x.index_put((k, j[:2]), v) | x.index_put((k, j[:2]), s, True) | x.index_put((u, b), v)
x.nonzero() | x.nonzero(as_tuple=True) | s.nonzero() | x.sort(1) | x.sort(2, descending=True) | x.sort()
x.argsort(1) | x.topk(2)[0] | x.topk(2, 1)[0] | x.topk(2, 1, largest=False)[0] | x.topk(5) | x.masked_scatter(c, y)
x.unique() | t.where(c, x, y) | t.where(c, x, 2.5) | t.where(b[:, None], x, y) | t.where(c, s, y) | t.where(c)
t.searchsorted(v.sort()[0], y) | t.bucketize(y, v.sort()[0]) | t.searchsorted(v.sort()[0], y, right=True)
t.isin(g, j) | g.unique(return_counts=True) | t.bincount(j) | t.bincount(j, minlength=6) | t.unique(g, True, True, True)
t.unique(g % 2, dim=0) | t.unique(g % 2, True, True, True, dim=2) | t.histc(x, 5) | t.histc(v, 7, -1, 1) | t.histc(v * 0, 3)
t.histc(x, 0) | t.histc(x, 5, 2, 1) | t.histc(x / 0, 5) | t.histc(x * t.tensor(float("nan")), 5, 0, 1) | t.histc(e, 4)
t.unique(t.tensor([1.0, float("nan"), 1.0, float("nan")]), True, False, True)
"""

LINEAR = """
x @ m | v @ m | m.T @ v | v @ v | x @ y.mT | x @ v | t.mm(m, m.T) | t.mm(x, m) | t.bmm(x, y.mT) | t.mv(m.T, v)
t.dot(v, v) | t.outer(v, m[0]) | x @ x | m @ v | x.unsqueeze(1) @ y.mT | t.addmm(m[:, :4], m, m.T, beta=2, alpha=3)
t.tensordot(x, y, 2) | t.tensordot(x, m, 1) | t.tensordot(x, y, ([0, 2], [0, 2])) | t.kron(m, m) | t.inner(x, v)
t.einsum("bij,bkj->bik", x, y) | t.einsum("bij,jk", x, m) | t.einsum("ij->ji", m) | t.einsum("ii", m[:, :4] * 1.0)
t.einsum("ii->i", m[:, :4]) | t.einsum("...ij,...kj->...ik", x, y) | t.einsum("i,j->ij", v, v)
t.einsum("bij,bij->", x, y) | t.einsum("bij,jk,b->ik", x, m, x[:, 0, 0]) | t.einsum("...j,jk->...k", x, m)
t.einsum("ijk->j", x * 1.0) | t.einsum("ab,bc", x, m) | t.cross(x[..., :3], y[..., :3], dim=2) | t.cdist(x, y)
t.nn.functional.linear(x, m.T) | t.nn.functional.linear(x, m.T, m[0]) | t.nn.functional.linear(v, m.T)
t.nn.functional.bilinear(x, y, t.stack([v[:, None] * v, v[:, None] + v]), v[:2]) | s @ v
t.baddbmm(x[..., :3], x, y.mT)
"""

NETWORK = """
F.relu(x) | F.relu6(x) | F.gelu(x) | F.gelu(x, approximate="tanh") | F.silu(x) | F.mish(x) | F.softplus(x)
F.softplus(x, 2, 1) | F.leaky_relu(x, 0.2) | F.elu(x, 0.5) | F.selu(x) | F.celu(x, 2.0) | F.hardswish(x)
F.hardsigmoid(x) | F.hardtanh(x) | F.softsign(x) | F.tanhshrink(x) | F.softshrink(x) | F.hardshrink(x)
F.threshold(x, 0.1, 2) | F.logsigmoid(x) | F.glu(x) | F.prelu(x, v[:3]) | F.prelu(x, v[:1]) | F.softmax(x, 1)
F.softmax(x, -1) | F.log_softmax(x, 2) | F.softmin(x, 0) | F.softmax(x * 100, 1) | F.log_softmax(x * 100, 1)
F.dropout(x, 0.5, False) | F.softmax(s, 0) | F.layer_norm(x, (4,)) | F.layer_norm(x, (3, 4), y[0], y[1])
F.layer_norm(x, [4], v, v, 0.1) | F.rms_norm(x, (4,), v) | F.rms_norm(x, (3, 4)) | F.layer_norm(x, (3,))
F.group_norm(x, 3) | F.group_norm(x, 1, v[:3], v[1:]) | F.batch_norm(x, None, None, training=True)
F.batch_norm(x, v[:3], v[1:].abs() + 1, v[:3], v[1:]) | F.instance_norm(x)
F.instance_norm(x, weight=v[:3], bias=v[1:]) | F.normalize(x) | F.normalize(x, 1, 2) | F.local_response_norm(x, 2)
F.mse_loss(x, y) | F.mse_loss(x, y, reduction="sum") | F.mse_loss(x, y, reduction="none") | F.l1_loss(x, y)
F.smooth_l1_loss(x, y, beta=0.5) | F.huber_loss(x, y) | F.binary_cross_entropy(p, F.sigmoid(y))
F.binary_cross_entropy_with_logits(x, F.sigmoid(y)) | F.kl_div(x, F.softmax(y, 1), reduction="batchmean")
F.binary_cross_entropy_with_logits(x, F.sigmoid(y), pos_weight=v.abs(), weight=v.abs())
F.kl_div(x, y, log_target=True) | F.kl_div(x, F.relu(y), reduction="sum") | F.cross_entropy(x, i.abs())
F.cross_entropy(x, n) | F.cross_entropy(x, n, weight=v[:3].abs()) | F.cross_entropy(x, n, reduction="none")
F.nll_loss(x, n, reduction="sum") | F.cross_entropy(x, n, label_smoothing=0.1)
F.cross_entropy(x, n, weight=v[:3].abs(), label_smoothing=0.2, reduction="sum") | F.cross_entropy(v, u)
F.cross_entropy(x, F.softmax(y, 1)) | F.cross_entropy(x, F.softmax(y, 1), weight=v[:3].abs(), label_smoothing=0.1)
F.nll_loss(x, n, v[:3].abs()) | F.cross_entropy(m, j[[0, 1, 2, 1]]) | F.cross_entropy(m, j)
F.cosine_similarity(x, y) | F.cosine_similarity(x, y, 2) | F.pairwise_distance(x, y) | F.triplet_margin_loss(x, y, p)
F.hinge_embedding_loss(x, t.sign(y)) | F.margin_ranking_loss(x, y, t.sign(p)) | F.soft_margin_loss(x, t.sign(y))
F.cosine_embedding_loss(m, m * 2, t.sign(v)) | F.poisson_nll_loss(x, p) | F.gaussian_nll_loss(x, y, p)
F.poisson_nll_loss(p, y.abs() * 3, log_input=False, full=True) | F.embedding(j, m) | F.embedding(g, m, padding_idx=1)
F.embedding(i, m) | F.scaled_dot_product_attention(x, y, p) | F.scaled_dot_product_attention(x, y, p, is_causal=True)
F.scaled_dot_product_attention(x, y, p, scale=0.3) | F.scaled_dot_product_attention(x, y, p, attn_mask=b)
F.scaled_dot_product_attention(x, y, p, attn_mask=m[:3, :3])
F.scaled_dot_product_attention(x[None], y[None], p[None]) | F.max_pool1d(x, 2) | F.max_pool1d(x, 2, 1, 1)
F.max_pool1d(x, 3, 2, ceil_mode=True) | F.avg_pool1d(x, 2) | F.avg_pool1d(x, 3, 1, 1)
F.avg_pool1d(x, 3, 1, 1, count_include_pad=False) | F.max_pool2d(x, 2) | F.max_pool2d(x, (2, 3), 1, (1, 1))
F.avg_pool2d(x, 2) | F.avg_pool2d(x, 2, 1, 1) | F.max_pool2d(x[None], 2, return_indices=True)
F.avg_pool2d(x, 2, ceil_mode=True) | F.adaptive_avg_pool2d(x, 1) | F.adaptive_avg_pool2d(x, (2, 3))
F.adaptive_avg_pool2d(x, (3, 2)) | F.adaptive_avg_pool2d(x, (None, 2)) | F.adaptive_avg_pool1d(x, 3)
F.adaptive_max_pool2d(x, 2) | F.adaptive_max_pool1d(x, 3) | F.lp_pool2d(x[None].abs(), 2, 2) | F.unfold(x[None], 2)
F.unfold(x[None], (2, 3), 1, 1, 2) | F.unfold(x[None], 2, dilation=2) | F.conv1d(x, y) | F.conv1d(x, y, v[:2], 1, 1)
F.conv1d(x, y, padding="same") | F.conv1d(x, y, stride=2, padding=2, dilation=2) | F.conv1d(x[0], y)
F.conv1d(x, y[:, :1].repeat(3, 1, 1)[:3], groups=3) | F.conv2d(x[None], y[None, :, :2, :2])
F.conv2d(x[None], y[:, :2, :2, None].permute(0, 1, 3, 2).repeat(1, 1, 2, 1), v[:2], 1, 1)
F.conv2d(x, y[None, :, :2, :2], stride=2, padding=(1, 0)) | F.conv_transpose1d(x, p.transpose(0, 1))
F.conv_transpose1d(x, p.transpose(0, 1), v[:2], 2, 1, 1)
F.conv_transpose2d(x[None], y[:, :, :2, None], stride=2, padding=1, output_padding=1) | F.interpolate(x, 8)
F.interpolate(x, scale_factor=2) | F.interpolate(x, 3) | F.interpolate(x[None], (5, 7))
F.interpolate(x[None], scale_factor=2, mode="bilinear")
F.interpolate(x[None], (5, 3), mode="bilinear", align_corners=True) | F.interpolate(x, 7, mode="linear")
F.interpolate(x[None], (2, 2), mode="area") | F.interpolate(x[None], (5, 3), mode="nearest-exact")
F.interpolate(x, scale_factor=1.5, mode="linear") | F.pixel_shuffle(x.reshape(1, 4, 2, 3), 2)
F.pixel_unshuffle(x[None], 2) | F.pixel_unshuffle(x[None, :, :2], 2) | F.channel_shuffle(x.reshape(1, 4, 2, 3), 2)
F.one_hot(j) | F.one_hot(i.abs(), 5) | F.one_hot(g, 3)
"""

STATISTICS = """
x.quantile(0.3) | x.quantile(0.25, 1) | x.quantile(p[0, 0, :2], 2, True)
t.quantile(x, 0.5, 0, interpolation="nearest") | t.quantile(x, 0.4, 2, interpolation="lower")
t.quantile(x, 0.4, 2, interpolation="higher") | x.quantile(1.5) | x.quantile(0.5, 9)
t.quantile(x, 0.4, 2, interpolation="midpoint") | t.quantile(w, p[0, 0, :2]) | w.quantile(0.0, 1)
w.nanquantile(0.5) | w.nanquantile(0.3, 1) | w.nanquantile(p[0, 0, :2], 2, True) | t.quantile(s, 0.5)
e.quantile(0.5) | x.quantile(0.5, 1, True) | t.quantile(x, 0.5, interpolation="cubic") | w.nanmedian()
w.nanmedian(1) | w.nanmedian(2, True) | x.nanmedian(0) | j.nanmedian() | g.mode() | g.mode(0)
(x * 2).round().mode(2, True)[0] | j.mode() | s.mode() | x.cummax(1) | w.cummax(2) | w.cummin(1) | g.cummin(1)
x.cummin(0) | j.cummax(0) | s.cummax(0) | x.logcumsumexp(1) | (x * 50).logcumsumexp(2) | e.cummax(0) | t.msort(x)
m.cov() | t.cov(m, correction=0) | t.cov(m[:, :3], fweights=j + 1) | t.cov(m, aweights=v.abs()) | v.cov()
m.corrcoef() | v.corrcoef() | t.cov(m[:, :4], fweights=j + 1) | t.cov(m[:, :3], fweights=j + 1, aweights=v[:3].abs())
x.cov() | t.cov(m[:, :4], aweights=v.abs()) | t.cov(m[:, :4], aweights=v.abs(), correction=0) | t.histogram(x, 4)
t.histogram(v, 3, range=(-1, 1)) | t.histogram(v, v.sort()[0]) | t.histogram(x, 5, weight=p)
t.histogram(x, 4, density=True) | t.histogram(x, 0) | j.unique_consecutive() | g.unique_consecutive(True, True, 1)
(g % 2).unique_consecutive(True, True) | t.unique_consecutive(i, dim=0) | t.unique_consecutive(e)
x.renorm(2, 0, 0.9) | x.renorm(1, 2, 0.5) | v.renorm(2, 0, 1) | t.pdist(m) | t.pdist(m, 1) | t.pdist(x)
t.pdist(m[:1])
"""

ARRANGEMENT = """
t.column_stack([v, m]) | t.column_stack([v, v]) | t.column_stack([s, s]) | t.row_stack([v, v]) | t.dstack([v, v])
t.dstack([x, y]) | t.atleast_3d(s) | t.atleast_3d(v) | t.atleast_3d(m) | t.atleast_3d(x) | x.hsplit(3) | x.hsplit([1])
v.hsplit(2) | v.hsplit(3) | x.vsplit(2) | v.vsplit(2) | x.dsplit(2) | m.dsplit(1) | x.dsplit([1, 3])
x.split_with_sizes([1, 3], 2) | m.diagflat() | v.diagflat(1) | t.block_diag(m, v, s) | t.block_diag(v, i)
t.block_diag(x) | t.block_diag() | t.vander(v) | t.vander(v, 3, True) | t.vander(v, 0) | t.vander(j, 3)
t.vander(v[:0]) | t.vander(m) | t.cartesian_prod(v, m[0]) | t.cartesian_prod(v) | t.cartesian_prod(j, j, k)
t.combinations(v) | t.combinations(v, 3) | t.combinations(v, 2, True) | t.combinations(v, 0) | t.combinations(v, 7)
t.combinations(m) | t.unravel_index(g.abs(), (2, 2)) | t.unravel_index(j + 5, (3, 4)) | t.unravel_index(v, (3, 4))
t.trapezoid(x) | t.trapz(x, dim=1) | t.trapezoid(x, dx=0.5) | t.trapezoid(x, v) | t.trapezoid(x, y, dim=1)
t.trapezoid(x, y, dx=1) | t.trapezoid(i) | t.trapezoid(s) | t.cumulative_trapezoid(x) | t.cumulative_trapezoid(x, v)
t.cumulative_trapezoid(x, dx=2, dim=0) | t.gradient(v) | t.gradient(x, dim=2) | t.gradient(x[:, :2])
t.gradient(m, spacing=0.5, edge_order=2) | t.gradient(m, spacing=(0.5, 2), dim=(0, 1))
t.gradient(x, spacing=[v.cumsum(0)], dim=2) | t.gradient(x, spacing=[(v.abs() + 1).cumsum(0)], dim=2, edge_order=2)
t.gradient(x, dim=0, edge_order=2) | t.gradient(x[:, :1]) | x.sum_to_size(1, 4) | x.sum_to_size((2, 1, 1))
x.sum_to_size(4) | x.sum_to_size(5) | x.slice_scatter(y[:, :2], 1, 1) | x.slice_scatter(y[..., :2], 2, 0, 4, 2)
x.slice_scatter(y, 1, 1) | x.slice_scatter(y, 0) | x.slice_scatter(y[..., :1], -1, -1) | x.select_scatter(y[0], 0, 1)
x.select_scatter(y[:, 0], 1, -1) | x.select_scatter(y, 0, 1) | x.select_scatter(y[0], 0, 2)
x.diagonal_scatter(y[0, :2, :4].T, 0, 1, 0) | m.diagonal_scatter(v[:3], 1) | m.diagonal_scatter(v[:2], -1)
m.diagonal_scatter(v, 1) | x.diagonal_scatter(y[:, 0, :3], 1, 1, 2) | x.put(j, v[:3]) | x.put(j - 2, v[:3], True)
x.put(j, v[:2]) | x.put(v, v) | x.scatter_reduce(1, g % 2, y, "sum")
x.scatter_reduce(1, g % 2, y, "mean", include_self=False) | x.scatter_reduce(1, g % 2, y, "mean")
x.scatter_reduce(1, g % 2, y, "prod") | x.scatter_reduce(1, g % 2, y, "amax") | x.scatter_reduce(2, g, y, "amin")
x.scatter_reduce(1, g % 2, y, "prod", include_self=False) | x.scatter_reduce(1, g, y, "median")
x.scatter_reduce(1, g % 2, y, "amax", include_self=False)
x.scatter_reduce(2, g[:, :2, :3], y, "amin", include_self=False)
t.zeros_like(x).scatter_reduce(1, g % 2, t.relu(y), "amax") | x.scatter_reduce(1, g % 2, y, "sum", include_self=False)
w.scatter_reduce(2, g, y, "amax") | x.scatter_reduce(2, g, w, "amin") | x.scatter_reduce(1, g[:, :0], y, "sum")
x.index_reduce(1, j % 2, y, "prod") | x.index_reduce(1, j % 2, y, "mean")
x.index_reduce(1, j % 2, y, "amax", include_self=False) | x.index_reduce(1, j % 2, y, "amin")
x.index_reduce(1, j, y, "amin") | t.addr(m, v, m[0]) | t.addr(m * 1.0, v * 1.0, m[0] * 1.0, beta=2, alpha=3) | t.ger(v, m[0])
t.addbmm(m[:3, :3], x, y.mT) | t.chain_matmul(m.T, m, m.T) | t.chain_matmul(m) | (m @ m.T).matrix_power(3)
t.matrix_power(x[:, :2, :2], 2) | t.matrix_power(x[:, :2, :2], 0) | t.matrix_power(m, 2)
t.matrix_power(x[:, :2, :2], 1) | m.H | x.mH | x.H | s.H | x.new_tensor([1, 2]) | x.new_tensor(3, dtype=t.int64)
"""

ELEMENTWISE = """
t.logaddexp2(x, y) | t.float_power(p, 2) | t.float_power(i, y) | t.ldexp(x[..., :3], j) | t.ldexp(x, v)
t.gcd(i[:, :3], j) | t.lcm(i[:, :3], j) | t.gcd(x, y) | t.gcd(i, u * 4) | t.nextafter(x, y) | t.frexp(x) | t.frexp(w)
t.signbit(-0.0 * p) | t.isposinf(w / 0) | t.isneginf(w / 0) | t.logaddexp2(w, y) | t.isreal(w) | t.angle(w)
t.sinc(x * 0) | t.deg2rad(i) | t.polar(p, x).real | t.complex(x, y).imag | t.complex(x, y).angle()
t.complex(x, y).conj().imag + 0 | t.view_as_real(t.complex(x, y)) | t.view_as_complex(x[..., :2]).real
(t.polar(p, y) * t.polar(p, x)).angle() | t.complex(x, i) | x.imag | t.view_as_complex(x) | t.view_as_real(x)
t.complex(v, v).isreal() | t.complex(m, m).mH.imag + 0 | t.complex(m, m).adjoint().real | t.complex(x, y).real
t.polar(p, s).imag | x.clone().eq_(y) | x.clone().lt_(y) | x.clone().ge_(0) | i.clone().bitwise_and_(3)
i.clone().bitwise_xor_(k[:1]) | c.clone().bitwise_not_() | i.clone().bitwise_left_shift_(1) | x.clone().xlogy_(p)
x.clone().hypot_(y) | x.clone().atan2_(y) | x.clone().sinh_() | p.clone().acos_() | p.clone().logit_()
x.clone().negative_() | x.clone().deg2rad_() | x.clone().copysign_(y) | i.clone().gcd_(u * 6) | x.clone().sinc_()
x.clone().scatter_reduce_(1, g % 2, y, "amax") | x.clone().index_reduce_(1, j % 2, y, "mean")
x.clone().put_(j, v[:3]) | x.clone().renorm_(2, 0, 0.9) | m.clone().addr_(v, m[0]) | x.clone().fix_()
x.clone().greater_(y) | x.clone().sgn_()
t.exp_(x.clone()) | t.clamp_(x.clone(), -1, 1) | t.xlogy_(x.clone(), p) | t.log_(p.clone()) | t.fill_(x.clone(), 2)
F.leaky_relu_(x.clone(), 0.1) | F.elu_(x.clone()) | t.threshold_(x.clone(), 0.1, 2) | F.pdist(m)
x.detach().clone().apply_(abs) | x.detach().clone().map_(y.detach(), max) | p.clone().cos_().log1p_()
x.hardshrink() | x.prelu(v[:1]) | x.cfloat().real | x.cdouble().abs()
"""

OTHER = """
x.clamp(-1, 1) | x.clamp(min=0) | x.clamp(max=0.5) | x.clamp(y) | x.clamp(min=y, max=p) | x.clamp() | x.lerp(y, 0.3)
x.lerp(y, p) | t.addcmul(x, y, p, value=2) | t.addcdiv(x, y, p, value=0.5) | (x * 1.0).add(y, alpha=2)
x.sub(y, alpha=3) | x.div(y, rounding_mode="floor") | x.div(y, rounding_mode="trunc") | x.div(y, rounding_mode="x")
x ** 2 | x ** 3 | p ** 0.5 | p ** -1 | p ** -0.5 | 2 ** x | p ** y | x ** 0 | x.round(decimals=1)
(x * 100).round(decimals=-1) | t.allclose(x, x) | t.equal(x, y) | x.float() | x.double() | x.half() | x.long()
x.int() | x.bool() | x.to(t.float64) | x.to(y) | x.type_as(s) | x.bfloat16() | x.clone().masked_fill_(c, 1)
x.clone().zero_() | x.clone().fill_(2.5) | x.clone().copy_(v) | x.clone().clamp_(0, 1) | x.clone().mul_(2).add_(1)
x.clone().sub_(y, alpha=2) | x.clone().scatter_(1, g, 1) | x.clone().index_add_(1, j, y) | m.clone().fill_diagonal_(9)
x.clone().unsqueeze(0).exp_() | -x | +x | abs(x) | ~c | c & ~c | (x > 0) | i << 1 | i >> 1 | i // 2 | i % 2 | -i // 2
7 // (i.abs() + 1) | 1 / x | 1 - x | x.lt(y) | x == y | x != 1 | i ** 2 | t.cumsum(c, 0) | i / 2 | t.zeros_like(x)
t.ones_like(x, dtype=t.int64) | t.full_like(x, 3) | t.zeros(2, 3) | t.ones((2, 3)) | t.full((2,), 3)
t.full((2,), 3.5) | t.full((2,), True) | t.arange(5) | t.arange(1, 10, 3) | t.arange(0.0, 1, 0.25)
t.arange(5, 0, -2) | t.arange(3, dtype=t.float32) | t.linspace(0, 1, 5) | t.linspace(3, -2, 7) | t.linspace(0, 1, 1)
t.eye(3) | t.eye(2, 3) | t.tril_indices(3, 4) | t.tensor(3) | t.tensor(3.5) | t.tensor(True) | t.tensor([1, 2])
t.tensor([1, 2.5]) | t.tensor([[1, 2], [3, 4]]) | t.tensor([]) | t.tensor([True, False])
t.tensor([1, 2], dtype=t.float16) | t.tensor([[1, 2], [3]]) | t.tensor([s, s]) | t.as_tensor([1.5]) | t.zeros(-1)
t.triu_indices(3, 4, 1) | t.logspace(0, 2, 3) | t.empty(2, 0) | t.ones(()) | t.zeros(2, dtype=t.bool)
t.result_type(x, 1) | t.result_type(i, 1.5) | t.result_type(i, s) | t.result_type(x, i) | x.size()[1:] | x.size() + (1,)
x.size()[1:].numel() | t.Size([2, 3]).numel() | t.numel(x) | t.is_tensor(x) | t.is_tensor(3) | t.is_floating_point(i)
t.is_complex(x) | t.is_signed(x) | t.is_nonzero(s) | t.is_nonzero(x) | x.is_same_size(y) | t.is_same_size(x, m)
t.promote_types(t.uint8, t.int8) | t.promote_types(t.half, t.bfloat16) | t.can_cast(t.float, t.int)
t.can_cast(t.int, t.uint8) | t.can_cast(t.int, t.bool) | t.can_cast(t.bool, t.long) | t.finfo(t.half) | t.finfo(t.bfloat16)
t.finfo() | t.finfo(t.cdouble) | t.finfo(t.int) | t.iinfo(t.short) | t.iinfo(t.uint8) | t.iinfo(t.float) | x[t.newaxis]
t.full((2,), 1, dtype=t.float) | t.full((2,), 1.5, dtype=t.long) | (t.pi, t.e, t.inf, -t.nan)
t.zeros(2, dtype=t.cfloat).dtype.is_signed | t.hann_window(5) | t.hann_window(4, False) | t.hamming_window(6, True, 0.6, 0.4)
t.blackman_window(7) | t.bartlett_window(5, dtype=t.double) | t.bartlett_window(6, False) | t.kaiser_window(5, False, 3.0)
t.kaiser_window(4) | t.hann_window(1) | t.hann_window(0) | t.hann_window(3, dtype=t.long) | t.hann_window(-1) | t.range(1, 4)
t.range(0, 1, 0.25) | t.range(1, 4, 2, dtype=t.long) | t.range(1, 4, -1) | t.FloatTensor([1, 2]) | t.LongTensor([[1], [2]])
t.HalfTensor(2, 0) | t.BoolTensor([True, False]) | t.frombuffer(bytearray(range(8)), dtype=t.int)
t.frombuffer(bytearray(range(8)), dtype=t.short, count=2, offset=2) | t.frombuffer(bytearray(7), dtype=t.int)
"""


# What PyTorch cannot differentiate (in all the operands that get a gradient here).
NO_TORCH_GRADIENT = ("x.scatter(1, g[:, :2], y)", "unique", "F.batch_norm(x, v", "weight=v[:3]", "n, v[:3]",
                     "weight=v.abs()", "F.soft_margin", "F.hardsigmoid", "t.histc", "t.histogram", "g[:, :2, :3]",
                     "w.scatter_reduce", "(2, g, w", "vander", "g[:, :0]", "t.quantile(w", "sgn_")


def expressions(text):
    return [part.strip() for part in text.replace("\n", "|").split("|") if part.strip()]


TABLES = {"reductions": REDUCTIONS, "shapes": SHAPES_OF, "indexing": INDEXING, "linear": LINEAR, "network": NETWORK,
          "statistics": STATISTICS, "arrangement": ARRANGEMENT, "elementwise": ELEMENTWISE, "other": OTHER}


def evaluate(code):
    def function(t, *tensors):
        scope = {"t": t, "F": t.nn.functional, **dict(zip(NAMES, tensors))}
        return eval(code, {}, scope)

    return function


NAMES = [*given("float32"), *INTEGERS]


EXPRESSIONS = [pytest.param(code, id=f"{name}-{code}") for name, table in TABLES.items() for code in expressions(table)]


@pytest.mark.parametrize("code", EXPRESSIONS)
def test_values(code):
    for dtype in FLOATS if code.startswith("F.") else ("float32", "float64", "int64", "bool", "bfloat16"):
        tensors = {**given(dtype), **INTEGERS}
        check(evaluate(code), *tensors.values(), note=f"{code} ({dtype})", may_differ_in_failing=dtype not in
              ("float32", "float64"))


@pytest.mark.parametrize("code", EXPRESSIONS)
def test_gradients(code):
    tensors = {**given("float64"), **INTEGERS}
    theirs, error = run(evaluate(code), torch, [p[1] for p in tensors.values()])
    if error is None and isinstance(theirs if not isinstance(theirs, tuple) else theirs[0], torch.Tensor) \
            and not any(part in code for part in NO_TORCH_GRADIENT):
        check_gradient(evaluate(code), *tensors.values(), note=code)
