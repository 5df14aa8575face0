"""Prune the shipped sample at 80 % and show what came of it: `python tools/demo.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.environment import python_with, run

OPTIMIZE = """
optimize samples/fashion.onnx fashion_sparse.onnx --calib samples/fashion_calib.npz --mean 0.286 --std 0.353
--sparsity 0.8 --eval samples.metric:top1
"""


def main() -> None:
    command = python_with("").parent / "relrep-onnx"
    print(f"relrep-onnx {' '.join(OPTIMIZE.split())}\n", flush=True)
    run(command, *OPTIMIZE.split())


if __name__ == "__main__":
    main()
