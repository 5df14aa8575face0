"""Timing models side by side: the table's content, the gate and the refusals; never a time itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import helper

from relrep_onnx import cli, report
from relrep_onnx.benchmark import Plan, Setting, Timing, benchmark, random_feeds, relative_error, require_same
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import ConfigError, ModelError, TensorInfo, VerificationError
from tests.models import build, random


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    for name, factor in (("a", 1.0), ("b", 1.5)):
        model = build([node], {"x": ["N", 4]}, ["y"], {"w": factor * random(1, 4, 3)})
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    other = build([helper.make_node("Relu", ["z"], ["y"])], {"z": ["N", "M"]}, ["y"])
    (folder / "other.onnx").write_bytes(other.SerializeToString())
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["benchmark", *map(str, arguments)])
    return result.exit_code, result.output


def test_every_setting_has_every_model(place: Path) -> None:
    plan = Plan(threads=(1, 2), batches=(1, 3), rounds=2, profile=True)
    settings = benchmark([place / "a.onnx", place / "b.onnx"], plan, RuntimeOptions(), lambda *_: None)
    assert [(s.threads, s.batch) for s in settings] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for setting in settings:
        first, second = setting.timings
        assert first.ratio == 1.0
        assert first.error == 0.0
        assert second.error == pytest.approx(0.5, rel=1e-5)
        assert second.quartiles[0] <= second.milliseconds <= second.quartiles[1]
        assert [n.op for n in setting.profiles[first.model]] == ["MatMul"]


def test_the_command(place: Path, tmp_path: Path) -> None:
    code, output = run(
        place / "a.onnx",
        place / "a.onnx",
        "--rounds",
        2,
        "--threads",
        1,
        "--require-same",
        0,
        "--profile",
        "--json",
        tmp_path / "t.json",
    )
    assert code == 0
    assert "1 thread, batch 1" in output
    assert "product" in output
    assert len(json.loads((tmp_path / "t.json").read_text())["settings"][0]["timings"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("a", "b", "--require-same", "0.1"), 3, "more than 0.1"),
        (("a", "other"), 1, "other inputs or outputs"),
        (("other",), 2, "--input-shape z:1"),
    ],
)
def test_refusals(place: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    paths = [str(place / f"{a}.onnx") if (place / f"{a}.onnx").exists() else a for a in arguments]
    found, output = run(*paths, "--rounds", 1, "--quiet")
    assert found == code
    assert message in output


def test_shapes_of_random_inputs() -> None:
    inputs = [
        TensorInfo("x", "tensor(float)", ("N", 3, "H")),
        TensorInfo("ids", "tensor(int64)", ("N", 5)),
        TensorInfo("s", "tensor(float16)", ()),
    ]
    feeds = random_feeds(inputs, 2, {"x": (1, 3, 7)}, 0)
    assert {name: (value.shape, value.dtype.name) for name, value in feeds.items()} == {
        "x": ((2, 3, 7), "float32"),
        "ids": ((2, 5), "int64"),
        "s": ((), "float16"),
    }
    with pytest.raises(ConfigError, match="'x' is tensor"):
        random_feeds(inputs, 2, {}, 0)
    with pytest.raises(ConfigError, match=r"'x' of shape \[2, 3, 1000000000000000000\] does not fit into memory"):
        random_feeds(inputs, 2, {"x": (1, 3, 10**18)}, 0)
    feeds = random_feeds([TensorInfo("x", "tensor(float)", ())], 2, {"x": (1, 3)}, 0)
    assert feeds["x"].shape == (2, 3)


def test_relative_error() -> None:
    one = {"y": np.array([3.0, 4.0], np.float32)}
    assert relative_error(one, one) == 0
    assert relative_error({"y": np.array([3.0, 5.0], np.float32)}, one) == pytest.approx(0.2)
    assert relative_error({"y": np.zeros(3, np.float32)}, one) == np.inf
    assert relative_error(one, {"y": np.zeros(2, np.float32)}) == np.inf
    assert relative_error({"y": np.zeros(0)}, {"y": np.zeros(0)}) == 0


@pytest.mark.parametrize(
    ("value", "other", "error"),
    [
        ([np.array([3.0]), np.array([4.0])], [np.array([3.0]), np.array([5.0])], 0.2),
        ([np.array([3.0])], [np.array([3.0]), np.array([5.0])], np.inf),
        ([{1: 3.0, 2: 4.0}], [{1: 3.0, 2: 5.0}], 0.2),
        (np.array(["a"], object), np.array(["a"], object), 0),
        (np.array(["a"], object), np.array(["b"], object), np.inf),
    ],
    ids=["sequence", "length", "map", "text", "other text"],
)
def test_relative_error_of_what_is_no_tensor_of_numbers(value: object, other: object, error: float) -> None:
    assert relative_error({"y": other}, {"y": value}) == pytest.approx(error, rel=0.15)


def test_models_of_sequences_and_of_inputs_without_a_rank(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("SequenceConstruct", ["a"], ["y"])]
    model = build(nodes, {"x": ["N", 4]}, ["y"], {"w": random(1, 4, 3)})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    plan = Plan(batches=(1, 3), rounds=1, shapes={"x": (1, 4)})
    settings = benchmark([tmp_path / "m.onnx"], plan, RuntimeOptions(), lambda *_: None)
    assert [s.timings[0].error for s in settings] == [0, 0]


def test_the_gate_and_the_verdict() -> None:
    first, fast = Timing("first", 2.0, (2, 2), 1.0, (1, 1), 0.0), Timing("fast", 1.0, (1, 1), 2.0, (1.8, 2.2), 1e-7)
    unsure = Timing("unsure", 1.9, (1, 3), 1.1, (0.9, 1.2), 1e-7)
    require_same([Setting(1, 1, (first, fast), {})], 1e-6)
    with pytest.raises(VerificationError, match="'fast' differ by 1e-07"):
        require_same([Setting(1, 1, (first, fast), {})], 1e-8)
    assert report.speed_verdict(Setting(1, 1, (first, fast), {})) == "fast is 2.00x as fast as the first model"
    assert "say it is not" in report.speed_verdict(Setting(1, 1, (first, unsure), {}))
    assert report.speed_verdict(Setting(1, 1, (first,), {})) == "no model is faster than the first"


def test_no_rounds_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="--rounds is 0"):
        benchmark([place / "a.onnx"], Plan(rounds=0), RuntimeOptions(), lambda *_: None)


def test_a_broken_model_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        benchmark([tmp_path / "broken.onnx"], Plan(), RuntimeOptions(), lambda *_: None)
