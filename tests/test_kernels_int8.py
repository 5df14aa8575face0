"""The int8 kernels against QLinearConv and against plain sums of whole numbers, for every instruction set of this machine."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from relrep_onnx.kernels import functions
from relrep_onnx.runtime import FAILURES
from relrep_onnx.types import Array
from tests.int8_models import BOUNDS, Int8Layer, int8_weight, random_bytes
from tests.kernel_models import VARIABLE, decoded, session
from tests.test_kernels import CONVOLUTIONS, ISAS, needs_library

DENSITIES = [(0.1, 1), (0.2, 4), (1.0, 1), (0.0, 1)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def one_step(got: Array, wanted: Array) -> bool:
    return got.shape == wanted.shape and int(np.abs(got.astype(int) - wanted.astype(int)).max(initial=0)) <= 1


def check(layer: Int8Layer, *shape: int) -> None:
    """The library's answer is that of exact sums; ONNX Runtime's, dense or of the same file without the library, a step away."""
    x = random_bytes(1, *shape)
    got = session(layer.sparse(), sparse=True).run(None, {"x": x})[0]
    assert one_step(got, layer.exact(x))
    if os.environ[VARIABLE] != ISAS[0]:
        return  # what ONNX Runtime computes does not depend on it
    assert one_step(got, session(layer.dense(), sparse=False).run(None, {"x": x})[0])
    assert one_step(got, session(layer.sparse(), sparse=False).run(None, {"x": x})[0])


@needs_library
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("density", "block"), DENSITIES)
def test_convolution(isa: str, name: str, density: float, block: int) -> None:
    weight_shape, shape, window = CONVOLUTIONS[name]
    check(Int8Layer(int8_weight(5, weight_shape, density, block=block), window=window), *shape)


@needs_library
@pytest.mark.parametrize("batch", [1, 2, 5, 33, 130])
@pytest.mark.parametrize(("density", "block"), DENSITIES)
def test_product(isa: str, batch: int, density: float, block: int) -> None:
    check(Int8Layer(int8_weight(6, (60, 91), density, block=block)), batch, 91)


@needs_library
def test_products_of_higher_rank(isa: str) -> None:
    layer, x = Int8Layer(int8_weight(6, (12, 20), 0.3)), random_bytes(1, 3, 5, 20)
    model = layer.sparse()
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    assert one_step(session(model, sparse=True).run(None, {"x": x})[0], layer.exact(x))


@needs_library
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("zeros", [(0, 0), (255, 255), (131, 0)])
def test_zero_points_and_bounds(isa: str, clips: bool, zeros: tuple[int, int]) -> None:
    pads = {"pads": [1, 1, 1, 1]}
    for layer, shape in (
        (Int8Layer(int8_weight(7, (8, 7, 3, 3), 0.3), clips, pads, *zeros), (2, 7, 7, 9)),
        (Int8Layer(int8_weight(8, (24, 30), 0.3), clips, {}, *zeros), (9, 30)),
    ):
        check(layer, *shape)
        got = session(layer.sparse(), sparse=True).run(None, {"x": random_bytes(2, *shape)})[0]
        if clips:
            assert (got.min(), got.max()) == (BOUNDS["low"], BOUNDS["high"]) or zeros != (131, 0)
            assert got.min() >= BOUNDS["low"]
            assert got.max() <= BOUNDS["high"]


@needs_library
@pytest.mark.parametrize("batch", [1, 9])
def test_whole_range_of_weights_does_not_saturate(isa: str, batch: int) -> None:
    """255 * 127 + 255 * 127 does not fit into int16, where x86 without VNNI adds pairs."""
    weight = np.full((8, 32), 127, np.int8)
    weight[1] = -128
    weight[2, ::2] = -127
    x = random_bytes(1, batch, 32) | np.uint8(128)
    for layer in (Int8Layer(weight), Int8Layer(int8_weight(3, (8, 32), 0.5, most=127))):
        assert one_step(session(layer.sparse(), sparse=True).run(None, {"x": x})[0], layer.exact(x))
    image = random_bytes(1, 1, 32, 6, 6) | np.uint8(128)
    conv = Int8Layer(np.broadcast_to(weight[:, :, None, None], (8, 32, 3, 3)).copy(), window={"pads": [1, 1, 1, 1]})
    assert one_step(session(conv.sparse(), sparse=True).run(None, {"x": image})[0], conv.exact(image))


@needs_library
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_convolutions(isa: str, data: st.DataObject) -> None:
    small = st.integers(1, 3)
    group, kernel = data.draw(small), [data.draw(st.integers(1, 4)) for _ in range(2)]
    dilations = [data.draw(small) for _ in range(2)]
    window = {
        "group": group,
        "strides": [data.draw(small) for _ in range(2)],
        "dilations": dilations,
        "pads": [data.draw(st.integers(0, 3)) for _ in range(4)],
    }
    rows, channels = group * data.draw(st.integers(1, 6)), data.draw(st.integers(1, 11))
    sizes = [data.draw(st.integers(max(1, (k - 1) * d + 1), 40)) for k, d in zip(kernel, dilations, strict=True)]
    weight = int8_weight(
        9, (rows, channels, *kernel), data.draw(st.sampled_from([0.05, 0.3, 1.0])), block=data.draw(st.sampled_from([1, 4]))
    )
    zeros = data.draw(st.integers(0, 255)), data.draw(st.integers(0, 255))
    layer = Int8Layer(weight, data.draw(st.booleans()), window, *zeros)
    check(layer, data.draw(st.integers(1, 2)), channels * group, *sizes)


@needs_library
def test_every_instruction_set_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int8Layer(int8_weight(5, (48, 40, 3, 3), 0.2, most=127), window={"pads": [1, 1, 1, 1]})
    x = {"x": random_bytes(1, 2, 40, 17, 19)}
    results = []
    for name in ISAS:
        monkeypatch.setenv(VARIABLE, name)
        results.append(session(layer.sparse(), sparse=True).run(None, x)[0])
    assert all(np.array_equal(results[0], other) for other in results[1:])


@needs_library
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Int8Layer(int8_weight(5, (96, 64, 3, 3), 0.2), window={"pads": [1, 1, 1, 1]}), (2, 64, 40, 40)),
        (Int8Layer(int8_weight(5, (96, 64, 3, 3), 0.2), window={"pads": [1, 1, 1, 1]}), (1, 64, 7, 7)),
        (Int8Layer(int8_weight(5, (512, 701), 0.2)), (1, 701)),
        (Int8Layer(int8_weight(5, (512, 701), 0.2)), (70, 701)),
    ],
)
def test_same_bytes_for_any_number_of_threads(isa: str, layer: Int8Layer, shape: tuple[int, ...]) -> None:
    x = {"x": random_bytes(1, *shape)}
    one, *others = (session(layer.sparse(), sparse=True, threads=n).run(None, x)[0] for n in (1, 2, 3, 8))
    assert all(np.array_equal(one, other) for other in others)


@needs_library
def test_shapes_may_change_from_run_to_run(isa: str) -> None:
    layer = Int8Layer(int8_weight(5, (8, 4, 3, 3), 0.3), window={"pads": [1, 1, 1, 1]})
    sparse = session(layer.sparse(), sparse=True)
    for size in [*range(3, 15), 3, 9]:  # more shapes than are remembered
        x = random_bytes(1, 1, 4, size, size + 2)
        assert one_step(sparse.run(None, {"x": x})[0], layer.exact(x))
    assert sparse.run(None, {"x": random_bytes(1, 0, 4, 5, 5)})[0].shape == (0, 8, 5, 5)


GEMM = Int8Layer(int8_weight(5, (8, 6), 0.5))
CONV = Int8Layer(int8_weight(5, (8, 6, 3, 3), 0.5), window={"pads": [1, 1, 1, 1]})
COUNT = GEMM.parts["values"].size
NAN = np.array(np.nan, np.float32)

HOSTILE: dict[str, tuple[Int8Layer, dict[str, Any], str]] = {
    "fewer gaps": (GEMM, {"gaps": np.ones(COUNT - 1, np.uint8)}, "two lists of one length"),
    "positions outside": (GEMM, {"gaps": np.full(COUNT, 200, np.uint8)}, "the weight has 48 elements"),
    "positions twice": (GEMM, {"gaps": np.zeros(COUNT, np.uint8)}, "where the one before it does"),
    "a short bias": (GEMM, {"bias": np.ones(7, np.int32)}, r"bias is \[7\]"),
    "a short scale": (GEMM, {"w_scale": np.ones(7, np.float32)}, r"w_scale is \[7\]"),
    "two input scales": (GEMM, {"x_scale": np.ones(2, np.float32)}, "x_scale is .2., not one number"),
    "no zero point": (GEMM, {"x_zero_point": np.ones(0, np.uint8)}, "x_zero_point is .0., not one number"),
    "a scale that is not a number": (GEMM, {"x_scale": NAN}, "scale of output channel 0 is not finite"),
    "a scale of zero": (GEMM, {"y_scale": np.array(0, np.float32)}, "scale of output channel 0 is not finite"),
    "a bias at the edge": (GEMM, {"bias": np.full(8, 2**31 - 1, np.int32)}, "sums of output channel . may leave int32"),
    "the least bias": (GEMM, {"bias": np.full(8, -(2**31), np.int32)}, "sums of output channel . may leave int32"),
    "an empty matrix": (GEMM, {"weight_shape": [8, 0]}, "at least 1"),
    "a negative size": (GEMM, {"weight_shape": [-8, -6]}, "at least 1"),
    "a product beyond all bounds": (GEMM, {"weight_shape": [2**30, 2**30]}, "2\\^31"),
    "three sizes": (GEMM, {"weight_shape": [8, 6, 1]}, "2 sizes"),
    "an empty kernel": (CONV, {"weight_shape": [8, 6, 0, 3]}, "at least 1"),
    "no such groups": (CONV, {"group": 3}, "do not divide"),
    "stride 0": (CONV, {"strides": [0, 1]}, "stride or dilation is 0"),
    "huge pads": (CONV, {"pads": [2**40, 0, 0, 0]}, "pads"),
    "bounds the wrong way": (Int8Layer(GEMM.weight, True), {"low": 200, "high": 100}, "low is above high"),
    "bounds beyond bytes": (Int8Layer(GEMM.weight, True), {"low": 300, "high": 2**40}, "low is above high"),
}


@needs_library
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str) -> None:
    layer, changes, message = HOSTILE[name]
    with pytest.raises(FAILURES, match=message):
        session(layer.sparse(**changes), sparse=True)


@needs_library
@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (GEMM, (3, 5), "last size must be 6"),
        (CONV, (1, 5, 9, 9), "6 channels"),
        (CONV, (1, 6, 0, 9), "the kernel reaches over 3 inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(layer: Int8Layer, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FAILURES, match=message):
        session(layer.sparse(), sparse=True).run(None, {"x": random_bytes(1, *shape)})


@needs_library
def test_scales_must_be_constant() -> None:
    model = GEMM.sparse()
    model.graph.input.append(helper.make_tensor_value_info("x_scale", TensorProto.FLOAT, []))  # a caller may override it
    with pytest.raises(FAILURES, match="must be an initializer"):
        session(model, sparse=True)


def test_encoding_is_exact() -> None:
    weight = int8_weight(5, (16, 300, 3, 3), 0.005, most=127)
    values, gaps = functions.encode(weight)
    assert values.dtype == np.int8
    assert np.array_equal(decoded(values, gaps, weight.shape), weight)
