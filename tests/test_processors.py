"""Kernels for other processors than this machine's: the micro-kernels' machine code for all that have a name, and, where
this machine can run them, what programs compute."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import llvmlite.binding as llvm
import numpy as np
import pytest

from jitgrad import config, processors
from jitgrad.codegen import native
from jitgrad.errors import CompileError
from jitgrad.kernels.cpu import attention, gemm, gemm_pack, tile, tile_lines, tile_text
from jitgrad.kernels.cpu.tile_text import MicroKernel

EVERY = tuple(processors.NAMED)


@pytest.fixture
def processor(request, monkeypatch):
    """A processor by name, in the place of this machine's."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = processors.find(request.param)
    try:
        llvm.Target.from_triple(found.triple)
    except RuntimeError:
        pytest.skip(f"this LLVM does not know {found.machine}")
    monkeypatch.setattr(config, "_process", replace(config.current(), cpu=request.param))
    tile_for = tile.tile_for.__wrapped__
    for module in (tile, gemm):
        monkeypatch.setattr(module, "tile_for", tile_for)
    return found


each = pytest.mark.parametrize("processor", EVERY, indirect=True)


# --- the settings -------------------------------------------------------------------------------------------------------


def test_a_processor_is_chosen_by_the_environment_alone():
    assert config.from_environment({"JITGRAD_CPU": "x86-64-v3"}).cpu == "x86-64-v3"
    assert config.from_environment({"JITGRAD_CPU": ""}).cpu is None
    with pytest.raises(ValueError, match="JITGRAD_CPU cannot be '486'"):
        config.from_environment({"JITGRAD_CPU": "486"})
    with pytest.raises(TypeError, match="the same for the whole process"), config.scope(cpu="x86-64"):
        pass
    with pytest.raises(CompileError, match="'486' is not one of x86-64"):
        native.named_target("486")


def test_each_has_keys_of_its_own():
    names = {processors.find(name).name for name in (None, *EVERY)}
    assert len(names) == len(EVERY) + 1


@each
def test_sums_and_factors_of_a_tile_fit_into_the_registers(processor):
    bits, registers = processor.vectors
    for size in (4, 8):
        shape = tile.tile_for(size)
        assert shape.lanes * size * 8 == bits
        assert shape.rows * shape.vectors + shape.vectors + 1 <= registers
        assert shape.rows >= (12 if registers == 32 else 6)
        for rows in range(1, tile_lines.HIGHEST + 1):
            lines = tile_lines.lines_at_once(rows, registers)
            assert rows * lines + lines + 1 <= registers


@each
def test_a_block_of_attention_fits_into_its_buffers(processor):
    for element, size in (("f32", 4), ("f64", 8)):
        keys = attention.block_of_keys(element)
        for rows in [attention.block_of_queries(element, n, causal) for n in (keys, 2 * keys) for causal in (False, True)]:
            assert rows <= attention.MOST
            assert rows * (keys + attention.SPARE + attention.MORE) <= tile.PANEL_BYTES // size


# --- machine code -------------------------------------------------------------------------------------------------------


def machine_code(name):
    """The assembly text of a piece of `tile_text`."""
    target = native.host_target()
    machine = native._machine(target)
    module = llvm.parse_assembly(tile_text.definitions([name]))
    module.triple, module.data_layout = target.triple, str(machine.target_data)
    return machine.emit_assembly(module)


def loops(text):
    """The instructions of each loop: from a label to a jump back to it."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    for i, line in enumerate(lines):
        jump = re.match(r"(?:j\w+|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if jump and places.get(jump[1], i) < i:
            yield lines[places[jump[1]] + 1:i]


MULTIPLY = re.compile(r"v?(fmla|fmadd\d*p[sd]|mulp[sd])\b|vfmadd231p[sd]")
SPILLED = re.compile(r"mm\d+.*\(%rsp|\(%rsp.*, %[xyz]mm|^(ldr|str|ldp|stp|ldur|stur)\s+[qds]\d.*\[sp")


def micro_kernels(size):
    """All of the processor's for elements of `size` bytes."""
    for shape in (tile.tile_for(size), tile.low_tile_for(size)):
        for vectors, edge, heights in shape.forms:
            for rows in heights:
                for layout in shape.layouts if rows >= tile.HIGH else ("",):
                    for placed, ahead in ((False, False), (True, False), *[(False, True)] * (layout != "" and not edge)):
                        yield MicroKernel(rows, vectors, shape.lanes, 8 * size, edge, layout, placed, ahead)


@each
def test_loops_of_micro_kernels_multiply_and_spill_nothing(processor):
    for kernel in [*micro_kernels(4), *micro_kernels(8)]:
        found = list(loops(machine_code(kernel.name)))
        assert len(found) == (2 if kernel.adjacent else 1), kernel
        for body, steps in zip(found, (tile_text.UNROLLED, 1)[-len(found):], strict=True):
            assert sum(bool(MULTIPLY.match(line)) for line in body) == steps * kernel.rows * kernel.vectors, kernel
            assert not [line for line in body if SPILLED.search(line)], kernel


@each
def test_fused_multiply_adds_are_used_where_there_are_some(processor):
    shape = tile.tile_for(4)
    (body,) = loops(machine_code(MicroKernel(4, 2, shape.lanes, 32, "").name))
    text = "\n".join(body)
    if processor.machine == "aarch64":
        assert re.search(r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[0\]", text)      # by an element of a register
    else:
        assert ("vfmadd" in text) == ("fma" in processor.features) and ("mulps" in text) != ("vfmadd" in text)


@each
def test_cores_and_packing_compile(processor):
    for text in (gemm.source("f32"), gemm_pack.pack_source("f32", "depth")):
        data = native.compile_source(text, text[4:text.index("(")], native.host_target())
        assert data[:4] == b"\x7fELF"


# --- results ------------------------------------------------------------------------------------------------------------

PROGRAMS = """
import sys
import numpy as np
import jitgrad as jg
from jitgrad import nn
from jitgrad.nn import functional as F

given = np.load(sys.argv[1])
found = {}

def products(a, b):
    return F.softmax(a @ b, -1)

def images(x, w):
    return F.conv2d(x, w, padding=1, stride=2)

def heads(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

for function, names in ((products, "ab"), (images, "xw"), (heads, "qkv")):
    @jg.compile
    def step(*leaves):
        out = function(*leaves)
        (out * out).sum().backward()
        return out.detach()

    leaves = [jg.tensor(given[name]).requires_grad_() for name in names]
    found[function.__name__] = step(*leaves).numpy()
    for name, tensor in zip(names, leaves):
        found["grad_" + name] = tensor.grad.numpy()

lstm = nn.LSTM(given["s"].shape[2], 5)
with jg.no_grad():
    for name, parameter in lstm.named_parameters():
        parameter.copy_(jg.tensor(given[name]))
    found["lstm"] = jg.compile(lambda s: lstm(s)[0])(jg.tensor(given["s"])).numpy()
    found["row"] = F.linear(jg.tensor(given["a"][:2]).half(), jg.tensor(given["b"].T.copy()).half()).float().numpy()
np.savez(sys.argv[2], **found)
"""


def given():
    random = np.random.default_rng(0).standard_normal
    shapes = {"a": (23, 37), "b": (37, 29), "x": (2, 3, 11, 9), "w": (5, 3, 3, 3), "q": (2, 9, 7), "k": (2, 9, 7),
              "v": (2, 9, 7), "s": (4, 3, 6), "weight_ih_l0": (20, 6), "weight_hh_l0": (20, 5), "bias_ih_l0": (20,),
              "bias_hh_l0": (20,)}
    return {name: random(shape).astype("f") for name, shape in shapes.items()}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected(values):
    """(results, functions whose squares are summed up, by the names of what they read), all in float64."""
    g = {name: value.astype("d") for name, value in values.items()}

    def products(a, b):
        return softmax(a @ b)

    def images(x, w):
        wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))[:, :, ::2, ::2]
        return np.einsum("nchwij,ocij->nohw", windows, w)

    def heads(q, k, v):
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        return softmax(np.where(np.tri(q.shape[1]) > 0, scores, -np.inf)) @ v

    h, c, states = np.zeros((3, 5)), np.zeros((3, 5)), []
    for x in g["s"]:
        gates = x @ g["weight_ih_l0"].T + h @ g["weight_hh_l0"].T + g["bias_ih_l0"] + g["bias_hh_l0"]
        i, f, o = [1 / (1 + np.exp(-part)) for part in (gates[:, :5], gates[:, 5:10], gates[:, 15:])]
        c = f * c + i * np.tanh(gates[:, 10:15])
        h = o * np.tanh(c)
        states.append(h)
    functions = {"ab": products, "xw": images, "qkv": heads}
    results = {f.__name__: f(*[g[name] for name in names]) for names, f in functions.items()}
    return {**results, "lstm": np.stack(states), "row": g["a"][:2] @ g["b"]}, functions


def slope(function, names, name, direction, step=1e-6):
    """The derivative of the sum of squares along a direction of one operand."""
    def total(shift):
        moved = {k: GIVEN[k].astype("d") + (shift * direction if k == name else 0) for k in names}
        return (function(*moved.values()) ** 2).sum()
    return (total(step) - total(-step)) / (2 * step)


GIVEN = given()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a processor of the x86-64 family")
@pytest.mark.parametrize("name", ("x86-64-v3", "x86-64"))
def test_results_with_avx2_and_with_sse2(name, tmp_path):
    if not processors.find(name).features <= processors.find(None).features:
        pytest.skip(f"this processor cannot run code for {name}")
    np.savez(tmp_path / "given.npz", **GIVEN)
    environment = {**os.environ, "JITGRAD_CPU": name, "JITGRAD_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", PROGRAMS, "given.npz", "found.npz"], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = np.load(tmp_path / "found.npz")
    results, functions = expected(GIVEN)
    for key, value in results.items():
        np.testing.assert_allclose(found[key], value, atol=5e-2 if key == "row" else 2e-5, rtol=1e-5)
    random = np.random.default_rng(1)
    for names, function in functions.items():
        for operand in names:
            direction = random.standard_normal(GIVEN[operand].shape)
            want = slope(function, names, operand, direction)
            np.testing.assert_allclose((found[f"grad_{operand}"] * direction).sum(), want, rtol=1e-3, atol=1e-3)
