"""One run, from a model and some samples to a verified sparse model: the order of steps, and nothing else.

load -> find layers -> calibrate -> score -> allocate -> [mask -> repair] per layer, in order -> write -> verify -> save
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.allocate import ALLOCATORS, Candidate, allocate
from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import TensorStore, sequential_pass
from relrep_onnx.config import Config
from relrep_onnx.damage import OutputDamage
from relrep_onnx.data import load_samples
from relrep_onnx.job import Job, open_session, prepare
from relrep_onnx.masks import PATTERNS
from relrep_onnx.moments import Moments
from relrep_onnx.repair import REPAIRS, Pruned
from relrep_onnx.results import Analysis, LayerReport, Result, measure
from relrep_onnx.runtime import Session
from relrep_onnx.score import score_layer
from relrep_onnx.statistics import dense_statistics
from relrep_onnx.types import FloatArray, Layer, ModelError, Progress, RepairedLayer, ScoreCurve
from relrep_onnx.verify import Fidelity, check_gates, compare_sessions, load_metric, run_metric

PATTERN: Final = PATTERNS["unstructured"]
PROBE_RANGE: Final = (0.5, 0.9)
"""Each layer's damage to the outputs is measured at the asked sparsity, inside this range."""


def quiet(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One layer with its curve and its MACs per sample."""

    layer: Layer
    curve: ScoreCurve
    macs: int


def analyze(
    model: graphs.ModelSource,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress = quiet,
) -> Analysis:
    """Measures Relative Repairability of every prunable layer.

    Args:
        model: a path or a ModelProto.
        calib: unlabelled samples: a path, an array, a mapping of arrays, an iterable of feeds, a CalibrationDataReader, or
            the word "random".
        config: the settings.
        holdout: samples that stay out of calibration; by default the last eighth of `calib`.
        cache_dir: where the dense model's statistics are kept between runs.
        progress: called with (phase, steps done, steps in all).

    Raises:
        RelRepError: one of its kinds, with a message for the user.
    """
    config = config or Config()
    job = prepare(model, calib, config, holdout, progress)
    zeros = {layer.name: round(config.sparsity * layer.size) for layer in job.layers}
    scored = _score(job, cache_dir, lambda name, targets: None)
    reports = tuple(LayerReport(s.layer, s.macs, s.curve, zeros[s.layer.name]) for s in scored)
    return Analysis(config, job.provenance, reports, tuple(job.skipped), job.loaded.notes)


def optimize(
    model: graphs.ModelSource,
    output: str | os.PathLike[str] | None,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Prunes, repairs, verifies and saves a model; the other arguments are those of `analyze`.

    Args:
        output: where the sparse model goes; None keeps it in memory only (`Result.model`).
        in_place: allows `output` to be the input file.

    Raises:
        VerificationError: a gate of the configuration is not met; nothing is written then.
        RelRepError: one of its other kinds, with a message for the user.
    """
    started = time.perf_counter()
    config = config or Config()
    target = None if output is None else Path(output)
    graphs.check_target(target, model, in_place=in_place)
    gates = config.as_gates()
    metric = load_metric(config.eval) if config.eval else None
    job = prepare(model, calib, config, holdout, progress)
    gates.check_resolution(len(job.verification))

    with TensorStore(job.settings.memory) as targets:
        scored = _score(job, cache_dir, targets.put)
        repaired = _repair(job, _allocate(job, scored), targets)
    sparse = _write(job, repaired)
    with graphs.staged(target) as stage, graphs.input_files(job.loaded) as dense_files:
        stage.write(sparse, job.loaded.external)
        progress("verify", 0, 1)
        session = Session(stage.path, config.as_runtime(), what="the sparse model")
        fidelity = compare_sessions(job.session, session, job.batches(job.verification))
        before, after = (run_metric(metric, s) if metric else None for s in (job.session, session))
        check_gates(fidelity, after, gates)
        progress("verify", 1, 1)
        zeros = graphs.count_zeros(graphs.Graph(sparse), job.layers)
        reports = tuple(LayerReport(s.layer, s.macs, s.curve, zeros[s.layer.name]) for s in scored)
        result = Result(
            config=config,
            provenance=job.provenance,
            layers=reports,
            skipped=tuple(job.skipped),
            notes=job.loaded.notes,
            model=sparse,
            output=None if target is None else str(target),
            before=measure(dense_files, reports, graphs.count_zeros(job.graph, job.layers)),
            after=measure(stage.files(), reports, zeros),
            fidelity=fidelity,
            metric_before=before,
            metric_after=after,
            seconds=time.perf_counter() - started,
        )
        if target is not None:
            stage.commit()
    return result


def compare(dense: graphs.ModelSource, sparse: graphs.ModelSource, data: Any, config: Config | None = None) -> Fidelity:
    """How far a sparse model's outputs are from a dense one's on all samples of `data`."""
    config = config or Config()
    left, right = (open_session(graphs.load(source), config.as_runtime()) for source in (dense, sparse))
    wanted, given = ({i.name for i in s.inputs} for s in (left, right))
    if wanted != given or {o.name for o in left.outputs} != {o.name for o in right.outputs}:
        raise ModelError("the two models have different inputs or outputs; compare a model with its own sparse version")
    samples = load_samples(data, left.inputs, config.as_data())
    return compare_sessions(left, right, samples.batches(config.batch_size))


def _score(job: Job, cache_dir: str | os.PathLike[str] | None, keep: Callable[[str, FloatArray], None]) -> list[Scored]:
    """RR curve of every layer, and what pruning it alone to the asked sparsity does to the outputs; `keep` gets its targets."""
    repair = REPAIRS[job.config.repair]
    probe = min(max(job.config.sparsity, PROBE_RANGE[0]), PROBE_RANGE[1])
    # About one pass over as many samples as calibration has, for all trials together.
    few, _ = job.decision.split(max(4, len(job.calibration) // len(job.layers)))
    damage = OutputDamage(job.loaded.model, job.session, job.batches(few), job.config.as_runtime())
    cache = Cache(Path(cache_dir)) if cache_dir is not None else None
    batches, samples = job.batches(job.calibration), len(job.calibration)
    scored = {}
    for dense in dense_statistics(job.graph, job.layers, batches, samples, job.settings, cache, job.statistics_key):
        layer = dense.layer
        keep(layer.name, dense.targets)
        weight = graphs.read_weight(job.graph, layer)
        moments = Moments.dense(dense.inputs, weight)
        curve = score_layer(layer, weight, moments, repair, PATTERN, job.saliency)
        mask = PATTERN(job.saliency(weight), round(probe * layer.size))
        trial = repair(Pruned(weight, mask, moments))
        scored[layer.name] = Scored(layer, replace(curve, probe=probe, damage=damage.of(layer, trial)), dense.macs)
    return [scored[layer.name] for layer in job.layers]


def _allocate(job: Job, scored: list[Scored]) -> dict[str, int]:
    """Zeros of each layer."""
    candidates = []
    for s in scored:
        weight = graphs.read_weight(job.graph, s.layer)
        cost = s.macs / s.layer.size if job.config.budget == "macs" else 1.0
        candidates.append(Candidate(s.layer, weight, job.saliency(weight), s.curve, cost))
    return allocate(ALLOCATORS[job.config.allocate], candidates, job.config.as_budget())


def _repair(job: Job, zeros: dict[str, int], targets: TensorStore) -> dict[str, RepairedLayer]:
    """Masks and repairs, in graph order, every layer that gets new zeros; the others stay untouched."""
    repair = REPAIRS[job.config.repair]
    before = graphs.count_zeros(job.graph, job.layers)
    pruned = [layer for layer in job.layers if zeros[layer.name] > before[layer.name]]

    def one(layer: Layer, weight: FloatArray, moments: Moments) -> RepairedLayer:
        return repair(Pruned(weight, PATTERN(job.saliency(weight), zeros[layer.name]), moments))

    batches, samples = job.batches(job.calibration), len(job.calibration)
    return sequential_pass(job.graph, pruned, batches, samples, job.settings, lambda layer: targets.get(layer.name), one)


def _write(job: Job, repaired: dict[str, RepairedLayer]) -> ModelProto:
    """A copy of the model with the repaired layers and a record of how it came about."""
    sparse = ModelProto()
    sparse.CopyFrom(job.loaded.model)
    for layer in job.layers:
        if layer.name in repaired:
            graphs.write_layer(sparse, layer, repaired[layer.name])
    settings = {name: getattr(job.config, name) for name in ("allocate", "budget", "repair", "seed", "sparsity")}
    provenance = {name: getattr(job.provenance, name) for name in ("data_sha256", "model_sha256")}
    record = {**settings, **provenance, "version": job.provenance.versions["relrep-onnx"]}
    graphs.set_metadata(sparse, {f"relrep.{name}": str(value) for name, value in record.items()})
    return sparse
