"""One run, from a model and some samples to a verified sparse model: the order of steps, and nothing else.

load -> find layers -> calibrate -> score -> allocate -> [mask -> repair] per layer, in order -> write -> verify -> save
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.allocate import ALLOCATORS, Candidate, allocate
from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import WalkSettings, default_memory, dense_pass, sequential_pass
from relrep_onnx.config import Config
from relrep_onnx.data import Samples, load_samples, split_holdout
from relrep_onnx.masks import PATTERNS, Saliency, saliency_for
from relrep_onnx.moments import Covariance, Moments
from relrep_onnx.repair import REPAIRS
from relrep_onnx.results import Analysis, LayerReport, ModelSize, Provenance, Result
from relrep_onnx.runtime import VERSION as ORT_VERSION
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.score import score_layer
from relrep_onnx.types import Array, ConfigError, Layer, ModelError, Progress, RepairedLayer, ScoreCurve, Skipped
from relrep_onnx.verify import (
    Fidelity,
    check_gates,
    compare_outputs,
    compare_sessions,
    float_outputs,
    gzip_size,
    load_metric,
    run_metric,
)

PROBE_RANGE = (0.5, 0.9)
"""Each layer's share of the output error is measured at the asked sparsity, inside this range."""

ModelSource = str | os.PathLike[str] | ModelProto


def quiet(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, eq=False)
class _Scored:
    """One layer with its curve and its MACs per sample."""

    layer: Layer
    curve: ScoreCurve
    macs: int


@dataclass(frozen=True, eq=False)
class Job:
    """Everything both commands need, loaded and checked."""

    config: Config
    loaded: graphs.LoadedModel
    graph: graphs.Graph
    session: Session
    layers: list[Layer]
    skipped: list[Skipped]
    saliency: Saliency
    calibration: Samples
    decision: Samples
    verification: Samples
    settings: WalkSettings
    provenance: Provenance


def analyze(
    model: ModelSource,
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
    scored = _score(job, cache_dir)
    reports = tuple(LayerReport(s.layer, s.macs, s.curve, config.sparsity, round(config.sparsity * s.layer.size)) for s in scored)
    return Analysis(config, job.provenance, reports, tuple(job.skipped), job.loaded.notes)


def optimize(
    model: ModelSource,
    output: str | os.PathLike[str] | None,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Prunes, repairs, verifies and saves a model; arguments as for `analyze`.

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
    _check_target(target, model, in_place)
    metric = load_metric(config.eval) if config.eval else None
    job = prepare(model, calib, config, holdout, progress)
    config.as_gates().check_resolution(len(job.verification))

    scored = _score(job, cache_dir)
    zeros = _allocate(job, scored)
    repaired = _repair(job, zeros)
    sparse = ModelProto()
    sparse.CopyFrom(job.loaded.model)
    for layer in job.layers:
        if layer.name in repaired:
            graphs.write_layer(sparse, layer, repaired[layer.name])
    graphs.set_metadata(sparse, _metadata(job))

    with _place_for(target) as stage, _input_files(job.loaded) as dense_files:
        stage.write(sparse, job.loaded.external)
        progress("verify", 0, 1)
        session = Session(stage.path, config.as_runtime(), what="the sparse model")
        fidelity = compare_sessions(job.session, session, job.verification.batches(config.batch_size))
        before = run_metric(metric, job.session) if metric else None
        after = run_metric(metric, session) if metric else None
        check_gates(fidelity, after, config.as_gates())
        progress("verify", 1, 1)
        kept = _kept(graphs.Graph(sparse), job.layers)
        reports = tuple(
            LayerReport(s.layer, s.macs, s.curve, 1 - kept[s.layer.name] / s.layer.size, s.layer.size - kept[s.layer.name])
            for s in scored
        )
        result = Result(
            config=config,
            provenance=job.provenance,
            layers=reports,
            skipped=tuple(job.skipped),
            notes=job.loaded.notes,
            model=sparse,
            output=None if target is None else str(target),
            before=_size(dense_files, _kept(job.graph, job.layers), reports),
            after=_size([stage.path, *sorted(stage.external_files())], kept, reports),
            fidelity=fidelity,
            metric_before=before,
            metric_after=after,
            seconds=time.perf_counter() - started,
        )
        if target is not None:
            stage.commit()
    return result


def compare(dense: ModelSource, sparse: ModelSource, data: Any, config: Config | None = None) -> Fidelity:
    """How far a sparse model's outputs are from a dense one's on all samples of `data`."""
    config = config or Config()
    left, right = (_open(graphs.load(source), config.as_runtime()) for source in (dense, sparse))
    wanted, given = ({i.name for i in s.inputs} for s in (left, right))
    if wanted != given or {o.name for o in left.outputs} != {o.name for o in right.outputs}:
        raise ModelError("the two models have different inputs or outputs; compare a model with its own sparse version")
    samples = load_samples(data, left.inputs, config.as_data())
    return compare_sessions(left, right, samples.batches(config.batch_size))


def prepare(model: ModelSource, calib: Any, config: Config, holdout: Any, progress: Progress) -> Job:
    """Loads and checks everything a run needs; raises as `optimize` does."""
    for name, table in (("allocate", ALLOCATORS), ("repair", REPAIRS)):
        if getattr(config, name) not in table:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; choose from {', '.join(table)}")
    loaded = graphs.load(model)
    session = _open(loaded, config.as_runtime())
    graph = graphs.Graph(loaded.model)
    layers, skipped = graphs.find_layers(graph, config.as_selection())
    if not layers:
        reasons = "; ".join(f"{s.node}: {s.reason}" for s in skipped[:3]) or "it has no Conv, ConvTranspose, Gemm or MatMul"
        raise ModelError(f"{loaded.name} has nothing to prune ({reasons})")
    samples = load_samples(calib, session.inputs, config.as_data())
    if holdout is None:
        calibration, decision, verification = split_holdout(samples)
    else:
        kept_out = load_samples(holdout, session.inputs, config.as_data())
        calibration = samples
        decision, verification = kept_out.split(len(kept_out) // 2)
    settings = WalkSettings(
        runtime=config.as_runtime(),
        input_types={i.name: i.type for i in session.inputs},
        positions=config.positions,
        seed=config.seed,
        memory=config.max_memory or default_memory(),
        progress=progress,
    )
    provenance = Provenance(
        model=loaded.name,
        model_sha256=graphs.model_hash(loaded.model),
        data=samples.source,
        data_sha256=calibration.fingerprint(),
        random_data=samples.random,
        calibration_samples=len(calibration),
        versions={
            "relrep-onnx": version("relrep-onnx"),
            "onnx": onnx.__version__,
            "onnxruntime": ORT_VERSION,
            "numpy": np.__version__,
        },
    )
    return Job(
        config,
        loaded,
        graph,
        session,
        layers,
        skipped,
        saliency_for(layers),
        calibration,
        decision,
        verification,
        settings,
        provenance,
    )


def _open(loaded: graphs.LoadedModel, runtime: RuntimeOptions) -> Session:
    return Session(loaded.path or loaded.model.SerializeToString(), runtime, what=loaded.name)


def _score(job: Job, cache_dir: str | os.PathLike[str] | None) -> list[_Scored]:
    """RR curve of every layer, and what pruning it alone to the asked sparsity does to the outputs."""
    repair, pattern = REPAIRS[job.config.repair], PATTERNS["unstructured"]
    names = float_outputs(job.session)
    probe = min(max(job.config.sparsity, PROBE_RANGE[0]), PROBE_RANGE[1])
    few, _ = job.decision.split(max(4, 2 * len(job.calibration) // len(job.layers)))
    dense = [(feeds, job.session.run(feeds, names)) for feeds in few.batches(job.config.batch_size)]
    scored = {}
    for layer, inputs, macs in _dense_statistics(job, Cache(Path(cache_dir)) if cache_dir is not None else None):
        weight = graphs.read_weight(job.graph, layer)
        curve = score_layer(layer, weight, inputs, repair, pattern, job.saliency)
        mask = pattern(job.saliency(weight), round(probe * layer.size))
        trial = graphs.with_layer(job.loaded.model, layer, repair(weight, mask, Moments.dense(inputs, weight)))
        session = Session(trial.SerializeToString(), job.config.as_runtime(), what=f"the model with {layer.name!r} pruned")
        errors = [output.relative_l2 for output in compare_outputs(names, dense, session).outputs]
        damage = sum(error**2 for error in errors) if errors else math.nan
        scored[layer.name] = _Scored(layer, dataclasses.replace(curve, probe=probe, damage=damage), macs)
    return [scored[layer.name] for layer in job.layers]


def _dense_statistics(job: Job, cache: Cache | None) -> Iterator[tuple[Layer, Covariance, int]]:
    """Moments of every layer's inputs, from the cache where it has all of them."""
    keys = {layer.name: _cache_key(job, layer) for layer in job.layers}
    if cache is not None:
        entries = {name: cache.get(key) for name, key in keys.items()}
        if all(entries.values()):
            for layer in job.layers:
                yield layer, *_unpack(entries[layer.name] or {})
            return
    batches = job.calibration.batches(job.config.batch_size)
    for layer, inputs, macs in dense_pass(job.graph, job.layers, batches, len(job.calibration), job.settings):
        if cache is not None:
            cache.put(keys[layer.name], _pack(inputs, macs))
        yield layer, inputs, macs


def _cache_key(job: Job, layer: Layer) -> str:
    p, c = job.provenance, job.config
    runtime = (c.positions, c.seed, c.batch_size, c.threads, c.providers, sorted(p.versions.items()))
    return repr((p.model_sha256, p.data_sha256, runtime, layer))


def _pack(inputs: Covariance, macs: int) -> dict[str, Array]:
    spread = {"matrix": inputs.matrix, "factor": inputs.factor}
    known = {name: value for name, value in spread.items() if value is not None}
    return {"numbers": np.array([inputs.count, macs]), "mean": inputs.mean, **known}


def _unpack(entry: dict[str, Array]) -> tuple[Covariance, int]:
    count, macs = entry["numbers"].tolist()
    return Covariance(count, entry["mean"], entry.get("matrix"), entry.get("factor")), macs


def _allocate(job: Job, scored: list[_Scored]) -> dict[str, int]:
    candidates = []
    for s in scored:
        weight = graphs.read_weight(job.graph, s.layer)
        cost = s.macs / s.layer.size if job.config.budget == "macs" else 1.0
        candidates.append(Candidate(s.layer, weight, job.saliency(weight), s.curve, cost))
    return allocate(ALLOCATORS[job.config.allocate], candidates, job.config.as_budget())


def _repair(job: Job, zeros: dict[str, int]) -> dict[str, RepairedLayer]:
    """Masks and repairs, in graph order, every layer that gets new zeros; the others stay untouched."""
    repair, pattern = REPAIRS[job.config.repair], PATTERNS["unstructured"]

    def one(layer: Layer, moments: Moments) -> RepairedLayer:
        weight = graphs.read_weight(job.graph, layer)
        return repair(weight, pattern(job.saliency(weight), zeros[layer.name]), moments)

    def gains_zeros(layer: Layer) -> bool:
        return zeros[layer.name] > layer.size - kept[layer.name]

    kept = _kept(job.graph, job.layers)
    pruned = [layer for layer in job.layers if gains_zeros(layer)]
    batches = list(job.calibration.batches(job.config.batch_size))
    return sequential_pass(
        job.graph, pruned, batches, len(job.calibration), job.settings, lambda y: graphs.read_weight(job.graph, y), one
    )


def _kept(graph: graphs.Graph, layers: Iterable[Layer]) -> dict[str, int]:
    """Nonzero weights of each layer."""
    return {layer.name: int(np.count_nonzero(graphs.read_weight(graph, layer))) for layer in layers}


def _size(files: Iterable[Path], kept: dict[str, int], reports: Iterable[LayerReport]) -> ModelSize:
    files = list(files)
    return ModelSize(
        file_bytes=sum(f.stat().st_size for f in files),
        gzip_bytes=sum(gzip_size(f) for f in files),
        nonzeros=sum(kept.values()),
        macs=sum(round(r.macs * kept[r.layer.name] / r.layer.size) for r in reports),
    )


@contextlib.contextmanager
def _input_files(loaded: graphs.LoadedModel) -> Iterator[list[Path]]:
    """The files of the dense model; a model given as an object is written to a folder that goes away."""
    if loaded.path is not None:
        yield [loaded.path, *(loaded.path.parent / name for name in sorted(set(loaded.external.values())))]
        return
    with _place_for(None) as stage:
        stage.write(loaded.model, {})
        yield [stage.path]


def _metadata(job: Job) -> dict[str, str]:
    settings = {k: v for k, v in vars(job.config).items() if k in ("allocate", "repair", "budget", "sparsity", "seed")}
    return {
        **{f"relrep.{key}": str(value) for key, value in settings.items()},
        "relrep.version": version("relrep-onnx"),
        "relrep.model_sha256": job.provenance.model_sha256,
        "relrep.data_sha256": job.provenance.data_sha256,
    }


def _check_target(target: Path | None, model: ModelSource, in_place: bool) -> None:
    if target is None:
        return
    if target.is_dir():
        raise ConfigError(f"the output {str(target)!r} is a folder; give a file name")
    if not target.parent.is_dir():
        raise ConfigError(f"the output folder {str(target.parent)!r} does not exist")
    if not isinstance(model, ModelProto) and target.exists() and Path(model).exists() and target.samefile(model) and not in_place:
        raise ConfigError(f"the output {str(target)!r} is the input; give another name, or --in-place to replace it")


@contextlib.contextmanager
def _place_for(target: Path | None) -> Iterator[graphs.Staged]:
    """A staged output: beside the target, or in a folder that goes away where the model stays in memory."""
    if target is not None:
        with graphs.staged(target) as stage:
            yield stage
        return
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder, graphs.staged(Path(folder) / "model.onnx") as stage:
        yield stage
