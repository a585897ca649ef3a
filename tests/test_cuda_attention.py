"""Attention on a GPU: kernels for tensor cores and for CUDA cores on the PTX interpreter against what NumPy gives, their
machine code, and steps of a Transformer on a stand-in for a GPU."""

import re

import numpy as np
import pytest
from cuda_launching import run
from gpu_programs import tensor
from ptx import PtxError, sass
from samples import random

import jitgrad as jg
from jitgrad import nn, ops, pipeline
from jitgrad.codegen import cuda_attention, cuda_call, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.dtypes import bfloat16, float16, float32, float64, from_numpy
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.nn import functional as F
from jitgrad.transforms.autodiff import vjp

UNIT = {"f64": 2e-14, "f32": 1e-6, "bf16": 2 ** -8, "f16": 2 ** -11}
"""What a result in a dtype may be off by, relative to the largest; scores are rounded to it on their way into a product."""

MORE = {"mask": (1, 2, 20, 40), "dropped": True, "causal": True}


def operands(sizes, dtype, mask=None, dropped=False):
    """Of (heads of q, L, heads of k, S, E, V); a mask hides a third of the scores, and one row altogether."""
    n, length, groups, source, width, values = sizes
    xs = [random(n, length, width, dtype=dtype, low=-0.6, high=0.6), random(groups, source, width, dtype=dtype, seed=1),
          random(groups, source, values, dtype=dtype, seed=2)]
    if mask is not None:
        added = random(*mask, dtype=dtype, seed=3)
        added[..., 1::3] = -np.inf
        added[..., 0, :] = -np.inf
        xs.append(added)
    if dropped:
        xs += [np.array(2**40 + 5), np.array(2**33 + 1), np.array(0.4, np.float32),
               np.array(1 / 0.6, np.float64 if dtype is float64 else np.float32)]
    return xs


def lowered(name, xs, attrs, aligned=True):
    """The launches of an op on arrays, and the types of its results."""
    types = tuple([TensorType(from_numpy(x.dtype), x.shape) for x in xs])
    return lower_cuda(REGISTRY[name], types, attrs, (), aligned), REGISTRY[name].result_types(types, dict(attrs))


def check(sizes, dtype=bfloat16, causal=False, zero=True, aligned=True, schedule="together", **more):
    """Both directions against NumPy, which computes in float32 or float64."""
    xs, attrs, skew = operands(sizes, dtype, **more), {"causal": causal, "zero": zero}, 0 if aligned else 1
    made = REGISTRY["attention"].eager(*xs, **attrs)
    call, types = lowered("attention", xs, attrs, aligned)
    close(run(call, xs, types, schedule=schedule, skew=skew), made, dtype)
    xs = [random(*made[0].shape, dtype=dtype, seed=4), *xs, *made]
    wanted = REGISTRY["attention_grad"].eager(*xs, **attrs)
    call, types = lowered("attention_grad", xs, attrs, aligned)
    close(run(call, xs, types, schedule=schedule, skew=skew), wanted, dtype)


def close(found, wanted, dtype):
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = x.astype(np.float64), y.astype(np.float64)
        scale = np.abs(y[np.isfinite(y)]).max(initial=1)
        np.testing.assert_allclose(x, y, rtol=0, atol=3 * UNIT[dtype.short] * scale)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "more", "schedule"), [
    ((1, 70, 1, 70, 32, 24), {"causal": True}, "random"),
    ((2, 20, 1, 40, 21, 9), MORE, "reversed"),
], ids=str)
def test_tensor_cores(sizes, more, schedule):
    """Several tiles, rows of 16 bytes and others, heads that share keys."""
    check(sizes, bfloat16, schedule=schedule, **more)


def test_long_rows():
    """Columns beyond 128 are made by another block."""
    check((1, 12, 1, 20, 72, 200), float16, causal=True)


@pytest.mark.parametrize(("sizes", "dtype", "more", "schedule"), [
    ((2, 20, 1, 40, 20, 68), float32, MORE, "reversed"),
    ((1, 34, 1, 36, 6, 4), float64, {}, "random"),
], ids=str)
def test_cuda_cores(sizes, dtype, more, schedule):
    check(sizes, dtype, schedule=schedule, **more)


def forward(sizes, dtype, aligned=True):
    """The forward pass, causal, against NumPy; its launch."""
    xs, attrs = operands(sizes, dtype), {"causal": True, "zero": False}
    call, types = lowered("attention", xs, attrs, aligned)
    close(run(call, xs, types, skew=0 if aligned else 1), REGISTRY["attention"].eager(*xs, **attrs), dtype)
    return call.launches[0]


@pytest.mark.parametrize(("dtype", "width"), [(float32, 8), (bfloat16, 260)], ids=str)
def test_operands_at_odd_addresses(dtype, width):
    """And rows that are too long for tensor cores."""
    assert forward((1, 10, 1, 21, width, 8), dtype, aligned=False).alignment == dtype.itemsize


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(cuda_attention, "ENOUGH", 1)
    assert forward((1, 140, 1, 140, 32, 32), bfloat16).grid == 2


def test_indices_of_64_bits(monkeypatch):
    """With a low bound on what is large, since nothing here can hold two thousand million elements."""
    monkeypatch.setattr(cuda_call, "WIDE", 100)
    assert forward((1, 20, 1, 20, 16, 16), bfloat16).wide


@pytest.mark.parametrize("zero", [True, False])
def test_nothing_to_see(zero):
    """No keys at all: NaN, or zeros; and gradients that are none."""
    check((2, 3, 2, 0, 8, 8), bfloat16, zero=zero)


def test_an_empty_result_is_no_launch():
    for sizes in ((0, 3, 0, 5, 4, 4), (2, 0, 2, 5, 4, 4)):
        assert lowered("attention", operands(sizes, float32), {"causal": False, "zero": False})[0].launches == ()


def test_dropped_weights_are_those_of_the_cpu():
    """With the identity for values the weights themselves come out."""
    q, k, v = np.zeros((1, 20, 8), np.float32), np.zeros((1, 30, 8), np.float32), np.eye(30, dtype=np.float32)[None]
    draw = [np.array(11), np.array(5), np.array(0.3, np.float32), np.array(1 / 0.7, np.float32)]
    kept = []
    for dtype in (float32, bfloat16):
        xs = [x.astype(dtype.numpy) for x in (q, k, v)] + draw
        call, types = lowered("attention", xs, {"causal": False, "zero": False})
        wanted = REGISTRY["attention"].eager(*xs, causal=False, zero=False)[0]
        kept.append(run(call, xs, types)[0] > 0)
        np.testing.assert_array_equal(kept[-1], wanted > 0)
    np.testing.assert_array_equal(*kept)
    assert 0.6 < kept[0].mean() < 0.8


def test_no_matrix_of_scores_in_memory():
    """Twice as long, twice the scratch memory."""
    sizes = [sum(lowered("attention_grad", [np.empty(s, np.float32) for s in ((4, n, 64),) * 5 + ((4, n),)],
                         {"causal": True, "zero": False})[0].scratch) for n in (512, 1024)]
    assert sizes[1] == 2 * sizes[0] < 4 * 1024 * 64


# ---- text ------------------------------------------------------------------------------------------------------------


def source_of(name, sizes, dtype, **more):
    """The text of the kernel that makes the results of an op in a direction: without comments, as it is compiled."""
    xs, attrs = operands(sizes, dtype, **more), {"causal": True, "zero": False}
    if name != "attention":
        q, v = xs[0], xs[2]
        out = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
        xs = [out, *xs, out, np.empty(q.shape[:2], np.float64 if dtype is float64 else np.float32)]
    call, _ = lowered("attention" if name == "attention" else "attention_grad", xs, attrs)
    (launch,) = [launch for launch in call.launches if launch.name == f"{name}_{dtype.short}"]
    return launch


def test_a_new_shape_gives_the_same_text():
    for name in ("attention", "attention_queries", "attention_keys"):
        for dtype in (float32, bfloat16):
            one, other = [source_of(name, sizes, dtype).source for sizes in ((2, 20, 2, 30, 64, 64), (6, 70, 3, 1, 48, 40))]
            assert one == other


@pytest.mark.parametrize(("name", "number"), [("attention", 0), ("attention", 1), ("attention_keys", 0)])
def test_no_barrier_can_be_spared(name, number):
    """Each of them left out is a race, or memory that was never written, and found."""
    xs = operands((1, 70, 1, 140, 32, 32), bfloat16)
    attrs = {"causal": False, "zero": False}
    if name != "attention":
        xs = [np.ones_like(xs[0]), *xs, np.ones_like(xs[0]), np.zeros((1, 70), np.float32)]
    call, types = lowered("attention" if name == "attention" else "attention_grad", xs, attrs)
    (launch,) = [launch for launch in call.launches if launch.name == f"{name}_bf16"]
    places = [m.start() for m in re.finditer(r"^ +barrier\(\)", launch.source, re.MULTILINE)]
    assert len(places) == {"attention": 3, "attention_keys": 2}[name]
    object.__setattr__(launch, "source", launch.source[:places[number]] + re.sub(
        r"barrier\(\)", "pass", launch.source[places[number]:], count=1))
    with pytest.raises(PtxError):
        run(call, xs, types, schedule="random")


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "name", "dtype", "width", "products"), [
    ("sm_80", "attention", bfloat16, 64, 64), ("sm_90", "attention", bfloat16, 128, 128),
    ("sm_100", "attention_queries", float16, 64, 48), ("sm_90", "attention_keys", bfloat16, 128, 64),
    ("sm_90", "attention_keys", float32, 64, 0),
    ("sm_100", "attention", float32, 128, 0)])
def test_machine_code(architecture, name, dtype, width, products):
    """Nothing is spilled; rows are read and written 16 bytes at a time, all products of 16-bit floats are on tensor cores
    with factors that come by matrix loads or stayed in registers, and float32 is computed in float32."""
    launch = source_of(name, (64, 1024, 64, 1024, width, width), dtype)
    assert launch.grid > 500
    cubin = toolchain.link([compile_ptx(launch.source, architecture)], architecture)
    sass.assert_no_spills(cubin)
    listing = toolchain.disassemble(cubin)[launch.name]
    codes = sass.opcodes(listing)
    sass.assert_no_double(listing)
    assert cubin.kernels[launch.name].registers * launch.threads <= 32_768           # two blocks beside each other
    assert any(code.startswith("STG.E.128") for code in codes)
    if products:
        assert sum(count for code, count in codes.items() if code.startswith("HMMA.16816")) == products
        assert any(code.startswith("LDGSTS") and "128" in code for code in codes)
        assert any(code.startswith("LDSM.16.M") for code in codes) and any(code.startswith("LDSM.16.MT") for code in codes)
    else:
        assert codes["FFMA"] > 300 and any(code.startswith("LDG.E.128") for code in codes)


# ---- steps -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention of GPT and a feed-forward network."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x):
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))


def steps(device):
    """The loss and all gradients of a compiled step in mixed precision, and the step."""
    jg.manual_seed(4)
    block = Block(16, 2).to(device)

    def step(x):
        block.zero_grad()
        with jg.autocast(device, dtype=jg.bfloat16):
            y = block(x)
        loss = y.float().square().mean()
        loss.backward()
        return loss

    compiled = jg.compile(step)
    jg.manual_seed(5)
    loss = compiled(tensor(device, 2, 9, 16))
    return [loss.detach(), *[p.grad for p in block.parameters()]], compiled


def test_a_transformer_gives_what_it_gives_on_the_cpu(executing):
    """Causal, with dropout: attention is kernels on tensor cores, and none of it is left to the computer."""
    (ours, step), (theirs, _) = steps("cuda"), steps("cpu")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.cpu().numpy(), b.numpy(), rtol=0, atol=2e-2 * max(b.abs().max().item(), 1e-2))
    assert KERNELS["bf16"] <= {kernel.name for kernel in step.kernels}
    assert not [entry.name for entry in step.plan.plan.host_entries if "attention" in entry.name]


KERNELS = {short: {f"{name}_{short}" for name in ("attention", "attention_dots", "attention_queries", "attention_keys")}
           for short in ("f32", "bf16")}


def test_attention_that_is_written_out_is_recognized():
    """In the plan for a GPU, forward and backward, causal by a mask that is written out, too."""
    builder = GraphBuilder("step")
    q, k, v = [builder.input(TensorType(float32, (2, 2, 24, 16))) for _ in range(3)]
    with builder:
        shape = (2, 2, 24, 24)
        row, column = [ops.iota(shape=shape, axis=axis, dtype=jg.int64) for axis in (2, 3)]
        hidden = ops.full(shape, -np.inf, float32)
        scores = ops.where(ops.ge(row, column), ops.matmul(q, ops.transposed(k)), hidden)
        top = ops.broadcast_to(ops.reshape(ops.max(scores, axes=(3,)), shape=(2, 2, 24, 1)), shape=shape)
        weights = ops.exp(ops.sub(scores, top))
        total = ops.broadcast_to(ops.reshape(ops.sum(weights, axes=(3,)), shape=(2, 2, 24, 1)), shape=shape)
        out = ops.matmul(ops.div(weights, total), v)
    joint = vjp(builder.build([out]), (0, 1, 2), (0,)).graph
    entries = pipeline.build_for_gpu(joint, "sm_90").spec.entries
    assert KERNELS["f32"] <= {entry.name for entry in entries} and not [e for e in entries if e.host]
