"""Small kernels side by side: the schedule, the plans that it makes, and what users see of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from test_pipeline import arrays_for, check, programs, traced
from test_runtime import ADD, THREADS, plan_of

import jitgrad as jg
from jitgrad import config, ops, pipeline
from jitgrad.errors import OutOfRangeError
from jitgrad.inspect import PlanView
from jitgrad.plain import PlainPlan
from jitgrad.plans import clear_plans, compile_graph
from jitgrad.runtime import build
from jitgrad.runtime.plan import Plan, PlanSpec
from jitgrad.runtime.timing import time_entries
from jitgrad.transforms import schedule as schedules
from jitgrad.transforms.memory import Slot
from jitgrad.transforms.schedule import Task, schedule


@pytest.fixture
def eager_to_group(monkeypatch):
    """Groups are made however little there is to do."""
    monkeypatch.setattr(schedules, "WORTH", 0)
    clear_plans()
    yield
    clear_plans()


def products(rows=64, count=4, function=lambda x: x):
    """A graph of `count` ** 2 independent products."""
    kind = f"f32[{rows}, {rows}]"

    def all_pairs(*xs):
        return [function(ops.matmul(x, y)) for x in xs[:count] for y in xs[count:]], {}

    return traced(all_pairs, *[kind] * (2 * count))


def apart(spec: PlanSpec) -> PlanSpec:
    return replace(spec, entries=tuple([replace(entry, group=0, pieces=1) for entry in spec.entries]))


# ---- the schedule -----------------------------------------------------------------------------------------------


def uses(slots):
    return {(s.space, s.index + k if s.space == "arena" else s.index) for s in slots
            for k in range(s.nbytes if s.space == "arena" else 1)}


def conflict(a, b):
    return bool(uses(a.writes) & uses((*b.reads, *b.writes)) or uses(b.writes) & uses(a.reads)) or a.barrier or b.barrier


@st.composite
def tasks(draw):
    slot = st.one_of(st.builds(Slot, st.sampled_from(["input", "output"]), st.integers(0, 2), st.just(4)),
                     st.builds(Slot, st.just("arena"), st.integers(0, 12), st.integers(0, 6)))
    some = st.lists(slot, max_size=2).map(tuple)
    return draw(st.lists(st.builds(Task, some, some, st.integers(0, 40), st.sampled_from([1e2, 6e4, 2e5]),
                                   st.sampled_from([False] * 7 + [True])),
                         max_size=14))


@settings(max_examples=300, deadline=None)
@given(tasks())
def test_what_depends_on_each_other_keeps_its_order(given_tasks):
    groups = schedule(given_tasks)
    place = {number: k for k, group in enumerate(groups) for number, _ in group}
    assert sorted(place) == list(range(len(given_tasks))) and sum(map(len, groups)) == len(given_tasks)
    for j, later in enumerate(given_tasks):
        for i, earlier in enumerate(given_tasks[:j]):
            assert place[i] < place[j] or not conflict(earlier, later)
    for group in groups:
        for number, pieces in group:
            assert len(group) == 1 or (given_tasks[number].is_small and 1 <= pieces <= given_tasks[number].items)


def task(reads, writes, items=1, work=1e4):
    return Task(tuple([Slot("input", k, 4) for k in reads]), tuple([Slot("output", k, 4) for k in writes]), items, work)


def test_a_task_moves_up_into_the_first_group_that_it_may_belong_to(eager_to_group):
    chains = [task([0], [0]), Task((Slot("output", 0, 4),), (Slot("output", 1, 4),), 1, 1e4),
              task([1], [2]), Task((Slot("output", 2, 4),), (Slot("output", 3, 4),), 1, 1e4)]
    assert [sorted(n for n, _ in group) for group in schedule(chains)] == [[0, 2], [1, 3]]


def test_tasks_that_threads_share_anyway_stay_alone():
    assert [len(group) for group in schedule([task([0], [k], items=16, work=5e4) for k in range(5)])] == [1] * 5
    assert [len(group) for group in schedule([task([0], [k], items=1, work=5e4) for k in range(5)])] == [5]


def test_little_and_large_tasks_stay_alone():
    assert [len(group) for group in schedule([task([0], [k], work=1e3) for k in range(5)])] == [1] * 5
    assert [len(group) for group in schedule([task([0], [k], items=64, work=1e6) for k in range(5)])] == [1] * 5


def test_pieces_follow_the_work_and_long_ones_come_first(eager_to_group):
    (group,) = schedule([task([0], [0], 40, 1e4), task([0], [1], 2, 6e4), task([0], [2], 100, 3e4)])
    assert group == ((1, 2), (2, 5), (0, 2))


# ---- plans ------------------------------------------------------------------------------------------------------


def test_independent_products_are_one_group_and_results_are_the_same_to_the_last_bit():
    graph = products()
    spec = pipeline.build(graph).spec
    assert {entry.group for entry in spec.entries} == {1}
    plan, arrays = compile_graph(graph), arrays_for(graph)
    alone = Plan(apart(spec), plan.kernels)
    with config.scope(num_threads=1):
        expected = alone.run(arrays)
    for count in (1, 2, 3):
        with config.scope(num_threads=count):
            for _ in range(20):
                assert all(map(np.array_equal, plan.run(arrays), expected))
    check(graph)


def test_threads_share_a_group_of_kernels_with_one_item_each():
    plan = plan_of([], ["i64[1]", "i64[1]"], *[(THREADS, 1, (("output", k), 3_000_000)) for k in range(2)])
    grouped = Plan(replace(plan.spec, entries=tuple([replace(e, group=1) for e in plan.spec.entries])), plan.kernels)
    with config.scope(num_threads=2):
        seen = [{int(x[0]) for x in grouped.run([])} for _ in range(5)]
        assert {0, 1} in seen
        assert all({int(x[0]) for x in plan.run([])} == {0} for _ in range(5))


def test_pieces_cover_all_items():
    kind = "f32[7]"
    steps = [(ADD, 7, (("input", 0), ("input", 1), ("output", k), 1)) for k in range(4)]
    plan = plan_of([kind, kind], [kind] * 4, *steps)
    x, y = np.arange(7, dtype=np.float32), np.ones(7, np.float32)
    for pieces in ([1, 2, 3, 7], [7, 7, 1, 5]):
        entries = tuple([replace(e, group=3, pieces=n) for e, n in zip(plan.spec.entries, pieces, strict=True)])
        for count in (1, 2):
            with config.scope(num_threads=count):
                grouped = Plan(replace(plan.spec, entries=entries), plan.kernels)
                for _ in range(3):
                    assert all(np.array_equal(out, x + y) for out in grouped.run([x, y]))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
def test_random_programs(eager_to_group, graph):            # the fixture is the same for all examples
    """As plain Python, where the launches of a group run in the opposite order and may not share memory."""
    made = pipeline.build(graph)
    arrays = arrays_for(graph)
    plain = [x.copy() for x in arrays]
    results = PlainPlan(made.spec, made.linked, pieces=2).run(plain)
    native = check(graph, arrays)
    for x, y in zip([*results, *plain], [*native, *arrays], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_memory_is_not_spread_where_nothing_comes_of_it():
    def chain(x, w):
        for _ in range(20):
            x = ops.matmul(x, w)
        return [x], {}

    assert pipeline.build(traced(chain, "f32[64, 64]", "f32[64, 64]")).spec.arena < 6 * 64 * 64 * 4


def chains(*xs):
    """For each operand a chain of products with the last one."""
    outputs = []
    for x in xs[:-1]:
        for _ in range(4):
            x = ops.matmul(x, xs[-1])
        outputs.append(x)
    return outputs, {}


def test_chains_run_side_by_side_where_memory_is_little():
    graph = traced(chains, *["f32[64, 64]"] * 7)
    spec = pipeline.build(graph).spec
    assert len(spec.entries) == 24 and len({entry.group for entry in spec.entries}) == 4
    check(graph, [x / np.float32(8) for x in arrays_for(graph)])        # or products of products become large


def test_peak_memory_does_not_grow_where_it_is_much(monkeypatch):
    graph = traced(chains, *["f32[256, 256]"] * 7)
    arena = pipeline.build(graph).spec.arena
    monkeypatch.setattr("jitgrad.linking.SPREAD", 0)
    assert pipeline.build(graph).spec.arena == arena


def test_a_step_of_an_ensemble_is_that_of_eager(eager_to_group):
    jg.manual_seed(0)
    x, y = jg.randn(16, 8), jg.randn(16, 1)

    def trained(wrap):
        jg.manual_seed(1)
        models = [jg.nn.Sequential(jg.nn.Linear(8, 12), jg.nn.Tanh(), jg.nn.Linear(12, 1)) for _ in range(4)]
        optimizer = jg.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)

        @wrap
        def step(x, y):
            optimizer.zero_grad()
            loss = sum(((model(x) - y) ** 2).mean() for model in models)
            loss.backward()
            optimizer.step()
            return loss

        losses = [step(x, y).item() for _ in range(5)]
        return step, [*losses, *[p.detach().numpy() for model in models for p in model.parameters()]]

    step, found = trained(jg.compile)
    for a, b in zip(found, trained(lambda f: f)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    spec = step.plan.plan.spec
    assert spec.is_grouped and len({entry.group for entry in spec.entries}) < len(spec.entries) / 2
    assert "side by side: " in str(step.plan)


# ---- errors, JSON, times ----------------------------------------------------------------------------------------


def test_an_error_beside_groups_names_its_step_and_stops_before_what_comes_later(eager_to_group):
    def function(x, y, table, index):
        early = [ops.matmul(x, y), ops.matmul(y, x)]
        taken = ops.take(table, index, axis=0)
        return [*early, ops.matmul(taken, x), ops.matmul(taken, y)], {0: ops.neg(x)}

    graph = traced(function, "f32[64, 64]", "f32[64, 64]", "f32[4, 64]", "i64[64]")
    plan = compile_graph(graph)
    assert len({entry.group for entry in plan.spec.entries if entry.group}) == 2
    arrays = arrays_for(graph)
    before = arrays[0].copy()
    arrays[3][9] = 7
    with pytest.raises(OutOfRangeError, match=r"take\w*: index 7 is out of range  \(test_schedule\.py:"):
        plan.run(arrays)
    assert np.array_equal(arrays[0], before)
    arrays[3][9] = 3
    check(graph, arrays)


def test_groups_around_a_host_call(eager_to_group):
    def function(x, y, z):
        return [ops.matmul(x, y), ops.matmul(y, x), ops.exp(z), ops.matmul(x, x), ops.matmul(y, y)], {}

    graph = traced(function, "f32[64, 64]", "f32[64, 64]", "c64[3]")
    plan = compile_graph(graph)
    assert [bool(entry.group) for entry in plan.spec.entries] == [True, True, False, True, True]
    arrays = arrays_for(graph)
    for out, expected in zip(plan.run(arrays), [arrays[0] @ arrays[1], arrays[1] @ arrays[0], np.exp(arrays[2]),
                                                arrays[0] @ arrays[0], arrays[1] @ arrays[1]], strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_groups_survive_json():
    spec = pipeline.build(products()).spec
    assert PlanSpec.from_json(spec.to_json()) == spec and spec.is_grouped


@pytest.mark.parametrize("change", [{"group": -1}, {"pieces": 0}, {"pieces": 1000}, {"group": True}, {"pieces": 1.5}])
def test_json_of_a_bad_group_is_refused(change):
    data = json.loads(pipeline.build(products()).spec.to_json())
    data["entries"][0].update(change)
    with pytest.raises(ValueError):
        PlanSpec.from_json(json.dumps(data))


def test_every_entry_of_a_group_is_timed_by_itself():
    graph = products(function=ops.tanh)
    plan, arrays = compile_graph(graph), arrays_for(graph)
    expected = plan.run(arrays)
    assert len(time_entries(plan, arrays)) == len(plan.spec.entries) == 16
    view = PlanView(graph, plan).time(arrays)
    assert all(step.seconds is not None and step.seconds > 0 for step in view.steps)
    assert "side by side: " in str(view) and " x 16" in str(view)
    assert all(map(np.array_equal, plan.run(arrays), expected))


def test_a_plan_from_the_cache_needs_no_compiler():
    graph = products(function=ops.neg)
    arrays = arrays_for(graph)
    expected = compile_graph(graph).run(arrays)
    clear_plans()
    build.forget()
    compiled = build.compiled
    plan = compile_graph(graph)
    assert all(map(np.array_equal, plan.run(arrays), expected)) and build.compiled == compiled and plan.spec.is_grouped


CONVOLUTIONS = {"by maps": [(1, 32, 12, 12), (32, 32, 3, 3), (1, 64, 8, 8), (48, 64, 3, 3)],
                "tap by tap": [(1, 32, 12, 12), (32, 32, 5, 5), (1, 64, 8, 8), (48, 64, 5, 5)],
                "on planes": [(2, 3, 20, 20), (4, 3, 3, 3), (1, 5, 18, 24), (2, 5, 5, 5)]}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_memory_of_a_threads_own_is_not_that_of_a_kernel_beside_it(name, eager_to_group, monkeypatch):
    monkeypatch.setattr(schedules, "LARGE", 10 ** 9)
    leaves = [jg.tensor(np.random.default_rng(k).standard_normal(shape, np.float32), requires_grad=True)
              for k, shape in enumerate(CONVOLUTIONS[name])]

    def both(x, a, y, b):
        out = [jg.nn.functional.conv2d(image, w, padding=w.shape[-1] // 2).flatten() for image, w in ((x, a), (y, b))]
        return jg.cat(out).detach(), *jg.autograd.grad(jg.cat(out).square().sum(), [x, a, y, b])

    step = jg.compile(both)
    with config.scope(num_threads=1):
        wanted = [t.numpy().copy() for t in step(*leaves)]
    groups = [[turn.private for turn in group if turn.private] for group in step.plan.build.linked.turns]
    assert any(len(group) > 1 for group in groups)
    for group in groups:
        spans = sorted((slot.index, slot.index + slot.nbytes) for private in group for slot in private.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    with config.scope(num_threads=2):
        for _ in range(20):
            assert all(map(np.array_equal, [t.numpy() for t in step(*leaves)], wanted))


def test_phases_of_one_gradient_have_memory_of_their_own(eager_to_group):
    """Those of a stride run side by side."""
    x, w = [np.random.default_rng(k).standard_normal(s, np.float32) for k, s in enumerate([(3, 3, 19, 65), (117, 3, 8, 8)])]
    gradients = []
    for threads in (1, *[2] * 20):
        with config.scope(num_threads=threads):
            image = jg.tensor(x, requires_grad=True)
            jg.nn.functional.conv2d(image, jg.tensor(w), stride=2, padding=(7, 6)).sum().backward()
            gradients.append(image.grad.numpy())
    assert all(np.array_equal(g, gradients[0]) for g in gradients)
