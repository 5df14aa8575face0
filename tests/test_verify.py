"""Fidelity against numpy on tiny models, and the gates."""

from __future__ import annotations

import gzip
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, CalibrationError, ConfigError, Feeds, FloatArray, VerificationError
from relrep_onnx.verify import (
    Fidelity,
    Gates,
    OutputFidelity,
    check_gates,
    compare_outputs,
    compare_sessions,
    float_outputs,
    gzip_size,
    load_metric,
    run_metric,
)

OPTIONS = RuntimeOptions(threads=1)


def session(*weights: FloatArray, extra: Sequence[Any] = ()) -> Session:
    """y0 = x w0, y1 = x w1, ... and the extra outputs."""
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(len(weights))]
    graph = helper.make_graph(
        [*nodes, *(node for node, _ in extra)],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [
            *(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["N", w.shape[1]]) for i, w in enumerate(weights)),
            *(info for _, info in extra),
        ],
        [numpy_helper.from_array(w.astype(np.float32), f"w{i}") for i, w in enumerate(weights)],
    )
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Session(model.SerializeToString(), OPTIONS)


def data(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def batches(x: Array, size: int) -> list[Feeds]:
    return [{"x": x[i : i + size]} for i in range(0, len(x), size)]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), batch=st.integers(1, 12))
def test_fidelity_is_numpys(seed: int, count: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    dense, sparse = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 4, 5))
    x = data(count, seed)
    fidelity = compare_sessions(session(*dense), session(*sparse), batches(x, batch))
    assert fidelity.samples == count
    assert [o.output for o in fidelity.outputs] == ["y0", "y1"]
    for output, wd, ws in zip(fidelity.outputs, dense, sparse, strict=True):
        a, b = x @ wd.astype(np.float32), x @ ws.astype(np.float32)
        assert output.relative_l2 == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-4)
        assert output.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4, abs=1e-5)
        each = np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1)
        assert output.worst_sample == each.argmax()
        assert output.worst_relative_l2 == pytest.approx(each.max(), rel=1e-4)
        assert output.top1_agreement == pytest.approx((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    assert fidelity.relative_l2 == max(o.relative_l2 for o in fidelity.outputs)
    assert fidelity.top1_agreement == min(o.top1_agreement for o in fidelity.outputs if o.top1_agreement is not None)


def test_a_model_is_like_itself() -> None:
    one = session(np.eye(4)[:, :3])
    (output,) = compare_sessions(one, one, batches(data(9), 4)).outputs
    assert (output.relative_l2, output.worst_relative_l2, output.top1_agreement) == (0.0, 0.0, 1.0)
    assert output.cosine == pytest.approx(1.0)


def test_all_outputs_gone() -> None:
    (output,) = compare_sessions(session(np.eye(4)), session(np.zeros((4, 4))), batches(data(5), 5)).outputs
    assert (output.relative_l2, output.cosine) == (1.0, 0.0)


def test_outputs_that_were_zero() -> None:
    zero, one = session(np.zeros((4, 4))), session(np.eye(4))
    (same,) = compare_sessions(zero, zero, batches(data(5), 5)).outputs
    assert (same.relative_l2, same.cosine) == (0.0, 1.0)
    (other,) = compare_sessions(zero, one, batches(data(5), 5)).outputs
    assert (other.relative_l2, other.cosine) == (math.inf, 0.0)
    with pytest.raises(VerificationError, match="relative L2 error inf"):
        check_gates(Fidelity(5, (other,)), None, Gates(max_error=1e9))


def test_only_floats_are_compared() -> None:
    node = helper.make_node("ArgMax", ["y0"], ["label"], axis=1, keepdims=0)
    one = session(np.eye(4), extra=[(node, helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]))])
    assert float_outputs(one) == ["y0"]
    assert [o.output for o in compare_sessions(one, one, batches(data(3), 3)).outputs] == ["y0"]


@pytest.mark.parametrize(("columns", "classes"), [(1, False), (2, True), (4, True)])
def test_classes_are_one_axis_with_several_elements(columns: int, classes: bool) -> None:
    one = session(np.eye(4)[:, :columns])
    (output,) = compare_sessions(one, one, batches(data(6), 4)).outputs
    assert (output.top1_agreement is not None) == classes


def test_an_output_without_samples_is_one_sample() -> None:
    node = helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)
    info = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [])
    one = session(extra=[(node, info)])
    (output,) = compare_sessions(one, one, batches(data(6), 4)).outputs
    assert (output.relative_l2, output.top1_agreement) == (0.0, None)


def test_nan_never_passes() -> None:
    dense, sparse = session(np.eye(4)), session(np.full((4, 4), np.nan))
    fidelity = compare_sessions(dense, sparse, batches(data(5), 5))
    assert math.isnan(fidelity.relative_l2)
    with pytest.raises(VerificationError, match="relative L2 error nan is above --max-error 100"):
        check_gates(fidelity, None, Gates(max_error=100.0))


def test_nan_of_one_output_is_the_worst() -> None:
    outputs = tuple(OutputFidelity(n, e, 1.0, 0, e, None) for n, e in [("a", 0.1), ("b", math.nan), ("c", 0.2)])
    assert math.isnan(Fidelity(4, outputs).relative_l2)
    assert Fidelity(0, ()).relative_l2 == 0.0
    assert Fidelity(4, outputs).top1_agreement is None


def test_dense_outputs_may_be_kept() -> None:
    dense, x = session(np.eye(4)), data(8)
    kept = [(feeds, dense.run(feeds, ["y0"])) for feeds in batches(x, 3)]
    sparse = session(np.diag([1.0, 1, 0, 1]))
    assert compare_outputs(["y0"], kept, sparse) == compare_sessions(dense, sparse, batches(x, 3))


def test_no_sample_is_no_verdict() -> None:
    one = session(np.eye(4))
    with pytest.raises(CalibrationError, match="no sample to compare"):
        compare_sessions(one, one, [])


# Gates


def fidelity(error: float = 0.2, agreement: float | None = 0.9) -> Fidelity:
    return Fidelity(100, (OutputFidelity("y", error, 0.99, 3, 0.5, agreement),))


@pytest.mark.parametrize(
    "gates",
    [
        Gates(),
        Gates(max_error=0.2),
        Gates(min_agreement=0.9),
        Gates(min_metric=0.7),
        Gates(max_bytes=1000),
        Gates(max_error=0.3, min_agreement=0.5, min_metric=0.1),
    ],
)
def test_gates_that_are_met(gates: Gates) -> None:
    check_gates(fidelity(), 0.7, gates, 1000)
    worse = Fidelity(100, fidelity().outputs + fidelity(9.0, 0.01).outputs)
    if gates.max_error is not None or gates.min_agreement is not None:
        with pytest.raises(VerificationError, match="nothing was written"):
            check_gates(worse, 0.7, gates)


@pytest.mark.parametrize(
    ("gates", "metric", "message"),
    [
        (Gates(max_error=0.19), None, "relative L2 error 0.2 is above --max-error 0.19"),
        (Gates(min_agreement=0.91), None, "top-1 agreement 0.9000 is below --min-agreement 0.91"),
        (Gates(min_metric=0.71), 0.7, "metric 0.7 is below --min-metric 0.71"),
        (Gates(min_metric=0.71), math.nan, "metric nan is below --min-metric 0.71"),
        (Gates(min_metric=0.71), None, "metric None is below"),
        (Gates(min_metric=math.nan), 0.7, "is below --min-metric nan"),
        (Gates(max_error=math.nan), None, "is above --max-error nan"),
        (Gates(max_bytes=1999), None, "2,000 bytes are above --max-bytes 1,999"),
        (Gates(min_agreement=math.nan), None, "is below --min-agreement nan"),
    ],
)
def test_gates_that_are_missed(gates: Gates, metric: float | None, message: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(message)):
        check_gates(fidelity(), metric, gates, 2000)


def test_every_missed_gate_is_named() -> None:
    message = r"--max-error 0\.1; .*--min-agreement 1; .*--min-metric 1; .*--max-bytes 5 \(100 held-out"
    with pytest.raises(VerificationError, match=message):
        check_gates(fidelity(), 0.5, Gates(max_error=0.1, min_agreement=1.0, min_metric=1.0, max_bytes=5), 6)


def test_a_size_is_no_gate_where_no_file_is_written() -> None:
    check_gates(fidelity(), None, Gates(max_bytes=1))


def test_agreement_needs_classes() -> None:
    with pytest.raises(ConfigError, match="needs an output that looks like classes; this model has none"):
        check_gates(fidelity(agreement=None), None, Gates(min_agreement=0.5))


@pytest.mark.parametrize("agreement", [None, 0.0, 0.5, 0.99, 1.0])
def test_agreements_that_a_hundred_samples_resolve(agreement: float | None) -> None:
    gates = Gates(min_agreement=agreement)
    gates.check_resolution(100)
    assert gates.min_agreement == agreement


@pytest.mark.parametrize(("samples", "agreement"), [(100, 0.995), (100, 0.9901), (10, 0.95), (1, 0.5)])
def test_agreements_that_are_too_fine(samples: int, agreement: float) -> None:
    with pytest.raises(ConfigError, match=f"finer than {samples} samples resolve"):
        Gates(min_agreement=agreement).check_resolution(samples)


# The user's metric


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder; whatever is imported from there is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    name = "metrics_of_this_test"
    (tmp_path / f"{name}.py").write_text(
        "ANSWER = 42\n"
        "def size(session): return len(session.get_inputs()[0].shape)\n"
        "def nothing(session): return None\n"
        "def text(session): return 'good'\n"
        "def fails(session): return {}['top1']\n"
    )
    (tmp_path / "broken_of_this_test.py").write_text("def f(:\n")
    yield name
    sys.modules.pop(name, None)


def test_the_metric_gets_a_plain_session(metrics: str) -> None:
    value = run_metric(load_metric(f"{metrics}:size"), session(np.eye(4)))
    assert value == 2.0
    assert isinstance(value, float)


@pytest.mark.parametrize("function", ["nothing", "text"])
def test_a_metric_that_gives_no_number(metrics: str, function: str) -> None:
    with pytest.raises(ConfigError, match=r"the metric returned .*; it must return one number"):
        run_metric(load_metric(f"{metrics}:{function}"), session(np.eye(4)))


def test_a_metric_that_fails(metrics: str) -> None:
    with pytest.raises(ConfigError, match=rf"the metric failed in line 5 of .*{metrics}.py: KeyError: 'top1'; call it alone"):
        run_metric(load_metric(f"{metrics}:fails"), session(np.eye(4)))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("broken_of_this_test:f", "cannot import 'broken_of_this_test': SyntaxError: "),
        ("", "takes module:function"),
        ("{}", "takes module:function"),
        ("{}:", "takes module:function"),
        (":size", "takes module:function"),
        ("{}:missing", "has no 'missing'"),
        ("{}:ANSWER", "is no function"),
        ("no_such_module_at_all:f", "cannot import 'no_such_module_at_all'"),
        ("{}.sub:f", "cannot import"),
    ],
)
def test_references_to_no_metric(metrics: str, reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_metric(reference.format(metrics))


# Size


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) + 5])
def test_gzip_size(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(0).integers(0, 9, size).astype(np.uint8).tobytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert abs(gzip_size(path) - len(gzip.compress(content, 6, mtime=0))) <= 64
    assert gzip_size(path) == gzip_size(path)


def test_the_gzip_size_of_a_huge_file_is_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HUGE", 1 << 20), ("SAMPLED", 1 << 19), ("PIECE", 1 << 14)):
        monkeypatch.setattr(f"relrep_onnx.verify.{name}", value)
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    values[values < 0] = 0
    path = tmp_path / "model.onnx"
    path.write_bytes(values.tobytes())
    assert gzip_size(path) == pytest.approx(len(gzip.compress(values.tobytes(), 6)), rel=0.02)
