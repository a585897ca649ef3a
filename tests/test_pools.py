"""Pooling in the kernel of the convolution before it."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, nn, ops, pipeline
from jitgrad.ir import GraphBuilder, evaluate, parse_type
from jitgrad.ir.op import REGISTRY
from jitgrad.plans import compile_graph

HALVES = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "ceil_mode": False}
OVERLAPPING = {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1)), "ceil_mode": True}
JOINED = {
    "planes": ((8, 1, 28, 28), (32, 1, 3, 3), {}),
    "groups": ((5, 8, 13, 21), (24, 4, 3, 3), {"groups": 2}),
    "depthwise": ((3, 8, 14, 14), (16, 1, 3, 3), {"groups": 8}),
    "winograd": ((16, 32, 14, 14), (64, 32, 3, 3), {}),
    "winograd_in_blocks": ((3, 64, 14, 14), (64, 64, 3, 3), {}),
    "taps": ((40, 32, 9, 9), (32, 32, 5, 5), {}),
    "columns": ((40, 9, 7, 7), (10, 9, 3, 3), {}),
}
"""One convolution for each kernel: image, weights, attributes."""


def graph_of(image, weights, attrs, pools=(("max_pool", HALVES),), dtype="f32", keep=False):
    """Pooled ``relu(convolution + bias)``; `keep`: and this itself."""
    builder = GraphBuilder("pooled")
    shapes = image, weights, weights[:1]
    x, w, b = [builder.input(parse_type(f"{dtype}[{', '.join(map(str, s))}]")) for s in shapes]
    geometry = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1, **attrs}
    with builder:
        made = ops.convolution(x, w, **geometry)
        wide = ops.broadcast_to(ops.reshape(b, shape=(1, weights[0], 1, 1)), shape=made.shape)
        value = ops.relu(ops.add(made, wide))
        results = [r for name, pool in pools for r in run_pool(name, value, pool)]
    return builder.build([*results, value] if keep else results)


def run_pool(name, value, pool):
    if name == "avg_pool":
        return [ops.avg_pool(value, **pool, count_include_pad=False, divisor=0)]
    return ops.max_pool(value, **pool, dilation=(1, 1))


def arrays_for(graph, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(v.shape).astype(v.dtype.numpy) for v in graph.inputs]


def templates(graph):
    return [node.attrs.get("template", node.op.name) for node in pipeline.build(graph).stages[-1].graph.nodes]


def pooled(graph):
    return next(node.inputs[0] for node in graph.nodes if node.op.kind == "window")


def assert_pooled(graph, arrays, results):
    """The results are those of pooling what the convolution alone gives, bit by bit."""
    value, nodes = pooled(graph), [node for node in graph.nodes if node.op.kind == "window"]
    (alone,) = compile_graph(graph.replace(outputs=(value,))).run(arrays)
    outputs = dict(zip(graph.outputs, results, strict=True))
    for node in nodes:
        wanted = node.op.eager(alone, **node.attrs)
        for v, array in zip(node.outputs, wanted if len(node.outputs) > 1 else (wanted,), strict=True):
            if v in outputs:
                np.testing.assert_allclose(outputs[v], array, rtol=0 if node.op.name == "max_pool" else 1e-6)


@pytest.mark.parametrize("dtype", ("f32", "f64"))
@pytest.mark.parametrize("pools", ((("max_pool", HALVES),), (("max_pool", OVERLAPPING),), (("avg_pool", OVERLAPPING),)),
                         ids=("halves", "overlapping", "mean"))
@pytest.mark.parametrize("name", JOINED)
def test_results_are_those_of_two_kernels(name, pools, dtype):
    graph = graph_of(*JOINED[name], pools, dtype)
    plan, arrays = compile_graph(graph), arrays_for(graph)
    assert templates(graph) == ["pool"]
    assert_pooled(graph, arrays, plan.run(arrays))


@pytest.mark.parametrize("name", JOINED)
def test_what_is_pooled_is_not_stored(name):
    graph = graph_of(*JOINED[name])
    (entry,) = [e for e in compile_graph(graph).spec.entries if "max_pool" in e.name]
    assert entry.name == "convolution_add_relu_max_pool_f32"
    kept = compile_graph(graph_of(*JOINED[name], keep=True))
    assert compile_graph(graph).spec.arena + pooled(graph).type.nbytes <= kept.spec.arena + kept.spec.outputs[-1].type.nbytes


@pytest.mark.parametrize("name", JOINED)
def test_what_is_pooled_may_be_needed(name):
    graph = graph_of(*JOINED[name], keep=True)
    plan, arrays = compile_graph(graph), arrays_for(graph)
    *results, value = plan.run(arrays)
    assert templates(graph) == ["pool"]
    np.testing.assert_allclose(value, evaluate(graph, arrays)[-1], rtol=1e-4, atol=1e-4)
    assert_pooled(graph, arrays, [*results, value])


def test_two_pools_of_one_value():
    graph = graph_of(*JOINED["planes"], (("max_pool", HALVES), ("avg_pool", OVERLAPPING)))
    plan, arrays = compile_graph(graph), arrays_for(graph)
    assert templates(graph) == ["pool"]
    assert_pooled(graph, arrays, plan.run(arrays))


def test_the_convolution_may_stand_alone():
    builder = GraphBuilder("bare")
    x, w = builder.input(parse_type("f32[9, 1, 28, 28]")), builder.input(parse_type("f32[12, 1, 3, 3]"))
    with builder:
        made = ops.convolution(x, w, stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1)
        graph = builder.build(list(run_pool("max_pool", made, HALVES)))
    plan, arrays = compile_graph(graph), arrays_for(graph)
    assert [entry.name for entry in plan.spec.entries] == ["convolution_max_pool_f32"]
    assert_pooled(graph, arrays, plan.run(arrays))


@pytest.mark.parametrize("image", ((2, 1, 300, 300), (2, 3, 90, 90)), ids=str)
def test_planes_that_are_large_or_made_in_parts_are_pooled_apart(image):
    graph = graph_of(image, (64, image[1], 3, 3), {})
    plan, arrays = compile_graph(graph), arrays_for(graph)
    assert templates(graph) == ["convolution", "max_pool"]
    assert_pooled(graph, arrays, plan.run(arrays))


@pytest.mark.parametrize("name", ("planes", "depthwise", "winograd_in_blocks"))
def test_the_text_means_the_same_as_plain_python(name):
    image, weights, attrs = JOINED[name]
    graph = graph_of((2, *image[1:]), weights, attrs)
    arrays = arrays_for(graph)
    with config.scope(plain=True):
        plain = compile_graph(graph).run(arrays)
    for a, b in zip(compile_graph(graph).run(arrays), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", JOINED)
def test_what_is_not_finite_stays(name):
    graph = graph_of(*JOINED[name])
    arrays = arrays_for(graph)
    arrays[0][1, 0, 3, 3], arrays[0][2, 0, 5, 5] = np.nan, np.inf
    assert_pooled(graph, arrays, compile_graph(graph).run(arrays))


@pytest.mark.parametrize("name", JOINED)
def test_results_do_not_depend_on_the_number_of_threads(name):
    graph = graph_of(*JOINED[name])
    arrays = arrays_for(graph)
    results = []
    for count in (1, 2, 5):
        with config.scope(num_threads=count):
            results.append(compile_graph(graph).run(arrays))
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


def test_gradients_are_those_of_float64():
    def gradients(dtype):
        jg.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten())
        model.to(dtype)
        x = jg.tensor(np.random.default_rng(1).standard_normal((8, 1, 20, 20))).to(dtype)

        @jg.compile
        def step(x):
            loss = (model(x) ** 2).sum()
            loss.backward()
            return loss

        step(x)
        return [p.grad.numpy() for p in model.parameters()]

    for a, b in zip(gradients(jg.float32), gradients(jg.float64), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


SPREAD = {
    "planes": ((20, 1, 28, 28), (32, 1, 3, 3), {}),
    "several_at_once": ((40, 3, 8, 8), (16, 3, 3, 3), {}),
    "groups": ((9, 8, 12, 12), (24, 4, 3, 3), {"groups": 2}),
    "strided": ((11, 3, 33, 31), (20, 3, 5, 5), {"stride": (2, 2), "padding": ((2, 2), (2, 2))}),
}
"""Convolutions whose gradients in the weights read whole planes of few images."""


def gradient_graph(image, weights, attrs, pool=("max_pool", HALVES), dtype="f32", keep=False):
    """The gradient in the weights from that of the pooled result; `keep`: and what it is of the unpooled one."""
    forward = graph_of(image, weights, attrs, (pool,), dtype)
    (convolution,) = [node for node in forward.nodes if node.op.name == "convolution"]
    (pooling,) = [node for node in forward.nodes if node.op.kind == "window"]
    builder = GraphBuilder("gradient")
    x, g, *taps = [builder.input(v.type) for v in (convolution.inputs[0], *pooling.outputs)]
    with builder:
        spread = {name: value for name, value in pooling.attrs.items() if taps == [] or name != "ceil_mode"}
        spread = REGISTRY[f"{pool[0]}_grad"](g, *taps, input_shape=convolution.output.shape, **spread)
        made = ops.convolution_weight_grad(x, spread, weight_shape=weights, **convolution.attrs)
    return builder.build([made, spread] if keep else [made])


def gradient_arrays(graph, taps=4):
    rng = np.random.default_rng(2)
    return [rng.integers(0, taps, v.shape).astype(np.uint8) if v.dtype.short == "u8"
            else rng.standard_normal(v.shape).astype(v.dtype.numpy) for v in graph.inputs]


@pytest.mark.parametrize("dtype", ("f32", "f64"))
@pytest.mark.parametrize("pool", (("max_pool", HALVES), ("max_pool", OVERLAPPING), ("avg_pool", OVERLAPPING)),
                         ids=("halves", "overlapping", "mean"))
@pytest.mark.parametrize("name", SPREAD)
def test_gradients_are_spread_where_they_are_read(name, pool, dtype):
    graph = gradient_graph(*SPREAD[name], pool, dtype)
    arrays = gradient_arrays(graph, 4 if pool[1] is HALVES else 9)
    assert templates(graph) == ["pool_grad"]
    (made,) = compile_graph(graph).run(arrays)
    (wanted,) = evaluate(graph, [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays])
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_what_is_spread_is_not_stored():
    graph = gradient_graph(*SPREAD["planes"])
    assert compile_graph(graph).spec.arena < graph.nodes[0].output.type.nbytes // 4


def test_a_spread_gradient_that_is_needed_is_stored():
    graph = gradient_graph(*SPREAD["planes"], keep=True)
    arrays = gradient_arrays(graph)
    assert templates(graph) == ["max_pool_grad", "convolution_weight_grad"]
    for a, b in zip(compile_graph(graph).run(arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ("several_at_once", "groups"))
def test_spreading_means_the_same_as_plain_python(name):
    image, weights, attrs = SPREAD[name]
    graph = gradient_graph((3, *image[1:]), weights, attrs)
    arrays = gradient_arrays(graph)
    with config.scope(plain=True):
        (plain,) = compile_graph(graph).run(arrays)
    (made,) = compile_graph(graph).run(arrays)
    np.testing.assert_allclose(made, plain, rtol=1e-4, atol=1e-4)


def test_spread_gradients_do_not_depend_on_the_number_of_threads():
    graph = gradient_graph(*SPREAD["planes"])
    arrays, results = gradient_arrays(graph), []
    for count in (1, 2, 5):
        with config.scope(num_threads=count):
            results.append(compile_graph(graph).run(arrays)[0])
    assert all(np.array_equal(results[0], other) for other in results[1:])
