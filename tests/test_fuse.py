"""Fusion: which nodes become one kernel, in canonical programs and in generated ones."""

import time

import numpy as np
import pytest
from canonical import PROGRAMS, build, inputs_of, softmax
from hypothesis import given, settings, strategies as st

import jitgrad as jg
from jitgrad import ops
from jitgrad.dtypes import float32, int64, uint32
from jitgrad.ir import GraphBuilder, TensorType, evaluate, verify
from jitgrad.transforms.fuse import fuse


def kernels(graph):
    """The templates of the regions of a fused graph, and the names of primitives that are no mere view."""
    return [node.attrs["template"] if node.op.kind == "region" else node.op.name for node in graph.nodes
            if node.op.name not in ("constant", "reshape")]


def assert_same_results(graph, fused):
    arrays = inputs_of(graph)
    for wanted, given_ in zip(evaluate(graph, arrays), evaluate(fused, arrays), strict=True):
        largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
        np.testing.assert_allclose(given_, wanted, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("name", "graph", "templates"), PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_kernel_count(name, graph, templates):
    fused = verify(fuse(graph), "fuse")
    assert templates is None or kernels(fused) == templates
    assert_same_results(graph, fused)


def test_random_bits_are_drawn_once():
    def dropout_twice(x, key, offset):
        bits = ops.random_bits(key, offset, shape=(6, 8))
        kept = ops.lt(bits, ops.full((6, 8), 1 << 31, uint32))
        zero = ops.zeros_like(x)
        return [ops.where(kept, x, zero), ops.permute(ops.where(kept, ops.exp(x), zero), axes=(1, 0))]

    key = TensorType(int64, ())
    fused = verify(fuse(build([(6, 8), key, key], dropout_twice)))
    drawn = [node for region in fused.nodes if region.op.kind == "region"
             for node in region.attrs["body"].nodes if node.op.name == "random_bits"]
    assert len(drawn) == 1


def test_what_is_read_twice_is_stored_once():
    """An expensive value with readers in two kernels is computed in one of them."""
    def program(x, w):
        e = ops.exp(x)
        return [ops.matmul(e, w), ops.sum(e, axes=(0,))]

    fused = verify(fuse(build([(6, 8), (8, 3)], program)))
    bodies = [node.attrs["body"] for node in fused.nodes if node.op.kind == "region"]
    assert sum(node.op.name == "exp" for body in bodies for node in body.nodes) == 1


def test_fusion_across_a_kernel_between_makes_no_cycle():
    def program(x, w):
        e = ops.exp(x)
        return ops.add(ops.matmul(e, w), e)

    graph = build([(6, 6), (6, 6)], program)
    fused = verify(fuse(graph))
    assert kernels(fused) == ["map", "matmul"]
    assert_same_results(graph, fused)


def test_two_merges_make_no_cycle():
    """Each kernel of the backward pass could be merged with one of the forward pass, but not both."""
    F, cotangent = jg.nn.functional, jg.randn(2, 2, 3, 4)

    def products(a, b):
        o = F.silu(a).transpose(1, 2) @ F.silu(b).transpose(1, 2).mT
        return o.detach(), *jg.autograd.grad((o * cotangent).sum(), [a, b])

    places, other = jg.randint(0, 8, (8, 8)), jg.randn(8, 8)

    def updates(x, b, w):
        y = 2.0 - w - jg.gather(x * b.tanh(), 1, places)
        gx, gw, gb = jg.autograd.grad((y * other).sum(), [x, w, b])
        with jg.no_grad():
            w.sub_(gw)
            b.sub_(gb)
        return y.detach(), gx

    for function, shapes in ((products, [(2, 3, 2, 8), (2, 4, 2, 8)]), (updates, [(8, 8), (8,), (8, 8)])):
        arrays = [np.random.default_rng(k).standard_normal(shape, np.float32) for k, shape in enumerate(shapes)]
        results = []
        for run in (function, jg.compile(function)):
            leaves = [jg.tensor(x, requires_grad=True) for x in arrays]
            results.append([x.detach().numpy() for x in (*run(*leaves), *leaves)])
        for eager, compiled in zip(*results, strict=True):
            np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-5)


def test_backward_arithmetic_stays_out_of_the_forward_epilogue():
    """cos(z), which only the backward pass reads, is computed there."""
    def program(x, w, g):
        z = ops.matmul(x, w)
        loss = ops.sum(ops.sin(z), axes=(0, 1))
        late = ops.mul(g, ops.broadcast(loss, z.shape))
        return [loss, ops.mul(late, ops.cos(z))]

    fused = verify(fuse(build([(6, 6), (6, 6), (6, 6)], program)))
    first = next(node for node in fused.nodes if node.op.kind == "region")
    assert first.attrs["template"] == "matmul"
    assert "cos" not in [node.op.name for node in first.attrs["body"].nodes]


@st.composite
def programs(draw):
    """Random DAGs over a few shapes: elementwise, movement, reductions spread back, matmul."""
    builder = GraphBuilder()
    values = [builder.input(TensorType(float32, (4, 4))) for _ in range(2)]
    choice = st.integers(0, 10)
    with builder:
        for _ in range(draw(st.integers(1, 14))):
            x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
            values.append(_step(draw(choice), x, y))
    return builder.build(draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)))


def _step(kind, x, y):
    if kind < 3:
        return (ops.add, ops.mul, ops.maximum)[kind](x, y)
    if kind < 5:
        return (ops.tanh, ops.sigmoid)[kind - 3](x)
    if kind == 5:
        return ops.permute(x, axes=(1, 0))
    if kind == 6:
        return ops.matmul(x, y)
    if kind == 7:
        return ops.reshape(ops.permute(ops.reshape(x, shape=(2, 2, 4)), axes=(1, 0, 2)), shape=(4, 4))
    if kind == 8:
        return ops.flip(x, axes=(1,))
    axis = kind - 9
    return ops.broadcast_to(ops.expand_dims(ops.sum(x, axes=(axis,)), (axis,)), shape=(4, 4))


@settings(max_examples=150, deadline=None)
@given(programs())
def test_generated_programs(graph):
    fused = verify(fuse(graph), "fuse")
    assert_same_results(graph, fused)


def test_ten_thousand_nodes_take_seconds():
    def recurrent(x, w):
        for _ in range(1250):
            x = ops.tanh(ops.add(ops.matmul(x, w), x))
            x = ops.mul(softmax(x), x)
        return x

    graph = build([(4, 4), (4, 4)], recurrent)
    begin = time.process_time()
    fused = fuse(graph)
    assert len(graph.nodes) > 10_000
    assert time.process_time() - begin < 10
    assert kernels(fused).count("row") == 1250
