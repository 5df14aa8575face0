"""Saliency, and sparsity patterns that turn it into a mask with the asked number of zeros.

Every pattern is the same thing: blocks of R output channels by C input channels (at one position of the kernel, inside one
group), and a block that is pruned keeps its K best weights.

    unstructured = 1 x 1, K = 0        N:M = 1 x M, K = N        RxC = R x C, K = 0

Blocks go in the order of the mean square of what they lose, the cheapest first.  A mask is True where a weight is kept.  Masks
are rank based: the count is met however many saliencies tie, and ties are broken by position, so the same input gives the same
mask.

At ragged edges a block is padded with weights that are zero already: a narrow block of N:M keeps N weights, if it has as many;
one of RxC is what is left of it.  So the zeros of a mask are the asked number, or less by less than one block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from relrep_onnx.types import Array, BoolArray, ConfigError, FloatArray, Layer

Saliency = Callable[[FloatArray], FloatArray]
"""weight[rows, cols] -> how much each weight matters, float64[rows, cols]."""

LARGEST_GROUP: Final = 32
LARGEST_BLOCK: Final = 64


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


@dataclass(frozen=True)
class Pattern:
    """Blocks of `rows` x `cols` weights, of which a pruned one keeps `keep`."""

    name: str
    rows: int = 1
    cols: int = 1
    keep: int = 0

    @property
    def step(self) -> int:
        """Weights that one whole block gives up."""
        return self.rows * self.cols - self.keep

    @property
    def selective(self) -> bool:
        """Whether pruned blocks keep some of their weights (N:M): a layer then follows the pattern whole or not at all."""
        return self.keep > 0

    @property
    def unstructured(self) -> bool:
        """Whether each weight goes or stays by itself."""
        return self.rows * self.cols == 1

    def limit(self, layer: Layer) -> int:
        """Most zeros a layer can have: all of them, or with N:M what its groups give up; 0 where no group is complete."""
        if not self.selective:
            return layer.size
        whole, rest = divmod(layer.channels, self.cols)
        return layer.rows * layer.kernel * (whole * self.step + max(0, rest - self.keep)) if whole else 0

    def misfit(self, layer: Layer) -> str | None:
        """Why a layer cannot have this pattern, or None."""
        if self.limit(layer):
            return None
        return f"the pattern {self.name} needs {self.cols} input channels; it has {layer.channels}"

    def mask(self, layer: Layer, scores: FloatArray, zeros: int) -> BoolArray:
        """The cheapest blocks pruned, as many as `zeros` allow: bool[rows, cols].

        Args:
            layer: whose groups and kernel positions the blocks respect.
            scores: what each weight matters, float[rows, cols], none negative.
            zeros: how many weights to drop.
        """
        if self.unstructured:
            return ~_lowest(scores.reshape(-1), zeros).reshape(scores.shape)
        dropped, sizes, loss = self._losses(layer, scores)
        if np.any(sizes[sizes > 0] != self.step):
            pruned = _fill(loss, sizes, zeros)
        else:
            pruned = _lowest(loss, min(zeros // self.step, int(np.count_nonzero(sizes))))
        return ~self._unblock(layer, dropped & pruned[:, None])

    def masks(self, layer: Layer, scores: FloatArray, zeros: Sequence[int], rows: Array) -> list[BoolArray]:
        """Some rows of the masks for several numbers of zeros: bool[len(rows), cols] each."""
        if not self.unstructured:
            return [self.mask(layer, scores, count)[rows] for count in zeros]
        ascending, shown = np.sort(scores, axis=None), scores[rows]

        def one(count: int) -> BoolArray:
            if count and ascending.searchsorted(ascending[count - 1], side="right") > count:  # only some of equal scores go
                return self.mask(layer, scores, count)[rows]
            return np.asarray(shown > ascending[count - 1]) if count else np.ones(shown.shape, np.bool_)

        return [one(count) for count in zeros]

    def pooled(self, layer: Layer, scores: FloatArray) -> FloatArray:
        """What each weight matters as part of its block: the root mean square of what the block would lose."""
        if self.unstructured:
            return scores
        dropped, _, loss = self._losses(layer, scores)
        shared = np.broadcast_to(np.sqrt(np.where(np.isfinite(loss), loss, 0.0))[:, None], dropped.shape)
        return np.where(self._unblock(layer, dropped), self._unblock(layer, shared), scores)

    def _losses(self, layer: Layer, scores: FloatArray) -> tuple[BoolArray, Array, FloatArray]:
        """Per block: which weights it would drop, how many, and their mean square (infinite where there are none)."""
        blocks = self._block(layer, scores, -1.0)  # padding goes first
        dropped = np.ones(blocks.shape, np.bool_)
        if self.selective:
            best = np.argsort(blocks, axis=1, kind="stable")[:, self.step :]
            np.put_along_axis(dropped, best, values=False, axis=1)
        dropped &= blocks >= 0
        sizes = np.count_nonzero(dropped, axis=1)
        lost = np.where(dropped, blocks, 0.0)
        loss = np.einsum("bw,bw->b", lost, lost)
        return dropped, sizes, np.divide(loss, sizes, out=np.full_like(loss, np.inf), where=sizes > 0)

    def _block(self, layer: Layer, values: Array, fill: float) -> Array:
        """values[rows, cols] as [blocks, rows * cols of a block], padded."""
        grid = values.reshape(layer.groups, -1, layer.channels, layer.kernel)
        short = [-n % size for n, size in zip(grid.shape[1:3], (self.rows, self.cols), strict=True)]
        grid = np.pad(grid, [(0, 0), (0, short[0]), (0, short[1]), (0, 0)], constant_values=fill)
        parts = grid.reshape(layer.groups, -1, self.rows, grid.shape[2] // self.cols, self.cols, layer.kernel)
        return parts.transpose(0, 1, 3, 5, 2, 4).reshape(-1, self.rows * self.cols)

    def _unblock(self, layer: Layer, blocks: Array) -> Array:
        """The inverse of `_block`."""
        per_group = layer.rows // layer.groups
        across, down = -(-layer.channels // self.cols), -(-per_group // self.rows)
        parts = blocks.reshape(layer.groups, down, across, layer.kernel, self.rows, self.cols)
        grid = parts.transpose(0, 1, 4, 2, 5, 3).reshape(layer.groups, down * self.rows, across * self.cols, layer.kernel)
        return grid[:, :per_group, : layer.channels].reshape(layer.rows, layer.cols)


def _lowest(values: FloatArray, count: int) -> BoolArray:
    """True at the `count` smallest values; among equal ones the first."""
    chosen: BoolArray = np.zeros(values.shape, np.bool_)
    if count > 0:
        threshold = np.partition(values, count - 1)[count - 1]
        chosen = values < threshold
        chosen[np.flatnonzero(values == threshold)[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _fill(loss: FloatArray, sizes: Array, zeros: int) -> BoolArray:
    """The cheapest blocks in order while they fit; then, of those that are left, the cheapest of each smaller size that fit."""
    order = np.argsort(loss, kind="stable")
    order = order[sizes[order] > 0]
    ends = np.cumsum(sizes[order])
    taken = int(np.searchsorted(ends, zeros, side="right"))
    pruned = np.zeros(len(loss), np.bool_)
    pruned[order[:taken]] = True
    left, rest = zeros - int(ends[taken - 1] if taken else 0), order[taken:]
    for size in np.unique(sizes[rest])[::-1]:
        fitting = rest[sizes[rest] == size][: left // size]
        pruned[fitting] = True
        left -= int(size) * len(fitting)
    return pruned


def pattern_named(name: str) -> Pattern:
    """A pattern from its name: `unstructured`, N:M along input channels, or RxC (output by input channels).

    Raises:
        ConfigError: no such pattern.
    """
    if name == "unstructured":
        return Pattern(name)
    found = re.fullmatch(r"([1-9]\d?)([:x])([1-9]\d?)", name)
    if found is not None:
        first, kind, second = int(found[1]), found[2], int(found[3])
        if kind == ":" and first < second <= LARGEST_GROUP:
            return Pattern(name, 1, second, first)
        if kind == "x" and first * second > 1 and max(first, second) <= LARGEST_BLOCK:
            return Pattern(name, first, second)
    raise ConfigError(
        f"the pattern is {name!r}; give unstructured, N:M with N < M <= {LARGEST_GROUP} such as 2:4, or blocks RxC of output by "
        f"input channels, up to {LARGEST_BLOCK} each, such as 4x1"
    )
