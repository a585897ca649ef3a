"""What joins parts of arrays reads them where they lie."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, ops
from jitgrad.inspect import PlanView
from jitgrad.ir import GraphBuilder, evaluate, parse_type
from jitgrad.plans import compile_graph


def part(x, start, stop, step=None):
    return ops.slice(x, start=start, stop=stop, step=step or (1,) * len(start))


def shifted(x, y):
    return ops.concat(part(y, (0, 0), (1, 6)), part(x, (0, 0), (4, 6)), axis=0)


PROGRAMS = {
    "shifted": shifted,
    "rolled": lambda x, y: ops.concat(part(x, (2, 0), (5, 6)), part(x, (0, 0), (2, 6)), axis=0),
    "columns": lambda x, y: ops.concat(part(x, (0, 3), (5, 6)), y, part(x, (0, 0), (5, 2)), axis=1),
    "steps": lambda x, y: ops.concat(part(x, (1, 0), (5, 6), (2, 3)), part(y, (0, 0), (5, 2)), axis=0),
    "turned": lambda x, y: ops.concat(ops.permute(x, axes=(1, 0)), ops.permute(part(y, (1, 0), (4, 6)), axes=(1, 0)),
                                      axis=1),
    "flipped": lambda x, y: ops.concat(ops.flip(x, axes=(0, 1)), y, axis=0),
    "spread": lambda x, y: ops.concat(ops.broadcast_to(part(x, (2, 0), (3, 6)), shape=(3, 6)), y, axis=0),
}


def graph_of(program, dtype="f32"):
    builder = GraphBuilder("pieces")
    x, y = [builder.input(parse_type(f"{dtype}[5, 6]")) for _ in range(2)]
    with builder:
        made = program(x, y)
    return builder.build([made])


def arrays_for(graph):
    rng = np.random.default_rng(0)
    return [rng.integers(-50, 50, v.shape).astype(v.dtype.numpy) for v in graph.inputs]


@pytest.mark.parametrize(("dtype", "way"), [("f32", "native"), ("f32", "plain"), ("bool", "native"), ("bf16", "native")])
@pytest.mark.parametrize("name", PROGRAMS)
def test_pieces_are_copied_from_where_they_lie(name, dtype, way):
    graph = graph_of(PROGRAMS[name], dtype)
    arrays = arrays_for(graph)
    with config.scope(plain=way == "plain"):
        plan = compile_graph(graph)
        (found,) = plan.run(arrays)
    np.testing.assert_array_equal(found, evaluate(graph, arrays)[0])
    assert [n.attrs["template"] for n in PlanView(graph, plan).build.stages[-1].graph.nodes
            if n.op.name != "reshape"] == ["concat"]


def test_a_part_that_is_wanted_elsewhere_is_made_once():
    builder = GraphBuilder("pieces")
    x, y = [builder.input(parse_type("f32[5, 6]")) for _ in range(2)]
    with builder:
        turned = ops.permute(x, axes=(1, 0))
        graph = builder.build([ops.concat(turned, ops.permute(y, axes=(1, 0)), axis=1), ops.cumsum(turned, axis=0)])
    arrays = arrays_for(graph)
    for a, b in zip(compile_graph(graph).run(arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_part_that_has_no_steps_is_made_first():
    def program(x, y):
        return ops.concat(*[ops.reshape(part(v, (1, 0), (5, 6)), shape=(3, 8)) for v in (x, y)], axis=1)

    graph = graph_of(program)
    arrays = arrays_for(graph)
    np.testing.assert_array_equal(compile_graph(graph).run(arrays)[0], evaluate(graph, arrays)[0])


def test_rolling_is_one_kernel():
    roll = jg.compile(lambda x: jg.roll(x, 3, 0))
    x = jg.arange(40.0).reshape(10, 4)
    np.testing.assert_array_equal(roll(x).numpy(), np.roll(x.numpy(), 3, 0))
    assert len(roll.kernels) == 1


def test_a_window_that_moves_on():
    """What is read is not yet written over."""
    window, wanted = jg.zeros(5, 6), np.zeros((5, 6), np.float32)

    @jg.compile
    def push(x):
        window.copy_(jg.cat([window[1:], x]))
        return window.sum()

    for k in range(6):
        x = np.full((1, 6), k + 1, np.float32)
        wanted = np.concatenate([wanted[1:], x])
        assert float(push(jg.tensor(x))) == wanted.sum()
        np.testing.assert_array_equal(window.numpy(), wanted)
