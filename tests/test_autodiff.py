"""Reverse mode as a Graph transform: which inputs get gradients, what the two halves keep, and what that costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from samples import random

from jitgrad import dtypes, ops
from jitgrad.ir import Graph, GraphBuilder, TensorType, evaluate, parse_type, verify
from jitgrad.ops.gradient import reads
from jitgrad.transforms.autodiff import split, vjp
from jitgrad.transforms.mincut import Network


def graph_of(function: Callable[..., Any], *types: str) -> Graph:
    builder = GraphBuilder(function.__name__)
    inputs = [builder.input(parse_type(t)) for t in types]
    with builder:
        result = function(*inputs)
    return builder.build(result if isinstance(result, (tuple, list)) else [result])


def saved_types(function: Callable[..., Any], *types: str, wrt: tuple[int, ...]) -> list[str]:
    halves = split(vjp(graph_of(function, *types), wrt))
    verify(halves.forward)
    verify(halves.backward)
    count = len(halves.saved_inputs)
    return sorted(str(v.type) for v in halves.forward.outputs[-count:]) if count else []


def test_inputs_without_a_path_have_no_gradient():
    joint = vjp(graph_of(lambda x, y, z: (ops.mul(x, x), ops.floor_divide(y, x)), *["f32[3]"] * 3), (0, 1, 2))
    assert joint.seeds == (0,)
    assert joint.gradients == (2, None, None)


def test_one_value_as_two_outputs_gets_both_gradients():
    def twice(x):
        y = ops.exp(x)
        return y, y

    joint = vjp(graph_of(twice, "f32[2]"), (0,))
    x, g, h = random(2), random(2, seed=1), random(2, seed=2)
    np.testing.assert_allclose(evaluate(joint.graph, [x, g, h])[2], np.exp(x) * (g + h), rtol=1e-6)


def test_gradients_follow_the_lines_of_their_nodes():
    builder = GraphBuilder()
    x = builder.input(TensorType(dtypes.float32, (2,)))
    with builder:
        builder.where = ("train.py", 31)
        y = ops.sin(x)
    joint = vjp(builder.build([y]), (0,))
    assert all(node.where == ("train.py", 31) for node in joint.graph.nodes)


def test_rules_say_what_a_tape_keeps():
    assert reads(ops.exp, (True,)) == ((), (0,))
    assert reads(ops.mul, (True, False)) == ((1,), ())
    assert reads(ops.add, (True, True)) == ((), ())
    assert reads(ops.sum, (True,)) == ((), ())
    assert reads(ops.max_pool, (True,)) == ((), (1,))
    assert reads(ops.foreach, (True, True)) == ((0, 1), ())


# ---- what is saved ---------------------------------------------------------------------------------------------


def test_a_chain_of_elementwise_ops_keeps_its_input_alone():
    def chain(x):
        return ops.tanh(ops.exp(ops.mul(x, ops.sigmoid(x))))

    assert saved_types(chain, "f32[64, 8]", wrt=(0,)) == ["f32[64, 8]"]


def test_dropout_keeps_its_mask_and_no_random_bits():
    def dropout(x, key, offset):
        bits = ops.random_bits(key, offset, shape=x.shape)
        keep = ops.lt(bits, ops.full(x.shape, 2 ** 31, dtypes.uint32))
        return ops.where(keep, x, ops.zeros_like(x))

    assert saved_types(dropout, "f32[64, 8]", "i64[]", "i64[]", wrt=(0,)) == ["bool[64, 8]"]


def test_contractions_are_never_computed_again():
    def layers(x, w, v):
        return ops.matmul(ops.tanh(ops.matmul(x, w)), v)

    halves = split(vjp(graph_of(layers, "f32[8, 4]", "f32[4, 5]", "f32[5, 2]"), (0, 1, 2)))
    assert sum(node.op is ops.matmul for node in halves.forward.nodes) == 2
    assert sum(node.op is ops.matmul for node in halves.backward.nodes) == 4


def test_broadcast_operands_are_kept_small():
    def scaled(x, w):
        return ops.mul(x, ops.broadcast(w, x.shape))

    assert saved_types(scaled, "f32[64, 8]", "f32[8]", wrt=(0,)) == ["f32[8]"]


def test_linear_functions_save_nothing():
    assert saved_types(lambda x: ops.neg(ops.sum(x, axes=(0,))), "f32[3, 2]", wrt=(0,)) == []


def test_written_values_stay_in_the_forward_half():
    builder = GraphBuilder()
    x, buffer = (builder.input(TensorType(dtypes.float32, (3,))) for _ in range(2))
    with builder:
        graph = builder.build([ops.mul(x, x)], [(1, ops.add(buffer, x))])
    halves = split(vjp(graph, (0,)))
    assert [k for k, _ in halves.forward.writes] == [1]
    assert not halves.backward.writes


def test_time_is_linear_in_the_nodes():
    def seconds(count: int) -> float:
        def chain(x):
            for _ in range(count):
                x = ops.tanh(ops.mul(x, x))
            return x

        graph = graph_of(chain, "f32[16]")
        gc.disable()  # a collection walks everything that other tests have left
        try:
            start = time.process_time()
            split(vjp(graph, (0,)))
            return time.process_time() - start
        finally:
            gc.enable()

    short, long = (min(seconds(count) for _ in range(3)) for count in (500, 8000))
    assert long < 64 * short  # 16 times as many nodes; a quadratic pass takes 256 times as long


# ---- minimum cut -----------------------------------------------------------------------------------------------


def test_minimum_cut_of_a_known_network():
    network = Network()
    a, b, c, d = (network.vertex() for _ in range(4))
    for tail, head, capacity in ((0, a, 16), (0, b, 13), (a, c, 12), (b, a, 4), (c, b, 9), (b, d, 14), (d, c, 7),
                                 (c, 1, 20), (d, 1, 4)):
        network.connect(tail, head, capacity)
    assert network.source_side() == {0, a, b, d}      # capacity 12 + 7 + 4 = 23, the example of Cormen et al.
