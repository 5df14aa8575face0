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

from relrep_onnx.repair import Fold, Pruned, Repair, Task, none
from relrep_onnx.types import Array, FloatArray, Layer, ScoreCurve

GRID: Final = (*(n / 20 for n in range(2, 18)), *(n / 100 for n in range(90, 101)))
FEW: Final = (0.6, 0.8, 0.92, 0.97, 1.0)
"""Where a repair that solves systems is measured; the rest of the grid is interpolated."""
CHANNELS: Final = 32
"""A layer with more output channels is scored on so many, evenly spaced, and the sums scaled up: cost is channels * cols^2."""


def score_layer(task: Task, repair: Repair, grid: Sequence[float] = GRID) -> ScoreCurve:
    """Raw and residual distortion of one layer over a grid of sparsities.

    Args:
        task: the layer, with moments of its inputs in the dense network that aim at its dense outputs (`Moments.dense`).
        repair: the repair whose residual counts, on the masks of the task's scores.
        grid: sparsities, ascending, in (0, 1].
    """
    layer = task.layer
    shown = _spread(layer)
    part = task.moments.only(shown)
    share = layer.rows / len(shown)

    points = FEW if repair.dear and len(grid) > len(FEW) else grid
    masks = task.pattern.masks(layer, task.scores, [round(s * layer.size) for s in points], shown)

    def residuals(fold: Fold) -> FloatArray:
        return np.array(
            [share * float(fold(Pruned(task.weight[shown], mask, part, rough=True)).residual.sum()) for mask in masks]
        )

    return ScoreCurve(
        layer=layer.name,
        size=layer.size,
        signal=float(task.moments.target_variance.sum()),
        sparsity=np.asarray(grid, np.float64),
        raw=interpolate(points, residuals(none), grid),
        residual=interpolate(points, residuals(repair.fold), grid),
    )


def interpolate(points: Sequence[float], values: FloatArray, grid: Sequence[float]) -> FloatArray:
    """A distortion between the points where it was measured: geometric between them, a power of the sparsity below the first."""
    x, wanted = np.asarray(points, np.float64), np.asarray(grid, np.float64)
    if len(x) < 2 or np.array_equal(x, wanted) or values.min() <= 0:
        return np.asarray(np.interp(wanted, np.append(0.0, x), np.append(0.0, values)))
    power = max(1.0, float(np.log(values[1] / values[0]) / np.log(x[1] / x[0])))
    below = values[0] * (np.minimum(wanted, x[0]) / x[0]) ** power
    return np.asarray(np.where(wanted < x[0], below, np.exp(np.interp(wanted, x, np.log(values)))))


def _spread(layer: Layer) -> Array:
    """Output channels to score, ascending: all of them, or as many as CHANNELS allows, evenly spaced within each group."""
    per_group = layer.rows // layer.groups
    chosen = np.unique(np.linspace(0, per_group - 1, max(1, min(per_group, CHANNELS // layer.groups))).round().astype(np.int64))
    return (np.arange(layer.groups)[:, None] * per_group + chosen).reshape(-1)
