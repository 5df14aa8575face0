"""The wheel of a machine without a compiler, what the wheels' checks find, and what the matrix of versions asks for."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from relrep_onnx import kernels
from tools import build_wheels, compiler, matrix

PACKAGE = compiler.ROOT / "relrep_onnx"


@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="needs setuptools 77")
def test_a_machine_without_a_compiler_gets_a_wheel_for_any(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(compiler.ROOT / name, source)
    shutil.copytree(PACKAGE, source / "relrep_onnx", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("relrep_onnx/")}
    wanted = {p.relative_to(source).as_posix() for p in (source / "relrep_onnx").rglob("*") if p.is_file()}
    assert shipped == {name for name in wanted if "/kernels/src/" not in name}
    with pytest.raises(SystemExit, match="not compiled"):
        build_wheels.compiled(wheel)


@pytest.mark.skipif(not kernels.available() or sys.platform != "linux", reason="the sparse kernels were not built")
def test_what_a_library_needs_and_shows_is_found() -> None:
    pytest.importorskip("elftools", reason="the wheels extra is not installed")
    found = build_wheels.complaints(kernels.LIBRARY.read_bytes(), "aarch64")
    assert any(complaint.startswith("it is for EM_") for complaint in found) == (platform.machine() != "aarch64")
    assert not any(complaint.startswith("it lacks") for complaint in found)


def test_the_lowest_versions_are_those_promised() -> None:
    assert all("==" in need for need in matrix.requirements("lowest"))
    assert matrix.requirements("newest") == list(matrix.NEEDS)


def test_an_outcome_in_one_line() -> None:
    output = "..F.\nFAILED tests/test_a.py::test_b - assert 1 == 2\n==== 1 failed, 3 passed in 4.56s ====\n"
    assert matrix.outcome(output) == "1 failed, 3 passed; tests/test_a.py::test_b"
    assert matrix.outcome("") == "no output"


def test_pythons_that_do_not_start_are_left_out() -> None:
    assert matrix.pythons([sys.executable, shutil.which("false") or "false"]) == [sys.executable]
