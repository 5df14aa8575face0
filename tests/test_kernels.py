"""The sparse kernels against ONNX Runtime's dense operators, for every instruction set of this machine."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from relrep_onnx import kernels
from relrep_onnx.kernels import functions
from relrep_onnx.runtime import FAILURES
from relrep_onnx.types import ConfigError
from tests.kernel_models import VARIABLE, SparseLayer, close, decoded, session, sparse_weight
from tests.models import random

needs_library = pytest.mark.skipif(not kernels.available(), reason="the sparse kernels were not built: no compiler at install")
ISAS = kernels.instruction_sets() if kernels.available() else ()

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((16, 8, 3, 3), (2, 8, 14, 15), {"pads": [1, 1, 1, 1]}),
    "3x3 without padding": ((8, 5, 3, 3), (1, 5, 9, 9), {}),
    "asymmetric padding": ((8, 4, 3, 2), (1, 4, 10, 7), {"pads": [0, 1, 2, 3]}),
    "stride 2": ((12, 6, 3, 3), (1, 6, 15, 16), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "strides 3 and 1": ((8, 3, 5, 3), (1, 3, 20, 11), {"pads": [2, 1, 2, 1], "strides": [3, 1]}),
    "dilation": ((8, 4, 3, 3), (1, 4, 16, 17), {"pads": [2, 3, 2, 3], "dilations": [2, 3]}),
    "dilation and stride": ((8, 4, 3, 3), (1, 4, 23, 21), {"pads": [2, 2, 2, 2], "dilations": [3, 2], "strides": [2, 3]}),
    "7x7 stride 2": ((16, 3, 7, 7), (1, 3, 33, 40), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
    "1x1": ((24, 40, 1, 1), (2, 40, 12, 11), {}),
    "1x1 on few places": ((8, 16, 1, 1), (1, 16, 1, 3), {}),
    "1x1 stride 2": ((8, 16, 1, 1), (1, 16, 9, 10), {"strides": [2, 2]}),
    "1x1 with padding": ((8, 16, 1, 1), (1, 16, 5, 6), {"pads": [1, 1, 1, 1]}),
    "many channels": ((8, 300, 3, 3), (1, 300, 7, 7), {"pads": [1, 1, 1, 1]}),
    "many channels, 1x1": ((8, 700, 1, 1), (1, 700, 14, 14), {}),
    "groups": ((16, 4, 3, 3), (2, 16, 9, 8), {"pads": [1, 1, 1, 1], "group": 4}),
    "odd groups": ((15, 2, 3, 3), (1, 6, 9, 8), {"pads": [1, 1, 1, 1], "group": 3}),
    "depthwise": ((20, 1, 3, 3), (1, 20, 14, 14), {"pads": [1, 1, 1, 1], "group": 20}),
    "depthwise stride 2": ((20, 1, 3, 3), (1, 20, 15, 14), {"pads": [1, 1, 1, 1], "strides": [2, 2], "group": 20}),
    "depthwise, many tiles": ((3, 1, 5, 5), (2, 3, 130, 121), {"pads": [2, 2, 2, 2], "group": 3}),
    "depthwise, narrow": ((6, 1, 3, 3), (2, 6, 7, 3), {"pads": [1, 1, 1, 1], "group": 6}),
    "depthwise, dilation and stride": (
        (5, 1, 3, 4),
        (1, 5, 40, 37),
        {"pads": [2, 1, 0, 3], "strides": [2, 3], "dilations": [3, 1], "group": 5},
    ),
    "depthwise 1x1": ((8, 1, 1, 1), (1, 8, 9, 10), {"group": 8}),
    "wide": ((4, 3, 3, 3), (1, 3, 5, 700), {"pads": [1, 1, 1, 1]}),
    "wide stride 2": ((4, 3, 3, 3), (1, 3, 9, 900), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "tall": ((4, 3, 3, 3), (1, 3, 600, 5), {"pads": [1, 1, 1, 1]}),
    "kernel as large as the image": ((4, 3, 6, 6), (1, 3, 6, 6), {}),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def check(layer: SparseLayer, *shape: int) -> None:
    """The library's answer, and the answer of the same file without the library, are those of plain ONNX."""
    feeds = {"x": random(1, *shape)}
    dense = session(layer.dense(), sparse=False)
    if layer.adds:
        plain = SparseLayer(layer.weight, False, "", layer.window)
        feeds["residual"] = random(2, *session(plain.dense(), sparse=False).run(None, feeds)[0].shape)
    wanted = dense.run(None, feeds)[0]
    assert close(session(layer.sparse(), sparse=True).run(None, feeds)[0], wanted)
    assert close(session(layer.sparse(), sparse=False).run(None, feeds)[0], wanted)


@needs_library
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("density", "block"), [(0.2, 1), (0.2, 4), (1.0, 1), (0.0, 1)])
def test_convolution(isa: str, name: str, density: float, block: int) -> None:
    weight_shape, shape, window = CONVOLUTIONS[name]
    check(SparseLayer(sparse_weight(5, weight_shape, density, block=block), window=window), *shape)


@needs_library
@pytest.mark.parametrize("batch", [1, 2, 5, 33, 130])
@pytest.mark.parametrize(("density", "block"), [(0.2, 1), (0.2, 4), (1.0, 1), (0.0, 1)])
def test_product(isa: str, batch: int, density: float, block: int) -> None:
    check(SparseLayer(sparse_weight(6, (60, 90), density, block=block)), batch, 90)


@needs_library
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["", "Relu", "Clip"])
@pytest.mark.parametrize("block", [1, 4])
def test_what_is_fused(isa: str, adds: bool, activation: functions.Activation, block: int) -> None:
    window = {"pads": [1, 1, 1, 1]}
    check(SparseLayer(sparse_weight(7, (8, 6, 3, 3), 0.3, block=block), adds, activation, window), 2, 6, 7, 9)
    check(SparseLayer(sparse_weight(7, (8, 6, 1, 1), 0.3, block=block), adds, activation), 2, 6, 16, 16)
    for batch in (1, 9):
        check(SparseLayer(sparse_weight(8, (24, 30), 0.3, block=block), adds, activation), batch, 30)


@needs_library
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_convolutions(isa: str, data: st.DataObject) -> None:
    small = st.integers(1, 3)
    depthwise = data.draw(st.booleans())
    group, kernel = data.draw(st.integers(1, 9) if depthwise else small), [data.draw(st.integers(1, 4)) for _ in range(2)]
    dilations = [data.draw(small) for _ in range(2)]
    window = {
        "group": group,
        "strides": [data.draw(small) for _ in range(2)],
        "dilations": dilations,
        "pads": [data.draw(st.integers(0, 3)) for _ in range(4)],
    }
    rows, channels = (group, 1) if depthwise else (group * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    sizes = [data.draw(st.integers(max(1, (k - 1) * d + 1), 30)) for k, d in zip(kernel, dilations, strict=True)]
    weight = sparse_weight(
        9, (rows, channels, *kernel), data.draw(st.sampled_from([0.05, 0.3, 1.0])), block=data.draw(st.sampled_from([1, 4]))
    )
    check(SparseLayer(weight, data.draw(st.booleans()), data.draw(st.sampled_from(["", "Relu", "Clip"])), window),
          data.draw(st.integers(1, 2)), channels * group, *sizes)  # fmt: skip


@needs_library
def test_shapes_may_change_from_run_to_run(isa: str) -> None:
    layer = SparseLayer(sparse_weight(5, (8, 4, 3, 3), 0.3), window={"pads": [1, 1, 1, 1]})
    sparse, dense = session(layer.sparse(), sparse=True), session(layer.dense(), sparse=False)
    for size in [*range(3, 15), 3, 9]:  # more shapes than are remembered
        x = {"x": random(1, 1, 4, size, size + 2)}
        assert close(sparse.run(None, x)[0], dense.run(None, x)[0])
    assert sparse.run(None, {"x": random(1, 0, 4, 5, 5)})[0].shape == (0, 8, 5, 5)


@needs_library
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (1, 64, 7, 7), (1, 64, 14, 14)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_same_bits_for_any_number_of_threads(isa: str, shape: tuple[int, ...], kernel: int) -> None:
    layer = SparseLayer(sparse_weight(5, (96, 64, kernel, kernel), 0.2), window={"pads": [kernel // 2] * 4})
    x = {"x": random(1, *shape)}
    one, *others = (session(layer.sparse(), sparse=True, threads=n).run(None, x)[0] for n in (1, 2, 3, 8))
    assert all(np.array_equal(one, other) for other in others)


@needs_library
@pytest.mark.parametrize("batch", [1, 70])
def test_products_have_the_same_bits_for_any_number_of_threads(isa: str, batch: int) -> None:
    layer = SparseLayer(sparse_weight(5, (512, 700), 0.2))
    x = {"x": random(1, batch, 700)}
    one, *others = (session(layer.sparse(), sparse=True, threads=n).run(None, x)[0] for n in (1, 2, 5))
    assert all(np.array_equal(one, other) for other in others)


@needs_library
def test_not_a_number_passes_relu(isa: str) -> None:
    layer = SparseLayer(sparse_weight(5, (8, 4), 1.0), activation="Relu")
    x = random(1, 3, 4)
    x[1, 2] = np.nan
    assert np.isnan(session(layer.sparse(), sparse=True).run(None, {"x": x})[0][1]).all()


GEMM = SparseLayer(sparse_weight(5, (8, 6), 0.5))
CONV = SparseLayer(sparse_weight(5, (8, 6, 3, 3), 0.5), window={"pads": [1, 1, 1, 1]})
COUNT = functions.encode(GEMM.weight)[0].size

HOSTILE: dict[str, tuple[SparseLayer, dict[str, Any], str]] = {
    "fewer gaps": (GEMM, {"gaps": np.ones(COUNT - 1, np.uint8)}, "two lists of one length"),
    "more gaps": (GEMM, {"gaps": np.ones(COUNT + 1, np.uint8)}, "two lists of one length"),
    "positions outside": (GEMM, {"gaps": np.full(COUNT, 200, np.uint8)}, "the weight has 48 elements"),
    "positions twice": (GEMM, {"gaps": np.zeros(COUNT, np.uint8)}, "where the one before it does"),
    "a weight that is not a number": (GEMM, {"values": np.full(COUNT, np.nan, np.float32)}, "not finite"),
    "an infinite weight": (GEMM, {"values": np.full(COUNT, np.inf, np.float32)}, "not finite"),
    "a short bias": (GEMM, {"bias": np.ones(7, np.float32)}, r"bias is \[7\]"),
    "a smaller matrix": (GEMM, {"weight_shape": [8, 2]}, "the weight has 16 elements"),
    "an empty matrix": (GEMM, {"weight_shape": [8, 0]}, "at least 1"),
    "a negative size": (GEMM, {"weight_shape": [-8, -6]}, "at least 1"),
    "a size beyond all bounds": (GEMM, {"weight_shape": [2**62, 8]}, "2\\^31"),
    "a product beyond all bounds": (GEMM, {"weight_shape": [2**30, 2**30]}, "2\\^31"),
    "three sizes": (GEMM, {"weight_shape": [8, 6, 1]}, "2 sizes"),
    "an empty kernel": (CONV, {"weight_shape": [8, 6, 0, 3]}, "at least 1"),
    "no such groups": (CONV, {"group": 3}, "do not divide"),
    "no groups": (CONV, {"group": 0}, "do not divide"),
    "stride 0": (CONV, {"strides": [0, 1]}, "stride or dilation is 0"),
    "a huge dilation": (CONV, {"dilations": [1, 2**40]}, "stride or dilation"),
    "one stride": (CONV, {"strides": [1]}, "2 strides"),
    "negative pads": (CONV, {"pads": [-1, 0, 0, 0]}, "pads"),
    "huge pads": (CONV, {"pads": [2**40, 0, 0, 0]}, "pads"),
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
        (SparseLayer(GEMM.weight, adds=True), (3, 6), r"residual is \[3 x 7\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(layer: SparseLayer, shape: tuple[int, ...], message: str) -> None:
    loaded = session(layer.sparse(), sparse=True)
    feeds = {"x": random(1, *shape)} | ({"residual": random(1, 3, 7)} if layer.adds else {})
    with pytest.raises(FAILURES, match=message):
        loaded.run(None, feeds)


@needs_library
def test_weights_must_be_constant() -> None:
    model = GEMM.sparse()
    model.graph.input.append(helper.make_tensor_value_info("values", TensorProto.FLOAT, [COUNT]))  # a caller may override it
    with pytest.raises(FAILURES, match="must be an initializer"):
        session(model, sparse=True)


@needs_library
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "abacus")
    with pytest.raises(FAILURES, match=f"'abacus'; this machine has .*{ISAS[-1]}"):
        session(GEMM.sparse(), sparse=True)


@needs_library
def test_many_sessions_and_threads() -> None:
    layer = SparseLayer(sparse_weight(5, (64, 32, 3, 3), 0.2), window={"pads": [1, 1, 1, 1]})
    model = layer.sparse().SerializeToString()
    x = {"x": random(1, 1, 32, 28, 28)}
    wanted = session(model, sparse=True).run(None, x)[0]
    shared = session(model, sparse=True, threads=2)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(5):
            own = session(model, sparse=True, threads=2)
            wrong.extend(r for r in (own, shared) if not np.array_equal(r.run(None, x)[0], wanted))
            del own  # closes while the others run

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
def test_memory_does_not_grow() -> None:
    layer = SparseLayer(sparse_weight(5, (32, 16, 3, 3), 0.2), window={"pads": [1, 1, 1, 1]})
    running = session(layer.sparse(), sparse=True)

    def burst(runs: int) -> int:
        for i in range(runs):
            running.run(None, {"x": np.zeros((1, 16, 8 + i % 12, 8), np.float32)})
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = burst(500)
    assert burst(3000) - before < 1024  # kilobytes; a leak of one plan a run would be ten times as much


def test_without_the_library_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "missing.so")
    assert not kernels.available()
    with pytest.raises(ConfigError, match="compiler"):
        kernels.register(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compiler"):
        kernels.instruction_sets()


@given(st.lists(st.integers(0, 700), max_size=20), st.booleans())
def test_encoding_is_exact(gaps: list[int], tail: bool) -> None:
    flat = np.zeros(sum(gaps) + len(gaps) + 600 * tail + 1, np.float32)
    flat[np.cumsum([gap + (i > 0) for i, gap in enumerate(gaps)], dtype=np.int64)] = 1.5
    values, encoded = functions.encode(flat)
    assert values.dtype == np.float32
    assert encoded.dtype == np.uint8
    assert np.array_equal(decoded(values, encoded, flat.shape), flat)


def test_a_sparse_weight_is_small() -> None:
    weight = sparse_weight(5, (256, 256, 3, 3), 0.1)
    values, gaps = functions.encode(weight)
    assert (values.nbytes + gaps.nbytes) / weight.nbytes < 0.13
