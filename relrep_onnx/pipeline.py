"""One run, from a model and some samples to a verified sparse model: the order of steps, and nothing else.

load -> find layers -> calibrate -> score -> plan (allocate) -> [mask -> repair] per layer, in order -> write -> (refine)
-> verify -> save
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from relrep_onnx import graph as graphs
from relrep_onnx.config import DEFAULT_EPOCHS, Config
from relrep_onnx.data import split_holdout
from relrep_onnx.deployment import runtime_named
from relrep_onnx.export import Exported, deliver
from relrep_onnx.exporting import check_places, meet_gates, order_of, places_of
from relrep_onnx.job import check_asked, open_session, prepare, quiet, refuse_kernels, swapped
from relrep_onnx.results import RANDOM, Analysis, LayerReport, Refined, Result, measure
from relrep_onnx.runtime import Session
from relrep_onnx.screen import samples_for
from relrep_onnx.search import plan, shortfalls
from relrep_onnx.steps import TargetStore, candidates, refined, repair_all, score, write
from relrep_onnx.types import ConfigError, Progress
from relrep_onnx.verify import Fidelity, check_gates, check_same_signature, compare_sessions, load_metric, run_metric


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
    zeros = {layer.name: min(round(config.goal * layer.size), job.pattern.limit(layer)) for layer in job.layers}
    with job.naming_samples():
        scored = score(job, cache_dir)
    reports = tuple(LayerReport(s.layer, s.macs, s.curve, zeros[s.layer.name]) for s in scored)
    return Analysis(config, job.provenance, reports, tuple(job.skipped), job.notes)


def optimize(
    model: graphs.ModelSource,
    output: str | os.PathLike[str] | None,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = quiet,
) -> Result:
    """Prunes, repairs, verifies and saves a model; the other arguments are those of `analyze`.

    Args:
        output: where the sparse model goes, in the form of `config.forms`; a folder for several; None keeps it in memory only
            (`Result.model`, which otherwise leaves weights over 2 GB in their files).
        in_place: allows `output` to be the input file.
        resume: a folder that keeps each repaired layer and, after each epoch, refinement's state; the same call goes on from it.

    Raises:
        VerificationError: a gate of the configuration is not met; nothing is written then.
        RelRepError: one of its other kinds, with a message for the user.
    """
    started = time.perf_counter()
    config = config or Config()
    places = places_of(model, output, config, {"--calib": calib, "--holdout": holdout}, in_place=in_place)
    exporting = tuple(config.forms) != ("onnx",)
    target = None if output is None or exporting else Path(output)
    gates = config.as_gates()
    metric = load_metric(config.eval) if config.eval else None
    job = prepare(model, calib, config, holdout, progress, resume)
    check_asked(job)

    with TargetStore(job.settings.memory) as targets:
        with job.naming_samples():
            scored = score(job, cache_dir, targets.keep)
        layers = candidates(job, scored)
        chosen = plan(job, layers, targets, metric)
        repaired = repair_all(job, chosen.zeros, targets, progress=progress)
    unusual = [f"{name}: {note}" for name, layer in repaired.items() for note in layer.notes]
    if all(chosen.zeros[name] <= there for name, there in job.zeros.items()):
        share = sum(job.zeros.values()) / sum(layer.size for layer in job.layers)
        unusual.append(
            f"{share:.1%} of the prunable weights were zero already, and a sparsity of {chosen.sparsity:.1%} takes no more: "
            "nothing was pruned"
        )
    sparse, refinement = write(job, repaired, chosen.allocator, chosen.sparsity), None
    zeros = graphs.count_zeros(graphs.Graph(sparse), job.layers)
    sparse = graphs.unflatten(job.flat, sparse)
    if config.refine:
        sparse, refinement = refined(job, sparse, progress)
    with graphs.staged(target) as stage, graphs.input_files(job.loaded) as dense_files:
        stage.write(sparse, job.loaded.external)
        if job.loaded.large and target is not None:  # it lies in its files now; the memory is for the sessions
            del sparse
            sparse = graphs.load(stage.path, lazily=True).model
        progress("verify", 0, 1)
        session = Session(stage.path, job.runtime, what="the sparse model")
        with job.naming_samples():
            fidelity = compare_sessions(job.session, session, job.batches(job.verification))
        before, after = (run_metric(metric, s) if metric else None for s in (job.session, session))
        check_gates(fidelity, after, gates, None if exporting else stage.size())
        progress("verify", 1, 1)
        exports: tuple[Exported, ...] = ()
        if exporting:
            exports = deliver(
                graphs.LoadedModel(sparse, None, job.loaded.external),
                places,
                order_of(config, lambda: job.batches(job.calibration)),
                session,
                lambda: job.batches(job.verification),
                judge=lambda exported, _, file_bytes: meet_gates(job, exported, file_bytes, gates, metric),
                progress=progress,
            )
        reports = tuple(LayerReport(s.layer, s.macs, s.curve, zeros[s.layer.name]) for s in scored)
        result = Result(
            config=config,
            provenance=job.provenance,
            layers=reports,
            skipped=tuple(job.skipped),
            notes=(
                *job.notes,
                *unusual,
                *shortfalls(job, layers, chosen, fidelity, before, after),
                *([f"for {config.runtime}: {runtime_named(config.runtime).pays}"] if config.runtime else []),
            ),
            allocator=chosen.allocator,
            choice=chosen.choice,
            finding=chosen.finding,
            refinement=refinement,
            model=sparse,
            output=None if target is None else str(target),
            before=measure(dense_files, reports, job.zeros),
            after=measure(stage.files(), reports, zeros),
            fidelity=fidelity,
            metric_before=before,
            metric_after=after,
            seconds=time.perf_counter() - started,
            exports=exports,
        )
        if target is not None:
            stage.commit()
    return result


def refine(
    dense: graphs.ModelSource,
    sparse: graphs.ModelSource,
    output: str | os.PathLike[str] | None,
    calib: Any,
    config: Config | None = None,
    *,
    holdout: Any = None,
    in_place: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = quiet,
) -> Refined:
    """Refines a sparse model of any origin against its dense one; the other arguments are those of `optimize`.

    Args:
        dense: the model to behave like.
        sparse: a model with the same inputs, outputs and tensor names; its zeros stay zeros.

    Raises:
        VerificationError: a gate of the configuration is not met; nothing is written then.
        RelRepError: one of its other kinds, with a message for the user.
    """
    started = time.perf_counter()
    config = config or Config()
    config = replace(config, refine=config.refine or DEFAULT_EPOCHS, min_size=1)  # small layers move too
    target = None if output is None else Path(output)
    if target is not None:
        data = {"--calib": calib, "--holdout": holdout}
        check_places([target], {"DENSE": dense, "SPARSE": sparse}, data, in_place=in_place)
    gates = config.as_gates()
    metric = load_metric(config.eval) if config.eval else None
    job = prepare(dense, calib, config, holdout, progress, resume)
    gates.check_resolution(len(job.verification))
    student = graphs.load(sparse)
    refuse_kernels(student)
    before = open_session(student, config.as_runtime())
    check_same_signature(job.session, before)
    notes = (*job.notes, *swapped(job, student))
    model, refinement = refined(job, student.model, progress)
    with graphs.staged(target) as stage:
        stage.write(model, student.external)
        after = Session(stage.path, config.as_runtime(), what="the refined model")
        moved = [compare_sessions(job.session, session, job.batches(job.verification)) for session in (before, after)]
        metrics = [run_metric(metric, session) if metric else None for session in (before, after)]
        check_gates(moved[1], metrics[1], gates, stage.size())
        result = Refined(
            config=config,
            provenance=job.provenance,
            notes=notes,
            refinement=refinement,
            before=moved[0],
            after=moved[1],
            metric_before=metrics[0],
            metric_after=metrics[1],
            model=model,
            output=None if target is None else str(target),
            seconds=time.perf_counter() - started,
        )
        if target is not None:
            stage.commit()
    return result


def export_model(
    model: graphs.ModelSource,
    output: str | os.PathLike[str],
    calib: Any = None,
    config: Config | None = None,
    *,
    holdout: Any = None,
    progress: Progress = quiet,
) -> tuple[Exported, ...]:
    """Writes a model in the forms of `config.forms`, each loaded again and compared with the model before it is moved into place.

    Args:
        model: a path or a ModelProto, usually sparse; it is not pruned here.
        output: a file, or a folder for several forms.
        calib: samples as in `analyze`, those of `optimize` for the same int8 ranges; None compares on random inputs.
        config: the settings; `max_error` replaces the tolerance of a form.
        holdout: samples to compare on; by default half of the last eighth of `calib`, as in `optimize`.
        progress: called with (phase, steps done, steps in all).

    Raises:
        VerificationError: an export does not do what the model does, or misses a gate; nothing is written then.
        RelRepError: one of its other kinds, with a message for the user.
    """
    if output is None:
        raise ConfigError("an export needs an output to write to; give a file, or a folder for several forms")
    config = config or Config()
    places = places_of(model, output, config, {"--calib": calib, "--holdout": holdout})
    loaded = graphs.load(model)
    session = open_session(loaded, config.as_runtime())
    samples = samples_for(session, "random" if calib is None else calib, config)
    calibration, _, verification = split_holdout(samples)
    if holdout is not None:
        verification = samples_for(session, holdout, config)
    gates = config.as_gates()
    gates.check_resolution(len(verification))
    metric = load_metric(config.eval) if config.eval else None

    def judge(exported: Session, fidelity: Fidelity, file_bytes: int) -> None:
        check_gates(fidelity, run_metric(metric, exported) if metric else None, gates, file_bytes)

    exports = deliver(
        loaded,
        places,
        order_of(config, None if calib is None else lambda: calibration.batches(config.batch_size)),
        session,
        lambda: verification.batches(config.batch_size),
        limit=config.max_error,
        judge=judge,
        progress=progress,
    )
    made_up = (RANDOM,) * (calib is not None and samples.random)
    return tuple(replace(exported, notes=(*exported.notes, *made_up)) for exported in exports)


def compare(dense: graphs.ModelSource, sparse: graphs.ModelSource, data: Any, config: Config | None = None) -> Fidelity:
    """How far a sparse model's outputs are from a dense one's on all samples of `data`."""
    config = config or Config()
    left, right = (open_session(graphs.load(source, lazily=True), config.as_runtime()) for source in (dense, sparse))
    check_same_signature(left, right)
    samples = samples_for(left, data, config)
    return compare_sessions(left, right, samples.batches(config.batch_size))
