"""Graphs as exporters make them, taken through whole runs: what can be pruned is, what cannot is named, nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper
from onnx.inliner import inline_local_functions

from relrep_onnx import Config, ModelError, Result, optimize
from relrep_onnx.inspection import inspect
from relrep_onnx.types import Array, Selection
from tests import models
from tests.models import ALL, build, constant, feeds_of, linear, random, run
from tools.bench import operators

W: Final = random(0, 8, 8)
Q: Final[Mapping[str, Array]] = {
    "q": np.arange(-32, 32, dtype=np.int8).reshape(8, 8),
    "s": np.array(0.1, np.float32),
    "z": np.array(0, np.int8),
}


def pruned(model: ModelProto, feeds: Mapping[str, Array] | None = None, **settings: Any) -> Result:
    """A quick run at half sparsity; its model opens, and keeps signature and versions."""
    config = Config(**{"sparsity": 0.5, "allocate": "uniform", "min_size": 1, "threads": 1, **settings})
    result = optimize(model, None, dict(feeds or feeds_of(model, 32)), config)
    for field in ("opset_import", "ir_version"):
        assert getattr(result.model, field) == getattr(model, field)
    for side in ("input", "output"):
        assert list(getattr(result.model.graph, side)) == list(getattr(model.graph, side))
    run(result.model, feeds or feeds_of(model, 32))
    return result


def zeros(result: Result) -> dict[str, float]:
    return {report.layer.name: report.zeros / report.layer.size for report in result.layers}


def reasons(result: Result) -> dict[str, str]:
    return {skipped.node: skipped.reason for skipped in result.skipped}


def old_and_new(opset: int, ir_version: int) -> ModelProto:
    """A convolution and two products, in operators that every operator set since 7 has."""
    tensors: dict[str, Array] = {"c": random(1, 4, 3, 3, 3), "m": random(2, 4, 6)}
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["h"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["g"], name="product"),
        linear("last", "g", "y", tensors, 6, 5, 3),
    ]
    return build(nodes, {"x": ("n", 3, 6, 6)}, ["y"], tensors, opset=opset, ir_version=ir_version)


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_operator_set(opset: int) -> None:
    model = old_and_new(opset, 13)
    try:
        run(model, feeds_of(model, 2))
    except RuntimeError as error:
        pytest.skip(f"ONNX Runtime does not know operator set {opset} yet: {error}")
    assert zeros(pruned(model)) == {"conv": 0.5, "product": 0.5, "last": 0.5}


@pytest.mark.parametrize("ir_version", range(3, onnx.IR_VERSION + 1))
def test_every_ir_version(ir_version: int) -> None:
    model = old_and_new(8, ir_version)
    try:
        run(model, feeds_of(model, 2))
    except RuntimeError as error:
        pytest.skip(f"ONNX Runtime does not know IR version {ir_version} yet: {error}")
    assert zeros(pruned(model)) == {"conv": 0.5, "product": 0.5, "last": 0.5}


def test_an_operator_set_without_a_broadcasting_add_keeps_its_products() -> None:
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], {"x": (4, 8)}, ["y"], {"w": W}, opset=6)
    (skipped,) = inspect(model, ALL).skipped
    assert skipped.reason == "operator set 6 has no Add that its bias could go into; convert the model to 7 or newer"


def behind(*nodes: NodeProto, **tensors: Array) -> ModelProto:
    """A float layer in front of some nodes that make `y` of its output `h`."""
    stored: dict[str, Array] = dict(tensors)
    return build([linear("float", "x", "h", stored, 8, 8, 5), *nodes], {"x": ("n", 8)}, ["y"], stored)


def recurrent(op: str, gates: int) -> ModelProto:
    nodes = [
        helper.make_node("Unsqueeze", ["h", "first"], ["t"]),
        helper.make_node(op, ["t", "w", "r"], ["", "y"], name="cell", hidden_size=8),
    ]
    return behind(*nodes, first=np.array([0]), w=random(1, 1, gates * 8, 8), r=random(2, 1, gates * 8, 8))


def scanned() -> ModelProto:
    body = helper.make_graph(
        [
            constant("w", W),
            helper.make_node("MatMul", ["a", "w"], ["b"], name="inner"),
            helper.make_node("Identity", ["s"], ["t"]),
        ],
        "body",
        [models.value("s", (8,)), models.value("a", (8,))],
        [models.value("t", (8,)), models.value("b", (8,))],
    )
    node = helper.make_node("Scan", ["state", "h"], ["last", "y"], name="scan", num_scan_inputs=1, body=body)
    return behind(node, state=np.zeros(8, np.float32))


def looped() -> ModelProto:
    body = helper.make_graph(
        [
            constant("w", W / 4),
            helper.make_node("MatMul", ["s", "w"], ["t"], name="inner"),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [models.value("i", (), np.int64), models.value("go", (), np.bool_), models.value("s", None)],
        [models.value("on", (), np.bool_), models.value("t", None)],
    )
    node = helper.make_node("Loop", ["times", "yes", "h"], ["y"], name="loop", body=body)
    return behind(node, times=np.array(3), yes=np.array(True))


def in_branches(*extra: NodeProto) -> ModelProto:
    """Two branches that only one condition picks from."""

    def branch(name: str) -> Any:
        nodes = [constant(f"{name}.w", W), helper.make_node("MatMul", ["h", f"{name}.w"], [name], name=f"{name}.inner"), *extra]
        return helper.make_graph(nodes, name, [], [models.value(name, None)])

    node = helper.make_node("If", ["yes"], ["y"], name="if", then_branch=branch("t"), else_branch=branch("e"))
    return behind(node, yes=np.array(True))


def in_random_branches() -> ModelProto:
    return in_branches(helper.make_node("RandomNormalLike", ["h"], ["noise"]))


def in_a_function() -> ModelProto:
    body = [constant("w", W), helper.make_node("MatMul", ["a", "w"], ["b"], name="inner")]
    function = helper.make_function("local", "Block", ["a"], ["b"], body, [helper.make_opsetid("", models.OPSET)])
    tensors: dict[str, Array] = {}
    nodes = [linear("float", "x", "h", tensors, 8, 8, 5), helper.make_node("Block", ["h"], ["y"], domain="local")]
    return build(nodes, {"x": ("n", 8)}, ["y"], tensors, functions=[function])


def of_a_weight() -> ModelProto:
    body = [helper.make_node("MatMul", ["a", "v"], ["b"], name="inner")]
    function = helper.make_function("local", "Block", ["a", "v"], ["b"], body, [helper.make_opsetid("", models.OPSET)])
    tensors: dict[str, Array] = {"w": W}
    nodes = [
        linear("float", "x", "h", tensors, 8, 8, 5),
        helper.make_node("Block", ["h", "w"], ["y"], name="call", domain="local"),
    ]
    return build(nodes, {"x": ("n", 8)}, ["y"], tensors, functions=[function])


def integer() -> ModelProto:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["h"], ["i", "is", "iz"]),
        helper.make_node("MatMulInteger", ["i", "q", "iz"], ["p"], name="whole"),
        helper.make_node("Cast", ["p"], ["y"], to=1),
    ]
    return behind(*nodes, q=Q["q"])


def integer_convolution() -> ModelProto:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["h"], ["i", "is", "iz"]),
        helper.make_node("Unsqueeze", ["i", "last"], ["u"]),
        helper.make_node("ConvInteger", ["u", "q", "iz"], ["p"], name="whole"),
        helper.make_node("Cast", ["p"], ["y"], to=1),
    ]
    return behind(*nodes, last=np.array([2]), q=Q["q"].reshape(8, 8, 1).astype(np.uint8))


def linear_convolution() -> ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["i"]),
        helper.make_node("Unsqueeze", ["i", "last"], ["u"]),
        helper.make_node("QLinearConv", ["u", "s", "z", "q", "s", "z", "s", "z"], ["p"], name="whole"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    return behind(*nodes, **{**Q, "last": np.array([2]), "q": Q["q"].reshape(8, 8, 1)})


def linear_product() -> ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["i"]),
        helper.make_node("QLinearMatMul", ["i", "s", "z", "q", "s", "z", "s", "z"], ["p"], name="whole"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    return behind(*nodes, **Q)


def fake_quantized() -> ModelProto:
    """As training that knows of quantization leaves it: a float weight, rounded and back."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["h", "wd"], ["y"], name="quantized"),
    ]
    return behind(*nodes, w=W, s=Q["s"], z=Q["z"])


def dequantized() -> ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="quantized"),
    ]
    return behind(*nodes, **Q)


def folded_late() -> ModelProto:
    return behind(
        helper.make_node("Mul", ["v", "two"], ["w"]),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="product"),
        v=W,
        two=np.array(2, np.float32),
    )


STAYS: Final[Mapping[str, tuple[Callable[[], ModelProto], str, str]]] = {
    "if": (
        in_random_branches,
        "t.inner",
        "inside the body of 'if' (If), whose branches cannot be taken apart; export the model without it",
    ),
    "loop": (
        looped,
        "inner",
        "inside the body of 'loop' (Loop), which feeds itself from one iteration to the next; export the model without it",
    ),
    "scan": (
        scanned,
        "inner",
        "inside the body of 'scan' (Scan), which feeds itself from one iteration to the next; export the model without it",
    ),
    "function": (
        in_a_function,
        "inner",
        "inside the model-local function 'Block'; inline the functions first, with onnx.inliner.inline_local_functions",
    ),
    "function-of-a-weight": (of_a_weight, "call", "operator not supported; its constant 'w' stays"),
    "rnn": (lambda: recurrent("RNN", 1), "cell", "operator not supported; its constant 'w' stays"),
    "lstm": (lambda: recurrent("LSTM", 4), "cell", "operator not supported; its constant 'w' stays"),
    "gru": (lambda: recurrent("GRU", 3), "cell", "operator not supported; its constant 'w' stays"),
    "einsum": (
        lambda: behind(helper.make_node("Einsum", ["h", "w"], ["y"], name="sum", equation="ni,ij->nj"), w=W),
        "sum",
        "operator not supported; its constant 'w' stays",
    ),
    "einsum-first": (
        lambda: behind(helper.make_node("Einsum", ["w", "h"], ["y"], name="sum", equation="ij,ni->nj"), w=W),
        "sum",
        "operator not supported; its constant 'w' stays",
    ),
    "matmul-integer": (integer, "whole", "quantized weight 'q'; prune the float model and export it as int8 instead"),
    "conv-integer": (integer_convolution, "whole", "quantized weight 'q'; prune the float model and export it as int8 instead"),
    "qlinear-conv": (linear_convolution, "whole", "quantized weight 'q'; prune the float model and export it as int8 instead"),
    "qlinear-matmul": (linear_product, "whole", "quantized weight 'q'; prune the float model and export it as int8 instead"),
    "fake-quantized": (
        fake_quantized,
        "quantized",
        "quantized weight (behind DequantizeLinear); prune the float model and export it as int8 instead",
    ),
    "qdq": (
        dequantized,
        "quantized",
        "quantized weight (behind DequantizeLinear); prune the float model and export it as int8 instead",
    ),
    "unfolded": (folded_late, "product", "its weight is computed from constants; fold them first, for example with onnxsim"),
    "output": (
        lambda: models.with_outputs(behind(helper.make_node("MatMul", ["h", "w"], ["y"], name="product"), w=W), ["y", "w"]),
        "product",
        "its weight 'w' is also an output of the graph",
    ),
}
"""Models with one layer that is pruned and one that is not: its name, and why."""


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_is_named_and_the_rest_is_pruned(case: str) -> None:
    make, node, reason = STAYS[case]
    model = make()
    result = pruned(model)
    assert zeros(result) == {"float": 0.5}
    assert reasons(result)[node] == reason
    untouched = {t.name: t for t in model.graph.initializer if not t.name.startswith("float")}
    assert {t.name: t for t in result.model.graph.initializer if t.name in untouched} == untouched


@pytest.mark.parametrize("case", [case for case in STAYS if case != "output"])
def test_sparsity_0_changes_no_output_of_them(case: str) -> None:
    model = STAYS[case][0]()
    feeds = feeds_of(model, 32)
    same = run(pruned(model, feeds, sparsity=0.0).model, feeds)
    assert all(np.array_equal(value, same[name]) for name, value in run(model, feeds).items())


def test_a_branch_is_pruned_and_one_that_no_sample_takes_is_named() -> None:
    result = pruned(in_branches())
    assert zeros(result) == {"float": 0.5, "t.inner": 0.5}
    reason = "inside the else branch of 'if', which no calibration sample takes; give samples that do"
    assert reasons(result) == {"e.inner": reason}


def test_inlined_functions_are_pruned() -> None:
    model = inline_local_functions(in_a_function())
    assert sorted(zeros(pruned(model)).values()) == [0.5, 0.5]


def test_a_tied_embedding_stays_whole() -> None:
    tensors: dict[str, Array] = {"table": random(1, 16, 8)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="embed"),
        linear("inner", "x", "h", tensors, 8, 8, 5),
        helper.make_node("Transpose", ["table"], ["head"]),
        helper.make_node("MatMul", ["h", "head"], ["y"], name="logits"),
    ]
    model = build(nodes, {"ids": ("n",)}, ["y"], tensors, dtype=np.int64)
    model.graph.output[0].type.tensor_type.elem_type = 1
    result = pruned(model, {"ids": np.arange(64) % 16})
    assert zeros(result) == {"inner": 0.5}
    assert reasons(result)["logits"] == "its weight 'table' is also read by 'embed' (Gather)"


def test_a_weight_that_is_also_an_input_is_pruned_in_its_place() -> None:
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], {"x": ("n", 8)}, ["y"], {"w": W})
    model.graph.input.append(models.value("w", (8, 8)))  # since IR version 4: a default that the caller may replace
    result = pruned(model, {"x": random(3, 32, 8)})
    assert zeros(result) == {"product": 0.5}


def test_activations_that_are_quantized_do_not_keep_float_weights() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["i"]),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="product"),
    ]
    assert zeros(pruned(behind(*nodes, w=W, s=Q["s"], z=Q["z"]))) == {"float": 0.5, "product": 0.5}


def test_a_weight_behind_a_chain_is_pruned_where_it_is_stored() -> None:
    """Transposed, cut otherwise, cast and renamed on the way; another node reads the same tensor through a chain of its own."""
    nodes = [
        *(helper.make_node("Transpose", ["w"], [f"{n}.t"], perm=[1, 0]) for n in "ab"),
        *(helper.make_node("Reshape", [f"{n}.t", "shape"], [f"{n}.r"]) for n in "ab"),
        *(helper.make_node("Cast", [f"{n}.r"], [f"{n}.c"], to=1) for n in "ab"),
        *(helper.make_node("Identity", [f"{n}.c"], [f"{n}.i"]) for n in "ab"),
        *(helper.make_node("MatMul", ["h", f"{n}.i"], [f"{n}.y"], name=n) for n in "ab"),
        helper.make_node("Sub", ["a.y", "b.y"], ["gap"]),
        helper.make_node("Add", ["gap", "a.y"], ["y"]),
    ]
    result = pruned(behind(*nodes, w=random(1, 6, 8, dtype=np.float16), shape=np.array([8, -1])), repair="none")
    assert zeros(result) == {"float": 0.5, "a": 0.5}
    weight = models.stored(result.model, "w")
    assert weight.dtype == np.float16
    assert weight.shape == (6, 8)
    assert float((weight == 0).mean()) == 0.5
    x = random(9, 4, 8)
    seen = run(result.model, {"x": x}, ["h", "y"])
    np.testing.assert_allclose(seen["y"], seen["h"] @ weight.T.astype(np.float32).reshape(8, -1), rtol=1e-4, atol=1e-5)


def test_copies_of_one_tensor_are_left_out_and_different_ones_refused() -> None:
    once, twice = models.chain(2), models.chain(2)
    first = twice.graph.initializer[0]
    twice.graph.initializer.add().CopyFrom(first)
    feeds = feeds_of(once, 32)
    result = pruned(twice, feeds)
    assert result.notes[0] == "the stored tensor 'fc0.w' was there more than once"
    assert list(result.model.graph.initializer) == list(pruned(once, feeds).model.graph.initializer)
    first.CopyFrom(models.tensor(np.ones_like(models.stored(once, first.name)), first.name))
    with pytest.raises(ModelError, match=r"two different stored tensors are called 'fc0.w'; export the model anew"):
        pruned(twice, feeds)


def test_empty_names_stand_for_what_is_not_there() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", ""], ["h"], name="product"),
        helper.make_node("Dropout", ["h", "", ""], ["y", ""]),
    ]
    assert zeros(pruned(build(nodes, {"x": ("n", 8)}, ["y"], {"w": W}))) == {"product": 0.5}


def renamed(name: str) -> ModelProto:
    model = models.chain(3)
    for node in model.graph.node:
        node.name = name
    return model


def test_nodes_need_no_names() -> None:
    assert zeros(pruned(renamed(""))) == {"h0": 0.5, "h1": 0.5, "h2": 0.5}


def test_onnx_runtime_refuses_equal_names_and_the_error_says_which() -> None:
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load the given model: .* same node name \(same\)"):
        pruned(renamed("same"))


def test_a_state_is_fed_and_given_back() -> None:
    tensors: dict[str, Array] = {"u": random(1, 8, 8) / 3}
    nodes = [
        linear("inward", "x", "a", tensors, 8, 8, 5),
        helper.make_node("MatMul", ["state", "u"], ["b"], name="recurrent"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["next"]),
        linear("outward", "next", "y", tensors, 8, 4, 9),
    ]
    model = build(nodes, {"x": ("n", 8), "state": ("n", 8)}, ["y", "next"], tensors)
    state, steps = np.zeros((4, 8), np.float32), []
    for step in range(16):  # the states that the dense model goes through
        feeds = {"x": random(step, 4, 8), "state": state}
        steps.append(feeds)
        state = run(model, feeds)["next"]
    result = pruned(model, {name: np.concatenate([feeds[name] for feeds in steps]) for name in ("x", "state")})
    assert zeros(result) == {"inward": 0.5, "recurrent": 0.5, "outward": 0.5}


def test_a_model_of_quantized_weights_only_is_refused_with_the_reason() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="p"),
    ]
    model = build(nodes, {"x": ("n", 8)}, ["y"], Q)
    with pytest.raises(ModelError, match=r"nothing to prune \(p: quantized weight .* export it as int8 instead"):
        pruned(model)


def test_activations_that_meet_in_a_product_are_left_alone() -> None:
    tensors: dict[str, Array] = {}
    nodes = [
        *(linear(name, "x", name[0], tensors, 8, 8, 10 * i) for i, name in enumerate(("query", "key", "value"))),
        helper.make_node("Transpose", ["k"], ["kt"]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"], name="mixed"),
        linear("out", "mixed", "y", tensors, 8, 8, 40),
    ]
    result = pruned(build(nodes, {"x": ("n", 8)}, ["y"], tensors))
    assert zeros(result) == {"query": 0.5, "key": 0.5, "value": 0.5, "out": 0.5}
    assert set(reasons(result)) == {"scores", "mixed"}


def test_the_models_that_onnx_ships_go_through() -> None:
    outcomes = [operators.judge(case) for case in operators.shipped()]
    assert len(outcomes) >= 100
    assert [outcome for outcome in outcomes if outcome.verdict in ("crashed", "changed", "refused")] == []
    assert sum(outcome.verdict == "pruned" for outcome in outcomes) >= 20


def front_end(kernels: Array) -> ModelProto:
    """A convolution of a sound with long kernels, and a layer behind it."""
    tensors: dict[str, Array] = {"front": kernels[:, None].astype(np.float32), "w": random(1, 8, len(kernels), 3)}
    nodes = [
        helper.make_node("Conv", ["x", "front"], ["f"], name="front", strides=[32]),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"], name="behind"),
    ]
    return build(nodes, {"x": ("n", 1, 512)}, ["y"], tensors)


@pytest.mark.parametrize("length", [32, 100, 256])
def test_a_fourier_transform_stored_as_a_convolution_stays(length: int) -> None:
    time, bins = np.arange(length), np.arange(1, length // 2)[:, None]
    tones = np.concatenate([np.cos(2 * np.pi * bins * time / length), np.sin(2 * np.pi * bins * time / length)])
    result = pruned(front_end(tones * np.hanning(length)), positions=4)
    assert zeros(result) == {"behind": 0.5}
    assert reasons(result) == {"front": "a bank of fixed filters (windowed tones), not learned"}


@pytest.mark.parametrize("length", [16, 32, 256])
def test_long_kernels_that_are_no_tones_are_pruned(length: int) -> None:
    smooth = random(2, 24, length) * np.hanning(length)
    assert zeros(pruned(front_end(smooth), positions=4)) == {"front": 0.5, "behind": 0.5}


def test_selecting_nothing_still_names_everything() -> None:
    found = inspect(in_branches(), Selection(min_size=10_000))
    assert found.layers == ()
    assert {s.node for s in found.skipped} == {"float", "t.inner", "e.inner"}
