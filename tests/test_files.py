"""Files on disk: whole or not at all, and never over what is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from relrep_onnx import ConfigError, export_model, optimize, refine, sweep
from relrep_onnx.files import check_separate, same_file, write_bytes, write_text
from tests.test_pipeline import SMALL, inputs, small_net


def test_a_file_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        write_bytes(tmp_path / "folder", b"")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "folder"}


def test_one_file_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "soft").symlink_to("a")
    os.link("a", "hard")
    for name in ("a", "sub/../a", "soft", "hard", str(tmp_path / "a")):
        assert same_file(Path(name), Path("a"))
    assert same_file(Path("sub/../new"), Path("new"))
    assert not same_file(Path("a"), Path("b"))
    assert not same_file(Path("a"), Path("new"))


def test_outputs_stay_apart_from_inputs_and_each_other(tmp_path: Path) -> None:
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "folder"
    old.touch()
    folder.mkdir()
    (folder / "inside").touch()
    check_separate([("--json", new), ("OUTPUT", old)], [("MODEL", folder / "inside"), ("--calib", tmp_path / "missing")])
    with pytest.raises(ConfigError, match=rf"^OUTPUT '{old}' would replace --calib, '{old}'; give another name$"):
        check_separate([("--json", new), ("OUTPUT", old)], [("MODEL", tmp_path / "a\0b"), ("--calib", old)])
    with pytest.raises(ConfigError, match=r"OUT_FOLDER .* would replace MODEL"):
        check_separate([("OUT_FOLDER", folder)], [("MODEL", folder / "inside")])
    for other in (new, folder / ".." / "new"):
        with pytest.raises(ConfigError, match="--json and --report would both write"):
            check_separate([("--json", new), ("--report", other)], [])
    with pytest.raises(ConfigError, match="OUT_FOLDER and --json would both write"):
        check_separate([("OUT_FOLDER", folder), ("--json", folder / "new")], [])


def test_the_python_functions_spare_what_they_read(tmp_path: Path) -> None:
    net, data, calib, holdout = (tmp_path / name for name in ("net.onnx", "net.data", "x.npy", "held.npy"))
    onnx.save(small_net(), net, save_as_external_data=True, location=data.name, size_threshold=16)
    onnx.save(small_net(), tmp_path / "sparse.onnx")
    for path in (calib, holdout):
        np.save(path, inputs())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for target in (net, data, calib, holdout):
        with pytest.raises(ConfigError, match="is the input MODEL" if target == net else "would replace"):
            optimize(net, target, calib, SMALL, holdout=holdout)
        with pytest.raises(ConfigError, match="would replace"):
            export_model(net, target, str(calib), holdout=holdout)
        with pytest.raises(ConfigError, match="would replace"):
            refine(net, tmp_path / "sparse.onnx", target, calib, SMALL, holdout=holdout)
    for target in (data, calib):  # only the model itself is given up
        with pytest.raises(ConfigError, match="would replace"):
            optimize(net, target, calib, SMALL, in_place=True)
    (tmp_path / "points").mkdir()
    with pytest.raises(ConfigError, match=r"OUT_FOLDER .* would replace MODEL"):
        sweep(tmp_path / "points" / "a.onnx", tmp_path, calib)
    (tmp_path / "points").rmdir()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_with_data_of_its_own_name_is_replaced_in_place(tmp_path: Path) -> None:
    net = tmp_path / "net.onnx"
    onnx.save(small_net(), net, save_as_external_data=True, location="net.onnx.0123456789ab.data", size_threshold=16)
    optimize(net, net, inputs(), SMALL, in_place=True)
    onnx.checker.check_model(net)
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / "net.onnx.0123456789ab.data").exists()
