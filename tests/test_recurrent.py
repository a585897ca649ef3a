"""Recurrent layers: against their formulas step by step, gradients to second order, packed sequences, compiled steps."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, nn, ops
from jitgrad.functional import recurrent
from jitgrad.inspect import PlanView
from jitgrad.ir import GraphBuilder, evaluate, parse_type
from jitgrad.ir.op import REGISTRY
from jitgrad.nn.utils import rnn as packing
from jitgrad.ops.recurrence import GATES
from jitgrad.plans import clear_plans, compile_graph

KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {}), ("LSTM", {"proj_size": 3})]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False},
           {"num_layers": 3, "dropout": 0.5}]


def data(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_cells(layer, x, states):
    """The layer with its cells, written out: x[steps, batch, inputs] as a list of steps."""
    kind = layer.mode[:3]
    finals = []
    for k in range(layer.num_layers):
        outs = []
        for direction in range(layer.num_directions):
            suffix = f"_l{k}" + "_reverse" * direction
            weights = [getattr(layer, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            h, *c = [s[k * layer.num_directions + direction] for s in states]
            steps = []
            for x_t in x[::-1] if direction else x:
                if kind == "LST":
                    h, c = recurrent.lstm_cell(x_t, h, c[0], *weights)
                    c = [c]
                    if layer.proj_size:
                        h = h @ getattr(layer, "weight_hr" + suffix).T
                elif kind == "GRU":
                    h = recurrent.gru_cell(x_t, h, *weights)
                else:
                    h = recurrent.rnn_cell(x_t, h, *weights, layer.mode[4:].lower())
                steps.append(h)
            outs.append(steps[::-1] if direction else steps)
            finals.append([h, *c])
        x = [jg.cat(parts, -1) for parts in zip(*outs, strict=True)]
    return jg.stack(x), [jg.stack(f) for f in zip(*finals, strict=True)]


def outputs(result):
    out, hidden = result
    return [out, *(hidden if isinstance(hidden, tuple) else (hidden,))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name, extra", KINDS, ids=str)
def test_a_layer_is_its_cells(name, extra, options):
    jg.manual_seed(0)
    layer = getattr(nn, name)(5, 7, **extra, **options).eval()
    first = data(4, 6, 5) if layer.batch_first else data(6, 4, 5)
    x = jg.tensor(first, requires_grad=True)
    count, width = layer.num_layers * layer.num_directions, layer.proj_size or 7
    states = [jg.tensor(data(count, 4, width, seed=1), requires_grad=True)]
    if name == "LSTM":
        states.append(jg.tensor(data(count, 4, 7, seed=2), requires_grad=True))
    found = outputs(layer(x, tuple(states) if name == "LSTM" else states[0]))
    steps = x.transpose(0, 1) if layer.batch_first else x
    out, finals = by_cells(layer, list(steps.unbind(0)), states)
    wanted = [out.transpose(0, 1) if layer.batch_first else out, *finals]
    wrt = [x, *states, *layer.parameters()]
    gradients = [jg.autograd.grad(sum((o * o.cos()).sum() for o in results), wrt) for results in (found, wanted)]
    for a, b in zip(found + list(gradients[0]), wanted + list(gradients[1]), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-4, atol=2e-5)


FUNCTIONS = {
    "rnn": lambda x, w, h: [jg.ops.rnn(x, w, h, relu=False)],
    "lstm": lambda x, w, h, c: list(jg.ops.lstm(x, w, h, c)[:2]),
    "gru": lambda x, w, b, h: [jg.ops.gru(x, w, b, h)[0]],
}


@pytest.mark.parametrize("batch", [1, 3, 9, 17])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_kernels_of_several_panels_are_the_formulas(kind, batch):
    """Items of one, two, four and eight sequences; the last panel of weights is not full, and every other step begins with
    it."""
    steps, hidden, gates, attrs = 3, 75, GATES[kind], {"relu": False} if kind == "rnn" else {}
    shapes = [(steps, batch, gates * hidden), (gates * hidden, hidden), *[(gates * hidden,)] * (kind == "gru"),
              *[(batch, hidden)] * (2 if kind == "lstm" else 1)]
    xs = [data(*shape, seed=k) * (0.1 if k == 1 else 1) for k, shape in enumerate(shapes)]
    incoming = [data(steps, batch, hidden, seed=9 + k) for k in range(2 if kind == "lstm" else 1)]
    kept = REGISTRY[kind].eager(*xs, **attrs)
    kept = kept if isinstance(kept, tuple) else (kept,)
    for name, operands in ((kind, xs), (f"{kind}_grad", [*incoming, *xs, *kept])):
        op = REGISTRY[name]
        found = jg.compile(lambda *tensors, op=op: op(*tensors, **attrs))(*[jg.tensor(x) for x in operands])
        wanted = op.eager(*[x.astype(np.float64) for x in operands], **attrs)
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
        for a, b in pairs:
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("way", ["native", "plain"])
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradients_add_up_those_of_gates(kind, batch, way):
    """The gradients of biases come from the same kernel, and the gradient of an LSTM's cells may be one number."""
    steps, hidden, attrs = 5, 19, {"relu": False} if kind == "rnn" else {}
    builder = GraphBuilder("sums")

    def operand(*shape):
        return builder.input(parse_type(f"f32{list(shape)}"))

    gates, w = operand(steps, batch, GATES[kind] * hidden), operand(GATES[kind] * hidden, hidden)
    more = [operand(GATES[kind] * hidden)] * (kind == "gru") + [operand(batch, hidden) for _ in range(1 + (kind == "lstm"))]
    incoming = [operand(steps, batch, hidden)]
    with builder:
        if kind == "lstm":
            incoming.append(ops.full_like(incoming[0], 0.25))
        made = getattr(ops, kind)(gates, w, *more, **attrs)
        made = made if isinstance(made, tuple) else (made,)
        found = getattr(ops, f"{kind}_grad")(*incoming, gates, w, *more, *made, **attrs)
        sums = [ops.sum(ops.reshape(x, shape=(steps * batch, x.shape[2])), axes=(0,)) for x in found if len(x.shape) == 3]
    graph = builder.build([*found, *sums])
    arrays = [data(*v.shape, seed=k) * (0.1 if v is w else 1) for k, v in enumerate(graph.inputs)]
    results = []
    for threads in (1, 2):
        clear_plans()
        with config.scope(num_threads=threads, plain=way == "plain"):
            plan = compile_graph(graph)
            results.append(plan.run(arrays))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(results[0], evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    nodes = PlanView(graph, plan).build.stages[-1].graph.nodes
    assert [n.attrs["template"] for n in nodes if n.op.name == "region"] == ["recurrence"]


def test_gates_are_not_kept_for_their_gradient():
    """What the gradient reads of them is their type: gates, what is kept of them and their gradients are one memory."""
    steps, batch, hidden = 8, 16, 64
    builder = GraphBuilder("memory")
    shapes = [steps * batch, 8], [8, 4 * hidden], [4 * hidden, hidden], [batch, hidden], [steps, batch, hidden]
    x, w, u, h0, dh = [builder.input(parse_type(f"f32{shape}")) for shape in shapes]
    with builder:
        gates = ops.reshape(ops.matmul(x, w), shape=(steps, batch, 4 * hidden))
        kept = ops.lstm(gates, u, h0, h0)
        d_gates, *_ = ops.lstm_grad(dh, ops.zeros_like(dh), gates, u, h0, h0, *kept)
        flat = ops.reshape(d_gates, shape=(steps * batch, 4 * hidden))
        graph = builder.build([ops.matmul(ops.permute(x, axes=(1, 0)), flat)])
    arrays = [data(*v.shape, seed=k) * (0.1 if v is u else 1) for k, v in enumerate(graph.inputs)]
    plan = compile_graph(graph)
    np.testing.assert_allclose(plan.run(arrays)[0], evaluate(graph, arrays)[0], rtol=1e-4, atol=1e-3)
    gates_size = steps * batch * 4 * hidden * 4
    assert plan.spec.arena < 2 * gates_size + steps * batch * hidden * 4


@pytest.mark.parametrize("way", ["native", "plain"])
@pytest.mark.parametrize("batch", [9])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_what_is_needed_afterwards_is_not_overwritten(kind, needed, batch, way):
    """Gates, what the gradient reads (of an RNN its incoming gradient) and the gradients of gates are one memory only where
    nobody reads the first ones any more. Results are the same to the last bit."""
    steps, hidden, attrs = 4, 21, {"relu": False} if kind == "rnn" else {}
    count = GATES[kind]
    shapes = [steps, batch, count * hidden], [count * hidden, hidden], [batch, hidden], [steps, batch, hidden]

    def program(needed):
        builder = GraphBuilder("overwritten")
        x, w, state, seed = [builder.input(parse_type(f"f32{list(shape)}")) for shape in shapes]
        with builder:
            gates, dh = ops.tanh(x), ops.tanh(seed)
            states = [state] * (2 if kind == "lstm" else 1)
            made = getattr(ops, kind)(gates, w, *states, **attrs)
            made = made if isinstance(made, tuple) else (made,)
            incoming = [dh, seed] if kind == "lstm" else [dh]
            d_gates, *_ = getattr(ops, f"{kind}_grad")(*incoming, gates, w, *states, *made, **attrs)
            candidates = [gates, made[-1] if kind == "lstm" else dh, d_gates]
            late = [ops.flip(candidates[k], axes=(0,)) for k in needed]
            return builder.build([ops.neg(d_gates), *late])

    arrays = [data(*shape, seed=k) * (0.2 if k == 1 else 1) for k, shape in enumerate(shapes)]
    with config.scope(plain=way == "plain"):
        alone, *_ = compile_graph(program(())).run(arrays)
        plan = compile_graph(program(needed))
        found = plan.run(arrays)
    np.testing.assert_array_equal(found[0], alone)
    for a, b in zip(found, evaluate(program(needed), arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradients_to_second_order(kind):
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    shapes = [(3, 2, gates * 2), (gates * 2, 2), *([(gates * 2,)] if kind == "gru" else []), (2, 2)]
    shapes += [(2, 2)] * (kind == "lstm")
    xs = [data(*shape, seed=k, dtype=np.float64) for k, shape in enumerate(shapes)]
    directions = [data(*shape, seed=9 + k, dtype=np.float64) for k, shape in enumerate(shapes)]

    def value(*arrays):
        return float(sum((o * o.cos()).sum() for o in FUNCTIONS[kind](*[jg.tensor(a) for a in arrays])))

    def slope(*arrays):
        tensors = [jg.tensor(a, requires_grad=True) for a in arrays]
        total = sum((o * o.cos()).sum() for o in FUNCTIONS[kind](*tensors))
        found = jg.autograd.grad(total, tensors, create_graph=True)
        return tensors, sum((g * jg.tensor(d)).sum() for g, d in zip(found, directions, strict=True))

    def moved(amount):
        return [x + amount * d for x, d in zip(xs, directions, strict=True)]

    step = 1e-5
    tensors, along = slope(*xs)
    assert float(along) == pytest.approx((value(*moved(step)) - value(*moved(-step))) / (2 * step), rel=1e-6)
    second = jg.autograd.grad(along, tensors)
    curvature = sum(float((g * jg.tensor(d)).sum()) for g, d in zip(second, directions, strict=True))
    difference = (float(slope(*moved(step))[1]) - float(slope(*moved(-step))[1])) / (2 * step)
    assert curvature == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("name, extra", KINDS, ids=str)
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
def test_packed_sequences_are_each_sequence_by_itself(name, extra, order):
    jg.manual_seed(1)
    layer = getattr(nn, name)(5, 7, num_layers=2, bidirectional=True, **extra)
    lengths = [6, 4, 4, 1] if order == "sorted" else [3, 6, 1, 4]
    sequences = [jg.tensor(data(n, 5, seed=n + k), requires_grad=True) for k, n in enumerate(lengths)]
    packed = packing.pack_sequence(sequences, enforce_sorted=order == "sorted")
    out, hidden = layer(packed)
    padded, found_lengths = packing.pad_packed_sequence(out, batch_first=True)
    assert found_lengths.tolist() == lengths
    finals = list(hidden) if isinstance(hidden, tuple) else [hidden]
    together = jg.autograd.grad((padded * padded.cos()).sum() + sum(f.square().sum() for f in finals), sequences)
    for k, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
        alone = outputs(layer(sequence))
        np.testing.assert_allclose(padded[k, :n].detach().numpy(), alone[0].detach().numpy(), rtol=1e-4, atol=1e-5)
        assert not padded[k, n:].any()
        for one, other in zip(alone[1:], finals, strict=True):
            np.testing.assert_allclose(other[:, k].detach().numpy(), one.detach().numpy(), rtol=1e-4, atol=1e-5)
        total = (alone[0] * alone[0].cos()).sum() + sum(f.square().sum() for f in alone[1:])
        (gradient,) = jg.autograd.grad(total, sequence)
        np.testing.assert_allclose(together[k].numpy(), gradient.numpy(), rtol=1e-4, atol=1e-5)


def test_packing_and_padding():
    sequences = [jg.arange(3.0), jg.arange(5.0), jg.arange(1.0)]
    padded = packing.pad_sequence(sequences, batch_first=True, padding_value=-1.0)
    np.testing.assert_array_equal(padded.numpy(), [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4], [0, -1, -1, -1, -1]])
    left = packing.pad_sequence(sequences, padding_side="left")
    np.testing.assert_array_equal(left.numpy().T, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]])
    packed = packing.pack_padded_sequence(padded, [3, 5, 1], batch_first=True, enforce_sorted=False)
    np.testing.assert_array_equal(packed.data.numpy(), [0, 0, 0, 1, 1, 2, 2, 3, 4])
    assert packed.batch_sizes.tolist() == [3, 2, 2, 1, 1]
    assert packed.sorted_indices.tolist() == [1, 0, 2] and packed.unsorted_indices.tolist() == [1, 0, 2]
    again, lengths = packing.pad_packed_sequence(packed, batch_first=True, padding_value=-1.0, total_length=6)
    np.testing.assert_array_equal(again[:, :5].numpy(), padded.numpy())
    assert lengths.tolist() == [3, 5, 1] and (again[:, 5] == -1).all()
    for one, other in zip(packing.unpack_sequence(packed), sequences, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("make, message", [
    (lambda: nn.LSTM(5, 0), "at least 1"), (lambda: nn.GRU(5, 4, dropout=2.0), "between 0 and 1"),
    (lambda: nn.LSTM(5, 4, proj_size=4), "proj_size"), (lambda: nn.RNN(5, 4, nonlinearity="sin"), "nonlinearity"),
    (lambda: nn.LSTM(5, 4)(jg.zeros(3, 2, 6)), "input_size=5"), (lambda: nn.LSTM(5, 4)(jg.zeros(5)), "LSTM"),
    (lambda: nn.GRU(5, 4, batch_first=True)(jg.zeros(2, 0, 5)), "no steps"),
    (lambda: nn.GRU(5, 4)(jg.zeros(3, 2, 5), jg.zeros(1, 3, 4)), "the state must be"),
    (lambda: nn.GRUCell(5, 4)(jg.zeros(2, 6)), "GRUCell"),
    (lambda: packing.pack_padded_sequence(jg.zeros(4, 2, 1), [2, 3]), "enforce_sorted"),
    (lambda: packing.pack_padded_sequence(jg.zeros(4, 2, 1), [5, 3]), "between 1 and 4"),
    (lambda: jg.ops.lstm(jg.zeros(3, 2, 8), jg.zeros(8, 3), jg.zeros(2, 2), jg.zeros(2, 2)), "do not fit")])
def test_what_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name, extra", KINDS, ids=str)
def test_a_compiled_training_step(name, extra):
    """Sealed, the same as eager, for a batch that is no multiple of anything, and another length without a compile."""
    models = []
    for _ in range(2):
        jg.manual_seed(0)
        models.append(getattr(nn, name)(6, 9, **extra))

    def make(model):
        optimizer = jg.optim.Adam(model.parameters(), lr=0.01)

        def step(x):
            optimizer.zero_grad()
            loss = model(x)[0].square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return step

    eager, compiled = make(models[0]), jg.compile(make(models[1]))
    for call in range(6):
        x = jg.tensor(data(5, 19, 6, seed=call))
        np.testing.assert_allclose(compiled(x).detach().numpy(), eager(x).detach().numpy(), rtol=1e-4)
    assert compiled.statistics.sealed_calls >= 3, compiled.statistics.replayed_because
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        np.testing.assert_allclose(b.detach().numpy(), a.detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [jg.bfloat16, jg.float16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_half_precision_is_that_of_float32_rounded(kind, dtype):
    """All steps in one kernel, there as well; only what is multiplied with the input is rounded before."""
    half = getattr(nn, kind)(6, 9, num_layers=2, bidirectional=True).to(dtype)
    single = getattr(nn, kind)(6, 9, num_layers=2, bidirectional=True)
    single.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})

    def step(layer, x):
        out, _ = layer(x)
        return out, *jg.autograd.grad(out.float().square().sum(), list(layer.parameters()))

    x = jg.tensor(data(7, 5, 6)).to(dtype)
    compiled = jg.compile(lambda x: step(half, x))
    unit = 2.0 ** (-10 if dtype is jg.float16 else -7)
    wanted = [t.numpy(force=True) for t in step(single, x.float())]
    for found in (compiled(x), step(half, x)):
        for mine, exact in zip(found, wanted, strict=True):
            assert mine.dtype is dtype
            assert np.abs(mine.float().numpy(force=True) - exact).max() < 6 * unit * np.abs(exact).max()
    if x.is_cpu:
        names = {kernel.name.replace("_in_place", "").replace("_number", "") for kernel in compiled.kernels}
        assert {f"{kind.lower()}_f32", f"{kind.lower()}_grad_f32"} <= names
