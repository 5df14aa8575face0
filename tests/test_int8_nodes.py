"""Which nodes are quantized: the bytes of layers spread as far as they hold what they should, and no further."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper

from relrep_onnx.export import Order
from relrep_onnx.export.int8 import int8
from relrep_onnx.export.int8_nodes import unreached_nodes, wrong_nodes
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.types import Array, Feeds, Selection
from tests import models
from tests.encoder import encoder, sentences
from tests.models import build, random, run

LAYERS = ("Conv", "Gemm", "MatMul", "Gather")


def quantized(model: ModelProto, samples: Feeds) -> ModelProto:
    content = int8(model, Order(calibration=lambda: [samples])).content
    assert isinstance(content, ModelProto)
    return content


def moved(model: ModelProto, other: ModelProto, samples: Feeds) -> float:
    """Relative L2 of the outputs."""
    (a,), (b,) = (run(m, samples).values() for m in (model, other))
    return float(np.linalg.norm(b.astype(np.float64) - a) / np.linalg.norm(a.astype(np.float64)))


def in_bytes(model: ModelProto) -> set[str]:
    """Names of nodes, layers aside, all of whose activations come from bytes and whose result becomes bytes."""
    graph = Graph(model)

    def dequantized(name: str) -> bool:
        return name in graph.producers and graph.producers[name].op_type == "DequantizeLinear"

    return {
        node.name
        for node in model.graph.node
        if node.op_type not in (*LAYERS, "QuantizeLinear", "DequantizeLinear")
        and all(dequantized(name) or name in graph.tensors for name in node.input)
        and any(reader.op_type == "QuantizeLinear" for reader, _ in graph.consumers.get(node.output[0], ()))
    }


def reached(nodes: Sequence[NodeProto], **tensors: Array) -> set[str]:
    """Names of the nodes of a network on x[N, 4, 6, 6] that are quantized."""
    model = build(nodes, {"x": ["N", 4, 6, 6]}, [nodes[-1].output[0]], tensors)
    graph = Graph(model)
    return {node.name for node in model.graph.node} - set(unreached_nodes(graph, wrong_nodes(graph)))


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    """A node called after its output."""
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)  # type: ignore[arg-type]


ZERO = np.array(0, np.float32)
WEIGHTS = {name: random(seed, 4, 4, 1, 1) for seed, name in enumerate("wv")}


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_attention_mask_does_not_crush_the_scores(decomposed: bool) -> None:
    """With the sum of mask and scores in one byte the outputs move by 0.13."""
    model = encoder(decomposed=decomposed)
    small = quantized(model, sentences(64))
    assert moved(model, small, sentences(64, seed=1)) < 0.05
    stored = {t.name for t in small.graph.initializer}
    projections = [n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and ":" in n.input[1]]
    assert len(projections) == 12
    assert {f"{name}_quantized" for name in projections} <= stored
    assert "embeddings.word_embeddings.weight_quantized" in stored
    graph, masked = Graph(small), {"attention_mask"}
    for n in small.graph.node:
        if masked & set(n.input) and n.op_type in ("Cast", "Unsqueeze", "Sub", "Mul", "Add", "Softmax"):
            assert all(reader.op_type != "QuantizeLinear" for name in n.output for reader, _ in graph.consumers[name])
            masked.update(n.output)
    assert any("Softmax" in name for name in masked)


def test_a_mask_by_where_does_not_either() -> None:
    """Scores of x with itself, chosen or -1e9 by the sign of their row's first number."""
    nodes = [
        node("MatMul", "x w", "q"),
        node("Transpose", "x", "turned", perm=[0, 2, 1]),
        node("MatMul", "q turned", "scores"),
        node("Greater", "scores zero", "kept"),
        node("Where", "kept scores low", "masked"),
        node("Softmax", "masked", "shares", axis=-1),
        node("MatMul", "shares q", "mixed"),
        node("MatMul", "mixed v", "y"),
    ]
    tensors = {"w": random(0, 8, 8), "v": random(1, 8, 8), "zero": ZERO, "low": np.array(-1e9, np.float32)}
    model = build(nodes, {"x": ["N", 6, 8]}, ["y"], tensors)
    small = quantized(model, {"x": random(2, 64, 6, 8)})
    assert in_bytes(small) == set()
    assert moved(model, small, {"x": random(3, 64, 6, 8)}) < 0.05


def test_residual_sums_of_convolutions_are_in_bytes() -> None:
    """What the sparse int8 kernels and ONNX Runtime's QLinearAdd rely on; the sum with the input itself is not one of bytes."""
    nodes = [
        node("Conv", "x w", "a"),
        node("Relu", "a", "b"),
        node("Conv", "b v", "c"),
        node("Add", "c b", "sum"),
        node("Relu", "sum", "d"),
        node("GlobalAveragePool", "d", "mean"),
        node("Add", "d x", "with_input"),
        node("Concat", "with_input d", "y", axis=1),
    ]
    assert reached(nodes, **WEIGHTS) == {"a", "b", "c", "sum", "d", "mean"}
    small = quantized(build(nodes, {"x": ["N", 4, 6, 6]}, ["y", "mean"], WEIGHTS), {"x": random(0, 32, 4, 6, 6)})
    assert {"sum", "mean"} <= in_bytes(small)


def test_gates_are_in_bytes_and_squares_are_not() -> None:
    nodes = [
        node("Conv", "x w", "a"),
        node("GlobalAveragePool", "a", "mean"),
        node("Conv", "mean v", "b"),
        node("HardSigmoid", "b", "gate"),
        node("Mul", "a gate", "gated"),
        node("Sigmoid", "gated", "own_gate"),
        node("Mul", "own_gate gated", "silu"),
        node("Mul", "silu silu", "square"),
        node("Mul", "square half", "scaled"),
        node("Add", "silu half", "shifted"),
        node("Add", "scaled shifted", "y"),
    ]
    assert reached(nodes, half=np.array(0.5, np.float32), **WEIGHTS) == {"a", "mean", "b", "gated", "own_gate", "silu"}


def test_bytes_spread_through_copies_and_stop_behind_a_layer_in_float() -> None:
    nodes = [
        node("ConvTranspose", "x w", "grouped", group=2),
        node("Relu", "grouped", "float"),
        node("Conv", "x v", "a"),
        node("Reshape", "a shape", "flat"),
        node("Concat", "flat row", "longer", axis=0),
        node("Transpose", "longer", "turned"),
        node("Softmax", "turned", "y"),
    ]
    tensors = {"w": random(0, 4, 2, 1, 1), "v": WEIGHTS["v"], "shape": np.array([-1, 144]), "row": random(1, 1, 144)}
    assert reached(nodes, **tensors) == {"a", "flat", "longer", "turned"}


@pytest.mark.parametrize(("low", "high", "held"), [(0.0, 6.0, True), (-1.0, 1.0, True), (0.2, 0.6, False), (0.6, 0.2, False)])
def test_bytes_reach_to_zero_and_bounds_that_do_not_stay_floating(low: float, high: float, held: bool) -> None:
    nodes = [node("Conv", "x w", "a"), node("Clip", "a low high", "b"), node("Conv", "b v", "y")]
    tensors = {**WEIGHTS, "low": np.array(low, np.float32), "high": np.array(high, np.float32)}
    assert ("b" in reached(nodes, **tensors)) == held
    model, samples = build(nodes, {"x": ["N", 4, 6, 6]}, ["y"], tensors), {"x": random(3, 32, 4, 6, 6)}
    assert moved(model, quantized(model, samples), samples) < 0.05


@pytest.mark.parametrize("axes", [(1,), (1, 2), (1, 3)])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("tones", [True, False])
def test_transforms_stay_floating(tones: bool, behind: bool, axes: tuple[int, ...]) -> None:
    """Along either axis of an image, and behind nodes that only move it: what pruning leaves alone, int8 does."""
    times = np.arange(64)
    bank = np.cos(2 * np.pi * np.outer(np.arange(4, 20), times) / 64) * np.hanning(64) if tones else random(0, 16, 64)
    stored = {"w": np.expand_dims(bank, axes).astype(np.float32)}
    shape = ["N", *np.expand_dims(np.zeros(256), tuple(axis - 1 for axis in axes)).shape]
    nodes = [node("Identity", "w", "v"), node("Conv", "x v", "y")] if behind else [node("Conv", "x w", "y")]
    model = build(nodes, {"x": shape}, ["y"], stored)
    assert wrong_nodes(Graph(model)) == (["y"] if tones else [])
    assert [skipped.node for skipped in find_layers(Graph(model), Selection())[1]] == (["y"] if tones else [])


def test_bodies_of_if_read_behind_the_activation() -> None:
    """ONNX Runtime's quantizer takes Relu out, and the bodies of If would read what it was given."""
    body = {
        name: helper.make_graph([helper.make_node(op, ["b"], [name])], name, [], [models.value(name, None)])
        for name, op in (("then_branch", "Identity"), ("else_branch", "Neg"))
    }
    nodes = [
        node("Conv", "x w", "a"),
        node("Relu", "a", "b"),
        node("ReduceMax", "x", "most", keepdims=0),
        node("Greater", "most zero", "positive"),
        node("If", "positive", "y", **body),
    ]
    model = build(nodes, {"x": ["N", 4, 6, 6]}, ["y"], {**WEIGHTS, "zero": ZERO})
    samples = {"x": random(0, 32, 4, 6, 6)}
    small = quantized(model, samples)
    assert moved(model, small, samples) < 0.05
    assert run(small, samples)["y"].min() == 0


@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_outputs_before_an_activation_are_not_clipped(op: str) -> None:
    """ONNX Runtime's quantizer gives what an activation reads the range of what it gives, and others may read it."""
    ends = ["b", "", "six"] if op == "Clip" else ["b"]
    nodes = [node("Conv", "x w", "b"), helper.make_node(op, ends, ["c"], name="c"), node("Conv", "c v", "y")]
    model = build(nodes, {"x": ["N", 4, 6, 6]}, ["y", "b"], {**WEIGHTS, "six": np.array(0.5, np.float32)})
    samples = {"x": random(0, 32, 4, 6, 6)}
    small = quantized(model, samples)
    for name, value in run(model, samples).items():
        assert np.abs(run(small, samples)[name] - value).max() < 0.05 * np.abs(value).max()


@pytest.mark.parametrize(("rows", "wrong"), [(8, True), (1, False)])
def test_one_number_for_all_outputs_is_no_bias_of_bytes(rows: int, wrong: bool) -> None:
    nodes = [node("Gemm", "x w b", "y", transB=1)]
    model = build(nodes, {"x": ["N", 16]}, ["y"], {"w": random(0, rows, 16), "b": random(1, 1)})
    assert wrong_nodes(Graph(model)) == (["y"] if wrong else [])
    samples = {"x": random(2, 32, 16)}
    assert moved(model, quantized(model, samples), samples) < 0.05


def test_nodes_without_names_get_some() -> None:
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("Conv", ["a", "w"], ["y"])]
    model = build(nodes, {"x": ["N", 4, 6, 6]}, ["y"], WEIGHTS)
    assert unreached_nodes(Graph(model), ()) == ["relrep_floating_0"]
    assert [n.name for n in model.graph.node] == ["relrep_floating_0", "relrep_floating_1"]
