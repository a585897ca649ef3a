"""What only a real GPU can show, or the stand-in takes too long for: ``pytest -m gpu``. Skipped where there is none.

`test_gpu_execution.py` has the programs that run on both."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config
from jitgrad.nn import functional as F
from jitgrad.runtime.cuda import driver, memory
from jitgrad.runtime.cuda.launch import ConstantBlock, Launch, LaunchPlan, Slot
from jitgrad.runtime.cuda.module import Module

pytestmark = pytest.mark.gpu

ADD = b"""
.version 7.0
.target sm_52
.address_size 64
.visible .entry add_f32(.param .u64 x, .param .u64 y, .param .u64 out, .param .u32 n)
{
    .reg .pred %p; .reg .b32 %r<5>; .reg .f32 %f<4>; .reg .b64 %a<8>;
    ld.param.u64 %a1, [x]; ld.param.u64 %a2, [y]; ld.param.u64 %a3, [out]; ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
    mad.lo.s32 %r2, %r2, %r3, %r4;
    setp.ge.u32 %p, %r2, %r1;
    @%p bra done;
    mul.wide.u32 %a4, %r2, 4;
    cvta.to.global.u64 %a1, %a1; cvta.to.global.u64 %a2, %a2; cvta.to.global.u64 %a3, %a3;
    add.u64 %a5, %a1, %a4; add.u64 %a6, %a2, %a4; add.u64 %a7, %a3, %a4;
    ld.global.f32 %f1, [%a5]; ld.global.f32 %f2, [%a6];
    add.f32 %f3, %f1, %f2;
    st.global.f32 [%a7], %f3;
done:
    ret;
}
"""


@pytest.fixture
def add():
    return Module(ADD).function("add_f32")


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (1 << 20,), (64, 33)])
def test_values_go_there_and_back(shape):
    x = jg.randn(*shape) if shape else jg.tensor(1.5)
    for y in (x.cuda(), x.pin_memory().cuda(non_blocking=True), x.cuda().clone()):
        assert y.is_cuda
        np.testing.assert_array_equal(y.cpu().numpy(), x.numpy())


def test_views_fills_and_streams():
    x = jg.arange(60.0).reshape(3, 4, 5)
    y = x.cuda()
    np.testing.assert_array_equal(y.permute(2, 0, 1)[::2].cpu().numpy(), x.permute(2, 0, 1)[::2].numpy())
    side = jg.cuda.Stream()
    side.wait_stream(jg.cuda.current_stream())
    with jg.cuda.stream(side):
        y[1].fill_(7)
    jg.cuda.current_stream().wait_stream(side)
    assert y[1].tolist() == [[7] * 5] * 4 and y[0].tolist() == x[0].tolist()


def test_memory_is_counted_and_given_back():
    jg.cuda.empty_cache()
    before = jg.cuda.memory_allocated()
    x = jg.zeros(1 << 20, device="cuda")
    assert jg.cuda.memory_allocated() - before == 4 << 20 and jg.cuda.max_memory_allocated() >= jg.cuda.memory_allocated()
    free, total = jg.cuda.mem_get_info()
    assert 0 < free < total and jg.cuda.memory_reserved() <= total
    del x
    assert jg.cuda.memory_allocated() == before
    with pytest.raises(jg.cuda.OutOfMemoryError, match="has no memory for"):
        memory.allocate(2 * jg.cuda.mem_get_info()[1])


@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
@pytest.mark.parametrize("dtype", [jg.bfloat16, jg.float16], ids=str)
def test_large_products(turned_a, turned_b, dtype):
    """By warpgroups where the GPU has them, with slices fetched by the copy engine, or (the batch) copied by threads."""
    a, b = jg.randn(2000, 520).to(dtype), jg.randn(520, 2040).to(dtype)
    for batch in ((), (3,)):
        x, y = [jg.stack([v * (k + 1) for k in range(3)]) if batch else v for v in (a, b)]
        x, y = [v.mT.contiguous().cuda().mT if turned else v.cuda() for v, turned in ((x, turned_a), (y, turned_b))]
        found = jg.relu(x @ y).float().cpu()
        wanted = jg.relu(x.float().cpu() @ y.float().cpu())
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=2 ** -7, atol=0.05)


def test_launching_capturing_and_replaying(add):
    n = 1000
    x, y = jg.ones(n, device="cuda"), jg.full((n,), 2.0, device="cuda")
    out = jg.zeros(n, device="cuda")
    plan = LaunchPlan([Launch(add, (8,), (128,), [Slot(0), Slot(1), Slot(2), np.uint32(n)]),
                       Launch(add, (8,), (128,), [Slot(2), Slot(1), Slot(1), np.uint32(n)])], 3, driver.gpu())
    plan.bind([t.data_ptr() for t in (x, y, out)])
    start, end = jg.cuda.Event(enable_timing=True), jg.cuda.Event(enable_timing=True)
    start.record()
    plan.run()                                               # out = 3, y = 5
    plan.replay()                                            # out = 6, y = 11
    end.record()
    assert out.tolist() == [6] * n and y.tolist() == [11] * n
    assert start.elapsed_time(end) > 0 and add.registers > 0 and add.blocks_per_multiprocessor(128) > 0


def test_constants_change_between_replays(add):
    total = jg.zeros(1, device="cuda")
    constants = ConstantBlock(4, driver.gpu(), depth=2)
    plan = LaunchPlan([Launch(add, (1,), (32,), [Slot(0), constants.address, Slot(0), np.uint32(1)])], 1, driver.gpu())
    plan.bind([total.data_ptr()])
    for k in range(100):
        constants.write(np.float32(k).tobytes())
        plan.replay()
    assert total.item() == sum(range(100))


def test_exchange_with_pytorch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch cannot use the GPU")
    x = jg.arange(12.0, device="cuda").reshape(3, 4)
    theirs = torch.from_dlpack(x)
    assert theirs.data_ptr() == x.data_ptr()
    theirs.mul_(2)
    torch.cuda.synchronize()
    assert x.tolist() == (2 * jg.arange(12.0)).reshape(3, 4).tolist()
    ours = jg.from_dlpack(torch.ones(3, 2, device="cuda").T)
    assert ours.shape == (2, 3) and ours.stride() == (1, 2) and ours.tolist() == [[1] * 3] * 2


def slowly(lib, count=20):
    """As many ones added to zeros, one after the other, by whichever library, in its current stream."""
    total = lib.zeros(1 << 22, device="cuda")
    for _ in range(count):
        total = total + 1
    return total


def test_streams_are_ordered_with_those_of_pytorch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch cannot use the GPU")
    with jg.cuda.stream(jg.cuda.Stream()):
        ours = slowly(jg)
        by_default = torch.from_dlpack(ours)
        with torch.cuda.stream(torch.cuda.Stream()):
            aside = torch.from_dlpack(ours).min().item()
    assert by_default.min().item() == 20 == aside
    with torch.cuda.stream(torch.cuda.Stream()):
        theirs = slowly(torch)
        assert jg.from_dlpack(theirs).min().item() == 20


def test_exchange_with_cupy():
    cupy = pytest.importorskip("cupy")
    x = jg.arange(12.0, device="cuda").reshape(3, 4)
    for theirs in (cupy.from_dlpack(x), cupy.asarray(x), cupy.asarray(x.T)):
        assert theirs.data.ptr == x.data_ptr() and float(theirs.sum()) == 66
    made = cupy.arange(6, dtype=cupy.float32).reshape(2, 3).T
    for ours in (jg.from_dlpack(made), jg.as_tensor(made)):
        assert ours.data_ptr() == made.data.ptr and ours.tolist() == made.tolist()
    with jg.cuda.stream(jg.cuda.Stream()):
        aside = cupy.from_dlpack(slowly(jg))
    assert float(aside.min()) == 20


def test_products_in_tf32():
    """Allowed, they are less exact than float32, and no worse than factors of 10 bits behind the point."""
    x, y = jg.randn(300, 500), jg.randn(500, 200)
    exact = x.double() @ y.double()
    try:
        errors = []
        for precision in ("highest", "high"):
            jg.set_float32_matmul_precision(precision)
            found = (x.cuda() @ y.cuda()).cpu().double()
            errors.append(((found - exact).abs().max() / exact.abs().max()).item())
    finally:
        jg.set_float32_matmul_precision("highest")
    assert errors[0] < 1e-6 < errors[1] < 2e-3


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("dtype", [jg.float32, jg.bfloat16, jg.float64], ids=str)
def test_large_products_by_our_kernels_and_by_the_library(dtype, mode):
    """Where the library is not installed, both are ours."""
    x, w, b = jg.randn(520, 640).to(dtype), jg.randn(768, 640).to(dtype), jg.randn(768).to(dtype)
    layers = {"bias": lambda x, w, b: F.linear(x, w, b), "relu": lambda x, w, b: F.relu(F.linear(x, w, b)),
              "gelu": lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), "turned": lambda x, w, b: (w @ x.T).T}
    for name, layer in layers.items():
        exact = layer(x.double(), w.double(), b.double())
        for library in (True, False):
            with config.scope(cublas=library), jg.no_grad():
                run = jg.compile(layer, mode=mode)
                found = [run(x.cuda(), w.cuda(), b.cuda()).double().cpu() for _ in range(4)][-1]
            error = ((found - exact).abs().max() / exact.abs().max()).item()
            assert error < {jg.float32: 1e-5, jg.bfloat16: 1e-2, jg.float64: 1e-13}[dtype], (name, library)


def with_gradients(x, w, options):
    """A convolution with what follows it, and both gradients."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.relu(F.conv2d(x, w, **options))
    return [y, *jg.autograd.grad((y * y).sum(), [x, w])]


CONVOLUTIONS = {
    "3x3": ((8, 32, 30, 31), (64, 32, 3, 3), {"padding": 1}), "strided": ((8, 32, 30, 31), (64, 32, 3, 3), {"stride": 2}),
    "groups": ((4, 32, 16, 16), (64, 8, 3, 3), {"groups": 4, "dilation": 2}), "1x1": ((8, 64, 28, 28), (128, 64, 1, 1), {})}


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("dtype", [jg.float32, jg.bfloat16, jg.float16], ids=str)
def test_convolutions_by_our_kernels_and_by_the_library(dtype, mode):
    """Where the library is not installed, all are ours."""
    for name, (image, weights, options) in CONVOLUTIONS.items():
        x, w = jg.randn(*image).to(dtype), jg.randn(*weights).to(dtype)
        exact = with_gradients(x.double(), w.double(), options)
        for often in ("never", "measured", "always"):
            with config.scope(cudnn=often):
                run = jg.compile(lambda x, w, options=options: with_gradients(x, w, options), mode=mode)
                found = [run(x.cuda(), w.cuda()) for _ in range(4)][-1]
            for part, one, wanted in zip(("result", "image", "weights"), found, exact, strict=True):
                error = ((one.double().cpu() - wanted).abs().max() / wanted.abs().max()).item()
                assert error < (1e-5 if dtype is jg.float32 else 2e-2), (name, often, part)


def attention_with_gradients(x, w, heads, groups, causal):
    """Attention of parts of one product, as transformers have it, and both gradients."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    width = w.shape[1] // (heads + 2 * groups)
    parts = [part.unflatten(-1, (-1, width)).transpose(1, 2)
             for part in (x @ w).split([heads * width, groups * width, groups * width], -1)]
    y = F.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=heads > groups).transpose(1, 2).flatten(2)
    return [y, *jg.autograd.grad((y * y).sum(), [x, w])]


ATTENTION = {"causal": (2, 1024, 8, 8, 64, True), "all keys": (2, 500, 4, 4, 128, False),
             "shared keys": (1, 640, 16, 4, 64, True), "wide": (1, 256, 2, 2, 256, False)}
"""Batch, length, heads of queries, of keys, elements of a row, causal."""


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("dtype", [jg.bfloat16, jg.float16], ids=str)
def test_attention_by_our_kernels_and_by_the_library(dtype, mode):
    """With the same bits in every run. Where the library is not installed, all is ours."""
    for name, (batch, length, heads, groups, width, causal) in ATTENTION.items():
        x = jg.randn(batch, length, 128).to(dtype)
        w = (jg.randn(128, (heads + 2 * groups) * width) * 128 ** -0.5).to(dtype)
        exact = attention_with_gradients(x.double(), w.double(), heads, groups, causal)
        for often in ("never", "measured", "always"):
            with config.scope(cudnn=often):
                run = jg.compile(lambda x, w, more=(heads, groups, causal): attention_with_gradients(x, w, *more), mode=mode)
                runs = [[part.double().cpu() for part in run(x.cuda(), w.cuda())] for _ in range(4)]
            for part, one, again, wanted in zip(("result", "x", "w"), runs[0], runs[-1], exact, strict=True):
                assert jg.equal(one, again), (name, often, part)
                error = ((one - wanted).abs().max() / wanted.abs().max()).item()
                assert error < 3e-2, (name, often, part)
