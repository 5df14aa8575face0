"""Look-ups over a graph against what ONNX Runtime computes, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.graph.index import LONGEST_CHAIN, captured, subgraphs
from relrep_onnx.types import Array, ModelError
from tests.models import ALL, build, random, run, with_if

STORED = random(0, 4, 6)


def chained(*steps: NodeProto, opset: int = 17, more: Mapping[str, Array] | None = None) -> ModelProto:
    """x + what the steps make of the stored tensor `w`; each reads the one before."""
    name = "w"
    for number, step in enumerate(steps):
        step.input[0], name = name, f"w{number}"
        step.output.append(name)
    nodes = [*steps, helper.make_node("Add", ["x", name], ["y"])]
    return build(nodes, {"x": ("n",)}, ["y"], {"w": STORED, **(more or {})}, opset=opset, ir_version=4)


def step(op: str, *inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, ["", *inputs], [], **attributes)


@pytest.mark.parametrize(
    "steps",
    [
        [step("Transpose")],
        [step("Transpose", perm=[1, 0]), step("Identity")],
        [step("Reshape", "shape")],
        [step("Reshape", "zeros")],
        [step("Cast", to=TensorProto.FLOAT16), step("Cast", to=TensorProto.FLOAT)],
        [step("Reshape", "shape"), step("Transpose", perm=[2, 0, 1]), step("Reshape", "flat")],
    ],
    ids=["transpose", "perm", "reshape", "zero copies", "casts", "chain"],
)
def test_a_value_is_what_its_reader_sees(steps: list[NodeProto]) -> None:
    shapes = {"shape": [2, -1, 3], "zeros": [0, 2, 3], "flat": [-1]}
    model = chained(*map(clone_of, steps), more={name: np.array(dims, np.int64) for name, dims in shapes.items()})
    last = model.graph.node[-1].input[1]
    expected = run(model, {"x": np.zeros(1, np.float32)}, [last])[last]
    np.testing.assert_array_equal(Graph(model).value(last), expected)


def clone_of(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def test_old_reshapes_carry_their_shape() -> None:
    model = chained(step("Reshape", shape=[3, 8]), opset=4)
    np.testing.assert_array_equal(Graph(model).value("w0"), STORED.reshape(3, 8))


def test_chains_end_somewhere() -> None:
    model = chained(*(step("Identity") for _ in range(LONGEST_CHAIN + 1)))
    graph = Graph(model)
    assert graph.constant(f"w{LONGEST_CHAIN - 1}") is not None
    assert graph.constant(f"w{LONGEST_CHAIN}") is None


def test_what_is_computed_is_no_constant() -> None:
    size = helper.make_node("Shape", ["x"], ["size"])
    model = chained(step("Reshape", "size"), step("Identity"))
    model.graph.node.insert(0, size)
    graph = Graph(model)
    assert graph.value("w1") is None
    assert graph.value("x") is None
    assert graph.constant_names == {"w"}
    model.graph.node[1].domain = "others"  # somebody's own Reshape
    assert Graph(model).value("w0") is None


@pytest.mark.parametrize("wrong", [step("Reshape", "odd"), step("Transpose", perm=[0, 0])], ids=["reshape", "transpose"])
def test_a_step_that_does_not_fit_is_named(wrong: NodeProto) -> None:
    model = chained(clone_of(wrong), more={"odd": np.array([5, 5], np.int64)})
    with pytest.raises(
        ModelError, match=rf"'w0' \({wrong.op_type}\) does not fit the constant it reads: .*; export the model anew"
    ):
        Graph(model).value("w0")


def test_a_tensor_that_is_too_short_is_named() -> None:
    model = chained(step("Identity"))
    model.graph.initializer[0].raw_data = b"\0" * 7
    with pytest.raises(ModelError, match="the stored tensor 'w' cannot be read"):
        Graph(model).value("w0")


def test_constants_that_are_no_tensors_are_not_stored() -> None:
    node = helper.make_node("Constant", [], ["c"], value_float=2.0)
    model = build([node, helper.make_node("Clip", ["x", "", "c"], ["y"])], {"x": ("n",)}, ["y"])
    graph = Graph(model)
    assert graph.tensors == {}
    assert graph.constant_names == {"c"}  # it depends on no input for all that
    assert "" not in graph.consumers


def test_subgraphs_of_every_kind_of_attribute() -> None:
    inner = with_if().graph
    node = helper.make_node("Any", ["x"], ["y"], one=inner, many=[inner, inner])
    assert len(list(subgraphs(node))) == 3
    assert captured(helper.make_graph([node], "around", [], [])) == {"x"} | captured(inner)


def test_fresh_names_are_in_use_nowhere() -> None:
    model = with_if()
    (branches,) = (node for node in model.graph.node if node.op_type == "If")
    inside = {name for graph in subgraphs(branches) for node in graph.node for name in node.output}
    assert inside
    graph = Graph(model)
    for name in (*inside, "x", *(t.name for t in model.graph.initializer)):
        assert graph.fresh(name) == f"{name}_2"
    branches.name = "node"
    assert graph.fresh("node") == "node_2"
    assert graph.fresh("nobody") == "nobody"


@pytest.mark.parametrize(
    ("op", "inputs", "shape", "reason"),
    [
        ("Conv", ["x", "w"], (24, 48), "a weight of rank 2 is no convolution kernel"),
        ("ConvTranspose", ["x", "w"], (24, 48), "a weight of rank 2 is no convolution kernel"),
        ("Gemm", ["x", "w"], (2, 24, 24), "a weight of rank 3 is no matrix"),
    ],
)
def test_weights_of_a_wrong_rank_are_skipped(op: str, inputs: list[str], shape: tuple[int, ...], reason: str) -> None:
    model = build([helper.make_node(op, inputs, ["y"], name="odd")], {"x": ("n", 24)}, [], {"w": random(0, *shape)})
    layers, skipped = find_layers(Graph(model), ALL)
    assert layers == []
    assert [(s.node, s.reason) for s in skipped] == [("odd", reason)]
