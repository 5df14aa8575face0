"""What people import: documented to the last name, typed, and the same from paths and from objects."""

from __future__ import annotations

import doctest
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import relrep_onnx
from relrep_onnx import Config, Exported, Fidelity, analyze, compare, export_model, optimize, refine
from relrep_onnx.types import Array
from tests.test_pipeline import SMALL, inputs, small_net
from tools import reference

ROOT = Path(__file__).parents[1]
FAST = replace(SMALL, allocate="lamp", repair="variance", threads=1)


class Reader:
    """The interface of a CalibrationDataReader; it can be asked once."""

    def __init__(self, x: Array) -> None:
        self._batches = iter(np.split(x, 4))

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


def test_the_reference_is_up_to_date() -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    assert page.partition(reference.MARKER)[2].strip() == reference.reference().strip(), "run python tools/reference.py"


def test_every_name_is_in_the_reference() -> None:
    text = reference.reference()
    for name in relrep_onnx.__all__:
        assert name.startswith("__") or f"### `{name}`" in text or f"- `{name}` (" in text


def test_every_setting_says_what_it_does() -> None:
    rows = [line for line in reference.reference().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    settings = {row.split("`")[1]: row.split(" | ")[-1].strip(" |") for row in rows}
    assert settings.keys() == set(Config.__dataclass_fields__)
    assert all(settings.values())


def test_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testfile(str(reference.PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted >= 12
    assert result.failed == 0
    assert not Path("small.onnx").exists()


def test_the_package_is_typed() -> None:
    assert resources.files(relrep_onnx).joinpath("py.typed").is_file()


@pytest.mark.parametrize("kind", ["str", "path", "object"])
@pytest.mark.parametrize("calib", ["array", "mapping", "feeds", "reader", "file"])
def test_models_and_samples_come_in_every_form(kind: str, calib: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", inputs(64)
    onnx.save(small_net(), path)
    np.save(tmp_path / "x.npy", x)
    model: Any = {"str": str(path), "path": path, "object": onnx.load(path)}[kind]
    samples: dict[str, Any] = {
        "array": x,
        "mapping": {"x": x},
        "feeds": ({"x": part} for part in np.split(x, 4)),
        "reader": Reader(x),
        "file": str(tmp_path / "x.npy"),
    }
    result = optimize(model, None, samples[calib], FAST)
    assert result.model == optimize(small_net(), None, x, FAST).model
    if kind == "object":
        assert model == onnx.load(path)


def test_every_function_takes_models_as_objects(tmp_path: Path) -> None:
    dense, x = small_net(), inputs(64)
    result = optimize(dense, str(tmp_path / "s.onnx"), Reader(x), FAST)
    assert onnx.load(tmp_path / "s.onnx") == result.model
    assert [report.layer.name for report in analyze(dense, Reader(x), FAST).layers] == ["first", "second", "head"]
    refined = refine(dense, result.model, None, Reader(x), replace(FAST, refine=1))
    assert isinstance(refined, relrep_onnx.Refined)
    assert isinstance(compare(dense, refined.model, Reader(x), FAST), Fidelity)
    (exported,) = export_model(refined.model, str(tmp_path / "c.onnx"), Reader(x), replace(FAST, forms=("compact",)))
    assert isinstance(exported, Exported)
    assert dense == small_net()
