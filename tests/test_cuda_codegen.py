"""GPU kernels of regions, on the PTX interpreter: results against NumPy under different schedules of warps, memory shared in
place, the text, and the machine code."""

import re

import numpy as np
import pytest
from canonical import PROGRAMS, batch_norm_2d, build, gelu, inputs_of, layer_norm, layer_norm_backward, nll, softmax
from cuda_launching import carry_out, lower_node, module_of, run
from hypothesis import given, settings
from ptx import sass
from test_codegen import adam_node, assert_close
from test_fuse import programs

from jitgrad import ops
from jitgrad.codegen import cuda_templates
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.codegen.sharing import shareable
from jitgrad.dtypes import bfloat16, bool_, float16, float32, float64, int8, int32, int64, uint8, uint32
from jitgrad.errors import CompileError
from jitgrad.ir import REGISTRY, TensorType, evaluate
from jitgrad.transforms.fuse import fuse

FUSED = [(name, graph) for name, graph, _ in PROGRAMS]


def regions(graph):
    return [node for node in fuse(graph).nodes if node.op.kind == "region" and node.attrs["template"] != "matmul"]


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("aligned", "schedule"), [(True, "random"), (False, "reversed")])
@pytest.mark.parametrize(("name", "graph"), FUSED, ids=[name for name, _ in FUSED])
def test_canonical_programs(name, graph, aligned, schedule):
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays, aligned, schedule), evaluate(graph, arrays))


@settings(max_examples=25, deadline=None)
@given(programs())
def test_generated_programs(graph):
    arrays = inputs_of(graph)
    wanted = evaluate(graph, arrays)
    if all(np.abs(x).max() < 1e6 for x in wanted):
        assert_close(carry_out(fuse(graph), arrays), wanted, 1e-4)


def everything(shape):
    return build([shape, shape[1:]], lambda x, b: [
        ops.tanh(ops.add(x, ops.broadcast(b, shape))), ops.sum(x, axes=(0,)), ops.sum(x, axes=(1,)),
        ops.sum(ops.mul(x, x), axes=(0, 1)), softmax(x), ops.permute(x, axes=(1, 0))])


@pytest.mark.parametrize("shape", [
    (9, 3), (37, 20), (5, 130), (3, 516), (7, 999), (2, 5000), (3_000, 1)], ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_rows_of_any_length(shape, aligned):
    """Parts of a warp, a warp, blocks of threads; lengths that are multiples of nothing."""
    graph = everything(shape)
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays, aligned), evaluate(graph, arrays), 1e-4)


def test_a_row_that_no_registers_can_hold():
    graph = build([(2, 20_001)], lambda x: [softmax(x), ops.argmax(x, axis=1)])
    arrays = inputs_of(graph)
    for schedule in ("together", "reversed"):
        assert_close(carry_out(fuse(graph), arrays, schedule=schedule), evaluate(graph, arrays), 1e-4)


@pytest.mark.parametrize("shape", [(5, 300), (60, 77), (700, 33), (9, 3)], ids=str)
def test_rows_across_memory(shape):
    """argmax along an outer dimension: a thread per row, so that neighbouring threads read neighbours."""
    graph = build([shape], lambda x: [ops.argmax(x, axis=0), ops.max(x, axes=(0,))])
    arrays = inputs_of(graph)
    for aligned in (True, False):
        assert_close(carry_out(fuse(graph), arrays, aligned, "random"), evaluate(graph, arrays))


def test_indices_of_64_bits(monkeypatch):
    """With a low bound on what is large, since nothing here can hold two thousand million elements."""
    monkeypatch.setattr(cuda_templates, "WIDE", 100)
    for graph in (everything((7, 130)), build([(40, 50), (50, 40)], lambda a, b: ops.add(a, ops.permute(b, axes=(1, 0))))):
        assert all(launch.wide for launch in launches(graph))
        arrays = inputs_of(graph)
        assert_close(carry_out(fuse(graph), arrays), evaluate(graph, arrays), 1e-4)


@pytest.mark.parametrize("graph", [
    build([(70, 45), (45, 70)], lambda a, b: [ops.add(a, ops.permute(b, axes=(1, 0))), ops.permute(a, axes=(1, 0))]),
    build([(3, 40, 45)], lambda a: [ops.exp(ops.permute(a, axes=(2, 0, 1))), ops.permute(a, axes=(0, 2, 1)), a]),
    build([(20, 4, 9, 7), (4,)], batch_norm_2d),
    build([(40, 300), (40, 300), (40,), (40,), (300,)], layer_norm_backward),
    build([(33, 99), TensorType(int64, (33,))], nll),
], ids=["transposes", "three dimensions", "batch norm", "layer norm backward", "nll"])
@pytest.mark.parametrize("schedule", ["in order", "random"])
def test_larger_programs(graph, schedule):
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays, schedule=schedule), evaluate(graph, arrays), 1e-4)


@pytest.mark.parametrize("dtype", [float64, float16, bfloat16], ids=lambda d: d.short)
def test_other_floats(dtype):
    graph = build([(6, 40), (6, 40)], lambda a, b: [softmax(a), ops.permute(ops.mul(ops.add(a, b), b), axes=(1, 0)),
                                                    ops.sum(a, axes=(0,))], dtype)
    arrays = inputs_of(graph)
    tolerance = {8: 1e-12, 2: 2e-2}[dtype.itemsize]
    for aligned in (True, False):
        assert_close(carry_out(fuse(graph), arrays, aligned), evaluate(graph, arrays), tolerance)


@pytest.mark.parametrize("shape", [(6, 8), (7, 33)], ids=str)
@pytest.mark.parametrize("dtype", [int8, int32, int64, uint8, uint32], ids=lambda d: d.short)
def test_integers_keep_their_type(dtype, shape):
    """Overflow wraps at every statement, as in eager."""
    def program(x, y):
        z = ops.mul(ops.add(x, y), y)
        return [z, ops.gt(z, x), ops.sum(z, axes=(0,)), ops.max(z, axes=(0, 1)), ops.argmax(z, axis=1),
                ops.cast(z, dtype=float32), ops.min(z, axes=(1,))]

    graph = build([shape, shape], program, dtype)
    limits = np.iinfo(dtype.numpy)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(limits.min, limits.max, shape, dtype.numpy) for _ in range(2)]
    for x, y in zip(carry_out(fuse(graph), arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_array_equal(x, y)


def test_bools_reduce():
    graph = build([(6, 50)], lambda x: [ops.max(x, axes=(1,)), ops.min(x, axes=(1,)), ops.sum(x, axes=(0,)),
                                        ops.prod(x, axes=(0, 1))], bool_)
    for chance in (0.05, 0.95):
        arrays = [np.random.default_rng(0).random((6, 50)) > chance]
        for x, y in zip(carry_out(fuse(graph), arrays), evaluate(graph, arrays), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("columns", [40, 400, 1500])
def test_extremes_of_nan_and_ties(columns):
    x = np.zeros((4, columns), np.float32)
    x[0, 7] = np.nan
    x[0, 20] = np.nan
    x[1, [5, columns - 1]] = 3
    x[2] = -np.inf
    x[3] = np.arange(columns)
    graph = build([x.shape], lambda v: [ops.argmax(v, axis=1), ops.argmin(v, axis=1), ops.max(v, axes=(1,)),
                                        ops.min(v, axes=(1,))])
    for a, b in zip(carry_out(fuse(graph), [x]), evaluate(graph, [x]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(5, 7), (16, 64), (1001,)], ids=str)
def test_random_bits_are_those_of_the_reference(shape):
    key = TensorType(int64, ())
    graph = build([key, key], lambda k, o: ops.random_bits(k, o, shape=shape))
    arrays = [np.array(123456789012), np.array(5)]
    for a, b in zip(carry_out(fuse(graph), arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_index_out_of_range_is_reported():
    node = regions(build([(6, 8), TensorType(int64, (6,))], nll))[0]
    arrays = [np.zeros(v.shape, v.dtype.numpy) for v in node.inputs]
    limit = next(k for k, v in enumerate(node.inputs) if v.dtype is int64 and v.shape == ())
    target = next(k for k, v in enumerate(node.inputs) if v.dtype is int64 and v.shape == (6,))
    arrays[limit][()], arrays[target][3] = 8, 9
    run(lower_node(node), arrays, [v.type for v in node.outputs], failure=(1, 0, 9))


def test_integer_division_by_zero_is_reported():
    (node,) = regions(build([(6, 9), (6, 9)], ops.floor_divide, int32))
    x, y = np.full((6, 9), 7, np.int32), np.full((6, 9), 2, np.int32)
    y[5, 8] = 0
    (result,) = run(lower_node(node), [x, y], [node.output.type], failure=(2, 0, 0))
    assert result[0, 0] == 3 and result[5, 8] == 0


def test_sums_do_not_depend_on_the_schedule():
    """Not by a bit: who adds to what is decided by shape alone."""
    graph = build([(30, 700)], lambda v: [ops.sum(v, axes=(0, 1)), ops.sum(v, axes=(1,)), ops.sum(v, axes=(0,))])
    arrays = inputs_of(graph)
    results = [carry_out(fuse(graph), arrays, schedule=schedule) for schedule in ("together", "random", "reversed")]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_long_sums_are_accurate():
    """The error is at most four times that of NumPy's pairwise sum, or two units in the last place."""
    x = np.random.default_rng(0).random((2, 60_000), np.float32)
    graph = build([x.shape], lambda v: [ops.sum(v, axes=(0, 1)), ops.sum(v, axes=(1,))])
    for given_, pairwise, exact in zip(carry_out(fuse(graph), [x]), evaluate(graph, [x]),
                                       (x.sum(dtype=np.float64), x.sum(1, dtype=np.float64)), strict=True):
        assert np.all(np.abs(given_ - exact) <= 4 * np.abs(pairwise - exact) + 2 * np.spacing(given_))


FUNCTIONS = {"exp": 88.0, "exp2": 127.0, "expm1": 88.0, "log": 1e30, "log2": 1e30, "log10": 1e30, "log1p": 1e30, "sin": 1e4,
             "cos": 1e4, "tan": 1e4, "atan": 1e4, "tanh": 10.0, "sinh": 80.0, "cosh": 80.0, "sigmoid": 80.0, "erf": 4.0,
             "sqrt": 1e30, "rsqrt": 1e30, "reciprocal": 1e30}
"""Functions, and the largest argument that they are tried on."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate(name):
    """Within four units in the last place of the float64 result, as on the CPU; what is no number stays none."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, 2000) ** 3 * FUNCTIONS[name]).astype(np.float32)
    x[:6] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42
    graph = build([x.shape], REGISTRY[name])
    (result,) = carry_out(fuse(graph), [x])
    with np.errstate(all="ignore"):
        exact = np.asarray(REGISTRY[name].eager(x.astype(np.float64)))
    wanted = exact.astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(result), np.isfinite(wanted))
    np.testing.assert_array_equal(result[~np.isfinite(wanted)], wanted[~np.isfinite(wanted)])
    finite = np.isfinite(wanted)
    assert np.all(np.abs(result[finite] - exact[finite]) <= 4 * np.spacing(np.abs(wanted[finite])))


# ---- in place ------------------------------------------------------------------------------------------------------


def some_pairs(node):
    """As many outputs as possible in the memory of an operand."""
    chosen = {}
    for output, operand in shareable(node.op, tuple([v.type for v in node.inputs]), node.attrs):
        if output not in chosen and operand not in chosen.values():
            chosen[output] = operand
    return tuple(chosen.items())


def with_inputs(graph):
    """The regions of a graph, each with values for its inputs."""
    fused = fuse(graph)
    environment = dict(zip(fused.inputs, inputs_of(graph), strict=True))
    for node in fused.nodes:
        inputs = [environment[v] for v in node.inputs]
        results = node.op.eager(*inputs, **node.attrs)
        environment.update(zip(node.outputs, results if len(node.outputs) > 1 or node.op.kind == "region" else [results]))
        if node.op.kind == "region" and node.attrs["template"] != "matmul":
            yield node, [np.ascontiguousarray(x).reshape(x.shape) for x in map(np.asarray, inputs)]


MORE = [
    ("long rows", build([(3, 17_000), (3,)], lambda x, c: [ops.add(softmax(x), ops.broadcast_to(
        ops.reshape(c, shape=(3, 1)), shape=(3, 17_000))), ops.add(c, ops.sum(x, axes=(1,)))])),
    ("odd rows", build([(7, 37)], softmax)),
    ("sums of long rows", build([(3, 17_000), (3,)], lambda x, c: ops.add(c, ops.sum(x, axes=(1,))))),
    ("sum of all", build([(60, 70), ()], lambda x, c: ops.add(c, ops.sum(x, axes=(0, 1))))),
    ("sums of columns", build([(60, 70), (70,)], lambda x, c: ops.add(c, ops.sum(x, axes=(0,)))))]
IN_PLACE = [(name, graph) for name, graph in [*FUSED, *MORE] if any(map(some_pairs, regions(graph)))]


@pytest.mark.parametrize(("name", "graph"), IN_PLACE, ids=[name for name, _ in IN_PLACE])
def test_in_place_is_the_same_as_apart(name, graph):
    """The interpreter reports it when one thread reads what another one writes."""
    for node, arrays in with_inputs(graph):
        types, shared = [v.type for v in node.outputs], some_pairs(node)
        apart = run(lower_node(node), arrays, types)
        together = run(lower_node(node, shared), arrays, types, shared=shared, schedule="random")
        for a, b in zip(apart, together, strict=True):
            assert a.tobytes() == b.tobytes()


# ---- foreach -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_foreach(in_place, aligned):
    shapes = [(3, 4), (9_000,), (0, 2), (5,), (), (1,)]
    node, arrays = adam_node(shapes)
    first, shared = node.attrs["shared"], ()
    if in_place:
        shared = tuple([(k * len(shapes) + g, first + home * len(shapes) + g)
                        for k, home in enumerate((0, 2, 3)) for g in range(len(shapes))])
    wanted = node.op.eager(*arrays, **node.attrs)
    results = run(lower_node(node, shared, aligned), arrays, [v.type for v in node.outputs], shared=shared,
                  skew=0 if aligned else 1)
    assert_close(results, wanted)


def test_foreach_is_one_launch_with_the_same_text_for_any_number_of_tensors():
    one, many = [lower_node(adam_node([(16,)] * count)[0]).launches for count in (1, 1000)]
    assert len(one) == len(many) == 1
    assert one[0].source == many[0].source
    assert one[0].grid == 1 and many[0].grid == 1000


# ---- text and launches ---------------------------------------------------------------------------------------------


def launches(graph):
    return [launch for node in regions(graph) for launch in lower_node(node).launches]


def texts(graph):
    """The texts of all kernels of a graph, without comments."""
    return [re.sub(r" *#.*", "", launch.source) for launch in launches(graph)]


@pytest.mark.parametrize(("a", "b"), [((40, 300), (6, 308)), ((100, 30_000), (3, 20_000))])
def test_a_new_shape_gives_the_same_text(a, b):
    """Texts differ between classes of row lengths, not from size to size."""
    def program(x, w, c):
        y = softmax(ops.mul(x, ops.broadcast(w, x.shape)))
        return [y, ops.sum(ops.mul(y, x), axes=(0,)), ops.permute(ops.add(x, ops.broadcast(c, x.shape)), axes=(1, 0))]

    assert texts(build([a, a[1:], ()], program)) == texts(build([b, b[1:], ()], program))


def test_text_is_readable():
    (launch,) = launches(build([(600,), (600,)], lambda x, y: ops.exp(ops.sub(x, y))))
    assert launch.source == """\
def fused_sub_exp_f32(p0: pointer[f32], p1: pointer[f32], p2: pointer[f32], n_j: i32, units: i32) -> block[256]:
    # p0                                                      # f32[600]
    # p1                                                      # f32[600]
    # p2                                                      # f32[600]
    unit = i32(i32(i32(block()) * i32(256)) + i32(thread()))
    if unit < units:
        first = i32(unit * i32(4))
        whole = i32(first + i32(4)) <= n_j
        if whole:
            j_0 = first
            v0_0, v0_1, v0_2, v0_3 = load_lanes(p0, j_0, 4, 0, 3)
            v1_0, v1_1, v1_2, v1_3 = load_lanes(p1, j_0, 4, 1, 3)
            v2_0 = f32(v1_0 - v0_0)                                       # sub
            v2_1 = f32(v1_1 - v0_1)
            v2_2 = f32(v1_2 - v0_2)
            v2_3 = f32(v1_3 - v0_3)
            v3_0 = f32(exp(v2_0))                                         # exp
            v3_1 = f32(exp(v2_1))
            v3_2 = f32(exp(v2_2))
            v3_3 = f32(exp(v2_3))
            store_lanes(p2, j_0, (v3_0, v3_1, v3_2, v3_3), 2, 3)
        if not whole:
            for k in range(i32(0), i32(4)):
                j = i32(first + k)
                if j < n_j:
                    v0 = load(p0, j, 0, 3)
                    v1 = load(p1, j, 1, 3)
                    v2 = f32(v1 - v0)                                             # sub
                    v3 = f32(exp(v2))                                             # exp
                    store(p2, j, v3, 2, 3)
"""
    assert (launch.grid, launch.threads, launch.alignment, launch.wide) == (1, 256, 16, False)
    assert launch.arguments[3:] == (600, 150)


def test_indices_are_wide_only_beyond_two_to_the_31():
    for rows, wide in ((1 << 15, False), (1 << 20, True)):
        found = launches(build([(rows, 4096), (4096,)], lambda x, b: [
            ops.add(x, ops.broadcast(b, x.shape)), softmax(x), ops.sum(x, axes=(0,)), ops.sum(x, axes=(0, 1))]))
        for launch in found:
            assert launch.wide == wide and ("i64" in launch.source) == wide
            assert (f".param .u{64 if wide else 32} {launch.name}" in compile_ptx(launch.source))
            assert launch.grid < 2**31


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
def test_what_is_in_no_memory_makes_indices_wide_too(axes, monkeypatch):
    """The products of all pairs are summed up as they are made; threads are numbered by pairs all the same."""
    def pairs(count):
        return build([(count, 1), (1, count)], lambda x, y: ops.sum(
            ops.mul(ops.broadcast_to(x, shape=(count, count)), ops.broadcast_to(y, shape=(count, count))), axes=axes))

    for count, wide in ((40_000, False), (50_000, True)):
        first = launches(pairs(count))[0]
        assert first.wide == wide and first.grid < 2**31
    monkeypatch.setattr(cuda_templates, "WIDE", 1000)
    graph = pairs(40)
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays), evaluate(graph, arrays), 1e-4)


def test_tiles_fit_into_shared_memory():
    """Eleven transposed operands of 8 bytes are more than it holds; the others are read as they lie."""
    def program(*xs):
        total = ops.permute(xs[0], axes=(1, 0))
        for x in xs[1:]:
            total = ops.add(ops.permute(x, axes=(1, 0)), total)
        return [total, xs[0]]

    graph = build([(33, 40)] * 11, program, float64)
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays), evaluate(graph, arrays))
    for launch in launches(graph):
        assert sum(int(n) for n in re.findall(r"\.shared [^;]*\[(\d+)\]", compile_ptx(launch.source))) <= 48 << 10


def test_float32_programs_have_no_float64():
    for graph in (build([(64, 512)], softmax), build([(64, 512)], gelu), build([(64, 512), (512,), (512,)], layer_norm)):
        for launch in launches(graph):
            assert ".f64" not in compile_ptx(launch.source)


def test_an_empty_result_is_no_launch():
    assert launches(build([(0, 5)], lambda x: ops.exp(x))) == []


@pytest.mark.parametrize(("text", "problem"), [
    ("def k(p: pointer[f32]):\n    pass\n", "is no GPU kernel"), ("def k(p: pointer[f33]) -> block[32]:\n    pass\n", "f33"),
    ("def k(n: i32) -> block[32]:\n    nothing(n)\n", "nothing"), ("def k(", "is no GPU kernel")])
def test_bad_text_is_an_error(text, problem):
    with pytest.raises(CompileError, match=problem):
        compile_ptx(text)


def test_blocks_have_the_threads_that_the_text_says():
    (launch,) = launches(build([(4, 5000)], softmax))
    assert f".maxntid {launch.threads}" in compile_ptx(launch.source)
    assert list(module_of(launch.source).kernels) == [launch.name]


# ---- machine code --------------------------------------------------------------------------------------------------

WIDE = (512, 4096)

MACHINE_CODE = {
    "map": build([WIDE, WIDE[1:]], lambda x, b: ops.tanh(ops.add(x, ops.broadcast(b, WIDE)))),
    "softmax": build([WIDE], softmax),
    "short rows": build([(512, 200)], softmax),
    "long rows": build([(4, 50_000)], softmax),
    "bfloat16": build([WIDE], softmax, bfloat16),
    "layer norm": build([WIDE, WIDE[1:], WIDE[1:]], layer_norm),
    "column": build([WIDE], lambda x: ops.sum(ops.mul(x, x), axes=(0,))),
    "full": build([WIDE], lambda x: ops.sum(ops.mul(x, x), axes=(0, 1))),
}


@pytest.fixture(scope="module")
def toolchain():
    from jitgrad.codegen import cuda_toolchain

    if not cuda_toolchain.is_available() or cuda_toolchain._disassembler() is None:
        pytest.skip("nvJitLink or nvdisasm is not installed")
    return cuda_toolchain


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(toolchain, arch):
    """Nothing is spilled, and rows are read and written 16 bytes at a time."""
    for name, graph in MACHINE_CODE.items():
        for launch in launches(graph):
            cubin = toolchain.link([compile_ptx(launch.source, arch)], arch)
            sass.assert_no_spills(cubin)
            assert cubin.kernels[launch.name].registers * launch.threads <= 65_536
            listing = toolchain.disassemble(cubin)[launch.name]
            sass.assert_no_double(listing)
            found = {code for code in sass.opcodes(listing) if code.startswith(("LDG.E.128", "STG.E.128"))}
            if name != "column" and not launch.name.endswith("_combine"):
                assert len({code[:3] for code in found}) == (1 if name == "full" else 2), (name, found)
