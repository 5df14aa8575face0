"""Repairs: (dense weight, mask, moments) -> weight and bias shift, folded, zeros exact.

With ws the masked weight, yp = ws x its output and yd the output to match, per output channel:

    none      as masked
    bias      b += E[yd] - E[yp]
    variance  gamma = sqrt(Var yd / Var yp)                             (arXiv 2605.25508: channelwise variance matching)
    asr       gamma shrunk towards 1: k ghat + 1 - k, k = Var yp / (Var yp + median Var yp)          (arXiv 2605.21426)
    affine    gamma = Cov(yd, yp) / Var yp, the least-squares scale
    and for the last three  w = gamma ws,  b += E[yd] - gamma E[yp].

A channel whose yp does not vary (no survivors, or a constant input) has nothing to scale: gamma = 1 and its mean is matched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from relrep_onnx.moments import Moments, row_dots
from relrep_onnx.types import BoolArray, FloatArray, RepairedLayer

Repair = Callable[[FloatArray, BoolArray, Moments], RepairedLayer]
"""(weight[rows, cols], mask[rows, cols], moments) -> what to write back."""

# A pruned channel whose variance is below this share of the dense one's is constant but for rounding.
CONSTANT: Final = 1e-12


@dataclass(frozen=True, eq=False)
class _Masked:
    """The masked weight's output yp without repair: float64[rows] each, from one product with the covariance."""

    weight: FloatArray
    moments: Moments
    mean: FloatArray
    variance: FloatArray
    covariance: FloatArray  # with yd

    @classmethod
    def of(cls, weight: FloatArray, mask: BoolArray, moments: Moments) -> _Masked:
        masked = np.where(mask, weight, 0.0)
        inputs = moments.inputs
        return cls(masked, moments, inputs.means(masked), inputs.variances(masked), row_dots(moments.cross, masked))

    def gain(self, numerator: FloatArray) -> FloatArray:
        """Numerator / Var yp, and 1 where yp does not vary."""
        alive = self.variance > CONSTANT * self.moments.target_variance
        return np.divide(numerator, self.variance, out=np.ones_like(numerator), where=alive)

    def scaled(self, gamma: FloatArray, *, match_mean: bool = True) -> RepairedLayer:
        """Rows times gamma, and the shift that matches the mean."""
        offset = self.moments.target_mean - gamma * self.mean
        shift = offset if match_mean else np.zeros_like(offset)
        spread = self.moments.target_variance - 2 * gamma * self.covariance + gamma**2 * self.variance
        return RepairedLayer(self.weight * gamma[:, None], shift, spread.clip(min=0.0) + (offset - shift) ** 2)


def none(weight: FloatArray, mask: BoolArray, moments: Moments) -> RepairedLayer:
    """Masks only."""
    return _Masked.of(weight, mask, moments).scaled(np.ones(len(weight)), match_mean=False)


def bias(weight: FloatArray, mask: BoolArray, moments: Moments) -> RepairedLayer:
    """Matches each channel's mean."""
    return _Masked.of(weight, mask, moments).scaled(np.ones(len(weight)))


def variance(weight: FloatArray, mask: BoolArray, moments: Moments) -> RepairedLayer:
    """Matches each channel's mean and variance."""
    masked = _Masked.of(weight, mask, moments)
    return masked.scaled(np.sqrt(masked.gain(moments.target_variance)))


def asr(weight: FloatArray, mask: BoolArray, moments: Moments) -> RepairedLayer:
    """Adaptive Signal Resuscitation: variance matching, shrunk towards 1 where the pruned signal is weak."""
    masked = _Masked.of(weight, mask, moments)
    strength = masked.variance + np.median(masked.variance)
    trust = np.divide(masked.variance, strength, out=np.zeros_like(strength), where=strength > 0)
    return masked.scaled(trust * np.sqrt(masked.gain(moments.target_variance)) + 1 - trust)


def affine(weight: FloatArray, mask: BoolArray, moments: Moments) -> RepairedLayer:
    """Least-squares scale and bias of each channel."""
    masked = _Masked.of(weight, mask, moments)
    return masked.scaled(masked.gain(masked.covariance))


REPAIRS: Final[Mapping[str, Repair]] = {"none": none, "bias": bias, "variance": variance, "asr": asr, "affine": affine}
