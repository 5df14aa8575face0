"""The form `sparse-ort`: what is fused, what stays, that the file computes the same with and without the library, its size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from relrep_onnx import kernels
from relrep_onnx.export.sparse_ort import plan, to_sparse_ort
from relrep_onnx.graph.batchnorm import fold_batchnorm
from relrep_onnx.kernels.costs import COSTS
from relrep_onnx.types import Array, ConfigError, ModelError
from tests.kernel_models import close, session, sparse_weight
from tests.models import build, random

CONV: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def agree(model: ModelProto, *, layers: list[str] | None = None) -> ModelProto:
    """The sparse form, after checking it against the model it was made of, with the library and without."""
    sparse = to_sparse_ort(model, layers=layers)
    onnx.checker.check_model(sparse)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        feeds[value.name] = random(1, *(d.dim_value or 2 for d in value.type.tensor_type.shape.dim))
    wanted = session(model, sparse=False).run(None, feeds)
    for library in (False, True) if kernels.available() else (False,):
        for got, want in zip(session(sparse, sparse=library).run(None, feeds), wanted, strict=True):
            assert close(got, want)
    return sparse


def residual_network() -> ModelProto:
    """Conv-BN-Relu, Conv-BN, a residual sum with a projection, Clip, pooling, a Gemm, and a MatMul with its bias."""
    stored = {
        "w1": sparse_weight(1, (16, 8, 3, 3), 0.1),
        "w2": sparse_weight(2, (16, 16, 3, 3), 0.1),
        "b2": random(3, 16),
        "w3": sparse_weight(4, (16, 8, 1, 1), 0.1),
        "w4": sparse_weight(5, (24, 16), 0.1),
        "b4": random(6, 24),
        "w5": sparse_weight(7, (24, 12), 0.1),
        "b5": random(8, 12),
        "six": np.array(6, np.float32),
    }
    for name in ("s", "m"):
        stored |= {f"{name}1": random(9, 16), f"{name}2": random(10, 16)}
    stored |= {"v1": np.abs(random(11, 16)) + 0.5, "v2": np.abs(random(12, 16)) + 0.5}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", **CONV),
        helper.make_node("BatchNormalization", ["c1", "s1", "m1", "m2", "v1"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", **CONV),
        helper.make_node("BatchNormalization", ["c2", "s2", "m2", "m1", "v2"], ["n2"], epsilon=1e-3),
        helper.make_node("Conv", ["x", "w3"], ["c3"], name="projection"),
        helper.make_node("Add", ["c3", "n2"], ["a"]),
        helper.make_node("Clip", ["a", "", "six"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["g"], name="gemm", transB=1, alpha=0.5, beta=2.0),
        helper.make_node("MatMul", ["g", "w5"], ["mm"], name="matmul"),
        helper.make_node("Add", ["b5", "mm"], ["y"]),
    ]
    return build(nodes, {"x": ["N", 8, 12, 12]}, ["y"], stored)


ALL = ["first", "second", "projection", "gemm", "matmul"]


def test_whole_chains_become_sparse_operators() -> None:
    sparse = agree(residual_network(), layers=ALL)
    assert operators(sparse) == [
        "SparseConvRelu", "SparseConv", "SparseConvAddClip", "GlobalAveragePool", "Flatten", "SparseGemm", "SparseGemm",
    ]  # fmt: skip
    assert {f.name for f in sparse.functions} == {"SparseConvRelu", "SparseConv", "SparseConvAddClip", "SparseGemm"}
    assert not {"w1", "w2", "w3", "s1", "v2", "six"} & {tensor.name for tensor in sparse.graph.initializer}


@pytest.mark.parametrize("layers", [[], ["first"], ["second", "gemm"], ["projection"]])
def test_layers_that_are_not_named_stay_dense(layers: list[str]) -> None:
    sparse = agree(residual_network(), layers=layers)
    assert sum(op.startswith("Sparse") for op in operators(sparse)) == len(layers)


def test_a_layer_without_a_name_takes_nobody_elses() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["q"]), helper.make_node("Sigmoid", ["q"], ["y"], name="q")]
    sparse = agree(build(nodes, {"x": ["N", 24]}, ["y"], {"w": sparse_weight(1, (24, 16), 0.1)}), layers=["q"])
    assert [node.name for node in sparse.graph.node] == ["", "q"]


def test_the_given_model_is_not_changed() -> None:
    model = residual_network()
    before = model.SerializeToString()
    to_sparse_ort(model, layers=ALL)
    assert model.SerializeToString() == before


def test_batchnorm_folds_exactly_and_keeps_zeros() -> None:
    model = residual_network()
    folded = ModelProto()
    folded.CopyFrom(model)
    fold_batchnorm(folded)
    assert "BatchNormalization" not in operators(folded)
    x = {"x": random(1, 2, 8, 12, 12)}
    assert close(session(folded, sparse=False).run(None, x)[0], session(model, sparse=False).run(None, x)[0])
    conv = folded.graph.node[0]
    weight = next(onnx.numpy_helper.to_array(t) for t in folded.graph.initializer if t.name == conv.input[1])
    assert np.array_equal(weight != 0, sparse_weight(1, (16, 8, 3, 3), 0.1) != 0)


@pytest.mark.parametrize("case", ["an output between", "two readers", "training", "no convolution"])
def test_batchnorm_stays_where_folding_would_change_something(case: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]) if case != "no convolution" else helper.make_node("Relu", ["x"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["n"], training_mode=int(case == "training")),
        helper.make_node("Add", ["n", "c"] if case == "two readers" else ["n", "n"], ["y"]),
    ]
    if case == "training":
        nodes[1].output.extend(["running_mean", "running_variance"])
    stored = {"w": sparse_weight(1, (4, 4, 1, 1), 0.5), "s": np.ones(4, np.float32)}
    model = build(nodes, {"x": [1, 4, 3, 3]}, ["y", "c"] if case == "an output between" else ["y"], stored)
    fold_batchnorm(model)
    assert "BatchNormalization" in operators(model)


def test_a_sum_with_a_broadcast_is_not_fused() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Add", ["c", "p"], ["y"]),
    ]
    sparse = agree(build(nodes, {"x": [1, 4, 6, 6]}, ["y"], {"w": sparse_weight(1, (4, 4, 1, 1), 0.3)}), layers=["conv"])
    assert operators(sparse) == ["SparseConv", "GlobalAveragePool", "Add"]


@pytest.mark.parametrize(
    ("batch", "other", "fused"), [("N", 1, 0), (1, "N", 0), ("N", "M", 0), ("N", "N", 1), (3, 3, 1), (1, 3, 0)]
)
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_a_sum_is_fused_only_where_both_sides_always_have_one_shape(
    op: str, batch: int | str, other: int | str, fused: bool
) -> None:
    weight, inside = (sparse_weight(1, (8, 8, 1, 1), 0.3), (8, 5, 5)) if op == "Conv" else (sparse_weight(1, (8, 8), 0.3), (5, 8))
    nodes = [helper.make_node(op, ["x", "w"], ["c"], name="layer"), helper.make_node("Add", ["c", "r"], ["y"])]
    model = build(nodes, {"x": [batch, *inside], "r": [other, *inside]}, ["y"], {"w": weight})
    sparse = to_sparse_ort(model, layers=["layer"])
    assert operators(sparse)[0].endswith("Add") == fused
    sizes = [size if isinstance(size, int) else {"N": 3, "M": 1}[size] for size in (batch, other)]
    feeds = {name: random(seed, size, *inside) for seed, (name, size) in enumerate(zip("xr", sizes, strict=True))}
    (wanted,) = session(model, sparse=False).run(None, feeds)
    for library in (False, True) if kernels.available() else (False,):
        assert close(session(sparse, sparse=library).run(None, feeds)[0], wanted)


def test_a_sum_of_open_sizes_is_fused_along_one_path() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "d"], ["half"], strides=[2, 2], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["half", "w"], ["c"], name="layer", **CONV),
        helper.make_node("Add", ["half", "c"], ["y"]),
    ]
    stored = {"d": random(1, 8, 8, 3, 3), "w": sparse_weight(1, (8, 8, 3, 3), 0.1)}
    model = build(nodes, {"x": ["N", 8, "H", "W"]}, ["y"], stored)
    sparse = to_sparse_ort(model, input_shapes={"x": (1, 8, 30, 41)}, layers=["layer"])
    assert operators(sparse) == ["Conv", "SparseConvAdd"]


def test_a_sum_of_one_tensor_with_itself_is_not_fused() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Add", ["c", "c"], ["y"])]
    sparse = agree(build(nodes, {"x": [1, 4, 6, 6]}, ["y"], {"w": sparse_weight(1, (4, 4, 1, 1), 0.3)}), layers=["conv"])
    assert operators(sparse) == ["SparseConv", "Add"]


def test_an_output_between_stays() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"])]
    sparse = agree(build(nodes, {"x": [1, 4, 6, 6]}, ["y", "c"], {"w": sparse_weight(1, (4, 4, 1, 1), 0.3)}), layers=["conv"])
    assert operators(sparse) == ["SparseConv", "Relu"]


def test_a_residual_of_higher_rank_product() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Add", ["x", "s"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    stored = {"w": sparse_weight(1, (20, 20), 0.1), "b": random(2, 20)}
    sparse = agree(build(nodes, {"x": [2, 7, 20]}, ["y"], stored), layers=["product"])
    assert operators(sparse) == ["SparseGemmAddRelu"]


@pytest.mark.parametrize(("rank", "fused"), [(1, True), (2, True), (3, False)])
def test_a_shift_that_adds_an_axis_is_no_bias(rank: int, fused: bool) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="product"), helper.make_node("Add", ["m", "b"], ["y"])]
    stored = {"w": sparse_weight(1, (24, 16), 0.1), "b": random(2, *[1] * (rank - 1), 16)}
    sparse = agree(build(nodes, {"x": ["N", 24]}, ["y"], stored), layers=["product"])
    assert operators(sparse) == ["SparseGemm", *(["Add"] if not fused else [])]


@pytest.mark.parametrize(
    ("shape", "possible"), [((), True), ((1,), True), ((1, 1), True), ((16,), True), ((1, 16), True), ((16, 1), False)]
)
def test_a_bias_of_gemm_is_one_number_or_a_row(shape: tuple[int, ...], possible: bool) -> None:
    stored = {"w": sparse_weight(1, (24, 16), 0.1), "c": random(2, *shape)}
    model = build([helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="gemm", beta=2.0)], {"x": [16, 24]}, ["y"], stored)
    assert len(plan(model)) == possible
    agree(model, layers=["gemm"] if possible else [])


@pytest.mark.parametrize("kind", ["same padding", "computed weight", "one dimension", "left operand", "transposed input"])
def test_what_cannot_be_sparse_stays_dense(kind: str) -> None:
    stored: dict[str, Array] = {"w": sparse_weight(1, (8, 8, 1, 1), 0.1)}
    shape: list[int | str] = [1, 8, 8, 8]
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    if kind == "computed weight":
        node = helper.make_node("Conv", ["x", "x"], ["y"])
    if kind == "one dimension":
        stored, shape, node = {"w": sparse_weight(1, (8, 8, 3), 0.1)}, [1, 8, 9], helper.make_node("Conv", ["x", "w"], ["y"])
    if kind == "left operand":
        stored, shape, node = {"w": sparse_weight(1, (8, 8), 0.1)}, [8, 9], helper.make_node("MatMul", ["w", "x"], ["y"])
    if kind == "transposed input":
        stored, shape, node = {"w": sparse_weight(1, (8, 8), 0.1)}, [8, 9], helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    model = build([node], {"x": shape}, ["y"], stored)
    assert plan(model) == ()
    assert operators(agree(model)) == [node.op_type]


def wide_network(density: float) -> ModelProto:
    stored = {f"w{i}": sparse_weight(i, (64, 64, 3, 3), density) for i in range(3)}
    nodes = [helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"conv{i}", **CONV) for i in range(3)]
    return build(nodes, {"t0": [1, 64, 28, 28]}, ["t3"], stored)


def test_the_way_between_two_convolutions_may_be_long() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t0"], name="first", **CONV),
        *(helper.make_node("Sin", [f"t{i}"], [f"t{i + 1}"]) for i in range(1500)),
        helper.make_node("Conv", ["t1500", "w"], ["y"], name="last", **CONV),
    ]
    model = build(nodes, {"x": ["N", 8, 6, 6]}, ["y"], {"w": sparse_weight(1, (8, 8, 3, 3), 0.1)})
    assert [choice.layer for choice in plan(model)] == ["first", "last"]


def test_choosing_among_many_layers_takes_no_cubic_time() -> None:
    densities = np.random.default_rng(0).choice([0.02, 0.05, 0.3, 0.9], 400)
    stored = {f"w{i}": sparse_weight(i, (16, 16, 3, 3), density) for i, density in enumerate(densities)}
    nodes = [helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], **CONV) for i in range(400)]
    model = build(nodes, {"t0": ["N", 16, 16, 16]}, ["t400"], stored)
    start = time.process_time()
    assert 0 < sum(choice.sparse for choice in plan(model)) < 400
    assert time.process_time() - start < 8


@pytest.mark.parametrize("instruction_set", COSTS)
def test_sparse_where_it_pays_and_dense_where_it_does_not(instruction_set: str) -> None:
    assert all(choice.sparse for choice in plan(wide_network(0.1), instruction_set=instruction_set))
    assert not any(choice.sparse for choice in plan(wide_network(0.9), instruction_set=instruction_set))


def test_a_model_that_gains_nothing_is_given_back() -> None:
    dense, normalized = wide_network(1.0), residual_network()
    assert to_sparse_ort(dense) is dense
    assert to_sparse_ort(normalized, layers=[]) is normalized


def test_layers_of_unknown_shape_go_by_density() -> None:
    for density, sparse in ((0.1, True), (0.5, False)):
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **CONV)]
        model = build(nodes, {"x": [1, 8, "H", "W"]}, ["y"], {"w": sparse_weight(1, (8, 8, 3, 3), density)})
        (choice,) = plan(model)
        assert choice.sparse is sparse


def test_the_file_is_small() -> None:
    model = wide_network(0.1)
    assert to_sparse_ort(model).ByteSize() < 0.27 * model.ByteSize()


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="instruction set 'abacus'; known: avx2"):
        plan(residual_network(), instruction_set="abacus")
    with pytest.raises(ConfigError, match=r"layers \['nobody'\] cannot be sparse; those that can: \['first'"):
        to_sparse_ort(residual_network(), layers=["nobody"])
    strange = build([helper.make_node("NoSuch", ["x"], ["y"])], {"x": [1, 4]}, ["y"], opset=9)
    with pytest.raises(ModelError, match="has operator set 9, 12 is needed, and ONNX cannot convert it"):
        to_sparse_ort(strange)


def test_stored_tensors_that_are_inputs_too_go() -> None:
    stored = {"w": sparse_weight(1, (64, 64), 0.1), "b": random(2, 64)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="product"), helper.make_node("Add", ["m", "b"], ["y"])]
    model = build(nodes, {"x": ["N", 64]}, ["y"], stored, opset=9, ir_version=3)
    assert [value.name for value in model.graph.input] == ["x", "w", "b"]
    sparse = to_sparse_ort(model, layers=["product"])
    assert [value.name for value in sparse.graph.input] == ["x"]
    assert sparse.ByteSize() < 0.25 * model.ByteSize()
    x = {"x": random(3, 2, 64)}
    for library in (False, True) if kernels.available() else (False,):
        assert close(session(sparse, sparse=library).run(None, x)[0], session(model, sparse=False).run(None, x)[0])


@pytest.mark.parametrize(
    ("low", "high", "fused"), [(-0.5, 0.5, True), (0.5, 0.5, True), (0.5, -0.5, False), (np.nan, 0.5, False)]
)
def test_bounds_in_the_wrong_order_are_not_fused(low: float, high: float, fused: bool) -> None:
    stored = {"w": sparse_weight(1, (8, 8), 0.3), "low": np.array(low, np.float32), "high": np.array(high, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="product"), helper.make_node("Clip", ["m", "low", "high"], ["y"])]
    model = build(nodes, {"x": [3, 8]}, ["y"], stored)
    sparse = to_sparse_ort(model, layers=["product"]) if np.isnan(low) else agree(model, layers=["product"])
    assert operators(sparse) == (["SparseGemmClip"] if fused else ["SparseGemm", "Clip"])


def test_old_operator_sets_are_raised() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", **CONV),
        helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["n"]),
        helper.make_node("Clip", ["n"], ["y"], min=-0.5, max=0.5),
    ]
    stored = {"w": sparse_weight(1, (8, 8, 3, 3), 0.1), "s": np.ones(8, np.float32)}
    sparse = agree(build(nodes, {"x": ["N", 8, 6, 6]}, ["y"], stored, opset=9, ir_version=4), layers=["conv"])
    assert operators(sparse) == ["SparseConvClip"]
    assert sparse.opset_import[0].version == 12
