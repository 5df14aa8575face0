"""Shapes and MACs without data."""

from __future__ import annotations

import pytest
from onnx import ModelProto

from relrep_onnx.graph import activation_shapes
from relrep_onnx.inspection import inspect
from relrep_onnx.types import ConfigError, Selection
from tests.test_pipeline import small_net


def no_fallback(model: ModelProto) -> ModelProto | None:
    return None


def test_an_open_batch_counts_as_one_sample() -> None:
    shapes = activation_shapes(small_net(), {}, no_fallback)
    assert (shapes["c1"], shapes["p"]) == ((1, 16, 6, 6), (1, 16, 1, 1))


def test_given_shapes_win() -> None:
    assert activation_shapes(small_net(), {"x": (3, 8, 6, 6)}, no_fallback)["c2"] == (3, 16, 6, 6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"z": (1,)}, "no input is called 'z'"),
        ({"x": (1, 8)}, "has rank 4, not 2"),
        ({"x": (1, 8, 9, 6)}, "the model fixes axis 2 of 'x' at 6, not 9"),
    ],
)
def test_a_shape_that_fits_no_input_is_an_error(shape: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        activation_shapes(small_net(), shape, no_fallback)


def open_net() -> ModelProto:
    model = small_net()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"d{axis}"
    return model


def test_unknown_shapes_ask_the_fallback() -> None:
    asked = []

    def fallback(model: ModelProto) -> ModelProto | None:
        asked.append(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
        known = ModelProto()
        known.CopyFrom(model)
        for axis in (2, 3):
            known.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 7
        return known

    assert activation_shapes(open_net(), {}, fallback)["x"] == (1, 8, 7, 7)
    assert asked == [1]


def test_the_model_itself_stays_as_it_is() -> None:
    model = small_net()
    before = model.SerializeToString()
    activation_shapes(model, {"x": (2, 8, 6, 6)}, no_fallback)
    assert model.SerializeToString() == before


def test_macs_are_per_layer_and_unknown_without_shapes() -> None:
    known = {facts.layer.name: facts.macs for facts in inspect(small_net(), Selection(min_size=64)).layers}
    assert known == {"first": 16 * 8 * 9 * 36, "second": 16 * 16 * 9 * 36, "head": 80}
    batch = inspect(small_net(), Selection(min_size=64), {"x": (4, 8, 6, 6)})
    assert {facts.layer.name: facts.macs for facts in batch.layers} == known
    assert inspect(open_net()).cure == "needs --input-shape"
    assert "--input-shape" not in inspect(open_net(), None, {"x": (1, 8, 6, 6)}).cure
    unknown = {facts.layer.name: facts.macs for facts in inspect(open_net(), Selection(min_size=64)).layers}
    assert unknown["first"] is None
    fixed = inspect(open_net(), Selection(min_size=64), {"x": (1, 8, 6, 6)})
    assert {facts.layer.name: facts.macs for facts in fixed.layers} == known
