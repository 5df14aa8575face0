"""Layers inside `If`: the flat model and the one put together again compute what the original does, on either branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper

from relrep_onnx import Config, ModelError, Result, optimize
from relrep_onnx.distill import outlook
from relrep_onnx.graph import Graph, find_layers, flatten, load, read_weight, unflatten, write_layer
from relrep_onnx.inspection import inspect
from relrep_onnx.types import Array, Feeds, Layer, RepairedLayer
from tests import models
from tests.models import ALL, build, constant, linear, random, run, tensor, value

YES: Final = {"yes": np.array(True)}
NO: Final = {"yes": np.array(False)}


def body(name: str, nodes: Sequence[NodeProto], stored: Mapping[str, Array] | None = None) -> GraphProto:
    return helper.make_graph(list(nodes), name, [], [value(name, None)], [tensor(a, n) for n, a in (stored or {}).items()])


def branching(
    then: GraphProto,
    other: GraphProto,
    tensors: Mapping[str, Array] | None = None,
    shape: models.Shape = ("n", 8),
    **settings: Any,
) -> ModelProto:
    """A model that is one `If` of x and a condition, and nothing in front or behind but nodes without weights."""
    nodes = [
        helper.make_node("Tanh", ["x"], ["h"], name="front"),
        helper.make_node("If", ["yes"], ["s"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Identity", ["s"], ["y"], name="back"),
    ]
    model = build(nodes, {"x": shape}, ["y"], tensors, **settings)
    model.graph.input.append(value("yes", (), np.bool_))
    return model


def product(name: str, x: str = "h", w: str = "w", y: str | None = None) -> NodeProto:
    return helper.make_node("MatMul", [x, w], [y or name], name=f"{name}.product")


def two_products() -> ModelProto:
    """Both branches use the same names for different things; a bias behind one product, none behind the other."""

    def branch(name: str, seed: int) -> GraphProto:
        nodes = [
            constant("w", random(seed, 8, 8)),
            helper.make_node("Mul", ["h", "h"], ["a"]),
            helper.make_node("MatMul", ["a", "w"], ["b"], name="first"),
            helper.make_node("Add", ["bias", "b"], ["c"], name="first_bias"),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("Add", ["d", "a"], ["g"]),
            helper.make_node("MatMul", ["g", "v"], [name], name="second"),
        ]
        return body(name, nodes, {"v": random(seed + 1, 8, 4), "bias": random(seed + 2, 8)})

    return branching(branch("t", 1), branch("e", 11))


def one_layer_per_branch(node: NodeProto, w: Array, shape: models.Shape, b: Array | None = None) -> ModelProto:
    """The node, which writes `t`, in one branch; the other gives its input."""
    stored = {"w": w} | ({} if b is None else {"b": b})
    return branching(body("t", [node], stored), body("e", [helper.make_node("Neg", ["h"], ["e"])]), shape=shape)


def convolution(rank: int, op: str = "Conv", **attributes: Any) -> ModelProto:
    groups = attributes.get("group", 1)
    shape = (6, 4 // groups) if op == "Conv" else (4, 6 // groups)
    node = helper.make_node(op, ["h", "w", "b"], ["t"], name="layer", **attributes)
    return one_layer_per_branch(node, random(rank, *shape, *(3,) * rank), ("n", 4, *(9,) * rank), random(9, 6))


def nested() -> ModelProto:
    """A branch of a branch, with layers in front, inside and behind."""
    inner_then = body("p", [product("p", "b", "q")], {"q": random(3, 8, 8)})
    inner_else = body("q", [constant("q.w", random(4, 8, 8)), product("q", "b", "q.w")])
    then = [
        constant("w", random(1, 8, 8)),
        product("outer", "h", "w", "b"),
        helper.make_node("ReduceMax", ["b"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "limit"], ["large"]),
        helper.make_node("If", ["large"], ["u"], name="inner_if", then_branch=inner_then, else_branch=inner_else),
        constant("last.w", random(2, 8, 8)),
        product("last", "u", "last.w", "t"),
    ]
    return branching(body("t", then), body("e", [product("e", "h", "outer.w")]), {"outer.w": random(5, 8, 8), "limit": LIMIT})


MIDDLE: Final = -0.5788  # about the median of what it is compared with
LIMIT: Final = np.array(3, np.float32)


def shared() -> ModelProto:
    """As merged decoders have it: both branches read the same tensors of the outer graph."""
    tensors = {"w": random(1, 8, 8), "v": random(2, 8, 8), "c": random(3, 8)}

    def branch(name: str, act: str) -> GraphProto:
        nodes = [
            product(f"{name}1", "h", "w"),
            helper.make_node("Add", [f"{name}1", "c"], [f"{name}2"]),
            helper.make_node(act, [f"{name}2"], [f"{name}3"]),
            product(f"{name}4", f"{name}3", "v"),
            helper.make_node("Identity", [f"{name}4"], [name]),
        ]
        return body(name, nodes)

    return branching(branch("t", "Relu"), branch("e", "Sigmoid"), tensors)


def chained() -> ModelProto:
    """The weight behind nodes that move it, one of them outside; the output of the branch is read inside it too."""
    nodes = [
        helper.make_node("Transpose", ["moved"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["cast"], to=1),
        product("t", "h", "cast"),
        helper.make_node("Relu", ["t"], ["unread"]),
    ]
    model = branching(
        body("t", nodes), body("e", [helper.make_node("Relu", ["h"], ["e"])]), {"w": random(1, 64, dtype=np.float16)}
    )
    model.graph.node.insert(0, helper.make_node("Reshape", ["w", "shape"], ["moved"]))
    model.graph.initializer.append(tensor(np.array([8, 8]), "shape"))
    model.graph.output[0].CopyFrom(value("y", ("n", 8)))
    return model


MODELS: Final[Mapping[str, Callable[[], ModelProto]]] = {
    "two-products": two_products,
    "nested": nested,
    "shared": shared,
    "chained": chained,
    "conv1d": lambda: convolution(1, dilations=[2], pads=[1, 2]),
    "conv2d": lambda: convolution(2, strides=[2, 1], group=2),
    "conv3d": lambda: convolution(3, auto_pad="SAME_UPPER"),
    "transposed1d": lambda: convolution(1, "ConvTranspose", strides=[2], pads=[3, 2]),
    "transposed2d": lambda: convolution(2, "ConvTranspose", group=2, output_padding=[1, 0], strides=[2, 2]),
    "gemm": lambda: one_layer_per_branch(
        helper.make_node("Gemm", ["h", "w", "b"], ["t"], name="layer", transB=1, alpha=0.5, beta=2.0),
        random(1, 5, 8),
        ("n", 8),
        random(2, 5),
    ),
    "gemm-turned": lambda: one_layer_per_branch(
        helper.make_node("Gemm", ["h", "w"], ["t"], name="layer", transA=1), random(1, 8, 5), (8, "n")
    ),
    "gemm-no-bias": lambda: one_layer_per_branch(
        helper.make_node("Gemm", ["h", "w", "b"], ["t"], name="layer", beta=0.0), random(1, 8, 5), ("n", 8), random(2, 5)
    ),
    "left": lambda: one_layer_per_branch(
        helper.make_node("MatMul", ["w", "h"], ["t"], name="layer"), random(1, 5, 8), (3, 8, "n")
    ),
    "batched": lambda: one_layer_per_branch(
        helper.make_node("MatMul", ["h", "w"], ["t"], name="layer"), random(1, 3, 8, 5), (2, 3, "n", 8)
    ),
}
"""Models whose layers are inside branches of an `If` on the input `yes`."""


def feeds_for(model: ModelProto, seed: int = 0) -> dict[str, Array]:
    """Six samples."""
    sizes = [dim.dim_value or 6 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": random(seed, *sizes)}


def moved(layer: Layer, graph: Graph, seed: int = 0) -> RepairedLayer:
    """Something else in every weight and bias."""
    weight = read_weight(graph, layer) * np.random.default_rng(seed).integers(0, 2, (layer.rows, layer.cols))
    return RepairedLayer(weight, random(seed, layer.rows).astype(np.float64), np.zeros(layer.rows))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("branch", [YES, NO], ids=["then", "else"])
def test_a_flat_model_means_the_same_and_goes_back(name: str, branch: Feeds) -> None:
    model = MODELS[name]()
    before = models.clone(model)
    flat = flatten(model)
    assert model == before
    assert unflatten(flat, flat.model) == model
    layers, skipped = find_layers(Graph(flat.model), ALL)
    inside = {n.name for node in model.graph.node for item in node.attribute for n in item.g.node}
    assert {use.node.removesuffix("_2") for layer in layers for use in layer.uses} & inside
    assert not [s for s in skipped if "inside the body" in s.reason]
    for seed in range(3):
        feeds = {**feeds_for(model, seed), **branch}
        assert np.array_equal(run(model, feeds)["y"], run(flat.model, feeds)["y"])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_outside_comes_back_inside(name: str) -> None:
    model = MODELS[name]()
    flat = flatten(model)
    graph = Graph(flat.model)
    layers, _ = find_layers(graph, ALL)
    sparse = models.clone(flat.model)
    for number, layer in enumerate(layers):
        write_layer(sparse, layer, moved(layer, graph, number))
    result = unflatten(flat, sparse)
    onnx.checker.check_model(result, full_check=True)
    assert [node.name for node in result.graph.node] == [node.name for node in model.graph.node]
    for branch in (YES, NO):
        feeds = {**feeds_for(model), **branch}
        expected, given = run(sparse, feeds)["y"], run(result, feeds)["y"]
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
        changed = not np.allclose(given, run(model, feeds)["y"], atol=1e-2)
        assert changed == (branch is YES or name in ("two-products", "nested", "shared"))
    again, _ = find_layers(Graph(flatten(result).model), ALL)
    assert [layer.weight for layer in again] == [layer.weight for layer in layers]
    weights = [read_weight(Graph(flatten(result).model), layer) for layer in again]
    for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        np.testing.assert_allclose(weight, moved(layer, graph, number).weight, rtol=1e-3, atol=1e-6)


def test_biases_are_replaced_only_where_they_must_grow() -> None:
    nodes = [
        helper.make_node("Gemm", ["h", "w", "one"], ["a"], name="grows"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "v", "c"], ["t"], name="fits"),
    ]
    stored = {"w": random(1, 8, 8), "v": random(2, 8, 8), "one": random(3, 1), "c": random(4, 8)}
    model = branching(body("t", nodes, stored), body("e", [helper.make_node("Relu", ["h"], ["e"])]))
    flat = flatten(model)
    sparse = models.clone(flat.model)
    for layer in find_layers(Graph(flat.model), ALL)[0]:
        write_layer(sparse, layer, moved(layer, Graph(flat.model)))
    branch = next(item.g for item in unflatten(flat, sparse).graph.node[1].attribute if item.name == "then_branch")
    assert {t.name for t in branch.initializer} == {"w", "v", "c"}
    assert [node.op_type for node in branch.node] == ["Constant", "Gemm", "Relu", "Gemm"]
    assert list(branch.node[1].input) == ["h", "w", "grows.relrep_bias"]


def test_a_weight_that_a_branch_reads_otherwise_too_stays() -> None:
    nodes = [
        product("a"),
        helper.make_node("ReduceSum", ["w"], ["b"], keepdims=0),
        helper.make_node("Add", ["a", "b"], ["t"]),
    ]
    model = branching(body("t", nodes, {"w": random(1, 8, 8)}), body("e", [helper.make_node("Relu", ["h"], ["e"])]))
    layers, skipped = find_layers(Graph(flatten(model).model), ALL)
    assert layers == []
    assert skipped[0].reason == "its weight 'w' is also read by 'if' (If)"


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"pads": [1, 1, 1]}, "do not fit a kernel of 2 axes"),
        ({"dilations": [2, 2, 2]}, "do not fit a kernel of 2 axes"),
        ({"pads": [1 << 62] * 4}, "whose branches cannot be taken apart"),
        ({"group": 4}, "depthwise convolution"),
    ],
)
def test_layers_that_cannot_come_out_stay_with_the_reason(attributes: dict[str, Any], why: str) -> None:
    flat = flatten(convolution(2, **attributes))
    assert flat.model is flat.original
    (skipped,) = find_layers(Graph(flat.model), ALL)[1]
    assert skipped.node == "layer"
    assert why in skipped.reason


@pytest.mark.parametrize(
    "bias",
    [
        [helper.make_node("Constant", [], ["b"], value_floats=[1.0] * 8)],
        [helper.make_node("ReduceMean", ["h"], ["b"], axes=[0], keepdims=0)],
    ],
    ids=["floats", "computed"],
)
def test_a_layer_whose_bias_is_no_stored_tensor_stays_in_its_branch(bias: list[NodeProto]) -> None:
    nodes = [
        *bias,
        helper.make_node("Gemm", ["h", "w", "b"], ["a"], name="biased"),
        helper.make_node("Relu", ["a"], ["r"]),
        product("t", "r", "v"),
    ]
    stored = {"w": random(1, 8, 8), "v": random(2, 8, 8)}
    model = branching(body("t", nodes, stored), body("e", [helper.make_node("Relu", ["h"], ["e"])]))
    feeds = {**feeds_for(model), **YES}
    assert np.array_equal(run(flatten(model).model, feeds)["y"], run(model, feeds)["y"])
    result = calibrated(model, [YES])
    assert [report.layer.name for report in result.layers] == ["t.product"]
    assert "its bias is computed at run time" in {s.reason for s in result.skipped if s.node == "biased"}


def test_models_without_such_layers_stay_the_ones_they_are() -> None:
    for make in (models.with_if, models.convnet):
        model = make()
        flat = flatten(model)
        assert flat.model is model
        assert unflatten(flat, model) is model


def calibrated(model: ModelProto, conditions: Sequence[Feeds], **settings: Any) -> Result:
    """A run at half sparsity on ten feeds for each condition."""
    feeds = [{**feeds_for(model, seed), **condition} for seed in range(10) for condition in conditions]
    config = Config(**{"sparsity": 0.5, "allocate": "uniform", "min_size": 1, "threads": 1, "positions": None, **settings})
    return optimize(model, None, feeds, config)


def stored_inside(model: ModelProto, branch: str) -> dict[str, Array]:
    """Tensors that a branch of the one `If` stores."""
    node = next(node for node in model.graph.node if node.op_type == "If")
    graph = next(item.g for item in node.attribute if item.name == branch)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return found | {n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}


@pytest.mark.parametrize("name", MODELS)
def test_sparsity_0_changes_no_bit(name: str) -> None:
    model = MODELS[name]()
    result = calibrated(model, [YES, NO], sparsity=0.0)
    for branch in (YES, NO):
        feeds = {**feeds_for(model, 5), **branch}
        assert np.array_equal(run(model, feeds)["y"], run(result.model, feeds)["y"])


@pytest.mark.parametrize("repair", ["none", "reconstruct"])
def test_both_branches_are_pruned_in_their_own_tensors(repair: str) -> None:
    model = two_products()
    result = calibrated(model, [YES, NO], repair=repair)
    for branch in ("then_branch", "else_branch"):
        stored, before = stored_inside(result.model, branch), stored_inside(model, branch)
        assert {name: float((array == 0).mean()) for name, array in stored.items() if array.ndim == 2} == {"w": 0.5, "v": 0.5}
        kept = stored["w"] != 0
        assert np.array_equal(stored["w"][kept], before["w"][kept]) == (repair == "none")
    assert {report.layer.name: report.zeros for report in result.layers} == {
        "first": 32,
        "second": 16,
        "first_2": 32,
        "second_2": 16,
    }


def test_repair_inside_a_branch_is_what_it_is_outside() -> None:
    """The branch's layers alone, as a model without `If`, get the same weights from the same samples."""
    nodes = [
        constant("w", random(1, 8, 8)),
        product("a", "h", "w"),
        helper.make_node("Relu", ["a"], ["b"]),
        constant("v", random(2, 8, 8)),
        product("t", "b", "v"),
    ]
    inside = branching(body("t", nodes), body("e", [helper.make_node("Relu", ["h"], ["e"])]))
    plain = build([helper.make_node("Tanh", ["x"], ["h"]), *nodes], {"x": ("n", 8)}, ["t"])
    config = Config(sparsity=0.5, allocate="uniform", min_size=1, threads=1)
    feeds, held = ([feeds_for(inside, seed) for seed in seeds] for seeds in (range(16), range(16, 20)))
    result = optimize(inside, None, [{**f, **YES} for f in feeds], config, holdout=[{**f, **YES} for f in held])
    alone = optimize(plain, None, feeds, config, holdout=held)
    outside = {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in alone.model.graph.node
               if node.op_type == "Constant"}  # fmt: skip
    for name, array in stored_inside(result.model, "then_branch").items():
        if array.ndim == 2:
            np.testing.assert_allclose(array, outside[name], rtol=1e-4, atol=1e-5)


def test_samples_of_the_other_branch_do_not_count() -> None:
    """What a branch gets does not depend on how often the other one runs, nor on what it then sees."""
    model = two_products()
    feeds = [{**feeds_for(model, seed), **YES} for seed in range(16)]
    other = [{"x": 100 * feeds_for(model, seed)["x"], **NO} for seed in range(16)]
    config = Config(sparsity=0.5, allocate="uniform", min_size=1, threads=1, positions=None)
    held = [{**feeds_for(model, 99), **YES}, {**feeds_for(model, 98), **YES}]
    alone, both = (optimize(model, None, data, config, holdout=held) for data in (feeds, [*feeds, *other]))
    for name, array in stored_inside(alone.model, "then_branch").items():
        np.testing.assert_allclose(array, stored_inside(both.model, "then_branch")[name], rtol=1e-4, atol=1e-6)
    assert {s.reason for s in alone.skipped if "else" in s.reason} == {
        "inside the else branch of 'if', which no calibration sample takes; give samples that do"
    }
    assert not [s for s in both.skipped if "sample" in s.reason]
    untouched = stored_inside(model, "else_branch")
    assert all(np.array_equal(array, untouched[name]) for name, array in stored_inside(alone.model, "else_branch").items())
    assert any((array == 0).any() for array in stored_inside(both.model, "else_branch").values())


def test_a_weight_of_both_branches_is_pruned_for_both() -> None:
    model = shared()
    result = calibrated(model, [YES, NO])
    assert {report.layer.name: len(report.layer.uses) for report in result.layers} == {"e1.product": 2, "e4.product": 2}
    assert all(float((models.stored(result.model, name) == 0).mean()) == 0.5 for name in "wv")
    one_sided = calibrated(model, [YES])
    assert len(one_sided.layers) == 2  # one use is enough


def test_nested_branches_are_reached_or_named() -> None:
    model = nested()
    result = calibrated(model, [YES, NO])
    assert {report.layer.name for report in result.layers} == {f"{name}.product" for name in ("outer", "last", "p", "q", "e")}
    never = nested()
    never.graph.initializer[1].CopyFrom(tensor(np.array(1e9, np.float32), "limit"))
    result = calibrated(never, [YES, NO])
    assert {s.node: s.reason for s in result.skipped}["p.product"] == (
        "inside the then branch of 'inner_if', which no calibration sample takes; give samples that do"
    )


def test_a_model_whose_branches_no_sample_takes_is_refused() -> None:
    model = branching(body("t", [product("t")], {"w": random(1, 8, 8)}), body("e", [helper.make_node("Relu", ["h"], ["e"])]))
    with pytest.raises(ModelError, match=r"nothing to prune \(t.product: inside the then branch of 'if', which no calibration"):
        calibrated(model, [NO])


def test_a_condition_that_the_layers_decide() -> None:
    """The sparse network may take the other branch; what only one of them sees is left out."""
    tensors: dict[str, Array] = {"middle": np.array(MIDDLE, np.float32), "w": random(1, 8, 8)}
    nodes = [
        linear("front", "x", "h", tensors, 8, 8, 3),
        helper.make_node("ReduceMean", ["h"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "middle"], ["yes"]),
        helper.make_node(
            "If", ["yes"], ["y"], name="if",
            then_branch=body("t", [product("t")]), else_branch=body("e", [helper.make_node("Relu", ["h"], ["e"])]),
        ),
    ]  # fmt: skip
    model = build(nodes, {"x": ("n", 8)}, ["y"], tensors)
    feeds = [{"x": random(seed, 2, 8)} for seed in range(40)]
    result = optimize(model, None, feeds, Config(sparsity=0.9, allocate="uniform", min_size=1, threads=1, batch_size=2))
    taken = [[bool(run(m, feed, ["yes"])["yes"]) for feed in feeds] for m in (model, result.model)]
    assert taken[0] != taken[1]
    assert sum(report.zeros for report in result.layers) == 115


def test_damage_of_a_branch_that_the_few_samples_do_not_take_is_not_zero_but_unknown() -> None:
    model = two_products()
    feeds = [{**feeds_for(model, seed), **c} for seed in range(10) for c in (YES, NO)]
    held = [{**feeds_for(model, seed), **YES} for seed in range(20, 24)]
    result = optimize(model, None, feeds, Config(sparsity=0.5, min_size=1, threads=1, allocate="rr-curve"), holdout=held)
    known = {report.layer.name: report.curve.damage for report in result.layers}
    assert [name for name, damage in known.items() if np.isnan(damage)] == ["first", "second"]  # of the else branch
    assert known["first_2"] > 0


def test_external_data_inside_branches(tmp_path: Any) -> None:
    models.save(two_products(), tmp_path / "m.onnx", data="m.data")
    feeds = [{**feeds_for(two_products(), seed), **c} for seed in range(10) for c in (YES, NO)]
    optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", feeds, Config(sparsity=0.5, min_size=1, threads=1))
    loaded = load(tmp_path / "s.onnx")
    assert loaded.external.keys() >= {"v", "bias"}
    assert float((stored_inside(loaded.model, "else_branch")["v"] == 0).mean()) > 0


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (11, 3), (13, 8), (21, 10)])
def test_operator_sets_and_ir_versions(opset: int, ir_version: int) -> None:
    model = branching(
        body("t", [constant("w", random(1, 8, 8)), product("t")]),
        body("e", [helper.make_node("Relu", ["h"], ["e"])]),
        opset=opset,
        ir_version=ir_version,
    )
    result = calibrated(model, [YES, NO])
    assert (result.model.ir_version, result.model.opset_import[0].version) == (ir_version, opset)
    assert float((stored_inside(result.model, "then_branch")["w"] == 0).mean()) == 0.5
    run(result.model, {**feeds_for(model), **YES})


def test_inspection_shows_them_without_data() -> None:
    assert [facts.layer.name for facts in inspect(two_products(), ALL).layers] == ["first", "second", "first_2", "second_2"]


def test_gradients_stop_in_front_of_them() -> None:
    flat = flatten(two_products())
    layers, _ = find_layers(Graph(flat.model), ALL)
    found = outlook(flat.model, layers)
    assert [(o.layer, o.reaches_outputs) for o in found] == [(layer.name, False) for layer in layers]
    assert all("if" in {wall.node for wall in o.stopped} for o in found if "second" in o.layer)


def test_refinement_leaves_them_as_repaired() -> None:
    nodes = [
        helper.make_node("If", ["yes"], ["s"], name="if", then_branch=body("t", [product("t")], {"w": random(1, 8, 8)}),
                         else_branch=body("e", [helper.make_node("Relu", ["h"], ["e"])])),
    ]  # fmt: skip
    stored: dict[str, Array] = {}
    layers = [linear("front", "x", "h", stored, 8, 8, 3), *nodes, linear("back", "s", "y", stored, 8, 8, 5)]
    model = build(layers, {"x": ("n", 8)}, ["y"], stored)
    model.graph.input.append(value("yes", (), np.bool_))
    plain, refined = (calibrated(model, [YES], refine=epochs, repair="none") for epochs in (0, 20))
    assert np.array_equal(stored_inside(plain.model, "then_branch")["w"], stored_inside(refined.model, "then_branch")["w"])
    assert not np.array_equal(models.stored(plain.model, "back.w"), models.stored(refined.model, "back.w"))
