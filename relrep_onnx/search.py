"""Choosing by trial: which allocator, and how much sparsity, judged on held-out samples that take no part in calibration.

    auto      each candidate allocates; a cheap repair (no mask search, a share of the samples); the smallest relative L2 of the
              outputs, each scaled by its own energy, wins
    max-drop  bisection over the sparsity: each step a whole sequential pass, held against the limit

The dense network's statistics are gathered once for all trials.  The samples that decide here are not those that verify later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from onnx import ModelProto

from relrep_onnx.allocate import AUTO, Candidate, attainable
from relrep_onnx.job import Job
from relrep_onnx.repair import REPAIRS
from relrep_onnx.results import Choice, Finding, Trial
from relrep_onnx.steps import TargetStore, everything, opened, repair_all, write, zeros_for
from relrep_onnx.types import BudgetError, RepairedLayer
from relrep_onnx.verify import Fidelity, Limit, Metric, compare_outputs, float_outputs, run_metric

CANDIDATES: Final = ("rr-curve", "global", "lamp", "erk")
"""What `auto` tries;"""
MARGIN: Final = 0.95
"""the first one stays unless another's error is below this share of its own: trials on few samples are noisy."""
SHARE: Final = 8
"""The trials see one in so many of the calibration batches,"""
FEWEST: Final = 64
"""but at least so many samples, if there are."""
RESOLUTION: Final = 0.005
"""Where the bisection ends."""
LARGEST: Final = 0.995


@dataclass(frozen=True, eq=False)
class Plan:
    """What to prune: the zeros of each layer, and how they were chosen."""

    allocator: str
    sparsity: float
    zeros: dict[str, int]
    choice: Choice | None = None
    finding: Finding | None = None


def shortfalls(
    job: Job, layers: Sequence[Candidate], chosen: Plan, fidelity: Fidelity, before: float | None, after: float | None
) -> list[str]:
    """Where a run gave less than was asked for: zeros that the pattern's steps did not allow, a limit missed by other samples."""
    config, found = job.config, []
    reached = sum(chosen.zeros[c.layer.name] * c.cost for c in layers) / sum(c.layer.size * c.cost for c in layers)
    if abs(reached - chosen.sparsity) > RESOLUTION:
        found.append(
            f"{reached:.1%} of the {config.budget} went, not {chosen.sparsity:.1%}: the pattern {config.pattern} takes "
            "whole blocks; smaller ones come closer"
        )
    if chosen.finding is not None:
        limit = Limit(chosen.finding.kind, chosen.finding.limit)
        drop = limit.drop(fidelity, before, after)
        if not drop <= limit.value:
            found.append(
                f"--max-drop {config.max_drop} holds on the samples that decide, but those that verify drop by {drop:.4g}; "
                "give more samples, or allow less"
            )
    return found


class Judge:
    """Holds sparse models against the dense one on the samples that decide."""

    def __init__(self, job: Job, metric: Metric | None) -> None:
        self._job, self._metric = job, metric
        self._names = float_outputs(job.session)
        self._dense = [(feeds, job.session.run(feeds, self._names)) for feeds in job.batches(job.decision)]
        self._before = run_metric(metric, job.session) if metric else None

    def fidelity(self, sparse: ModelProto) -> Fidelity:
        """How far its outputs are."""
        with opened(self._job, sparse) as session:
            return compare_outputs(self._names, self._dense, session)

    def drop(self, sparse: ModelProto, limit: Limit) -> float:
        """What it lost, in the limit's own terms."""
        with opened(self._job, sparse) as session:
            fidelity = compare_outputs(self._names, self._dense, session)
            after = run_metric(self._metric, session) if self._metric and limit.kind == "eval" else None
        return limit.drop(fidelity, self._before, after)


def plan(job: Job, layers: Sequence[Candidate], targets: TargetStore, metric: Metric | None) -> Plan:
    """Settles what the configuration leaves open.

    Raises:
        BudgetError: no allocation meets the budget, or no sparsity stays under the limit.
    """
    limit = Limit.parse(job.config.max_drop) if job.config.max_drop is not None else None
    # With N:M, everything is pruned unless a sparsity was asked for.
    sparsity = everything(layers) if job.config.sparsity is None and job.pattern.selective else job.config.goal
    choice = None
    allocator = job.config.allocate
    if limit is None and allocator != AUTO:  # nothing to try: the dense model need not run
        return Plan(allocator, sparsity, zeros_for(job, layers, allocator, sparsity))
    judge = Judge(job, metric if limit is not None and limit.kind == "eval" else None)
    least, most = attainable(layers, job.config.as_budget())
    if limit is not None:
        sparsity = min(max(sparsity, least), most)
    if allocator == AUTO:
        choice = choose_allocator(job, layers, targets, judge, sparsity)
        allocator = choice.allocator
    if limit is None:
        return Plan(allocator, sparsity, zeros_for(job, layers, allocator, sparsity), choice)
    between = least, min(most, LARGEST * everything(layers))
    finding, zeros = largest_sparsity(job, layers, targets, judge, allocator, limit, between)
    return Plan(allocator, finding.sparsity, zeros, choice, finding)


def choose_allocator(job: Job, layers: Sequence[Candidate], targets: TargetStore, judge: Judge, sparsity: float) -> Choice:
    """The allocator whose trial moves the outputs least; the trials of equal allocations are the same one."""
    batches = job.calibration.batch_count(job.config.batch_size)
    per_batch = max(1, len(job.calibration) // max(1, batches))
    few = min(batches, max(math.ceil(batches / SHARE), math.ceil(FEWEST / per_batch)))
    cheap = REPAIRS[job.config.repair].without_search()
    errors: dict[str, float] = {}
    seen: dict[tuple[int, ...], float] = {}
    for number, name in enumerate(CANDIDATES):
        job.settings.progress("choose", number, len(CANDIDATES))
        zeros = zeros_for(job, layers, name, sparsity)
        key = tuple(zeros.values())
        if key not in seen:
            repaired = repair_all(job, zeros, targets, repair=cheap, batches=few)
            error = judge.fidelity(write(job, repaired, name, sparsity)).mean_relative_l2
            seen[key] = error if math.isfinite(error) else math.inf
        errors[name] = seen[key]
    job.settings.progress("choose", len(CANDIDATES), len(CANDIDATES))
    first, best = CANDIDATES[0], min(errors, key=lambda name: errors[name])
    return Choice(best if errors[best] < MARGIN * errors[first] else first, errors)


def largest_sparsity(
    job: Job,
    layers: Sequence[Candidate],
    targets: TargetStore,
    judge: Judge,
    allocator: str,
    limit: Limit,
    between: tuple[float, float],
) -> tuple[Finding, dict[str, int]]:
    """The largest sparsity between two, to RESOLUTION, whose model stays under the limit on the samples that decide.

    Raises:
        BudgetError: not even the smallest sparsity tried does.
    """
    below, above = between
    trials: list[Trial] = []
    best: tuple[Trial, Mapping[str, int]] | None = None
    steps = math.ceil(math.log2(max(2.0, (above - below) / RESOLUTION)))
    for number in range(steps):
        job.settings.progress("search", number, steps)
        middle = (below + above) / 2
        zeros = zeros_for(job, layers, allocator, middle)
        repaired: dict[str, RepairedLayer] = repair_all(job, zeros, targets)
        trial = Trial(middle, judge.drop(write(job, repaired, allocator, middle), limit))
        trials.append(trial)
        if trial.drop <= limit.value:  # NaN is no
            below, best = middle, (trial, zeros)
        else:
            above = middle
    job.settings.progress("search", steps, steps)
    if best is None:
        smallest = min(trials, key=lambda t: t.sparsity)
        raise BudgetError(
            f"no sparsity stays under --max-drop {job.config.max_drop}: {smallest.sparsity:.1%} already drops by "
            f"{smallest.drop:.4g} on {len(job.decision)} held-out samples; allow more, or protect layers (--nodes-to-exclude)"
        )
    return Finding(limit.kind, limit.value, best[0].sparsity, best[0].drop, tuple(trials)), dict(best[1])
