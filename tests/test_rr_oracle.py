"""Relative Repairability against brute force: prune the layer in the graph itself, run ONNX Runtime, measure the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from relrep_onnx.calibrate import Feeding, WalkSettings, dense_pass
from relrep_onnx.graph import Graph, find_layers, read_weight, with_layer
from relrep_onnx.job import quiet
from relrep_onnx.masks import pattern_named, unit_row_magnitude
from relrep_onnx.moments import Covariance, Moments
from relrep_onnx.repair import REPAIRS, Task
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.score import score_layer
from relrep_onnx.types import Feeds, FloatArray, Layer, RepairedLayer, Selection
from tests import models
from tests.models import ALL, SINGLES, only_layer, random, run

DATA = Path(__file__).parents[1].parent / "shared" / "data"
GRID = (0.35, 0.7, 0.9, 1.0)
# Rounding to half precision is a damage of its own, which no moments know of.
KINDS = [kind for kind in SINGLES if "fp16" not in kind and kind != "matmul1"]


def moments_of(model: ModelProto, layers: Sequence[Layer], batches: Sequence[Feeds], samples: int) -> dict[str, Covariance]:
    types = {i.name: i.type for i in Session(model.SerializeToString(), RuntimeOptions()).inputs}
    settings = WalkSettings(RuntimeOptions(), types, None, 0, 1 << 40, quiet)
    feeds = Feeding(batches, len(batches), samples, len(batches))
    return {d.layer.name: d.inputs for d in dense_pass(Graph(model), layers, feeds, settings)}


def task_of(model: ModelProto, layer: Layer, inputs: Covariance) -> Task:
    weight = read_weight(Graph(model), layer)
    return Task(layer, weight, unit_row_magnitude(weight), pattern_named("unstructured"), 0, Moments.dense(inputs, weight))


def repaired(name: str, task: Task, sparsity: float) -> RepairedLayer:
    """On the mask of the scores: curves know of no other."""
    return REPAIRS[name].fold(replace(task, zeros=round(sparsity * task.layer.size)).pruned())


def distortion(layer: Layer, dense: Sequence[Any], sparse: Sequence[Any], *, left: bool = False) -> float:
    """Mean over output positions of the squared difference, summed over channels."""
    pairs = zip(dense, sparse, strict=True)
    errors = [np.subtract(*(models.rows_of(layer.shape, layer.op, y, left=left) for y in pair)) for pair in pairs]
    return float((np.concatenate(errors) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_what_pruning_does(kind: str, repair: str) -> None:
    one = SINGLES[kind]()
    model = models.with_outputs(one.model, ["y"])
    model.graph.node.append(helper.make_node("Relu", ["y"], ["out"]))
    model = models.with_outputs(model, ["out"])
    layer = only_layer(model)
    batches: list[Feeds] = [one.feeds, {"x": 2 + random(9, *one.x.shape, dtype=one.x.dtype)}]
    inputs = moments_of(model, [layer], batches, 2)[layer.name]
    task = task_of(model, layer, inputs)
    curve = score_layer(task, REPAIRS[repair], GRID)
    left = model.graph.node[0].input[0] == "w"
    dense = [run(model, feeds, ["y"])["y"] for feeds in batches]
    for i, sparsity in enumerate(GRID):
        for name, wanted in (("none", curve.raw[i]), (repair, curve.residual[i])):
            sparse = with_layer(model, layer, repaired(name, task, sparsity))
            got = distortion(layer, dense, [run(sparse, feeds, ["y"])["y"] for feeds in batches], left=left)
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9 * curve.signal)
    assert (curve.rr >= 0).all()


def test_the_signal_is_the_variance_of_the_output() -> None:
    one = SINGLES["conv2d-groups"]()
    layer = only_layer(one.model)
    inputs = moments_of(one.model, [layer], [one.feeds], 2)[layer.name]
    curve = score_layer(task_of(one.model, layer, inputs), REPAIRS["affine"], GRID)
    y = models.rows_of(layer.shape, layer.op, run(one.model, one.feeds)["y"])
    assert curve.signal == pytest.approx(y.var(axis=0).sum(), rel=1e-4)
    assert curve.raw[-1] == pytest.approx(((y - models.stored(one.model, "b")) ** 2).sum(axis=1).mean(), rel=1e-4)
    assert curve.residual[-1] == pytest.approx(curve.signal, rel=1e-6), "with no weights left, only the mean can be matched"


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_shared_weight_counts_all_its_users(op: str) -> None:
    model = models.shared_weight(op)
    layer = next(y for y in find_layers(Graph(model), ALL)[0] if len(y.uses) == 2)
    # Only this layer is pruned, so what its users read does not change.
    feeds = {"x": random(3, 40, 8)}
    inputs = moments_of(model, [layer], [feeds], 40)[layer.name]
    task = task_of(model, layer, inputs)
    curve = score_layer(task, REPAIRS["affine"], GRID)
    dense = run(model, feeds, ["left", "right"])
    for i, sparsity in enumerate(GRID):
        sparse = with_layer(model, layer, repaired("affine", task, sparsity))
        got = run(sparse, feeds, ["left", "right"])
        errors = [distortion(layer, [dense[name]], [got[name]]) for name in ("left", "right")]
        assert np.mean(errors) == pytest.approx(curve.residual[i], rel=1e-4)


@pytest.fixture(scope="module")
def images() -> FloatArray:
    path = DATA / "cifar10_train4660.npz"
    if not path.exists() or not (DATA / "resnet20_bn.onnx").exists():
        pytest.skip(f"no trained network in {DATA}")
    with np.load(path) as archive:
        pixels = next(archive[name] for name in archive.files if archive[name].ndim == 4)[:64]
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    return np.ascontiguousarray(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.parametrize("which", [0, 9, -1])
def test_curves_of_a_trained_network(images: FloatArray, which: int) -> None:
    model = onnx.load(DATA / "resnet20_bn.onnx")
    layers, _ = find_layers(Graph(model), Selection(min_size=400))
    layer = layers[which]
    batches: list[Feeds] = [{"input": images[:32]}, {"input": images[32:]}]
    inputs = moments_of(model, [layer], batches, len(images))[layer.name]
    task = task_of(model, layer, inputs)
    curve = score_layer(task, REPAIRS["affine"], GRID)
    output = layer.uses[0].output
    dense = [run(model, feeds, [output])[output] for feeds in batches]
    for i, sparsity in enumerate(GRID):
        for name, wanted in (("none", curve.raw[i]), ("affine", curve.residual[i])):
            sparse = with_layer(model, layer, repaired(name, task, sparsity))
            got = distortion(layer, dense, [run(sparse, feeds, [output])[output] for feeds in batches])
            assert got == pytest.approx(wanted, rel=1e-4)
    assert (curve.residual <= curve.raw * (1 + 1e-9)).all()
