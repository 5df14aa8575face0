"""Install the test extra and run every check: `python tools/test.py [pytest arguments]`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.environment import python_with, run

CHECKS = ("ruff check .", "ruff format --check .", "mypy", "pytest -q -n 2")


def main() -> None:
    python = python_with("[test]")
    for check in CHECKS:
        extra = sys.argv[1:] if check.startswith("pytest") else []
        print(f"\n$ {' '.join([check, *extra])}", flush=True)
        # Two test processes with threaded matrix products each would fight for the cores.
        run(python, "-m", *check.split(), *extra, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    main()
