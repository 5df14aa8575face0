"""Packing against a decoder of our own, and against what stock ONNX Runtime makes of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx import VerificationError
from relrep_onnx.export import Order, Values
from relrep_onnx.export.compact import LEVELS, check_unpacking, compact, pack, to_int8
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import Array
from tests import models
from tests.models import build, constant, random, run

STANDARD = {"Cast", "CumSum", "ScatterElements", "ConstantOfShape", "Reshape", "Mul"}


def sparse(seed: int, *shape: int, keep: float = 0.1, dtype: type = np.float32) -> Array:
    """Random numbers, most of them zero."""
    values = random(seed, *shape, dtype=dtype)
    values[np.random.default_rng(seed).random(shape) > keep] = 0
    return values


def unpacked(gaps: Array, values: Array, size: int) -> Array:
    """The decoder as the format's definition reads, element by element."""
    result, place = np.zeros(size, values.dtype), 0
    for gap, value in zip(gaps.tolist(), values, strict=True):
        place += gap
        result[place] = value
    return result


def content(model: ModelProto, values: Values = "float32") -> ModelProto:
    """The compact model."""
    made = compact(model, Order(values=values)).content
    assert isinstance(made, ModelProto)
    return made


def folded(model: ModelProto, path: Path) -> ModelProto:
    """What stock ONNX Runtime has left of a model after its basic optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def matmul(weight: Array, opset: int = 17) -> ModelProto:
    return build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("n", len(weight))}, ["y"], {"w": weight}, opset=opset)


@settings(deadline=None, max_examples=60)
@given(
    places=st.sets(st.integers(0, 2000), max_size=12),
    size=st.sampled_from([2001, 2600]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16, np.int8]),
)
def test_gaps_and_values_give_the_array_back(places: set[int], size: int, dtype: type) -> None:
    array: Array = np.zeros(size, dtype)
    array[sorted(places)] = np.arange(1, len(places) + 1)
    packed = pack(array)
    assert packed.gaps.dtype == np.uint8
    assert (packed.gaps[1:] > 0).all()
    np.testing.assert_array_equal(unpacked(packed.gaps, packed.values, size), array)
    assert len(packed.gaps) <= len(places) + size // 255


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 512, 1021])
def test_gaps_around_the_escape(gap: int) -> None:
    array = np.zeros(2100, np.float32)
    array[[gap, gap + 3, 2 * gap + 4]] = 1, 2, 3
    packed = pack(array)
    np.testing.assert_array_equal(unpacked(packed.gaps, packed.values, 2100), array)


def test_zeros_are_told_by_their_bits() -> None:
    array = np.zeros(300, np.float32)
    array[[5, 6, 7]] = -0.0, np.nan, np.inf
    packed = pack(array)
    assert unpacked(packed.gaps, packed.values, 300).tobytes() == array.tobytes()


def test_int8_rounds_to_the_nearest_step_on_the_best_axis() -> None:
    array = sparse(3, 12, 40) * np.logspace(-3, 3, 40, dtype=np.float32)
    stored, scale = to_int8(array)
    assert scale.shape == (1, 40)
    assert np.abs(stored).max() == LEVELS
    assert (stored[array == 0] == 0).all()
    step = np.broadcast_to(scale, array.shape)
    assert (np.abs(stored * scale - array) <= step / 2 * (1 + 1e-5)).all()
    np.testing.assert_allclose(scale[0], np.where(array.any(axis=0), np.abs(array).max(axis=0) / LEVELS, 1), rtol=1e-6)


def test_int8_keeps_scales_few() -> None:
    stored, scale = to_int8(random(0, 4, 4))
    assert scale.size == 1
    assert stored.dtype == np.int8
    stored, scale = to_int8(np.zeros((300,), np.float32))
    assert (stored == 0).all()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("shape", [(40, 30), (1200,), (6, 5, 4, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8])
def test_onnxruntime_folds_the_same_bits_back(shape: tuple[int, ...], dtype: type, tmp_path: Path) -> None:
    weight: Array = (sparse(7, *shape) * 20).astype(dtype)
    node = helper.make_node("Identity" if dtype == np.int8 else "Mul", ["w"] if dtype == np.int8 else ["w", "x"], ["y"])
    feed: Array = np.ones((1,) * len(shape), dtype)
    model = build([node], {"x": feed.shape}, ["y"], {"w": weight}, dtype=dtype)
    small = content(model)
    assert small.ByteSize() < model.ByteSize()
    onnx.checker.check_model(small, full_check=True)
    assert run(small, {"x": feed})["y"].tobytes() == run(model, {"x": feed})["y"].tobytes()
    if dtype == np.float32:
        left = folded(small, tmp_path / "folded.onnx")
        assert [n.op_type for n in left.graph.node] == ["Mul"]
        assert numpy_helper.to_array(next(t for t in left.graph.initializer if t.dims)).tobytes() == weight.tobytes()


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_values_are_folded_too(values: Values, tmp_path: Path) -> None:
    weight = sparse(1, 64, 32)
    small = content(matmul(weight), values)
    assert {n.op_type for n in small.graph.node} <= {*STANDARD, "MatMul"}
    assert all(n.domain == "" for n in small.graph.node)
    left = folded(small, tmp_path / "folded.onnx")
    assert [n.op_type for n in left.graph.node] == ["MatMul"]
    seen = numpy_helper.to_array(left.graph.initializer[0])
    bound = {"float32": 0.0, "float16": 2**-11 * np.abs(weight).max(), "int8": np.abs(weight).max() / LEVELS / 2 * 1.001}
    assert np.abs(seen - weight).max() <= bound[values]
    assert (seen[weight == 0] == 0).all()


@pytest.mark.parametrize(("values", "share"), [("float32", 0.13), ("float16", 0.08), ("int8", 0.06)])
def test_size_at_90_percent_on_a_million_weights(values: Values, share: float) -> None:
    weight = sparse(5, 1024, 1024)
    model = matmul(weight)
    assert content(model, values).ByteSize() <= share * model.ByteSize()


def test_int8_tensors_halve_again() -> None:
    weight = (sparse(5, 512, 512) * 30).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0.1, np.float32), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    small = content(model)
    assert small.ByteSize() < 0.22 * model.ByteSize()
    x = {"x": random(2, 3, 512)}
    np.testing.assert_array_equal(run(small, x)["y"], run(model, x)["y"])


def test_weights_in_constant_nodes_and_an_empty_one() -> None:
    nodes = [
        constant("w", sparse(1, 64, 32)),
        constant("nothing", np.zeros((64, 32), np.float32)),
        helper.make_node("Add", ["w", "nothing"], ["both"]),
        helper.make_node("MatMul", ["x", "both"], ["y"]),
    ]
    model = build(nodes, {"x": ("n", 64)}, ["y"])
    small = content(model)
    assert not [n for n in small.graph.node if n.op_type == "Constant"]
    np.testing.assert_array_equal(run(small, {"x": random(2, 3, 64)})["y"], run(model, {"x": random(2, 3, 64)})["y"])


def test_tensors_of_one_shape_share_their_zeros() -> None:
    tensors = {f"w{i}": sparse(i, 32, 32) for i in range(4)}
    nodes = [helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]) for i in range(4)]
    small = content(build(nodes, {"x": ("n", 32)}, ["h4"], tensors))
    assert sum(n.op_type == "ConstantOfShape" for n in small.graph.node) == 1
    assert len({t.name for t in small.graph.initializer}) == len(small.graph.initializer)


def test_a_compact_file_can_be_packed_again() -> None:
    """Its own gaps are mostly zero where the weight is: they get smaller once more."""
    weight = np.zeros((1000, 1000), np.float32)
    weight[:, :2] = random(0, 1000, 2)
    model = matmul(weight)
    once = content(model)
    twice = content(once)
    assert twice.ByteSize() < once.ByteSize() < model.ByteSize()
    x = {"x": random(1, 2, 1000)}
    np.testing.assert_array_equal(run(content(twice), x)["y"], run(model, x)["y"])


def test_dense_weights_stay() -> None:
    model = matmul(random(0, 64, 32))
    product = compact(model, Order())
    assert product.content is model
    assert "nothing is sparse enough" in product.notes[0]


def test_values_beyond_float16_keep_their_type() -> None:
    weight = sparse(1, 64, 32)
    weight[3, 3] = 1e6
    product = compact(matmul(weight), Order(values="float16"))
    assert "beyond float16" in product.notes[0]
    assert isinstance(product.content, ModelProto)
    x = {"x": random(2, 3, 64)}
    np.testing.assert_array_equal(run(product.content, x)["y"], run(matmul(weight), x)["y"])


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("masked", [-np.inf, np.nan, np.finfo(np.float32).min])
def test_masks_without_bounds_keep_their_type_and_are_packed(values: Values, masked: float) -> None:
    mask = np.where(np.tri(64, dtype=np.bool_), 0, masked).astype(np.float32)
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"])]
    model = build(nodes, {"x": (64, 64)}, ["y"], {"mask": mask})
    product = compact(model, Order(values=values))
    assert isinstance(product.content, ModelProto)
    assert product.content.ByteSize() < 0.7 * model.ByteSize()
    assert product.notes == (f"tensor 'mask' holds values beyond {values}; it keeps its own type",)
    x = {"x": random(0, 64, 64)}
    np.testing.assert_array_equal(run(product.content, x)["y"], run(model, x)["y"])


def test_old_operator_sets_are_raised_and_old_inputs_go() -> None:
    weight = sparse(1, 64, 32)
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 64)}, ["y"], {"w": weight}, opset=9, ir_version=3)
    before = model.SerializeToString()
    small = content(model)
    assert model.SerializeToString() == before
    assert small.opset_import[0].version == 11
    assert [value.name for value in small.graph.input] == ["x"]
    onnx.checker.check_model(small, full_check=True)
    np.testing.assert_array_equal(run(small, {"x": random(2, 3, 64)})["y"], run(model, {"x": random(2, 3, 64)})["y"])


@pytest.mark.parametrize("name", models.NETWORKS)
def test_networks_compute_the_same(name: str) -> None:
    model = models.NETWORKS[name]()
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1 and array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array * (rng.random(array.shape) < 0.02), tensor.name))
    feeds = models.feeds_of(model, 5)
    expected, given_ = run(model, feeds), run(content(model), feeds)
    for output, array in expected.items():
        np.testing.assert_allclose(given_[output], array, rtol=1e-6, atol=1e-6)


def test_a_wrong_unpacking_is_noticed() -> None:
    small = content(matmul(sparse(1, 64, 32)))
    other = sparse(1, 64, 32)
    other[0, 0] += 1
    with pytest.raises(VerificationError, match="tensor 'w': ONNX Runtime unpacks other values"):
        check_unpacking(small, {"w": other}, RuntimeOptions())
