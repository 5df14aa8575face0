"""Saliency, and patterns that turn saliency into a mask with an exact number of zeros.

A mask is True where a weight is kept.  Masks are rank based: the count is met to the weight however many saliencies tie, and ties
are broken by position, so the same input always gives the same mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np

from relrep_onnx.types import BoolArray, FloatArray, Layer

Saliency = Callable[[FloatArray], FloatArray]
"""weight[rows, cols] -> how much each weight matters, float64[rows, cols]."""

Pattern = Callable[[FloatArray, int], BoolArray]
"""(saliency[rows, cols], number of zeros) -> mask bool[rows, cols]."""


def magnitude(weight: FloatArray) -> FloatArray:
    """|w|: comparable between rows and layers while BatchNormalization nodes carry the scale: float64[rows, cols]."""
    return np.abs(weight)


def unit_row_magnitude(weight: FloatArray) -> FloatArray:
    """|w| with each output channel scaled to unit L2 norm: float64[rows, cols].

    Folding a BatchNorm into the weights scales rows; this undoes it.  Raw magnitude collapses on folded exports
    (docs/decisions/0002-saliency.md).
    """
    norms = np.sqrt(np.einsum("rc,rc->r", weight, weight))
    return np.asarray(np.abs(weight) / np.where(norms > 0, norms, 1.0)[:, None])


def saliency_for(layers: Iterable[Layer]) -> Saliency:
    """Plain magnitude for a graph whose BatchNorms are still nodes, unit rows for every other."""
    return magnitude if any(layer.normalized for layer in layers) else unit_row_magnitude


def unstructured(scores: FloatArray, zeros: int) -> BoolArray:
    """Drops the `zeros` smallest scores; among equal ones the first."""
    if zeros == 0:
        return np.ones(scores.shape, np.bool_)
    flat = scores.reshape(-1)
    threshold = np.partition(flat, zeros - 1)[zeros - 1]
    mask: BoolArray = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    mask[ties[len(ties) - (flat.size - zeros - np.count_nonzero(mask)) :]] = True
    return mask.reshape(scores.shape)


PATTERNS: Final[Mapping[str, Pattern]] = {"unstructured": unstructured}
