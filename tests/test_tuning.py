"""mode="max-autotune": every candidate of every choice is right, winners are used and remembered, and it is all shown."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from launching import run
from test_conv import case, operands, type_of, volume
from test_gemm import region, transposed

import jitgrad as jg
from jitgrad import __main__ as command, config, nn, ops, plans, tuning
from jitgrad.codegen import blocking, epilogue, library
from jitgrad.codegen.choice import Choice, answering, usual_first
from jitgrad.codegen.convolution import lower_convolution
from jitgrad.codegen.matmul import lower_matmul, lower_update
from jitgrad.codegen.pooled import lower_pool_gradient
from jitgrad.errors import CompileError
from jitgrad.ir import GraphBuilder, TensorType, evaluate
from jitgrad.runtime import cache, native
from jitgrad.runtime.spec import Decision, PlanSpec

RANDOM = np.random.default_rng(0)
SAME = ((1, 1), (1, 1))


def random(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


# ---- a question -------------------------------------------------------------------------------------------------


def test_the_usual_one_without_answers_and_where_an_answer_is_none_of_the_candidates():
    choice = Choice("size", {"small": 1, "large": 2})
    assert choice.take() == 1
    for wanted, expected in (({}, 1), ({"size": "large"}, 2), ({"size": "huge"}, 1), ({"colour": "large"}, 1)):
        with answering(wanted) as answers:
            assert choice.take() == expected
        assert answers.asked == {"size": ["small", "large"]}
    assert choice.take() == 1


def test_parts_of_a_node_ask_the_same_question():
    with answering({"size": "huge"}) as answers:
        assert [Choice("size", {"small": 1}).take(), Choice("size", {"small": 1, "huge": 3}).take()] == [1, 3]
    assert answers.asked == {"size": ["small", "huge"]}


def test_the_usual_one_comes_first_and_equal_ones_once():
    assert usual_first({"a": 1, "b": 2, "c": 1, "d": 3}, 3) == {"d": 3, "a": 1, "b": 2}


# ---- every candidate is right -----------------------------------------------------------------------------------


def every_way(lower):
    """What `lower` makes with each combination of answers, ways that are the same once, and what was asked."""
    with answering({}) as answers:
        ways = {lower(): {}}
    questions = dict(answers.asked)
    pending = [{}]
    while pending:
        given = pending.pop()
        with answering(given) as answers:
            ways.setdefault(lower(), given)
        for question, names in answers.asked.items():
            questions.setdefault(question, names)
        open_question = next((q for q in answers.asked if q not in given), None)
        if open_question is not None:
            pending += [{**given, open_question: name} for name in answers.asked[open_question]]
    return ways, questions


def check_region(function, *arrays, shared=(), limit=None, lower=lower_matmul):
    """Every way of lowering a product with what is around it, against float64; the questions asked."""
    body = region(function, *arrays)
    wide = [a.astype("d") for a in arrays]
    wanted = evaluate(region(function, *wide), wide)
    ways, questions = every_way(lambda: lower(body, shared))
    for lowered in ways:
        got = run(lowered, [a.copy() for a in arrays], [v.type for v in body.outputs], shared=shared)
        for x, y in zip(got, wanted, strict=True):
            tolerance = limit or (1e-11 if x.dtype == np.float64 else 2e-4)
            np.testing.assert_allclose(x.astype("d"), y, rtol=tolerance, atol=tolerance)
    return questions


@pytest.fixture
def all_products(monkeypatch):
    """Questions are asked of small products, too."""
    monkeypatch.setattr(blocking, "WORTH_ASKING", 1)
    monkeypatch.setattr(epilogue, "WORTH_ASKING", 1)


SIZES = [(1, 7, 40), (13, 17, 31), (29, 400, 63), (97, 53, 101), (200, 385, 129), (260, 1030, 34), (64, 300, 513)]


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("left, right", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_every_way_of_a_product(all_products, m, k, n, left, right, dtype):
    a, b = random(*(k, m) if left else (m, k), dtype=dtype), random(*(n, k) if right else (k, n), dtype=dtype)
    check_region(lambda x, y: ops.matmul(transposed(x) if left else x, transposed(y) if right else y), a, b)


def test_all_questions_about_products_are_asked(all_products):
    asked = check_region(lambda x, y: ops.matmul(transposed(x), y), random(800, 64), random(800, 300))
    assert set(asked) == {"block of an item", "left operand", "steps summed at once", "right operand"}
    assert asked["left operand"] == ["in place", "packed"] and asked["right operand"] == ["copied", "packed"]
    assert len(asked["block of an item"]) > 1 and len(asked["steps summed at once"]) > 1


def test_every_way_of_a_batch(all_products):
    check_region(ops.matmul, random(3, 2, 40, 50), random(3, 2, 50, 70))
    check_region(lambda x, y: ops.matmul(x, transposed(y)), random(5, 33, 40), random(5, 65, 40))


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_every_way_of_halves(all_products, dtype):
    import ml_dtypes
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    questions = check_region(ops.matmul, random(150, 90, dtype=kind), random(90, 300, dtype=kind), limit=0.3)
    assert set(questions) == {"block of an item"}


def test_every_way_of_whole_numbers(all_products):
    x, y = [RANDOM.integers(-9, 9, shape).astype(np.int32) for shape in ((70, 40), (40, 90))]
    body = region(ops.matmul, x, y)
    for lowered in every_way(lambda: lower_matmul(body))[0]:
        np.testing.assert_array_equal(run(lowered, [x, y], [v.type for v in body.outputs])[0], x @ y)


def gelu_like(x, w, b):
    return followed(ops.matmul(x, w), b)


def followed(y, b):
    z = ops.add(y, ops.broadcast_to(ops.reshape(b, shape=(1, *b.shape)), shape=y.shape))
    return ops.mul(z, ops.sigmoid(z))


def test_every_way_of_what_follows(all_products):
    operands = random(150, 60), random(60, 200), random(200)
    questions = check_region(gelu_like, *operands)
    assert questions["what follows"] == ["in the same kernel", "in a kernel of its own"]
    check_region(lambda x, w, b: (y := ops.matmul(x, w), followed(y, b)), *operands)
    check_region(lambda x, w, b: ops.reshape(ops.permute(gelu_like(x, w, b), axes=(1, 0)), shape=(50, 600)), *operands)


def test_every_way_of_a_residual_in_place(all_products):
    def function(x, w, r):
        return ops.add(r, ops.tanh(ops.matmul(x, w)))

    check_region(function, random(50, 60), random(60, 70), random(50, 70), shared=((0, 2),))


def test_every_way_of_sums_of_columns(all_products):
    def function(x, w, b):
        y = gelu_like(x, w, b)
        return y, ops.sum(y, axes=(0,))

    questions = check_region(function, random(150, 60), random(60, 200), random(200))
    assert len(questions["block of an item"]) > 2
    assert "what follows" not in questions                      # sums are made block by block


@pytest.mark.parametrize("transpose", (False, True))
def test_every_way_of_an_update(all_products, transpose):
    def function(x, g, p):
        return ops.sub(p, ops.mul(ops.matmul(transposed(x) if transpose else x, g), p))

    operands = random(*((385, 150) if transpose else (150, 385))), random(385, 300), random(150, 300)
    questions = check_region(function, *operands, shared=((0, 2),), lower=lower_update)
    rows, columns = zip(*[name.split(" x ") for name in questions["block of an item"]], strict=True)
    assert len(set(rows)) > 1 and len(set(columns)) == 1 and int(columns[0]) >= 300       # items stay whole rows
    assert "what follows" not in questions


def test_small_products_ask_nothing():
    _, questions = every_way(lambda: lower_matmul(region(ops.matmul, random(20, 20), random(20, 20))))
    assert questions == {}


CONVOLUTIONS = {
    "few channels": case(padding=SAME),
    "sixteen channels": case(images=3, channels=16, height=7, width=9, out=16, padding=SAME),
    "sixteen to thirty-two": case(images=2, channels=16, height=8, width=6, out=32),
    "channels that fill no vector": case(images=3, channels=24, height=6, width=7, out=9, padding=SAME),
    "many channels": case(images=2, channels=32, height=9, width=6, out=48, padding=SAME),
    "strided": case(images=3, channels=32, height=9, width=8, out=48, padding=SAME, stride=(2, 2)),
    "strided, channels that fill no vector": case(channels=10, height=11, width=8, out=19, padding=SAME, stride=(2, 3)),
    "uneven": case(images=2, channels=17, height=10, width=11, out=12, kernel=(2, 3), stride=(3, 1),
                   padding=((0, 1), (2, 1)), dilation=(1, 2)),
    "one by one": case(images=2, channels=32, height=13, width=12, out=40, kernel=(1, 1)),
    "patches": case(images=2, channels=3, height=8, width=12, out=20, kernel=(4, 4), stride=(4, 4)),
    "large kernel": case(images=2, channels=8, height=12, width=9, out=8, kernel=(5, 5), padding=((2, 2), (2, 2))),
    "groups": case(channels=32, out=32, groups=2, padding=SAME),
    "volume": volume(),
}
ALGORITHMS = {"Winograd's maps", "tap by tap", "implicit product"}


def ways_of_convolution(op, inputs, attrs):
    """Every way against float64; the questions asked."""
    types = tuple(type_of(x) for x in inputs)
    wanted = op.eager(*[x.astype("d") for x in inputs], **attrs)
    ways, questions = every_way(lambda: library.lower(op, types, attrs))
    for lowered, pieces in itertools.product(ways, (1, 3)):
        (got,) = run(lowered, list(inputs), op.result_types(types, attrs), pieces=pieces)
        limit = 1e-11 if got.dtype == np.float64 else 5e-4
        np.testing.assert_allclose(got.astype("d"), wanted, rtol=limit, atol=limit)
    return len(ways), questions


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_every_way_of_a_convolution_and_its_gradients(name, dtype):
    shape_x, shape_w, attrs = CONVOLUTIONS[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    found = [ways_of_convolution(ops.convolution, (x, w), attrs),
             ways_of_convolution(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs}),
             ways_of_convolution(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs})]
    expected = {"few channels": (1, 1, 1), "groups": (1, 1, 1), "volume": (1, 1, 1), "many channels": (3, 3, 3),
                "sixteen channels": (3, 3, 3), "sixteen to thirty-two": (3, 3, 3), "strided": (3, 3, 3),
                "one by one": (2, 2, 3), "patches": (1, 1, 2)}.get(name, (2, 2, 2))
    assert tuple(count for count, _ in found) == expected
    if expected == (3, 3, 3):
        assert all(set(questions["algorithm"]) == ALGORITHMS for _, questions in found)


@pytest.mark.parametrize("name", ("sixteen channels", "strided", "few channels", "one by one"))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_every_way_of_what_follows_a_convolution(monkeypatch, name, dtype):
    monkeypatch.setattr(epilogue, "WORTH_ASKING", 1)
    shape_x, shape_w, attrs = CONVOLUTIONS[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)

    def forward(x, w, b):
        y = ops.convolution(x, w, **attrs)
        return y, ops.tanh(ops.add(y, ops.broadcast_to(ops.reshape(b, shape=(1, *b.shape, 1, 1)), shape=y.shape)))

    def backward(g, w, x):
        return ops.mul(x, ops.convolution_input_grad(g, w, input_shape=x.shape, **attrs))

    for function, arrays in ((forward, (x, w, random(shape_w[0], dtype=dtype))), (backward, (g, w, x))):
        body = region(function, *arrays)
        wide = [a.astype("d") for a in arrays]
        wanted = evaluate(region(function, *wide), wide)
        ways, questions = every_way(lambda body=body: lower_convolution(body))
        for lowered in ways:
            for got, expected in zip(run(lowered, list(arrays), [v.type for v in body.outputs]), wanted, strict=True):
                limit = 1e-11 if got.dtype == np.float64 else 5e-4
                np.testing.assert_allclose(got.astype("d"), expected, rtol=limit, atol=limit)
        assert "what follows" in questions


@pytest.mark.parametrize("name", ("sixteen channels", "strided", "few channels"))
def test_every_way_of_pooling_beside_a_convolution(name):
    shape_x, shape_w, attrs = CONVOLUTIONS[name]
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "count_include_pad": False, "divisor": 0,
              "ceil_mode": True}

    def forward(x, w):
        return ops.avg_pool(ops.tanh(ops.convolution(x, w, **attrs)), **window)

    def backward(x, g):
        spread = ops.avg_pool_grad(g, input_shape=shape_g, **window)
        return ops.convolution_weight_grad(x, spread, weight_shape=shape_w, **attrs)

    shape_g = g.shape
    pooled = ops.avg_pool.eager(g, **window)
    for function, arrays, lower in ((forward, (x, w), lower_convolution), (backward, (x, pooled), lower_pool_gradient)):
        body = region(function, *arrays)
        wide = [a.astype("d") for a in arrays]
        (wanted,) = evaluate(region(function, *wide), wide)
        ways, _ = every_way(lambda body=body, lower=lower: lower(body))
        for lowered in ways:
            (got,) = run(lowered, list(arrays), [v.type for v in body.outputs])
            np.testing.assert_allclose(got, wanted, rtol=5e-4, atol=5e-4)


# ---- deciding, by a clock of the tests --------------------------------------------------------------------------


class Clock:
    """Seconds of a candidate by its answers: the usual ways take 1 each, `faster` says what other answers take."""

    def __init__(self, faster=(), disturbed=()):
        self.faster, self.disturbed, self.readings = dict(faster), list(disturbed), 0

    def __call__(self, contender, calls):
        self.readings += 1
        contender.plan.execute()
        seconds = 1.0
        for question, answer in contender.answers.items():
            seconds *= self.faster.get((question, answer), 1.0)
        if self.disturbed and contender.answers:
            self.disturbed.append(self.disturbed.pop(0))
            seconds *= self.disturbed[0]
        return seconds


FASTER = ("what follows", "in a kernel of its own")
ALGORITHM = ("algorithm", "tap by tap")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock for which nothing is faster yet, and a cache of its own."""
    made = Clock()
    monkeypatch.setattr(tuning, "stopwatch", made)
    with config.scope(cache=tmp_path / "cache"):
        plans.clear_plans()
        yield made
    plans.clear_plans()


def product(m=140, k=130, n=150):
    builder = GraphBuilder()
    x, w, b = [builder.input(TensorType(jg.float32, shape)) for shape in ((m, k), (k, n), (n,))]
    with builder:
        return builder.build([gelu_like(x, w, b)])


def inputs_of(graph):
    return [random(*v.shape) for v in graph.inputs]


def check_plan(graph, plan):
    arrays = inputs_of(graph)
    for got, wanted in zip(plan.run([a.copy() for a in arrays]), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def compiled(graph):
    plans.clear_plans()
    return plans.compile_graph(graph, tuned=True)


def test_the_winner_is_used(clock):
    clock.faster = {FASTER: 0.5}
    usual = plans.compile_graph(product())
    plan = compiled(product())
    assert len(usual.spec.entries) + 1 == len(plan.spec.entries)
    (decision,) = plan.spec.choices
    assert decision.answers == (FASTER,) and decision.gain == 2.0 and decision.candidates > 2
    check_plan(product(), plan)


def test_the_best_answers_of_several_questions_are_combined(clock):
    _, questions = every_way(lambda: lower_matmul(region(gelu_like, *inputs_of(product()))))
    block = "block of an item", questions["block of an item"][1]
    clock.faster = {FASTER: 0.5, block: 0.8}
    (decision,) = compiled(product()).spec.choices
    assert set(decision.answers) == {FASTER, block} and decision.gain == pytest.approx(2.5)


def test_the_usual_way_stays_when_nothing_wins_by_more_than_the_margin(clock):
    clock.faster = {FASTER: 0.98}
    plan = compiled(product())
    assert plan.spec.choices[0].answers == () and plan.spec.choices[0].gain == 1.0
    assert plan.spec.entries == plans.compile_graph(product()).spec.entries


def test_a_candidate_that_wins_in_half_of_the_rounds_is_not_taken(clock):
    clock.disturbed = [0.8, 1.2]
    assert compiled(product()).spec.choices[0].answers == ()


def test_what_is_remembered_is_not_measured_again(clock):
    clock.faster = {FASTER: 0.5}
    first = compiled(product())
    clock.readings = 0
    assert compiled(product()).spec == first.spec                       # the plan itself
    remove("plans")
    assert compiled(product()).spec.choices == first.spec.choices       # the decision, for a plan made anew
    assert clock.readings == 0
    remove("plans", "choices")
    compiled(product())
    assert clock.readings > 0


def remove(*kinds):
    store = cache.current()
    for entry in store.entries():
        if entry.kind in kinds:
            os.unlink(store.folder / entry.kind / entry.key[:2] / entry.key[2:])


def test_equal_steps_of_other_programs_share_a_decision(clock):
    compiled(product())
    clock.readings = 0
    builder = GraphBuilder()
    x, w, b = [builder.input(TensorType(jg.float32, shape)) for shape in ((140, 130), (130, 150), (150,))]
    with builder:
        graph = builder.build([gelu_like(x, w, b), ops.sum(b, axes=(0,))])
    assert len(compiled(graph).spec.choices) == 1 and clock.readings == 0


@pytest.mark.parametrize("other", ("processor", "threads"))
def test_another_machine_measures_anew(clock, monkeypatch, other):
    compiled(product())
    clock.readings, clock.faster = 0, {FASTER: 0.5}
    if other == "processor":
        monkeypatch.setattr(native, "host_name", lambda: "another processor")
    with config.scope(num_threads=7 if other == "threads" else None):
        assert compiled(product()).spec.choices[0].answers == (FASTER,)
    assert clock.readings > 0


@pytest.mark.parametrize("content", (b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"key": 1}',
                                     b'{"key": "k", "title": "t", "answers": {"a": 1}, "gain": 1.0, "candidates": 1, '
                                     b'"seconds": 1.0}'))
def test_a_damaged_entry_is_a_miss(clock, content, capsys):
    first = compiled(product())
    remove("plans")
    (entry,) = [e for e in cache.current().entries() if e.kind == "choices"]
    cache.current().put("choices", entry.key, content)                  # the checksum is right, the content is not
    command.list_entries()
    assert "damaged" in capsys.readouterr().out
    clock.readings = 0
    assert compiled(product()).spec.entries == first.spec.entries and clock.readings > 0


def test_an_entry_with_half_of_its_bytes_is_a_miss(clock):
    compiled(product())
    remove("plans")
    (path,) = (cache.current().folder / "choices").glob("*/*")
    path.write_bytes(path.read_bytes()[:40])
    clock.readings = 0
    compiled(product())
    assert clock.readings > 0


def test_answers_that_are_no_candidates_are_as_good_as_none(clock):
    usual = compiled(product())
    remove("plans")
    decision = usual.spec.choices[0]
    stored = Decision(decision.key, "from elsewhere", (("colour", "red"), ("left operand", "on tape")), 9.0, 1, 1.0)
    cache.current().put("choices", tuning.machine_key(decision.key), json.dumps(stored.to_data()).encode())
    plan = compiled(product())
    assert plan.spec.choices == (stored,) and plan.spec.entries == usual.spec.entries
    check_plan(product(), plan)


def test_a_plan_with_its_choices_is_stored_and_read(clock):
    clock.faster = {FASTER: 0.5}
    spec = compiled(product()).spec
    assert PlanSpec.from_json(spec.to_json()) == spec and spec.choices
    for wrong in ({"choices": 1}, {"choices": [{}]}, {"choices": [{**spec.choices[0].to_data(), "gain": "much"}]}):
        with pytest.raises(ValueError, match="not a"):
            PlanSpec.from_json(json.dumps({**json.loads(spec.to_json()), **wrong}))


def test_when_there_is_no_time_the_usual_way_is_used_and_the_next_time_measures(clock, monkeypatch):
    monkeypatch.setattr(tuning, "ALL_SECONDS", 0.0)
    plan = compiled(product())
    assert plan.spec.choices == () and clock.readings == 0
    assert plan.spec.entries == plans.compile_graph(product()).spec.entries
    monkeypatch.setattr(tuning, "ALL_SECONDS", 60.0)
    assert len(compiled(product()).spec.choices) == 1 and clock.readings > 0


def test_other_modes_measure_nothing(clock):
    plan = plans.compile_graph(product())
    assert plan.spec.choices == () and clock.readings == 0


def test_what_is_updated_in_place_is_measured_in_place(clock):
    clock.faster = {FASTER: 0.5}
    builder = GraphBuilder()
    x, w, r = [builder.input(TensorType(jg.float32, shape)) for shape in ((140, 130), (130, 150), (140, 150))]
    with builder:
        graph = builder.build([], [(2, ops.add(r, ops.tanh(ops.matmul(x, w))))])
    plan = compiled(graph)
    assert plan.spec.choices[0].answers == (FASTER,)
    arrays = inputs_of(graph)
    (wanted,) = evaluate(graph, [a.copy() for a in arrays])
    plan.run(arrays)
    np.testing.assert_allclose(arrays[2], wanted, rtol=2e-4, atol=2e-4)


def test_a_step_that_fails_on_made_up_operands_stays_as_it_is(clock):
    """Integers are divided by what is zero in the memory that is measured, but not in the user's."""
    builder = GraphBuilder()
    x, w, c = [builder.input(TensorType(jg.int32, shape)) for shape in ((140, 130), (130, 150), (140, 150))]
    with builder:
        one = ops.full((140, 150), 1, jg.int32)
        graph = builder.build([ops.floor_divide(ops.matmul(x, w), ops.sub(c, one))])
    plan = compiled(graph)
    assert [d.answers for d in plan.spec.choices] == [()]
    arrays = [np.full(v.shape, 3, np.int32) for v in graph.inputs]
    np.testing.assert_array_equal(plan.run(arrays)[0], 9 * 130 // 2)


def test_the_clock_measures_time():
    """The real one: a step that does more takes longer."""
    def contender(n):
        builder = GraphBuilder()
        x = builder.input(TensorType(jg.float32, (n,)))
        with builder:
            graph = builder.build([ops.exp(x)])
        plan = plans.compile_graph(graph)
        memory = [np.zeros(n, np.float32), np.zeros(n, np.float32)]
        plan.pointers[:] = [a.ctypes.data for a in memory]
        return tuning.Contender({}, plan), memory

    small, large = contender(1000), contender(4_000_000)
    assert min(tuning.stopwatch(small[0], 3) for _ in range(5)) < min(tuning.stopwatch(large[0], 3) for _ in range(5))


# ---- what users do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
def test_modes(clock, mode):
    @jg.compile(mode=mode)
    def function(x, w):
        return jg.relu(x @ w)

    x, w = jg.randn(140, 130), jg.randn(130, 150)
    np.testing.assert_allclose(function(x, w).numpy(), np.maximum(x.numpy() @ w.numpy(), 0), rtol=1e-4, atol=1e-4)
    assert (clock.readings > 0) == mode.startswith("max-autotune")
    assert bool(function.plan.choices) == mode.startswith("max-autotune")


def test_a_wrong_mode_is_an_error_that_names_the_modes():
    with pytest.raises(CompileError, match="mode='fastest'; the modes are default, reduce-overhead, max-autotune"):
        jg.compile(lambda x: x, mode="fastest")


def test_a_training_step(clock):
    """A module, a step around it, its gradients: the same as without measuring."""
    clock.faster = {ALGORITHM: 0.5, FASTER: 0.5}
    losses = []
    for mode in ("default", "max-autotune"):
        jg.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                              nn.Flatten(), nn.Linear(32 * 64, 64), nn.GELU(), nn.Linear(64, 10))
        optimizer = jg.optim.SGD(model.parameters(), lr=0.05)
        x, y = jg.randn(32, 3, 8, 8), jg.randint(0, 10, (32,))

        @jg.compile(mode=mode)
        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        losses.append([step(x, y).item() for _ in range(6)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    chosen = [d for d in step.plan.choices if d.answers]
    assert any(ALGORITHM in d.answers for d in chosen) and any(FASTER in d.answers for d in chosen)


def test_a_module(clock):
    clock.faster = {FASTER: 0.5}
    model = nn.Sequential(nn.Linear(130, 150), nn.ReLU())
    fast = jg.compile(model, mode="max-autotune")
    x = jg.randn(140, 130)
    np.testing.assert_allclose(fast(x).detach().numpy(), model(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert "in a kernel of its own" in str(fast.explain())


def test_explain_and_the_receipt_show_what_was_measured(clock):
    clock.faster = {FASTER: 0.5}

    @jg.compile(mode="max-autotune")
    def function(x, w):
        return jg.relu(x @ w)

    x, w = jg.randn(140, 130), jg.randn(130, 150)
    function(x, w)
    text = str(function.explain())
    assert "measured: 1 kinds of steps" in text and "1 not as usual" in text
    assert "matmul(f32[140, 130], f32[130, 150]): what follows: in a kernel of its own; 2.00 times as fast" in text
    (step,) = function.plan.steps
    assert len(step.kernels) == len(function.plan.plan.spec.entries) == 2         # those that run, not the usual ones
    receipt = str(jg.compare(function, x, w, seconds=0.01))
    assert "in a kernel of its own; 2.00 times as fast" in receipt
    plain = jg.compile(lambda x, w: jg.relu(x @ w))
    plain(x, w)
    assert "measured" not in str(plain.explain(times=False))


def test_the_cache_command_lists_and_clears_choices(clock, capsys):
    clock.faster = {FASTER: 0.5}
    compiled(product())
    command.main(["cache", "list"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("choices")]
    assert "matmul(f32[140, 130], f32[130, 150], f32[150]): what follows: in a kernel of its own" in line
    command.main(["cache", "size"])
    assert any(line.split()[:2] == ["choices", "1"] for line in capsys.readouterr().out.splitlines())
    command.main(["cache", "clear"])
    assert cache.current().entries() == []


PROCESS = """
import sys
import jitgrad as jg
from jitgrad import tuning
from jitgrad.runtime import build

readings = 0

def stopwatch(contender, calls):
    global readings
    readings += 1
    return 0.5 if "in a kernel of its own" in contender.answers.values() else 1.0

tuning.stopwatch = stopwatch

@jg.compile(mode="max-autotune")
def function(x, w):
    return jg.relu(x @ w)

function(jg.ones(140, 130), jg.ones(130, 150))
print(readings > 0, build.compiled > 0, "numba" in sys.modules, len(function.statistics.compilations[0].plan.spec.entries))
"""


def process(folder):
    return subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "JITGRAD_CACHE": str(folder)})


def test_a_second_process_neither_measures_nor_compiles(tmp_path):
    """Two that measure at once do not disturb each other; the one after them has nothing to do."""
    both = [process(tmp_path / "cache") for _ in range(2)]
    assert [p.communicate(timeout=120)[0].split()[-1] for p in both] == ["2", "2"]
    assert [p.returncode for p in both] == [0, 0]
    assert process(tmp_path / "cache").communicate(timeout=120)[0].split() == ["False", "False", "False", "2"]
    shutil.rmtree(tmp_path / "cache" / "plans")
    again = process(tmp_path / "cache").communicate(timeout=120)[0].split()
    assert again[:2] == ["False", "False"] and again[-1] == "2"         # a plan made anew, of what was decided
