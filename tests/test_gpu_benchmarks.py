"""The benchmarks of a GPU, in tiny sizes on the stand-in, with PyTorch on the CPU where it is installed: that cases run,
that results are compared, and that a case that fails or ends its process stops no other. ``--gpu-samples`` runs every
case."""

import importlib
import importlib.util
import json
import sys
import time

import numpy as np
import pytest
from cuda_executing import Executing
from ptx import sass

import jitgrad as jg
from benchmarks import command, gpu
from benchmarks.contenders import equal_start, step_in
from benchmarks.gpu import bandwidth, bench as benches, child, first, launches, steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case, Way, applied
from benchmarks.gpu.jobs import FAMILIES, Job, jobs, tables
from benchmarks.steps import GPU_STEPS, TrainingStep, gpt2
from benchmarks.steps.step import classification, cross_entropy
from jitgrad import config, pipeline
from jitgrad.codegen import cuda_toolchain
from jitgrad.codegen.cuda_native import compile_ptx

pytestmark = pytest.mark.usefixtures("kernels_of_module")
SMALL = {job.key: job for job in jobs(small=True)}
USUAL = ("launches: 3 kernels", "bandwidth: RMS norm, 21x24 bfloat16, both ways",
         "bandwidth: cross entropy, 3x50 bfloat16", "bandwidth: Adam, 16 tensors, 1,096 numbers", "products: 16x16x16 tf32",
         "products: 24x40x16 bfloat16, bias and GELU", "attention: 2x2 heads of 16, 32 tokens, causal",
         "convolutions: 2 of 8x5x5 to 8, 3x3 bfloat16")
INTERPRETED = ("jitgrad", "jitgrad, tuned", "jitgrad, own kernel", "jitgrad, own kernels", "PyTorch", "PyTorch, fused",
               "PyTorch, cuBLASLt's epilogue", "PyTorch, channels last")
"""Contenders in these tests: PyTorch's compiler would need a C++ compiler, and minutes."""


@pytest.fixture
def bench(executing, monkeypatch):
    monkeypatch.setattr(launches, "SIZE", 8)
    monkeypatch.setattr(steps, "LOSSES", 2)
    return Bench(torch_device="cpu", seconds=0.0, repeats=1, calls=1, only=INTERPRETED, cache=1 << 10)


@pytest.mark.parametrize("key", SMALL)
def test_cases_run(key, bench, request):
    if key not in USUAL and not request.config.getoption("--gpu-samples"):
        pytest.skip("needs --gpu-samples")
    job = SMALL[key]
    result = json.loads(json.dumps(job.case.run(bench)))
    assert result["failed"] == {} and result["seconds"]["jitgrad"] > 0
    assert ("PyTorch" in result["seconds"]) == bench.has("torch")
    shown = tables({job.family: {job.case.name: result}})
    assert shown and all(job.case.name in str(table) or result["title"] in str(table) for table in shown)
    assert all(table.markdown().startswith("## ") for table in shown)
    bench.clear()
    assert bench.works()


# ---- cases ---------------------------------------------------------------------------------------------------------


def twice(lib, x):
    return x + x


def case_of(ways):
    return Case("twice", lambda bench: [bench.normal(300)], applied(twice), 2400, True, ways=ways)


def wrong(lib, compiler, operands):
    return lambda: operands[0] * 2.5


def broken(lib, compiler, operands):
    raise ValueError("not here")


def test_what_is_wrong_or_fails_is_not_measured(bench):
    bench.only = ()
    ways = {"jitgrad": Way("jitgrad", True), "jitgrad, wrong": Way("jitgrad", make=wrong),
            "jitgrad, broken": Way("jitgrad", make=broken)}
    result = case_of(ways).run(bench)
    assert set(result["seconds"]) == {"jitgrad"} and result["limit"] > 0
    assert "away from the reference" in result["failed"]["jitgrad, wrong"]
    assert result["failed"]["jitgrad, broken"].endswith("ValueError: not here\n")
    (table,) = tables({"bandwidth": {"twice": result}})
    assert "failed: twice, jitgrad, broken: ValueError: not here" in table.notes


def test_contenders_have_equal_operands_and_settings(bench):
    given, settings = [], []

    def looking(lib, compiler, operands):
        given.append(operands[0])
        return lambda: (settings.append(config.current().cublas), operands[0] + operands[0])[1]

    bench.only = ()
    case_of({"jitgrad": Way("jitgrad", make=looking, settings={"cublas": False}), "PyTorch": Way("torch", make=looking)}
            ).run(bench)
    assert False in settings and (True in settings) == bench.has("torch") and config.current().cublas
    arrays = [x.cpu().numpy() for x in given]
    assert all(np.array_equal(arrays[0], other) for other in arrays[1:])


def test_gradients_are_those_of_both_ways(bench):
    made = applied(lambda lib, x, y: x * y, (0,), result=True)
    x, y, g = [bench.normal(5) for _ in range(3)]
    product, gradient = made(jg, jg.compile, [x, y, g])()
    assert np.allclose(product.cpu().numpy(), (x * y).detach().cpu().numpy())
    assert np.allclose(gradient.cpu().numpy(), (g * y).cpu().numpy())


def test_precision_is_given_back():
    with benches.precision(True, ["jitgrad"]):
        assert jg.get_float32_matmul_precision() == "high"
    assert jg.get_float32_matmul_precision() == "highest"


def test_the_parameters_of_gpt2():
    shapes = bandwidth.parameter_shapes(*bandwidth.PARAMETERS)
    assert len(shapes) == 148 and 124e6 < sum(int(np.prod(shape)) for shape in shapes) < 125e6


def test_a_training_step(bench):
    def build(lib):
        model = lib.nn.Linear(4, 2)
        return model, lib.optim.SGD(model.parameters(), lr=0.1)

    step = TrainingStep("a layer", classification((3, 4), 2), build, cross_entropy, tokens=3)
    result = steps.Step("layer", step, 0).run(bench)
    assert result["failed"] == {} and "jitgrad" in result["losses"]
    assert result["memory"]["jitgrad"] > 0 and result["host"]["jitgrad"] > 0 and result["first"]["jitgrad"] > 0
    losses = np.array(list(result["losses"].values()))
    assert np.allclose(losses[0], losses, atol=1e-5) and (losses[:, -1] < losses[:, 0]).all()
    shown, more = tables({"steps": {"layer": result}})
    assert shown.rows[0][0] == "a layer" and {row[0] for row in more.rows} >= {"a layer: jitgrad"}


# ---- GPT-2 ---------------------------------------------------------------------------------------------------------


def test_gpt2_computes_the_same_in_all_packages():
    step = gpt2.make_step(steps.SMALL)
    start = equal_start(step)
    assert "head.weight" in start[0] and np.array_equal(start[0]["head.weight"], start[0]["tokens.weight"])
    packages = ["jitgrad", *[name for name in ("torch",) if importlib.util.find_spec(name)]]
    losses = {}
    for name in packages:
        call = step_in(importlib.import_module(name), step, *start, lambda f: f)
        losses[name] = [call().item() for _ in range(4)]
    assert losses["jitgrad"][0] == pytest.approx(np.log(steps.SMALL.vocabulary), rel=0.05)
    assert losses["jitgrad"][-1] < losses["jitgrad"][0]
    assert all(found == pytest.approx(losses["jitgrad"], abs=2e-2) for found in losses.values())


class Traced(BaseException):
    pass


@pytest.fixture
def graph(bench, monkeypatch):
    """Of a training step of a GPT-2 with small sizes, as it is traced."""
    found = []

    def build(graph, *rest):
        if len(graph.nodes) < 200:
            return real(graph, *rest)
        found.append(graph)
        raise Traced

    real = pipeline.build_for_gpu
    monkeypatch.setattr(pipeline, "build_for_gpu", build)
    monkeypatch.setattr(Executing, "_execute", lambda *arguments: None)     # AdamW's state and the like are not looked at
    step = gpt2.make_step(gpt2.Sizes(layers=2, width=128, heads=2, vocabulary=1024, batch=2, tokens=128))
    with pytest.raises(Traced):
        step_in(jg, step, *equal_start(step), jg.compile, "cuda")()
    monkeypatch.undo()
    return found[0]


def test_gpt2_has_a_kernel_for_everything_and_stores_little(graph, request):
    made = pipeline.build_for_gpu(graph, "sm_90a")
    assert not [entry.name for entry in made.spec.entries if entry.host]
    nodes = [part.step.node for part in made.linked.steps]
    logits = [v for node in nodes for v in node.outputs if v.shape == (256, 1024)]
    assert [v.dtype for v in logits] == [jg.bfloat16] * 2          # logits and their gradient: no float32, no exponentials
    inner = [v for node in nodes for v in node.outputs if v.shape[-1:] == (512,) and v.type.size == 256 * 512]
    assert len(inner) == 2 * 3 and {v.dtype for v in inner} == {jg.bfloat16}   # of GELU: operand, result, gradient
    if request.config.getoption("--gpu-samples"):
        for source in made.spec.sources.values():
            sass.assert_no_spills(cuda_toolchain.link([compile_ptx(source, "sm_90a")], "sm_90a"))


# ---- what is measured, and in which order ------------------------------------------------------------------------------


def test_the_most_important_comes_first():
    found = jobs()
    ranks = [job.case.rank for job in found]
    assert ranks == sorted(ranks) and ranks[0] == 0 and len({job.key for job in found}) == len(found)
    assert {job.family for job in found if job.case.rank == 0} >= set(FAMILIES) - {"first"}
    assert [job.case.name for job in jobs(["gpt2", "mlp"])] == ["gpt2", "mlp"]
    assert {job.family for job in jobs(["attention"])} == {"attention"}
    assert {job.case.name for job in jobs(["steps"])} == set(GPU_STEPS)
    with pytest.raises(SystemExit, match="no part and no step called bandwith"):
        jobs(["bandwith"])


# ---- the process that measures ---------------------------------------------------------------------------------------


class Named:
    def __init__(self, name, run):
        self.name, self.rank, self.run = name, 0, run


def said(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_child_says_what_it_does_and_goes_on_after_an_error(bench, tmp_path):
    def fails(bench):
        raise RuntimeError("no such kernel")

    todo = [Job("bandwidth", Named("bad", fails)), Job("bandwidth", Named("good", lambda bench: {"seconds": {}}))]
    assert child.measure(todo, bench, 60.0, tmp_path / "record") == 0
    about, bad, why, good, result = said(tmp_path / "record")
    assert about["gpu"]["name"] == "Stand-in" and about["gpu"]["copy_bytes_per_second"] > 0
    assert (bad["key"], good["key"]) == ("bandwidth: bad", "bandwidth: good")
    assert "no such kernel" in why["result"]["why"] and result["result"] == {"seconds": {}}
    assert child.measure(todo, bench, -1.0, tmp_path / "late") == 0 and len(said(tmp_path / "late")) == 1


def test_the_child_ends_where_the_gpu_has_stopped(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "works", lambda self: False)
    todo = [Job("bandwidth", Named(name, lambda bench: {"seconds": {}})) for name in ("first", "second")]
    assert child.measure(todo, bench, 60.0, tmp_path / "record") == child.BROKEN
    assert len(said(tmp_path / "record")) == 3


CHILD = """
import json, os, sys, time
record, given, keys = sys.argv[1:]
def say(**message):
    with open(record, "a") as file:
        file.write(json.dumps(message) + "\\n")
say(gpu={"name": "a GPU"})
for key in json.loads(keys):
    say(key=key)
    if "dies" in key:
        print("the last words")
        os._exit(9)
    if "hangs" in key:
        time.sleep(60)
    say(key=key, result={"why": "Error: no"} if "fails" in key else {"work": 1, "seconds": {"jitgrad": 1.0}, "failed": {}})
"""


def supervised(tmp_path, todo, seconds=60.0, text=CHILD):
    script = tmp_path / "child.py"
    script.write_text(text)
    made = gpu.Supervisor({}, time.monotonic() + seconds, tmp_path, lambda text: None)
    made.command = (sys.executable, str(script))
    return made.measure([f"products: {name}" for name in todo])


def test_a_case_that_ends_its_process_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    results = supervised(tmp_path, ["a", "dies", "b", "fails", "hangs", "c"])
    assert list(results["products"]) == ["a", "b", "c"] and "late" not in results
    why = results["failed"]
    assert why["products: dies"] == "the process ended with 9: the last words" and why["products: fails"] == "Error: no"
    assert why["products: hangs"] == "it took too long"
    kept = json.loads((tmp_path / "gpu.json").read_text())["gpu"]
    assert kept == results and "| a |" in (tmp_path / "gpu.md").read_text()
    assert "failed: products: dies" in str(gpu.table(results))


def test_what_there_was_no_time_for_is_said(tmp_path):
    results = supervised(tmp_path, ["a", "b"], seconds=0.0)
    assert results["late"] == ["products: a", "products: b"]
    shown = str(gpu.table({**results, "gpu": {"name": "a GPU"}}))
    assert "there was no time for 2 cases: products: a; products: b" in shown


def test_a_process_that_cannot_begin_is_not_begun_again(tmp_path):
    results = supervised(tmp_path, ["a", "b"], text="raise SystemExit('no driver at all')")
    assert results == {"why": "no driver at all"} and "no driver at all" in str(gpu.table(results))


def test_the_whole_command(tmp_path, executing, monkeypatch):
    """As a user types it; the child is the one of these tests."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu.Supervisor, "command", (sys.executable, str(script)))
    monkeypatch.setattr(command.machine, "use_threads", lambda count: 1)
    command.main(["gpu", "products", "--small", "--minutes", "1", "--output", str(tmp_path)])
    kept = json.loads((tmp_path / "gpu.json").read_text())["gpu"]
    assert list(kept["products"]) == [job.case.name for job in jobs(["products"], small=True)]


def test_first_calls_in_new_processes(tmp_path):
    """On the CPU, where a new process has the same devices as this one."""
    result = first.First("mlp_small", True, 0).run(Bench(device="cpu", torch_device="cpu", only=("jitgrad",)))
    assert result["failed"] == {} and set(result["seconds"]["jitgrad"]) == {"cold", "warm"}
    both = {"mlp_small": {"seconds": {"jitgrad": {"cold": 1.0, "warm": 0.1}, "torch.compile": {"cold": 5.0, "warm": 2.0}},
                          "failed": {}}}
    assert [row[-2:] for row in first.table(both).rows] == [["5.00x", "within"], ["20.00x", ""]]
