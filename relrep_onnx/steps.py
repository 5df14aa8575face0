"""The steps of a run, each a function of the job: score -> zeros -> repair -> write -> judge.  The order is in `pipeline.py`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto

from relrep_onnx import distill
from relrep_onnx import graph as graphs
from relrep_onnx.allocate import ALLOCATORS, Allocator, Candidate, allocate, whole_layers
from relrep_onnx.augment import parse as augment_kinds
from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import Targets, sequential_pass
from relrep_onnx.damage import OutputDamage
from relrep_onnx.job import Job, quiet
from relrep_onnx.kernels import costs as kernel_costs
from relrep_onnx.kernels.costs import Kind
from relrep_onnx.moments import Moments
from relrep_onnx.refinement import Held, Recipe, refine
from relrep_onnx.repair import REPAIRS, Repair, Task
from relrep_onnx.results import Refinement
from relrep_onnx.runtime import Session
from relrep_onnx.score import GRID, score_layer
from relrep_onnx.statistics import dense_statistics
from relrep_onnx.store import TensorStore
from relrep_onnx.types import CalibrationError, Contraction, FloatArray, Layer, Progress, RepairedLayer, ScoreCurve, Unit

PROBE_RANGE: Final = (0.5, 0.9)
"""Each layer's damage to the outputs is measured at the asked sparsity, inside this range."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One layer with its curve and its MACs per sample."""

    layer: Layer
    curve: ScoreCurve
    macs: int


class TargetStore(TensorStore):
    """The dense targets of every layer while a run needs them, past a limit on disk."""

    def keep(self, layer: Layer, targets: Targets) -> None:
        """Keeps one layer's targets."""
        for name, values in (("outputs", targets.outputs), ("shortcut", targets.shortcut), ("ends", targets.ends)):
            if values is not None:
                self.put((layer.name, name), values)

    def of(self, layer: Layer) -> Targets:
        """Gives one layer's targets back."""
        name = layer.name
        return Targets(self.get((name, "outputs")), self.find((name, "shortcut")), self.get((name, "ends")))


class Finished:
    """Repaired layers of one pass, kept as they are finished, where the job keeps any; `how` tells this pass from others."""

    def __init__(self, job: Job, how: object) -> None:
        self._cache = job.finished
        self._key = repr((job.statistics_key, job.layers, job.config.repair, job.config.pattern, how))

    def put(self, layer: Layer, repaired: RepairedLayer) -> None:
        """Keeps one layer."""
        if self._cache is not None:
            fields = {name: getattr(repaired, name) for name in ("weight", "bias_shift", "residual")}
            self._cache.put(f"{self._key} {layer.name}", {**fields, "notes": np.array(repaired.notes, np.str_)})

    def get(self, layer: Layer) -> RepairedLayer | None:
        """One layer, if it was finished before."""
        entry = None if self._cache is None else self._cache.get(f"{self._key} {layer.name}")
        if entry is None:
            return None
        return RepairedLayer(entry["weight"], entry["bias_shift"], entry["residual"], tuple(entry["notes"].tolist()))


def score(
    job: Job, cache_dir: str | os.PathLike[str] | None, keep: Callable[[Layer, Targets], None] = lambda layer, targets: None
) -> list[Scored]:
    """RR curve of every layer, and what pruning it alone to the asked sparsity does to the outputs; `keep` gets its targets."""
    repair = REPAIRS[job.config.repair].without_search()
    probe = min(max(job.config.goal, PROBE_RANGE[0]), PROBE_RANGE[1])
    # About one pass over as many samples as calibration has, for all trials together.
    few, _ = job.decision.split(max(4, len(job.calibration) // len(job.layers)))
    finish = partial(graphs.unflatten, job.flat)
    damage = OutputDamage(job.graph.model, job.session, job.batches(few), job.config.as_runtime(), finish)
    cache = Cache(Path(cache_dir)) if cache_dir is not None else None
    scored = {}
    for dense in dense_statistics(job.graph, job.layers, job.feeds(), job.settings, cache, job.statistics_key):
        layer = dense.layer
        keep(layer, dense.targets)
        weight = graphs.read_weight(job.graph, layer)
        limit = job.pattern.limit(layer)
        task = Task(layer, weight, job.saliency(weight), job.pattern, limit, Moments.dense(dense.inputs, weight))
        most = limit / layer.size
        with naming(layer):
            curve = score_layer(task, repair, (most,) if job.pattern.selective else GRID)
            at = most if job.pattern.selective else probe
            trial = repair(replace(task, zeros=round(at * layer.size)))
        found = damage.of(layer, trial)
        if found == 0 and any(use.output in job.flat.gates for use in layer.uses):
            found = math.nan  # none of the few samples takes its branch
        scored[layer.name] = Scored(layer, replace(curve, probe=at, damage=found), dense.macs)
    return [scored[layer.name] for layer in job.layers]


def latency_of(scored: Scored) -> float:
    """Microseconds per weight and sample that the sparse kernels are predicted to spend on it, on one thread.

    What a layer takes whatever its density is not counted: no sparsity removes it.
    """
    layer = scored.layer
    kind: Kind = "product" if isinstance(layer.view, Contraction) else "pointwise" if layer.kernel == 1 else "conv"
    return kernel_costs.COSTS[kernel_costs.REFERENCE].single[kind].mac * scored.macs / layer.size / 1e6


COSTS: Final[Mapping[Unit, Callable[[Scored], float]]] = {
    "weights": lambda scored: 1.0,
    "macs": lambda scored: scored.macs / scored.layer.size,
    "latency": latency_of,
}
"""What one weight of a layer counts in each budget."""


def candidates(job: Job, scored: Sequence[Scored]) -> list[Candidate]:
    """The layers as allocators see them."""

    def pooled(layer: Layer, matters: Callable[[FloatArray], FloatArray]) -> FloatArray:
        return job.pattern.pooled(layer, matters(graphs.read_weight(job.graph, layer)))

    return [
        Candidate(
            layer=s.layer,
            weight=partial(pooled, s.layer, np.abs),
            saliency=partial(pooled, s.layer, job.saliency),
            curve=s.curve,
            cost=COSTS[job.config.budget](s),
            zeros=job.zeros[s.layer.name],
            limit=job.pattern.limit(s.layer),
            step=job.pattern.step,
        )
        for s in scored
    ]


def everything(layers: Sequence[Candidate]) -> float:
    """The sparsity, in the budget's unit, of all that the pattern allows."""
    return sum(c.limit * c.cost for c in layers) / sum(c.layer.size * c.cost for c in layers)


def zeros_for(job: Job, layers: Sequence[Candidate], allocator: str, sparsity: float) -> dict[str, int]:
    """Zeros of each layer at a sparsity."""
    rule: Allocator = ALLOCATORS[allocator]
    budget = replace(job.config.as_budget(), sparsity=sparsity)
    return allocate(whole_layers(rule) if job.pattern.selective else rule, layers, budget)


def repair_all(
    job: Job,
    zeros: Mapping[str, int],
    targets: TargetStore,
    *,
    repair: Repair | None = None,
    batches: int | None = None,
    progress: Progress = quiet,
) -> dict[str, RepairedLayer]:
    """Masks and repairs, in graph order, every layer that gets new zeros; the others stay untouched.

    Args:
        job: the job.
        zeros: of each layer, by name.
        targets: what the dense pass gave.
        repair: instead of the configured one.
        batches: a trial on only the first so many calibration batches.
        progress: told of the layers done.
    """
    chosen = repair or REPAIRS[job.config.repair]
    pruned = {layer.name for layer in job.layers if zeros[layer.name] > job.zeros[layer.name]}
    if not pruned:
        return {}

    kept = Finished(job, (chosen.search is None, batches, [zeros[layer.name] for layer in job.layers]))

    def one(layer: Layer, weight: FloatArray, moments: Moments, held_out: Moments | None) -> RepairedLayer:
        with naming(layer):
            task = Task(layer, weight, job.saliency(weight), job.pattern, zeros[layer.name], moments, held_out)
            repaired = graphs.as_stored(job.graph, chosen(task), layer)
        kept.put(layer, repaired)
        return repaired

    return sequential_pass(
        job.graph,
        job.layers,
        job.feeds(batches),
        replace(job.settings, progress=progress),
        lambda layer: targets.of(layer) if layer.name in pruned else None,
        one,
        sums=chosen.sums,
        known=kept.get,
    )


def write(job: Job, repaired: MutableMapping[str, RepairedLayer], allocator: str, sparsity: float) -> ModelProto:
    """A copy of the flat model with the repaired layers and a record of how it came about.

    Layers leave `repaired` as they are written, so that no weight is held twice.
    """
    sparse = graphs.without_data(job.graph.model, {layer.weight for layer in job.layers})
    for layer in job.layers:
        if layer.name in repaired:
            graphs.write_layer(sparse, layer, repaired.pop(layer.name), graphs.read_weight(job.graph, layer))
        else:
            graphs.restore(sparse, job.graph, layer.weight)
    record = {
        "allocate": allocator,
        "sparsity": f"{sparsity:.10g}",
        **{name: getattr(job.config, name) for name in ("budget", "pattern", "repair", "seed")},
        **{name: getattr(job.provenance, name) for name in ("data_sha256", "model_sha256")},
        "version": job.provenance.versions["relrep-onnx"],
    }
    graphs.set_metadata(sparse, {f"relrep.{name}": str(value) for name, value in record.items()})
    return sparse


def refined(job: Job, sparse: ModelProto, progress: Progress) -> tuple[ModelProto, Refinement]:
    """All survivors and biases moved together towards the dense model's features and outputs; small layers move too."""
    config, runtime = job.config, job.config.as_runtime()
    sample = next(job.calibration.batches(1))
    graph = graphs.Graph(sparse)
    layers, _ = graphs.find_layers(graph, replace(config.as_selection(), min_size=1))
    d = distill.plan(job.loaded.model, sparse, layers, sample, runtime)
    held = Held(d, job.batches(job.decision), runtime)
    values = {name: graph.stored(name) for name in d.names}
    kinds = augment_kinds(config.augment)
    key = repr(("refinement", graphs.model_hash(sparse), job.statistics_key, config.refine, config.augment))
    recipe = Recipe(config.refine, kinds, config.seed, job.settings.memory, runtime, job.finished, key)
    best, account = refine(d, values, job.calibration, held, recipe, progress)
    model = graphs.with_tensors(sparse, best)
    graphs.set_metadata(model, {"relrep.refine": str(config.refine), "relrep.augment": ",".join(account.augment) or "none"})
    return model, account


@contextmanager
def opened(job: Job, sparse: ModelProto) -> Iterator[Session]:
    """A plain session of a sparse flat model, put together again in a temporary file."""
    with graphs.staged(None) as stage:
        stage.write(graphs.unflatten(job.flat, sparse), job.loaded.external)
        yield Session(stage.path, job.runtime, what="the sparse model")


@contextmanager
def naming(layer: Layer) -> Iterator[None]:
    """Adds the layer's name to an error about its numbers."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"layer {layer.name!r}: {error}") from error
