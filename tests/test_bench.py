"""The benchmarks' helpers: tables, subsets, BatchNorm statistics, chains; one small measurement in processes of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx import Config, allocate, moments, repair
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.repair import REPAIRS
from relrep_onnx.types import Selection
from tests.test_export_int8 import halved
from tests.test_pipeline import inputs, small_net
from tools.bench import (
    accuracy,
    big,
    choices,
    cost,
    exports,
    forms,
    front,
    growth,
    handover,
    measured,
    paper,
    peer,
    quantize,
    refine,
    scale,
)
from tools.bench.batchnorm import batchnorms, recalibrate
from tools.bench.data import DATA, HELD_OUT, SUBSETS, TASKS, Array, Task, markdown_table, normalise, subsets, top1, write_json
from tools.bench.worker import Measurement, Order

NEEDS_DATA = pytest.mark.skipif(not (DATA / "cifar10_train4660.npz").exists(), reason="the folder of CIFAR-10 files is not there")


def batchnorm_net(opset: int = 17) -> ModelProto:
    """Conv, BatchNormalization, Relu, Conv, BatchNormalization; both nodes share one tensor of running means."""
    rng = np.random.default_rng(1)
    tensors = {
        "w1": rng.normal(size=(6, 3, 3, 3)),
        "w2": rng.normal(size=(6, 6, 1, 1)),
        "scale": rng.uniform(0.5, 2, size=6),
        "shift": rng.normal(size=6),
        "mean": rng.normal(size=6),
        "variance1": rng.uniform(1, 2, size=6),
        "variance2": rng.uniform(1, 2, size=6),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance1"], ["n1"], epsilon=1e-3),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("BatchNormalization", ["c2", "scale", "shift", "mean", "variance2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def outputs_of(model: ModelProto, names: list[str], x: Array) -> list[Array]:
    """Any tensors of a model."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def direct(model: ModelProto, x: Array) -> list[Array]:
    """Mean and population variance of what goes into each normalization, in float64."""
    inputs = [array.astype(np.float64) for array in outputs_of(model, ["c1", "c2"], x)]
    return [part for array in inputs for part in (array.mean(axis=(0, 2, 3)), array.var(axis=(0, 2, 3)))]


def test_recalibrated_statistics_are_those_of_the_recalibrated_network() -> None:
    model = batchnorm_net()
    x = np.random.default_rng(2).normal(size=(50, 3, 6, 6)).astype(np.float32)
    result = recalibrate(model, {"x": x})
    onnx.checker.check_model(result, full_check=True)
    graph = Graph(result)
    stored = [graph.stored(name) for node in batchnorms(result) for name in node.input[3:5]]
    for given, expected in zip(stored, direct(result, x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
    # The second node sees the first one recalibrated: its statistics are not those of the network as it was.
    assert np.abs(stored[2] - direct(model, x)[2]).max() > 0.1
    assert {"mean", "variance1", "variance2"}.isdisjoint(graph.tensors)
    assert model == batchnorm_net()


def test_recalibrated_outputs_are_normalised() -> None:
    x = np.random.default_rng(3).normal(size=(64, 3, 6, 6)).astype(np.float32)
    (y,) = outputs_of(recalibrate(batchnorm_net(), {"x": x}), ["y"], x)
    tensors = Graph(batchnorm_net()).tensors
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), numpy_helper.to_array(tensors["shift"]), atol=1e-4)
    np.testing.assert_allclose(y.std(axis=(0, 2, 3)), numpy_helper.to_array(tensors["scale"]), rtol=1e-3)


def test_recalibration_refuses_models_it_cannot_help() -> None:
    x = {"x": np.zeros((2, 16, 4, 4), np.float32)}
    with pytest.raises(ValueError, match="no BatchNormalization"):
        recalibrate(growth.chain(1), x)
    with pytest.raises(ValueError, match="operator set 13"):
        recalibrate(batchnorm_net(13), x)


def test_table() -> None:
    text = markdown_table(("name", "a|b"), [("x", "1"), ("longer", "22.5")])
    assert text.splitlines() == [
        "| name   | a\\|b |",
        "| ------ | ---: |",
        "| x      |    1 |",
        "| longer | 22.5 |",
    ]
    assert markdown_table(("a", "b"), []) == "| a   |   b |\n| --- | --: |"


def test_subsets_are_disjoint_and_leave_the_held_out_images_alone() -> None:
    images = np.arange(2560)
    parts = [*subsets(images), images[slice(*HELD_OUT)]]
    assert [(part[0], part[-1], len(part)) for part in parts[:3]] == [(0, 511, 512), (1024, 1535, 512), (2048, 2559, 512)]
    assert len(np.unique(np.concatenate(parts))) == 4 * 512
    assert len(subsets(images, 1)) == 1
    with pytest.raises(ValueError, match="3 calibration subsets need 2560 images"):
        subsets(images[:2559], len(SUBSETS))


def test_normalise() -> None:
    images = np.zeros((2, 5, 4, 3), np.uint8)
    images[1, 2, 3] = 255, 0, 51
    x = normalise(images)
    assert x.shape == (2, 3, 5, 4)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[1, :, 2, 3], [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], rtol=1e-6)


def test_json_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"value": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"value": float("nan")})


def test_default_selection_covers_what_it_promises() -> None:
    cases = accuracy.default_cases()
    assert len(cases) == len(set(cases)) == 28
    defaults = [c for c in cases if (c.allocate, c.repair) == (Config().allocate, Config().repair)]
    for model in ("resnet20_bn", "resnet20_folded", "resnet20_dynamo18"):
        grid = {(c.sparsity, c.pattern) for c in defaults if c.model == model}
        assert grid >= {(0.8, "unstructured"), (0.9, "unstructured"), (0.95, "unstructured"), (None, "2:4")}
    folded = [c for c in cases if (c.model, c.sparsity, c.pattern) == ("resnet20_folded", 0.9, "unstructured")]
    assert {c.allocate for c in folded if c.repair == Config().repair} == ALLOCATORS.keys() - {"uniform", "rr"} | {"auto"}
    assert {c.repair for c in folded if c.allocate == "rr-curve"} == REPAIRS.keys() - {"bias"}
    patterns = {(c.pattern, c.sparsity) for c in defaults if c.model == "resnet20_folded" and c.pattern != "unstructured"}
    assert patterns == {("2:4", None), ("1:4", None), ("4x1", 0.9), ("1x4", 0.9)}
    assert [c.sparsity for c in defaults if c.model == "mlperf_tiny_resnet8"] == [0.5, 0.6, 0.7]
    assert [c.sparsity for c in defaults if c.model == "fashion"] == [0.8, 0.9]
    several = {(c.model, c.allocate, c.repair, c.sparsity, c.pattern) for c in cases if c.subsets > 1}
    usual = "resnet20_folded", Config().allocate, Config().repair
    assert several == {(*usual, 0.9, "unstructured"), (*usual, 0.95, "unstructured")}
    assert {c.model for c in cases} == TASKS.keys() - {"resnet18_bn"}
    large = set(accuracy.default_cases(large=True)) - set(cases)
    assert {(c.model, c.sparsity, c.budget) for c in large} == {("resnet18_bn", 0.9, "weights"), ("resnet18_bn", 0.9, "macs")}


def test_chosen_cases_are_every_combination() -> None:
    options = accuracy.parse(["--models", "resnet20_folded", "--allocate", "lamp,erk", "--sparsity", "0.7"])
    cases = accuracy.chosen_cases(options.models, options.allocate, options.repair, options.sparsity, subsets=1)
    assert cases == [accuracy.Case("resnet20_folded", name, Config().repair, 0.7) for name in ("lamp", "erk")]
    options = accuracy.parse(["--models", "fashion", "--pattern", "2:4,4x1", "--budget", "macs"])
    assert [(c.pattern, c.sparsity, c.budget, c.subsets) for c in accuracy.select(options)] == [
        ("2:4", None, "macs", 3),
        ("4x1", 0.8, "macs", 3),
        ("4x1", 0.9, "macs", 3),
    ]


def test_the_peer_is_left_out_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer, "PACKAGE", "no_such_package_here")
    fixed = accuracy.select(accuracy.parse(["--subsets", "1"]))
    assert "not installed" in capsys.readouterr().err
    assert {c.subsets for c in fixed} == {1}
    assert peer.PEER not in {c.repair for c in fixed}
    with pytest.raises(SystemExit):
        cost.parse(["--peer"])
    monkeypatch.setattr(peer, "PACKAGE", "onnx")
    monkeypatch.setattr(peer, "version", lambda name: "1")
    peers = [c for c in accuracy.select(accuracy.parse([])) if c.repair == peer.PEER]
    assert [(c.model, c.sparsity) for c in peers] == [
        ("resnet20_bn", 0.5),
        ("resnet20_bn", 0.7),
        ("resnet20_bn", 0.9),
        ("mlperf_tiny_resnet8", 0.5),
    ]
    chosen = accuracy.select(accuracy.parse(["--models", "fashion", "--sparsity", "0.6", "--peer", "--subsets", "1"]))
    assert [(c.model, c.allocate, c.repair, c.sparsity) for c in chosen] == [
        ("fashion", Config().allocate, Config().repair, 0.6),
        ("fashion", "uniform", peer.PEER, 0.6),
    ]


@pytest.mark.parametrize(
    "arguments", [["--models", "vgg"], ["--repair", "variance,magic"], ["--sparsity", "80"], ["--pattern", "4:2"]]
)
def test_wrong_choices_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse(arguments)
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_rows() -> None:
    case = accuracy.Case("net", "erk", "asr", 0.8)
    trials = tuple(
        accuracy.Trial(score, 0.25, 0.8, 0.5, seconds, "erk") for score, seconds in ((0.70, 2.0), (0.74, 4.0), (0.81, 9.0))
    )
    label = ["net", "erk", "asr", "unstructured", "weights", "0.80"]
    assert accuracy.Row(case, trials).cells() == [*label, "3", "75.0", "5.5", "0.250", "80.0", "50.0", "4.0"]
    assert accuracy.Row(case, trials[:1]).cells()[7:9] == ["70.0", ""]
    failed = accuracy.Row(case, (), "no").cells()
    assert failed[7] == "failed"
    assert len(failed) == len(accuracy.HEADER)
    assert len(accuracy.Row(case, trials).cells()) == len(accuracy.HEADER)


def test_rows_name_what_auto_chose_and_the_sparsity_that_was_reached() -> None:
    case = accuracy.Case("net", "auto", "reconstruct", None, "2:4")
    trials = tuple(accuracy.Trial(0.7, 0.25, 0.4951, 0.5, 1.0, name) for name in ("lamp", "erk", "lamp"))
    assert accuracy.Row(case, trials).label() == ["net", "auto: lamp, erk", "reconstruct", "2:4", "weights", "0.50"]
    assert accuracy.Row(case, (), "no").label() == ["net", "auto", "reconstruct", "2:4", "weights", "all"]


def test_chain_is_a_valid_model_with_that_many_layers() -> None:
    model = growth.chain(5)
    onnx.checker.check_model(model, full_check=True)
    layers, _ = find_layers(Graph(model), Selection())
    assert [layer.cols for layer in layers] == [144] * 5
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.random.default_rng(0).normal(size=(2, *growth.CHAIN_SHAPE[1:])).astype(np.float32)})
    assert y.shape == (2, 10)
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0


def test_the_big_model_is_what_its_file_of_weights_says(tmp_path: Path) -> None:
    path, x = tmp_path / "big.onnx", np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    assert big.write_model(path, 32, 3) == 3 * 4 * 32 * 32 == path.with_suffix(".data").stat().st_size
    expected = x
    for weight in np.fromfile(path.with_suffix(".data"), np.float32).reshape(3, 32, 32):
        expected = expected + np.tanh(expected @ weight)
    (y,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_multiples_are_taken_within_a_round() -> None:
    runs = [
        Measurement((1.0, 3.0), 20.0, 300, 8, 2),
        Measurement((4.0, 4.0), 44.0, 320, 8, 2),
        Measurement((1.0, 1.0), 9.0, 310, 8, 2),
    ]
    plain = [Measurement((1.0,), 0.0, peak, 0, 0) for peak in (90, 110, 100)]
    result = measured.summarise("net", 64, plain, runs)
    assert (result.time_multiple, result.memory_multiple) == (10.0, 3.1)
    assert (result.optimize_seconds, result.plain_bytes, result.layers) == (20.0, 100, 2)
    assert len(cost.cost_cells(result)) == len(cost.COST_HEADER)
    assert len(growth.growth_cells(result)) == len(growth.GROWTH_HEADER)
    assert len(growth.width_cells(result)) == len(growth.WIDTH_HEADER)
    assert len(growth.samples_cells(result)) == len(growth.SAMPLES_HEADER)


def test_the_peer_is_compared_within_a_round() -> None:
    ours = [Measurement((1.0, 1.0), seconds, 300, 8, 2) for seconds in (2.0, 4.0, 3.0)]
    theirs = [Measurement((1.0, 2.0), seconds, 300, 0, 0) for seconds in (8.0, 4.0, 9.0)]
    result = cost.compare("net", 64, 0.9, ours, theirs)
    assert (result.plain_seconds, result.seconds, result.peer_seconds, result.ratio) == (1.0, 3.0, 8.0, 3.0)
    assert cost.peer_cells(result) == ["net", "0.90", "64", "1.00", "3.00", "8.00", "3.0"]
    assert len(cost.peer_cells(result)) == len(cost.PEER_HEADER)


def test_costs_are_those_of_the_defaults() -> None:
    options, order, settings = cost.parse([]), Order("plain", "", "", 1, 32), Config()
    assert (options.sparsity, options.allocate, options.repair) == (settings.goal, settings.allocate, settings.repair)
    assert (order.sparsity, order.allocate, order.repair) == (settings.goal, settings.allocate, settings.repair)


def test_the_head_of_a_wide_chain_is_no_layer() -> None:
    layers, _ = find_layers(Graph(growth.chain(2, 512, classes=1)), Selection())
    assert [layer.cols for layer in layers] == [4608, 4608]


@pytest.mark.parametrize("name", choices.VARIANTS)
def test_each_decision_has_the_package_as_it_is_and_something_else(name: str) -> None:
    head, variants = choices.VARIANTS[name]
    assert head
    assert [change for change in variants.values() if change is None] == [None]
    assert len(variants) > 1


def test_variants_change_what_they_say_and_put_it_back() -> None:
    usual, before = repair.REPAIRS["reconstruct"], (allocate._loss, repair.variance, moments.DAMPING)
    with choices.without_sums():
        assert (repair.REPAIRS["reconstruct"].sums, repair.REPAIRS["reconstruct"].search) == (False, usual.search)
    with choices.without_search():
        assert (repair.REPAIRS["reconstruct"].sums, repair.REPAIRS["reconstruct"].search) == (True, None)
    with choices.without_matching():
        assert repair.variance is repair.bias
    with choices.with_plain_loss():
        np.testing.assert_allclose(allocate._loss(np.array([1.0, 3.0]), 4.0), [0.25, 0.75])
    with choices.damped(0.5):
        inputs = moments.Covariance(9, np.zeros((1, 2)), np.eye(2)[None], factored=False)
        assert inputs.ridge[1] == vars(repair)["DAMPING"] == 0.5
    assert repair.REPAIRS["reconstruct"] is usual
    assert (allocate._loss, repair.variance, moments.DAMPING) == before


def test_crossing_is_linear_between_the_sparsities() -> None:
    sparsities = (0.8, 0.9, 1.0)
    assert paper.crossing(sparsities, (0.9, 0.8, 0.4), 0.6) == pytest.approx(0.95)
    assert paper.crossing(sparsities, (0.9, 0.8, 0.4), 0.95) == 0.8
    assert paper.crossing(sparsities, (0.9, 0.8, 0.4), 0.4) is None


def sweep() -> list[paper.Point]:
    scores = {"erk": (0.80, 0.60, 0.20), "global": (0.805, 0.50, 0.50)}
    return [
        paper.Point("asr", rule, sparsity, score, 0.5)
        for rule, values in scores.items()
        for sparsity, score in zip((0.8, 0.9, 0.95), values, strict=True)
    ]


def test_sweep_names_the_winner_and_whether_its_lead_counts() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in paper.sweep_table(sweep()).splitlines()[2:]]
    assert rows == [
        ["0.80", "80.0 / 0.50", "**80.5** / 0.50", "global", "0.5", "no"],
        ["0.90", "**60.0** / 0.50", "50.0 / 0.50", "erk", "10.0", "yes"],
        ["0.95", "20.0 / 0.50", "**50.0** / 0.50", "global", "30.0", "yes"],
    ]


def test_transition_is_where_the_best_allocator_falls() -> None:
    assert paper.transition(sweep(), 0.8) == "0.841 to above 0.95"
    assert paper.transition(sweep(), 0.9) == "at or below 0.8 to above 0.95"
    assert paper.transition(sweep(), 0.5) == "begins above 0.95"
    assert paper.transition(sweep(), 1.1) == "at or below 0.8 to 0.925"


def test_report_of_the_paper_holds_both_parts(tmp_path: Path) -> None:
    options = paper.parse(["--plot", str(tmp_path / "sweep.png")])
    forced = [paper.Forcing(0.95, 3, 0.5, 0.147, 0.015, 0.72, 0.705)]
    text = paper.report(options, 0.8, sweep(), forced)
    assert "transition (best allocator, 90 % to 50 % of dense): 0.841 to above 0.95" in text
    assert (
        "| 0.95     |             50.0 % |          14.7 |             1.5 |    72.0 |            70.5 |         -1.5 |" in text
    )
    write_json(tmp_path / "paper.json", paper.figures(options, 0.8, sweep(), forced))
    assert len(json.loads((tmp_path / "paper.json").read_text())["sweep"]) == 6
    paper.plot(sweep(), 0.8, options.plot)
    assert options.plot.stat().st_size > 10_000


def test_cost_of_a_small_chain(tmp_path: Path) -> None:
    onnx.save(growth.chain(2), tmp_path / "chain.onnx")
    samples = np.random.default_rng(0).normal(size=(64, 16, 8, 8)).astype(np.float32)
    options = argparse.Namespace(rounds=1, threads=1, batch_size=16, sparsity=0.5, allocate="uniform", repair="variance")
    result = measured.measure("small", tmp_path / "chain.onnx", samples, options, tmp_path)
    assert (result.layers, result.moments_bytes) == (2, 144 * 144 * 8)
    assert result.optimize_seconds > result.plain_seconds > 0
    # The interpreter with its libraries takes some ten megabytes; a parent's peak must not shine through.
    assert 2e7 < result.plain_bytes < result.optimize_bytes < 1e9


@NEEDS_DATA
def test_dense_models_reach_what_the_data_folder_promises() -> None:
    task = TASKS["mlperf_tiny_resnet8"](DATA, 3)
    assert [len(part) for part in (*task.calibration, task.held_out, task.test_x)] == [512, 512, 512, 512, 932]
    assert top1(task.model, task.test_x, task.test_y, threads=1) == pytest.approx(0.8777, abs=0.002)
    task = TASKS["resnet20_folded"](DATA, 1)
    assert top1(task.model, task.test_x, task.test_y, threads=1) == pytest.approx(0.9163, abs=0.002)


def test_refinement_rows_average_their_subsets() -> None:
    runs = [
        refine.Run("folded-0.95", subset, 0.916, start, refined, 0.5, 0.25, kinds, {}, 10.0, 30.0)
        for subset, start, refined, kinds in ((0, 0.6, 0.7, "mixup"), (1, 0.7, 0.8, "none"), (2, 0.8, 0.9, "mixup"))
    ]
    row = [cell.strip() for cell in refine.accuracy_table(runs).splitlines()[-1].strip("|").split("|")]
    assert row == [
        "resnet20_folded, sparsity 0.95, 80 epochs", "91.6", "70.0 ± 8.2", "80.0 ± 8.2", "0.500", "0.250", "mixup / none", "3.0",
    ]  # fmt: skip
    assert {row.model for row in refine.ROWS.values()} <= set(TASKS)


def test_a_step_is_held_against_plain_inference_and_torch() -> None:
    speeds = [refine.Speed("net", 0.010, 0.080, 0.160, 200, 700, 100), refine.Speed("net", 0.010, 0.080, 0.0, 1, 1, 0)]
    table = refine.speed_table(speeds)
    first, second = ([c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[-2:])
    assert first == ["net", "10", "80", "8.0", "0.50", "0", "0", "3.0"]
    assert second[4] == "-"


def test_forms_of_a_gradient_agree() -> None:
    times = forms.measure((4, 6, 5), 1, 1)  # it stops where they do not
    assert len([name for name in times if name.startswith("dw")]) == 4


def test_exports_are_measured_in_every_form(tmp_path: Path) -> None:
    model, x = small_net(), inputs(64)
    onnx.save(model, tmp_path / "small.onnx")
    labels = outputs_of(model, ["y"], x)[0].argmax(axis=1)
    task = Task("small", tmp_path / "small.onnx", (x,), x, x, labels)
    config = Config(threads=1, min_size=64, allocate="uniform", repair="none")
    rows = list(exports.measure(task, 0.5, list(exports.FORMS), tmp_path, config))
    assert [row.form for row in rows] == ["dense", *exports.FORMS]
    assert rows[0].top1 == 1.0
    sparse = onnx.load(tmp_path / "small_50.onnx")
    expected = float(np.mean(outputs_of(sparse, ["y"], x)[0].argmax(axis=1) == labels))
    assert {row.top1 for row in rows if "int8" not in row.form and row.form != "dense" and "16" not in row.form} == {expected}
    assert all(row.error < 0.1 for row in rows[1:])
    assert len(rows[1].cells()) == len(exports.HEADER)
    again = list(exports.measure(task, 0.5, ["onnx"], tmp_path, config))
    assert again[1] == rows[1], "the sparse model in the folder is taken"


@pytest.mark.parametrize("variant", quantize.VARIANTS)
def test_variants_of_quantization_run(variant: tuple[str, int, bool, bool], tmp_path: Path) -> None:
    model, x = halved(small_net()), inputs(32)
    path = quantize.quantized(model, [{"x": x}], variant, tmp_path)
    (given,), (expected,) = outputs_of(onnx.load(path), ["y"], x), outputs_of(model, ["y"], x)
    assert quantize.scores(expected, expected, expected.argmax(axis=1)) == ["100.0", "100.0", "0.000"]
    assert np.linalg.norm(given - expected) < 0.2 * np.linalg.norm(expected)


def test_a_missing_runtime_is_a_row() -> None:
    x = np.zeros((1, 2), np.float32)
    row = handover.answer("no_such_runtime", handover.openvino, "onnx", Path("none.onnx"), x, x)
    assert row == ["not installed", "onnx", "", ""]


def test_vela_is_read_from_its_report(tmp_path: Path) -> None:
    onnx.save(small_net(), tmp_path / "m.onnx")
    converter, compiler = tmp_path / "onnx2tf", tmp_path / "vela"
    converter.write_text('#!/bin/sh\nset -e\ntest "$6" = -cind\ntest -f "$2" -a -f "$8"\necho changed > "$2"\n')
    compiler.write_text(
        '#!/bin/sh\necho "Total Off-chip Flash used          46.70 KiB"\n'
        'echo "Original Weights Size          223.05 KiB"\necho "NPU Encoded Weights Size      37.12 KiB"\n'
    )
    for program in (converter, compiler):
        program.chmod(0o755)
    before = (tmp_path / "m.onnx").read_bytes()
    models = {"dense": tmp_path / "m.onnx"}
    rows = handover.vela_rows(models, tmp_path, inputs(2), str(converter), str(compiler))
    assert rows == [["dense", "223.05", "37.12", "46.70"]]
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert "not installed" in handover.vela_rows(models, tmp_path, inputs(2), None, None)[0][0]


def test_parts_of_the_paper_benchmark_are_put_together(tmp_path: Path) -> None:
    options = paper.parse(["--repair", "asr"])
    points = [paper.Point("asr", "erk", 0.9, 0.76, 0.61)]
    forced = [paper.Forcing(0.9, 3, 0.2, 0.13, 0.02, 0.84, 0.83)]
    write_json(tmp_path / "part.json", paper.figures(options, 0.88, points, forced))
    assert paper.merged([tmp_path / "part.json"] * 2) == (points * 2, forced * 2)


def test_scale_fits_its_terms_and_adds_them_up() -> None:
    spent = {(i, o): scale.Spent(0.0, 2 + 3e-9 * i**3 + 5e-10 * o * i**2, 0) for i, o in scale.LAYERS}
    assert scale.fit(spent) == pytest.approx((2, 3e-9, 5e-10))
    rows = dict(scale.billion(3e-9, 0.0))
    assert rows["weights"] == "1.01 billion"
    seconds = 20 * 3e-9 * (5 * 2048**3 + 8192**3)
    assert rows["reconstruction"] == f"{seconds / 3600:.1f} hours of one core"


def test_a_front_of_the_sample(tmp_path: Path) -> None:
    options = front.parse(["--model", "fashion", "--forms", "4x1", "--sparsity", "0.5", "--rounds", "2"])
    dense, int8, sparse = front.measure(options, tmp_path)
    assert (dense.form, dense.faster, dense.removed) == ("dense", 1.0, 0.0)
    assert int8.form == front.DENSE_INT8
    assert int8.bytes < dense.bytes
    assert (sparse.form, sparse.sparsity) == ("4x1", 0.5)
    assert min(p.top1 for p in (dense, int8, sparse)) > 0.9
    assert all(len(p.cells()) == len(front.HEADER) for p in (dense, int8, sparse))
