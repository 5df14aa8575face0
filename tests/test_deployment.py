"""What `--for` picks: the table agrees with the forms and patterns that exist, and protects what does not pay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from relrep_onnx import Config, ConfigError, optimize
from relrep_onnx.deployment import RUNTIMES, gaining
from relrep_onnx.export import Order, check_forms
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.masks import pattern_named
from relrep_onnx.types import Selection
from tests.models import build, random

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy.md"


@pytest.mark.parametrize("name", RUNTIMES)
def test_rows_are_valid(name: str) -> None:
    config = Config.for_runtime(name)
    assert config.runtime == name
    pattern_named(config.pattern)
    check_forms(config.forms, Order(config.values, config.target))


def test_other_settings_win(tmp_path: Path) -> None:
    assert Config.for_runtime("tensorrt").pattern == "2:4"
    assert Config.for_runtime("tensorrt", pattern="1:4").pattern == "1:4"
    assert Config.from_json('{"runtime": "tensorrt", "seed": 3}') == Config.for_runtime("tensorrt", seed=3)
    assert Config.from_json('{"runtime": "tensorrt", "pattern": "4x1"}').pattern == "4x1"
    assert Config.from_json(Config.for_runtime("ort-mobile").to_json()) == Config.for_runtime("ort-mobile")


def test_another_form_leaves_the_options_of_the_first_behind() -> None:
    config = Config.for_runtime("ort-mobile", forms=("compact",))
    assert (config.forms, config.target) == (("compact",), "amd64")
    assert Config.for_runtime("ort-mobile", forms=("ort",), target="arm").target == "arm"


@pytest.mark.parametrize(
    ("saved", "said", "settles"),
    [
        ({"runtime": "tensorrt"}, {}, {"pattern": "2:4"}),
        ({"runtime": "tensorrt", "pattern": "1:4"}, {}, {"pattern": "1:4"}),
        ({"runtime": "tensorrt"}, {"pattern": "1:4"}, {"pattern": "1:4"}),
        ({"runtime": None, "pattern": "4x1", "seed": 3}, {"runtime": "tensorrt"}, {"pattern": "2:4", "seed": 3}),
        ({"forms": ("compact",)}, {"runtime": "ort-mobile"}, {"forms": ("int8+ort",), "target": "arm"}),
        ({"runtime": "ort-mobile", "forms": ("compact",)}, {}, {"forms": ("compact",), "target": "amd64"}),
        ({"runtime": "ort-mobile"}, {"forms": ("compact",)}, {"forms": ("compact",), "target": "amd64"}),
        ({"runtime": "ort-mobile", "forms": ("int8",), "target": "arm"}, {"runtime": "ort"}, {"target": "amd64"}),
        ({"values": "int8"}, {"runtime": "ort-kernels"}, {"forms": ("sparse-ort",), "values": "int8"}),
        ({"forms": ("compact",), "values": "int8"}, {"forms": ("compact",)}, {"values": "int8"}),
    ],
)
def test_a_file_a_runtime_and_what_was_said(saved: dict[str, Any], said: dict[str, Any], settles: dict[str, Any]) -> None:
    config = Config.merged(saved, said)
    assert {name: getattr(config, name) for name in settles} == settles
    assert config.runtime == {**saved, **said}.get("runtime")
    check_forms(config.forms, Order(config.values, config.target))


def test_an_unknown_runtime_is_refused() -> None:
    message = "no runtime is called 'abacus'; choose from ort,"
    with pytest.raises(ConfigError, match=message):
        Config(runtime="abacus")
    with pytest.raises(ConfigError, match=message):
        Config.for_runtime("abacus")


@pytest.mark.parametrize(("name", "pruned"), [("xnnpack", {"one"}), ("tensorrt", {"wide"}), ("ort", {"three", "one", "wide"})])
def test_layers_that_do_not_pay_stay_dense(name: str, pruned: set[str]) -> None:
    shapes = {"three": (16, 8, 3, 3), "one": (256, 16, 1, 1), "wide": (256, 256, 2, 2)}
    tensors = {
        f"{k}.w": random(i, *shape) / np.float32(np.sqrt(np.prod(shape[1:]))) for i, (k, shape) in enumerate(shapes.items())
    }
    nodes, x = [], "x"
    for key in shapes:
        nodes.append(helper.make_node("Conv", [x, f"{key}.w"], [f"{key}.y"], name=key))
        x = f"{key}.y"
    model = build([*nodes, helper.make_node("GlobalAveragePool", [x], ["y"])], {"x": ("n", 8, 5, 5)}, ["y"], tensors)
    config = Config.for_runtime(name, forms=("onnx",), min_size=64, allocate="uniform", repair="none")
    result = optimize(model, None, random(9, 32, 8, 5, 5), config)
    assert {report.layer.name for report in result.layers} == pruned
    assert f"for {name}: {RUNTIMES[name].pays}" in result.notes


def test_the_guide_names_every_runtime() -> None:
    named = set(re.findall(r"--for ([a-z-]+)", DEPLOY.read_text(encoding="utf-8")))
    assert named == set(RUNTIMES)


def test_which_layers_gain() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "pointwise"], ["a"], name="pointwise"),
        helper.make_node("Conv", ["a", "wide"], ["y"], name="wide", pads=[1, 1, 1, 1]),
    ]
    weights = {"pointwise": random(1, 256, 8, 1, 1), "wide": random(2, 256, 256, 3, 3)}
    layers, _ = find_layers(Graph(build(nodes, {"x": ["N", 8, 4, 4]}, ["y"], weights)), Selection())
    halves, most = ([(layer, sparsity) for layer in layers] for sparsity in (0.5, 0.9))
    assert [gaining(RUNTIMES["ort"], "unstructured", pruned) for pruned in (halves, most)] == [2, 2]
    assert gaining(RUNTIMES["ort"], "unstructured", [(layer, 0.0) for layer in layers]) == 0
    assert [gaining(RUNTIMES["xnnpack"], "unstructured", pruned) for pruned in (halves, most)] == [0, 1]
    assert [gaining(RUNTIMES["tensorrt"], pattern, halves) for pattern in ("unstructured", "2:4")] == [0, 1]
    assert [gaining(RUNTIMES["ort-kernels"], pattern, most) for pattern in ("unstructured", "4x1", "1x4")] == [2, 2, 2]
    assert gaining(RUNTIMES["ort-kernels"], "2:4", halves) == 0


def test_what_a_runtime_picks_gains_there() -> None:
    for name, runtime in RUNTIMES.items():
        assert runtime.only in (None, Config.for_runtime(name).pattern)
