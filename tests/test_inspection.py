"""Shapes and MACs without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from relrep_onnx.graph import activation_shapes
from relrep_onnx.inspection import inspect
from relrep_onnx.types import Array, ConfigError, Selection
from tests.models import build, random
from tests.test_pipeline import small_net


def no_fallback(model: ModelProto) -> ModelProto | None:
    return None


def test_an_open_batch_counts_as_one_sample() -> None:
    shapes = activation_shapes(small_net(), {}, no_fallback)
    assert (shapes["c1"], shapes["p"]) == ((1, 16, 6, 6), (1, 16, 1, 1))


def test_given_shapes_win() -> None:
    assert activation_shapes(small_net(), {"x": (3, 8, 6, 6)}, no_fallback)["c2"] == (3, 16, 6, 6)


def test_a_given_shape_has_the_rank_of_an_input_without_one() -> None:
    model = small_net()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert activation_shapes(model, {"x": (3, 8, 6, 6)}, no_fallback)["c2"] == (3, 16, 6, 6)


def test_only_tensors_have_shapes() -> None:
    model = small_net()
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    with pytest.raises(ConfigError, match="'s' is no tensor"):
        activation_shapes(model, {"s": (1,)}, no_fallback)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"z": (1,)}, "no input is called 'z'"),
        ({"x": (1, 8)}, "has rank 4, not 2"),
        ({"x": (1, 8, 10**20, 6)}, "give sizes of at least 1"),
        ({"x": (1, 8, -6, 6)}, "give sizes of at least 1"),
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


def one(node: NodeProto, tensors: Mapping[str, Array], *behind: NodeProto, **attributes: object) -> ModelProto:
    """A model that ONNX Runtime refuses: a node, whose attributes may be of any type, and others behind it."""
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return build([node, *behind], {"x": ("n", 8, 6, 6)}, [], tensors, ir_version=8)


def conv(op: str = "Conv") -> NodeProto:
    return helper.make_node(op, ["x", "w"], ["y"], name="layer")


KERNEL: Final = {"w": random(0, 8, 8, 3, 3)}
NAN: Final = float("nan")
REFUSED: Final[Mapping[str, Callable[[], ModelProto]]] = {
    "text that is no UTF-8": lambda: one(conv(), KERNEL, auto_pad=b"\xff"),
    "NaN groups": lambda: one(conv(), KERNEL, group=NAN),
    "infinite groups": lambda: one(conv(), KERNEL, group=float("inf")),
    "no groups": lambda: one(conv("ConvTranspose"), KERNEL, group=0),
    "3 groups of 8": lambda: one(conv("ConvTranspose"), KERNEL, group=3),
    "NaN strides": lambda: one(conv(), KERNEL, strides=[NAN, NAN]),
    "strides of text": lambda: one(conv(), KERNEL, strides=["a", "b"]),
    "NaN shape": lambda: one(
        helper.make_node("Reshape", ["v", "s"], ["w"]), {"v": random(0, 8, 8), "s": np.array([NAN, 8.0])}, conv()
    ),
    "NaN type": lambda: one(conv(), KERNEL, helper.make_node("Cast", ["y"], ["z"], to=NAN)),
    "odd normalization": lambda: one(
        conv(),
        {"w": random(0, 8, 8, 1, 1), "s": np.ones((2, 4), np.float32), "b": np.ones(8), "m": np.ones(8), "v": np.ones(5)},
        helper.make_node("BatchNormalization", ["y", "s", "b", "m", "v"], ["z"]),
        helper.make_node("Add", ["z", "x"], ["sum"]),
    ),
    "unknown type in a branch": lambda: one(
        helper.make_node("If", ["yes"], ["y"], then_branch=unknown_type("t"), else_branch=unknown_type("e")),
        {**KERNEL, "yes": np.array(True)},
    ),
}


def unknown_type(output: str) -> GraphProto:
    nodes = [helper.make_node("Cast", ["w"], [f"{output}.w"], to=99), helper.make_node("Conv", ["x", f"{output}.w"], [output])]
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_onnx_runtime_refuses_is_looked_at_nevertheless(case: str) -> None:
    model = REFUSED[case]()
    facts = inspect(model, Selection(min_size=1))
    assert len(facts.layers) + len(facts.skipped) > 0
