"""The peer that the benchmarks compare with: SparseGPT (Frantar and Alistarh 2023) as onnxsim has it, a package of its own.

It takes the same model and the same samples and gives every layer the same sparsity, also those that are too small for this
package to prune.  It runs the model on one thread and has no option to change that.  Nothing here needs it installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import ModelProto

PEER: Final = "onnxsim SparseGPT"
PACKAGE: Final = "onnxsim"


def available() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def describe() -> str:
    """What stands in the line above a table."""
    if not available():
        return f"{PACKAGE} is not installed, its rows are left out"
    return f"{PACKAGE} {version(PACKAGE)}, which runs the model on one thread, without an option, and prunes every layer"


def prune(
    path: Path | str, samples: Any, sparsity: float, batch: int, pattern: tuple[int, int] | None = None
) -> tuple[ModelProto, float]:
    """Its sparse model, and the seconds it took from the file on; importing it is not counted.

    Args:
        path: the dense model.
        samples: ready-made inputs, of the first input or by name.
        sparsity: of every layer.
        batch: how many samples it sees at a time.
        pattern: (N, M) to keep N of M instead.
    """
    from onnxsim.pruning import apply_sparsegpt_pruning  # not on top: it is optional

    started = time.perf_counter()
    model = onnx.load(path)
    feeds = samples if isinstance(samples, Mapping) else {model.graph.input[0].name: samples}
    count = min(map(len, feeds.values()))
    batches = [{name: value[start : start + batch] for name, value in feeds.items()} for start in range(0, count, batch)]
    n, m = pattern or (None, None)
    pruned: ModelProto = apply_sparsegpt_pruning(model, calibration_data=batches, sparsity=sparsity, n=n, m=m)
    return pruned, time.perf_counter() - started
