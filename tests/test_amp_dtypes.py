"""Which function gives which dtype under autocast: PyTorch's answers, on a CPU by running it, for a GPU by its lists."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional
from jitgrad import nn
from jitgrad.functional import autocast as casting
from jitgrad.tensor import Tensor

OURS = SimpleNamespace(t=jg, F=jitgrad.nn.functional, nn=nn)


def _table():
    """Name -> function of a library, a tensor of shape [2, 6, 8] in some dtype and the same one in float32."""
    products = {
        "matmul": lambda m, x, y: m.t.matmul(x, y.transpose(1, 2)),
        "operator @": lambda m, x, y: x @ y.transpose(1, 2),
        "matmul of a vector": lambda m, x, y: x[0] @ y[0, 0],
        "mm": lambda m, x, y: m.t.mm(x[0], y[1].T),
        "bmm": lambda m, x, y: m.t.bmm(x, y.transpose(1, 2)),
        "mv": lambda m, x, y: m.t.mv(x[0], x[0, 0]),
        "dot": lambda m, x, y: m.t.dot(x[0, 0], x[0, 1]),
        "inner of vectors": lambda m, x, y: m.t.inner(x[0, 0], x[0, 1]),
        "inner of matrices": lambda m, x, y: m.t.inner(x[0], y[0]),
        "outer": lambda m, x, y: m.t.outer(x[0, 0], x[0, 1]),
        "tensordot": lambda m, x, y: m.t.tensordot(x[0], y[0].T, 1),
        "addmm": lambda m, x, y: m.t.addmm(y[0, :6, :6], x[0], y[0].T),
        "addmv": lambda m, x, y: m.t.addmv(x[0, :, 0], x[0], x[0, 0]),
        "baddbmm": lambda m, x, y: m.t.baddbmm(y[:, :, :6], x, y.transpose(1, 2)),
        "einsum": lambda m, x, y: m.t.einsum("bij,bkj->bik", x, y),
        "einsum of a product": lambda m, x, y: m.t.einsum("i,j->ij", x[0, 0], x[0, 1]),
        "linear": lambda m, x, y: m.F.linear(x, y[0], y[0, :, 0]),
        "conv1d": lambda m, x, y: m.F.conv1d(x, y[:, :, :3], y[0, 0, :2]),
        "conv2d": lambda m, x, y: m.F.conv2d(x[None], y[None, :, :3, :3]),
        "conv3d": lambda m, x, y: m.F.conv3d(x[None, None], y[None, None, :, :3, :3]),
        "conv_transpose1d": lambda m, x, y: m.F.conv_transpose1d(x, y[0, :, None, :3]),
        "conv_transpose2d": lambda m, x, y: m.F.conv_transpose2d(x[None], y[:, None, :3, :3]),
        "conv_transpose3d": lambda m, x, y: m.F.conv_transpose3d(x[None, None], y[None, None, :1, :3, :3]),
        "prelu": lambda m, x, y: m.F.prelu(x, y[0, 0, :1]),
        "attention": lambda m, x, y: m.F.scaled_dot_product_attention(x[None], y[None], y[None]),
    }
    full = {
        "prod": lambda m, x, y: x.prod(),
        "prod over a dimension": lambda m, x, y: x.prod(1),
        "trace": lambda m, x, y: x[0, :, :6].trace(),
        "cdist": lambda m, x, y: m.t.cdist(x, x),
        "avg_pool3d": lambda m, x, y: m.F.avg_pool3d(x[None, None], 2),
        "max_pool3d": lambda m, x, y: m.F.max_pool3d(x[None, None], 2),
        "adaptive_avg_pool3d": lambda m, x, y: m.F.adaptive_avg_pool3d(x[None, None], 2),
        "pad reflect": lambda m, x, y: m.F.pad(x, (1, 1), mode="reflect"),
        "pad replicate": lambda m, x, y: m.F.pad(x, (1, 1), mode="replicate"),
        "pad circular": lambda m, x, y: m.F.pad(x, (1, 1), mode="circular"),
        "pad": lambda m, x, y: m.F.pad(x, (1, 1)),
        "grid_sample": lambda m, x, y: m.F.grid_sample(x[None], x[None, :, :, :2].sigmoid(), align_corners=False),
        "mse_loss": lambda m, x, y: m.F.mse_loss(x, y),
        "l1_loss": lambda m, x, y: m.F.l1_loss(x, y),
        "smooth_l1_loss": lambda m, x, y: m.F.smooth_l1_loss(x, y),
        "huber_loss": lambda m, x, y: m.F.huber_loss(x, y),
        "kl_div": lambda m, x, y: m.F.kl_div(x, y.softmax(-1), reduction="sum"),
        "poisson_nll_loss": lambda m, x, y: m.F.poisson_nll_loss(x, y.abs()),
        "soft_margin_loss": lambda m, x, y: m.F.soft_margin_loss(x, y.sign()),
        "hinge_embedding_loss": lambda m, x, y: m.F.hinge_embedding_loss(x, y.sign()),
        "margin_ranking_loss": lambda m, x, y: m.F.margin_ranking_loss(x, y, y.sign()),
        "triplet_margin_loss": lambda m, x, y: m.F.triplet_margin_loss(x, y, x),
        "cosine_embedding_loss": lambda m, x, y: m.F.cosine_embedding_loss(x[0], y[0], y[0, :, 0].sign()),
        "cross_entropy": lambda m, x, y: m.F.cross_entropy(x[0], m.t.arange(6)),
        "nll_loss": lambda m, x, y: m.F.nll_loss(x[0], m.t.arange(6)),
        "binary_cross_entropy": lambda m, x, y: m.F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
        "binary_cross_entropy_with_logits": lambda m, x, y: m.F.binary_cross_entropy_with_logits(x, y.sigmoid()),
    }
    others = {
        "cat": lambda m, x, y: m.t.cat([x, y]), "cat of one": lambda m, x, y: m.t.cat([x, x]),
        "stack": lambda m, x, y: m.t.stack([x, y]),
        "index_copy": lambda m, x, y: m.t.index_copy(x, 0, m.t.arange(2), y),
        "add": lambda m, x, y: x + y, "mul by a number": lambda m, x, y: x * 2.0,
        "relu": lambda m, x, y: m.F.relu(x), "gelu": lambda m, x, y: m.F.gelu(x), "silu": lambda m, x, y: m.F.silu(x),
        "softmax": lambda m, x, y: m.F.softmax(x, -1), "log_softmax": lambda m, x, y: m.F.log_softmax(x, -1),
        "sigmoid": lambda m, x, y: x.sigmoid(), "tanh": lambda m, x, y: x.tanh(), "exp": lambda m, x, y: x.exp(),
        "log": lambda m, x, y: x.log(), "power": lambda m, x, y: x ** 2, "power of 1.5": lambda m, x, y: x ** 1.5,
        "sum": lambda m, x, y: x.sum(), "mean": lambda m, x, y: x.mean(1), "var": lambda m, x, y: x.var(),
        "cumsum": lambda m, x, y: x.cumsum(1), "norm": lambda m, x, y: x.norm(), "amax": lambda m, x, y: x.amax(1),
        "logsumexp": lambda m, x, y: x.logsumexp(1), "softplus": lambda m, x, y: m.F.softplus(x),
        "layer_norm": lambda m, x, y: m.F.layer_norm(x, (8,)),
        "dropout": lambda m, x, y: m.F.dropout(x), "max_pool2d": lambda m, x, y: m.F.max_pool2d(x[None], 2),
        "avg_pool2d": lambda m, x, y: m.F.avg_pool2d(x[None], 2),
        "adaptive_avg_pool2d": lambda m, x, y: m.F.adaptive_avg_pool2d(x[None], 2),
        "interpolate": lambda m, x, y: m.F.interpolate(x, scale_factor=2.0),
        "cosine_similarity": lambda m, x, y: m.F.cosine_similarity(x, x),
        "gaussian_nll_loss": lambda m, x, y: m.F.gaussian_nll_loss(x, x, x.abs()),
        "where": lambda m, x, y: m.t.where(y > 0, x, y), "compare": lambda m, x, y: x > y,
        "in place": lambda m, x, y: (x + 0).mul_(2.0),
        "matrix in place": lambda m, x, y: (x[0, :, :6] + 0).addmm_(x[0], x[0].T),
    }
    layers = {
        "Linear": lambda m, x, y: m.nn.Linear(8, 4)(x),
        "Linear without bias": lambda m, x, y: m.nn.Linear(8, 4, bias=False)(x),
        "Bilinear": lambda m, x, y: m.nn.Bilinear(8, 8, 4)(y, y),
        "Conv2d": lambda m, x, y: m.nn.Conv2d(2, 4, 3)(x[None]),
        "Embedding": lambda m, x, y: m.nn.Embedding(9, 4)(m.t.arange(3)),
        "BatchNorm1d": lambda m, x, y: m.nn.BatchNorm1d(6)(x),
        "GroupNorm": lambda m, x, y: m.nn.GroupNorm(2, 6)(x),
        "LayerNorm": lambda m, x, y: m.nn.LayerNorm(8)(x),
        "LSTM": lambda m, x, y: m.nn.LSTM(8, 4)(y)[0], "LSTM's state": lambda m, x, y: m.nn.LSTM(8, 4)(y)[1][1],
        "GRU": lambda m, x, y: m.nn.GRU(8, 4)(y)[0], "RNN": lambda m, x, y: m.nn.RNN(8, 4)(y)[0],
        "LSTMCell": lambda m, x, y: m.nn.LSTMCell(8, 4)(y[0])[1], "GRUCell": lambda m, x, y: m.nn.GRUCell(8, 4)(y[0]),
        "RNNCell": lambda m, x, y: m.nn.RNNCell(8, 4)(y[0]),
        "MultiheadAttention": lambda m, x, y: m.nn.MultiheadAttention(8, 2)(y, y, y)[0],
        "TransformerEncoderLayer": lambda m, x, y: m.nn.TransformerEncoderLayer(8, 2, 16)(y),
    }
    return {**products, **full, **others, **layers}, {*layers, "dropout"}


TABLE, RANDOM = _table()
VALUES = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)


def called(library, function, dtype, lower):
    """The dtype's name and the values that a function gives in a region."""
    y = library.t.tensor(VALUES)
    with library.t.autocast("cpu", dtype=getattr(library.t, lower)):
        result = function(library, y.to(getattr(library.t, dtype)), y)
    return str(result.dtype).split(".")[1], result.detach().float().numpy()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("lower", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "half"])
@pytest.mark.parametrize("name", TABLE)
def test_results_on_a_cpu_are_those_of_pytorch(name, dtype, lower, torch):
    theirs = SimpleNamespace(t=torch, F=torch.nn.functional, nn=torch.nn)
    dtype = lower if dtype == "half" else dtype
    try:
        expected, values = called(theirs, TABLE[name], dtype, lower)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"PyTorch refuses it: {error}")
    found, ours = called(OURS, TABLE[name], dtype, lower)
    assert found == expected
    if name not in RANDOM:
        np.testing.assert_allclose(ours, values, rtol=3e-2, atol=6e-2)


# A GPU: what PyTorch's header lists, whether or not there is one

LISTS = {"lower": ("AT_FORALL_LOWER_PRECISION_FP",), "full": ("AT_FORALL_FP32",),
         "total": ("AT_FORALL_FP32_SET_OPT_DTYPE", "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE"),
         "widest": ("AT_FORALL_PROMOTE",)}
NAMES = {"grid_sampler": "grid_sample", "upsample_bilinear2d": "interpolate", "rnn_tanh_cell": "rnn_cell",
         "vdot": "dot"}
OWN = {"rnn_layer", "lstm_layer", "gru_layer", "projected_lstm_layer", "norm", "binary_cross_entropy"}
"""Without a list there: cuDNN's layers, a norm with several signatures, and an error."""


def header_lists(torch):
    text = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()
    found = {}
    for name, body in re.findall(r"#define (AT_FORALL_\w+)\(_\)((?:.*\\\n)+.*)", text):
        for function in re.findall(r"_\((\w+)", body):
            found[NAMES.get(function, function)] = name
    return found


def test_rules_on_a_gpu_are_those_of_pytorch(torch):
    theirs = header_lists(torch)
    ours = {name: by_device["cuda"] for name, by_device in casting.rules.items() if "cuda" in by_device}
    assert len(theirs) > 80 and len(ours) > 70
    for name, rule in ours.items():
        if name not in OWN:
            assert theirs[name] in LISTS[rule], name
    for name in theirs:
        if hasattr(jg, name) or hasattr(OURS.F, name):
            assert name in ours, name


@pytest.fixture
def gpu(monkeypatch):
    """A region on a GPU, with Tensors that say that they lie there."""
    monkeypatch.setattr(Tensor, "device", property(lambda self: "cuda:0"))
    jg.set_autocast_enabled("cuda", True)
    yield jg.tensor(VALUES)
    jg.set_autocast_enabled("cuda", False)


def test_casts_on_a_gpu(gpu):
    x, h = gpu, gpu.half()
    assert (x @ x.mT).dtype is jg.float16
    assert OURS.F.linear(x, x[0]).dtype is jg.float16
    for function in (jg.exp, jg.log, jg.rsqrt, lambda v: v ** 2, lambda v: v.softmax(-1), jg.sum, lambda v: v.cumsum(1),
                     lambda v: v.norm(), lambda v: v.logsumexp(1), lambda v: OURS.F.layer_norm(v, (8,)), OURS.F.softplus,
                     lambda v: OURS.F.mse_loss(v, v), lambda v: OURS.F.cross_entropy(v[0], jg.arange(6))):
        assert function(h).dtype is jg.float32
    for function in (jg.tanh, jg.sqrt, OURS.F.relu, lambda v: v + v, lambda v: v.mean(), lambda v: v.clone().exp_()):
        assert function(h).dtype is jg.float16
    assert jg.addcmul(h, h, x).dtype is jg.float32 and jg.addcmul(h, h, h).dtype is jg.float16
    assert jg.sum(h, dtype=jg.float16).dtype is jg.float16
    assert OURS.F.softmax(h, -1, jg.float16).dtype is jg.float16


def test_what_is_never_cast(gpu):
    wide = gpu.double()
    assert (wide @ wide.mT).dtype is jg.float64 and jg.exp(wide).dtype is jg.float64
    whole = jg.ones(2, 2, dtype=jg.int64)
    assert (whole @ whole).dtype is jg.int64
    assert jg.exp(gpu.to(jg.complex64)).dtype is jg.complex64


def test_binary_cross_entropy_is_refused_on_a_gpu(gpu):
    with pytest.raises(RuntimeError, match=r"unsafe to autocast.*binary_cross_entropy_with_logits"):
        OURS.F.binary_cross_entropy(gpu.sigmoid(), gpu.sigmoid())
    assert OURS.F.binary_cross_entropy_with_logits(gpu.half(), gpu.sigmoid()).dtype is jg.float32


@pytest.mark.cpu
def test_a_region_on_a_gpu_leaves_other_devices_alone():
    jg.set_autocast_enabled("cuda", True)
    try:
        x = jg.tensor(VALUES)
        assert (x @ x.mT).dtype is jg.float32
    finally:
        jg.set_autocast_enabled("cuda", False)
