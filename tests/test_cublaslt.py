"""Matrix products by NVIDIA's library, on a stand-in for it that checks what it is asked and computes with NumPy."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from canonical import build
from cublaslt_standin import StandInLibrary
from library_standin import TOLERANCE, check, random

import jitgrad as jg
from jitgrad import config, gpu_plans, ops, tuning
from jitgrad.codegen import cuda_product
from jitgrad.codegen.choice import answering
from jitgrad.codegen.cuda_product import Products
from jitgrad.nn import functional as F
from jitgrad.pipeline import build_for_gpu
from jitgrad.products import SLACK, WORKSPACE, Laid, Product
from jitgrad.runtime.cuda import cublaslt, driver
from jitgrad.runtime.spec import PlanSpec

pytestmark = pytest.mark.usefixtures("kernels_of_module")
ANY = Products(library=lambda product: True)


@pytest.fixture
def library(executing, monkeypatch):
    """The stand-in of the library beside that of the GPU; it is asked for small products, too."""
    monkeypatch.setattr(cuda_product, "LARGE", 1)
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    made = StandInLibrary(executing)
    cublaslt.connect(made)
    gpu_plans.clear_plans()
    with config.scope(cublas=True):
        yield made
    cublaslt.disconnect()
    jg.set_float32_matmul_precision("highest")
    assert made.problems == []


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types(library, dtype):
    check(lambda x, y: x @ y, random(9, 5, dtype=dtype), random(5, 7, dtype=dtype))
    (asked,) = library.asked
    assert asked["compute"] == (70 if dtype is jg.float64 else 68) and asked["type"] == dtype.numpy


LAYOUTS = {
    "rows": lambda x, y: x @ y,
    "columns": lambda x, y: x.T.contiguous().T @ y.T.contiguous().T,
    "left turned": lambda x, y: x.T.contiguous().T @ y,
    "right turned": lambda x, y: x @ y.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(library, layout):
    function = LAYOUTS[layout]
    check(function, random(6, 10), random(10, 8))
    check(jg.compile(function), random(6, 10), random(10, 8))
    assert library.asked


def test_parts_of_matrices(library):
    """Factors that begin somewhere in their memory, with rows longer than what is read of them: without copies."""
    check(jg.compile(lambda x, y: x[1:7, 2:9] @ y[2:, 3:10].T), random(8, 12), random(7, 10))
    assert [asked["shape"] for asked in library.asked] == [(1, 5, 6)]


@pytest.mark.parametrize(("left", "right"), [
    ((3, 4, 5), (3, 5, 6)), ((3, 4, 5), (5, 6)), ((4, 5), (3, 5, 6)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((1, 5), (5, 1)),
    ((4, 1), (1, 3)), ((7,), (7, 3))])
def test_batches_and_single_rows(library, left, right):
    check(jg.matmul, random(*left), random(*right))
    assert library.asked


def test_heads_that_lie_between_each_other_are_ours():
    """A batch that no one stride describes."""
    def heads(x):
        return ops.permute(ops.reshape(x, shape=(2, 5, 3, 2)), axes=(0, 2, 1, 3))

    graph = build([(2, 5, 6)] * 2, lambda x, y: ops.matmul(heads(x), ops.permute(heads(y), axes=(0, 1, 3, 2))))
    with answering({"product": cuda_product.LIBRARY}) as found:
        assert not any(entry.library for entry in build_for_gpu(graph, "sm_90", allowed=ANY).spec.entries)
    assert "product" not in found.asked


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_products_of_nothing(library, shape):
    m, k, n = shape
    check(jg.matmul, random(m, k), random(k, n), tolerance=1) if m * n else (random(m, k).cuda() @ random(k, n).cuda())
    assert not library.asked


def test_tf32(library):
    x, y = random(6, 10), random(10, 8)
    jg.set_float32_matmul_precision("high")
    check(lambda x, y: x @ y, x, y, tolerance=1e-3)
    check(lambda x, y: x @ y, x.double(), y.double())
    assert [asked["compute"] for asked in library.asked] == [77, 70]


# ---- what follows ----------------------------------------------------------------------------------------------------


EPILOGUES = {
    "bias": (4, lambda x, w, b: F.linear(x, w, b)),
    "bias and relu": (6, lambda x, w, b: F.relu(F.linear(x, w, b))),
    "bias and gelu": (36, lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh")),
    "relu": (2, lambda x, w, b: F.relu(F.linear(x, w))),
    "gelu": (32, lambda x, w, b: F.gelu(F.linear(x, w), approximate="tanh")),
    "bias in front": (4, lambda x, w, b: b + x @ w.T),
}


@pytest.mark.parametrize("dtype", [jg.float32, jg.bfloat16], ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_what_follows_is_the_librarys(library, executing, name, dtype):
    number, function = EPILOGUES[name]
    check(jg.compile(function), random(6, 10, dtype=dtype), random(8, 10, dtype=dtype), random(8, dtype=dtype))
    assert [asked[7] for asked in library.asked] == [number]
    assert executing.launches == {} or set(executing.launches) <= {"fused_cast_f64", "fused_cast_f32"}


def test_rows_of_a_batch_have_one_bias(library):
    check(jg.compile(EPILOGUES["bias and relu"][1]), random(2, 3, 10), random(8, 10), random(8))
    assert [asked["shape"] for asked in library.asked] == [(1, 8, 6)]


def part(x, stop):
    return ops.slice(x, start=(0, 0), stop=(6, stop), step=(1, 1))


def nearly_gelu(y):
    cubed = jg.mul(jg.mul(jg.mul(y, y), y), 0.044715)
    return jg.mul(jg.mul(y, 0.5), jg.add(jg.tanh(jg.mul(jg.add(y, cubed), 0.8)), 1.0))


OURS = {
    "exact gelu": lambda x, w, b: F.gelu(F.linear(x, w, b)),
    "another activation": lambda x, w, b: F.silu(F.linear(x, w, b)),
    "one number per row": lambda x, w, b: jg.add(F.linear(x, w), part(x, 1)),
    "a residual": lambda x, w, b: jg.add(F.linear(x, w, b), part(x, 8)),
    "rounded in between": lambda x, w, b: ops.cast(ops.cast(F.linear(x, w, b), dtype=jg.float16), dtype=jg.float32),
    "two results": lambda x, w, b: [y := F.linear(x, w, b), F.relu(y)],
    "another constant": lambda x, w, b: nearly_gelu(F.linear(x, w, b)),
}


def calls(function, dtype=jg.float32):
    """The library's products in the plan of a function of x, w and b."""
    graph = build([(6, 10), (8, 10), (8,)], function, dtype)
    spec = build_for_gpu(graph, "sm_90", allowed=ANY).spec
    return [entry.library.asked for entry in spec.entries if entry.library]


@pytest.mark.parametrize("name", OURS)
def test_what_the_library_cannot_do_is_our_kernels(library, name):
    """Fusion spares a pass over memory."""
    assert calls(OURS[name]) == []
    assert [product.activation for product in calls(EPILOGUES["bias and gelu"][1])] == ["gelu"]


def test_float64_that_is_rounded_to_float32_is_ours(library):
    assert calls(lambda x, w, b: ops.cast(ops.cast(F.linear(x, w), dtype=jg.float32), dtype=jg.float64), jg.float64) == []


def test_a_bias_in_float64_is_ours(library):
    assert calls(F.linear, jg.float64) == [] and len(calls(F.linear)) == 1


def test_autocast_casts_the_bias_first(library):
    @jg.compile
    def layer(x, w, b):
        with jg.autocast("cuda", jg.bfloat16):
            return F.relu(F.linear(x, w, b))

    x, w, b = random(6, 10), random(8, 10), random(8)
    found = layer(x.cuda(), w.cuda(), b.cuda())
    np.testing.assert_allclose(found.float().cpu().numpy(), F.relu(F.linear(x, w, b)).numpy(), atol=0.3)
    assert [(asked[7], asked["type"]) for asked in library.asked] == [(6, jg.bfloat16.numpy)]


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_captured_plans(library):
    """Calls of the library are parts of CUDA graphs, with a workspace of the plan's; the way to compute is chosen once."""
    both = jg.compile(lambda x, w, b: F.linear(F.relu(F.linear(x, w, b)), w.T))
    w, b = random(8, 10), random(8)
    for _ in range(5):
        check(both, random(6, 10), w, b)
    assert both.plan.plan.is_captured
    assert [asked[7] for asked in library.asked] == [6, 1] * 5 and library.heuristics == 2 * 2


def test_a_second_stream_and_a_second_gpu(library):
    x, y = random(6, 10), random(10, 8)
    product = jg.compile(lambda x, y: x @ y)
    for device in ("cuda:0", "cuda:1"):
        a, b = x.to(device), y.to(device)
        side = jg.cuda.Stream(device)
        side.wait_stream(jg.cuda.current_stream(device))
        with jg.cuda.stream(side):
            results = [product(a, b) for _ in range(4)]
        jg.cuda.current_stream(device).wait_stream(side)
        for found in results:
            np.testing.assert_allclose(found.cpu().numpy(), x.numpy() @ y.numpy(), rtol=1e-5, atol=1e-5)
    assert len(library.asked) == 8


def test_plans_hold_calls_and_are_checked_when_they_are_read(library):
    product = jg.compile(EPILOGUES["bias"][1])
    with jg.no_grad():
        product(random(6, 10).cuda(), random(8, 10).cuda(), random(8).cuda())
    spec = product.plan.plan.spec
    (entry,) = spec.entries
    assert entry.library.asked.bias and entry.kernel is None and spec.arena >= WORKSPACE + SLACK
    assert PlanSpec.from_json(spec.to_json()) == spec
    for name, value in (("m", 7), ("k", 2000), ("m", 0), ("dtype", "i32"), ("activation", "tanh"), ("bias", False),
                        ("n", "8")):
        data = json.loads(spec.to_json())
        data["entries"][0]["library"]["product"][name] = value
        with pytest.raises(ValueError, match="not a plan"):
            PlanSpec.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="neither kernel nor call, or several"):
        dataclasses.replace(spec, entries=(dataclasses.replace(entry, kernel="0" * 16),))


def test_what_ran_is_shown(library):
    product = jg.compile(EPILOGUES["bias and relu"][1])
    with jg.no_grad():
        product(random(6, 10).cuda(), random(8, 10).cuda(), random(8).cuda())
    assert "cublaslt_matmul_bias_relu" in str(product.plan)


# ---- whether it is used ----------------------------------------------------------------------------------------------


def test_small_products_are_ours(library, monkeypatch):
    monkeypatch.setattr(cuda_product, "LARGE", 6 * 10 * 8 + 1)
    check(lambda x, y: x @ y, random(6, 10), random(10, 8))
    assert not library.asked and not library.heuristics
    check(lambda x, y: x @ y, random(7, 10), random(10, 8))
    assert library.asked


def test_the_switch(library):
    product = jg.compile(lambda x, y: x @ y)
    x, y = random(6, 10), random(10, 8)
    with config.scope(cublas=False):
        check(lambda x, y: x @ y, x, y)
        check(product, x, y)
    assert not library.asked
    check(lambda x, y: x @ y, x, y)
    check(product, x, y)
    assert len(library.asked) == 2
    assert not config.from_environment({"JITGRAD_CUBLAS": "0"}).cublas


def test_without_the_library_nothing_changes(executing, monkeypatch):
    monkeypatch.setattr(cuda_product, "LARGE", 1)
    monkeypatch.setattr(cublaslt.CublasLt, "names", ("libnobodyhasthis.so.13",))
    cublaslt.disconnect()
    try:
        assert cublaslt.identity() == "" and cublaslt.library() is None
        check(lambda x, y: x @ y, random(6, 10), random(10, 8))
        assert "matmul_f32" in executing.launches
        one = Laid(False, 1, 0, 0)
        assert not cublaslt.accepts(driver.gpu(0), Product("f32", False, 1, 1, 1, 1, one, one))
    finally:
        monkeypatch.undo()
        cublaslt.disconnect()


def test_a_package_is_found_and_not_loaded_before_it_is_needed(tmp_path, monkeypatch):
    for name in ("libcublasLt.so.12", "libcublasLt.so.13"):
        file = tmp_path / "nvidia" / name[-2:] / "lib" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    cublaslt.disconnect()
    try:
        assert cublaslt.identity() == f"{tmp_path}/nvidia/13/lib/libcublasLt.so.13 10"
        assert not cublaslt.connection.looked
    finally:
        cublaslt.disconnect()


def test_a_way_that_the_library_does_not_have(library):
    library.supports = lambda described: described[7] == 1
    check(jg.compile(F.linear), random(6, 10), random(8, 10), random(8))
    check(jg.compile(lambda x, y: x @ y), random(6, 10), random(10, 8))
    assert [asked[7] for asked in library.asked] == [1]


def test_a_library_that_cannot_be_used_is_named_once(library):
    library.fail["cublasLtCreate"] = 1
    with pytest.warns(RuntimeWarning, match="products run without cuBLASLt: .*130100: cublasLtCreate failed: "
                                            "CUBLAS_STATUS_NOT_INITIALIZED"):
        check(lambda x, y: x @ y, random(6, 10), random(10, 8))
    library.fail["cublasLtCreate"] = 1
    check(lambda x, y: x @ y, random(6, 11), random(11, 8))
    assert not library.asked


def test_a_call_that_fails_names_the_line(library):
    def product(x, y):
        return x @ y                                                          # this line

    library.fail["cublasLtMatmul"] = 13
    line = product.__code__.co_firstlineno + 1
    with pytest.raises(cublaslt.LibraryError, match=rf"cublasLtMatmul failed: CUBLAS_STATUS_EXECUTION_FAILED.*:{line}") as e:
        jg.compile(product)(random(6, 10).cuda(), random(10, 8).cuda())
    assert e.value.code == 13


def test_a_plan_of_a_library_that_is_gone(library):
    x, y = random(6, 10).cuda(), random(10, 8).cuda()
    plan = gpu_plans.compile_for(build([(6, 10), (10, 8)], ops.matmul), driver.gpu(0))
    plan._frames.clear()
    library.supports = lambda described: False
    with pytest.raises(cublaslt.LibraryError, match=r"NOT_SUPPORTED.*JITGRAD_CUBLAS=0"):
        plan.run([x._array, y._array])
    cublaslt.connection.found = None
    with pytest.raises(cublaslt.LibraryError, match="needs cuBLASLt, which is not here"):
        plan.run([x._array, y._array])


# ---- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """Takes the place of the one that measures: seconds by what computes the product, the usual way a second. `readings`
    counts them."""

    def __init__(self, **seconds):
        self.seconds, self.readings, self.seen = seconds, 0, set()

    def __call__(self, contender, calls):
        self.readings += 1
        if contender not in self.seen:
            assert contender.plan.seconds(1) > 0            # it runs
            self.seen.add(contender)
        return self.seconds.get(contender.answers.get("product"), 1.0)


def tuned(function, shapes=((6, 10), (8, 10), (8,))):
    gpu_plans.clear_plans()
    return gpu_plans.compile_for(build(shapes, function), driver.gpu(0), tuned=True)


def names(plan):
    return [entry.name.split("_")[0] for entry in plan.spec.entries]


@pytest.mark.parametrize(("large", "faster", "found"), [
    (1 << 27, cuda_product.LIBRARY, ["cublaslt"]), (1 << 27, None, ["matmul"]), (1, cuda_product.OWN, ["matmul"]),
    (1, None, ["cublaslt"])])
def test_the_faster_one_is_used_and_remembered(library, monkeypatch, large, faster, found):
    clock = Clock(**{faster: 0.5} if faster else {})
    monkeypatch.setattr(tuning, "stopwatch", clock)
    monkeypatch.setattr(cuda_product, "LARGE", large)
    plan = tuned(F.linear)
    assert names(plan) == found and clock.readings
    (decision,) = plan.spec.choices
    assert decision.gain == (2.0 if faster else 1.0) and decision.answers == ((("product", faster),) if faster else ())
    before = clock.readings
    shutil.rmtree(config.current().cache / "plans")
    assert names(tuned(F.linear)) == found and clock.readings == before


def test_the_library_then_a_kernel_for_the_rest(library, monkeypatch):
    monkeypatch.setattr(tuning, "stopwatch", Clock(**{cuda_product.APART: 0.5}))
    function = jg.compile(lambda x, w, b: F.silu(F.linear(x, w, b)) + x[:, :8], mode="max-autotune")
    check(function, random(6, 10), random(8, 10), random(8), tolerance=3e-6)
    assert [asked[7] for asked in library.asked][-1] == 1 and names(function.plan.plan) == ["cublaslt", "fused"]
    assert cuda_product.APART in str(function.plan)


def test_times_are_those_of_the_gpu(library, monkeypatch):
    """The stand-in's clock goes on by a millisecond per launch: the library takes one, and then a kernel another one."""
    monkeypatch.setattr(tuning, "ROUNDS", (2, 2))
    plan = tuned(lambda x, w, b: F.silu(F.linear(x, w, b)))
    (decision,) = plan.spec.choices
    assert names(plan) == ["matmul"] and decision.candidates == 2


def test_nothing_is_measured_without_the_library(library, monkeypatch):
    monkeypatch.setattr(tuning, "stopwatch", None)
    with config.scope(cublas=False):
        assert names(tuned(F.linear)) == ["matmul"]
