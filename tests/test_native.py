"""The short form of `tools/kernels_grid.py`: the kernels without ONNX Runtime, by the system's compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from relrep_onnx import kernels
from tools import kernels_grid


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_every_answer_is_right(tmp_path: Path) -> None:
    program = tmp_path / "grid"
    kernels_grid.build("host", program, "-O0")  # unoptimized: it is to compile fast
    done = subprocess.run([str(program), "30"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    if kernels.available():
        assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(kernels.instruction_sets())


def test_this_machine_needs_no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_grid.emulator("host") == kernels_grid.emulator(platform.machine()) == []
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="qemu-user"):
        kernels_grid.emulator("another")
