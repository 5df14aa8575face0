"""Relative Repairability: how much of a layer's pruning damage repair cannot undo.

    raw(s) = E|yd - ys|^2 with the layer pruned to sparsity s      residual(s) = the same after repair
    RR(s) = residual(s) / raw(s)                                   (arXiv 2605.25508; low = repairable)

Both from the moments of the dense network's inputs alone, so a curve costs matrix products, no runs.  Squared L2 norm over
channels and positions, and the grid below, are our choices; the paper's are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from relrep_onnx.masks import Pattern, Saliency
from relrep_onnx.moments import Moments
from relrep_onnx.repair import Pruned, Repair, none
from relrep_onnx.types import Array, FloatArray, Layer, ScoreCurve

GRID: Final = (0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
CHANNELS: Final = 64
"""A layer with more output channels is scored on so many, evenly spaced, and the sums scaled up: cost is channels * cols^2."""


def score_layer(
    layer: Layer,
    weight: FloatArray,
    moments: Moments,
    repair: Repair,
    pattern: Pattern,
    saliency: Saliency,
    grid: Sequence[float] = GRID,
) -> ScoreCurve:
    """Raw and residual distortion of one layer over a grid of sparsities.

    Args:
        layer: the layer.
        weight: its dense weight, float64[rows, cols].
        moments: of its inputs in the dense network, aiming at its dense outputs (`Moments.dense`).
        repair: the repair whose residual counts.
        pattern: the sparsity pattern.
        saliency: what the pattern ranks.
        grid: sparsities, ascending, in (0, 1].
    """
    scores = saliency(weight)
    shown = _spread(layer)
    part = moments.only(shown)
    share = layer.rows / len(shown)
    raw, residual = [], []
    for sparsity in grid:
        pruned = Pruned(weight[shown], pattern(scores, round(sparsity * layer.size))[shown], part)
        raw.append(share * float(none(pruned).residual.sum()))
        residual.append(share * float(repair(pruned).residual.sum()))
    return ScoreCurve(
        layer=layer.name,
        size=layer.size,
        signal=float(moments.target_variance.sum()),
        sparsity=np.asarray(grid, np.float64),
        raw=np.array(raw),
        residual=np.array(residual),
    )


def _spread(layer: Layer) -> Array:
    """Output channels to score, ascending: all of them, or as many as CHANNELS allows, evenly spaced within each group."""
    per_group = layer.rows // layer.groups
    chosen = np.unique(np.linspace(0, per_group - 1, max(1, min(per_group, CHANNELS // layer.groups))).round().astype(np.int64))
    return (np.arange(layer.groups)[:, None] * per_group + chosen).reshape(-1)
