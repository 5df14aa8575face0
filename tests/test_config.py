"""Settings: every one survives JSON, and every wrong one is told apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.config import Config
from relrep_onnx.types import ConfigError

names = st.text(max_size=8)
fractions = st.floats(0, 1)
finite = st.floats(-1e6, 1e6)
counts = st.integers(1, 10**9)
optional_counts = st.none() | counts
tuples = st.none() | st.lists(finite, max_size=4).map(tuple)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "sparsity": st.none() | fractions,
    "max_drop": st.sampled_from([None, "0.1", "top1:5%", "eval:0.01"]),
    "runtime": st.sampled_from([None, "ort", "tensorrt", "ethos-u"]),
    "forms": st.lists(names, min_size=1, max_size=3).map(tuple),
    "values": st.sampled_from(["float32", "float16", "int8"]),
    "target": st.sampled_from(["amd64", "arm"]),
    "pattern": st.sampled_from(["unstructured", "2:4", "4x1", "3:7"]),
    "budget": st.sampled_from(["weights", "macs", "latency"]),
    "min_layer_sparsity": st.floats(0, 0.5),
    "max_layer_sparsity": st.floats(0.5, 1),
    "layer_sparsity": st.dictionaries(names, fractions, max_size=3),
    "allocate": names,
    "repair": names,
    "refine": st.integers(0, 1000),
    "augment": st.sampled_from(["auto", "none", "flip", "crop,mixup"]),
    "min_size": st.integers(0, 2**40),
    "nodes_to_exclude": st.lists(names, max_size=3).map(tuple),
    "op_types": st.lists(names, max_size=3).map(tuple),
    "calib_key": st.none() | names,
    "image_size": st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
    "mean": tuples,
    "std": st.none() | st.lists(st.floats(0.01, 1e6), max_size=4).map(tuple),
    "scale": st.none() | finite.filter(bool),
    "layout": st.sampled_from([None, "nchw", "nhwc"]),
    "color": st.sampled_from(["rgb", "bgr"]),
    "input_shape": st.dictionaries(names, st.lists(counts, max_size=4).map(tuple), max_size=2),
    "random_range": st.none() | st.tuples(st.floats(-1e6, 0), st.floats(0, 1e6)),
    "num_samples": optional_counts,
    "batch_size": counts,
    "positions": optional_counts,
    "seed": st.integers(0, 2**63),
    "skip_bad_samples": st.booleans(),
    "threads": st.integers(0, 64),
    "providers": st.lists(names, max_size=3).map(tuple),
    "custom_op_library": st.none() | names,
    "max_memory": optional_counts,
    "tune": st.booleans(),
    "eval": names,
    "max_error": st.none() | st.floats(0, 1e6),
    "min_agreement": st.none() | fractions,
    "min_metric": st.none() | finite,
    "max_bytes": optional_counts,
}


def test_every_field_is_tried() -> None:
    assert {f.name for f in dataclasses.fields(Config)} == FIELDS.keys()


@settings(deadline=None, max_examples=100)
@given(values=st.fixed_dictionaries({}, optional=FIELDS))
def test_json_round_trip(values: dict[str, Any]) -> None:
    if "eval" not in values:
        values.pop("min_metric", None)
    if values.get("sparsity") is not None or ("eval" not in values and values.get("max_drop") == "eval:0.01"):
        values.pop("max_drop", None)
    config = Config(**values)
    text = config.to_json()
    again = Config.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert all(getattr(again, name) == value for name, value in values.items())
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(FIELDS)


def test_missing_keys_take_their_defaults(tmp_path: Path) -> None:
    assert Config.from_json("{}") == Config()
    path = tmp_path / "config.json"
    path.write_text('{"sparsity": 1, "mean": [0, 0.5]}', encoding="utf-8")
    config = Config.load(path)
    assert config == Config(sparsity=1.0, mean=(0.0, 0.5))
    assert isinstance(config.sparsity, float)
    assert json.loads(config.to_json())["mean"] == [0.0, 0.5]


def test_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"here has an unknown key 'sparsty'; known keys: allocate, augment, .*threads"):
        Config.from_json('{"sparsty": 0.5}', source="here")


@pytest.mark.parametrize(
    "text", ["", "sparsity: 0.5", "{", "{'sparsity': 0.5}", "[" * 100_000, '{"seed": ' + "1" * 5000 + "}"], ids=lambda t: t[:9]
)
def test_not_json(text: str) -> None:
    with pytest.raises(ConfigError, match="the configuration is not JSON"):
        Config.from_json(text)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"sparsity"', "true"])
def test_not_an_object(text: str) -> None:
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        Config.from_json(text)


WRONG: list[tuple[str, Any]] = [
    ("sparsity", "0.5"),
    ("max_drop", 0.1),
    ("pattern", ["2:4"]),
    ("sparsity", True),
    ("sparsity", [0.5]),
    ("sparsity", 10**400),
    ("budget", "params"),
    ("budget", 1),
    ("budget", []),
    ("layer_sparsity", [0.5]),
    ("layer_sparsity", {"a": "0.5"}),
    ("layer_sparsity", {"a": None}),
    ("allocate", 1),
    ("allocate", None),
    ("min_size", 1.0),
    ("min_size", True),
    ("nodes_to_exclude", "conv"),
    ("nodes_to_exclude", [1]),
    ("nodes_to_exclude", {"a": 1}),
    ("image_size", [1]),
    ("image_size", [1, 2, 3]),
    ("image_size", [1.0, 2]),
    ("image_size", 224),
    ("mean", 0.5),
    ("mean", ["0.5"]),
    ("layout", "hwc"),
    ("color", None),
    ("input_shape", {"x": 3}),
    ("input_shape", {"x": [1, "N"]}),
    ("random_range", [0]),
    ("random_range", [None, 1]),
    ("num_samples", "all"),
    ("batch_size", None),
    ("eval", ["a:b"]),
    ("max_error", False),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_types(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"here: '{key}' has the wrong type or value"):
        Config.from_json(json.dumps({key: value}), source="here")


@settings(deadline=None, max_examples=100)
@given(
    key=st.sampled_from(sorted(FIELDS)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_json_gives_a_config_or_a_clear_error(key: str, value: Any) -> None:
    try:
        config = Config.from_json(json.dumps({key: value}))
    except ConfigError as error:
        message = str(error)
        named = key in message.replace("-", "_") or "sparsity" in message or "scale" in message
    else:
        named = Config.from_json(config.to_json()) == config
    assert named


RANGES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.5}, "sparsity is 1.5"),
    ({"sparsity": -0.1}, "sparsity is -0.1"),
    ({"sparsity": float("nan")}, "sparsity is nan"),
    ({"sparsity": float("inf")}, "sparsity is inf"),
    ({"min_layer_sparsity": 2.0}, "minimum layer sparsity is 2.0"),
    ({"max_layer_sparsity": -1.0}, "maximum layer sparsity is -1.0"),
    ({"min_layer_sparsity": 0.6, "max_layer_sparsity": 0.4}, "swap"),
    ({"layer_sparsity": {"a": 80.0}}, "sparsity of layer 'a' is 80.0"),
    ({"budget": "params"}, "budget unit is 'params'"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"positions": 0}, "positions is 0"),
    ({"num_samples": -1}, "num_samples is -1"),
    ({"max_memory": 0}, "max_memory is 0"),
    ({"max_bytes": 0}, "max_bytes is 0"),
    ({"threads": -1}, "threads is -1"),
    ({"min_size": -1}, "min_size is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"threads": 10**11}, "threads is 100000000000; it must be at least 0 and at most 1024"),
    ({"num_samples": 10**23}, "num_samples is 1"),
    ({"batch_size": 10**23}, "batch_size is 1"),
    ({"positions": 10**23}, "positions is 1"),
    ({"refine": 10**23}, "refine is 1"),
    ({"image_size": (5, 10**10)}, "image_size"),
    ({"input_shape": {"x": (1, 0)}}, r"input_shape of 'x' is \(1, 0\); its sizes must be at least 1"),
    ({"input_shape": {"x": (1, 10**20)}}, "input_shape of 'x'"),
    ({"image_size": (0, 5)}, "image_size"),
    ({"std": (0.0,)}, "std"),
    ({"mean": (float("nan"),)}, "finite"),
    ({"random_range": (1.0, 0.0)}, "random_range is"),
    ({"max_error": -0.1}, "max_error is -0.1"),
    ({"max_error": float("nan")}, "max_error is nan"),
    ({"min_agreement": 1.1}, "min_agreement is 1.1; it must be a number between 0 and 1"),
    ({"min_metric": float("nan"), "eval": "m:f"}, "min_metric is nan; it must be a number$"),
    ({"min_metric": 0.9}, "--min-metric needs --eval"),
]


@pytest.mark.parametrize(("values", "message"), RANGES, ids=lambda v: str(v)[:30])
def test_bad_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**values)
    if values.get("budget") is None:  # from JSON the type of the unit speaks first
        with pytest.raises(ConfigError, match=message):
            Config.from_json(json.dumps(values))


@pytest.mark.parametrize("name", ["nodes_to_exclude", "op_types", "providers", "forms"])
def test_a_text_is_no_list_of_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is the text 'Gemm'; give a tuple of names, such as"):
        Config(**{name: "Gemm"})  # type: ignore[arg-type]


def test_a_metric_is_named() -> None:
    with pytest.raises(ConfigError, match="as 'module:function'"):
        Config(eval=lambda session: 1.0)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        Config.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        Config.load(tmp_path)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        Config.load(path)
    path.write_text("{]")
    with pytest.raises(ConfigError, match=r"binary\.json is not JSON"):
        Config.load(path)


def test_each_setting_reaches_its_place() -> None:
    config = Config(
        sparsity=0.5, budget="macs", min_layer_sparsity=0.1, max_layer_sparsity=0.9, layer_sparsity={"a": 0.2},
        min_size=7, nodes_to_exclude=("n",), op_types=("Conv",), calib_key="k", image_size=(2, 3), mean=(1.0,), std=(2.0,),
        scale=3.0, layout="nhwc", color="bgr", input_shape={"x": (1, 2)}, random_range=(0.0, 9.0), num_samples=5, seed=4,
        skip_bad_samples=True, threads=2, providers=("P",), custom_op_library="lib.so",
        eval="m:f", max_error=0.3, min_agreement=0.6, min_metric=0.7, max_bytes=8,
    )  # fmt: skip
    assert dataclasses.astuple(config.as_budget()) == (0.5, "macs", 0.1, 0.9, {"a": 0.2})
    assert dataclasses.astuple(config.as_selection()) == (7, ("n",), ("Conv",))
    assert dataclasses.astuple(config.as_runtime()) == (2, ("P",), ("lib.so",), True)
    images = ((2, 3), (1.0,), (2.0,), 3.0, "nhwc", "bgr")
    assert dataclasses.astuple(config.as_data()) == ("k", images, {"x": (1, 2)}, 5, (0.0, 9.0), 4, True)
    assert dataclasses.astuple(config.as_gates()) == (0.3, 0.6, 0.7, 8)
