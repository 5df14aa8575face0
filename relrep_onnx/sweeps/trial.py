"""One point: a run of `optimize` with the point's own settings, and the figures of the file it wrote.

It is the very run that `optimize` would be alone; only the dense network's statistics come from the sweep's folder.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relrep_onnx import graph as graphs
from relrep_onnx.config import Config
from relrep_onnx.export import EXACT, suffix_of
from relrep_onnx.job import prepare, quiet
from relrep_onnx.pipeline import optimize
from relrep_onnx.results import Figures, Result
from relrep_onnx.runtime import Session
from relrep_onnx.types import ModelError, RelRepError
from relrep_onnx.verify import Fidelity, compare_sessions, load_metric, run_metric

Outcome = Figures | str
"""The figures of a point, or why there are none."""


@dataclass(frozen=True, eq=False)
class Task:
    """All that a point needs, wherever it runs; `output` is where its model stays, None if it does not."""

    name: str
    model: graphs.ModelSource
    calib: Any
    holdout: Any
    config: Config
    statistics: Path
    output: Path | None


def attempt(task: Task) -> Outcome:
    """Carries out a task; an error of the point's own is its outcome."""
    try:
        if task.output is not None:
            return _measured(task, task.output)
        with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
            return _measured(task, Path(folder) / file_name(task.config))
    except RelRepError as error:
        return str(error)
    except MemoryError:
        return "out of memory; give fewer --jobs, --num-samples or a smaller --batch-size"


def file_name(config: Config) -> str:
    """What a point's file is called."""
    return f"model{suffix_of(config.forms[0])}"


def _measured(task: Task, output: Path) -> Figures:
    if not task.statistics.is_dir():
        raise ModelError(f"this process cannot see the folder {str(task.statistics)!r}; put it where all workers can")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = optimize(
        task.model, output, task.calib, task.config, holdout=task.holdout, cache_dir=task.statistics, progress=quiet
    )
    if result.refinement is not None and result.refinement.interrupted:
        raise KeyboardInterrupt  # half a refinement is no point
    fidelity, metric = _shipped(task, result, output)
    if not math.isfinite(fidelity.relative_l2):
        raise ModelError("its outputs are not finite, or the dense ones are all zero")
    files = result.exports[0] if result.exports else result.after
    return Figures(
        sparsity=result.sparsity,
        macs_sparsity=result.macs_sparsity,
        nonzeros=result.after.nonzeros,
        macs=result.after.macs,
        error=fidelity.relative_l2,
        agreement=fidelity.top1_agreement,
        metric=metric if metric is not None and math.isfinite(metric) else None,
        size=files.file_bytes,
        gzip=files.gzip_bytes,
    )


def _shipped(task: Task, result: Result, output: Path) -> tuple[Fidelity, float | None]:
    """How far the written file is from the dense model: as far as the sparse model, unless the form rounds its numbers."""
    if all(export.fidelity.relative_l2 <= EXACT for export in result.exports):
        return result.fidelity, result.metric_after
    config = task.config
    job = prepare(task.model, task.calib, config, task.holdout, quiet)
    session = Session(output, config.as_runtime(), what=f"the export {config.forms[0]!r}")
    metric = run_metric(load_metric(config.eval), session) if config.eval else None
    return compare_sessions(job.session, session, job.batches(job.verification)), metric
