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

from relrep_onnx.repair import REPAIRS, Pruned, Repair, Task, none
from relrep_onnx.types import Array, Layer, ScoreCurve

GRID: Final = (0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
FEW: Final = (0.4, 0.6, 0.75, 0.85, 0.92, 0.96, 0.985, 1.0)
"""The grid for a repair that searches its masks: each point solves systems."""
CHANNELS: Final = 64
"""A layer with more output channels is scored on so many, evenly spaced, and the sums scaled up: cost is channels * cols^2."""


def curve_grid(repair: str, most: float, *, selective: bool) -> tuple[float, ...]:
    """Sparsities to score a layer at: one where the layer follows its pattern whole or not at all, few where repair is dear."""
    if selective:
        return (most,)
    return FEW if REPAIRS[repair].search is not None else GRID


def score_layer(task: Task, repair: Repair, grid: Sequence[float] = GRID) -> ScoreCurve:
    """Raw and residual distortion of one layer over a grid of sparsities.

    Args:
        task: the layer, with moments of its inputs in the dense network that aim at its dense outputs (`Moments.dense`).
        repair: the repair whose residual counts; it is given masks, and searches none.
        grid: sparsities, ascending, in (0, 1].
    """
    layer = task.layer
    shown = _spread(layer)
    part = task.moments.only(shown)
    share = layer.rows / len(shown)
    raw, residual = [], []
    for sparsity in grid:
        mask = task.pattern.mask(layer, task.scores, round(sparsity * layer.size))
        pruned = Pruned(task.weight[shown], mask[shown], part)
        raw.append(share * float(none(pruned).residual.sum()))
        residual.append(share * float(repair.fold(pruned).residual.sum()))
    return ScoreCurve(
        layer=layer.name,
        size=layer.size,
        signal=float(task.moments.target_variance.sum()),
        sparsity=np.asarray(grid, np.float64),
        raw=np.array(raw),
        residual=np.array(residual),
    )


def _spread(layer: Layer) -> Array:
    """Output channels to score, ascending: all of them, or as many as CHANNELS allows, evenly spaced within each group."""
    per_group = layer.rows // layer.groups
    chosen = np.unique(np.linspace(0, per_group - 1, max(1, min(per_group, CHANNELS // layer.groups))).round().astype(np.int64))
    return (np.arange(layer.groups)[:, None] * per_group + chosen).reshape(-1)
