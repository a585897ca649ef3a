"""How exactly float32 products are computed: PyTorch's two names for one setting, and TF32 on a GPU."""

import numpy as np
import pytest
from canonical import build, inputs_of
from cuda_launching import run
from ptx import sass
from test_cuda_matmul import FOLLOWED, LAYOUTS, biased, exact, turned

import jitgrad as jg
from jitgrad import ops
from jitgrad.codegen import cuda_matmul, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_matmul import lower_matmul
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.codegen.cuda_product import Products
from jitgrad.dtypes import bfloat16, float32, float64
from jitgrad.errors import DTypeError
from jitgrad.nn import functional as F
from jitgrad.transforms.fuse import fuse

ALLOWED = Products(tf32=True)


@pytest.fixture
def precision():
    yield
    jg.set_float32_matmul_precision("highest")


def to_tf32(x):
    """Rounded to 10 bits behind the point, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


# ---- the setting -----------------------------------------------------------------------------------------------------


def same_steps(framework):
    """What reads as what, after each of some settings."""
    seen = []

    def read():
        seen.append((framework.get_float32_matmul_precision(), framework.backends.cuda.matmul.allow_tf32))

    read()
    for name in ("high", "medium", "highest"):
        framework.set_float32_matmul_precision(name)
        read()
    for switch in (True, False):
        framework.backends.cuda.matmul.allow_tf32 = switch
        read()
    return seen


def test_two_names_of_one_setting(precision):
    assert same_steps(jg) == [("highest", False), ("high", True), ("medium", True), ("highest", False), ("high", True),
                              ("highest", False)]


def test_both_are_linked_as_in_pytorch(precision):
    assert same_steps(jg) == same_steps(pytest.importorskip("torch"))


def test_wrong_settings_are_refused(precision):
    with pytest.raises(DTypeError, match="allow_tf32: True or False, not 1"):
        jg.backends.cuda.matmul.allow_tf32 = 1
    with pytest.raises(AttributeError, match=r"backends.cuda: there is no allow_tf32 .*What can be set is"):
        jg.backends.cuda.allow_tf32 = True
    assert jg.get_float32_matmul_precision() == "highest"


def test_a_compiled_function_that_changes_it_changes_it_at_every_call(precision):
    @jg.compile
    def product(x):
        jg.backends.cuda.matmul.allow_tf32 = True
        return x @ x

    for _ in range(4):
        jg.backends.cuda.matmul.allow_tf32 = False
        product(jg.ones(3, 3))
        assert jg.get_float32_matmul_precision() == "high"


def test_on_a_cpu_it_changes_nothing(precision):
    x = jg.randn(40, 50)
    product = jg.compile(lambda x: x @ x.mT)
    before = [x @ x.mT, product(x), product(x)]
    jg.set_float32_matmul_precision("medium")
    for y in (x @ x.mT, product(x), product(x)):
        assert y.tolist() == before[0].tolist()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def check(graph, tolerance=1e-6, schedule="random", aligned=True, skew=0):
    """A product whose operands are rounded, and nothing else: measured by the largest result."""
    arrays = inputs_of(graph)
    lowered = lower_matmul(graph, (), aligned, ALLOWED)
    found = run(lowered, arrays, [v.type for v in graph.outputs], schedule=schedule, skew=skew)
    factors = {v for node in graph.nodes if node.op.name == "matmul" for v in behind(graph, node.inputs)}
    rounded = [to_tf32(a) if v in factors else a for v, a in zip(graph.inputs, arrays, strict=True)]
    for x, y in zip(found, exact(graph, rounded), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def behind(graph, values):
    """The inputs that movement ops make these values of."""
    producers = graph.producers()
    for v in values:
        while v in producers:
            v = producers[v].inputs[0]
        yield v


@pytest.mark.parametrize(("layout", "schedule"), [(name, "random") for name in LAYOUTS] + [
    ("rows", "reversed"), ("columns", "interleaved")])
def test_layouts(layout, schedule):
    """Factors that lie row by row and column by column, at round addresses and at odd ones; five slices of the depth."""
    shapes, function = LAYOUTS[layout](40, 72, 72)
    check(build(shapes, function, float32), schedule=schedule)


@pytest.mark.parametrize(("m", "k", "n", "aligned"), [(65, 33, 67, True), (5, 100, 4, False), (1, 7, 1, True)], ids=str)
def test_ragged_sizes_and_odd_addresses(m, k, n, aligned):
    check(build([(m, k), (k, n)], ops.matmul, float32), aligned=aligned, skew=0 if aligned else 1)


def test_an_empty_result_is_no_launch():
    assert lower_matmul(build([(0, 3), (3, 4)], ops.matmul, float32), (), True, ALLOWED).launches == ()


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(cuda_matmul, "ENOUGH", 1)
    check(build(*LAYOUTS["columns"](136, 24, 72), float32))


@pytest.mark.parametrize("name", ["bias and gelu", "one column"])
def test_what_follows_is_in_float32(name):
    (node,) = [node for node in fuse(build(*FOLLOWED[name], float32)).nodes if node.op.kind == "region"]
    assert len(lower_matmul(node.attrs["body"], (), True, ALLOWED).launches) == 1
    check(node.attrs["body"])


@pytest.mark.parametrize("dtype", [float64, bfloat16], ids=lambda d: d.short)
def test_other_floats_stay_as_they_are(dtype):
    graph = build([(8, 8), (8, 8)], ops.matmul, dtype)
    assert lower_matmul(graph, (), True, ALLOWED) == lower_matmul(graph, (), True)


def test_not_a_number_stays_one():
    """Rounding by adding half a unit would make a zero of some."""
    x, y = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    x[3, 3] = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    (found,) = run(lower_matmul(build([(4, 8), (8, 4)], ops.matmul, float32), (), True, ALLOWED), [x, y],
                   [jg.ir.types.TensorType(float32, (4, 4))])
    np.testing.assert_array_equal(found[:, 0], [np.nan, np.inf, -np.inf, np.nan])


def test_programs_follow_the_setting(executing, precision):
    """Eagerly, compiled, and backwards; the setting is part of what makes plans differ."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 16)).astype(np.float32), rng.standard_normal((4, 16)).astype(np.float32)
    linear = jg.compile(F.linear)

    def results():
        x, w = jg.tensor(a, device="cuda", requires_grad=True), jg.tensor(b, device="cuda", requires_grad=True)
        y = F.linear(x, w)
        y.backward(y.detach())
        return [t.detach().cpu().numpy() for t in (y, linear(x, w), w.grad)]

    def expected(rounded):
        x, w = rounded(a), rounded(b)
        y = (x.astype(np.float64) @ w.astype(np.float64).T)
        return [y, y, rounded(y.astype(np.float32)).astype(np.float64).T @ x.astype(np.float64)]

    for name, rounded in (("highest", np.asarray), ("high", to_tf32), ("highest", np.asarray), ("medium", to_tf32)):
        jg.set_float32_matmul_precision(name)
        for x, y in zip(results(), expected(rounded), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=3e-6 * np.abs(y).max())
    assert "precision of float32 products" in str(linear.explain())


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "turned_a"), [("sm_80", False), ("sm_90", True), ("sm_100", False)])
def test_machine_code(architecture, turned_a):
    """Nothing is spilled, tensor cores multiply, copies to shared memory need no registers, and accesses are wide."""
    (node,) = fuse(build([(4096, 4096)] * 2 + [(4096,)], lambda x, w, b: ops.relu(
        biased(turned(x, 1, 0) if turned_a else x, w, b)), float32)).nodes
    (launch,) = lower_matmul(node.attrs["body"], (), True, ALLOWED).launches
    cubin = toolchain.link([compile_ptx(launch.source, architecture)], architecture)
    sass.assert_no_spills(cubin)
    ((name, used),) = cubin.kernels.items()
    assert used.registers * 256 <= 65_536
    listing = toolchain.disassemble(cubin)[name]
    sass.assert_no_double(listing)
    codes = sass.opcodes(listing)
    assert codes["HMMA.1688.F32.TF32"] == 32 and not codes["FFMA"]
    assert {code for code in codes if code.startswith("STG")} == {"STG.E.128"}
    assert {code for code in codes if code.startswith("LDG.")} <= {"LDG.E.128.CONSTANT", "LDG.E.128"}
    assert any(code.startswith("LDGSTS") and "128" in code for code in codes)
