"""Recurrent layers on a GPU, on the PTX interpreter against float64: all ways to launch their steps, sizes that are
multiples of nothing, sequences of 16-bit floats, and the machine code."""

import re
from functools import cache

import numpy as np
import pytest
from cuda_launching import lower_node, run
from gpu_programs import tensor
from ptx import PtxError, sass

import jitgrad as jg
from jitgrad import nn
from jitgrad.codegen import cuda_recurrence, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.dtypes import bfloat16, float16, float32, float64
from jitgrad.ir import REGISTRY, GraphBuilder, TensorType
from jitgrad.nn import functional as F
from jitgrad.ops.recurrence import GATES, _kept, _operands

KINDS = ("rnn", "lstm", "gru")
TOLERANCE = {"f64": 1e-12, "f32": 1e-5, "bf16": 3e-2, "f16": 4e-3}


def attributes(kind, relu=False):
    return {"relu": relu} if kind == "rnn" else {}


def types(name, dtype, t, b, h):
    """Of the operands of an op."""
    kind = name.removesuffix("_grad")
    shapes = _operands(kind, t, b, h)
    if name != kind:
        shapes = [(t, b, h)] * (2 if kind == "lstm" else 1) + shapes + _kept(kind, t, b, h)
    return tuple([TensorType(dtype, shape) for shape in shapes])


def arrays(name, dtype, t, b, h, relu=False):
    """Operands of the op; what a gradient reads of the forward op follows from the others."""
    kind, generator = name.removesuffix("_grad"), np.random.default_rng(t + b + h)
    given = [generator.uniform(-1, 1, s) for s in _operands(kind, t, b, h)]
    given[1] /= np.sqrt(h)
    given = [x.astype(dtype.numpy) for x in given]
    if name == kind:
        return given
    made = REGISTRY[kind].eager(*given, **attributes(kind, relu))
    incoming = [generator.uniform(-1, 1, (t, b, h)).astype(dtype.numpy) for _ in range(2 if kind == "lstm" else 1)]
    return [*incoming, *given, *(made if isinstance(made, tuple) else (made,))]


def node(name, dtype, t, b, h, relu=False):
    builder = GraphBuilder(name)
    made = builder.run(REGISTRY[name], tuple([builder.input(x) for x in types(name, dtype, t, b, h)]),
                       attributes(name.removesuffix("_grad"), relu))
    return builder.build(list(made) if isinstance(made, tuple) else [made]).nodes[0]


def check(name, dtype, t, b, h, schedule="together", relu=False, aligned=True):
    """Results within `TOLERANCE` of what NumPy makes in float64 of the same operands; the number of launches."""
    one, given = node(name, dtype, t, b, h, relu), arrays(name, dtype, t, b, h, relu)
    lowered = lower_node(one, (), aligned)
    found = run(lowered, given, [v.type for v in one.outputs], schedule=schedule, skew=0 if aligned else 1)
    wanted = one.op.eager(*[x.astype(np.float64) for x in given], **one.attrs)
    for x, y in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert x.dtype == dtype.numpy
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=TOLERANCE[dtype.short] * max(1, np.abs(y).max()))
    return len(lowered.launches)


# ---- one launch for all steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "schedule"), [
    ("rnn", "random"), ("lstm", "reversed"), ("gru", "random"), ("rnn_grad", "reversed"), ("lstm_grad", "random"),
    ("gru_grad", "reversed")])
def test_small_layers_are_one_launch(name, schedule):
    """Several tiles of units in turn, several steps, blocks with few rows; and the launch that packs the weights."""
    assert check(name, float32, 2, 5, 37, schedule) == 2


@pytest.mark.parametrize(("name", "dtype"), [("lstm", float16), ("gru_grad", bfloat16), ("lstm_grad", float64)])
def test_other_floats(name, dtype):
    check(name, dtype, 2, 5, 37, "random")


def test_relu_backwards():
    check("rnn_grad", float32, 2, 5, 37, relu=True)


@pytest.mark.parametrize("name", ["lstm", "gru_grad"])
def test_states_of_16_bits_do_not_drift(name):
    """Over many steps: what is carried unit by unit is kept in float32."""
    check(name, bfloat16, 16, 3, 5)


# ---- a launch for each step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "schedule"), [("lstm", "random"), ("rnn_grad", "reversed"), ("gru_grad", "random")])
def test_larger_layers_are_a_launch_per_step(name, schedule, monkeypatch):
    """With a low bound on what is small. Backward there is one more, for the gradients of the first states."""
    monkeypatch.setattr(cuda_recurrence, "CACHED", 0)
    batch = 9 if name in ("lstm", "rnn_grad") else 3
    assert check(name, float32, 2, batch, 37, schedule) == (4 if name.endswith("_grad") else 3)


def test_a_depth_of_several_pieces():
    """More states than are in shared memory at once, and several tiles of units of a lane each."""
    assert check("rnn_grad", float32, 2, 2, 290) == 4
    assert check("lstm_grad", bfloat16, 2, 2, 66, "random") == 2


# ---- products apart ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [
    ("rnn", float16), ("lstm", bfloat16), ("lstm_grad", bfloat16), ("gru_grad", bfloat16)])
def test_large_products_are_kernels_of_their_own(name, dtype, monkeypatch):
    monkeypatch.setattr(cuda_recurrence, "APART", 1)
    assert check(name, dtype, 2, 9, 37, "random") == (5 if name.endswith("_grad") else 4)


def test_large_products_of_float32(monkeypatch):
    monkeypatch.setattr(cuda_recurrence, "MULTIPROCESSORS", 1)
    assert check("gru_grad", float32, 2, 9, 37, aligned=False) == 5


# ---- which way, and the text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype", "sizes", "launches", "grid"), [
    ("lstm", float32, (50, 64, 64), 2, 16), ("lstm", float32, (50, 2048, 64), 2, 256),
    ("gru_grad", float32, (50, 64, 64), 2, 16),
    ("lstm", float32, (50, 64, 512), 51, 8 * 16), ("lstm_grad", float32, (50, 64, 512), 52, 8 * 16),
    ("lstm_grad", float32, (50, 512, 512), 52, 64 * 4), ("lstm", bfloat16, (50, 64, 1024), 100, 8 * 32)])
def test_sizes_decide(name, dtype, sizes, launches, grid):
    lowered = lower_cuda(REGISTRY[name], types(name, dtype, *sizes), {})
    assert len(lowered.launches) == launches
    assert lowered.launches[-1].grid == grid


def test_a_new_shape_gives_the_same_text():
    texts = [{launch.source for launch in lower_cuda(REGISTRY["lstm"], types("lstm", float32, *sizes), {}).launches}
             for sizes in ((50, 64, 512), (7, 99, 333))]
    assert texts[0] == texts[1] and len(texts[0]) == 2


@pytest.mark.parametrize("number", range(4))
def test_no_barrier_can_be_spared(number):
    """Each of them left out is a race, or memory that was never written, and found."""
    one = node("lstm", float32, 2, 3, 37)
    lowered = lower_node(one)
    launch = lowered.launches[1]
    places = [m.start() for m in re.finditer(r"\bbarrier\(\)", launch.source)]
    assert len(places) == 4
    broken = launch.source[:places[number]] + "pass" + launch.source[places[number] + len("barrier()"):]
    object.__setattr__(launch, "source", broken)
    with pytest.raises(PtxError):
        run(lowered, arrays("lstm", float32, 2, 3, 37), [v.type for v in one.outputs], schedule="random")


# ---- machine code --------------------------------------------------------------------------------------------------


@cache
def steps_source(name, dtype, sizes):
    return lower_cuda(REGISTRY[name], types(name, dtype, *sizes), attributes(name.removesuffix("_grad"))).launches[1].source


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "name", "dtype", "sizes", "reads"), [
    ("sm_80", "lstm", float32, (9, 64, 512), "LDG.E.128.CONSTANT"),
    ("sm_90", "lstm_grad", float32, (9, 512, 512), "LDG.E.128"),
    ("sm_100", "gru", bfloat16, (9, 64, 512), "LDG.E.64.CONSTANT")])
def test_machine_code(architecture, name, dtype, sizes, reads):
    """Nothing is spilled, and two blocks fit a multiprocessor; weights and states are read in wide accesses."""
    cubin = toolchain.link([compile_ptx(steps_source(name, dtype, sizes), architecture)], architecture)
    sass.assert_no_spills(cubin)
    ((kernel, used),) = cubin.kernels.items()
    assert used.registers <= 128 and used.shared <= 48 << 10
    listing = toolchain.disassemble(cubin)[kernel]
    sass.assert_no_double(listing)
    codes = sass.opcodes(listing)
    columns = 4 if name.endswith("_grad") else GATES[name]
    assert codes["LDS.128"] == 8 and codes["FFMA"] >= 4 * 8 * columns
    assert sum(count for code, count in codes.items() if code.startswith(reads)) == 4


# ---- from end to end -----------------------------------------------------------------------------------------------


def training_step(device, steps=2):
    """Losses and parameters of an LSTM that classifies pooled sequences, compiled; and the step."""
    jg.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 6), "head": nn.Linear(6, 3)}).to(device)
    optimizer = jg.optim.SGD(model.parameters(), lr=0.1)

    @jg.compile
    def step(x, t):
        optimizer.zero_grad()
        pooled = F.avg_pool1d(F.max_pool1d(x, 3, 2, 1), 2)
        loss = F.cross_entropy(model["head"](model["lstm"](pooled.permute(2, 0, 1))[0][-1]), t)
        loss.backward()
        optimizer.step()
        return loss

    losses = [step(tensor(device, 3, 4, 12, seed=k), (jg.arange(3) % 3).to(device)) for k in range(steps)]
    return [*losses, *model.parameters()], step


def test_a_training_step_leaves_none_of_this_to_the_computer(executing):
    """An LSTM behind pooling layers, forward and backward."""
    ours, step = training_step("cuda")
    theirs, _ = training_step("cpu")
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.detach().cpu().numpy(), y.detach().numpy(), rtol=1e-4, atol=1e-5)
    names = {entry.name for entry in step.plan.plan.spec.entries if not entry.threads}
    assert not names & {"lstm", "lstm_grad", "max_pool", "max_pool_grad", "avg_pool", "avg_pool_grad", "matmul"}, names
    assert {"lstm_steps_4x1_f32", "lstm_grad_steps_4x1_f32"} <= set(executing.launches)
