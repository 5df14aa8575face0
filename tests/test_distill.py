"""The step: what moves, what it aims at, what stops gradients; loss and gradients against a float64 computation of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from relrep_onnx.distill import Distillation, outlook, plan, step, traced
from relrep_onnx.graph import Graph, block_ends, find_layers, parameters, with_tensors
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, Layer, ModelError
from tests.models import ALL, build, chain, constant, convnet, feeds_of, linear, random, residual, run, shared_weight, with_if

RUNTIME = RuntimeOptions(1)


def layers_of(model: ModelProto) -> list[Layer]:
    return find_layers(Graph(model), ALL)[0]


def values_of(model: ModelProto, d: Distillation) -> dict[str, Array]:
    return {name: Graph(model).stored(name) for name in d.names}


def pruned(model: ModelProto, keep: float = 0.5) -> ModelProto:
    """Random zeros in every weight."""
    graph = Graph(model)
    weights = [p.tensor for p in parameters(graph, layers_of(model)) if p.is_weight]
    return with_tensors(
        model, {name: graph.stored(name) * (random(3, *graph.stored(name).shape) > 1 - 2 * keep) for name in weights}
    )


def stepped(dense: ModelProto, sparse: ModelProto, feeds: dict[str, Array]) -> tuple[float, dict[str, Array], Distillation]:
    d = plan(dense, sparse, layers_of(sparse), feeds, RUNTIME)
    values = values_of(sparse, d)
    built = step(d, traced(d.sparse, {**feeds, **values}, RUNTIME))
    given = Session(built.model.SerializeToString(), RUNTIME).run({**feeds, **values})
    return float(given[built.loss]), {n: given[g] for n, g in zip(d.names, built.gradients, strict=True)}, d


def loss_of(dense: ModelProto, sparse: ModelProto, feeds: dict[str, Array], d: Distillation) -> float:
    """The loss from the features of both models, in float64."""
    total = 0.0
    for names in (d.ends, d.outputs):
        pairs = [(run(m, feeds, list(names)) for m in (dense, sparse))] if names else []
        for left, right in pairs:
            gaps = [((left[n].astype(np.float64) - right[n]) ** 2).sum() / (left[n].astype(np.float64) ** 2).sum() for n in names]
            total += float(np.mean(gaps))
    return total


MODELS: dict[str, Any] = {"chain": lambda: chain(3), "residual": residual, "convnet": convnet, "shared": shared_weight}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_agree_with_differences(name: str) -> None:
    dense = MODELS[name]()
    sparse = pruned(dense)
    feeds = feeds_of(dense, 5)
    loss, gradients, d = stepped(dense, sparse, feeds)
    assert loss == pytest.approx(loss_of(dense, sparse, feeds, d), rel=1e-4)
    for tensor_name, gradient in gradients.items():
        # Along the gradient itself: the slope is its squared length.
        value, length = Graph(sparse).stored(tensor_name), float(np.linalg.norm(gradient))
        if length < 1e-4:
            continue
        reach = 2e-2 * float(np.linalg.norm(value)) / length
        ends = [
            loss_of(dense, with_tensors(sparse, {tensor_name: (value + s * reach * gradient).astype(np.float32)}), feeds, d)
            for s in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * reach) == pytest.approx(length**2, rel=0.03), tensor_name


def test_loss_of_a_model_against_itself_is_zero() -> None:
    model = residual()
    loss, gradients, _ = stepped(model, model, feeds_of(model, 4))
    assert loss == 0
    assert all(not g.any() for g in gradients.values())


def test_blocks_end_at_sums_and_reductions() -> None:
    model = residual()
    assert block_ends(Graph(model), dict.fromkeys((f"s{i}" for i in range(3)), (4, 8))) == ["s0", "s1", "s2"]
    d = plan(model, model, layers_of(model), feeds_of(model, 1), RUNTIME)
    assert d.ends == ("s0", "s1", "s2")
    assert d.outputs == ("out",)
    conv = convnet()
    d = plan(conv, conv, layers_of(conv), feeds_of(conv, 1), RUNTIME)
    assert d.ends == ("r1",)  # what the global pool reads


def test_activation_behind_a_sum_is_the_end() -> None:
    tensors: dict[str, Array] = {}
    nodes = [
        linear("a", "x", "h", tensors, 8, 8, 0),
        helper.make_node("Add", ["x", "h"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        linear("b", "r", "out", tensors, 8, 4, 10),
    ]
    model = build(nodes, {"x": ("n", 8)}, ["out"], tensors)
    assert plan(model, model, layers_of(model), feeds_of(model, 1), RUNTIME).ends == ("r",)


def test_biases_and_constants_behind_nodes_move_too() -> None:
    model = residual(1)
    names = plan(model, model, layers_of(model), feeds_of(model, 1), RUNTIME).names
    assert names == ["in0.w", "in0.b", "out0.w", "out0.b"]


def walled() -> ModelProto:
    """A node without a rule between two layers, and a branch past it."""
    tensors: dict[str, Array] = {}
    nodes = [
        linear("first", "x", "h", tensors, 8, 8, 0),
        helper.make_node("CumSum", ["h", "axis"], ["c"], name="wall"),
        linear("second", "c", "out", tensors, 8, 4, 10),
    ]
    return build(nodes, {"x": ("n", 8)}, ["out"], {**tensors, "axis": np.array(1, np.int64)})


def test_a_wall_makes_what_it_reads_an_output() -> None:
    model = walled()
    d = plan(model, model, layers_of(model), feeds_of(model, 1), RUNTIME)
    assert set(d.outputs) == {"out", "h"}
    assert [(w.node, w.reason) for w in d.walls] == [("wall", "no gradient rule for CumSum")]
    loss, gradients, _ = stepped(model, pruned(model), feeds_of(model, 4))
    assert loss > 0
    assert all(g.any() for g in gradients.values())


def test_outlook_names_the_wall() -> None:
    first, second = outlook(walled(), layers_of(walled()))
    assert not first.reaches_outputs
    assert [w.node for w in first.stopped] == ["wall"]
    assert second.reaches_outputs
    assert second.stopped == ()


def test_control_flow_is_a_wall() -> None:
    model = with_if()
    d = plan(model, model, layers_of(model), feeds_of(model, 2), RUNTIME)
    assert "no gradient rule for If" in [w.reason for w in d.walls]
    loss, gradients, _ = stepped(model, pruned(model), feeds_of(model, 4))
    assert loss > 0
    assert len(gradients) == len(d.names)


def test_nothing_to_refine_is_an_error() -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["out"], axis=1)]
    model = build(nodes, {"x": ("n", 8)}, ["out"], {"w": random(0, 8, 8)})
    model.graph.output[0].type.tensor_type.elem_type = 7
    other = build(
        [helper.make_node("Gemm", ["x", "w"], ["other"]), helper.make_node("ArgMax", ["other"], ["out"], axis=1)],
        {"x": ("n", 8)},
        ["out"],
        {"w": random(0, 8, 8)},
    )
    with pytest.raises(ModelError, match="nothing can be refined"):
        plan(other, model, layers_of(model), feeds_of(model, 1), RUNTIME)


def test_what_no_loss_reaches_stays_a_constant() -> None:
    """A branch whose only features the dense model calls by other names: its layer does not move, the others do."""

    def model(name: str) -> ModelProto:
        nodes = [
            helper.make_node("Gemm", ["x", "w"], [name]),
            helper.make_node("ArgMax", [name], ["best"], axis=1),
            helper.make_node("Gemm", ["x", "v"], ["out"]),
        ]
        built = build(nodes, {"x": ("n", 8)}, ["best", "out"], {"w": random(0, 8, 8), "v": random(1, 8, 4)})
        built.graph.output[0].type.tensor_type.elem_type = 7
        return built

    loss, gradients, d = stepped(model("h"), pruned(model("other")), feeds_of(model("h"), 4))
    assert d.names == ["v"]
    assert loss > 0
    assert gradients["v"].any()


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 20, 21])
def test_older_graphs_are_raised(opset: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "b"], ["g"]),
        helper.make_node("Softmax", ["g"], ["out"], axis=1),
    ]
    tensors = {"w": random(0, 4, 2, 3, 3), "v": random(1, 36, 5), "b": random(2, 5)}
    dense = build(nodes, {"x": ("n", 2, 6, 6)}, ["out"], tensors, opset=opset)
    sparse = pruned(dense)
    loss, gradients, d = stepped(dense, sparse, feeds_of(dense, 3))
    assert d.names == ["w", "v", "b"]
    assert loss == pytest.approx(loss_of(dense, sparse, feeds_of(dense, 3), d), rel=1e-4)
    assert all(g.any() for g in gradients.values())


def test_a_graph_that_cannot_be_raised_is_refused_with_the_reason() -> None:
    model = chain(1)
    model.opset_import[0].version = 9
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="operator set 9, 20 is needed, and ONNX cannot convert it"):
        plan(model, model, layers_of(model), feeds_of(chain(1), 1), RUNTIME)


def test_weights_in_constant_nodes_move() -> None:
    nodes = [
        constant("w", random(0, 8, 4)),
        helper.make_node("MatMul", ["x", "w"], ["out"]),
    ]
    dense = build(nodes, {"x": ("n", 8)}, ["out"])
    loss, gradients, d = stepped(dense, pruned(dense), feeds_of(dense, 4))
    assert d.names == ["w"]
    assert loss > 0
    assert gradients["w"].any()
    onnx.checker.check_model(with_tensors(dense, {"w": random(5, 8, 4)}))
