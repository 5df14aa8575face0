"""Folding against ONNX Runtime, and the nodes that have to stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from relrep_onnx.graph.batchnorm import fold_batchnorm
from tests.models import build, clone, random, run

Edit = Callable[[ModelProto], object]
X = random(9, 2, 3, 6, 6)


def normalized(*, bias: bool) -> ModelProto:
    """A convolution with zeros in its weight, and a BatchNormalization of its output."""
    weight = np.where(np.abs(random(0, 4, 3, 3, 3)) > 0.5, random(0, 4, 3, 3, 3), np.float32(0))
    norms = {
        "scale": random(1, 4),
        "shift": random(2, 4),
        "mean": random(3, 4),
        "variance": np.abs(random(4, 4)) + np.float32(0.1),
    }
    tensors = {"w": weight, **norms, **({"b": random(5, 4)} if bias else {})}
    nodes = [
        helper.make_node("Conv", ["x", "w", *["b"] * bias], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", *norms], ["n"], name="norm", epsilon=1e-2),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    return build(nodes, {"x": ("n", 3, 6, 6)}, ["y"], tensors)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_computes_the_same_with_the_same_zeros(bias: bool) -> None:
    model = normalized(bias=bias)
    folded = clone(model)
    fold_batchnorm(folded)
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Relu"]
    np.testing.assert_allclose(run(folded, {"x": X})["y"], run(model, {"x": X})["y"], rtol=1e-4, atol=1e-5)
    weights = [
        next(numpy_helper.to_array(t) for t in m.graph.initializer if t.name == m.graph.node[0].input[1]) for m in (model, folded)
    ]
    np.testing.assert_array_equal(weights[0] == 0, weights[1] == 0)


def compute(name: str) -> Edit:
    """Lets a tensor come from a node that the graph's inputs reach."""

    def edit(model: ModelProto) -> None:
        (stored,) = (t for t in model.graph.initializer if t.name == name)
        stored.name = f"stored_{name}"
        zero = helper.make_node("Sub", ["x", "x"], [f"zeros_{name}"])
        total = helper.make_node("ReduceSum", [f"zeros_{name}"], [f"zero_{name}"], keepdims=0)
        model.graph.node.insert(0, helper.make_node("Add", [stored.name, f"zero_{name}"], [name]))
        model.graph.node.insert(0, total)
        model.graph.node.insert(0, zero)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        *(compute(name) for name in ("w", "b", "scale", "variance")),
        lambda m: m.graph.output.append(helper.make_tensor_value_info("c", 1, None)),
        lambda m: m.graph.node.append(helper.make_node("Neg", ["c"], ["also"])),
        lambda m: m.graph.node.insert(1, helper.make_node("Relu", ["c_"], ["c"])) or m.graph.node[0].output.__setitem__(0, "c_"),
        lambda m: m.graph.node[1].input.__setitem__(0, "x4"),
    ],
    ids=["weight", "bias", "scale", "variance", "an output", "two readers", "not behind it", "an input"],
)
def test_what_cannot_be_folded_stays(edit: Edit) -> None:
    model = normalized(bias=True)
    edit(model)
    before = clone(model)
    fold_batchnorm(model)
    assert model == before
