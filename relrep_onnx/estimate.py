"""What a run would take, measured on a few batches: the `--dry-run` of `optimize`.

Time is linear in the number of batches: a constant (sessions, scoring) and a slope, fitted to walks over one batch and over two.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from relrep_onnx import graph as graphs
from relrep_onnx.augment import AUTO
from relrep_onnx.calibrate import Feeding, dense_pass
from relrep_onnx.config import Config
from relrep_onnx.export import check_forms
from relrep_onnx.exporting import order_of, places_of
from relrep_onnx.job import Job, check_asked, prepare, quiet
from relrep_onnx.verify import load_metric

# Dense and sequential pass, each about one walk with its moments; the trials of single layers and of allocators, curves and mask
# searches take about three more.
PASSES = 5.0
# The search for a sparsity: so many sequential passes.
SEARCH_PASSES = 8.0
# An epoch of refinement, and the trials of augmentation as a share of all epochs.
EPOCH_PASSES = 10.0
TRIALS = 0.2
# Bytes of a process with its libraries, before it has read anything.
PROCESS = 200 << 20


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes a run of `optimize` would take, about."""

    layers: int
    samples: int
    seconds: float
    memory_bytes: int
    spilled: bool


def estimate(
    model: graphs.ModelSource,
    output: str | os.PathLike[str] | None,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    in_place: bool = False,
) -> Estimate:
    """Estimates time and peak memory without pruning anything; arguments and errors as of `optimize`."""
    config = config or Config()
    check_forms(config.forms, order_of(config, None))
    if output is not None:
        places_of(model, output, config, {"--calib": calib, "--holdout": holdout}, in_place=in_place)
    if config.eval:
        load_metric(config.eval)
    job = prepare(model, calib, config, holdout, quiet)
    check_asked(job)
    batches = job.calibration.batch_count(config.batch_size)
    few = list(islice(job.calibration.batches(config.batch_size), 2))
    one, peak, rows = _walk(job, few[:1])
    slope = max(_walk(job, few)[0] - one, 0.0) if len(few) > 1 else one
    constant = max(one - slope, 0.0)
    passes = PASSES + (SEARCH_PASSES if config.max_drop is not None else 0.0)
    passes += config.refine * EPOCH_PASSES * (1 + TRIALS * (config.augment == AUTO))
    seconds = passes * (constant + slope * batches) + len(job.layers) * constant / 4
    live = peak * batches
    memory = min(live, job.settings.memory) + fixed_memory(job, {name: count * batches for name, count in rows.items()})
    return Estimate(len(job.layers), len(job.calibration), seconds, memory, live > job.settings.memory)


def fixed_memory(job: Job, rows: Mapping[str, int] | None = None) -> int:
    """Bytes a run holds beside waiting activations, about.

    The process itself, copies of weights, and the widest layer's moments with their factors: as many rows as inputs, or fewer
    where `rows` says how many a layer sees.
    """
    seen = rows or {}
    widest = max(layer.cols * min(layer.cols, seen.get(layer.name, layer.cols)) * layer.groups * 8 for layer in job.layers)
    return PROCESS + 5 * widest + 4 * sum(job.graph.stored(name).nbytes for name in job.graph.tensors)


def _walk(job: Job, batches: list[Any]) -> tuple[float, int, dict[str, int]]:
    """Seconds of a dense pass over some batches, the most bytes of live tensors in it, and the rows of each layer's inputs."""
    peaks: list[int] = []
    settings = dataclasses.replace(job.settings, observe=peaks.append)
    started = time.perf_counter()
    feeds = Feeding(batches, len(batches), len(batches) * job.config.batch_size, len(batches))
    rows = {dense.layer.name: dense.inputs.count for dense in dense_pass(job.graph, job.layers, feeds, settings)}
    return time.perf_counter() - started, max(peaks, default=0), rows
