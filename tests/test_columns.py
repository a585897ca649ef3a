"""Sums over the rows of a product, in the product's kernel: the gradients of biases."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, nn, ops
from jitgrad.ir import GraphBuilder, evaluate, parse_type
from jitgrad.plans import clear_plans, compile_graph

SHAPES = [((6, 5), (5, 7)), ((1, 3), (3, 1)), ((300, 20), (20, 33)), ((64, 512), (512, 512)), ((3, 40, 9), (3, 9, 70)),
          ((4, 5, 8, 6), (6, 65)), ((1000, 1), (1, 2)), ((700, 64), (64, 800))]


def graph_of(x, y, epilogue, dtype="f32", axes=None):
    """``epilogue(x @ y)``, and its sums over all rows."""
    builder = GraphBuilder("rows")
    a, b = (builder.input(parse_type(f"{dtype}[{', '.join(map(str, s))}]")) for s in (x, y))
    with builder:
        wide = ops.broadcast_to(ops.reshape(b, shape=(1,) * (len(x) - len(y)) + y), shape=(*x[:-2], *y[-2:]))
        made = epilogue(ops.matmul(a, wide))
        total = ops.sum(made, axes=axes or tuple(range(len(made.shape) - 1)))
    return builder.build([made, total])


def templates(plan):
    return [node.attrs["template"] for node in plan.build.stages[-1].graph.nodes if node.op.name == "region"]


def arrays_for(graph, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(v.shape).astype(v.dtype.numpy) for v in graph.inputs]


def run(graph, arrays):
    return compile_graph(graph).run(arrays)


@pytest.mark.parametrize("dtype", ("f32", "f64"))
@pytest.mark.parametrize("epilogue", (lambda v: v, ops.tanh), ids=("bare", "tanh"))
@pytest.mark.parametrize(("x", "y"), SHAPES, ids=str)
def test_sums_are_those_of_float64(x, y, epilogue, dtype):
    graph = graph_of(x, y, epilogue, dtype)
    arrays = arrays_for(graph)
    made, total = run(graph, arrays)
    wanted = evaluate(graph, arrays)
    np.testing.assert_allclose(made, wanted[0], rtol=1e-4, atol=1e-4)
    exact = made.astype(np.float64).reshape(-1, made.shape[-1]).sum(0)
    limit = 1e-6 if dtype == "f32" else 1e-15
    assert np.all(np.abs(total - exact) <= limit * (1 + np.abs(made).reshape(-1, made.shape[-1]).sum(0)))


@pytest.mark.parametrize(("x", "y"), [s for s in SHAPES if s[0][-2] < 50], ids=str)
def test_the_text_means_the_same_as_plain_python(x, y):
    graph = graph_of(x, y, ops.tanh)
    arrays = arrays_for(graph)
    with config.scope(plain=True):
        plain = run(graph, arrays)
    for a, b in zip(run(graph, arrays), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads():
    graph = graph_of((700, 64), (64, 800), ops.tanh)
    arrays, found = arrays_for(graph), []
    for threads in (1, 2, 3):
        clear_plans()
        with config.scope(num_threads=threads):
            found.append(run(graph, arrays))
    for made, total in found[1:]:
        np.testing.assert_array_equal(made, found[0][0])
        np.testing.assert_array_equal(total, found[0][1])


def view(graph):
    from jitgrad.inspect import PlanView
    return PlanView(graph, compile_graph(graph))


def test_one_kernel_and_the_sum_of_its_parts():
    shown = view(graph_of((300, 20), (20, 33), ops.tanh))
    assert templates(shown) == ["matmul"]
    names = [entry.name for entry in shown.build.spec.entries]
    assert [n for n in names if not n.startswith("pack")] == ["matmul_tanh_sum_f32", "fused_sum_f32_combine"]


@pytest.mark.parametrize("graph", [
    graph_of((12, 12), (12, 12), lambda v: ops.permute(ops.tanh(v), axes=(1, 0))),
    graph_of((12, 12), (12, 12), lambda v: ops.flip(v, axes=(1,))),
    graph_of((12, 6), (6, 8), lambda v: ops.reshape(v, shape=(12, 4, 2))),
    graph_of((12, 6), (6, 8), ops.tanh, axes=(1,)),
    graph_of((3, 12, 6), (3, 6, 8), ops.tanh, axes=(0,)),
    graph_of((12, 6), (6, 8), lambda v: ops.cast(v, dtype=jg.bfloat16)),
], ids=("turned", "flipped", "cut", "other axis", "batch alone", "narrower"))
def test_other_sums_are_kernels_of_their_own(graph):
    assert len(templates(view(graph))) > 1
    arrays = arrays_for(graph)
    for a, b in zip(run(graph, arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-2, atol=1e-2)


def test_gradients_of_biases():
    """Every bias gets its gradient from the kernel that makes the rows, here also that of the loss."""
    found = []
    for compiled in (False, True):
        jg.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))

        def step(x, model=model):
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        run_step = jg.compile(step) if compiled else step
        run_step(jg.ones(64, 20) * jg.arange(64.0).reshape(64, 1) / 64)
        found.append([p.grad.numpy() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    nodes = run_step.plan.build.stages[-1].graph.nodes
    sums = [n for n in nodes if n.op.name == "region" and n.attrs["template"] == "matmul"
            and any(inner.op is ops.sum for inner in n.attrs["body"].nodes)]
    assert len(sums) == 3 and not [n for n in nodes if n.attrs.get("template") == "column"]
