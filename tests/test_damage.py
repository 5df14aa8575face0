"""The damage of one layer against ONNX Runtime and the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf.message import EncodeError
from onnx import ModelProto, helper

from relrep_onnx.damage import OutputDamage
from relrep_onnx.graph import Graph, find_layers, with_layer
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Feeds, Layer
from tests.models import ALL, build, chain, change, expose, linear, random, run

OPTIONS = RuntimeOptions(threads=1)
BATCHES = [{"x": random(seed, samples, 8)} for seed, samples in ((1, 3), (2, 3), (3, 5))]


def layer_of(model: ModelProto, name: str) -> Layer:
    return next(layer for layer in find_layers(Graph(model), ALL)[0] if layer.name == name)


def damage_of(model: ModelProto, layer: Layer, batches: list[Feeds]) -> float:
    dense = Session(model.SerializeToString(), OPTIONS)
    return OutputDamage(model, dense, batches, OPTIONS).of(layer, change(model, layer))


def all_outputs(model: ModelProto, name: str) -> np.ndarray:
    return np.concatenate([run(model, feeds)[name] for feeds in BATCHES]).astype(np.float64)


def test_it_is_the_squared_relative_error_summed_over_float_outputs() -> None:
    model = chain(3)
    model.graph.node.append(helper.make_node("ArgMax", ["a1"], ["class"]))
    model.graph.node.append(helper.make_node("Neg", ["h1"], ["second"]))
    model = expose(model, ["out", "class", "second"])
    layer = layer_of(model, "fc0")
    sparse = with_layer(model, layer, change(model, layer))
    expected = 0.0
    for name in ("out", "second"):
        dense = all_outputs(model, name)
        expected += float(((all_outputs(sparse, name) - dense) ** 2).sum() / (dense**2).sum())
    assert expected > 0.01
    assert damage_of(model, layer, [*BATCHES]) == pytest.approx(expected, rel=1e-5)


def test_each_trial_starts_from_the_dense_model() -> None:
    model = chain(2)
    first, second = layer_of(model, "fc0"), layer_of(model, "fc1")
    before = model.SerializeToString()
    damage = OutputDamage(model, Session(before, OPTIONS), iter(BATCHES), OPTIONS)
    alone = damage_of(model, second, [*BATCHES])
    assert damage.of(first, change(model, first)) != damage.of(second, change(model, second)) == alone
    assert model.SerializeToString() == before


def test_without_a_float_output_there_is_nothing_to_measure() -> None:
    tensors: dict[str, np.ndarray] = {}
    nodes = [linear("fc", "x", "h", tensors, 8, 8, 0), helper.make_node("ArgMax", ["h"], ["class"])]
    model = build(nodes, {"x": ("n", 8)}, ["h"], tensors)
    model = expose(model, ["class"])
    assert math.isnan(damage_of(model, layer_of(model, "fc"), [*BATCHES]))


@pytest.mark.parametrize("known_before", [True, False])
def test_a_model_too_large_for_one_message_has_no_damage(known_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge:
        def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
            raise EncodeError("Failed to serialize proto")

    if known_before:
        monkeypatch.setattr("relrep_onnx.damage.is_large", lambda _: True)
    else:
        monkeypatch.setattr("relrep_onnx.damage.with_layer", lambda *_: Huge())
    model = chain(2)
    assert math.isnan(damage_of(model, layer_of(model, "fc0"), [*BATCHES]))
