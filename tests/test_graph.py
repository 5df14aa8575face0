"""Finding layers, loading, saving: what is pruned, what stays and why, and that no file is ever half written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from relrep_onnx.graph import (
    Graph,
    check_external,
    check_target,
    count_zeros,
    data_files,
    files_of,
    find_layers,
    input_files,
    load,
    model_hash,
    plan_stages,
    raise_opset,
    read_weight,
    set_metadata,
    stage_model,
    staged,
    with_layer,
    without_data,
    write_layer,
)
from relrep_onnx.graph.external import stored_tensors
from relrep_onnx.types import Array, ConfigError, Layer, ModelError, RepairedLayer, Selection, Skipped
from tests import models
from tests.models import ALL, build, change, constant, only_layer, random, run, single, stored

# Finding layers


def find(model: ModelProto, **selection: Any) -> tuple[list[Layer], list[Skipped]]:
    return find_layers(Graph(model), Selection(**{"min_size": 1, **selection}))


def gemm(x: str = "x", w: str = "w", y: str = "y", name: str = "layer", **attributes: Any) -> Any:
    return helper.make_node("Gemm", [x, w], [y], name=name, **attributes)


def matmul(x: str = "x", w: str = "w", y: str = "y", name: str = "layer") -> Any:
    return helper.make_node("MatMul", [x, w], [y], name=name)


W = random(0, 8, 8)
SQUARE = {"x": (4, 8)}


def depthwise() -> ModelProto:
    return single("Conv", (1, 4, 6, 6), (8, 1, 3, 3), group=4).model


def depthwise_transposed() -> ModelProto:
    return single("ConvTranspose", (1, 4, 6, 6), (4, 2, 3, 3), group=4).model


def four_axes() -> ModelProto:
    return single("Conv", (1, 2, 3, 3, 3, 3), (4, 2, 2, 2, 2, 2)).model


def computed() -> ModelProto:
    nodes = [helper.make_node("Mul", ["v", "half"], ["w"]), matmul()]
    return build(nodes, SQUARE, ["y"], {"v": W, "half": np.array(0.5, np.float32)})


def attention() -> ModelProto:
    return build([helper.make_node("MatMul", ["x", "z"], ["y"], name="layer")], {"x": (4, 8), "z": (8, 4)}, ["y"])


def both_constant() -> ModelProto:
    nodes = [helper.make_node("MatMul", ["v", "w"], ["c"], name="layer"), helper.make_node("Add", ["x", "c"], ["y"])]
    return build(nodes, {"x": (8, 8)}, ["y"], {"v": W, "w": W})


def constant_activation() -> ModelProto:
    nodes = [helper.make_node("Exp", ["v"], ["e"]), gemm("e"), helper.make_node("Add", ["x", "y"], ["z"])]
    return build(nodes, {"x": (8, 8)}, ["z"], {"v": W, "w": W})


def quantized() -> ModelProto:
    tensors: dict[str, Array] = {"q": np.ones((8, 8), np.int8), "s": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["w"]), matmul()]
    return build(nodes, SQUARE, ["y"], tensors)


def quantized_transposed() -> ModelProto:
    tensors: dict[str, Array] = {"q": np.ones((8, 8), np.int8), "s": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["d"]),
        helper.make_node("Transpose", ["d"], ["w"]),
        matmul(),
    ]
    return build(nodes, SQUARE, ["y"], tensors)


def int8() -> ModelProto:
    nodes = [helper.make_node("Cast", ["q"], ["w"], to=TensorProto.FLOAT), matmul()]
    return build(nodes, SQUARE, ["y"], {"q": np.ones((8, 8), np.int8)})


def cast_to_integers() -> ModelProto:
    nodes = [
        helper.make_node("Cast", ["v"], ["i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["w"], to=TensorProto.FLOAT),
        matmul(),
    ]
    return build(nodes, SQUARE, ["y"], {"v": W})


def tied_embedding() -> ModelProto:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["x"], name="embed"),
        helper.make_node("Transpose", ["w"], ["wt"]),
        matmul(w="wt"),
    ]
    return build(nodes, {"ids": (4,)}, ["y"], {"w": W}, dtype=np.int64)


def weight_is_output() -> ModelProto:
    return models.with_outputs(build([matmul()], SQUARE, ["y"], {"w": W}), ["y", "w"])


def moved_weight_is_output() -> ModelProto:
    return build([helper.make_node("Transpose", ["w"], ["wt"]), matmul(w="wt")], SQUARE, ["y", "wt"], {"w": W})


def users_feed_each_other() -> ModelProto:
    return build([matmul(y="h"), matmul(x="h", name="other")], SQUARE, ["y"], {"w": W})


def read_both_ways() -> ModelProto:
    nodes = [gemm(y="a"), gemm(y="b", name="other", transB=1), helper.make_node("Add", ["a", "b"], ["y"])]
    return build(nodes, SQUARE, ["y"], {"w": W})


def read_by_two_operators() -> ModelProto:
    nodes = [gemm(y="a"), matmul(y="b", name="other"), helper.make_node("Add", ["a", "b"], ["y"])]
    return build(nodes, SQUARE, ["y"], {"w": W})


def read_on_both_sides() -> ModelProto:
    nodes = [matmul(y="a"), matmul(x="w", w="z", y="b", name="other")]
    return build(nodes, {"x": (4, 8), "z": (8, 4)}, ["a", "b"], {"w": W})


def weight_is_bias_too() -> ModelProto:
    return build([helper.make_node("Gemm", ["x", "w", "w"], ["y"], name="layer")], {"x": (8, 8)}, ["y"], {"w": W})


def read_in_a_body() -> ModelProto:
    body: dict[str, Any] = {
        "then_branch": helper.make_graph([helper.make_node("MatMul", ["y", "w"], ["t"])], "t", [], [models.value("t", None)]),
        "else_branch": helper.make_graph([helper.make_node("Identity", ["y"], ["e"])], "e", [], [models.value("e", None)]),
    }
    nodes = [matmul(), helper.make_node("If", ["yes"], ["z"], name="if", **body)]
    return build(nodes, SQUARE, ["z"], {"w": W, "yes": np.array(True)})


def not_a_number() -> ModelProto:
    return build([matmul()], SQUARE, ["y"], {"w": np.where(W < -1, np.float32(np.nan), W)})


def dynamic_bias() -> ModelProto:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["b"], keepdims=0),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer"),
    ]
    return build(nodes, SQUARE, ["y"], {"w": W})


def first_operand() -> ModelProto:
    return build([helper.make_node("Gemm", ["w", "x"], ["y"], name="layer")], {"x": (8, 4)}, ["y"], {"w": W})


def alpha_zero() -> ModelProto:
    return build([gemm(alpha=0.0)], SQUARE, ["y"], {"w": W})


def vector() -> ModelProto:
    return build([matmul()], SQUARE, ["y"], {"w": W[0]})


def empty() -> ModelProto:
    return build([matmul()], {"x": (4, 0)}, ["y"], {"w": np.zeros((0, 8), np.float32)})


def reshaped_at_run_time() -> ModelProto:
    nodes = [helper.make_node("Shape", ["w2"], ["s"]), helper.make_node("Reshape", ["v", "s"], ["w"]), matmul()]
    return build(nodes, {"x": (4, 8), "w2": (8, 8)}, ["y"], {"v": W})


STAYS: Mapping[str, tuple[Callable[[], ModelProto], Mapping[str, Any], str]] = {
    "depthwise": (depthwise, {}, "depthwise convolution"),
    "depthwise-transposed": (depthwise_transposed, {}, "depthwise convolution"),
    "four-axes": (four_axes, {}, "4 spatial axes; 1 to 3 are supported"),
    "small": (lambda: build([matmul()], SQUARE, ["y"], {"w": W}), {"min_size": 65}, "64 weights, fewer than the minimum of 65"),
    "computed": (computed, {}, "its weight is computed from constants; fold them first"),
    "attention": (attention, {}, "no constant operand"),
    "reshaped-at-run-time": (reshaped_at_run_time, {}, "no constant operand"),
    "both-constant": (both_constant, {}, "a constant expression"),
    "constant-activation": (constant_activation, {}, "a constant expression"),
    "by-name": (attention, {"nodes_to_exclude": ("layer",)}, "no constant operand"),
    "excluded-name": (weight_is_output, {"nodes_to_exclude": ("layer",)}, "excluded by name"),
    "excluded-pattern": (weight_is_output, {"nodes_to_exclude": ("la.*",)}, "excluded by name"),
    "excluded-weight": (weight_is_output, {"nodes_to_exclude": ("w",)}, "excluded by name"),
    "quantized": (quantized, {}, r"quantized weight \(behind DequantizeLinear\)"),
    "quantized-transposed": (quantized_transposed, {}, r"quantized weight \(behind DequantizeLinear\)"),
    "int8": (int8, {}, "weights of type int8"),
    "cast-to-integers": (cast_to_integers, {}, "cast to integers"),
    "tied": (tied_embedding, {}, r"its weight 'w' is also read by 'embed' \(Gather\)"),
    "weight-is-output": (weight_is_output, {}, "its weight 'w' is also an output of the graph"),
    "moved-weight-is-output": (moved_weight_is_output, {}, "its weight 'w' is also an output of the graph"),
    "feed-each-other": (users_feed_each_other, {}, "its weight 'w' is shared by nodes that feed each other"),
    "both-ways": (read_both_ways, {}, "its weight 'w' is read by several nodes in different ways"),
    "two-operators": (read_by_two_operators, {}, "its weight 'w' is read by several nodes in different ways"),
    "both-sides": (read_on_both_sides, {}, "its weight 'w' is also read by 'other'"),
    "bias-too": (weight_is_bias_too, {}, "its weight 'w' is also read by 'layer'"),
    "in-a-body": (read_in_a_body, {}, r"its weight 'w' is also read by 'if' \(If\)"),
    "nan": (not_a_number, {}, "its weight 'w' holds NaN, infinity or numbers beyond"),
    "dynamic-bias": (dynamic_bias, {}, "its bias is computed at run time"),
    "first-operand": (first_operand, {}, "the constant is the first operand of Gemm"),
    "alpha-0": (alpha_zero, {}, "alpha is 0"),
    "vector": (vector, {}, "one-dimensional operand"),
    "empty": (empty, {}, "an empty weight"),
    "one-user-excluded": (read_by_two_operators, {"nodes_to_exclude": ("other",)}, r"also read by 'other' \(MatMul\)"),
    "one-user-of-another-type": (read_by_two_operators, {"op_types": ("Gemm",)}, r"also read by 'other' \(MatMul\)"),
}


@pytest.mark.parametrize("case", STAYS)
def test_a_weight_that_stays_says_why(case: str) -> None:
    make, selection, reason = STAYS[case]
    layers, skipped = find(make(), **selection)
    assert layers == []
    reasons = [entry.reason for entry in skipped if entry.node == "layer"]
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])


def test_only_asked_operators_are_pruned() -> None:
    layers, skipped = find(models.convnet(), op_types=("Conv",))
    assert [layer.name for layer in layers] == ["conv0", "conv1"]
    assert [(s.node, s.reason) for s in skipped if s.op == "Gemm"] == [("fc", "operator type Gemm was not asked for")]
    by_pattern, _ = find(models.convnet(), op_types=("C.*|Gemm",))
    assert [layer.name for layer in by_pattern] == ["conv0", "conv1", "fc"]


def test_minimum_size_is_inclusive() -> None:
    assert len(find(build([matmul()], SQUARE, ["y"], {"w": W}), min_size=64)[0]) == 1


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"nodes_to_exclude": ("conv9",)}, r"nodes to exclude: nothing is called 'conv9'; near names: .*'conv1'"),
        ({"nodes_to_exclude": ("fc", "zzz")}, r"nothing is called 'zzz'; near names: '"),
        ({"nodes_to_exclude": ("conv",)}, r"nothing is called 'conv'; near names: .*'conv0'"),
        ({"nodes_to_exclude": ("(",)}, r"'\(' is no valid regular expression"),
        ({"op_types": ("Convolution",)}, r"operator types: nothing is called 'Convolution'; near names: 'Conv'"),
        ({"op_types": ("MatMul",)}, r"nothing is called 'MatMul'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(models.convnet(), **selection)


def test_a_pattern_in_a_model_without_operators_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the model has none at all"):
        find(build([helper.make_node("Relu", ["x"], ["y"])], SQUARE, ["y"]), op_types=("Conv",))


def test_a_name_with_special_characters_can_be_given_as_it_is() -> None:
    model = build([matmul(name="/block.0/fc[1]+")], SQUARE, ["y"], {"w": W})
    assert [s.reason for s in find(model, nodes_to_exclude=("/block.0/fc[1]+",))[1]] == ["excluded by name"]


@pytest.mark.parametrize(
    ("node", "extra"),
    [
        (
            helper.make_node("LSTM", ["x3", "lw", "lr"], ["y"], name="big", hidden_size=8),
            {"lw": random(1, 1, 32, 8), "lr": random(2, 1, 32, 8)},
        ),
        (helper.make_node("Einsum", ["x", "lw"], ["y"], name="big", equation="ij,jk->ik"), {"lw": W}),
    ],
    ids=["LSTM", "Einsum"],
)
def test_a_large_constant_of_an_unsupported_operator_is_listed(node: Any, extra: dict[str, Array]) -> None:
    model = build([node], {"x": (4, 8), "x3": (2, 4, 8)}, ["y"], extra)
    layers, skipped = find(model, min_size=64)
    assert layers == []
    assert [(s.node, s.op, s.reason) for s in skipped] == [
        ("big", node.op_type, "operator not supported; its constant 'lw' stays"),
    ]
    assert find(model, min_size=10_000)[1] == []


def test_weights_inside_if_and_loop_bodies_are_listed() -> None:
    def body(name: str, y: str) -> Any:
        nodes = [matmul("x", "w", f"{y}_", f"{name}-product"), helper.make_node("Relu", [f"{y}_"], [y])]
        return helper.make_graph(nodes, name, [], [models.value(y, None)], [models.tensor(W, "w")])

    loop = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["still"]),
            helper.make_node("If", ["keep"], ["nested"], name="if", then_branch=body("then", "t"), else_branch=body("else", "e")),
            helper.make_node("Add", ["nested", "state"], ["next"]),
        ],
        "loop",
        [models.value("i", (), np.int64), models.value("keep", (), np.bool_), models.value("state", (4, 8))],
        [models.value("still", (), np.bool_), models.value("next", None)],
    )
    node = helper.make_node("Loop", ["n", "yes", "x"], ["y"], name="loop", body=loop)
    model = build([node], SQUARE, ["y"], {"n": np.array(2), "yes": np.array(True)})
    assert run(model, {"x": random(0, 4, 8)})["y"].shape == (4, 8)
    layers, skipped = find(model)
    assert layers == []
    reason = "inside the body of 'loop' (Loop), which feeds itself from one iteration to the next; export the model without it"
    assert [(s.node, s.reason) for s in skipped] == [("else-product", reason), ("then-product", reason)]


def test_weights_inside_model_local_functions_are_listed() -> None:
    nodes = [constant("w", W), matmul("a", "w", "b", "product")]
    function = helper.make_function("local", "Block", ["a"], ["b"], nodes, [helper.make_opsetid("", models.OPSET)])
    call = helper.make_node("Block", ["h"], ["y"], name="call", domain="local")
    model = build([matmul(w="v", y="h"), call], SQUARE, ["y"], {"v": W}, functions=[function])
    layers, skipped = find(model)
    assert [layer.name for layer in layers] == ["layer"]
    reason = "inside the model-local function 'Block'; inline the functions first, with onnx.inliner.inline_local_functions"
    assert [(s.node, s.reason) for s in skipped] == [("product", reason)]


@pytest.mark.parametrize(("opset", "inside"), [(18, 18), (18, 16), (13, 13)])
def test_a_newer_operator_set_keeps_what_functions_compute_and_what_a_model_says_about_itself(opset: int, inside: int) -> None:
    nodes = [helper.make_node("Neg", ["a"], ["n"], name="inner"), helper.make_node("Exp", ["n"], ["b"])]
    function = helper.make_function("local", "Block", ["a"], ["b"], nodes, [helper.make_opsetid("", inside)])
    calls = [
        helper.make_node("Block", ["h"], ["i"], name="first", domain="local"),
        helper.make_node("Block", ["i"], ["y"], name="inner", domain="local"),
    ]
    model = build([matmul(y="h"), *calls], SQUARE, ["y"], {"w": W}, functions=[function], opset=opset)
    for entries in (model.metadata_props, model.graph.metadata_props):
        entries.add(key="key", value="value")
    model.graph.quantization_annotation.add(tensor_name="h")
    raised = raise_opset(model, 20)
    assert (Graph(raised).opset, raised.producer_name) == (20, model.producer_name)
    for field in ("metadata_props", "quantization_annotation"):
        assert getattr(raised.graph, field) == getattr(model.graph, field)
    assert raised.metadata_props == model.metadata_props
    feeds = {"x": random(1, 4, 8)}
    np.testing.assert_array_equal(run(raised, feeds)["y"], run(model, feeds)["y"])


def test_functions_that_cannot_be_raised_are_refused() -> None:
    nodes = [helper.make_node("NoSuchOperator", ["a"], ["b"])]
    function = helper.make_function("local", "Block", ["a"], ["b"], nodes, [helper.make_opsetid("", 9)])
    call = helper.make_node("Block", ["h"], ["y"], domain="local")
    model = build([matmul(y="h"), call], SQUARE, ["y"], {"w": W}, functions=[function])
    with pytest.raises(ModelError, match="operator set 17, 20 is needed, and ONNX cannot convert it"):
        raise_opset(model, 20)


def test_an_operator_of_another_domain_is_not_taken_for_the_standard_one() -> None:
    body = [helper.make_node("Identity", ["a"], ["y"])]
    function = helper.make_function("local", "MatMul", ["a", "b"], ["y"], body, [helper.make_opsetid("", models.OPSET)])
    call = helper.make_node("MatMul", ["x", "w"], ["y"], name="call", domain="local")
    layers, skipped = find(build([call], SQUARE, ["y"], {"w": W}, functions=[function]))
    assert layers == []
    assert [s.reason for s in skipped] == ["operator not supported; its constant 'w' stays"]


def test_users_side_by_side_make_one_layer() -> None:
    layers, _ = find(models.shared_weight())
    assert [layer.name for layer in layers] == ["first", "left", "last"]
    shared = layers[1]
    assert shared.weight == "shared.w"
    assert [(use.node, use.activation, use.output) for use in shared.uses] == [("left", "x", "left"), ("right", "a", "right")]


def test_a_layer_that_waits_for_a_culprit_is_not_blamed() -> None:
    """`fine` has one user behind `culprit`, whose own users feed each other; only the latter must go."""
    tensors = {"culprit.w": W, "fine.w": random(1, 8, 8)}
    nodes = [
        matmul("x", "fine.w", "f", "fine"),
        matmul("x", "culprit.w", "c", "culprit"),
        matmul("c", "culprit.w", "d", "culprit2"),
        matmul("d", "fine.w", "g", "fine2"),
        helper.make_node("Add", ["f", "g"], ["y"]),
    ]
    layers, skipped = find(build(nodes, SQUARE, ["y"], tensors))
    assert [layer.name for layer in layers] == ["fine"]
    assert [s.node for s in skipped] == ["culprit", "culprit2"]


def test_two_shared_layers_that_wait_for_each_other_lose_one() -> None:
    tensors = {"a.w": W, "b.w": random(1, 8, 8)}
    nodes = [
        matmul("x", "a.w", "a1", "a1"),
        matmul("a1", "b.w", "b1", "b1"),
        matmul("x", "b.w", "b2", "b2"),
        matmul("b2", "a.w", "a2", "a2"),
        helper.make_node("Add", ["b1", "a2"], ["y"]),
    ]
    layers, skipped = find(build(nodes, SQUARE, ["y"], tensors))
    assert len(layers) == 1
    assert len(skipped) == 2


def test_names_of_layers_are_unique_and_found_again() -> None:
    tensors = {f"w{i}": random(i, 8, 8) for i in range(5)}
    names = ["same", "o2", "same", "", "same"]
    nodes: list[Any] = []
    for i, name in enumerate(names):
        y = "o2" if i == 2 else "y" if i == 4 else f"t{i}"
        nodes.append(matmul("x" if i == 0 else nodes[-1].output[0], f"w{i}", y, name))
    model = build(nodes, SQUARE, ["y"], tensors)
    layers, _ = find(model)
    assert [layer.name for layer in layers] == ["same", "o2", "o2_2", "t3", "y"]
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(read_weight(Graph(model), layer), tensors[f"w{i}"].T)


@pytest.mark.parametrize(
    ("what", "wanted"), [("batch norm", True), ("also an output", False), ("another reader", False), ("relu", False)]
)
def test_normalized_says_that_only_a_batch_norm_reads_the_output(what: str, wanted: bool) -> None:
    model = models.convnet()
    if what == "also an output":
        model = models.with_outputs(model, ["out", "c0"])
    elif what == "another reader":
        model.graph.node.append(helper.make_node("Relu", ["c0"], ["r"]))
    elif what == "relu":
        model.graph.node[1].CopyFrom(helper.make_node("Relu", ["c0"], ["n0"]))
    layers, _ = find(model)
    assert layers[0].normalized is wanted
    assert [layer.normalized for layer in layers[1:]] == [True, False]


def test_two_writers_of_one_tensor_are_refused() -> None:
    model = build([matmul(), helper.make_node("Relu", ["x"], ["y"])], SQUARE, [], {"w": W})
    with pytest.raises(ModelError, match="two nodes write the tensor 'y'"):
        Graph(model)


# Loading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the model .*No such file"),
        (b"", "holds no graph"),
        (b"\xff\xfe not a model at all" * 9, "is not an ONNX model"),
        (b"PK\x03\x04" + bytes(200), "is not an ONNX model"),
        ("truncated", "is not an ONNX model"),
        ("folder", "cannot read the model .*[Dd]irectory"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content == "folder":
        path.mkdir()
    elif content == "truncated":
        path.write_bytes(models.convnet().SerializeToString()[:-500])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_loading_an_object_copies_it() -> None:
    model = models.convnet()
    before = model.SerializeToString()
    loaded = load(model)
    assert (loaded.path, loaded.name, loaded.notes, loaded.external) == (None, "the given model", (), {})
    for layer in find(loaded.model)[0]:
        write_layer(loaded.model, layer, change(loaded.model, layer))
    assert loaded.model.SerializeToString() != before
    assert model.SerializeToString() == before


@pytest.mark.parametrize("kind", [str, Path])
def test_loading_a_path(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    path = tmp_path / "model.onnx"
    models.save(models.convnet(), path)
    loaded = load(kind(path))
    assert loaded.model == models.convnet()
    assert (loaded.path, loaded.name) == (path, str(path))


def test_external_data_is_loaded(tmp_path: Path) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    loaded = load(tmp_path / "model.onnx")
    assert set(loaded.external.values()) == {"weights.bin"}
    assert set(loaded.external) == {t.name for t in loaded.model.graph.initializer}
    assert not any(uses_external_data(t) for t in loaded.model.graph.initializer)
    assert model_hash(loaded.model) == model_hash(load(models.convnet()).model)


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("external", "storage"):
        monkeypatch.setattr(f"relrep_onnx.graph.{room}.MESSAGE", 0)
    monkeypatch.setattr("relrep_onnx.graph.external.SMALL", 0)


@pytest.mark.usefixtures("all_large")
def test_weights_of_a_large_model_wait_in_their_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    models.save(models.convnet(), path, data="weights.bin")
    lazy, eager = load(path, lazily=True), load(path)
    assert lazy.large
    assert all(uses_external_data(t) for t in lazy.model.graph.initializer)
    assert not any(uses_external_data(t) for t in eager.model.graph.initializer)
    assert (lazy.external, model_hash(lazy.model)) == (eager.external, model_hash(eager.model))
    found, _ = find(lazy.model)
    assert found == find(eager.model)[0]
    for layer in found:
        np.testing.assert_array_equal(read_weight(Graph(lazy.model), layer), read_weight(Graph(eager.model), layer))
    assert without_data(lazy.model, ()) == eager.model
    assert without_data(lazy.model, {"conv0.w"}) == without_data(eager.model, {"conv0.w"})
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"the external data 'weights.bin' of tensor .* cannot be read: No such file"):
        read_weight(Graph(lazy.model), found[0])


@pytest.mark.usefixtures("all_large")
def test_only_initializers_wait(tmp_path: Path) -> None:
    onnx.save_model(
        if_with_weights(),
        str(tmp_path / "model.onnx"),
        save_as_external_data=True,
        location="data",
        size_threshold=0,
        convert_attribute=True,
    )
    lazy = load(tmp_path / "model.onnx", lazily=True)
    waiting = [t.name for t in stored_tensors(lazy.model) if uses_external_data(t)]
    assert waiting == [t.name for t in lazy.model.graph.initializer] == ["zero"]
    assert len(lazy.external) > 1


def test_a_stage_over_2_gb_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(models.convnet())
    layers, _ = find(graph.model)
    stage = plan_stages(graph, layers)[1]
    assert stage_model(graph, stage, {"x": "tensor(float)"}).graph.initializer

    def too_large(tensor: object) -> object:
        raise EncodeError("Failed to serialize proto")  # as a message of more than 2 GB does when it is copied

    monkeypatch.setattr("relrep_onnx.graph.stages.whole", too_large)
    with pytest.raises(ModelError, match="between two pruned layers is over 2 GB: split the largest tensor"):
        stage_model(graph, stage, {"x": "tensor(float)"})


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.usefixtures("all_large")
def test_bytes_of_stored_tensors(tmp_path: Path, lazily: bool) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    graph = Graph(load(tmp_path / "model.onnx", lazily=lazily).model)
    assert all(graph.bytes_of(name) == graph.stored(name).nbytes > 0 for name in graph.tensors)


@pytest.mark.usefixtures("all_large")
def test_a_waiting_tensor_holds_what_its_shape_says(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    models.save(models.convnet(), path, data="weights.bin")
    model = ModelProto.FromString(path.read_bytes())
    model.graph.initializer[0].dims[0] += 1
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"holds \d+ bytes, but its shape .* need"):
        load(path, lazily=True)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"the external data 'weights.bin' of tensor .* cannot be read"):
        load(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    models.save(models.convnet(), folder / "model.onnx", data="weights.bin")
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    model = ModelProto.FromString((folder / "model.onnx").read_bytes())
    for entry in (e for t in model.graph.initializer for e in t.external_data if e.key == "location"):
        entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"the external data '{location}' .* cannot be read"):
        load(folder / "model.onnx")


def test_an_object_with_external_data_is_refused(tmp_path: Path) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(ModelError, match="give the model's path instead"):
        load(model)


@pytest.mark.parametrize("flat", [True, False])
def test_a_sparse_initializer_becomes_dense(flat: bool) -> None:
    dense = np.where(np.abs(W) > 1, W, 0)
    model = build([matmul()], SQUARE, ["y"], {"w": dense})
    rows, cols = np.nonzero(dense)
    places = rows * 8 + cols if flat else np.stack([rows, cols], axis=1)
    sparse = helper.make_sparse_tensor(
        models.tensor(dense[rows, cols], "w"), models.tensor(places.astype(np.int64), "places"), dense.shape
    )
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse)
    before = model.SerializeToString()
    loaded = load(model)
    assert loaded.notes == ("the sparse initializer 'w' was made dense",)
    np.testing.assert_array_equal(stored(loaded.model, "w"), dense)
    assert not loaded.model.graph.sparse_initializer
    assert len(find(loaded.model)[0]) == 1
    assert model.SerializeToString() == before


def if_with_weights() -> ModelProto:
    """Both branches store a tensor of the same name, and Constant nodes unnamed ones."""

    def body(seed: int, y: str) -> Any:
        nodes = [helper.make_node("MatMul", ["x", "w"], [y])]
        return helper.make_graph(nodes, y, [], [models.value(y, None)], [models.tensor(random(seed, 8, 8), "w")])

    nodes = [
        constant("c", random(5, 8)),
        constant("k", random(6, 8)),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["flag"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=body(1, "t"), else_branch=body(2, "e")),
        helper.make_node("Add", ["z", "c"], ["zc"]),
        helper.make_node("Add", ["zc", "k"], ["y"]),
    ]
    return build(nodes, SQUARE, ["y"], {"zero": np.array(0, np.float32)})


def test_external_data_of_bodies_and_constant_nodes_survives(tmp_path: Path) -> None:
    model = if_with_weights()
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    copy = models.clone(model)
    onnx.save_model(
        copy,
        str(source / "model.onnx"),
        save_as_external_data=True,
        location="data",
        size_threshold=0,
        convert_attribute=True,
    )
    loaded = load(source / "model.onnx")
    with staged(target / "model.onnx") as stage:
        stage.write(loaded.model, loaded.external)
        stage.commit()
    assert load(target / "model.onnx").model == loaded.model
    assert loaded.model == model
    session = onnxruntime.InferenceSession(str(target / "model.onnx"))
    for x in ({"x": np.abs(random(0, 4, 8))}, {"x": -np.abs(random(0, 4, 8))}):
        np.testing.assert_array_equal(session.run(None, x)[0], run(model, x)["y"])
    assert len(list(target.iterdir())) == 2


def test_a_constant_that_has_an_external_tensors_name_stays_inside(tmp_path: Path) -> None:
    """ONNX Runtime reads shapes before external data."""
    shape = helper.make_node("Constant", [], ["shape"], value=models.tensor(np.array([-1, 2, 4]), "w"))
    model = build([matmul(y="h"), shape, helper.make_node("Reshape", ["h", "shape"], ["y"])], SQUARE, ["y"], {"w": W})
    models.save(model, tmp_path / "in.onnx", data="weights.bin")
    loaded = load(tmp_path / "in.onnx")
    assert loaded.external == {"w": "weights.bin"}
    write(tmp_path / "out.onnx", loaded.model, loaded.external)
    assert load(tmp_path / "out.onnx").external.keys() == {"w"}
    onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))


def with_default(tensor: TensorProto) -> ModelProto:
    """A call of a function that adds a tensor, which is an attribute's default."""
    value = helper.make_node("Constant", [], ["k"])
    value.attribute.add(name="value", ref_attr_name="addend", type=onnx.AttributeProto.TENSOR)
    nodes = [value, helper.make_node("Add", ["a", "k"], ["b"])]
    default = helper.make_attribute("addend", tensor)
    function = helper.make_function("local", "Block", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)], [], [default])
    return build(
        [matmul(y="h"), helper.make_node("Block", ["h"], ["y"], domain="local")], SQUARE, ["y"], {"w": W}, functions=[function]
    )


@pytest.mark.parametrize("place", ["data", "../data"])
def test_defaults_of_functions_may_lie_in_files_too(tmp_path: Path, place: str) -> None:
    (tmp_path / "in").mkdir()
    array = random(3, 8)
    array.tofile(tmp_path / "in" / place)
    outside = TensorProto(name="k", dims=[8], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value=place)
    path = tmp_path / "in" / "model.onnx"
    path.write_bytes(with_default(outside).SerializeToString())
    if place == "data":
        loaded = load(path).model
        assert loaded == with_default(helper.make_tensor("k", TensorProto.FLOAT, [8], array.tobytes(), raw=True))
    else:
        for reader in (load, check_external):
            with pytest.raises(ModelError, match=r"'\.\./data' of tensor 'k' .* outside the model's folder"):
                reader(path)


# Saving


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, model: ModelProto, external: Mapping[str, str] | None = None, *, error: Exception | None = None) -> None:
    """Writes a model; `error` happens before it is committed."""
    with staged(path) as stage:
        stage.write(model, external or {})
        if error is not None:
            raise error
        stage.commit()


def everything_external(model: ModelProto, location: str = "weights.bin") -> dict[str, str]:
    return {t.name: location for t in model.graph.initializer}


def test_a_commit_moves_the_model_into_place(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    with staged(target) as stage:
        stage.write(models.convnet(), {})
        assert stage.path.parent == tmp_path
        assert not target.exists()
        stage.commit()
    assert names(tmp_path) == ["out.onnx"]
    assert load(target).model == models.convnet()


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_without_a_commit_nothing_stays_and_the_old_output_is_kept(tmp_path: Path, external: bool, old: bool) -> None:
    target = tmp_path / "out.onnx"
    if old:
        write(target, models.chain(1), everything_external(models.chain(1)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = models.convnet()
    with pytest.raises(KeyError, match="gate"):
        write(target, model, everything_external(model) if external else {}, error=KeyError("gate"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_external_data_files_are_named_by_content(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    model = models.convnet()
    external = everything_external(model)
    external["fc.w"] = "other.bin"
    with staged(target) as stage:
        stage.write(model, external)
        written = stage.files()
        assert [file.parent for file in written] == [tmp_path] * 3
        assert all(file.stat().st_size for file in written)
        stage.commit()
    files = names(tmp_path)
    assert len(files) == 3
    assert "out.onnx" in files
    assert sum(bool(re.fullmatch(r"out\.onnx\.[0-9a-f]{12}(-1)?\.data", name)) for name in files) == 2
    loaded = load(target)
    assert loaded.model == load(model).model
    assert loaded.external.keys() == external.keys()
    by_file = {name: {t for t, f in loaded.external.items() if f == name} for name in set(loaded.external.values())}
    assert {"fc.w"} in by_file.values()


def test_only_external_tensors_go_outside(tmp_path: Path) -> None:
    model = models.convnet()
    write(tmp_path / "out.onnx", model, {"conv1.w": "weights.bin"})
    raw = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [t.name for t in raw.graph.initializer if uses_external_data(t)] == ["conv1.w"]
    (data,) = {ExternalDataInfo(t).location for t in raw.graph.initializer if uses_external_data(t)}
    assert (tmp_path / data).read_bytes() == stored(model, "conv1.w").tobytes()


@pytest.mark.parametrize("name", ["out.onnx", ".hidden.onnx", "out.relrep-1.onnx", "with space[1]*.onnx"])
def test_overwriting_leaves_one_data_file_and_a_model_that_loads(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    model = models.convnet()
    for seed in (0, 1, 1):
        model = models.convnet(seed)
        write(target, model, everything_external(model))
        assert len(names(tmp_path)) == 2
    assert load(target).model == load(model).model
    x = {"x": random(0, 2, 3, 8, 8)}
    session = onnxruntime.InferenceSession(str(target))
    np.testing.assert_array_equal(session.run(None, x)[0], run(model, x)["out"])


def test_overwriting_with_inner_data_removes_the_data_file(tmp_path: Path) -> None:
    model = models.convnet()
    write(tmp_path / "out.onnx", model, everything_external(model))
    write(tmp_path / "out.onnx", model)
    assert names(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("data", ["out.onnx.data", "weights.bin"])
def test_a_data_file_of_someone_else_is_never_removed(tmp_path: Path, data: str) -> None:
    models.save(models.convnet(), tmp_path / "out.onnx", data=data)
    loaded = load(tmp_path / "out.onnx")
    write(tmp_path / "out.onnx", loaded.model, loaded.external)
    assert data in names(tmp_path)
    assert len(names(tmp_path)) == 3


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True, text=True)
    return int(done.stdout)


@pytest.mark.parametrize("name", ["out.onnx", "out[1].onnx"])
def test_temporaries_of_dead_processes_are_removed(tmp_path: Path, name: str) -> None:
    dead, alive = dead_process(), os.getppid()
    gone = [f".{name}.relrep-{dead}.tmp", f".{name}.0123456789ab.data.relrep-{dead}.tmp"]
    gone += [f".{name}.relrep-{'9' * 30}.tmp", f".{name}.relrep-what.tmp"]
    stays = [f".{name}.relrep-{alive}.tmp", f".other.relrep-{dead}.tmp", f"{name}.bak"]
    for file in (*gone, *stays):
        (tmp_path / file).write_bytes(b"x")
    write(tmp_path / name, models.chain(1))
    assert names(tmp_path) == sorted([name, *stays])


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, folder: str, external: bool) -> None:
    if folder == "file":
        (tmp_path / "file").write_bytes(b"")
    target = tmp_path / folder / "out.onnx"
    model = models.chain(1)
    with pytest.raises(ModelError, match=r"cannot write '.*out\.onnx': (No such file|Not a dir)"):
        write(target, model, everything_external(model) if external else {})


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, other: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    model = models.convnet()
    with pytest.raises(ModelError, match="No space left on device"):
        write(tmp_path / "out.onnx", model, everything_external(model))
    assert names(tmp_path) == []


def test_an_output_without_a_target_goes_away() -> None:
    with staged(None) as stage:
        stage.write(models.chain(1), {})
        (path,) = stage.files()
        assert load(path).model == models.chain(1)
    assert not path.parent.exists()


def test_the_files_of_a_model(tmp_path: Path) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    with input_files(load(tmp_path / "model.onnx")) as files:
        assert files == [tmp_path / "model.onnx", tmp_path / "weights.bin"]
    with input_files(load(models.convnet())) as files:
        assert [load(file).model for file in files] == [models.convnet()]
    assert not files[0].exists()


@pytest.mark.parametrize(("target", "message"), [("", "is a folder; give a file name"), ("missing/out.onnx", "does not exist")])
def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_target(tmp_path / target)
    assert names(tmp_path) == []
    check_target(tmp_path / "out.onnx")


def test_the_files_that_a_path_stands_for(tmp_path: Path) -> None:
    models.save(models.convnet(), tmp_path / "model.onnx", data="weights.bin")
    assert files_of(tmp_path / "model.onnx") == [tmp_path / "model.onnx", tmp_path / "weights.bin"]
    (tmp_path / "text.onnx").write_text("no model")
    assert files_of(tmp_path / "text.onnx") == [tmp_path / "text.onnx"]
    assert files_of(models.convnet()) == []


def test_the_data_files_beside_a_target(tmp_path: Path) -> None:
    own = "out.onnx.0123456789ab.data"
    for name, data in (("out.onnx", own), ("other.onnx", "out.onnx.data")):
        models.save(models.convnet(), tmp_path / name, data=data)
    assert data_files(tmp_path / "out.onnx") == [tmp_path / own]
    assert data_files(tmp_path / "other.onnx") == []
    assert data_files(tmp_path / "other.onnx", tmp_path / "out.onnx") == []
    assert data_files(tmp_path / "out.onnx", tmp_path / "other.onnx") == []


def test_zeros_are_counted_by_layer() -> None:
    model = models.convnet()
    layer = find(model)[0][2]
    weight = read_weight(Graph(model), layer)
    write_layer(model, layer, RepairedLayer(np.where(weight > 0, weight, 0), np.zeros(layer.rows), np.zeros(layer.rows)))
    assert count_zeros(Graph(model), find(model)[0]) == {"conv0": 0, "conv1": 0, "fc": int((weight <= 0).sum())}


def test_a_failed_move_is_an_error_and_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out.onnx", models.chain(1))
    before = (tmp_path / "out.onnx").read_bytes()

    def refuse(self: Path, other: Path) -> Path:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ModelError, match="Operation not permitted"):
        write(tmp_path / "out.onnx", models.convnet())
    assert names(tmp_path) == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == before


def test_an_error_of_other_code_is_not_called_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="my data set"):
        write(tmp_path / "out.onnx", models.chain(1), error=FileNotFoundError("my data set"))
    assert names(tmp_path) == []


# What stays as it was


def test_metadata_keeps_other_keys() -> None:
    model = models.chain(1)
    for key, value in (("author", "me"), ("relrep.seed", "1")):
        model.metadata_props.add(key=key, value=value)
    set_metadata(model, {"relrep.seed": "2", "relrep.repair": "affine"})
    assert [(e.key, e.value) for e in model.metadata_props] == [
        ("author", "me"),
        ("relrep.repair", "affine"),
        ("relrep.seed", "2"),
    ]
    onnx.checker.check_model(model)


def signature(model: ModelProto) -> Sequence[Any]:
    graph = model.graph
    header = (model.ir_version, [(o.domain, o.version) for o in model.opset_import], graph.name, model.producer_name)
    return (*header, list(graph.input), list(graph.output), [n.name for n in graph.node], [n.output[0] for n in graph.node])


@pytest.mark.parametrize("make", [models.convnet, models.residual, models.branching, models.with_if, models.with_sequence])
def test_writing_keeps_versions_names_and_the_order_of_inputs_and_outputs(make: Callable[[], ModelProto]) -> None:
    model = make()
    model.producer_name, model.doc_string = "exporter", "kept"
    written = models.clone(model)
    for layer in find(model)[0]:
        write_layer(written, layer, change(model, layer))
    assert signature(written) == signature(model)
    assert written.doc_string == "kept"
    onnx.checker.check_model(written, full_check=True)


def test_with_layer_leaves_the_model_alone() -> None:
    model = single("Gemm", (9, 5), (5, 4), (4,)).model
    before = model.SerializeToString()
    layer = only_layer(model)
    assert with_layer(model, layer, change(model, layer)).SerializeToString() != before
    assert model.SerializeToString() == before


@pytest.mark.parametrize("external", [False, True])
def test_the_hash_of_a_model_is_that_of_its_content(tmp_path: Path, external: bool) -> None:
    one, other = models.convnet(0), models.convnet(0)
    other.graph.initializer[0].CopyFrom(models.tensor(stored(one, "conv0.w") * 2, "conv0.w"))
    assert model_hash(one) != model_hash(other)
    models.save(one, tmp_path / "model.onnx", data="data" if external else None)
    assert model_hash(load(tmp_path / "model.onnx").model) == model_hash(one)


def test_all_selects_everything() -> None:
    assert [layer.name for layer in find_layers(Graph(models.convnet()), ALL)[0]] == ["conv0", "conv1", "fc"]
