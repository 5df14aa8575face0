"""The tests with the lowest and the newest promised versions of what the package needs, on every Python that is found.

    python tools/matrix.py [--python /path/to/python3.12 ...] [--tests tests/test_graph.py ...]

"Lowest" is what pyproject.toml says (`onnx>=1.17` becomes `onnx==1.17`), "newest" what pip finds; only wheels count.  Each pair
gets a virtual environment in a folder that goes away.  Pythons are those named, else `python3.N` on the path.  Prints a table;
the exit code is 0 when every pair that could be installed passed.  Classifiers and bounds in pyproject.toml promise no more.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).resolve().parents[1]
NEEDS: Final[tuple[str, ...]] = tuple(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
)
MINORS: Final = range(11, 20)
TESTS: Final = (
    "graph", "operators", "pipeline", "distill", "refinement", "export", "export_int8", "int8_nodes", "export_compact", "kernels",
    "sparse_ort", "cli",
)  # fmt: skip
Versions = Literal["lowest", "newest"]


@dataclass(frozen=True)
class Row:
    """One pair of a Python and versions: what was installed, and how the tests ended."""

    python: str
    versions: Versions
    installed: str
    outcome: str
    passed: bool


def requirements(versions: Versions) -> list[str]:
    """What pip is asked for."""
    return [need.replace(">=", "==") if versions == "lowest" else need for need in NEEDS]


def pythons(named: list[str]) -> list[str]:
    """Those named, or every `python3.N` of a promised N on the path that starts."""
    found = named or [p for minor in MINORS if (p := shutil.which(f"python3.{minor}"))]
    return [p for p in found if subprocess.run([p, "-c", ""], check=False, capture_output=True).returncode == 0]


def outcome(output: str) -> str:
    """The last line of pytest without its decoration and its time, and the first failures."""
    lines = output.strip().splitlines() or ["no output"]
    failures = [line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED ")]
    return "; ".join([re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")), *failures[:5]])


def measure(python: str, versions: Versions, tests: list[str]) -> Row:
    """Installs and runs one pair."""
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
        own = str(Path(folder) / "bin" / "python")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": "false", "CC": "false"}  # the kernels built here serve all

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)

        name = run(python, "-c", "import platform; print(platform.python_version())").stdout.strip()
        run(python, "-m", "venv", folder)
        install = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        packages = [*requirements(versions), "pytest", "hypothesis", "Pillow", "matplotlib"]
        done = run(*install, "--only-binary", ":all:", *packages)
        if done.returncode == 0:
            done = run(*install, "--no-deps", str(ROOT))
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
            return Row(name, versions, "-", f"not installable: {reasons[-1]}", passed=True)
        listed = {line.split("==")[0].lower(): line for line in run(own, "-m", "pip", "freeze").stdout.splitlines()}
        installed = ", ".join(listed[re.split("[>=<]", need)[0].lower()].replace("==", " ") for need in NEEDS)
        # Older releases warn of what newer ones changed: here only results count.
        tested = run(
            own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-rf", "--tb=no", *tests
        )
        return Row(name, versions, installed, outcome(tested.stdout), passed=tested.returncode == 0)


def main() -> None:
    """Prints a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter; may be repeated")
    parser.add_argument("--versions", choices=("lowest", "newest"), help="one of the two only")
    parser.add_argument("--tests", nargs="+", default=[f"tests/test_{name}.py" for name in TESTS], help="what pytest gets")
    arguments = parser.parse_args()
    print("| Python | versions | installed | outcome |\n| --- | --- | --- | --- |", flush=True)
    passed = True
    for python in pythons(arguments.python):
        for versions in [arguments.versions] if arguments.versions else ("lowest", "newest"):
            row = measure(python, versions, arguments.tests)
            print(f"| {row.python} | {row.versions} | {row.installed} | {row.outcome} |", flush=True)
            passed &= row.passed
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
