"""Graphs as text: what it looks like, and that it parses back to an equal graph."""

import ast

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jitgrad import dtypes, ops
from jitgrad.ir import GraphBuilder, TensorType, parse_type, verify
from jitgrad.ir.op import REGISTRY, Op
from jitgrad.ir.parse import parse_graph
from jitgrad.ir.printer import graph_html, letter_names, print_graph, spell

X = parse_type("f32[2, 3]")

BLOCK = Op("test_block", ("xs",), lambda *xs, body, template: tuple(v.type for v in body.outputs), None, "region",
           outputs=0, variadic=True)


@pytest.fixture(autouse=True)
def block_op(monkeypatch):
    """An op with a graph in an attribute, and any number of results."""
    monkeypatch.setitem(REGISTRY, BLOCK.name, BLOCK)


def small_graph(where=("/home/u/train.py", 31)):
    builder = GraphBuilder("loss")
    x, w, t = (builder.input(parse_type(text)) for text in ("f32[64, 784]", "f32[784, 10]", "f32[64, 10]"))
    with builder:
        builder.where = where
        difference = ops.sub(ops.matmul(x, w), t)
        total = ops.sum(ops.mul(difference, difference), axes=(0, 1))
    return builder.build([total], [(2, difference)])


GOLDEN = """\
# after simplify
def loss(a: f32[64, 784], b: f32[784, 10], c: f32[64, 10]) -> f32[]:
    d = matmul(a, b)          # f32[64, 10]  train.py:31
    e = sub(d, c)             # f32[64, 10]  train.py:31
    f = mul(e, e)             # f32[64, 10]  train.py:31
    g = sum(f, axes=(0, 1))   # f32[]  train.py:31
    c[...] = e                # written
    return g"""


def test_golden():
    assert print_graph(small_graph(), "after simplify") == GOLDEN


def test_round_trip_with_lines():
    graph = parse_graph(GOLDEN)
    assert graph.key == small_graph().key
    assert print_graph(graph, "after simplify") == GOLDEN
    assert graph.nodes[0].where == ("train.py", 31) and graph.writes[0][0] == 2


def nested_graph():
    body = GraphBuilder("fused_add_exp")
    a, b = body.input(X), body.input(X)
    with body:
        inner = body.build([ops.exp(ops.add(a, b)), a])
    builder = GraphBuilder("<lambda>")
    x, y = builder.input(X), builder.input(X)
    with builder:
        p, q = BLOCK(x, y, body=inner, template="map")
        r, _ = BLOCK(p, p, body=inner, template="map")
    return builder.build([q, r])


def test_nested_graphs():
    graph = nested_graph()
    text = print_graph(graph)
    assert "def fused_add_exp(a: f32[2, 3], b: f32[2, 3]) -> (f32[2, 3], f32[2, 3]):" in text
    assert "test_block(a, b, body=fused_add_exp, template='map')" in text
    assert parse_graph(text) == graph and print_graph(parse_graph(text)) == text


def test_text_but_for_types_is_python():
    ast.parse(print_graph(nested_graph()).replace("f32[2, 3]", "X"))


def test_long_signatures_have_one_parameter_per_line():
    builder = GraphBuilder()
    xs = [builder.input(X) for _ in range(30)]
    with builder:
        graph = builder.build([ops.concat(*xs, axis=0)])
    text = print_graph(graph)
    assert text.startswith("def graph(\n    a: f32[2, 3],\n") and parse_graph(text) == graph


@pytest.mark.parametrize("outputs", [0, 1, 2])
def test_any_number_of_outputs(outputs):
    builder = GraphBuilder()
    x = builder.input(X)
    graph = builder.build([x] * outputs)
    assert parse_graph(str(graph)) == graph


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 5e-324, 0.1, 1e300, 3, -3,
                                   2 ** 62, True, False])
def test_constants_keep_their_bits(value):
    builder = GraphBuilder()
    dtype = dtypes.bool_ if isinstance(value, bool) else dtypes.float64 if isinstance(value, float) else dtypes.int64
    with builder:
        graph = builder.build([ops.constant(value=value, dtype=dtype)])
    assert parse_graph(str(graph)) == graph


@pytest.mark.parametrize("value", [(), (1,), (1, 2), ((1, 2), (3, 4)), (0,) * 1000, ((0, 1),) * 20, None, "reflect",
                                   dtypes.bfloat16, dtypes.bool_, complex(-0.0, 1.5), (True, 2.0, "a")])
def test_attributes(value, monkeypatch):
    op = Op("test_any", (), lambda *, value: X, None, "source")
    monkeypatch.setitem(REGISTRY, op.name, op)
    builder = GraphBuilder()
    with builder:
        graph = builder.build([op(value=value)])
    assert parse_graph(str(graph)) == graph and len(str(graph)) < 200


def test_equal_elements_are_abbreviated():
    assert spell((0,) * 1000) == "(0,) * 1000"


def test_other_devices():
    """A type says where a value is; a graph does not."""
    there = TensorType(dtypes.float32, (3,), "cuda:0")
    assert str(there) == "f32[3]@cuda:0" and parse_type("f32[3]@cuda:0") == there
    builder = GraphBuilder()
    graph = builder.build([builder.input(there)])
    assert "a: f32[3])" in str(graph) and parse_graph(str(graph)) == graph


def test_names_are_no_keywords():
    names = [name for name, _ in zip(letter_names(), range(30_000))]
    assert len(set(names)) == 30_000 and not {"as", "is", "if", "in", "or", "for", "not", "nan", "inf"} & set(names)


def test_html():
    html = graph_html(small_graph())
    assert html.startswith("<pre") and "<b>matmul</b>(a, b)" in html and "-&gt; f32[]" in html


@pytest.mark.parametrize(("text", "problem"), [
    ("x = 1", "not one function"),
    ("def f(a: f32[2]) -> f32[2]:\n    b = frobnicate(a)\n    return b", "line 2: neither an op"),
    ("def f(a: f32[2]) -> f32[2]:\n    b = exp(c)\n    return b", "line 2: c is not assigned"),
    ("def f(a: f32[2]) -> f32[2]:\n    b, c = exp(a)\n    return b", "line 2: exp has 1 outputs"),
    ("def f(a: f32[2]) -> f32[2]:\n    b = exp(a)", "does not return"),
    ("def f(a: f32[2] -> f32[2]:\n    return a", "line 1"),
    ("def f(a) -> f32[2]:\n    return a", "no type"),
])
def test_what_is_no_graph(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_graph(text)


@st.composite
def graphs(draw):
    """Any ops on anything of one shape: enough to meet every kind of line."""
    builder = GraphBuilder(draw(st.sampled_from(["step", "<lambda>", "loss.<locals>.f", "class"])))
    values = [builder.input(X) for _ in range(draw(st.integers(1, 4)))]
    with builder:
        for _ in range(draw(st.integers(0, 40))):
            builder.where = draw(st.sampled_from([None, ("model.py", 7), ("cell 4", 2)]))
            x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
            match draw(st.integers(0, 4)):
                case 0:
                    values.append(ops.exp(x))
                case 1:
                    values.append(ops.add(x, y))
                case 2:
                    values.append(ops.flip(x, axes=(1,)))
                case 3:
                    values.append(ops.where(ops.lt(x, y), x, y))
                case 4:
                    values.append(ops.full_like(x, draw(st.floats())))
    writes = [(0, values[-1])] if draw(st.booleans()) else []
    return builder.build(draw(st.lists(st.sampled_from(values), max_size=3)), writes)


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_round_trip(graph):
    text = print_graph(graph)
    again = verify(parse_graph(text))
    assert again.key == graph.key
    assert [n.where for n in again.nodes] == [n.where for n in graph.nodes]
    assert print_graph(again) == text
