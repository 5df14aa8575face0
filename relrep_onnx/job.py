"""Everything a run needs, loaded, checked against each other, and named for the report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from relrep_onnx import graph as graphs
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.augment import AUTO as AUTOMATIC
from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import Feeding, WalkSettings, default_memory
from relrep_onnx.config import Config
from relrep_onnx.data import Samples, halves, split_holdout
from relrep_onnx.deployment import anything, runtime_named
from relrep_onnx.distill import showing
from relrep_onnx.kernels.functions import DOMAIN
from relrep_onnx.masks import Pattern, Saliency, pattern_named, saliency_for
from relrep_onnx.repair import REPAIRS
from relrep_onnx.results import Provenance, versions
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.screen import naming_samples, samples_for
from relrep_onnx.types import Array, CalibrationError, ConfigError, Feeds, Layer, ModelError, Progress, Skipped
from relrep_onnx.verify import Limit

SHOWN: Final = 5
"""Of the bad samples; the result names all."""
FEW: Final = 32
"""Fewer held-out samples are worth a note."""


def quiet(phase: str, done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, eq=False)
class Job:
    """A model, its prunable layers, and the samples in their three roles."""

    config: Config
    loaded: graphs.LoadedModel
    flat: graphs.Flat
    graph: graphs.Graph
    """Of the flat model, which all steps work on."""
    session: Session
    layers: list[Layer]
    skipped: list[Skipped]
    saliency: Saliency
    pattern: Pattern
    calibration: Samples
    decision: Samples
    verification: Samples
    settings: WalkSettings
    provenance: Provenance
    finished: Cache | None = None
    """Where layers that are repaired, and refinement's state, are kept for a run that goes on from here."""

    def batches(self, samples: Samples) -> Iterator[dict[str, Array]]:
        """Feeds of some of the samples."""
        return samples.batches(self.config.batch_size)

    def feeds(self, first: int | None = None) -> Feeding:
        """What networks walk with: calibration batches, and those that decide held out; or only the first to calibrate with."""
        fitted, deciding = (part.batch_count(self.config.batch_size) for part in (self.calibration, self.decision))
        samples, total = len(self.calibration) + len(self.decision), fitted + deciding
        if first is not None:
            return Feeding(islice(self.batches(self.calibration), first), first, samples, total)
        return Feeding(chain(self.batches(self.calibration), self.batches(self.decision)), fitted, samples, total)

    def naming_samples(self) -> AbstractContextManager[None]:
        """Adds to an error on the way the first sample that the dense model cannot take."""
        return naming_samples(self.session, (self.calibration, self.decision, self.verification), self.config.batch_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the model and the samples."""
        left_out = self.provenance.left_out
        more = "" if len(left_out) <= SHOWN else f"; and {len(left_out) - SHOWN} more"
        bad = [f"{len(left_out)} bad samples or files were left out: {'; '.join(left_out[:SHOWN])}{more}"] if left_out else []
        held_out = len(self.decision) + len(self.verification)
        few = [f"only {held_out} samples are held out: what they measure is rough; give more, or --holdout"]
        plain = ["pixels were scaled by 1/255 only; most models want --mean and --std too"]
        return (*self.loaded.notes, *bad, *few * (held_out < FEW), *plain * self.calibration.plain_pixels)

    @property
    def runtime(self) -> RuntimeOptions:
        """How sessions of the whole model are opened."""
        return replace(self.config.as_runtime(), prepack=not self.loaded.large)

    @cached_property
    def zeros(self) -> dict[str, int]:
        """Of each layer before anything is pruned, by name."""
        return graphs.count_zeros(self.graph, self.layers)

    @cached_property
    def statistics_key(self) -> str:
        """All that the dense model's statistics depend on, besides the layer."""
        p, c = self.provenance, self.config
        return repr(
            (
                p.model_sha256,
                p.data_sha256,
                self.decision.fingerprint(),
                c.positions,
                c.seed,
                c.batch_size,
                c.as_runtime(),
                sorted(p.versions.items()),
            )
        )


def prepare(
    model: graphs.ModelSource,
    calib: Any,
    config: Config,
    holdout: Any,
    progress: Progress,
    resume: str | os.PathLike[str] | None = None,
) -> Job:
    """Loads the model and the data, finds the layers; raises as `pipeline.optimize` does."""
    finished = None if resume is None else Cache(Path(resume))
    check_methods(config)
    pattern = pattern_named(config.pattern)
    loaded = graphs.load(model, lazily=not config.refine)  # a student needs a whole teacher
    session = open_session(loaded, config.as_runtime())
    flat = graphs.flatten(loaded.model)
    graph = graphs.Graph(flat.model)
    protected = runtime_named(config.runtime).misfit if config.runtime is not None else anything

    def find(closed: Mapping[str, str]) -> tuple[list[Layer], list[Skipped]]:
        def refuse(layer: Layer) -> str | None:
            return pattern.misfit(layer) or protected(layer) or unreached(layer, closed)

        layers, skipped = graphs.find_layers(graph, config.as_selection(), refuse)
        if not layers:
            reasons = "; ".join(f"{s.node}: {s.reason}" for s in skipped[:3]) or "it has no Conv, ConvTranspose, Gemm or MatMul"
            raise ModelError(f"{loaded.name} has nothing to prune ({reasons})")
        return layers, skipped

    layers, skipped = find({})
    samples = kept_out = samples_for(session, calib, config)
    if holdout is None:
        calibration, decision, verification = split_holdout(samples)
    else:
        kept_out = samples_for(session, holdout, config)
        if kept_out.fingerprint() == samples.fingerprint():
            raise ConfigError("--holdout gives the samples of --calib again; give others, or leave it out")
        calibration, (decision, verification) = samples, halves(kept_out)
    for given in {id(given): given for given in (samples, kept_out)}.values():
        if given.constant:
            raise CalibrationError(f"{given.source}: all {len(given)} samples are the same; give different ones")
    if flat.gates:
        with naming_samples(session, (calibration,), config.batch_size):
            closed = closed_gates(flat, calibration.batches(config.batch_size), config.as_runtime())
        layers, skipped = find(closed)
    settings = WalkSettings(
        runtime=config.as_runtime(),
        input_types={i.name: i.type for i in session.inputs},
        positions=config.positions,
        seed=config.seed,
        memory=config.max_memory or default_memory(),
        progress=progress,
    )
    return Job(
        config=config,
        loaded=loaded,
        flat=flat,
        graph=graph,
        session=session,
        layers=layers,
        skipped=skipped,
        saliency=saliency_for(layers),
        pattern=pattern,
        calibration=calibration,
        decision=decision,
        verification=verification,
        settings=settings,
        provenance=_provenance(loaded, samples, calibration, tuple(dict.fromkeys((*samples.left_out, *kept_out.left_out)))),
        finished=finished,
    )


def closed_gates(flat: graphs.Flat, batches: Iterable[Feeds], runtime: RuntimeOptions) -> dict[str, str]:
    """Branches of `If` that no batch takes, by the outputs of their layers."""
    waiting = {gate.tensor for gate in flat.gates.values()}
    shown = graphs.without_data(showing(flat.model, waiting), ())
    content = graphs.serialized(shown, "what decides the model's branches", "export it without If")
    session = Session(content, runtime, what="the model's conditions")
    for feeds in batches:
        waiting -= {name for name, value in session.run(feeds, sorted(waiting)).items() if value.any()}
        if not waiting:
            break
    return {output: gate.branch for output, gate in flat.gates.items() if gate.tensor in waiting}


def unreached(layer: Layer, closed: Mapping[str, str]) -> str | None:
    """The reason why a layer stays that no sample reaches."""
    branches = [closed.get(use.output) for use in layer.uses]
    return f"inside {branches[0]}, which no calibration sample takes; give samples that do" if all(branches) else None


def check_asked(job: Job) -> None:
    """Raises `ConfigError` where the layers or the samples cannot give what is asked: before the work, in a dry run too."""
    config = job.config
    config.as_gates().check_resolution(len(job.verification))
    if config.max_drop is not None:
        Limit.parse(config.max_drop).check_resolution(len(job.decision))
    pruned = {layer.name for layer in job.layers}
    for left in job.skipped:
        if left.node in config.layer_sparsity and left.node not in pruned:
            raise ConfigError(f"layer {left.node!r} cannot have a sparsity of its own; it stays as it is: {left.reason}")


def check_methods(config: Config) -> None:
    """Raises `ConfigError` where no allocator or repair has the name the configuration gives, or nothing is augmented."""
    if config.augment != AUTOMATIC and not config.refine:
        raise ConfigError(f"--augment {config.augment} cannot apply without --refine; give both, or neither")
    for name, known in (("allocate", (AUTO, *ALLOCATORS)), ("repair", tuple(REPAIRS))):
        if getattr(config, name) not in known:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; choose from {', '.join(known)}")


def open_session(loaded: graphs.LoadedModel, runtime: RuntimeOptions) -> Session:
    """A plain session of a model, from its file where it has one."""
    lean = replace(runtime, prepack=not loaded.large)
    instead = "give the path of a file with external data"
    return Session(loaded.path or graphs.serialized(loaded.model, loaded.name, instead), lean, what=loaded.name)


def refuse_kernels(loaded: graphs.LoadedModel) -> None:
    """Raises `ModelError` where a model is an export with sparse kernels: nothing can be moved inside those."""
    if any(node.domain == DOMAIN for node in loaded.model.graph.node):
        raise ModelError(f"{loaded.name} is an export with sparse kernels; give the sparse model that it was made from")


def swapped(job: Job, sparse: graphs.LoadedModel) -> list[str]:
    """A note where a model that should be the sparse one of the job's has no more zeros than it."""
    graph = graphs.Graph(graphs.flatten(sparse.model).model)
    layers, _ = graphs.find_layers(graph, job.config.as_selection())
    given, dense = (sum(zeros.values()) for zeros in (graphs.count_zeros(graph, layers), job.zeros))
    if given > dense:
        return []
    return [f"SPARSE has no more zeros ({given:,}) than DENSE ({dense:,}); are the two in order?"]


def _provenance(loaded: graphs.LoadedModel, samples: Samples, calibration: Samples, left_out: tuple[str, ...]) -> Provenance:
    return Provenance(
        model=loaded.name,
        model_sha256=graphs.model_hash(loaded.model),
        data=samples.source,
        data_sha256=calibration.fingerprint(),
        random_data=samples.random,
        calibration_samples=len(calibration),
        left_out=left_out,
        versions=versions(),
    )
