"""Attention by NVIDIA's library: on a stand-in for it that carries its graphs out with NumPy, and plans of the real one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from canonical import build
from cudnn_standin import MODE_A, MODE_FALLBACK, Way
from cudnn_without_gpu import DRIVER
from library_standin import check, random
from test_cudnn import Clock, library, names

import jitgrad as jg
from jitgrad import config, gpu_plans, nn, ops, tuning
from jitgrad.codegen import cuda_attended, cuda_product
from jitgrad.dtypes import bfloat16, float16
from jitgrad.ir.op import REGISTRY
from jitgrad.nn import functional as F
from jitgrad.products import ATTENDED, SLACK, Attended
from jitgrad.runtime.cuda import cudnn, cudnn_attention, driver
from jitgrad.runtime.spec import PlanSpec

pytestmark = pytest.mark.usefixtures("kernels_of_module")
__all__ = ["library"]

FORWARD, GRADIENT = ATTENDED
ASKED = Attended(FORWARD, "bf16", True, 6, 3, 10, 12, 16, 8)
SIZES = {"one head each": (3, 10, 3, 10, 16, 16), "shared keys": (6, 5, 2, 9, 8, 24), "one query": (2, 1, 2, 7, 8, 8),
         "more queries": (2, 11, 1, 4, 40, 8)}


def drawn(sizes, dtype):
    """q, scaled as users scale it, k and v."""
    n, length, groups, source, width, values = sizes
    return [random(n, length, width, dtype=dtype) * width ** -0.5, random(groups, source, width, dtype=dtype),
            random(groups, source, values, dtype=dtype)]


def attention(causal):
    return lambda q, k, v: ops.attention(q, k, v, causal=causal, zero=False)[0]


def gradients(causal, part):
    """The gradient of the attention's result times g, for q, k or v."""

    def compute(q, k, v, g):
        out, lse = ops.attention(q, k, v, causal=causal, zero=False)
        return ops.attention_grad(g, q, k, v, out, lse, causal=causal, zero=False)[part]

    return compute


def is_ours(executing):
    return [name for name in executing.launches if name.startswith("attention")]


# ---- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_results_and_gradients(library, executing, name, dtype, causal):
    """Against float64 on the CPU; all by the library."""
    q, k, v = drawn(SIZES[name], dtype)
    check(attention(causal), q, k, v, tolerance=4 * 2 ** (-8 if dtype is bfloat16 else -11))
    g = random(*q.shape[:2], v.shape[2], dtype=dtype)
    for part in range(3):
        check(gradients(causal, part), q, k, v, g, tolerance=8 * 2 ** (-8 if dtype is bfloat16 else -11))
    assert len(library.asked) == 7 and not is_ours(executing) and {kind for _, kind, _ in library.asked} == {dtype.numpy}


@pytest.mark.parametrize("by_library", ATTENDED)
def test_either_gradient_follows_either_forward_pass(library, executing, by_library):
    """The logarithms mean the same: one direction is the library's, the other one ours."""
    q, k, v = drawn((4, 20, 2, 24, 16, 16), float16)
    g = random(4, 20, 16, dtype=float16)
    often = {name: "always" if name == by_library else "never" for name in ATTENDED}
    with config.scope(cudnn=often[FORWARD]):
        out, lse = ops.attention(q.cuda(), k.cuda(), v.cuda(), causal=True, zero=False)
    with config.scope(cudnn=often[GRADIENT]):
        found = ops.attention_grad(g.cuda(), q.cuda(), k.cuda(), v.cuda(), out, lse, causal=True, zero=False)
    xs = [x.double().numpy() for x in (q, k, v)]
    results = REGISTRY[FORWARD].eager(*xs, causal=True, zero=False)
    np.testing.assert_allclose(lse.cpu().numpy(), results[1], rtol=1e-3, atol=2e-3)
    wanted = REGISTRY[GRADIENT].eager(g.double().numpy(), *xs, *results, causal=True, zero=False)
    for one, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.double().cpu().numpy(), exact, rtol=0, atol=4e-3 * np.abs(exact).max())
    assert len(library.asked) == 1 and is_ours(executing)


def test_a_users_function_trains_with_it(library, executing):
    """In a captured plan, whose memory the library's workspace is part of."""
    layer = nn.MultiheadAttention(8, 1, batch_first=True, dtype=jg.bfloat16, device="cuda")
    optimizer = jg.optim.SGD(layer.parameters(), lr=0.1)

    @jg.compile
    def step(x):
        optimizer.zero_grad()
        loss = layer(x, x, x, need_weights=False)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    x = random(2, 5, 8, dtype=jg.bfloat16).cuda()
    losses = [step(x).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert step.plan.plan.is_captured and len(library.asked) == 8 and len(library.built) == 2 and not is_ours(executing)


OURS = {
    "float32": lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
    "a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=k[..., 0].unsqueeze(-2)),
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
    "rows that are no multiple of 16 bytes": lambda q, k, v: F.scaled_dot_product_attention(q[..., :4], k[..., :4], v),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours(library, executing, name):
    x = random(1, 2, 5, 8, dtype=jg.bfloat16).cuda()
    assert OURS[name](x, x, x).cpu().shape == x.shape
    assert not library.built and is_ours(executing)


def test_without_a_way_the_kernel_is_ours(library, executing):
    """One that cannot be built, one that needs more memory than is allowed, one that another run may add differently."""
    much = driver.gpu(0).total_memory // cudnn.SHARE + 1
    library.ways = {MODE_A: [Way(builds=False), Way(workspace=much)], MODE_FALLBACK: [Way("any order", (4,))]}
    check(attention(True), *drawn(SIZES["shared keys"], bfloat16), tolerance=2 ** -6)
    assert len(library.built) == 2 and not library.asked and is_ours(executing)


def test_memory_between_operations_counts(library):
    """The gradient's sums of each query lie behind the library's workspace, and are part of what is bounded."""
    gradient = replace(ASKED, kind=GRADIENT)
    planned = cudnn.accepts(driver.gpu(0), gradient)
    assert planned.workspace == 1024 + 4 * 6 * 10                                # 1000 bytes, up to a multiple of 256
    library.ways[MODE_A] = [Way(workspace=driver.gpu(0).total_memory // cudnn.SHARE - 100)]
    assert cudnn.accepts(driver.gpu(0), replace(gradient, keys=13)) is None
    library.ways[MODE_A] = [Way(workspace=5000)]
    assert cudnn.accepts(driver.gpu(0), ASKED).workspace == 5000


# ---- where things lie --------------------------------------------------------------------------------------------------


def packed(x, w, heads):
    """q, k and v of one product, as a transformer makes them."""
    parts = (x @ w).chunk(3, -1)
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]


def block(x, w, o):
    q, k, v = packed(x, w, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ o


def shared_keys(x, w, o):
    q = (x @ w[:, :32]).unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (x @ w[:, 32:64]).chunk(2, -1)]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2) @ o


def with_gradients(function):
    def compute(x, w, o):
        y = function(x, w, o)
        return y, *jg.autograd.grad((y.float() * y.float()).sum(), [x, w, o])

    return compute


def train(function, compiled, sizes=(2, 10, 32)):
    """Results and gradients of a block by a compiled function, and in float64 on the CPU."""
    x, w, o = random(*sizes), random(32, 96) * 0.1, random(32, 32) * 0.1
    xs = [t.to(jg.bfloat16).double().requires_grad_() for t in (x, w, o)]
    exact = with_gradients(function)(*xs)
    found = compiled(*[t.detach().to(jg.bfloat16).cuda().requires_grad_() for t in xs])
    for one, wanted in zip(found, exact, strict=True):
        one, wanted = one.detach().double().cpu().numpy(), wanted.detach().numpy()
        np.testing.assert_allclose(one, wanted, rtol=0, atol=0.04 * np.abs(wanted).max())


def copies(plan):
    return [entry.name for entry in plan.spec.entries if entry.name.startswith("fused_permute")]


@pytest.mark.parametrize("function", [block, shared_keys])
def test_nothing_is_copied_for_it(library, executing, function):
    """Not keys and values, not the result, not its gradient; the query once, when it is scaled."""
    compiled = jg.compile(with_gradients(function))
    train(function, compiled)
    assert len(library.asked) == 2 and not is_ours(executing) and not copies(compiled.plan.plan)
    assert "cudnn_attention" in str(compiled.plan) and "cudnn_attention_grad" in str(compiled.plan)
    asked = [entry.library.asked for entry in compiled.plan.plan.spec.entries if entry.library]
    assert [one.together for one in asked] == [4 if function is block else 2] * 2


@pytest.mark.parametrize("function", [block, shared_keys])
def test_copies_and_our_kernels_without_its_consent(library, executing, function):
    library.ways = {MODE_A: [], MODE_FALLBACK: []}
    compiled = jg.compile(with_gradients(function))
    train(function, compiled)
    assert not library.asked and is_ours(executing) and copies(compiled.plan.plan)


def test_what_lies_at_odd_places_is_copied(library):
    """Rows have to begin at multiples of 16 bytes."""
    def function(x, k, v):
        return F.scaled_dot_product_attention(x[:, :, :32], k[..., 4:36], v[..., 8:40].clone())

    compiled = jg.compile(function)
    check(compiled, *[random(2, 10, 40, dtype=jg.bfloat16) * 0.5 for _ in range(3)], tolerance=2 ** -6)
    (asked,) = [entry.library.asked for entry in compiled.plan.plan.spec.entries if entry.library]
    assert not asked.laid and len(library.asked) == 1


@pytest.mark.parametrize("tile", [2, 4])
def test_what_the_library_would_not_get_is_left_as_it_is(library, executing, monkeypatch, tile):
    """Large ones of whole tiles it gets unless a measurement says otherwise."""
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    monkeypatch.setattr(cuda_product, "LARGE", 1)
    monkeypatch.setattr(cuda_attended, "TILE", tile)
    with config.scope(cudnn="measured"):
        compiled = jg.compile(with_gradients(block))
        train(block, compiled)
    assert bool(library.built) is (tile == 2) and bool(is_ours(executing)) is bool(copies(compiled.plan.plan)) is (tile == 4)


def test_where_rows_of_heads_lie():
    asked = replace(ASKED, heads=4, groups=2, laid=(8, 2, 400, 16, 32, 0, 1, 192, 0, 16, 0, 1, 96, 0, 8, 0, 1, 80, 0, 8))
    assert asked.together == 1 and asked.ends[0] == 8 + 400 + 16 + 9 * 32 + 16 and asked.ends[-2:] == (320, 40)
    assert replace(asked, laid=(8, 4, *asked.laid[2:])).together == 2
    assert replace(asked, laid=(8, 3, *asked.laid[2:])).together == 0
    assert replace(asked, laid=(8, 4, *asked.laid[2:6], 1, *asked.laid[7:16], 2, *asked.laid[17:])).together == 0


# ---- whether it is asked -----------------------------------------------------------------------------------------------


KNOWN = {
    "as it is": ({}, {}, True), "an old version": ({"version": 91001}, {}, False), "an old GPU": ({"major": 7}, {}, False),
    "odd rows": ({}, {"width": 12}, False), "odd values": ({}, {"values": 4}, False),
    "wide rows": ({"major": 8}, {"width": 136}, False), "wide rows on Hopper": ({"major": 9}, {"width": 256}, True),
    "rows too wide": ({"major": 9}, {"values": 264}, False), "too many heads": ({}, {"heads": 3 * 65536}, False),
    "forward after Hopper": ({"major": 10}, {}, True), "gradient": ({"major": 8}, {"kind": GRADIENT}, True),
    "gradient after Hopper": ({"major": 10}, {"kind": GRADIENT}, False),
    "gradient of one score": ({}, {"kind": GRADIENT, "queries": 1, "keys": 1}, False),
    "gradient, part of a tile, an older version": ({"version": 91500}, {"kind": GRADIENT, "keys": 130}, False),
    "gradient, whole tiles, an older version": ({"version": 91500}, {"kind": GRADIENT, "keys": 128}, True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_library_is_known_to_do(name):
    here, changed, wanted = KNOWN[name]

    class Here:
        version, major = here.get("version", 92800), here.get("major", 9)

    assert cudnn_attention.is_known(Here, Here, replace(ASKED, **changed)) is wanted


def step_of_attention(q, k, v):
    return ops.attention(q, k, v, causal=True, zero=False)[0]


def tuned(mode="max-autotune"):
    gpu_plans.clear_plans()
    shapes = [(6, 10, 16), (3, 12, 16), (3, 12, 8)]
    return gpu_plans.compile_for(build(shapes, step_of_attention, dtype=bfloat16), driver.gpu(0), tuned=mode != "default")


def test_large_ones_are_the_librarys(library, monkeypatch):
    """If lengths are whole tiles: the library compiles for every new one."""
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    with config.scope(cudnn="measured"):
        for large, tile, found in ((1, 2, "attention"), (0, 4, "attention"), (0, 2, "cudnn")):
            assert not library.built
            monkeypatch.setattr(cuda_product, "LARGE", ASKED.work + large)
            monkeypatch.setattr(cuda_attended, "TILE", tile)
            assert names(tuned("default")) == [found]
            shutil.rmtree(config.current().cache / "plans")
    with config.scope(cudnn="never"):
        assert names(tuned()) == ["attention"]


@pytest.mark.parametrize(("faster", "found"), [(cuda_product.LIBRARY, ["cudnn"]), (None, ["attention"])])
def test_the_faster_one_is_used_and_remembered(library, monkeypatch, faster, found):
    clock = Clock(**{faster: 0.5} if faster else {}, question="attention")
    monkeypatch.setattr(tuning, "stopwatch", clock)
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    with config.scope(cudnn="measured"):
        plan = tuned()
        assert names(plan) == found and clock.readings
        (decision,) = plan.spec.choices
        assert decision.answers == ((("attention", faster),) if faster else ())
        before = clock.readings
        shutil.rmtree(config.current().cache / "plans")
        assert names(tuned()) == found and clock.readings == before
    with config.scope(cudnn="always"):
        assert names(tuned()) == ["cudnn"] and clock.readings == before


def test_multiplications():
    assert replace(ASKED, causal=False).work == 6 * 10 * 12 * (16 + 8) and ASKED.work == 6 * 10 * 12 * (16 + 8) // 2
    assert replace(ASKED, kind=GRADIENT, causal=False).work == 6 * 10 * 12 * (3 * 16 + 2 * 8)


# ---- plans -------------------------------------------------------------------------------------------------------------


LAID = [0, 1, 160, 0, 16, 0, 1, 192, 0, 16, 0, 1, 96, 0, 8, 0, 1, 80, 0, 8]
WRONG = {"kind": "convolution", "dtype": "f32", "causal": 1, "heads": 7, "groups": 0, "queries": 11, "keys": 1 << 20,
         "width": -8, "values": 16, "workspace": 1 << 20, "laid": LAID[:-1]}


def test_plans_hold_calls_and_are_checked_when_they_are_read(library):
    spec = tuned().spec
    (entry,) = spec.entries
    assert entry.library.asked == replace(ASKED, workspace=1000) and entry.kernel is None and spec.arena >= 1000 + SLACK
    assert PlanSpec.from_json(spec.to_json()) == spec
    elsewhere = [("laid", [*LAID[:k], value, *LAID[k + 1:]]) for k, value in ((0, 8), (4, 24), (6, 0), (9, -16), (1, 4))]
    for name, value in [*WRONG.items(), *elsewhere]:
        data = json.loads(spec.to_json())
        data["entries"][0]["library"]["attention"][name] = value
        with pytest.raises(ValueError, match="not a plan"):
            PlanSpec.from_json(json.dumps(data))


def test_what_a_gradient_takes_and_gives():
    q, k, v, out, lse = ASKED.shapes
    assert (q, k, v, out, lse) == ((6, 10, 16), (3, 12, 16), (3, 12, 8), (6, 10, 8), (6, 10))
    assert replace(ASKED, kind=GRADIENT).shapes == (out, q, k, v, out, lse, q, k, v)


# ---- the real one ------------------------------------------------------------------------------------------------------


def question(capability, **fields):
    given = asdict(replace(ASKED, **fields))
    return [capability, given.pop("kind"), given]


def installed(name):
    return any(found for folder in sys.path for found in Path(folder or ".").glob(f"nvidia/*/lib/{name}"))


PACKED = (*(0, 1, 512, 0, 16), *(64, 4, 6144, 16, 192), *(128, 4, 6144, 16, 192), *(0, 4, 2048, 16, 64))
QUESTIONS = [question(90, heads=8, groups=8, queries=32, keys=32, width=16, values=16, laid=PACKED),
             question(80, kind=GRADIENT, heads=8, groups=8, queries=100, keys=77, width=64, values=64),
             question(90, kind=GRADIENT, dtype="f16", heads=4, groups=2, queries=256, keys=256, width=128, values=128)]


def test_the_real_library_builds_plans(tmp_path):
    """Where it is installed with what it compiles with, without a GPU: it knows the graphs as one kernel for an H100 and an
    A100. A gradient has the memory for scores in 16 bits that its order of sums needs, and not much more."""
    compiler = shutil.which("cc")
    if compiler is None or not all(map(installed, ("libcudnn.so.9", "libnvrtc.so.*", "libcublasLt.so.*"))):
        pytest.skip("cuDNN, what it compiles with, or a compiler of C is not installed")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1",
                    tmp_path / "driver.c"], check=True)
    script = Path(__file__).with_name("cudnn_without_gpu.py")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], input=json.dumps(QUESTIONS), capture_output=True, text=True, check=True,
                          env=environment)
    forward, gradient, shared = json.loads(done.stdout)
    assert forward < 1024 and 8 * 100 * 77 * 2 <= gradient < 2 * 8 * 128 * 128 * 2
    assert 4 * 256 * 256 * 2 <= shared < 4 * 4 * 256 * 256 * 2
