"""The benchmarks: that they compare what they say, and that what is wrong is not measured as if it were fast."""

import dataclasses

import numpy as np
import pytest

from benchmarks import command, curves, gpu, measure as timing, narrow, shapes, training
from benchmarks.kernels import bandwidth, case, convolutions, products, run
from benchmarks.report import Table, Tables
from benchmarks.steps import STEPS, chosen


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.001)


def falling(last: float, steps: int = 50) -> list[float]:
    return [2.0 - (2.0 - last) * k / (steps - 1) for k in range(steps)]


# ---- learning curves --------------------------------------------------------------------------------------------


def test_a_curve_as_near_as_the_noise_passes():
    noisy = [falling(0.5001), falling(0.4999)]
    verdict = curves.compare(falling(0.5003), falling(0.5), noisy)
    assert verdict["passed"]
    assert verdict["final"]["noise"] == pytest.approx(2e-4)
    assert verdict["final"]["difference"] == pytest.approx(3e-4)


@pytest.mark.parametrize("last", [0.5006, 0.4994, float("nan")])
def test_a_curve_beyond_the_noise_fails(last):
    assert not curves.compare(falling(last), falling(0.5), [falling(0.5001), falling(0.4999)])["passed"]


def test_one_bad_loss_at_the_end_fails():
    ours = [*falling(0.5)[:-1], 0.6]
    assert not curves.compare(ours, falling(0.5), [falling(0.5001)])["passed"]


def test_perturbation_is_small_and_spares_counters():
    weights = {"w": np.linspace(1, 2, 1000, dtype=np.float32), "count": np.array(7)}
    moved, again, other = curves.perturb(weights, 0), curves.perturb(weights, 0), curves.perturb(weights, 1)
    apart = np.abs(moved["w"] / weights["w"] - 1)
    assert 1e-7 < apart.mean() < 1e-5 and moved["w"].dtype == np.float32
    assert np.array_equal(moved["w"], again["w"]) and not np.array_equal(moved["w"], other["w"])
    assert moved["count"] == 7 and moved["count"].dtype == weights["count"].dtype


def test_curves_of_a_small_step():
    results = curves.run(["mlp_small"], steps=25, perturbed=1, tell=lambda text: None)
    result = results["mlp_small"]
    assert result["passed"] and len(result["curves"]["jitgrad"]) == 25
    assert result["final"]["jitgrad"] < result["curves"]["jitgrad"][0]
    assert "pass" in str(curves.table(results))


def test_unknown_names_are_refused():
    assert list(chosen(["cnn"])) == ["cnn"] and chosen() == STEPS
    with pytest.raises(SystemExit, match="no step is called resnet50"):
        chosen(["resnet50"])
    with pytest.raises(SystemExit, match="no family of kernels is called gemm"):
        run.run(["gemm"], seconds=0)


# ---- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [
    products.Product(5, 7, 3), products.Product(5, 7, 3, "left"), products.Product(5, 7, 3, "right"),
    products.Product(4, 6, 5, "right", batch=3), products.Product(4, 6, 5, pairs=3)], ids=lambda p: p.name)
def test_products_of_a_plan_are_numpys(product):
    arrays = product.operands(np.random.default_rng(0))
    found = {"jitgrad": case.as_arrays(product.in_plan(arrays)()), "NumPy": case.as_arrays(product.in_numpy(arrays)())}
    assert case.differing(found) == {} and len(found["jitgrad"]) == product.pairs ** 2
    one = found["NumPy"][0]
    assert product.operations == 2 * product.k * one.size * product.pairs ** 2


def test_gradients_of_a_linear_layer():
    x, w, g = [np.ones(shape) for shape in ((8, 3), (5, 3), (8, 5))]
    forward, of_input, of_weight = products.linear(8, 3, 5)
    assert [p.outputs()[0].shape for p in (forward, of_input, of_weight)] == [g.shape, x.shape, w.shape]
    assert len({forward.operations, of_input.operations, of_weight.operations}) == 1


def test_layers_of_resnet():
    layers = convolutions.resnet_layers()
    assert len(layers) == len(set(layers)) == 11
    assert layers[0].shapes == ((32, 3, 32, 32), (64, 3, 3, 3), (32, 64, 32, 32))
    assert layers[-1].shapes == ((32, 512, 4, 4), (512, 512, 3, 3), (32, 512, 4, 4))


def test_parts_of_a_convolution():
    layer = convolutions.Layer(2, 3, 5, 7, 6, kernel=3, stride=2)
    for part, shape in zip(layer.cases(), (layer.shapes[2], layer.shapes[0], layer.shapes[1]), strict=True):
        results = results_of(part)
        assert [a.shape for a in results["jitgrad"]] == [shape]
        assert case.differing(results) == {}
        assert part.operations == 2 * (2 * 5 * 4 * 3) * (3 * 3 * 3)


def small_cases() -> list[case.Case]:
    small = [dataclasses.replace(k, shapes=[tuple(11 + d for d in range(len(k.shapes[0])))]) for k in bandwidth.KERNELS]
    small = [dataclasses.replace(k, shapes=[(64,)]) if len(k.shapes[0]) == 1 else k for k in small]
    return [*[c for k in small for c in k.cases()], *bandwidth.embeddings(11, 3, 7)]


@pytest.mark.parametrize("small", small_cases(), ids=lambda c: c.name)
def test_kernels_agree_and_are_sealed(small):
    results = results_of(small)
    assert not small.comparable or case.differing(results) == {}
    call = small.makers["jitgrad"](small.operands(np.random.default_rng(0)))
    for _ in range(3):
        call()
    assert ": sealed; " in str(call.compiled.explain())


def results_of(measured: case.Case) -> dict[str, list[np.ndarray]]:
    arrays = measured.operands(np.random.default_rng(0))
    return {name: case.as_arrays(make(arrays)()) for name, make in case.taking_part(measured.makers).items()}


def test_adam_moves_parameters_in_place():
    arrays = bandwidth.adam(2, 5).operands(np.random.default_rng(0))
    assert len(arrays) == 4 and bandwidth.adam(2, 5).moved == 7 * 2 * 5 * 4
    assert case.as_arrays(bandwidth.adam_in("jitgrad", arrays)()) == []


def test_what_is_measured_and_what_failed(quick):
    def wrong(arrays):
        return lambda: arrays[0] + 9

    def broken(arrays):
        raise ValueError("not here")

    compared = case.Case("copy", lambda random: [np.arange(1024, dtype=np.float32)],
                         {"jitgrad": wrong, "NumPy": lambda arrays: lambda: arrays[0].copy()})
    result = case.measure(compared, 0, 1, ())
    assert set(result["seconds"]) == {"NumPy"} and "away from the reference" in result["failed"]["jitgrad"]
    assert result["work"] == 8 * 1024 and result["limit"] > 0
    halted = case.measure(dataclasses.replace(compared, makers={"jitgrad": broken, "NumPy": wrong}), 0, 1, ())
    assert halted["failed"]["jitgrad"].endswith("ValueError: not here\n") and set(halted["seconds"]) == {"NumPy"}


def test_distances():
    x = np.array([1.0, 2.0, 4.0])
    assert case.distance(x, x) == 0 and case.distance(x + 0.4, x) == pytest.approx(0.1)
    assert case.distance(x[:2], x) == float("inf")
    nothing = case.differing({"NumPy": [x], "jitgrad": [np.full(3, np.nan)]})
    assert list(nothing) == ["jitgrad"]


def test_table_of_a_family():
    results = {"limits": {"GFLOP/s, one thread": 2e11},
               "products": {"a": {"work": 100, "limit": 2e9, "failed": {"JAX": "Traceback\nOops: no"},
                                  "seconds": {"jitgrad": 1e-7, "NumPy": 4e-7, "PyTorch": 2e-7}}}}
    tables = run.table(results)
    assert isinstance(tables, Tables) and "200.0" in str(tables.tables[0])
    assert tables.tables[1].rows == [["a", "1", "0.25", "0.5", "2", "50%", "2.00x"]]
    assert tables.tables[1].notes == ["failed: a, JAX: Oops: no"]


def test_sizes_of_caches(tmp_path):
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"),
                                                 (3, "Unified", "266240K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert run.cache_bytes(tmp_path) == {1: 48 << 10, 2: 2 << 20, 3: 260 << 20}
    assert run.cache_bytes(tmp_path / "absent") == {}


def test_narrow_products(monkeypatch):
    monkeypatch.setattr(narrow, "SIZES", (16,))
    monkeypatch.setattr(narrow, "SHAPES", ((2, 24, 32),))
    results = narrow.run(0.001, ["jitgrad"])
    assert set(results["square"]["16"]["jitgrad"]) == set(narrow.DTYPES)
    assert set(results["few rows"]["2x24x32"]["jitgrad"]) == {*narrow.WEIGHTS, "reading"}
    shown = str(narrow.table(results))
    assert "16 jitgrad" in shown and "2x24x32 jitgrad" in shown


# ---- the command ------------------------------------------------------------------------------------------------


def test_parts_and_names(capsys):
    parts, options = command._parse(["curves", "mlp", "--steps", "7"])
    assert parts == ("curves",) and options.names == ["mlp"] and options.steps == 7
    assert command._parse([])[0] == command.PARTS
    parts, options = command._parse(["curves", "gpu", "steps", "gpt2", "--minutes", "3"])
    assert parts == ("curves", "gpu") and options.names == ["steps", "gpt2"] and options.minutes == 3
    with pytest.raises(SystemExit):
        command._parse(["calls", "mlp"])
    assert "'mlp' is no part" in capsys.readouterr().err


def test_plots(tmp_path, quick):
    plots = pytest.importorskip("benchmarks.plots")
    losses = {"jitgrad": falling(0.5), "PyTorch": falling(0.5)}
    plots.curves({"a": {"title": "a", "passed": True, "curves": losses}}, tmp_path / "curves.png")
    result = {"work": 8, "limit": 8.0, "seconds": {"jitgrad": 1.0, "NumPy": 2.0}, "failed": {}}
    plots.kernels({"limits": {}, "products": {"a": result}, "bandwidth": {"b": result}}, tmp_path / "kernels.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curves.png", "kernels.png"))
    assert str(Tables([Table("t", ["x"], [["1"]])])).count("t") == 1


# ---- training steps ---------------------------------------------------------------------------------------------


def test_another_mode_takes_part_beside_the_default_one(quick):
    results = training.run(["mlp_small"], budget=0.0, repeats=1, only=["jitgrad"], mode="max-autotune",
                           tell=lambda text: None)
    contenders = results["mlp_small"]["contenders"]
    assert list(contenders) == ["jitgrad", "jitgrad max-autotune"]
    assert contenders["jitgrad max-autotune"]["difference"] < 1e-5
    header, *_ = [line for line in str(training.table(results)).splitlines() if "step" in line and "jitgrad" in line]
    assert header.index("jitgrad max-autotune") > header.index("jitgrad eager")


def test_new_sizes_of_a_batch():
    results = shapes.run(["mlp_small"])
    assert list(results["mlp_small"]) == [31, 30, 29, 28, 27, 26, 25]
    assert min(results["mlp_small"].values()) > 0
    assert "31, 30" in str(shapes.table(results))
    assert command._parse(["shapes", "gpt"])[1].names == ["gpt"]


# ---- on a GPU ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_measured_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.driver, "available", lambda: False)
    command.main(["gpu", "mlp_small", "--output", str(tmp_path)])
    assert "nothing is measured" in capsys.readouterr().out and (tmp_path / "gpu.json").exists()
    assert "gpu" not in command._parse([])[0]
