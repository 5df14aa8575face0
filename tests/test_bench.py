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

from relrep_onnx import Config
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.repair import REPAIRS
from relrep_onnx.types import Selection
from tools.bench import accuracy, cost
from tools.bench.batchnorm import batchnorms, recalibrate
from tools.bench.data import DATA, HELD_OUT, SUBSETS, TASKS, Array, markdown_table, normalise, subsets, top1, write_json
from tools.bench.worker import Measurement

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
        recalibrate(cost.chain(1), x)
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
    assert len(cases) == len(set(cases))
    for model in ("resnet20_bn", "resnet20_folded"):
        grid = {(c.allocate, c.sparsity) for c in cases if c.model == model and c.repair == "variance"}
        assert grid == {(allocator, sparsity) for allocator in ALLOCATORS for sparsity in (0.8, 0.9)}
    repairs = {c.repair for c in cases if (c.model, c.allocate, c.sparsity) == ("resnet20_bn", "global", 0.8)}
    assert repairs == {*REPAIRS, "batchnorm"}
    assert {c.model for c in cases} == TASKS.keys() - {"resnet18_bn"}


def test_chosen_cases_are_every_combination() -> None:
    options = accuracy.parse(["--models", "resnet20_folded", "--allocate", "lamp,erk", "--sparsity", "0.7"])
    cases = accuracy.chosen_cases(options.models, options.allocate, options.repair, options.sparsity)
    assert cases == [accuracy.Case("resnet20_folded", name, Config().repair, 0.7) for name in ("lamp", "erk")]


@pytest.mark.parametrize("arguments", [["--models", "vgg"], ["--repair", "variance,magic"], ["--sparsity", "80"]])
def test_wrong_choices_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse(arguments)
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_rows() -> None:
    case = accuracy.Case("net", "erk", "asr", 0.8)
    trials = tuple(accuracy.Trial(score, 0.25, 0.8, 0.5) for score in (0.70, 0.74, 0.81))
    assert accuracy.Row(case, trials).cells() == ["net", "erk", "asr", "0.80", "3", "75.0", "5.5", "0.250", "80.0", "50.0"]
    assert accuracy.Row(case, trials[:1]).cells()[5:7] == ["70.0", ""]
    failed = accuracy.Row(case, (), "no").cells()
    assert failed[5] == "failed"
    assert len(failed) == len(accuracy.HEADER)
    assert len(accuracy.Row(case, trials).cells()) == len(accuracy.HEADER)


def test_chain_is_a_valid_model_with_that_many_layers() -> None:
    model = cost.chain(5)
    onnx.checker.check_model(model, full_check=True)
    layers, _ = find_layers(Graph(model), Selection())
    assert [layer.cols for layer in layers] == [144] * 5
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.random.default_rng(0).normal(size=(2, *cost.CHAIN_SHAPE[1:])).astype(np.float32)})
    assert y.shape == (2, 10)
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0


def test_multiples_are_taken_within_a_round() -> None:
    runs = [
        Measurement((1.0, 3.0), 20.0, 300, 8, 2),
        Measurement((4.0, 4.0), 44.0, 320, 8, 2),
        Measurement((1.0, 1.0), 9.0, 310, 8, 2),
    ]
    plain = [Measurement((1.0,), 0.0, peak, 0, 0) for peak in (90, 110, 100)]
    result = cost.summarise("net", 64, plain, runs)
    assert (result.time_multiple, result.memory_multiple) == (10.0, 3.1)
    assert (result.optimize_seconds, result.plain_bytes, result.layers) == (20.0, 100, 2)
    assert len(cost.cost_cells(result)) == len(cost.COST_HEADER)
    assert len(cost.growth_cells(result)) == len(cost.GROWTH_HEADER)


def test_cost_of_a_small_chain(tmp_path: Path) -> None:
    onnx.save(cost.chain(2), tmp_path / "chain.onnx")
    samples = np.random.default_rng(0).normal(size=(64, 16, 8, 8)).astype(np.float32)
    options = argparse.Namespace(rounds=1, threads=1, batch_size=16, sparsity=0.5, allocate="uniform", repair="variance")
    result = cost.measure("small", tmp_path / "chain.onnx", samples, options, tmp_path)
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
