"""Attention that a user writes out becomes the primitive when it is compiled: which forms do, which are left alone, and
that nothing changes but rounding."""

import math

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F
from jitgrad.ir import evaluate
from jitgrad.transforms.attention import recognize_attention

INF = float("inf")


def data(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def tensors(length=37, source=51, width=8, values=12, batch=(2, 3)):
    shapes = (*batch, length, width), (*batch, source, width), (*batch, source, values)
    return [jg.tensor(data(*shape, seed=n), requires_grad=True) for n, shape in enumerate(shapes)]


def visible(length=37, source=51):
    seen = np.random.default_rng(9).random((length, source)) < 0.7
    seen[:, 0] = True
    return jg.tensor(seen)


def own_softmax(x):
    raised = (x - x.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def merged(x):
    return x.reshape(6, *x.shape[-2:])


SEEN = visible()
BIAS = jg.tensor(data(3, 37, 51, seed=5))
RUN = jg.tensor(data(2, 1, 1, 51, seed=6))

FORMS = {
    "method": lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
    "scaled": lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) * 0.3, dim=-1) @ v,
    "divided": lambda q, k, v: jg.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v,
    "query scaled": lambda q, k, v: jg.matmul(((q * 0.3) @ k.swapaxes(2, 3)).softmax(3), v),
    "number first": lambda q, k, v: (0.3 * (q @ k.mT)).softmax(-1) @ v,
    "mask added": lambda q, k, v: (q @ k.mT * 0.3 + BIAS).softmax(-1) @ v,
    "mask added first": lambda q, k, v: ((RUN + q @ k.mT) * 0.3).softmax(-1) @ v,
    "two masks": lambda q, k, v: (q @ k.mT + BIAS + RUN).softmax(-1) @ v,
    "filled": lambda q, k, v: (q @ k.mT).masked_fill(SEEN == 0, -INF).softmax(-1) @ v,
    "filled and added": lambda q, k, v: ((q @ k.mT).masked_fill(~SEEN, -INF) / 2 + BIAS).softmax(-1) @ v,
    "added and filled": lambda q, k, v: (q @ k.mT / 2 + BIAS).masked_fill(~SEEN[None, None], -INF).softmax(-1) @ v,
    "where": lambda q, k, v: jg.where(SEEN, q @ k.mT * 0.3, -INF).softmax(-1) @ v,
    "where, full": lambda q, k, v: jg.where(~SEEN, jg.full((37, 51), -INF), q @ k.mT).softmax(-1) @ v,
    "causal": lambda q, k, v: (q @ k.mT).masked_fill(jg.ones(37, 51).tril() == 0, -INF).softmax(-1) @ v,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT * 0.3).softmax(-1), 0.3) @ v,
    "mask and dropout": lambda q, k, v: F.dropout((q @ k.mT * 0.3 + BIAS).softmax(-1), 0.3) @ v,
    "in place": lambda q, k, v: (q @ k.mT).mul_(0.3).add_(BIAS).softmax(-1) @ v,
    "own softmax": lambda q, k, v: own_softmax(q @ k.mT * 0.3) @ v,
    "sizes printed": lambda q, k, v: len(str((q @ k.mT).shape)) and (q @ k.mT).softmax(-1) @ v,
    "mask subtracted": lambda q, k, v: (q @ k.mT * 0.3 - BIAS).softmax(-1) @ v,
    "heads in one dimension": lambda q, k, v: jg.bmm((merged(q) @ merged(k).mT * 0.3).softmax(-1), merged(v)),
    "mask where heads are apart": lambda q, k, v: F.dropout((jg.bmm(merged(q), merged(k).mT).view(2, 3, 37, 51) + BIAS)
                                                            .view(6, 37, 51).softmax(-1), 0.3) @ merged(v),
    "einsum": lambda q, k, v: jg.einsum("bhqk,bhkd->bhqd", jg.einsum("bhqd,bhkd->bhqk", q, k).mul(0.3).softmax(-1), v),
    "einsum, heads behind": lambda q, k, v: jg.einsum("bhls,bshd->blhd", jg.softmax(jg.einsum(
        "blhd,bshd->bhls", q.transpose(1, 2), k.transpose(1, 2)) / 3, -1), v.transpose(1, 2)),
    "keys turned before": lambda q, k, v: (q @ k.permute(0, 1, 3, 2).contiguous() * 0.3).softmax(-1) @ v,
}


def gradients(function, xs):
    """A step that gives what `function` gives, and the gradients of its operands."""
    def step(*xs):
        out = function(*xs)
        return out, *jg.autograd.grad((out * out.cos()).sum(), xs)

    return step


def results(function, xs, seed=3):
    jg.manual_seed(seed)
    return [t.numpy(force=True) for t in function(*xs)]


def close(mine, others):
    for a, b in zip(mine, others, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def kernels(compiled):
    return [kernel.name for kernel in compiled.kernels if kernel.name.startswith("attention")]


def nodes(compiled, stage):
    """The nodes of its latest plan after a pass."""
    (graph,) = [s.graph for s in compiled.plan.stages if s.name == stage]
    return graph.nodes


def largest(compiled):
    """Elements of the largest value that a kernel writes."""
    return max(v.type.size for node in nodes(compiled, "fuse") for v in node.outputs)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form):
    xs, step = tensors(), gradients(form, tensors())
    compiled = jg.compile(step)
    close(results(compiled, xs), results(step, xs))
    assert kernels(compiled) == ["attention_f32", "attention_dots_f32", "attention_grad_f32"]
    if form is not FORMS["two masks"]:                  # whose sum is as large as the scores
        assert largest(compiled) <= 3 * 37 * 51
    alone = jg.compile(lambda *xs: (form(*xs),))
    with jg.no_grad():
        close(results(alone, xs), results(lambda *xs: (form(*xs),), xs))
    assert kernels(alone) == ["attention_f32"]


DRAWN = np.random.default_rng(5)
RAGGED = [tuple(int(n) for n in DRAWN.integers(1, (3, 4, 200, 200, 70, 70))) for _ in range(6)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("sizes", RAGGED, ids=map(str, RAGGED))
def test_ragged_sizes(sizes, dtype):
    n, heads, length, source, width, values = sizes
    shapes = [(n, heads, length, width), (n, heads, source, width), (n, heads, source, values)]
    xs = [jg.tensor(data(*shape, seed=k, dtype=dtype), requires_grad=True) for k, shape in enumerate(shapes)]

    def form(q, k, v):
        scores = (q @ k.mT / math.sqrt(width)).masked_fill(~jg.ones(length, source, dtype=jg.bool).tril(), -INF)
        return F.dropout(scores.softmax(-1), 0.2) @ v

    compiled = jg.compile(gradients(form, xs))
    tolerance = 2e-4 if dtype is np.float32 else 1e-11
    for a, b in zip(results(compiled, xs), results(gradients(form, xs), xs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert len(kernels(compiled)) == 3


@pytest.mark.parametrize("batch", [(), (4,), (2, 1, 3)], ids=["matrices", "batch", "five dimensions"])
def test_any_number_of_dimensions(batch):
    xs = tensors(batch=batch)
    compiled = jg.compile(gradients(FORMS["scaled"], xs))
    close(results(compiled, xs), results(gradients(FORMS["scaled"], xs), xs))
    assert len(kernels(compiled)) == 3


def test_query_key_and_value_in_one():
    """Their gradients arrive at one tensor, each by a path of its own."""
    x = jg.tensor(data(3, 40, 8), requires_grad=True)

    def step(x):
        out = (x @ x.mT * 0.2).softmax(-1) @ x
        return out, jg.autograd.grad((out * out).sum(), x)[0]

    compiled = jg.compile(step)
    close(results(compiled, [x]), results(step, [x]))
    assert len(kernels(compiled)) == 3


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_gradients(wanted):
    def step(*xs):
        out = F.dropout((xs[0] @ xs[1].mT * 0.3 + BIAS).softmax(-1), 0.1) @ xs[2]
        return out, *jg.autograd.grad((out * out).sum(), [xs[k] for k in wanted])

    xs = [x if k in wanted else x.detach() for k, x in enumerate(tensors())]
    compiled = jg.compile(step)
    close(results(compiled, xs), results(step, xs))
    assert len(kernels(compiled)) == 3


def test_two_backward_passes_and_two_layers():
    def step(q, k, v):
        first = (q @ k.mT * 0.3).softmax(-1) @ v
        second = (first @ k.mT[..., :8, :] * 0.3).softmax(-1) @ v
        mine = jg.autograd.grad(second.sum(), (q, k, v), retain_graph=True)
        return *mine, *jg.autograd.grad((first * second).sum(), (q, k, v))

    xs = tensors(values=8)
    compiled = jg.compile(step)
    close(results(compiled, xs), results(step, xs))
    assert kernels(compiled).count("attention_f32") == 1 and largest(compiled) < 2 * 3 * 37 * 51 / 2
    names = [node.op.name for node in nodes(compiled, "attention")]
    assert names.count("attention") == 2 and names.count("attention_grad") == 4


def test_a_training_step():
    """A block as users write it, with parameters, buffers, dropout by the mode of the module, and an optimizer."""
    class Block(jg.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.out = jg.nn.Linear(16, 48), jg.nn.Linear(16, 16)
            self.dropout = jg.nn.Dropout(0.1)
            self.register_buffer("seen", jg.ones(64, 64).tril().view(1, 1, 64, 64))

        def forward(self, x):
            n, t, width = x.shape
            q, k, v = [y.view(n, t, 4, width // 4).transpose(1, 2) for y in self.project(x).split(width, dim=2)]
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.seen[:, :, :t, :t] == 0, -INF)
            y = self.dropout(F.softmax(scores, dim=-1)) @ v
            return self.out(y.transpose(1, 2).contiguous().view(n, t, width))

    def train(use):
        jg.manual_seed(1)
        block = Block()
        optimizer = jg.optim.SGD(block.parameters(), lr=0.1)

        def step(x):
            optimizer.zero_grad()
            loss = (block(x) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss

        run = use(step)
        losses = [float(run(jg.tensor(data(2, 50, 16, seed=n)))) for n in range(4)]
        return [np.array(losses), *[p.detach().numpy() for p in block.parameters()]], run

    mine, compiled = train(jg.compile)
    close(mine, train(lambda step: step)[0])
    assert len(kernels(compiled)) == 3


def test_against_torch():
    torch = pytest.importorskip("torch")
    arrays = [t.numpy(force=True) for t in tensors()]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    scores = (theirs[0] @ theirs[1].transpose(-2, -1) / math.sqrt(8)).masked_fill(torch.tensor(~SEEN.numpy()), -INF)
    out = scores.softmax(-1) @ theirs[2]
    expected = [t.detach().numpy() for t in (out, *torch.autograd.grad((out * out.cos()).sum(), theirs))]
    form = lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(~SEEN, -INF).softmax(-1) @ v
    close(results(jg.compile(gradients(form, arrays)), tensors()), expected)


def test_the_gradient_is_that_of_the_definition():
    """In float64, along a random direction."""
    arrays = [data(2, 5, 3, seed=n, dtype=np.float64) for n in range(3)]
    directions = [data(2, 5, 3, seed=9 + n, dtype=np.float64) for n in range(3)]
    xs = [jg.tensor(a, requires_grad=True) for a in arrays]
    form = lambda q, k, v: F.dropout((q @ k.mT / 2).masked_fill(jg.ones(5, 5).triu(1) == 1, -INF).softmax(-1), 0.4) @ v
    compiled = jg.compile(gradients(form, xs))
    _, *slopes = results(compiled, xs)
    assert len(kernels(compiled)) == 3

    def total(amount):
        jg.manual_seed(3)
        out = form(*[jg.tensor(a + amount * d) for a, d in zip(arrays, directions, strict=True)])
        return float((out * out.cos()).sum())

    step = 1e-6
    along = sum(float((s * d).sum()) for s, d in zip(slopes, directions, strict=True))
    assert along == pytest.approx((total(step) - total(-step)) / (2 * step), rel=1e-6)


def test_memory_grows_as_the_length():
    peaks = []
    for length in (256, 512, 1024):
        def form(q, k, v):
            scores = (q @ k.mT * 0.3).masked_fill(~jg.ones(length, length, dtype=jg.bool).tril(), -INF)  # noqa: B023
            return F.dropout(scores.softmax(-1), 0.1) @ v

        xs = tensors(length, length)
        compiled = jg.compile(gradients(form, xs))
        compiled(*xs)
        peaks.append(compiled.plan.memory.peak)
        assert largest(compiled) < 2 * 3 * length * 20
    assert peaks[2] < 2.1 * peaks[1] < 4.2 * peaks[0]


def test_threads_change_no_bit():
    xs = tensors()
    compiled = jg.compile(gradients(FORMS["mask and dropout"], xs))
    found = []
    for count in (1, 2):
        with jg.config.scope(num_threads=count):
            found.append(results(compiled, xs))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_query_that_sees_nothing_is_nan_as_in_eager():
    seen = visible()
    seen[3] = False
    form = lambda q, k, v: (q @ k.mT).masked_fill(~seen, -INF).softmax(-1) @ v
    compiled = jg.compile(form)
    with jg.no_grad():
        found, expected = compiled(*tensors()), form(*tensors())
    assert kernels(compiled) and found[..., 3, :].isnan().all()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_hidden_may_be_anything():
    q, k, v = [t.detach() for t in tensors()]
    k[:, :, 7] = math.nan
    seen = visible()
    seen[:, 7] = False
    form = lambda q, k, v: jg.where(seen, q @ k.mT, -INF).softmax(-1) @ v
    compiled = jg.compile(form)
    close([compiled(q, k, v).numpy()], [form(q, k, v).numpy()])
    assert kernels(compiled) and not form(q, k, v).isnan().any()


def test_gradients_that_cross_the_edge_of_a_compiled_call():
    """The backward pass outside of the compiled function: the edge differentiates the primitive."""
    xs = tensors()
    compiled = jg.compile(FORMS["own softmax"])
    close(results(gradients(compiled, xs), xs), results(gradients(FORMS["own softmax"], xs), xs))
    assert kernels(compiled) == ["attention_f32", "attention_dots_f32", "attention_grad_f32"]


# ---- left alone --------------------------------------------------------------------------------------------------------


def half(x):
    return x.to(jg.bfloat16)


TEMPERATURE = jg.tensor(0.7, requires_grad=True)
LEARNED = jg.tensor(data(37, 51, seed=8), requires_grad=True)


def with_weights(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum()


def with_scores(q, k, v):
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v + scores.amax()


def with_entropy(q, k, v):
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v + scores.logsumexp(-1, keepdim=True)


def twice(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ (v * 2)


ALONE = {
    "weights used": with_weights, "scores used": with_scores, "denominators used": with_entropy, "weights twice": twice,
    "centered": lambda q, k, v: (lambda x: (x - x.mean(-1, keepdim=True)).softmax(-1))(q @ k.mT) @ v,
    "rows of other lengths": lambda q, k, v: (q @ k.mT).view(2, 3, 51, 37).softmax(-1).view(2, 3, 37, 51) @ v,
    "masks before and after heads are merged": lambda q, k, v: (((q @ k.mT + BIAS).view(6, 37, 51) + BIAS[0]).softmax(-1)
                                                               @ merged(v)),
    "another dimension": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "a finite fill": lambda q, k, v: (q @ k.mT).masked_fill(~SEEN, -1e9).softmax(-1) @ v,
    "the other infinity": lambda q, k, v: (q @ k.mT).masked_fill(~SEEN, -INF).neg().relu().clamp(0, 1).softmax(-1) @ v,
    "a function of scores": lambda q, k, v: (q @ k.mT).tanh().softmax(-1) @ v,
    "a factor for each key": lambda q, k, v: (q @ k.mT * RUN).softmax(-1) @ v,
    "dropout of scores": lambda q, k, v: F.dropout(q @ k.mT, 0.2).softmax(-1) @ v,
    "dropout of rows": lambda q, k, v: F.dropout2d((q @ k.mT).softmax(-1), 0.4) @ v,
    "weights masked": lambda q, k, v: jg.where(SEEN, (q @ k.mT).softmax(-1), 0.0) @ v,
    "no maximum": lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True))((q @ k.mT * 0.1).exp()) @ v,
    "another maximum": lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True))(
        (q @ k.mT - (q @ k.mT).amin(-1, keepdim=True)).exp()) @ v,
    "a larger sum": lambda q, k, v: (lambda e: e / (1 + e.sum(-1, keepdim=True)))(
        (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()) @ v,
    "half precision": lambda q, k, v: ((half(q) @ half(k).mT).softmax(-1) @ half(v)).float(),
    "a learned temperature": lambda q, k, v: (q @ k.mT * TEMPERATURE).softmax(-1) @ v,
    "a learned mask": lambda q, k, v: (q @ k.mT + LEARNED).softmax(-1) @ v,
}


@pytest.mark.parametrize("form", ALONE.values(), ids=ALONE)
def test_left_alone(form):
    learned = TEMPERATURE, LEARNED

    def step(*xs):
        out = form(*xs)
        found = jg.autograd.grad((out * out.cos()).sum(), (*xs, *learned), allow_unused=True)
        return out, *[g for g in found if g is not None]

    xs = tensors()
    compiled = jg.compile(step)
    tolerance = {ALONE["half precision"]: 5e-2, with_weights: 1e-3}.get(form, 2e-4)      # a sum of weights: rounding errors
    for a, b in zip(results(compiled, xs), results(step, xs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
    assert kernels(compiled) == []


def test_gradients_of_higher_order_are_left_alone():
    xs = tensors(9, 11)

    def step(*xs):
        out = FORMS["scaled"](*xs)
        first = jg.autograd.grad((out * out).sum(), xs, create_graph=True)
        return jg.autograd.grad(sum((g * g).sum() for g in first), xs)

    close(results(jg.compile(step), xs), results(step, xs))


def test_a_long_chain_takes_no_time():
    """The mask is looked through for a product only once, however often it is added to itself."""
    def form(q, k, v):
        mask = BIAS
        for _ in range(60):
            mask = mask + mask
        return (mask * 2.0 ** -60 + q @ k.mT).softmax(-1) @ v

    xs = tensors()
    compiled = jg.compile(form)
    with jg.no_grad():
        close([compiled(*xs).numpy()], [form(*xs).numpy()])
    assert kernels(compiled) == ["attention_f32"]


# ---- how it shows ------------------------------------------------------------------------------------------------------


def test_the_pass_is_printed_under_its_name():
    xs = tensors()
    compiled = jg.compile(gradients(FORMS["scaled"], xs))
    compiled(*xs)
    stages = {stage.name: stage.graph for stage in compiled.plan.stages}
    names = [node.op.name for node in stages["attention"].nodes]
    assert "attention" in names and "attention_grad" in names and "matmul" not in names
    assert "after attention" in str(compiled.plan.print_stages()) and "attention_f32" in str(compiled.explain(times=False))
    graph = stages["trace"]
    arrays = [np.random.default_rng(k).standard_normal(v.shape).astype(np.float32) for k, v in enumerate(graph.inputs)]
    close(evaluate(recognize_attention(graph), arrays), evaluate(graph, arrays))
    assert recognize_attention(stages["attention"]) is stages["attention"]


# ---- which masks are the causal one ------------------------------------------------------------------------------------

T, S = 6, 9
ROW, COLUMN = "jg.arange(T)[:, None]", "jg.arange(S)[None, :]"
CONDITIONS = [
    "jg.ones(T, S).tril()", "jg.ones(T, S, dtype=jg.bool).tril()", "1 - jg.ones(T, S).triu(1)", "jg.ones(T, S).tril(1)",
    "jg.ones(T, S).triu()", "jg.ones(T, S).triu(1)", "jg.ones(T, S).tril(-1)", "1 - jg.ones(T, S).tril()",
    f"{ROW} >= {COLUMN}", f"{COLUMN} <= {ROW}", f"{COLUMN} > {ROW}", f"~({COLUMN} > {ROW})", f"{ROW} > {COLUMN}",
    f"{ROW} + 1 > {COLUMN}", f"{ROW} - {COLUMN} >= 0", f"{COLUMN} - {ROW} < 1", f"{ROW} == {COLUMN}", f"{ROW} != {COLUMN}",
    f"{ROW} >= 2 * {COLUMN}", f"{ROW} >= {COLUMN} % 7", "jg.arange(S)[None, :].expand(T, S) < 4", "jg.ones(T, S)",
    "jg.arange(S)[None, :] <= jg.arange(0, 2 * T, 2)[:, None]", "jg.ones(S, T).triu().T", "jg.ones(S, S).tril()[:T]",
    "jg.ones(S, S).tril()[1:T + 1]", "jg.ones(T, S).tril() * 3", "jg.ones(T, S).tril()[None]",
    f"({ROW} >= {COLUMN}) & ({COLUMN} >= 0)", f"({ROW} >= {COLUMN}) & ({COLUMN} >= 2)",
]


@pytest.mark.parametrize("way", ["filled", "chosen", "added"])
@pytest.mark.parametrize("text", CONDITIONS)
def test_the_causal_mask_is_known_by_what_it_is(text, way):
    """Causal attention wherever the mask is the lower triangle, and only there."""
    seen = eval(text).bool().numpy().reshape(T, S)
    q, k, v = tensors(T, S)

    def form(q, k, v):
        visible, scores = eval(text), q @ k.mT
        if way == "filled":
            scores = scores.masked_fill(visible == 0, -INF)
        elif way == "chosen":
            scores = jg.where(visible.bool(), scores, -INF)
        else:
            scores = scores + jg.where(visible == 0, -INF, 0.0)
        return scores.softmax(-1) @ v

    compiled = jg.compile(form)
    with jg.no_grad():
        np.testing.assert_allclose(compiled(q, k, v).numpy(), form(q, k, v).numpy(), rtol=1e-4, atol=1e-5)
    (attention,) = [node for node in nodes(compiled, "attention") if node.op.name == "attention"]
    lower = bool(np.array_equal(seen, np.tri(T, S, dtype=bool)))
    if text == CONDITIONS[-2]:                            # two planes: right, but not known
        assert lower and not attention.attrs["causal"]
    else:
        assert attention.attrs["causal"] is lower
    assert len(attention.inputs) == (3 if attention.attrs["causal"] else 4)
