"""The virtual environment that `demo.py` and `test.py` share: `.venv` in the repository, made once."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv"
OLDEST = (3, 11)


def python_with(extras: str) -> Path:
    """The environment's interpreter, with this package installed in editable form.

    Args:
        extras: such as `[test]`; empty for none.

    Raises:
        SystemExit: this Python is too old, or the installation fails.
    """
    if sys.version_info < OLDEST:
        raise SystemExit(f"Python {'.'.join(map(str, OLDEST))} or newer is needed; this is {sys.version.split()[0]}")
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making the virtual environment {FOLDER}", flush=True)
        venv.create(FOLDER, with_pip=True)
    print(f"installing relrep-onnx{extras}", flush=True)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", f"{ROOT}{extras}")
    return python


def run(program: Path, *arguments: str, **variables: str) -> None:
    """Runs a program in the repository, with these environment variables; its failure ends this script with its exit code."""
    code = subprocess.run([program, *arguments], cwd=ROOT, check=False, env={**os.environ, **variables}).returncode
    if code:
        raise SystemExit(code)
