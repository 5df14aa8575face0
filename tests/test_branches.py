"""Where residual branches end, and that a layer which ends one repairs the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from relrep_onnx.calibrate import DenseLayer, Feeding, WalkSettings, dense_pass, sequential_pass
from relrep_onnx.graph import Graph, branch_scale, find_layers, with_layer
from relrep_onnx.job import quiet
from relrep_onnx.moments import Moments
from relrep_onnx.repair import REPAIRS, Pruned
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import Array, Feeds, FloatArray, Layer, RepairedLayer
from tests.models import ALL, build, random, run

WIDTH = 6


def conv(name: str, source: str, tensors: dict[str, Array], seed: int) -> Any:
    tensors[f"{name}.w"] = random(seed, WIDTH, WIDTH, 3, 3) / np.float32(4)
    return helper.make_node("Conv", [source, f"{name}.w"], [f"{name}_"], name=name, pads=[1, 1, 1, 1])


def residual(*, norm: bool = False, projection: bool = False, extra_reader: bool = False) -> ModelProto:
    """Conv, Relu, then a block of two convolutions whose sum with the shortcut a last one reads."""
    tensors: dict[str, Array] = {}
    nodes = [conv("stem", "x", tensors, 1), helper.make_node("Relu", ["stem_"], ["h"])]
    nodes += [conv("one", "h", tensors, 2), helper.make_node("Relu", ["one_"], ["a"]), conv("two", "a", tensors, 3)]
    branch = "two_"
    if norm:
        parts = {"gamma": np.linspace(0.5, 2, WIDTH), "beta": np.ones(WIDTH), "mean": np.ones(WIDTH), "var": np.full(WIDTH, 4.0)}
        tensors.update({name: value.astype(np.float32) for name, value in parts.items()})
        nodes.append(helper.make_node("BatchNormalization", ["two_", *parts], ["normed"], epsilon=0.0))
        branch = "normed"
    if projection:
        nodes.append(conv("short", "h", tensors, 4))
    nodes.append(helper.make_node("Add", ["short_" if projection else "h", branch], ["sum"]))
    nodes += [helper.make_node("Relu", ["sum"], ["out"]), conv("last", "out", tensors, 5)]
    outputs = ["last_", *["two_"] * extra_reader]
    return build(nodes, {"x": ("n", WIDTH, 5, 5)}, outputs, tensors)


def shortcuts(model: ModelProto) -> dict[str, str | None]:
    return {layer.name: layer.shortcut for layer in find_layers(Graph(model), ALL)[0]}


def test_only_the_last_layer_of_a_branch_ends_it() -> None:
    assert shortcuts(residual()) == {"stem": None, "one": None, "two": "h", "last": None}
    assert shortcuts(residual(norm=True)) == {"stem": None, "one": None, "two": "h", "last": None}


def test_of_two_layers_that_meet_the_later_one_ends_the_branch() -> None:
    assert shortcuts(residual(projection=True)) == {"stem": None, "one": None, "two": "short_", "short": None, "last": None}


def test_an_output_that_something_else_reads_ends_nothing() -> None:
    assert set(shortcuts(residual(extra_reader=True)).values()) == {None}


def test_a_constant_addend_is_a_bias_on_the_way() -> None:
    tensors = {"w": random(0, 8, 8), "b": random(1, 8), "v": random(2, 8, 8)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Add", ["b", "h"], ["biased"]),
        helper.make_node("Add", ["biased", "x"], ["sum"]),
        helper.make_node("MatMul", ["sum", "v"], ["y"], name="y"),
    ]
    model = build(nodes, {"x": ("n", 8)}, ["y"], tensors)
    assert shortcuts(model) == {"h": "x", "y": None}


def test_the_scale_is_that_of_the_normalization() -> None:
    model = residual(norm=True)
    graph = Graph(model)
    two = next(layer for layer in find_layers(graph, ALL)[0] if layer.name == "two")
    np.testing.assert_allclose(branch_scale(graph, two), np.linspace(0.5, 2, WIDTH) / 2, rtol=1e-6)


def edited(edit: Callable[[ModelProto], None]) -> ModelProto:
    model = residual(norm=True)
    edit(model)
    return model


def node_of(model: ModelProto, op: str) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def set_values(model: ModelProto, name: str, values: list[float]) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(values, np.float32), name))


def test_channels_that_the_normalization_shuts_make_up_for_nothing() -> None:
    model = edited(lambda m: set_values(m, "gamma", [1.0, -2.0, 0.0, 1.9e-3, -2.1e-3, 1.0]))
    graph = Graph(model)
    two = next(layer for layer in find_layers(graph, ALL)[0] if layer.name == "two")
    np.testing.assert_allclose(branch_scale(graph, two), [0.5, -1.0, np.inf, np.inf, -1.05e-3, 0.5], rtol=1e-6)


def normalize_by_the_input(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["computed"], axes=[0, 2, 3], keepdims=0))
    node_of(model, "BatchNormalization").input[1] = "computed"


@pytest.mark.parametrize(
    "edit",
    [
        normalize_by_the_input,
        lambda m: set_values(m, "var", [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
        lambda m: set_values(m, "var", [1.0, 1.0, -1.0, 1.0, 1.0, 1.0]),
        lambda m: node_of(m, "Add").input.__setitem__(0, "normed"),  # a sum of the branch with itself
        lambda m: setattr(node_of(m, "Add"), "op_type", "Mul"),
        lambda m: setattr(node_of(m, "Add"), "domain", "others"),
    ],
    ids=["unknown scale", "no spread", "negative spread", "twice itself", "product", "other domain"],
)
def test_what_ends_no_branch(edit: Callable[[ModelProto], None]) -> None:
    model = edited(edit)
    graph = Graph(model)
    layers = {layer.name: layer for layer in find_layers(graph, ALL)[0]}
    assert layers["two"].shortcut is None
    with pytest.raises(KeyError, match="two"):
        branch_scale(graph, layers["two"])


def passes(model: ModelProto, feeds: list[Feeds], *, sums: bool) -> tuple[dict[str, RepairedLayer], dict[str, Moments]]:
    """Everything pruned by half and repaired by matching means; the moments each layer was given."""
    graph, layers = Graph(model), find_layers(Graph(model), ALL)[0]
    settings = WalkSettings(RuntimeOptions(threads=1), {"x": "tensor(float)"}, None, 0, 1 << 30, quiet)
    feeding = Feeding(feeds, len(feeds) - 1, 12, len(feeds))
    dense: dict[str, DenseLayer] = {d.layer.name: d for d in dense_pass(graph, layers, feeding, settings)}
    seen: dict[str, Moments] = {}

    def repair(layer: Layer, weight: FloatArray, moments: Moments, held_out: Moments | None) -> RepairedLayer:
        seen[layer.name] = moments
        assert held_out is not None
        assert held_out.inputs.count * 2 == moments.inputs.count
        mask = np.abs(weight) > np.median(np.abs(weight))
        return REPAIRS["bias"].fold(Pruned(weight, mask, moments))

    done = sequential_pass(graph, layers, feeding, settings, lambda layer: dense[layer.name].targets, repair, sums=sums)
    return done, seen


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_the_target_is_the_dense_sum_less_the_sparse_shortcut(norm: bool, projection: bool) -> None:
    model = residual(norm=norm, projection=projection)
    feeds: list[Feeds] = [{"x": random(seed, 4, WIDTH, 5, 5)} for seed in (10, 11, 12)]
    _, plain = passes(model, feeds, sums=False)
    repaired, aimed = passes(model, feeds, sums=True)
    sparse = model
    for layer in find_layers(Graph(model), ALL)[0]:
        if layer.name in ("stem", "short"):
            sparse = with_layer(sparse, layer, repaired[layer.name])
    shortcut = "short_" if projection else "h"
    rows: dict[str, list[Array]] = {"y": [], "gap": []}
    for one in feeds[:2]:  # those that calibrate
        rows["y"].append(run(model, one, ["two_"])["two_"])
        rows["gap"].append(run(model, one, [shortcut])[shortcut] - run(sparse, one, [shortcut])[shortcut])
    y, gap = (np.concatenate(part).astype(np.float64) for part in rows.values())
    scale = np.linspace(0.5, 2, WIDTH) / 2 if norm else np.ones(WIDTH)
    target = y + gap / scale[:, None, None]
    np.testing.assert_allclose(aimed["two"].target_mean, target.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aimed["two"].target_variance, target.var(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(aimed["two"].output_variance, y.var(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(plain["two"].target_variance, y.var(axis=(0, 2, 3)), rtol=1e-4)
    assert np.abs(aimed["two"].target_variance / plain["two"].target_variance - 1).max() > 0.01
    for name in ("stem", "one"):
        np.testing.assert_array_equal(aimed[name].target_mean, plain[name].target_mean)


def test_a_shortcut_that_broadcasts_is_left_alone() -> None:
    tensors = {"w": random(0, 8, 8), "v": random(2, 8, 8)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1),
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Add", ["h", "m"], ["sum"]),
        helper.make_node("MatMul", ["sum", "v"], ["y"], name="y"),
    ]
    model = build(nodes, {"x": ("n", 8)}, ["y"], tensors)
    assert shortcuts(model) == {"h": "m", "y": None}
    feeds: list[Feeds] = [{"x": random(seed, 4, 8)} for seed in (1, 2, 3)]
    _, aimed = passes(model, feeds, sums=True)
    _, plain = passes(model, feeds, sums=False)
    np.testing.assert_array_equal(aimed["h"].target_mean, plain["h"].target_mean)
