"""How tests and training steps get to a GPU: a sample of the CPU's tests with ``--device cuda``, and the script for machines
that reach no package index."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_on_gpu

import jitgrad as jg
from benchmarks import prerequisites
from jitgrad.codegen import cuda_toolchain

TESTS = Path(__file__).parent


def pytest_on_gpu(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", *arguments],
                          cwd=TESTS.parent, capture_output=True, text=True, env=environment)


def test_a_sample_of_the_tests_of_the_cpu_passes_on_a_gpu():
    chosen = "in_place_forms or views or sizes or shared_with_numpy or accumulates or detach or sequential"
    files = [f"tests/test_{name}.py" for name in ("tensor_api", "autograd", "nn")]
    done = pytest_on_gpu("--cases", "1", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout
    passed, skipped = (int(done.stdout.split(f" {word}")[0].split()[-1]) for word in ("passed", "skipped"))
    assert passed >= 6 and skipped >= 1, done.stdout       # what is about memory of NumPy's is skipped


def test_they_really_run_there(tmp_path):
    file = tmp_path / "test_functional.py"
    file.write_text("""
import jitgrad as jg, numpy as np, pytest
def test_device():
    x = jg.ones(2) + jg.from_numpy(np.ones(2))
    assert x.is_cuda and (np.asarray(x) == 2).all() and x.numpy().tolist() == [2, 2]
def test_that_fails():
    np.testing.assert_array_equal(jg.ones(2) * 2, [2, 3])
def test_jitgrad_itself_reads_no_gpu_by_numpy():
    for reading in ("x.numpy()", "np.asarray(x)"):
        with pytest.raises(TypeError, match="NumPy cannot read"):
            exec(reading, {"__name__": "jitgrad.here", "x": jg.ones(2), "np": np})
@pytest.mark.cpu
def test_of_the_cpu():
    assert False
""")
    done = pytest_on_gpu("-p", "conftest", "--rootdir", str(tmp_path), "-c", str(TESTS.parent / "pyproject.toml"), str(file))
    assert "test_that_fails" in done.stdout and "1 failed, 2 passed, 1 skipped" in done.stdout, done.stdout


# machines without a package index

@pytest.mark.parametrize(("name", "installed", "problem"), [
    ("numpy", "2.4.6", ""), ("numpy", "1.26.4", "is not supported; 2.0 or newer is"), ("numba", "0.68.1", ""),
    ("numba", "0.61.2", "is not supported"), ("numba", "0.99.0", "is not supported"), ("ml_dtypes", "", "is not installed"),
    ("llvmlite", "0.50.0rc1", "")])
def test_versions_are_judged(name, installed, problem):
    found = prerequisites.judge(name, installed)
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(prerequisites, "version", lambda name: {"numba": "0.56.0"}.get(name, "9.0"))
    found = prerequisites.findings()
    assert [f.name for f in found if f.problem] == ["numba", "llvmlite"] and "GPU" not in [f.name for f in found]
    assert prerequisites.main() == 1 and "numba         0.56.0  <-- is not supported; 0." in capsys.readouterr().out


def test_the_linker_is_found_in_packages_toolkits_and_where_variables_point(monkeypatch, tmp_path):
    for folder in ("site/nvidia/nvjitlink/lib", "local/cuda-12.4/lib64", "local/cuda-13.0/targets/x86_64-linux/lib",
                   "home/lib64"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libnvJitLink.so.13").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), ""])
    monkeypatch.setattr(cuda_toolchain, "TOOLKITS", tmp_path / "local")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found = [Path(place).relative_to(tmp_path).parts[:2] for place in cuda_toolchain.linker_places() if "/" in place]
    assert found[:4] == [("site", "nvidia"), ("home", "lib64"), ("local", "cuda-13.0"), ("local", "cuda-12.4")]


def test_the_report_has_what_was_found_and_how_everything_went(tmp_path):
    parts = [run_on_gpu.Part("good", ["-c", "print('fine')"]), run_on_gpu.Part("bad", ["-c", "raise SystemExit('broken')"]),
             run_on_gpu.Part("slow", ["-uc", "import time\nwhile True: time.sleep(0.1); print(1)"], seconds=1)]
    outcomes = [run_on_gpu.run(part) for part in parts]
    assert [outcome.ok for outcome in outcomes] == [True, False, False] and outcomes[2].status is None
    text = run_on_gpu.report([prerequisites.Finding("GPU", "H100")], outcomes)
    assert "GPU           H100" in text and "- good: passed after" in text and "- bad: failed (1)" in text
    assert "- slow: took too long" in text and "fine" in text and "broken" in text


def test_programs_run_without_pytest(executing, capsys, monkeypatch):
    import gpu_programs

    monkeypatch.setattr(gpu_programs, "OPTIMIZERS", {})
    monkeypatch.setattr(gpu_programs, "PROGRAMS", {
        "right": lambda device: [jg.arange(4.0, device=device) + 1],
        "wrong": lambda device: [jg.ones(3, device=device) * (2 if device == "cuda" else 3)]})
    assert run_on_gpu.run_programs() == 1
    printed = capsys.readouterr().out
    assert "passed  right" in printed and "FAILED  wrong: AssertionError" in printed and "1 passed, 1 failed" in printed


def test_without_a_gpu_nothing_runs_and_the_report_says_so(tmp_path, monkeypatch, capsys):
    missing = [prerequisites.Finding("GPU", "", "no driver")]
    monkeypatch.setattr(prerequisites, "findings", lambda: missing)
    monkeypatch.setattr(sys, "argv", ["run_on_gpu.py", str(tmp_path / "report.md")])
    assert run_on_gpu.main() == 2
    assert "nothing could be run: GPU no driver" in capsys.readouterr().out
    assert "no driver" in (tmp_path / "report.md").read_text()
