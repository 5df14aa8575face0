"""The short form of `tools/sanitize.py`, with the checks of its parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relrep_onnx import kernels
from tools import sanitize

CASES = 100


@pytest.mark.skipif(
    not kernels.available() or shutil.which(os.environ.get("CXX", "c++")) is None or sys.platform != "linux",
    reason="needs the sparse kernels, a compiler and its sanitizers",
)
def test_mutated_files_under_the_sanitizers() -> None:
    if not Path(sanitize.runtime_library("libasan.so")).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    command = [sys.executable, sanitize.__file__, "--cases", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{CASES} files" in done.stdout


def test_mutations_change_something() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for kind in (np.float32, np.int8) * 25:
        parts, attributes = sanitize.parts_of(np.ones((4, 3, 2, 2), kind))
        before = repr((parts, attributes))
        sanitize.mutate(rng, parts, attributes)
        changed += repr((parts, attributes)) != before
    assert changed > 40
