"""Repairs: (dense weight, mask, moments) -> weight and bias shift, folded, zeros exact.

With ws the masked weight, yp = ws x its output and yd the output to match, per output channel:

    none         as masked
    bias         b += E[yd] - E[yp]
    variance     gamma = sqrt(Var yd / Var yp)                          (arXiv 2605.25508: channelwise variance matching)
    asr          gamma shrunk towards 1: k ghat + 1 - k, k = Var yp / (Var yp + median Var yp)       (arXiv 2605.21426)
    affine       gamma = Cov(yd, yp) / Var yp, the least-squares scale
    reconstruct  the survivors anew by least squares, on a searched mask (`reconstruct.py`), then as `variance`: least squares
                 shrinks outputs, the more so the less the survivors explain
    and for the last four  w = gamma ws,  b += E[yd] - gamma E[yp].

A channel whose yp does not vary (no survivors, or a constant input) has nothing to scale: gamma = 1 and its mean is matched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from relrep_onnx.masks import Pattern
from relrep_onnx.moments import DAMPING, Moments, row_dots
from relrep_onnx.reconstruct import EXACT, ROUGH, Solution, least_squares
from relrep_onnx.types import BoolArray, FloatArray, Layer, RepairedLayer

# A pruned channel is constant but for rounding where its variance is below this share of the dense one's,
CONSTANT: Final = 1e-12
# or its standard deviation below this share of the terms its mean is summed from: scaling it would scale noise.
ROUNDING: Final = 1e-12


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a repair is given: a dense weight [rows, cols], its mask, and the moments of its inputs and targets.

    The masked weight and the statistics of its output yp, float64[rows] each, are computed once, when first asked for.  Where
    `rough` is set, three digits are enough: scores and trials.
    """

    weight: FloatArray
    mask: BoolArray
    moments: Moments
    rough: bool = False

    @cached_property
    def masked(self) -> FloatArray:
        """The weight without what the mask drops."""
        return np.where(self.mask, self.weight, 0.0)

    @cached_property
    def mean(self) -> FloatArray:
        """E[yp]."""
        return self.moments.inputs.means(self.masked)

    @cached_property
    def variance(self) -> FloatArray:
        """Var yp."""
        return self.moments.inputs.variances(self.masked)

    @cached_property
    def covariance(self) -> FloatArray:
        """Cov(yd, yp)."""
        return row_dots(self.moments.cross, self.masked)

    def gain(self, numerator: FloatArray) -> FloatArray:
        """Numerator / Var yp, and 1 where yp does not vary."""
        inputs = self.moments.inputs
        terms = replace(inputs, mean=np.abs(inputs.mean)).means(np.abs(self.masked))
        alive = self.variance > np.maximum(CONSTANT * self.moments.target_variance, (ROUNDING * terms) ** 2)
        return np.divide(numerator, self.variance, out=np.ones_like(numerator), where=alive)

    def scaled(self, gamma: FloatArray, *, match_mean: bool = True) -> RepairedLayer:
        """Rows times gamma, and the shift that matches the mean."""
        offset = self.moments.target_mean - gamma * self.mean
        shift = offset if match_mean else np.zeros_like(offset)
        spread = self.moments.target_variance - 2 * gamma * self.covariance + gamma**2 * self.variance
        weight = self.masked * gamma[:, None] + 0.0  # a negative gamma leaves -0.0 behind
        return RepairedLayer(weight, shift, spread.clip(min=0.0) + (offset - shift) ** 2)


Fold = Callable[[Pruned], RepairedLayer]
"""What a mask leaves, repaired."""


@dataclass(frozen=True, eq=False)
class Task:
    """A layer to prune: its dense weight, what its weights matter (float64[rows, cols]), and how many go in which pattern.

    `held_out` are moments of samples that `moments` have not seen; without them nothing is checked against overfitting.
    """

    layer: Layer
    weight: FloatArray
    scores: FloatArray
    pattern: Pattern
    zeros: int
    moments: Moments
    held_out: Moments | None = None

    def pruned(self, *, rough: bool = False) -> Pruned:
        """Pruned by the scores."""
        return Pruned(self.weight, self.pattern.mask(self.layer, self.scores, self.zeros), self.moments, rough)


@dataclass(frozen=True)
class Repair:
    """How a layer is pruned and repaired: `fold` repairs what a mask leaves, `search` finds a mask together with its repair.

    `sums` says that a layer which ends a residual branch aims at the dense sum, so that it makes up for the shortcut's error;
    `dear` that each call solves systems of equations.
    """

    fold: Fold
    search: Callable[[Task], RepairedLayer] | None = None
    sums: bool = False
    dear: bool = False

    def __call__(self, task: Task) -> RepairedLayer:
        """Prunes and repairs one layer."""
        return self.fold(task.pruned(rough=True)) if self.search is None else self.search(task)

    def without_search(self) -> Repair:
        """The same on the mask of the scores: much cheaper, nearly as telling."""
        return replace(self, search=None)


def none(pruned: Pruned) -> RepairedLayer:
    """Masks only."""
    return pruned.scaled(np.ones(len(pruned.weight)), match_mean=False)


def bias(pruned: Pruned) -> RepairedLayer:
    """Matches each channel's mean."""
    return pruned.scaled(np.ones(len(pruned.weight)))


def variance(pruned: Pruned) -> RepairedLayer:
    """Matches each channel's mean and variance."""
    return pruned.scaled(np.sqrt(pruned.gain(pruned.moments.output_variance)))


def asr(pruned: Pruned) -> RepairedLayer:
    """Adaptive Signal Resuscitation: variance matching, shrunk towards 1 where the pruned signal is weak."""
    strength = pruned.variance + np.median(pruned.variance)
    trust = np.divide(pruned.variance, strength, out=np.zeros_like(strength), where=strength > 0)
    return pruned.scaled(trust * np.sqrt(pruned.gain(pruned.moments.output_variance)) + 1 - trust)


def affine(pruned: Pruned) -> RepairedLayer:
    """Least-squares scale and bias of each channel."""
    return pruned.scaled(pruned.gain(pruned.covariance))


def reconstruct(pruned: Pruned) -> RepairedLayer:
    """Survivors by least squares, then each channel's mean and variance matched."""
    tolerance = ROUGH if pruned.rough else EXACT
    return _matched(least_squares(pruned.weight, pruned.mask, pruned.moments, tolerance=tolerance), pruned.moments)


def search_and_reconstruct(task: Task) -> RepairedLayer:
    """The same on a searched mask, unless the mask of the scores does better: on the objective, or on held-out samples."""
    pattern, layer = task.pattern, task.layer
    start = task.pruned()

    def choose(scores: FloatArray) -> BoolArray:
        return pattern.mask(layer, scores, task.zeros)

    plain = least_squares(task.weight, start.mask, task.moments, tolerance=ROUGH)
    found = least_squares(task.weight, start.mask, task.moments, choose, exchanges=pattern.unstructured)
    if found.objective > plain.objective:
        return reconstruct(start)
    searched = _matched(found, task.moments)
    if task.held_out is not None and _error(task.held_out, searched) > _error(task.held_out, _matched(plain, task.moments)):
        simple = reconstruct(start)
        return replace(simple, notes=(*simple.notes, "keeps its magnitude mask: the searched one did worse on held-out samples"))
    return searched


def _matched(solution: Solution, moments: Moments) -> RepairedLayer:
    matched = variance(Pruned(solution.weight, solution.mask, moments))
    if solution.damping == DAMPING:
        return matched
    return replace(matched, notes=(f"its Gram matrix needed a damping of {solution.damping:g} instead of {DAMPING:g}",))


def _error(moments: Moments, repaired: RepairedLayer) -> float:
    return float(moments.distortion(repaired.weight, repaired.bias_shift).sum())


REPAIRS: Final[Mapping[str, Repair]] = {
    "none": Repair(none),
    "bias": Repair(bias),
    "variance": Repair(variance),
    "asr": Repair(asr),
    "affine": Repair(affine),
    "reconstruct": Repair(reconstruct, search_and_reconstruct, sums=True, dear=True),
}
