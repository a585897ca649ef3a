"""Convolutions by NVIDIA's library, on a stand-in for it that checks every descriptor and computes with NumPy."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from canonical import build
from cudnn_standin import (
    DOWN_CONVERT_INPUTS,
    MODE_A,
    MODE_FALLBACK,
    NONDETERMINISTIC,
    REDUCED_PRECISION_REDUCTION,
    TENSOR_CORE,
    WINOGRAD,
    Refused,
    StandInCudnn,
    Way,
)
from library_standin import check, random
from test_cuda_convolution import CASES, FORWARD, IMAGE, WEIGHTS, attributes

import jitgrad as jg
from jitgrad import config, gpu_plans, nn, ops, tuning
from jitgrad.codegen import cuda_product
from jitgrad.codegen.cuda_product import Products
from jitgrad.nn import functional as F
from jitgrad.pipeline import build_for_gpu
from jitgrad.products import KINDS, SLACK, Convolved
from jitgrad.runtime.cuda import cudnn, driver
from jitgrad.runtime.cuda.libraries import LibraryError
from jitgrad.runtime.spec import PlanSpec

pytestmark = pytest.mark.usefixtures("kernels_of_module")
ASKED = Convolved("convolution", "f32", False, (2, 4, 5, 6), (3, 4, 3, 3), (2, 3, 5, 6), (1, 1), (1, 1), (1, 1), (1, 1))


@pytest.fixture
def library(executing):
    """The stand-in of the library beside that of the GPU; it computes whatever it can."""
    made = StandInCudnn(executing)
    cudnn.connect(made)
    gpu_plans.clear_plans()
    with config.scope(cudnn="always", cublas=False):
        yield made
    cudnn.disconnect()
    jg.set_float32_matmul_precision("highest")
    assert made.problems == []


def kinds(library):
    return [kind for kind, _, _ in library.asked]


def ways(library):
    return [way for _, _, way in library.asked]


def padded(x, w):
    return F.conv2d(x, w, padding=1)


# ---- convolutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_geometries(library, name):
    """Stride, padding that differs on both sides, dilation, groups, in one to three dimensions; with both gradients."""
    for op in (FORWARD, IMAGE, WEIGHTS):
        shapes, attrs = attributes(op, CASES[name])
        check(lambda x, y, op=op, attrs=attrs: op(x, y, **attrs), *[random(*shape) for shape in shapes])
    assert kinds(library) == list(KINDS)


@pytest.mark.parametrize("dtype", [jg.float32, jg.bfloat16, jg.float16], ids=str)
def test_types(library, executing, dtype):
    shapes, attrs = attributes(FORWARD, CASES["3x3"])
    check(lambda x, w: FORWARD(x, w, **attrs), *[random(*shape, dtype=dtype) for shape in shapes])
    assert [kind for _, kind, _ in library.asked] == [dtype.numpy]
    assert not any("conv" in name for name in executing.launches)


USED = {
    "conv1d": ([(2, 8, 20), (16, 8, 3)], lambda x, w: F.conv1d(x, w, padding=1), KINDS[0]),
    "one image": ([(8, 9, 9), (16, 8, 3, 3)], lambda x, w: F.conv2d(x, w, padding="same"), KINDS[0]),
    "conv3d": ([(2, 8, 5, 6, 7), (16, 4, 3, 3, 3)], lambda x, w: F.conv3d(x, w, groups=2), KINDS[0]),
    "conv_transpose1d": ([(2, 8, 20), (8, 16, 3)], lambda x, w: F.conv_transpose1d(x, w, stride=2), KINDS[1]),
    "conv_transpose2d": ([(2, 8, 9, 9), (8, 16, 3, 3)], lambda x, w: F.conv_transpose2d(x, w, padding=1), KINDS[1]),
}


@pytest.mark.parametrize("name", USED)
def test_functions_are_one_call_of_the_library(name, monkeypatch):
    """Nothing is copied for it, and it has the memory that it asked for."""
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    monkeypatch.setattr(cuda_product, "LARGE", 1)
    shapes, function, kind = USED[name]
    allowed = Products(convolving=lambda asked: replace(asked, workspace=512))
    spec = build_for_gpu(build(shapes, function), "sm_90", allowed=allowed).spec
    assert [entry.name for entry in spec.entries] == [f"cudnn_{kind}"] and spec.arena >= 512 + SLACK


def test_float64_is_ours(library):
    check(padded, random(2, 3, 5, 5, dtype=jg.float64), random(8, 3, 3, 3, dtype=jg.float64))
    assert not library.built


def test_convolutions_of_nothing_are_ours(library):
    x, w = jg.zeros(2, 0, 5, 5, device="cuda"), jg.zeros(8, 0, 3, 3, device="cuda")
    assert not padded(x, w).cpu().numpy().any()
    assert padded(jg.zeros(0, 3, 5, 5, device="cuda"), jg.zeros(8, 3, 3, 3, device="cuda")).shape == (0, 8, 5, 5)
    assert not library.built


def training(device):
    """The weights of a small network behind three steps, and the step."""
    jg.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2),
                          nn.Conv2d(4, 3, 1))
    model, x = model.to(device), jg.randn(2, 3, 7, 7).to(device)
    optimizer = jg.optim.SGD(model.parameters(), lr=0.1)

    @jg.compile
    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    return [p.detach().cpu().numpy() for p in model.parameters()], step


def test_training(library):
    found, step = training("cuda")
    assert step.plan.plan.is_captured
    assert sorted(set(kinds(library))) == sorted(KINDS) and len(library.asked) == 3 * (3 + 2 + 3)
    for ours, wanted in zip(found, training("cpu")[0], strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


# ---- which of the library's ways ---------------------------------------------------------------------------------------


EXACT, ON_TENSOR_CORES = Way("exact"), Way("tensor cores", (TENSOR_CORE,))
REFUSED = [Way("other bits", (NONDETERMINISTIC,)), Way("short sums", (REDUCED_PRECISION_REDUCTION,))]


def carry_out(dtype=jg.float32):
    check(padded, random(2, 4, 5, 6, dtype=dtype), random(3, 4, 3, 3, dtype=dtype), tolerance=2e-2)


def test_float32_is_float32_unless_tf32_is_allowed(library):
    library.ways[MODE_A] = [Way("halves", (DOWN_CONVERT_INPUTS,)), ON_TENSOR_CORES, EXACT]
    carry_out()
    jg.set_float32_matmul_precision("high")
    carry_out()
    carry_out(jg.bfloat16)
    assert ways(library) == ["exact", "tensor cores", "halves"]
    assert library.built == ways(library)


def test_tf32_is_less_exact(library):
    library.ways[MODE_A] = [ON_TENSOR_CORES]
    jg.set_float32_matmul_precision("high")
    x, w = random(2, 4, 5, 6), random(3, 4, 3, 3)
    with pytest.raises(AssertionError):
        check(padded, x, w)
    check(padded, x, w, tolerance=2e-3)
    assert ways(library) == ["tensor cores"] * 2


def test_results_are_the_same_in_every_run_and_sums_in_float32(library):
    library.ways[MODE_A] = [*REFUSED, Way("winograd", (TENSOR_CORE, WINOGRAD))]
    carry_out(jg.float16)
    assert library.built == ["winograd"]


def test_the_next_way_where_one_cannot_be_built_or_needs_too_much_memory(library):
    limit = driver.gpu(0).total_memory // cudnn.SHARE
    assert limit < cudnn.WORKSPACE
    large = Way("large", workspace=limit + 1)
    library.ways = {MODE_A: [Way("broken", builds=False), large], MODE_FALLBACK: [Way("slow", workspace=limit)]}
    carry_out()
    assert library.built == ["broken", "large", "slow"] and ways(library) == ["slow"]


OFFERED = {"none": [], "broken": [Way(builds=False)], "refused": REFUSED, "tf32": [ON_TENSOR_CORES]}


@pytest.mark.parametrize("offered", OFFERED)
def test_without_a_way_the_kernel_is_ours(library, executing, offered):
    library.ways = {MODE_A: OFFERED[offered], MODE_FALLBACK: []}
    check(padded, random(2, 4, 5, 6), random(3, 4, 3, 3))
    assert not library.asked and any("convolution" in name for name in executing.launches)


def test_few_ways_are_built(library):
    library.ways[MODE_A] = [Way(str(k), builds=False) for k in range(40)]
    carry_out()
    assert library.built == [str(k) for k in range(cudnn.TRIED)] and not library.asked


def test_heuristics_without_an_answer(library):
    """They may refuse to be asked: then those of the other mode answer."""
    library.ways = {MODE_A: [Way()], MODE_FALLBACK: [Way("slow")]}
    original = library._check_heuristics

    def check_heuristics(thing):
        original(thing)
        if thing[200] == MODE_A:
            raise Refused(3000)

    library._check_heuristics = check_heuristics
    carry_out()
    assert ways(library) == ["slow"]


# ---- what follows ------------------------------------------------------------------------------------------------------


FOLLOWS = {
    "bias": lambda x, w, b: F.conv2d(x, w, b, padding=1),
    "bias and relu": lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1)),
    "residual": lambda x, w, b: F.conv2d(x, w, padding=1) + F.silu(x),
    "two results": lambda x, w, b: jg.concatenate([y := F.conv2d(x, w, padding=1), F.relu(y) * 2]),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_the_library_then_a_kernel_for_the_rest(library, executing, name):
    function = jg.compile(FOLLOWS[name])
    check(function, random(2, 4, 5, 6), random(4, 4, 3, 3), random(4), tolerance=3e-6)
    assert kinds(library) == [KINDS[0]]
    assert not any("convolution" in launched for launched in executing.launches if launched.startswith("conv"))


def test_what_follows_stays_in_our_kernel_unless_it_is_measured(library, monkeypatch):
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    monkeypatch.setattr(cuda_product, "LARGE", 1)
    with config.scope(cudnn="measured"):
        function = jg.compile(FOLLOWS["bias"])
        check(function, random(2, 4, 5, 6), random(8, 4, 3, 3), random(8), tolerance=3e-6)
        check(padded, random(2, 4, 5, 6), random(8, 4, 3, 3))
    assert len(library.asked) == 1


# ---- plans -------------------------------------------------------------------------------------------------------------


def test_captured_plans(library):
    """Calls of the library are parts of CUDA graphs, with a workspace of the plan's; a plan of its own is built once."""
    both = jg.compile(lambda x, v, w: F.relu(padded(padded(x, v), w)))
    v, w = random(8, 4, 3, 3), random(4, 8, 3, 3)
    for _ in range(5):
        check(both, random(2, 4, 5, 6), v, w, tolerance=3e-6)
    assert both.plan.plan.is_captured and kinds(library) == [KINDS[0]] * 10 and len(library.built) == 2


def test_a_second_stream_and_a_second_gpu(library):
    x, w = random(2, 4, 5, 6), random(3, 4, 3, 3)
    wanted = padded(x, w).numpy()
    function = jg.compile(padded)
    for device in ("cuda:0", "cuda:1"):
        a, b = x.to(device), w.to(device)
        side = jg.cuda.Stream(device)
        side.wait_stream(jg.cuda.current_stream(device))
        with jg.cuda.stream(side):
            results = [function(a, b) for _ in range(4)]
        jg.cuda.current_stream(device).wait_stream(side)
        for found in results:
            np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert len(library.asked) == 8 and len(library.built) == 2


def planned(library):
    function = jg.compile(padded)
    check(function, random(*ASKED.image), random(*ASKED.weights))
    return function.plan.plan.spec


WRONG = {
    "kind": "pooling", "dtype": "f64", "tf32": 1, "image": [2, 4, 5, 7], "weights": [3, 4, 3], "result": [2, 3, 5, 6.0],
    "stride": [0, 1], "low": [-1, 1], "high": [1], "dilation": [2, 1], "workspace": -1}


def test_plans_hold_calls_and_are_checked_when_they_are_read(library):
    spec = planned(library)
    (entry,) = spec.entries
    assert entry.library.asked == replace(ASKED, workspace=1000) and entry.kernel is None and spec.arena >= 1000 + SLACK
    assert PlanSpec.from_json(spec.to_json()) == spec
    for name, value in [*WRONG.items(), ("workspace", 1 << 20)]:
        data = json.loads(spec.to_json())
        data["entries"][0]["library"]["convolution"][name] = value
        with pytest.raises(ValueError, match="not a plan"):
            PlanSpec.from_json(json.dumps(data))
    data = json.loads(spec.to_json())
    data["entries"][0]["library"]["operands"].pop()
    with pytest.raises(ValueError, match="not a plan: operands of a library's call are missing"):
        PlanSpec.from_json(json.dumps(data))


def test_what_ran_is_shown(library):
    function = jg.compile(padded)
    check(function, random(2, 4, 5, 6), random(3, 4, 3, 3))
    assert "cudnn_convolution" in str(function.plan)


def test_what_a_convolution_and_its_gradients_take():
    shapes = {kind: replace(ASKED, kind=kind).shapes for kind in KINDS}
    image, weights, result = ASKED.image, ASKED.weights, ASKED.result
    assert list(shapes.values()) == [(image, weights, result), (result, weights, image), (image, result, weights)]
    assert ASKED.work == 2 * 3 * 5 * 6 * 4 * 9 and replace(ASKED, weights=(3, 2, 3, 3)).groups == 2


# ---- whether it is used ------------------------------------------------------------------------------------------------


def test_small_convolutions_are_ours(library, monkeypatch):
    with config.scope(cudnn="measured"):
        monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
        monkeypatch.setattr(cuda_product, "LARGE", ASKED.work + 1)
        check(padded, random(*ASKED.image), random(*ASKED.weights))
        assert not library.built
        check(padded, random(3, *ASKED.image[1:]), random(*ASKED.weights))
    assert len(library.asked) == 1


def test_the_setting(library):
    x, w = random(2, 4, 5, 6), random(3, 4, 3, 3)
    function = jg.compile(padded)
    with config.scope(cudnn="never"):
        check(padded, x, w)
        check(function, x, w)
    assert not library.built
    check(padded, x, w)
    check(function, x, w)
    assert len(library.asked) == 2


@pytest.mark.parametrize(("text", "word"), [
    ("0", "never"), ("never", "never"), ("1", "measured"), ("Measured", "measured"), ("always", "always"), ("", "measured")])
def test_the_environment(text, word):
    assert config.from_environment({"JITGRAD_CUDNN": text}).cudnn == word


def test_a_wrong_setting_names_the_legal_ones():
    with pytest.raises(ValueError, match=r"cudnn cannot be 'sometimes'. Legal: never, measured, always"):
        config.update(cudnn="sometimes")


def test_without_the_library_nothing_changes(executing, monkeypatch):
    monkeypatch.setattr(cudnn.Cudnn, "names", ("libnobodyhasthis.so.9",))
    cudnn.disconnect()
    try:
        with config.scope(cudnn="always"):
            assert cudnn.identity() == "" and cudnn.library() is None
            check(padded, random(2, 4, 5, 6), random(8, 4, 3, 3))
        assert any(name.startswith("convolution") for name in executing.launches)
        assert cudnn.accepts(driver.gpu(0), ASKED) is None
    finally:
        monkeypatch.undo()
        cudnn.disconnect()


def test_packages_that_bring_it(tmp_path, monkeypatch):
    """NVIDIA's, which PyTorch needs, before CuPy's folder; nothing is loaded for that."""
    places = [tmp_path / "nvidia" / "cudnn" / "lib", tmp_path / "cupy" / "13.0" / "cudnn" / "9.1.0" / "lib"]
    for place in places:
        place.mkdir(parents=True)
        (place / "libcudnn.so.9").write_bytes(b"no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("CUPY_CUDA_LIB_PATH", str(tmp_path / "cupy"))
    try:
        for place in places:
            cudnn.disconnect()
            assert cudnn.identity() == f"{place}/libcudnn.so.9 10"
            (place / "libcudnn.so.9").unlink()
        assert not cudnn.connection.looked
    finally:
        monkeypatch.undo()
        cudnn.disconnect()


def test_importing_does_not_import_it():
    code = "import jitgrad, sys; print([m for m in sys.modules if m.endswith(('cudnn', 'cuda_convolved'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_library_that_cannot_be_used_is_named_once(library):
    library.fail["cudnnCreate"] = 1001
    with pytest.warns(RuntimeWarning, match="convolutions and attention run without cuDNN: .*92800: cudnnCreate failed: "
                                            r"CUDNN_STATUS_NOT_INITIALIZED \(count == 0\)"):
        check(padded, random(2, 4, 5, 6), random(3, 4, 3, 3))
    library.fail["cudnnCreate"] = 1001
    check(padded, random(2, 4, 5, 7), random(3, 4, 3, 3))
    assert not library.asked


def test_a_call_that_fails_names_the_line(library):
    def convolve(x, w):
        return F.conv2d(x, w)                                                 # this line

    library.fail["cudnnBackendExecute"] = 5000
    line = convolve.__code__.co_firstlineno + 1
    with pytest.raises(LibraryError, match=rf"EXECUTION_FAILED \(count == 0\).*:{line}.*Set JITGRAD_CUDNN=never") as e:
        jg.compile(convolve)(random(2, 4, 5, 6).cuda(), random(3, 4, 3, 3).cuda())
    assert e.value.code == 5000


def test_a_plan_of_a_library_that_is_gone(library):
    x, w = random(*ASKED.image).cuda(), random(*ASKED.weights).cuda()
    graph = build([ASKED.image, ASKED.weights], lambda x, w: ops.convolution(x, w, **attributes(FORWARD, CASES["3x3"])[1]))
    plan = gpu_plans.compile_for(graph, driver.gpu(0))
    for offered in ([], [Way(workspace=2000)]):
        cudnn._plan_of.cache_clear()
        library.ways[MODE_A] = offered
        with pytest.raises(LibraryError, match=r"NOT_SUPPORTED.*JITGRAD_CUDNN=never"):
            plan.run([x._array, w._array])
    cudnn.connection.found = None
    with pytest.raises(LibraryError, match="needs cuDNN, which is not here"):
        plan.run([x._array, w._array])


# ---- measuring ---------------------------------------------------------------------------------------------------------


class Clock:
    """Takes the place of the one that measures: seconds by what answers the question, the usual way a second."""

    def __init__(self, question="convolution", **seconds):
        self.question, self.seconds, self.readings, self.seen = question, seconds, 0, set()

    def __call__(self, contender, calls):
        self.readings += 1
        if contender not in self.seen:
            assert contender.plan.seconds(1) > 0            # it runs
            self.seen.add(contender)
        return self.seconds.get(contender.answers.get(self.question), 1.0)


def tuned(function):
    gpu_plans.clear_plans()
    shapes = [ASKED.image, (4, 4, 3, 3), (4,)]
    return gpu_plans.compile_for(build(shapes, function), driver.gpu(0), tuned=True)


def names(plan):
    return [entry.name.split("_")[0] for entry in plan.spec.entries]


@pytest.mark.parametrize(("large", "faster", "found"), [
    (1 << 27, cuda_product.LIBRARY, ["cudnn"]), (1 << 27, None, ["convolution"]), (1, cuda_product.OWN, ["convolution"]),
    (1, None, ["cudnn"])])
def test_the_faster_one_is_used_and_remembered(library, monkeypatch, large, faster, found):
    clock = Clock(**{faster: 0.5} if faster else {})
    monkeypatch.setattr(tuning, "stopwatch", clock)
    monkeypatch.setattr(cuda_product, "LARGE", large)
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    with config.scope(cudnn="measured"):
        plan = tuned(lambda x, w, b: ops.convolution(x, w, **attributes(FORWARD, CASES["3x3"])[1]))
        assert names(plan) == found and clock.readings
        (decision,) = plan.spec.choices
        assert decision.answers == ((("convolution", faster),) if faster else ())
        before = clock.readings
        shutil.rmtree(config.current().cache / "plans")
        assert names(tuned(lambda x, w, b: ops.convolution(x, w, **attributes(FORWARD, CASES["3x3"])[1]))) == found
        assert clock.readings == before


def test_measured_with_what_follows(library, monkeypatch):
    monkeypatch.setattr(tuning, "stopwatch", Clock(**{cuda_product.APART: 0.5}))
    monkeypatch.setattr(cuda_product, "WORTH_ASKING", 1)
    with config.scope(cudnn="measured"):
        function = jg.compile(FOLLOWS["bias and relu"], mode="max-autotune")
        check(function, random(2, 4, 5, 6), random(4, 4, 3, 3), random(4), tolerance=3e-6)
    assert names(function.plan.plan) == ["cudnn", "fused"] and cuda_product.APART in str(function.plan)


def test_always_leaves_nothing_to_measure(library, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tuning, "stopwatch", clock)
    plan = tuned(lambda x, w, b: ops.convolution(x, w, **attributes(FORWARD, CASES["3x3"])[1]))
    assert names(plan) == ["cudnn"] and not clock.readings and plan.spec.choices == ()


# ---- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_real_library_takes_what_is_described(name):
    """Where it is installed: operations are finalized without a GPU."""
    cudnn.disconnect()
    real = cudnn.library()
    if real is None:
        pytest.skip("cuDNN is not installed")
    image, weights, stride, padding, dilation, _ = CASES[name]
    low, high = [tuple([side[k] for side in padding]) for k in (0, 1)]
    result = ops.convolution_output_shape(image, weights, stride, padding, dilation)
    for kind in KINDS:
        asked = Convolved(kind, "bf16", False, image, weights, result, stride, low, high, dilation)
        try:
            cudnn.describe_operation(real, asked)
        except LibraryError as error:
            if error.code == 1008:
                pytest.skip("cuDNN does not find libraries that it needs, such as NVIDIA's driver")
            raise
        with pytest.raises(LibraryError):
            cudnn.describe_operation(real, replace(asked, result=(*result[:-1], result[-1] + 1)))
