"""Looking inside: what is shown, and that looking changes nothing."""

import numpy as np
import pytest

from jitgrad import __main__ as command, config, limits, ops
from jitgrad.codegen.plain import run_plain
from jitgrad.inspect import Explanation, PlanView, Recompile, bar, flops, show_bytes, show_count
from jitgrad.ir import GraphBuilder, parse_type
from jitgrad.kernels.cpu import gemm, peak
from jitgrad.plans import clear_plans, compile_graph
from jitgrad.runtime import build


def step_graph():
    builder = GraphBuilder("step")
    p, x, y = (builder.input(parse_type(t)) for t in ("f32[8, 4]", "f32[16, 8]", "f32[16, 4]"))
    with builder:
        builder.where = ("train.py", 31)
        error = ops.sub(ops.matmul(x, p), y)
        gradient = ops.matmul(ops.permute(x, axes=(1, 0)), error)
        new = ops.sub(p, ops.mul(gradient, ops.full_like(gradient, 0.1)))
        loss = ops.sum(ops.mul(error, error), axes=(0, 1))
    return builder.build([loss], [(0, new)])


@pytest.fixture(scope="module")
def view():
    graph = step_graph()
    return PlanView(graph, compile_graph(graph))


def inputs():
    generator = np.random.default_rng(0)
    return [generator.standard_normal(v.shape).astype(np.float32) for v in step_graph().inputs]


def test_stages_and_steps(view):
    assert [stage.name for stage in view.stages][:2] == ["trace", "attention"] and view.stages[-1].name == "update"
    assert all(step.where == "train.py:31" for step in view.steps)
    assert "# after fuse: " in view.print_stages()
    assert all("def " in kernel.source for kernel in view.kernels)


def test_memory(view):
    memory = view.memory
    assert memory.inputs == 4 * (8 * 4 + 16 * 8 + 16 * 4) and memory.outputs == 4
    assert memory.peak >= memory.inputs + memory.outputs and "peak" in str(memory)


def test_times_leave_inputs_alone(view):
    arrays = inputs()
    before = [x.copy() for x in arrays]
    timed = view.time(arrays, repeats=2)
    assert all(step.seconds is not None and step.seconds > 0 for step in timed.steps)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, before, strict=True))
    assert timed.steps[0].share_of_peak is not None and " us" in str(timed)


def test_times_of_host_entries():
    builder = GraphBuilder()
    x = builder.input(parse_type("c64[3]"))
    with builder:
        graph = builder.build([ops.exp(ops.exp(x))])
    timed = PlanView(graph, compile_graph(graph)).time([np.ones(3, np.complex64)])
    assert {step.note for step in timed.steps} == {"no kernel for it: NumPy"}


def test_plan_works_after_timing(view):
    arrays = inputs()
    expected = [x.copy() for x in arrays]
    view.time(inputs())
    first = view.plan.run(arrays)[0]
    assert first == view.plan.run(expected)[0] and np.array_equal(arrays[0], expected[0])


def test_flops():
    nodes = step_graph().nodes
    assert flops(nodes[0]) == 2 * 16 * 4 * 8
    assert flops(nodes[1]) == 16 * 4


def test_explanation(view):
    explanation = Explanation("step", "replayed", ("a list grows (train.py:3)",), (view,),
                              (Recompile("x: f32[3] became f32[4]", "train.py:9", 0.12),), {"replayed": 2})
    text = str(explanation)
    for part in ("step: replayed; calls: 2 replayed", "because a list grows", "x: f32[3] became f32[4]", "kernel"):
        assert part in text
    assert explanation.kernels == view.kernels and explanation.graphs == (view.graph,)


def test_html(view):
    page = Explanation("step", "sealed", plans=(view,))._repr_html_()
    assert page.count("<details>") == page.count("</details>") > 3 and "after fuse" in page


def test_numbers():
    assert show_bytes(1536) == "1.5 KiB" and show_count(2_500_000) == "2.5M" and bar(1, 2, 10) == "█" * 5


# ---- the command line -------------------------------------------------------------------------------------------


def test_info(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("numpy", "processor", "vector width", "threads", "cache"))


def test_cache_commands(capsys, tmp_path):
    builder = GraphBuilder()
    x, places = builder.input(parse_type("f32[40, 50]")), builder.input(parse_type("i64[7]"))
    with builder:
        wide = ops.matmul(ops.permute(x, axes=(1, 0)), x)
        graph = builder.build([ops.take(wide, places, axis=0), ops.cumsum(wide, axis=1)])
    with config.scope(cache=tmp_path / "kernels"):
        clear_plans()
        build.forget()
        assert command.main(["cache", "build"]) == 0
        before = build.compiled
        compile_graph(graph)
        assert build.compiled == before                 # kernels built ahead are those that plans want
        for words in (["cache", "list"], ["cache", "size"], ["cache", "clear"]):
            assert command.main(words) == 0
        text = capsys.readouterr().out
        assert "plans" in text and "last used" in text and "removed" in text
        command.main(["cache", "list"])
        assert capsys.readouterr().out == ""


def test_wrong_commands_end_with_usage(capsys):
    with pytest.raises(SystemExit):
        command.main(["cache", "explode"])
    assert "usage" in capsys.readouterr().err


# ---- what the machine can do ------------------------------------------------------------------------------------


def test_multiply_adds_do_what_they_count():
    limit = limits.multiply_adds()
    limit()
    a, b, sums = limit.memory
    assert limit.work == 2 * limits.DEPTH * sums.size and sums.size == limits.ITEMS * a.size * b.size
    np.testing.assert_allclose(sums, limits.DEPTH * a[0] * b[0], rtol=1e-4)


def test_multiply_adds_as_python():
    a, b, sums = np.full(64, 2, np.float32), np.full(64, 3, np.float32), np.ones(2 * 64 * 64, np.float32)
    run_plain(peak.source("f32"), "multiply_add_f32", [a, b, sums, 5], 1, 2)
    tile = gemm.element_tile("f32")
    size = tile.rows * tile.columns
    assert (sums[size:2 * size] == 30).all() and (np.delete(sums, np.s_[size:2 * size]) == 1).all()


def test_copies_of_one_size_keep_their_own_memory():
    first, second = limits.copy(4096), limits.copy(4096)
    second.memory[0][:] = 2
    first()
    second()
    assert first.work == 8192 and (first.memory[1] == 1).all() and (second.memory[1] == 2).all()


def test_rates_of_the_machine():
    assert limits.machine_flops() > 1e8 and limits.machine_bandwidth() > 1e7
