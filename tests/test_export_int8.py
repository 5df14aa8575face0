"""Quantization: zeros stay, dead channels keep their bias, bias correction is what it says, and accuracy on the sample."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from relrep_onnx import ConfigError, ModelError
from relrep_onnx.export import Order, make
from relrep_onnx.export.forms import Target
from relrep_onnx.export.int8 import LEVELS, guards, int8, kept_zeros, rounded_weights, rounding_shifts
from relrep_onnx.graph import Graph
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import Array, Feeds
from tests import models
from tests.models import build, random, run
from tests.test_pipeline import inputs, small_net


def halved(model: ModelProto, seed: int = 3) -> ModelProto:
    """A copy with four fifths of its weights zero, and two rows of the second one entirely."""
    copy = models.clone(model)
    rng = np.random.default_rng(seed)
    for tensor in copy.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            array = array * (rng.random(array.shape) < 0.2)
            if tensor.name == "w2":
                array[[1, 4]] = 0
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return copy


def batches(x: Array, name: str = "x", size: int = 16) -> list[Feeds]:
    return [{name: x[i : i + size]} for i in range(0, len(x), size)]


def quantized(model: ModelProto, x: Array, target: Target = "amd64") -> ModelProto:
    content = int8(model, Order(target=target, calibration=lambda: batches(x))).content
    assert isinstance(content, ModelProto)
    return content


@pytest.mark.parametrize("target", ["amd64", "arm"])
def test_zeros_stay_and_outputs_are_close(target: Target) -> None:
    model, x = halved(small_net()), inputs()
    before = model.SerializeToString()
    small = quantized(model, x, target)
    assert model.SerializeToString() == before
    onnx.checker.check_model(small, full_check=True)
    stored = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    for name in ("w1", "w2", "w3"):
        array = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
        levels = stored[f"{name}_quantized"]
        assert levels.dtype == np.int8
        assert (levels[array == 0] == 0).all()
        assert np.abs(levels).max() <= LEVELS[target]
        assert not stored[f"{name}_zero_point"].any()
    expected, given = run(model, {"x": x})["y"], run(small, {"x": x})["y"]
    assert np.linalg.norm(given - expected) < 0.05 * np.linalg.norm(expected)


def test_two_runs_give_the_same_bytes() -> None:
    model, x = halved(small_net()), inputs(32)
    assert quantized(model, x).SerializeToString(deterministic=True) == quantized(model, x).SerializeToString(deterministic=True)


def test_metadata_is_kept_and_no_domain_is_added() -> None:
    model = halved(small_net())
    helper.set_model_props(model, {"relrep.seed": "0", "mine": "kept"})
    small = quantized(model, inputs(32))
    assert {entry.key: entry.value for entry in small.metadata_props} == {"relrep.seed": "0", "mine": "kept"}
    assert [entry.domain for entry in small.opset_import] == [""]
    assert [i.name for i in small.graph.input] == ["x"]
    assert [o.name for o in small.graph.output] == ["y"]


def test_a_dead_channel_keeps_its_bias() -> None:
    """With the scale 1 that the quantizer gives a dead channel, its bias would be rounded to steps of the input's scale."""
    weight = random(0, 8, 4, 1, 1)
    weight[3] = 0
    bias = np.full(8, 0.3, np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")
    model = build([node], {"x": ("n", 4, 5, 5)}, ["y"], {"w": weight, "b": bias})
    x = 20 * random(1, 32, 4, 5, 5)
    small = quantized(model, x)
    stored = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in small.graph.initializer}
    value = stored["b_quantized"] * stored["b_quantized_scale"]
    np.testing.assert_allclose(value[3], 0.3, atol=0.015)
    assert stored["b_quantized_scale"][3] < 0.03
    alive = np.delete(stored["w_scale"], 3)
    assert stored["w_scale"][3] == pytest.approx(np.median(alive), rel=1e-6)


def test_guards_are_for_weights_with_dead_channels_only() -> None:
    weights = rounded_weights(Graph(halved(small_net())), 64)
    forced = guards(weights)
    assert set(forced) == {"w2"}
    assert len(forced["w2"]) == 16


@pytest.mark.parametrize("name", ["conv2d", "conv2d-groups", "conv1d", "conv3d", "transpose2d", "gemm", "gemm-scaled"])
@pytest.mark.parametrize("opset", [17, 18])
def test_shifts_are_the_mean_outputs_of_the_rounding_errors(name: str, opset: int) -> None:
    """Oracle: the same node, run with the exact and with the rounded weight."""
    single = models.SINGLES[name]()
    single.model.opset_import[0].version = opset
    (w,) = rounded_weights(Graph(single.model), 7)
    shifts = rounding_shifts(single.model, [w], [single.feeds], RuntimeOptions())
    rounded = models.clone(single.model)
    stored = next(t for t in rounded.graph.initializer if t.name == "w")
    array = numpy_helper.to_array(stored)
    axis = w.axis
    peak = np.abs(array).max(axis=tuple(a for a in range(array.ndim) if a != axis), keepdims=True)
    scale = peak / 7
    stored.CopyFrom(numpy_helper.from_array((np.rint(array / scale) * scale).astype(np.float32), "w"))
    difference = run(single.model, single.feeds)["y"] - run(rounded, single.feeds)["y"]
    expected = models.rows_of(w.layer.shape, w.layer.op, difference).mean(axis=0)
    np.testing.assert_allclose(shifts[w.layer.name], expected, rtol=1e-3, atol=1e-5)


def test_correction_brings_the_mean_back() -> None:
    """Inputs far from zero make rounding shift the mean; the corrected bias takes it back."""
    weight, x = random(3, 8, 64), 5 + random(4, 64, 64)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=1)
    model = build([node], {"x": ("n", 64)}, ["y"], {"w": weight, "b": np.zeros(8, np.float32)})
    small = quantized(model, x)
    stored = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in small.graph.initializer}
    seen = stored["w_quantized"] * stored["w_scale"].reshape(-1, 1)
    bias = stored["b_quantized"] * stored["b_quantized_scale"]
    mean = x.astype(np.float64).mean(axis=0)
    without = np.abs(mean @ (seen - weight).T)
    np.testing.assert_allclose(mean @ seen.T + bias, mean @ weight.T, atol=1e-2 * without.max())
    assert without.max() > 0.05


def test_transposed_convolutions_with_groups_stay_floating() -> None:
    single = models.SINGLES["transpose2d-groups"]()
    single.model.graph.node[0].name = ""
    product = int8(single.model, Order(calibration=lambda: [single.feeds]))
    assert isinstance(product.content, ModelProto)
    assert product.notes[1] == "floating-point stays what int8 would spoil: relrep_floating_0"
    assert product.notes[2].startswith("nothing is quantized")
    assert not {t.name for t in product.content.graph.initializer} & {"w_quantized", "w_scale"}
    expected, given = run(single.model, single.feeds)["y"], run(product.content, single.feeds)["y"]
    assert np.linalg.norm(given - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", models.SINGLES)
def test_every_kind_of_layer(name: str) -> None:
    single = models.SINGLES[name]()
    product = make("int8+compact", single.model, Order(calibration=lambda: [single.feeds]))
    assert isinstance(product.content, ModelProto)
    expected, given = run(single.model, single.feeds)["y"], run(product.content, single.feeds)["y"]
    assert np.linalg.norm((given - expected).astype(np.float64)) < 0.05 * np.linalg.norm(expected.astype(np.float64))


def test_layers_that_share_a_bias() -> None:
    """The quantizer's own copy would be called `b0`, like the activation, and the file would not load."""
    nodes = [
        helper.make_node("Conv", ["x", "v", "b"], ["b0"], group=8),
        helper.make_node("Conv", ["b0", "w", "b"], ["y"], group=8),
    ]
    tensors = {"v": random(0, 8, 1, 3, 3), "w": random(1, 8, 1, 3, 3), "b": random(2, 8)}
    model, x = build(nodes, {"x": ("n", 8, 6, 6)}, ["y"], tensors), random(3, 64, 8, 6, 6)
    expected, given = run(model, {"x": x})["y"], run(quantized(model, x), {"x": x})["y"]
    assert np.linalg.norm(given - expected) < 0.05 * np.linalg.norm(expected)


def test_older_operator_sets_are_raised() -> None:
    model = halved(small_net())
    model.opset_import[0].version = 12
    small = quantized(model, inputs(32))
    assert small.opset_import[0].version == 17
    onnx.checker.check_model(small, full_check=True)


def test_lost_zeros_are_counted() -> None:
    model = halved(small_net())
    small = quantized(model, inputs(32))
    zeros = sum(int((numpy_helper.to_array(t) == 0).sum()) for t in model.graph.initializer if len(t.dims) > 1)
    assert kept_zeros(Graph(model), Graph(small)) == (zeros, zeros)
    stored = next(t for t in small.graph.initializer if t.name == "w2_quantized")
    array = numpy_helper.to_array(stored).copy()
    array[1] = 1
    stored.CopyFrom(numpy_helper.from_array(array, stored.name))
    assert kept_zeros(Graph(model), Graph(small)) == (zeros, zeros - array[1].size)


def test_compact_on_top_loads_and_is_the_same() -> None:
    model, x = halved(small_net()), inputs()
    small = quantized(model, x)
    both = make("int8+compact", model, Order(calibration=lambda: batches(x))).content
    assert isinstance(both, ModelProto)
    assert both.ByteSize() < small.ByteSize()
    np.testing.assert_array_equal(run(both, {"x": x})["y"], run(small, {"x": x})["y"])


def test_samples_are_needed() -> None:
    with pytest.raises(ConfigError, match="give samples with --calib"):
        int8(small_net(), Order())


def test_what_the_quantizer_refuses_is_named_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    model = build([helper.make_node("Identity", ["x"], ["y"])], {"x": ("n", 4)}, ["y"])
    model.graph.node[0].op_type = "NoSuch"
    model.graph.node[0].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match="cannot quantize the model"):
        int8(model, Order(calibration=lambda: [{"x": random(0, 2, 4)}]))
    assert caplog.text == ""
