"""Quantized layers as sparse int8 operators: what is rewritten, that the file computes the same, what stays dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from relrep_onnx import kernels
from relrep_onnx.export import Order, make
from relrep_onnx.export.sparse_ort import plan, to_sparse_ort
from relrep_onnx.types import Array
from tests.kernel_models import session, sparse_weight
from tests.models import build, random
from tests.test_sparse_ort import operators, residual_network


def quantized(model: ModelProto, *shape: int, **settings: Any) -> ModelProto:
    feeds = [{"x": random(i, *shape)} for i in range(4)]
    product = make("int8", model, Order(calibration=lambda: iter(feeds), **settings))
    assert isinstance(product.content, ModelProto)
    return product.content


def agree(model: ModelProto, layers: list[str], *shape: int) -> ModelProto:
    """The sparse form, after checking it against the quantized model: outputs are a step of their scale away at most."""
    sparse = to_sparse_ort(model, layers=layers)
    onnx.checker.check_model(sparse)
    x = {"x": random(9, *shape)}
    wanted = session(model, sparse=False).run(None, x)[0]
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    step = float(tensors[model.graph.node[-1].input[1]])
    for library in (False, True) if kernels.available() else (False,):
        assert np.abs(session(sparse, sparse=library).run(None, x)[0] - wanted).max() <= 1.01 * step
    return sparse


def test_a_network_becomes_int8_operators() -> None:
    model = quantized(residual_network(), 4, 8, 12, 12)
    layers = [choice.layer for choice in plan(model)]
    assert layers == ["projection", "first", "second", "matmul/MatMulAddFusion"]  # the other Gemm has a factor: it is floating
    sparse = agree(model, layers, 4, 8, 12, 12)
    found = operators(sparse)
    assert (found.count("SparseQConv"), found.count("SparseQGemm"), found.count("Conv")) == (3, 1, 0)
    assert {f.name for f in sparse.functions} == {"SparseQConv", "SparseQGemm"}
    assert not [t.name for t in sparse.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]


def test_layers_that_are_not_named_stay_dense() -> None:
    sparse = agree(quantized(residual_network(), 4, 8, 12, 12), ["second"], 4, 8, 12, 12)
    assert operators(sparse).count("SparseQConv") == 1
    assert operators(sparse).count("Conv") == 2


POOLS = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}


def pooled(*pools: dict[str, Any]) -> ModelProto:
    """Pools between two convolutions, quantized."""
    stored = {"w0": sparse_weight(0, (16, 8, 3, 3), 0.3), "w1": sparse_weight(1, (8, 16, 3, 3), 0.3)}
    nodes = [helper.make_node("Conv", ["x", "w0"], ["t0"], name="first")]
    nodes += [helper.make_node("MaxPool", [f"t{i}"], [f"t{i + 1}"], name=f"pool{i}", **pool) for i, pool in enumerate(pools)]
    nodes.append(helper.make_node("Conv", [f"t{len(pools)}", "w1"], ["y"], name="second"))
    return quantized(build(nodes, {"x": ["N", 8, 20, 20]}, ["y"], stored), 4, 8, 20, 20)


@pytest.mark.parametrize(
    "pool", [POOLS, {"kernel_shape": [2, 3], "ceil_mode": 1}, {"kernel_shape": [5, 5], "auto_pad": "SAME_UPPER"}]
)
def test_pools_behind_int8_operators_have_their_channels_last(pool: dict[str, Any]) -> None:
    found = operators(agree(pooled(pool), ["first", "second"], 4, 8, 20, 20))
    assert (found.count("NhwcMaxPool"), found.count("MaxPool")) == (1, 0)


def test_every_pool_of_a_chain_has_its_channels_last() -> None:
    found = operators(agree(pooled(POOLS, {"kernel_shape": [2, 2]}), ["first", "second"], 4, 8, 20, 20))
    assert (found.count("NhwcMaxPool"), found.count("MaxPool")) == (2, 0)


@pytest.mark.parametrize(("pool", "layers"), [({**POOLS, "dilations": [2, 2]}, ["first"]), (POOLS, ["second"])])
def test_other_pools_stay(pool: dict[str, Any], layers: list[str]) -> None:
    found = operators(agree(pooled(pool), layers, 4, 8, 20, 20))
    assert (found.count("NhwcMaxPool"), found.count("MaxPool")) == (0, 1)


def pairs(stored: dict[str, Array], activation: str = "", **attributes: Any) -> ModelProto:
    """QuantizeLinear -> DequantizeLinear -> Conv -> [activation] -> the same, as tools other than ours write it."""
    weight = stored["w"]
    op = "Conv" if weight.ndim == 4 else "MatMul"
    stored = {
        "s": np.array(0.03, np.float32),
        "z": np.array(120, np.uint8),
        "ws": np.array(0.01, np.float32),
        "ys": np.array(0.05, np.float32),
        "yz": np.array(90, np.uint8),
        "low": np.array(-1.02, np.float32),
        "high": np.array(1.77, np.float32),
        **stored,
    }
    bias = ["b"] if "b" in stored else []
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        *([helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0)] if bias else []),
        helper.make_node(op, ["xd", "wd", *(["bd"] if bias else [])], ["c"], name="layer", **attributes),
    ]
    last = "c"
    if activation:
        nodes.append(helper.make_node(activation, [last, *(["low", "high"] if activation == "Clip" else [])], ["a"]))
        last = "a"
    nodes += [
        helper.make_node("QuantizeLinear", [last, "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    return build(nodes, {"x": [1, 8, 6, 6] if weight.ndim == 4 else [5, 8]}, ["y"], stored)


def whole(*shape: int) -> Array:
    weight: Array = np.rint(20 * sparse_weight(3, shape, 0.4)).astype(np.int8)
    return weight


@pytest.mark.parametrize("activation", ["", "Relu", "Clip"])
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (8, 12)])
def test_activations_become_bounds(activation: str, shape: tuple[int, ...]) -> None:
    model = pairs({"w": whole(*shape)}, activation)
    sparse = agree(model, ["layer"], *([1, 8, 6, 6] if len(shape) == 4 else [5, 8]))
    name = "SparseQConv" if len(shape) == 4 else "SparseQGemm"
    assert operators(sparse)[1] == name + ("Clip" if activation else "")


@pytest.mark.parametrize(
    ("changes", "attributes"),
    [
        ({"ws": np.full(12, 0.01, np.float32), "b": np.arange(12, dtype=np.int32), "bs": np.full(12, 3e-4, np.float32)}, {}),
        ({}, {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
        ({"w": whole(12, 4, 3, 3)}, {"group": 2}),
    ],
)
def test_forms_of_a_convolution(changes: dict[str, Array], attributes: dict[str, Any]) -> None:
    model = pairs({"w": whole(12, 8, 3, 3), **changes}, **attributes)
    assert "SparseQConv" in operators(agree(model, ["layer"], 1, 8, 6, 6))


@pytest.mark.parametrize(
    ("changes", "attributes"),
    [
        ({"z": np.array(3, np.int8)}, {}),  # int8 activations
        ({"w": whole(12, 8, 3, 3).view(np.uint8)}, {}),
        ({"w": whole(8, 1, 3, 3)}, {"group": 8}),  # depthwise
        ({"b": np.arange(12, dtype=np.int32), "bs": np.full(12, 1e-2, np.float32)}, {}),  # a bias in another unit
        ({"b": np.full(12, 2**31 - 1, np.int32), "bs": np.full(12, 3e-4, np.float32)}, {}),  # sums that overflow
        ({"ws": np.full(12, -0.01, np.float32)}, {}),
        ({}, {"auto_pad": "SAME_UPPER"}),
    ],
)
def test_what_the_kernels_do_not_compute_stays_dense(changes: dict[str, Array], attributes: dict[str, Any]) -> None:
    assert plan(pairs({"w": whole(12, 8, 3, 3), **changes}, **attributes)) == ()


def test_values_int8_quantizes_first() -> None:
    stored = {f"w{i}": sparse_weight(i, (64, 64, 3, 3), 0.05) for i in range(3)}
    nodes = [
        helper.make_node("Conv", [f"t{i}" if i else "x", f"w{i}"], [f"t{i + 1}"], name=f"conv{i}", pads=[1, 1, 1, 1])
        for i in range(3)
    ]
    model = build(nodes, {"x": ["N", 64, 28, 28]}, ["t3"], stored)
    feeds = [{"x": random(i, 2, 64, 28, 28)} for i in range(2)]
    product = make("sparse-ort", model, Order(values="int8", calibration=lambda: iter(feeds)))
    assert isinstance(product.content, ModelProto)
    assert operators(product.content).count("SparseQConv") == 3
    assert product.content.ByteSize() < 0.06 * model.ByteSize()
    assert product.notes[0].startswith("all ")
    assert "3 of 3 layers run sparse" in product.notes[1]
    assert product.tolerance == make("int8", model, Order(calibration=lambda: iter(feeds))).tolerance
