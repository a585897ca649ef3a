"""Generated kernels: results as plain Python and natively, vectors, memory shared in place, text without sizes."""

import re
import time

import numpy as np
import pytest
from canonical import PROGRAMS, along_rows, build, inputs_of, layer_norm, nll, softmax, softmax_backward
from hypothesis import given, settings
from launching import garbage, run, run_native
from test_fuse import programs

from jitgrad import ops
from jitgrad.codegen.kernel import Buffer
from jitgrad.codegen.lower import lower
from jitgrad.codegen.native import assembly
from jitgrad.codegen.plain import run_plain
from jitgrad.codegen.sharing import shareable
from jitgrad.dtypes import bfloat16, bool_, float16, float32, float64, int8, int32, int64, uint32
from jitgrad.ir import REGISTRY, GraphBuilder, TensorType, evaluate
from jitgrad.kernels.cpu.tile import vector_unit
from jitgrad.transforms.fuse import fuse

VECTOR = re.compile({512: "zmm|ymm", 256: "ymm", 128: r"\b(add|sub|mul|max|min)p[sd]\b|\.[24][sd]\b"}[vector_unit()[0]])
"""What the assembly text of a kernel with vectors has."""


def lower_node(node, shared=()):
    return lower(node.op, tuple([v.type for v in node.inputs]), node.attrs, shared, node.where)


def carry_out(graph, arrays, plain=False, pieces=1):
    """The results of a fused graph, its regions by their kernels."""
    environment = dict(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        inputs = [environment[v] for v in node.inputs]
        if node.op.kind in ("region", "foreach"):
            inputs = [np.ascontiguousarray(x) for x in inputs]
            results = run(lower_node(node), inputs, [v.type for v in node.outputs], plain=plain, pieces=pieces)
        else:
            results = [node.op.eager(*inputs, **node.attrs)]
        environment.update(zip(node.outputs, map(np.asarray, results), strict=True))
    return [environment[v] for v in graph.results]


def assert_close(given_, wanted, tolerance=1e-5):
    for x, y in zip(given_, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "native"])
@pytest.mark.parametrize(("name", "graph"), [p[:2] for p in PROGRAMS], ids=[p[0] for p in PROGRAMS])
def test_canonical_programs(name, graph, plain):
    arrays = inputs_of(graph)
    assert_close(carry_out(fuse(graph), arrays, plain, pieces=2), evaluate(graph, arrays))


@settings(max_examples=60, deadline=None)
@given(programs())
def test_generated_programs(graph):
    arrays = inputs_of(graph)
    wanted = evaluate(graph, arrays)
    if all(np.abs(x).max() < 1e6 for x in wanted):
        assert_close(carry_out(fuse(graph), arrays, plain=True), wanted, 1e-4)


def test_sizes_that_are_cut_into_items():
    """Long rows, many rows, and pieces in any order."""
    for shape in [(3, 20_001), (2_500, 17), (40_000, 1)]:
        graph = build([shape, shape[1:]], lambda x, b, n=shape: [
            ops.tanh(ops.add(x, ops.broadcast(b, n))), ops.sum(x, axes=(0,)), ops.sum(x, axes=(1,)),
            ops.sum(ops.mul(x, x), axes=(0, 1)), softmax(x)])
        arrays = inputs_of(graph)
        assert_close(carry_out(fuse(graph), arrays, pieces=5), evaluate(graph, arrays), 2e-4)


@pytest.mark.parametrize("dtype", [float64, float16, bfloat16], ids=lambda d: d.short)
def test_other_floats(dtype):
    graph = build([(6, 8)], softmax, dtype)
    arrays = inputs_of(graph)
    tolerance = {8: 1e-12, 2: 2e-2}[dtype.itemsize]
    for plain in (True, False):
        assert_close(carry_out(fuse(graph), arrays, plain), evaluate(graph, arrays), tolerance)


@pytest.mark.parametrize("dtype", [int8, int32, int64, uint32], ids=lambda d: d.short)
def test_integers_keep_their_type(dtype):
    """Overflow wraps at every statement, as in eager."""
    def program(x, y):
        z = ops.mul(ops.add(x, y), y)
        return [z, ops.gt(z, x), ops.sum(z, axes=(0,)), ops.max(z, axes=(0, 1)), ops.argmax(z, axis=1),
                ops.cast(z, dtype=float32)]

    graph = build([(6, 8), (6, 8)], program, dtype)
    limits = np.iinfo(dtype.numpy)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(limits.min, limits.max, (6, 8), dtype.numpy) for _ in range(2)]
    for plain in (True, False):
        for x, y in zip(carry_out(fuse(graph), arrays, plain), evaluate(graph, arrays), strict=True):
            np.testing.assert_array_equal(x, y)


def test_bools_reduce():
    graph = build([(6, 8)], lambda x: [ops.max(x, axes=(1,)), ops.min(x, axes=(1,)), ops.sum(x, axes=(0,)),
                                       ops.prod(x, axes=(0, 1))], bool_)
    arrays = [np.random.default_rng(0).random((6, 8)) > 0.8]
    for plain in (True, False):
        for x, y in zip(carry_out(fuse(graph), arrays, plain), evaluate(graph, arrays), strict=True):
            np.testing.assert_array_equal(x, y)


def test_extremes_of_nan_and_ties():
    x = np.zeros((4, 40), np.float32)
    x[0, 7] = np.nan
    x[0, 20] = np.nan
    x[1, [5, 9]] = 3
    x[2] = -np.inf
    x[3] = np.arange(40)
    graph = build([(4, 40)], lambda v: [ops.argmax(v, axis=1), ops.argmin(v, axis=1), ops.max(v, axes=(1,)),
                                        ops.min(v, axes=(1,))])
    for plain in (True, False):
        for a, b in zip(carry_out(fuse(graph), [x], plain), evaluate(graph, [x]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_random_bits_are_those_of_the_reference():
    key = TensorType(int64, ())
    graph = build([key, key], lambda k, o: ops.permute(ops.random_bits(k, o, shape=(5, 7)), axes=(1, 0)))
    arrays = [np.array(123456789012), np.array(5)]
    for plain in (True, False):
        for a, b in zip(carry_out(fuse(graph), arrays, plain), evaluate(graph, arrays), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_index_out_of_range_is_reported():
    graph = build([(6, 8), TensorType(int64, (6,))], nll)
    node = next(node for node in fuse(graph).nodes if node.op.kind == "region")
    arrays = [np.zeros(v.shape, v.dtype.numpy) for v in node.inputs]
    limit = next(k for k, v in enumerate(node.inputs) if v.dtype is int64 and v.shape == ())
    target = next(k for k, v in enumerate(node.inputs) if v.dtype is int64 and v.shape == (6,))
    arrays[limit][()], arrays[target][3] = 8, 9
    (launch,) = lower_node(node).launches
    memory = [*arrays, *[np.zeros(v.shape, v.dtype.numpy) for v in node.outputs]]
    arguments = [memory[a.index] if isinstance(a, Buffer) else a for a in launch.arguments]
    assert run_plain(launch.source, launch.name, arguments, 0, launch.items) == (1, 0, 9)


def test_integer_division_by_zero_is_reported():
    graph = build([(6, 8), (6, 8)], ops.floor_divide, int32)
    (node,) = fuse(graph).nodes
    (launch,) = lower_node(node).launches
    memory = [*[np.zeros((6, 8), np.int32) for _ in range(3)]]
    arguments = [memory[a.index] if isinstance(a, Buffer) else a for a in launch.arguments]
    assert run_plain(launch.source, launch.name, arguments, 0, launch.items) == (2, 0, 0)


def test_long_sums_are_accurate():
    """The error is at most four times that of NumPy's pairwise sum, or two units in the last place."""
    x = np.random.default_rng(0).random((4, 250_000), np.float32)
    graph = build([x.shape], lambda v: [ops.sum(v, axes=(0, 1)), ops.sum(v, axes=(1,))])
    for given_, pairwise, exact in zip(carry_out(fuse(graph), [x]), evaluate(graph, [x]),
                                       (x.sum(dtype=np.float64), x.sum(1, dtype=np.float64)), strict=True):
        assert np.all(np.abs(given_ - exact) <= 4 * np.abs(pairwise - exact) + 2 * np.spacing(given_))


# ---- text ----------------------------------------------------------------------------------------------------------


def texts(graph):
    """The texts of all kernels of a graph, without comments."""
    return [re.sub(r" *#.*", "", launch.source) for node in fuse(graph).nodes if node.op.kind == "region"
            for launch in lower_node(node).launches]


@pytest.mark.parametrize(("a", "b"), [((6, 8), (40, 300)), ((6, 8), (8, 8)), ((100, 30_000), (3, 2))])
def test_a_new_shape_gives_the_same_text(a, b):
    def program(x, w, c):
        y = softmax(ops.mul(x, ops.broadcast(w, x.shape)))
        return [y, ops.sum(ops.mul(y, x), axes=(0,)), ops.permute(ops.add(x, ops.broadcast(c, x.shape)), axes=(1, 0))]

    assert texts(build([a, a[1:], ()], program)) == texts(build([b, b[1:], ()], program))


def test_text_names_the_users_line():
    builder = GraphBuilder()
    x = builder.input(TensorType(float32, (3,)))
    builder.where = ("/somewhere/train.py", 31)
    with builder:
        y = ops.exp(ops.sub(x, x))
    (node,) = fuse(builder.build([y])).nodes
    (launch,) = lower_node(node).launches
    assert launch.name == "fused_sub_exp_f32"
    assert re.search(r"v\d = f32\(exp\(v\d\)\) +# exp  train.py:31", launch.source)


@pytest.mark.parametrize("dtype", [float32, float64], ids=lambda d: d.short)
def test_softmax_computes_exp_once(dtype):
    """It waits in the memory of the result; 16-bit floats would round it."""
    (text,) = texts(build([(6, 8)], softmax, dtype))
    assert text.count("exp(") == 1
    (text,) = texts(build([(6, 8)], softmax, float16))
    assert text.count("exp(") == 2


def test_what_is_kept_does_not_overwrite_what_is_read():
    """Two softmaxes and a late reader of the operand, in its memory and elsewhere."""
    def twice(x):
        return softmax(ops.mul(softmax(x), x))

    def late(x):
        y = softmax(x)
        return ops.add(y, ops.mul(x, along_rows(ops.sum(ops.mul(y, y), axes=(1,)), x.shape)))

    def both_ways(x):
        y = softmax(x)
        return y, softmax_backward(y, x)

    for function in (softmax, twice, late, both_ways):
        graph = build([(5, 70)], function)
        (x,) = inputs_of(graph)
        (node,) = fuse(graph).nodes
        for shared in ((), ((0, 0),)):
            for plain in (True, False):
                found = run(lower_node(node, shared), [x.copy()], [v.type for v in node.outputs], shared=shared, plain=plain)
                assert_close(found, evaluate(graph, [x]), 1e-5)


def test_scalars_stand_in_front_of_loops():
    graph = build([(6, 8), ()], lambda x, c: ops.mul(x, ops.broadcast(ops.exp(c), (6, 8))))
    (text,) = texts(graph)
    assert text.index("exp(") < text.index("for ")


# ---- speed ---------------------------------------------------------------------------------------------------------


def many_operands(*xs):
    total = xs[0]
    for x in xs[1:]:
        total = ops.add(total, x)
    return [ops.mul(total, x) for x in xs[:10]]


WIDE = (512, 4096)


@pytest.mark.parametrize("graph", [
    build([WIDE, WIDE[1:]], lambda x, b: ops.tanh(ops.add(x, ops.broadcast(b, WIDE)))),
    build([WIDE], softmax),
    build([WIDE, WIDE[1:], WIDE[1:]], layer_norm),
    build([WIDE], lambda x: ops.sum(ops.mul(x, x), axes=(0,))),
    build([WIDE], lambda x: ops.sum(ops.mul(x, x), axes=(0, 1))),
    build([WIDE] * 24, many_operands),
], ids=["map", "row", "layer_norm", "column", "full", "24 inputs and 10 outputs"])
def test_kernels_are_vectorized(graph):
    for node in fuse(graph).nodes:
        for launch in lower_node(node).launches if node.op.kind == "region" else ():
            text = assembly(launch.source, launch.name)
            assert VECTOR.search(text), launch.source


def seconds(*runs):
    """The least seconds of each of ``runs`` (launches and their memory), taken in turns."""
    best = [float("inf")] * len(runs)
    for _ in range(25):
        for k, (launches, memory) in enumerate(runs):
            begin = time.perf_counter()
            for launch in launches:
                run_native(launch, memory, 0, launch.items)
            best[k] = min(best[k], time.perf_counter() - begin)
    return best


@pytest.mark.parametrize("program", [
    lambda x: ops.sigmoid(ops.mul(x, x)), softmax,
    lambda x: ops.sub(x, along_rows(ops.sum(x, axes=(1,)), x.shape))], ids=["map", "softmax", "center"])
def test_in_place_is_as_fast_as_out_of_place(program):
    graph = build([(256, 1024)], program)
    (node,) = fuse(graph).nodes
    types = tuple([v.type for v in node.inputs])
    assert shareable(node.op, types, node.attrs) == ((0, 0),)
    (x,) = inputs_of(graph)
    target = garbage(np.dtype(np.float32), x.shape)
    apart, together = seconds((lower_node(node).launches, [x, target]),
                              (lower_node(node, ((0, 0),)).launches, [x.copy(), target]))
    assert together < 2 * apart  # without vectors it would take 4 to 16 times as long
    (result,) = run(lower_node(node, ((0, 0),)), [x.copy()], [node.output.type], shared=((0, 0),))
    assert_close([result], evaluate(graph, [x]), 2e-5)


def test_a_transposed_operand_is_read_in_tiles():
    n = 4096
    straight = build([(n, n), (n, n)], ops.add)
    turned = build([(n, n), (n, n)], lambda a, b: ops.add(a, ops.permute(b, axes=(1, 0))))
    times = []
    for graph in (straight, turned):
        (node,) = fuse(graph).nodes
        memory = [*inputs_of(graph), garbage(np.dtype(np.float32), (n, n))]
        times += seconds((lower_node(node).launches, memory))
    assert times[1] < 8 * times[0]      # one naive loop: more than 20 times


# ---- foreach -------------------------------------------------------------------------------------------------------


def adam():
    builder = GraphBuilder("adam")
    rate, beta, p, g, m, v, step = [builder.input(TensorType(float32, ())) for _ in range(7)]
    with builder:
        rest = ops.sub(ops.full((), 1.0, float32), beta)
        m_new = ops.add(ops.mul(m, beta), ops.mul(g, rest))
        v_new = ops.add(ops.mul(v, beta), ops.mul(ops.mul(g, g), rest))
        change = ops.div(ops.mul(m_new, step), ops.add(ops.sqrt(v_new), ops.full((), 1e-8, float32)))
        p_new = ops.sub(p, ops.mul(rate, change))
    return builder.build([p_new, m_new, v_new])


def adam_node(shapes):
    """A foreach node of Adam over parameters of these shapes, whose step counts are 0-d; and values for its inputs."""
    builder = GraphBuilder()
    types = [*[TensorType(float32, ())] * 2, *[TensorType(float32, s) for _ in range(4) for s in shapes],
             *[TensorType(float32, ())] * len(shapes)]
    inputs = tuple([builder.input(t) for t in types])
    outputs = builder.run(REGISTRY["foreach"], inputs, {"body": adam(), "groups": len(shapes), "shared": 2})
    *constants, node = fuse(builder.build(outputs)).nodes
    rng = np.random.default_rng(0)
    return node, [*[c.op.eager(**c.attrs) for c in constants],
                  *[np.asarray(rng.random(t.shape)).astype(np.float32) for t in types]]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "native"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_foreach(plain, in_place):
    shapes = [(3, 4), (9_000,), (0, 2), (5,), (), (1,)]
    node, arrays = adam_node(shapes)
    first = node.attrs["shared"]
    wanted = node.op.eager(*arrays, **node.attrs)
    shared = ()
    if in_place:
        homes = (0, 2, 3)                       # parameter and moments, by operand number
        shared = tuple([(k * len(shapes) + g, first + home * len(shapes) + g)
                        for k, home in enumerate(homes) for g in range(len(shapes))])
        assert set(shared) <= set(shareable(node.op, tuple([v.type for v in node.inputs]), node.attrs))
    results = run(lower_node(node, shared), [a.copy() for a in arrays], [v.type for v in node.outputs],
                  shared=shared, plain=plain, pieces=3)
    assert_close(results, wanted)


def test_foreach_compiles_the_same_text_for_any_number_of_tensors():
    one, many = [lower_node(adam_node([(16,)] * count)[0]).launches for count in (1, 1000)]
    assert len(one) == len(many) == 1
    assert one[0].source == many[0].source
    text = assembly(one[0].source, one[0].name)
    assert VECTOR.search(text)
