"""From graph to plan: every op, memory that is shared or updated in place, errors, and plans found again."""

import hashlib
import json
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from canonical import along_rows
from hypothesis import given, settings
from samples import SAMPLES

import jitgrad as jg
from jitgrad import config, dtypes, ops, pipeline, plans
from jitgrad.errors import DivisionByZeroError, OutOfRangeError
from jitgrad.ir import GraphBuilder, TensorType, evaluate, parse_type
from jitgrad.linking import best_in_place, may_share
from jitgrad.pipeline import build
from jitgrad.plans import clear_plans, compile_graph
from jitgrad.runtime.spec import PlanSpec
from jitgrad.transforms.memory import ALIGNMENT, Slot, Step, assign_memory, output_identities, place_temporaries

F32 = dtypes.float32


def traced(function, *types, writes=()):
    """A graph of `function`, which returns (outputs, {position of an input: value written to it})."""
    builder = GraphBuilder()
    inputs = [builder.input(parse_type(t)) for t in types]
    with builder:
        outputs, written = function(*inputs)
    return builder.build(outputs, list(written.items()))


def arrays_for(graph, seed=0):
    generator = np.random.default_rng(seed)
    return [np.array(generator.standard_normal(v.shape) if v.dtype.is_floating_point else
                     generator.integers(1, 4, v.shape), v.dtype.numpy) for v in graph.inputs]


def close(x, y):
    tolerance = {8: 1e-12, 4: 2e-5}.get(y.dtype.itemsize, 2e-2)
    assert x.dtype == y.dtype and x.shape == y.shape
    if y.dtype.kind in "biu":
        np.testing.assert_array_equal(x, y)
    else:
        wide = np.complex128 if y.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(x.astype(wide), y.astype(wide), rtol=tolerance, atol=tolerance)


def check(graph, arrays=None):
    """The plan gives what NumPy gives, writes what it writes, and leaves all other inputs alone. Its results."""
    arrays = arrays_for(graph) if arrays is None else arrays
    with np.errstate(all="ignore"):
        expected = [np.asarray(x) for x in evaluate(graph, [x.copy() for x in arrays])]
    before = [x.copy() for x in arrays]
    with config.scope(check=True):
        plan = compile_graph(graph)
    results = plan.run(arrays)
    for x, y in zip(results, expected, strict=False):
        close(x, y)
    written = dict(zip([k for k, _ in graph.writes], expected[len(results):], strict=True))
    for k, x in enumerate(arrays):
        close(x, written.get(k, before[k]))
    assert plan.spec.written == tuple(sorted(written))
    return results


# ---- every op ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_every_op(name):
    for sample in SAMPLES[name][:4]:
        if name != "region":
            check(sample.graph(), [np.array(x, order="C") for x in sample.inputs])


def test_an_op_without_kernel_is_a_host_entry():
    graph = traced(lambda x: ([ops.exp(x)], {}), "c64[3]")
    assert [entry.host.op for entry in compile_graph(graph).spec.entries] == ["exp"]
    check(graph)


# ---- outputs ----------------------------------------------------------------------------------------------------


def test_a_returned_input_is_that_input():
    graph = traced(lambda x: ([x, ops.neg(x)], {}), "f32[3]")
    arrays = arrays_for(graph)
    assert check(graph, arrays)[0] is arrays[0]


def test_one_value_twice_is_one_memory():
    def function(x):
        y = ops.neg(x)
        return [y, y], {}

    first, second = check(traced(function, "f32[3]"))
    assert np.shares_memory(first, second)


def test_what_only_passes_made_equal_stays_apart():
    graph = traced(lambda x: ([ops.neg(x), ops.neg(x), ops.mul(x, ops.ones_like(x))], {}), "f32[3]")
    arrays = arrays_for(graph)
    first, second, third = check(graph, arrays)
    assert not np.shares_memory(first, second) and not np.shares_memory(third, arrays[0])


@pytest.mark.parametrize("function", [
    lambda x: ops.reshape(x, shape=(6,)), lambda x: ops.permute(x, axes=(1, 0)),
    lambda x: ops.broadcast_to(ops.reshape(x, shape=(1, 2, 3)), shape=(4, 2, 3)),
    lambda x: ops.slice(x, start=(0, 1), stop=(2, 3), step=(1, 1))])
def test_views_have_their_own_memory(function):
    graph = traced(lambda x: ([function(x), function(ops.exp(x))], {}), "f32[2, 3]")
    arrays = arrays_for(graph)
    assert not any(np.shares_memory(x, arrays[0]) for x in check(graph, arrays))


def test_views_of_one_computed_value():
    def function(x):
        y = ops.exp(x)
        return [y, ops.reshape(y, shape=(6,)), ops.permute(y, axes=(1, 0))], {}

    first, second, third = check(traced(function, "f32[2, 3]"))
    assert not np.shares_memory(first, second) and not np.shares_memory(first, third)


def test_constant_outputs():
    check(traced(lambda x: ([ops.full((2, 3), 1.5, F32), ops.constant(value=7, dtype=dtypes.int64)], {}), "f32[1]"))


def test_equal_constants_are_stored_once():
    def function(x, y):
        return [ops.mul(x, ops.full_like(x, 0.1)), ops.exp(ops.mul(y, ops.full_like(y, 0.1)))], {}

    assert len(compile_graph(traced(function, "f32[3]", "f32[2, 5]")).spec.constants) <= 16


def test_empty_results():
    check(traced(lambda x: ([ops.exp(x), ops.sum(x, axes=(0,))], {}), "f32[0, 3]"))


# ---- writes -----------------------------------------------------------------------------------------------------


def entry_names(graph):
    return [entry.name for entry in compile_graph(graph).spec.entries]


def uses_arena_or_copy(graph):
    return bool(compile_graph(graph).spec.arena) or any("copy" in name for name in entry_names(graph))


def test_an_elementwise_update_happens_in_place():
    def sgd(p, g):
        return [], {0: ops.sub(p, ops.mul(g, ops.full_like(g, 0.1)))}

    graph = traced(sgd, "f32[100]", "f32[100]")
    check(graph)
    assert len(entry_names(graph)) == 1 and not uses_arena_or_copy(graph)
    assert len(build(graph).linked.steps[0].step.shared) == 1


def test_a_row_update_happens_in_place():
    def normalize(x):
        total = ops.sum(x, axes=(1,))
        return [], {0: ops.div(x, ops.broadcast_to(ops.reshape(total, shape=(8, 1)), shape=(8, 16)))}

    graph = traced(normalize, "f32[8, 16]")
    check(graph, [np.random.default_rng(0).random((8, 16), np.float32) + 1])
    assert not any("copy" in name for name in entry_names(graph))


@pytest.mark.parametrize("function", [
    lambda x: ops.add(x, ops.permute(x, axes=(1, 0))), lambda x: ops.flip(x, axes=(0,)),
    lambda x: ops.broadcast_to(ops.slice(x, start=(0, 0), stop=(1, 9), step=(1, 1)), shape=(9, 9)),
    lambda x: ops.matmul(x, x)])
def test_an_update_that_reads_elsewhere_is_copied(function):
    check(traced(lambda x: ([], {0: function(x)}), "f32[9, 9]"))


def test_an_update_of_what_is_read_along_more_loops():
    def function(b, x):
        new = ops.exp(b)
        return [ops.mul(x, ops.broadcast_to(ops.reshape(new, shape=(1, 5)), shape=(40000, 5)))], {0: new}

    check(traced(function, "f32[5]", "f32[40000, 5]"))


def test_old_contents_read_later_stay():
    def function(x, w):
        y = ops.add(x, ops.ones_like(x))
        return [ops.matmul(y, w), ops.sum(ops.matmul(x, w), axes=(0, 1))], {0: y}

    check(traced(function, "f32[4, 4]", "f32[4, 4]"))


def test_old_contents_returned_are_a_copy():
    graph = traced(lambda x: ([x, ops.reshape(x, shape=(4,))], {0: ops.neg(x)}), "f32[2, 2]")
    arrays = arrays_for(graph)
    assert not any(np.shares_memory(x, arrays[0]) for x in check(graph, arrays))


def test_new_contents_returned_are_a_copy():
    def function(x):
        y = ops.neg(x)
        return [y], {0: y}

    graph = traced(function, "f32[3]")
    arrays = arrays_for(graph)
    assert not np.shares_memory(check(graph, arrays)[0], arrays[0])


def test_inputs_swap():
    check(traced(lambda x, y, z: ([], {0: y, 1: z, 2: x}), "f32[3]", "f32[3]", "f32[3]"))


@pytest.mark.parametrize("as_output", [True, False])
def test_accumulating_into_a_temporary_copies_nothing(as_output):
    def embedding_gradient(index, g):
        total = ops.index_add(ops.full((50, 8), 0.0, F32), index, g, axis=0)
        return [total if as_output else ops.matmul(total, ops.permute(total, axes=(1, 0)))], {}

    graph = traced(embedding_gradient, "i64[6]", "f32[6, 8]")
    check(graph)
    assert not any("copy" in name for name in entry_names(graph))


def test_accumulating_into_what_is_read_later_copies():
    def function(x, index, g):
        base = ops.exp(x)
        return [ops.index_add(base, index, g, axis=0), ops.index_add(base, index, ops.neg(g), axis=0), base], {}

    check(traced(function, "f32[5, 8]", "i64[6]", "f32[6, 8]"))


def test_a_chain_of_inputs():
    check(traced(lambda x, y: ([], {0: y, 1: ops.neg(y)}), "f32[3]", "f32[3]"))


def test_one_value_into_two_inputs():
    def function(x, y):
        z = ops.exp(x)
        return [], {0: z, 1: z}

    check(traced(function, "f32[3]", "f32[3]"))


def test_a_write_of_itself():
    check(traced(lambda x: ([ops.neg(x)], {0: x}), "f32[3]"))


def test_a_constant_written():
    check(traced(lambda x: ([], {0: ops.zeros_like(x)}), "f32[7]"))


# ---- errors -----------------------------------------------------------------------------------------------------


def failing(x, table, index):
    return [ops.take(table, index, axis=0)], {0: ops.add(x, ops.ones_like(x))}


@pytest.mark.parametrize("take_first", [True, False])
def test_nothing_is_written_when_an_index_is_out_of_range(take_first):
    def function(x, table, index):
        new = None if take_first else ops.neg(x)
        taken = ops.take(table, index, axis=0)
        return [taken], {0: ops.neg(x) if take_first else new}

    graph = traced(function, "f32[3]", "f32[4, 2]", "i64[2]")
    x, table = np.ones(3, np.float32), np.ones((4, 2), np.float32)
    plan = compile_graph(graph)
    with pytest.raises(OutOfRangeError, match="7"):
        plan.run([x, table, np.array([0, 7])])
    assert (x == 1).all()
    plan.run([x, table, np.array([0, 3])])
    assert (x == -1).all()


def test_integer_division_by_zero_names_the_line():
    builder = GraphBuilder()
    x, y = builder.input(parse_type("i32[4]")), builder.input(parse_type("i32[4]"))
    with builder:
        builder.where = ("train.py", 31)
        graph = builder.build([ops.floor_divide(x, y)])
    with pytest.raises(DivisionByZeroError, match=r"train\.py:31"):
        compile_graph(graph).run([np.ones(4, np.int32), np.zeros(4, np.int32)])


# ---- the memory plan --------------------------------------------------------------------------------------------


def test_slots_in_use_together_never_overlap_and_are_aligned():
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 2000)), max_size=40))
    def property(lifetimes):
        slots = [Slot("arena", 0, nbytes, first, first + length) for first, length, nbytes in lifetimes]
        size = place_temporaries(slots)
        assert all(s.index % ALIGNMENT == 0 and s.index + s.nbytes <= size for s in slots)
        for k, a in enumerate(slots):
            for b in slots[:k]:
                if a.first <= b.last and b.first <= a.last:
                    assert a.index + a.nbytes <= b.index or b.index + b.nbytes <= a.index or 0 in (a.nbytes, b.nbytes)

    property()


def test_memory_is_reused():
    def chain(x, w):
        for _ in range(20):
            x = ops.matmul(x, w)
        return [x], {}

    spec = compile_graph(traced(chain, "f32[64, 64]", "f32[64, 64]")).spec
    assert spec.arena < 6 * 64 * 64 * 4


def test_a_result_takes_over_the_memory_of_an_operand_that_nobody_reads_again():
    def arena(read_again: bool) -> int:
        def program(x, w):
            product = ops.matmul(x, w)
            weights = ops.exp(ops.sub(product, along_rows(ops.max(product, axes=(1,)), product.shape)))
            y = ops.matmul(weights, w)
            return [ops.add(ops.matmul(y, w), product) if read_again else y], {}

        graph = traced(program, "f32[256, 256]", "f32[256, 256]")
        plan = compile_graph(graph)
        x, w = arrays_for(graph)
        product = x.astype(np.float64) @ w
        y = np.exp(product - product.max(1, keepdims=True)) @ w
        np.testing.assert_allclose(plan.run([x, w])[0], y @ w + product if read_again else y, rtol=1e-3, atol=1e-2)
        return plan.spec.arena

    one = 256 * 256 * 4
    assert one <= arena(False) < 1.5 * one
    assert arena(True) >= 2 * one


@st.composite
def programs(draw):
    """Programs with several outputs and writes, over values of one shape."""
    builder = GraphBuilder()
    values = [builder.input(TensorType(F32, (4, 4))) for _ in range(3)]
    with builder:
        for _ in range(draw(st.integers(1, 8))):
            x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
            match draw(st.integers(0, 6)):
                case 0:
                    values.append(ops.add(x, y))
                case 1:
                    values.append(ops.maximum(x, ops.neg(y)))
                case 2:
                    values.append(ops.permute(x, axes=(1, 0)))
                case 3:
                    values.append(ops.tanh(ops.matmul(x, y)))
                case 4:
                    values.append(ops.reshape(ops.reshape(x, shape=(16,)), shape=(4, 4)))
                case 6:
                    part = ops.slice(y, start=(1, 0), stop=(3, 3), step=(1, 1))
                    values.append(ops.slice_update(x, part, start=(0, 1), step=(1, 1)))
                case 5:
                    total = ops.sum(x, axes=(1,))
                    values.append(ops.mul(y, ops.broadcast_to(ops.reshape(total, shape=(4, 1)), shape=(4, 4))))
    outputs = draw(st.lists(st.sampled_from(values), max_size=3))
    positions = draw(st.lists(st.integers(0, 2), unique=True, max_size=3))
    return builder.build(outputs, [(k, draw(st.sampled_from(values))) for k in positions])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(programs())
def test_random_programs(graph):
    check(graph)


@settings(max_examples=50, deadline=None)
@given(programs())
def test_assigned_memory_holds_what_is_read(graph):
    """Runs the steps on arrays, one per slot and poisoned when its lifetime is over: no kernel is compiled."""
    fused = graph
    for _, step in pipeline.PASSES:
        fused = step(fused)
    plan = assign_memory(fused, output_identities(graph), may_share, best_in_place)
    arrays = arrays_for(graph)
    expected = evaluate(graph, [x.copy() for x in arrays])
    memory = {}
    for position, step in enumerate(plan.steps):
        run_step(step, memory, arrays, plan.constants)
        for slot, array in memory.items():
            if slot.space == "arena" and slot.last <= position:
                array.fill(np.nan)
    for slot, value in zip(plan.outputs, expected, strict=False):
        stored = arrays[slot.index].tobytes() if slot.space == "input" else memory[slot].tobytes()
        np.testing.assert_allclose(np.frombuffer(stored, np.float32), np.ravel(value), rtol=1e-5)
    for (k, _), value in zip(graph.writes, expected[len(graph.outputs):], strict=True):
        np.testing.assert_allclose(arrays[k], value, rtol=1e-5)


def run_step(step, memory, arrays, constants):
    """Carry out a step of an assignment by NumPy, on `memory`."""

    def at(slot, type):
        if slot.space == "input":
            return arrays[slot.index].reshape(type.shape)
        if slot.space == "constant":
            return np.frombuffer(constants, type.dtype.numpy, type.size, slot.index).reshape(type.shape)
        return memory.setdefault(slot, np.empty(type.size, type.dtype.numpy)).reshape(type.shape)

    if not isinstance(step, Step):
        np.copyto(at(step.target, step.type), at(step.source, step.type))
        return
    node = step.node
    inputs = [np.array(at(slot, v.type)) for slot, v in zip(step.inputs, node.inputs, strict=True)]
    results = node.op.eager(*inputs, **node.attrs)
    results = results if isinstance(results, tuple) else (results,)
    for slot, v, result in zip(step.outputs, node.outputs, results, strict=True):
        np.copyto(at(slot, v.type), result)


# ---- plans found again ------------------------------------------------------------------------------------------


def small_graph():
    return traced(lambda x: ([ops.tanh(ops.mul(x, ops.full_like(x, 0.37)))], {}), "f32[6]")


def test_equal_graphs_have_one_plan():
    assert compile_graph(small_graph()) is compile_graph(small_graph())


def test_plans_are_forgotten_least_recently_used_first(monkeypatch):
    clear_plans()
    monkeypatch.setattr(plans, "PLANS_IN_MEMORY", 2)
    graphs = [traced(lambda x: ([ops.neg(x)], {}), f"f32[{n}]") for n in (1, 2, 3)]
    first, second = compile_graph(graphs[0]), compile_graph(graphs[1])
    assert compile_graph(graphs[0]) is first
    compile_graph(graphs[2])
    assert compile_graph(graphs[0]) is first and compile_graph(graphs[1]) is not second


def test_a_stored_plan_runs_no_pass(monkeypatch):
    compile_graph(small_graph())
    clear_plans()
    monkeypatch.setattr(pipeline, "build", None)
    (result,) = compile_graph(small_graph()).run([np.ones(6, np.float32)])
    np.testing.assert_allclose(result, np.tanh(np.float32(0.37)), rtol=1e-6)


SECOND_PROCESS = """
import sys, numpy as np
from jitgrad import ops
from jitgrad.ir import GraphBuilder, parse_type
from jitgrad.plans import compile_graph
builder = GraphBuilder()
x = builder.input(parse_type("f32[6]"))
with builder:
    graph = builder.build([ops.tanh(ops.mul(x, ops.full_like(x, 0.37)))])
result, = compile_graph(graph).run([np.ones(6, np.float32)])
assert abs(result[0] - 0.354) < 0.001, result
print("numba" in sys.modules)
"""


def test_a_second_process_never_loads_numba(tmp_path, monkeypatch):
    monkeypatch.setenv("JITGRAD_CACHE", str(tmp_path))
    seen = [subprocess.run([sys.executable, "-c", SECOND_PROCESS], capture_output=True, text=True, check=True).stdout
            for _ in range(2)]
    assert [text.strip() for text in seen] == ["True", "False"]


def test_a_damaged_plan_is_compiled_again(monkeypatch):
    graph = small_graph()
    compile_graph(graph)
    clear_plans()
    for text in (b"{", b"[]", json.dumps({"inputs": ["f32[6]"]}).encode()):
        monkeypatch.setattr(plans.cache.Cache, "get", lambda self, kind, key, text=text: text)
        assert plans._load(graph, hashlib.sha256(b"").hexdigest()) is None


def looking_up(lines_before):
    """A function, compiled, that stands so many lines down in its file."""
    text = "\n" * lines_before + "def step(x, k):\n    y = x * 2\n    return y[k] + y"
    names = {}
    exec(compile(text, "/home/user/train.py", "exec"), names)
    return jg.compile(names["step"])


@pytest.mark.parametrize("stored", [False, True])
def test_an_error_names_the_line_where_the_code_stands_now(stored):
    x, k = jg.ones(5, 3), jg.tensor([5])
    for above in (0, 7, 2):
        with pytest.raises(OutOfRangeError, match=rf"index 5 .*train\.py:{above + 3}\)"):
            looking_up(above)(x, k)
        if stored:
            clear_plans()


def test_a_plan_that_stands_elsewhere_shares_all_memory():
    there = traced(lambda x: ([ops.tanh(x)], {}), "f32[6]")
    builder = GraphBuilder()
    x = builder.input(parse_type("f32[6]"))
    builder.where = "train.py", 3
    with builder:
        here = builder.build([ops.tanh(x)])
    first, second = compile_graph(there), compile_graph(here)
    assert first is not second and first._idle is second._idle and first.spec is second.spec
    assert (first.lines, second.lines) == ((None,), (("train.py", 3),))


def test_specs_survive_json():
    spec = compile_graph(traced(failing, "f32[3]", "f32[4, 2]", "i64[2]")).spec
    assert PlanSpec.from_json(spec.to_json()) == spec


def test_debug_prints(capfd):
    with config.scope(debug="graphs,kernels,source,times"):
        build(small_graph())
    text = capfd.readouterr().err
    assert "# after fuse: " in text and "def fused_" in text and "tanh(" in text
