"""Every operator kind against ONNX Runtime: the design matrix, the write-back, the counts and the sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from relrep_onnx.graph import Graph, find_layers, read_weight, with_layer, write_layer
from relrep_onnx.patches import choose_positions, design_rows, macs, position_count
from relrep_onnx.types import Array, CalibrationError, FloatArray, Layer, ModelError, RepairedLayer
from tests import models
from tests.models import ALL, SINGLES, Single, build, change, constant, only_layer, random, run, single, stored

TOLERANCE = {np.dtype(np.float16): 2e-2, np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-11}


def applied(layer: Layer, x: Array, weight: FloatArray) -> FloatArray:
    """The layer as a matrix product, without its bias: [positions, rows]."""
    rows = design_rows(layer, x, None).astype(np.float64)
    grouped = weight.reshape(layer.groups, -1, layer.cols)
    return np.asarray(np.einsum("pgc,grc->pgr", rows, grouped)).reshape(len(rows), -1)


def output_rows(one: Single, y: Array, layer: Layer) -> FloatArray:
    return models.rows_of(layer.shape, layer.op, y, left=one.model.graph.node[0].input[0] == "w")


def bias_rows(one: Single, layer: Layer, y: Array) -> FloatArray | float:
    """What the stored bias adds to every output element: [positions, rows] or something that broadcasts to it."""
    node = one.model.graph.node[0]
    if "b" not in node.input:
        return 0.0
    beta = next((item.f for item in node.attribute if item.name == "beta"), 1.0)
    bias = stored(one.model, "b").astype(np.float64) * beta
    if layer.op == "Gemm":
        return np.broadcast_to(bias, y.shape)
    return bias


def assert_close(actual: Array, wanted: Array, dtype: Any) -> None:
    assert actual.shape == wanted.shape
    limit = TOLERANCE[np.dtype(dtype)] * max(1.0, float(np.abs(wanted).max(initial=0.0)))
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=limit)


def check_design(one: Single, y: Array | None = None) -> None:
    layer = only_layer(one.model)
    y = run(one.model, one.feeds)["y"] if y is None else y
    weight = read_weight(Graph(one.model), layer)
    assert weight.dtype == np.float64
    assert weight.shape == (layer.rows, layer.cols)
    assert layer.size == stored(one.model, "w").size
    wanted = output_rows(one, y, layer)
    assert_close(applied(layer, one.x, weight) + bias_rows(one, layer, y), wanted, one.x.dtype)
    assert position_count(layer, one.x.shape) == len(wanted)


@pytest.mark.parametrize("kind", SINGLES)
def test_design_matrix_times_weight_is_the_output(kind: str) -> None:
    check_design(SINGLES[kind]())


CONVOLUTIONS: Mapping[str, Mapping[str, Any]] = {
    "stride": {"strides": [2, 3]},
    "same-upper": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "same-lower": {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    "same-stride-above-kernel": {"auto_pad": "SAME_UPPER", "strides": [4, 5]},
    "valid": {"auto_pad": "VALID", "strides": [1, 2]},
    "asymmetric": {"pads": [0, 2, 3, 1]},
    "dilated": {"dilations": [3, 2], "pads": [1, 1, 1, 1]},
    "kernel-shape": {"kernel_shape": [3, 2]},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_windows(case: str) -> None:
    check_design(single("Conv", (2, 4, 9, 8), (4, 2, 3, 2), (4,), group=2, **CONVOLUTIONS[case]))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("kernel", "stride", "length"), [(2, 1, 5), (4, 1, 6), (4, 3, 7), (3, 2, 8), (5, 2, 3)])
def test_convolution_puts_an_odd_pad_where_onnx_does(auto_pad: str, kernel: int, stride: int, length: int) -> None:
    check_design(single("Conv", (1, 2, length), (3, 2, kernel), auto_pad=auto_pad, strides=[stride]))


TRANSPOSED: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "strides": {"strides": [2, 3]},
    "dilations": {"dilations": [2, 3], "strides": [2, 1]},
    "pads": {"pads": [1, 0, 2, 1], "strides": [2, 2]},
    "pads-above-reach": {"pads": [3, 0, 1, 2], "strides": [2, 2]},
    "output-padding": {"strides": [3, 2], "output_padding": [2, 1], "pads": [1, 1, 0, 0]},
    "output-shape": {"strides": [2, 2], "output_shape": [10, 8]},
    "output-shape-upper": {"strides": [2, 2], "output_shape": [10, 7], "auto_pad": "SAME_UPPER"},
    "output-shape-lower": {"strides": [2, 2], "output_shape": [10, 7], "auto_pad": "SAME_LOWER"},
    "same-upper": {"strides": [2, 1], "auto_pad": "SAME_UPPER"},
    "same-lower": {"strides": [2, 1], "auto_pad": "SAME_LOWER"},
    "same-upper-dilated": {"strides": [2, 2], "dilations": [2, 2], "auto_pad": "SAME_UPPER"},
    "same-stride-above-kernel": {"strides": [4, 5], "auto_pad": "SAME_UPPER"},
    "same-lower-stride-above-kernel": {"strides": [4, 5], "auto_pad": "SAME_LOWER"},
    "valid": {"strides": [2, 2], "auto_pad": "VALID"},
}


@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convolution_windows(case: str, group: int) -> None:
    check_design(single("ConvTranspose", (2, 4, 5, 4), (4, 2, 3, 2), (2 * group,), group=group, **TRANSPOSED[case]))


@pytest.mark.parametrize(
    "one",
    [
        single("Conv", (2, 4, 6, 5), (4, 2, 3, 2), (4,), group=2, pads=[1, 0, 0, 1], dtype=np.float64),
        single("Conv", (2, 3, 9), (4, 3, 3), strides=[2], dtype=np.float64),
        single("ConvTranspose", (2, 3, 5, 4), (3, 2, 3, 2), (2,), strides=[2, 1], dtype=np.float64),
    ],
    ids=["conv2d", "conv1d", "transpose2d"],
)
def test_double_convolutions_that_onnx_runtime_lacks(one: Single) -> None:
    outputs = ReferenceEvaluator(one.model).run(None, dict(one.feeds))
    assert isinstance(outputs, list)
    check_design(one, outputs[0])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    axes=st.integers(1, 3),
    group=st.integers(1, 2),
    transposed=st.booleans(),
    data=st.data(),
)
def test_random_windows(axes: int, group: int, transposed: bool, data: st.DataObject) -> None:
    def draw(low: int, high: int, count: int = axes) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, strides, dilations, spatial = draw(1, 3), draw(1, 3), draw(1, 2), draw(1, 6)
    pads = draw(0, 2, 2 * axes)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    assume(all(n + pads[i] + pads[axes + i] > reach[i] for i, n in enumerate(spatial)) or transposed)
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
    x = (2, 2 * group, *spatial)
    if transposed:
        extra = [data.draw(st.integers(0, s - 1)) for s in strides]  # ONNX Runtime refuses more
        sizes = [s * (n - 1) + o + r + 1 for s, n, o, r in zip(strides, spatial, extra, reach, strict=True)]
        assume(all(size > pads[i] + pads[axes + i] for i, size in enumerate(sizes)))
        check_design(single("ConvTranspose", x, (2 * group, 2, *kernel), output_padding=extra, **attributes))
    else:
        check_design(single("Conv", x, (2 * group, 2, *kernel), (2 * group,), **attributes))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    transposes=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    alpha=st.sampled_from([1.0, -2.0, 0.25]),
    beta=st.sampled_from([1.0, 0.0, -0.5]),
    bias=st.sampled_from([None, (), (1,), (4,), (1, 4), (6, 1), (6, 4)]),
)
def test_gemm_attributes(transposes: tuple[int, int], alpha: float, beta: float, bias: Sequence[int] | None) -> None:
    a, b = transposes
    x, w = ((5, 6) if a else (6, 5)), ((4, 5) if b else (5, 4))
    check_design(single("Gemm", x, w, bias, transA=a, transB=b, alpha=alpha, beta=beta))


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        # positions * outputs * inputs each reads
        (single("Conv", (2, 4, 8, 8), (6, 4, 3, 3)), 2 * 6 * 6 * 6 * 4 * 9),
        (single("Conv", (2, 4, 8, 8), (6, 2, 3, 3), group=2), 2 * 6 * 6 * 6 * 2 * 9),
        (single("Conv", (1, 3, 9), (4, 3, 3), strides=[2]), 4 * 4 * 9),
        # every input element meets every weight of its channel
        (single("ConvTranspose", (2, 4, 5, 5), (4, 3, 3, 3), strides=[2, 2]), 2 * 25 * 4 * 3 * 9),
        (single("ConvTranspose", (2, 4, 5, 5), (4, 3, 3, 3), group=2), 2 * 25 * 4 * 3 * 9),
        (single("Gemm", (9, 5), (5, 4)), 9 * 5 * 4),
        (single("Gemm", (5, 9), (5, 4), transA=1), 9 * 5 * 4),
        (single("MatMul", (2, 3, 6, 5), (5, 4)), 36 * 5 * 4),
        (single("MatMul", (5, 6), (4, 5), left=True), 6 * 5 * 4),
        (single("MatMul", (3, 6, 5), (3, 5, 4)), 18 * 5 * 4),
        (single("MatMul", (6, 5), (3, 5, 4)), 18 * 5 * 4),
        (single("MatMul", (2, 3, 6, 5), (3, 5, 4)), 36 * 5 * 4),
        (single("MatMul", (1, 3, 6, 5), (2, 3, 5, 4)), 36 * 5 * 4),
        (single("MatMul", (2, 3, 6, 5), (2, 1, 5, 4)), 36 * 5 * 4),
    ],
)
def test_macs(one: Single, wanted: int) -> None:
    assert macs(only_layer(one.model), one.x.shape) == wanted


@pytest.mark.parametrize("kind", SINGLES)
def test_sampled_rows_are_rows_of_the_whole_matrix(kind: str) -> None:
    one = SINGLES[kind]()
    layer = only_layer(one.model)
    whole = design_rows(layer, one.x, None)
    positions = np.sort(np.random.default_rng(3).choice(len(whole), (len(whole) + 1) // 2, replace=False))
    np.testing.assert_array_equal(design_rows(layer, one.x, positions), whole[positions])


@pytest.mark.parametrize("limit", [1, 3, 5])
@pytest.mark.parametrize(
    ("kind", "samples"), [("conv2d", 2), ("transpose2d", 2), ("matmul3", 2), ("left3", 2), ("batched-more", 2)]
)
def test_chosen_positions_are_exact_ascending_unique_and_repeatable(kind: str, samples: int, limit: int) -> None:
    one = SINGLES[kind]()
    layer = only_layer(one.model)
    total = position_count(layer, one.x.shape)
    assert total > limit * samples, "the case must be worth sampling"
    chosen, again, other = (choose_positions(layer, one.x.shape, limit, np.random.default_rng(s)) for s in (1, 1, 2))
    assert chosen is not None
    assert again is not None
    assert other is not None
    assert len(chosen) == limit * samples
    assert (np.diff(chosen) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < total
    np.testing.assert_array_equal(chosen, again)
    assert total < 5 * limit or not np.array_equal(chosen, other)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_all_positions_are_taken_where_there_are_few(limit: int | None) -> None:
    one = SINGLES["conv2d"]()
    assert choose_positions(only_layer(one.model), one.x.shape, limit, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("conv2d", (2, 4, 8), "rank 3, not 4"),
        ("conv2d", (2, 5, 8, 8), "5 channels, not 4"),
        ("conv2d-groups", (2, 4, 8, 8), "4 channels, not 6"),
        ("gemm", (9, 10), "10 values to contract, not 5"),
        ("left2", (5,), "rank 1"),
        ("batched", (5,), "rank 1"),
        ("matmul2", (), "rank 0"),
        ("batched-more", (2, 4, 6, 5), "does not fit the weight's batch"),
    ],
)
def test_an_activation_of_the_wrong_shape_is_refused(kind: str, shape: tuple[int, ...], words: str) -> None:
    layer = only_layer(SINGLES[kind]().model)
    with pytest.raises(CalibrationError, match=words):
        design_rows(layer, np.zeros(shape, np.float32), None)
    if shape:
        with pytest.raises(CalibrationError, match=words):
            choose_positions(layer, shape, 2, np.random.default_rng(0))


# Writing back


def check_written(
    one: Single, model: ModelProto | None = None, y: str = "y", feeds: dict[str, Array] | None = None
) -> ModelProto:
    """Writes a random change into a copy of a model, checks what it computes, and gives it back."""
    model = model or one.model
    layer = only_layer(model)
    before = model.SerializeToString()
    repaired = change(model, layer)
    written = with_layer(model, layer, repaired)
    assert model.SerializeToString() == before, "the given model must not change"
    onnx.checker.check_model(written, full_check=True)
    dense, sparse = (models.rows_of(layer.shape, layer.op, run(m, one.feeds)[y], left=_left(m)) for m in (model, written))
    weight = read_weight(Graph(model), layer)
    wanted = dense - applied(layer, one.x, weight) + applied(layer, one.x, repaired.weight) + repaired.bias_shift
    assert_close(sparse, wanted, one.x.dtype)
    check_stored(model, written, layer, repaired)
    return written


def _left(model: ModelProto) -> bool:
    node = next(node for node in model.graph.node if node.name == "layer")
    return node.op_type == "MatMul" and node.input[1] == "x"


def check_stored(model: ModelProto, written: ModelProto, layer: Layer, repaired: RepairedLayer) -> None:
    old, new = (Graph(m).tensors[layer.weight] for m in (model, written))
    assert (new.name, new.data_type, list(new.dims)) == (old.name, old.data_type, list(old.dims))
    array = stored(written, layer.weight)
    assert np.count_nonzero(array == 0) == np.count_nonzero(repaired.weight == 0)
    assert not any(models.signed_zeros(array)), "a zero is stored as -0.0"
    assert stored(model, layer.weight).tobytes() not in written.SerializeToString(), "the old weight was left behind"
    for what in ("input", "output"):
        assert getattr(written.graph, what) == getattr(model.graph, what)
    assert (written.ir_version, list(written.opset_import)) == (model.ir_version, list(model.opset_import))
    shift = repaired.bias_shift.size
    grown = max([shift, *(math.prod(t.dims) for t in written.graph.initializer if t.name != layer.weight)])
    assert written.ByteSize() - model.ByteSize() <= 8 * grown + 256
    np.testing.assert_allclose(read_weight(Graph(written), layer), repaired.weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in SINGLES if kind != "matmul1"])
def test_a_written_model_computes_the_change(kind: str) -> None:
    check_written(SINGLES[kind]())


def test_a_product_of_a_vector_is_written() -> None:
    one = SINGLES["matmul1"]()
    assert check_written(one).graph.node[1].op_type == "Add"


@pytest.mark.parametrize("kind", ["conv2d-no-bias", "transpose2d-groups", "gemm-no-bias"])
def test_a_missing_bias_becomes_the_third_input(kind: str) -> None:
    one = SINGLES[kind]()
    written = check_written(one)
    (node,) = written.graph.node
    assert list(node.input) == ["x", "w", "layer.relrep_bias"]
    assert stored(written, "layer.relrep_bias").shape == (only_layer(one.model).rows,)
    assert stored(written, "layer.relrep_bias").dtype == one.x.dtype


@pytest.mark.parametrize("kind", ["conv1d", "gemm", "gemm-scaled", "gemm-full-bias", "transpose1d"])
def test_a_bias_of_its_own_changes_in_place(kind: str) -> None:
    one = SINGLES[kind]()
    written = check_written(one)
    assert [t.name for t in written.graph.initializer] == ["w", "b"]
    assert abs(written.ByteSize() - one.model.ByteSize()) < 8


@pytest.mark.parametrize(("kind", "shape"), [("gemm-scalar-bias", (4,)), ("gemm-one-bias", (4,)), ("gemm-column-bias", (9, 4))])
def test_a_bias_that_is_too_small_grows(kind: str, shape: tuple[int, ...]) -> None:
    written = check_written(SINGLES[kind]())
    assert [t.name for t in written.graph.initializer] == ["w", "layer.relrep_bias"]
    assert stored(written, "layer.relrep_bias").shape == shape


def test_beta_zero_keeps_the_old_bias_switched_off() -> None:
    written = check_written(SINGLES["gemm-beta-0"]())
    assert [t.name for t in written.graph.initializer] == ["w", "layer.relrep_bias"]
    assert {a.name: a.f for a in written.graph.node[0].attribute}["beta"] == 1.0


@pytest.mark.parametrize("kind", ["matmul2", "left3", "batched-more", "left-batched", "matmul-fp16", "matmul-fp64"])
def test_a_product_gets_an_add_behind_it(kind: str) -> None:
    written = check_written(SINGLES[kind]())
    assert [node.op_type for node in written.graph.node] == ["MatMul", "Add"]
    assert written.graph.node[0].name == "layer"
    assert list(written.graph.node[1].output) == ["y"]


def test_the_add_takes_no_other_nodes_name() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="fc"),
        helper.make_node("Relu", ["a"], ["y"], name="fc_bias"),
    ]
    model = build(nodes, {"x": (4, 8)}, ["y"], {"w": random(0, 8, 8)})
    layer = only_layer(model)
    written = with_layer(model, layer, change(model, layer))
    assert [node.name for node in written.graph.node] == ["fc", "fc_bias_2", "fc_bias"]
    run(written, {"x": random(1, 4, 8)})


@pytest.mark.parametrize(
    ("kind", "shape", "joined"),
    [
        ("matmul3", (4,), True),
        ("matmul3", (6, 4), True),
        ("matmul3", (1, 1, 4), True),
        ("matmul3", (), False),
        ("matmul3", (1,), False),
        ("matmul3", (6, 1), False),
        ("left3", (4, 1), True),
        ("left3", (6,), False),
        ("batched-more", (3, 1, 4), True),
        ("batched-more", (4,), False),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_following_add_takes_the_shift_where_it_fits(kind: str, shape: tuple[int, ...], joined: bool, swapped: bool) -> None:
    one = SINGLES[kind]()
    model = models.clone(one.model)
    operands = ["b", "y"] if swapped else ["y", "b"]
    model.graph.node.append(helper.make_node("Add", operands, ["z"]))
    model.graph.initializer.append(models.tensor(random(5, *shape), "b"))
    model = models.with_outputs(model, ["z"])
    written = check_written(one, model, "z")
    assert len(written.graph.node) == (2 if joined else 3)
    assert len(written.graph.initializer) == (2 if joined else 3)


@pytest.mark.parametrize("why", ["output", "second reader", "added to itself", "computed"])
def test_an_add_that_is_no_bias_is_left_alone(why: str) -> None:
    one = SINGLES["matmul3"]()
    model = models.clone(one.model)
    addend = "y" if why == "added to itself" else "b"
    model.graph.node.append(helper.make_node("Add", ["y", addend], ["z"]))
    if why == "computed":
        model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["b"], keepdims=0))
    else:
        model.graph.initializer.append(models.tensor(random(5, 4), "b"))
    if why == "second reader":
        model.graph.node.append(helper.make_node("Relu", ["y"], ["other"]))
    model = models.with_outputs(model, ["z", "y"] if why == "output" else ["z"])
    layer = only_layer(model)
    written = with_layer(model, layer, change(model, layer))
    onnx.checker.check_model(written, full_check=True)
    old, new = (run(m, one.feeds, ["y", "z"]) for m in (model, written))
    assert sorted(node.op_type for node in written.graph.node).count("Add") == 2
    twice = 2 if why == "added to itself" else 1
    np.testing.assert_allclose(new["z"] - old["z"], twice * (new["y"] - old["y"]), atol=1e-5)
    repaired = change(model, layer)
    wanted = applied(layer, one.x, repaired.weight) + repaired.bias_shift
    np.testing.assert_allclose(new["y"].reshape(-1, layer.rows), wanted, atol=1e-5)


def test_a_layer_can_be_written_twice() -> None:
    one = SINGLES["matmul2"]()
    layer = only_layer(one.model)
    model = models.clone(one.model)
    for seed in (1, 2):
        write_layer(model, layer, change(one.model, layer, seed))
    first, second = (change(one.model, layer, seed) for seed in (1, 2))
    np.testing.assert_allclose(read_weight(Graph(model), layer), second.weight, atol=1e-6)
    wanted = applied(layer, one.x, second.weight) + first.bias_shift + second.bias_shift
    np.testing.assert_allclose(run(model, one.feeds)["y"], wanted, atol=1e-5)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]


def test_a_model_that_was_written_before_gets_no_second_add() -> None:
    one = SINGLES["matmul2"]()
    again = check_written(one, check_written(one))
    assert [node.op_type for node in again.graph.node] == ["MatMul", "Add"]
    assert [t.name for t in again.graph.initializer] == ["w", "layer.relrep_bias"]


@pytest.mark.parametrize("same", [True, False])
def test_no_change_writes_no_byte(same: bool) -> None:
    one = SINGLES["conv2d"]()
    layer = only_layer(one.model)
    weight = read_weight(Graph(one.model), layer)
    repaired = RepairedLayer(weight if same else weight * 2, np.zeros(layer.rows), np.zeros(layer.rows))
    written = with_layer(one.model, layer, repaired)
    assert (written == one.model) is same


def test_a_bias_that_two_nodes_share_changes_for_one() -> None:
    tensors = {"w": random(0, 5, 4), "v": random(1, 5, 4), "b": random(2, 4)}
    nodes = [helper.make_node("Gemm", ["x", w, "b"], [y], name=y) for w, y in (("w", "y"), ("v", "z"))]
    model = build(nodes, {"x": (9, 5)}, ["y", "z"], tensors)
    layers, _ = find_layers(Graph(model), ALL)
    repaired = change(model, layers[0])
    written = with_layer(model, layers[0], repaired)
    x = random(3, 9, 5)
    old, new = (run(m, {"x": x}) for m in (model, written))
    np.testing.assert_array_equal(new["z"], old["z"])
    wanted = x @ repaired.weight.T + tensors["b"] + repaired.bias_shift
    np.testing.assert_allclose(new["y"], wanted, atol=1e-5)
    np.testing.assert_array_equal(stored(written, "b"), tensors["b"])


@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_behind_identity_gets_a_tensor_of_its_own(shared: bool) -> None:
    one = SINGLES["gemm"]()
    model = models.clone(one.model)
    model.graph.node[0].input[2] = "b2"
    model.graph.node.insert(0, helper.make_node("Identity", ["b"], ["b2"]))
    if shared:
        model.graph.node.append(helper.make_node("Relu", ["b2"], ["r"]))
        model = models.with_outputs(model, ["y", "r"])
    written = check_written(one, model)
    assert ("b" in {t.name for t in written.graph.initializer}) is shared
    assert ("Identity" in {n.op_type for n in written.graph.node}) is shared
    if shared:
        np.testing.assert_array_equal(run(written, one.feeds)["r"], run(model, one.feeds)["r"])


def test_a_bias_that_is_a_graph_output_stays() -> None:
    one = SINGLES["gemm"]()
    model = models.clone(one.model)
    model = models.with_outputs(model, ["y", "b"])
    written = check_written(one, model)
    np.testing.assert_array_equal(run(written, one.feeds)["b"], stored(model, "b"))


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_every_user_of_a_shared_weight_is_shifted(op: str) -> None:
    model = models.shared_weight(op)
    layer = next(y for y in find_layers(Graph(model), ALL)[0] if len(y.uses) == 2)
    repaired = change(model, layer)
    written = with_layer(model, layer, repaired)
    onnx.checker.check_model(written, full_check=True)
    got = run(written, {"x": random(3, 9, 8)}, ["x", "a", "left", "right"])
    for activation, output in (("x", "left"), ("a", "right")):
        wanted = got[activation] @ repaired.weight.T + repaired.bias_shift
        np.testing.assert_allclose(got[output], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv2d", "conv2d-no-bias", "gemm-scalar-bias", "matmul3", "gemm-beta-0"])
def test_old_files_list_initializers_among_the_inputs(kind: str) -> None:
    one = SINGLES[kind]()
    tensors = {t.name: stored(one.model, t.name) for t in one.model.graph.initializer}
    model = build(one.model.graph.node, {"x": one.x.shape}, ["y"], tensors, opset=8, ir_version=3)
    written = check_written(one, model)
    assert {t.name for t in written.graph.initializer} == set(tensors), "a new initializer would be a new input"
    expected = {"conv2d": 0}.get(kind, 1)
    assert sum(node.op_type == "Constant" for node in written.graph.node) == expected


def chained(steps: Sequence[str], *, in_node: bool = False) -> Single:
    """A Gemm whose weight [5, 4] is stored in another order, behind nodes that only move elements."""
    array = random(0, 5, 4)
    name = "s0"
    nodes = []
    for i, step in enumerate(steps):
        out = "w" if i == len(steps) - 1 else f"s{i + 1}"
        if step == "Cast":
            nodes.append(helper.make_node("Cast", [f"s{i}"], [out], to=TensorProto.FLOAT))
        elif step == "Transpose":
            nodes.append(helper.make_node("Transpose", [f"s{i}"], [out]))
        elif step == "Permute":
            nodes.append(helper.make_node("Transpose", [f"s{i}"], [out], perm=[2, 0, 1]))
        elif step.startswith("Reshape"):
            nodes.append(helper.make_node("Reshape", [f"s{i}", f"shape{step[7:]}"], [out]))
        else:
            nodes.append(helper.make_node(step, [f"s{i}"], [out]))
    if "Cast" in steps:
        array = array.astype(np.float16)
    shapes = {"Transpose": (4, 5), "ReshapeBack": (2, 2, 5), "Permute": (2, 2, 5), "ReshapeFlat": (4, 5)}
    array = array.reshape(shapes.get(steps[0] if steps else "", (5, 4)))
    tensors = {
        "shapeFlat": np.array([-1], np.int64),
        "shapeBack": np.array([5, 4], np.int64),
        "shapeZero": np.array([0, -1], np.int64),
    }
    if in_node:
        nodes.insert(0, constant(name, array))
    else:
        tensors[name] = array
    nodes.append(helper.make_node("Gemm", ["x", "w"] if steps else ["x", name], ["y"], name="layer"))
    return Single(build(nodes, {"x": (9, 5)}, ["y"], tensors), random(2, 9, 5))


CHAINS = [
    (),
    ("Identity",),
    ("Transpose",),
    ("Cast",),
    ("ReshapeFlat", "ReshapeBack"),
    ("ReshapeFlat", "ReshapeBack", "ReshapeZero"),
    ("Permute", "ReshapeBack"),
    ("Transpose", "Identity", "Cast", "Identity"),
    ("Transpose", "Transpose", "Transpose"),
]


@pytest.mark.parametrize("steps", CHAINS, ids=lambda steps: "-".join(steps) or "direct")
@pytest.mark.parametrize("in_node", [False, True])
def test_a_weight_behind_nodes_that_move_elements(steps: Sequence[str], in_node: bool) -> None:
    one = chained(steps, in_node=in_node)
    if "Cast" in steps:  # the stored dtype is what limits the precision
        one = Single(one.model, one.x.astype(np.float16).astype(np.float32))
    layer = only_layer(one.model)
    assert (layer.weight, layer.rows, layer.cols) == ("s0", 4, 5)
    weight = read_weight(Graph(one.model), layer)
    np.testing.assert_allclose(run(one.model, one.feeds)["y"], one.x @ weight.T, atol=1e-5)
    repaired = change(one.model, layer)
    written = with_layer(one.model, layer, repaired)
    onnx.checker.check_model(written, full_check=True)
    seen = read_weight(Graph(written), layer)
    np.testing.assert_allclose(seen, repaired.weight, atol=2e-3 if "Cast" in steps else 1e-6)
    np.testing.assert_allclose(run(written, one.feeds)["y"], one.x @ seen.T + repaired.bias_shift, atol=1e-5)
    check_stored(one.model, written, layer, repaired)


def test_a_created_bias_has_the_dtype_the_operator_computes_in() -> None:
    one = chained(("Cast",))
    layer = only_layer(one.model)
    written = with_layer(one.model, layer, change(one.model, layer))
    assert stored(written, "layer.relrep_bias").dtype == np.float32
    assert stored(written, "s0").dtype == np.float16


@pytest.mark.parametrize("cast", [False, True])
def test_a_value_too_large_for_the_dtype_is_refused(cast: bool) -> None:
    one = single("Gemm", (9, 5), (5, 4), dtype=np.float16)
    if cast:
        nodes = [helper.make_node("Cast", ["s"], ["w"], to=TensorProto.FLOAT16), *one.model.graph.node]
        one = Single(build(nodes, {"x": (9, 5)}, ["y"], {"s": random(0, 5, 4)}, dtype=np.float16), one.x)
    layer = only_layer(one.model)
    before = one.model.SerializeToString()
    repaired = RepairedLayer(np.full((4, 5), 1e6), np.zeros(4), np.zeros(4))
    with pytest.raises(ModelError, match=r"'layer'.*does not fit float16"):
        write_layer(one.model, layer, repaired)
    assert one.model.SerializeToString() == before


def test_a_weight_too_small_for_the_dtype_is_a_positive_zero() -> None:
    one = single("Gemm", (9, 5), (5, 4), dtype=np.float16)
    layer = only_layer(one.model)
    written = with_layer(one.model, layer, RepairedLayer(np.full((4, 5), -1e-12), np.zeros(4), np.zeros(4)))
    assert list(models.signed_zeros(stored(written, "w"))) == [False] * 20


def test_a_bfloat16_weight_stays_one() -> None:
    one = single("Gemm", (9, 5), (5, 4))
    model = models.clone(one.model)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.BFLOAT16, (5, 4), [1.0, 2.0, -3.0, 4.0] * 5))
    layers, skipped = find_layers(Graph(model), ALL)
    if skipped:  # an ONNX that has no numpy dtype for it
        assert [entry.reason for entry in skipped] == ["weights of type bfloat16"]
        return
    (layer,) = layers
    written = with_layer(model, layer, RepairedLayer(np.full((4, 5), 0.5), np.ones(4), np.zeros(4)))
    assert [t.data_type for t in written.graph.initializer] == [TensorProto.BFLOAT16] * 2
    np.testing.assert_array_equal(read_weight(Graph(written), layer), np.full((4, 5), 0.5))


@pytest.mark.parametrize("ir_version", [3, 8])
def test_new_names_avoid_every_name_in_use(ir_version: int) -> None:
    one = SINGLES["matmul3"]()
    model = build(
        [*one.model.graph.node, helper.make_node("Mul", ["y", "layer.relrep_bias"], ["y_without_bias"])],
        {"x": one.x.shape},
        ["y", "y_without_bias"],
        {"w": stored(one.model, "w"), "layer.relrep_bias": random(1, 4)},
        ir_version=ir_version,
        opset=8,
    )
    written = check_written(one, model)
    names = [name for node in written.graph.node for name in node.output]
    assert len(names) == len(set(names))
    assert "y_without_bias_2" in names
