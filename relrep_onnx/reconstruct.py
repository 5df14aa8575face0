"""Reconstruction: which weights survive, and what they become, from a layer's moments alone.

With H = Cov(x), G = Cov(yd, x), W0 the dense weight, A = H + lambda I and B = G + lambda W0, a row w with the support S costs

    f(w) = E|yd - w x - b|^2 + lambda |w - w0|^2 = w A w' - 2 B w' + const        best on S:  A_SS w_S = B_S

(ridge least squares anchored at the dense weights).  The support is searched by ADMM, after ALPS (Meng et al. 2024), on A
scaled to unit diagonal, A = Q L Q' computed once:

    X <- (B + rho D - V) Q (L + rho)^-1 Q'        D <- X + V / rho, pruned by the pattern        V <- V + rho (X - D)

rho grows, slowly once the support hardly changes, until D stands still.  Small layers go on by exchanges (`swaps.py`).  Layers
with more than BLOCK inputs are treated in blocks of columns, one after the other, each against what the others leave of the
target (block coordinate descent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np

from relrep_onnx.moments import DAMPING, Covariance, Moments, row_dots
from relrep_onnx.swaps import exchange
from relrep_onnx.types import BoolArray, FloatArray

BLOCK: Final = 5120
SWEEPS: Final = 2
"""How often a layer of several blocks goes through them."""

RHO: Final = 0.1
GROWTH: Final = ((0.1, 1.1), (0.005, 1.07), (0.0, 1.03))
"""How fast rho grows while more than this share of the survivors changed in a step."""
SEARCH_STEPS: Final = 100
EXCHANGED: Final = 2048
"""Layers of at most so many weights go on searching by exchanges; on larger ones these cost much and gain nothing."""

DIRECT_SHARE: Final = 10
"""Rows are solved one by one while that takes no more operations than so many products of all rows with H (which are faster)."""
CHUNK: Final = 1 << 22
"""Numbers in the systems solved at a time."""
EXACT: Final = 1e-12
ROUGH: Final = 1e-3
"""Largest residual of an iteratively solved row, relative to its right-hand side: for results, and for scores and trials."""


class Choose(Protocol):
    """A pattern with its count."""

    def __call__(self, scores: FloatArray, columns: slice) -> BoolArray:
        """Which weights of these columns of the layer survive; scores and result are [rows, columns]."""
        ...


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f of every row over some columns: H by its covariance, lambda float64[rows], B float64[rows, columns]."""

    inputs: Covariance
    ridge: FloatArray
    linear: FloatArray

    @property
    def per_group(self) -> int:
        """Rows that share a Gram matrix."""
        return len(self.linear) // len(self.inputs.mean)

    @property
    def matrices(self) -> FloatArray:
        """A of each group: float64[groups, columns, columns]."""
        shifted = self.inputs.gram.copy()
        places = np.arange(shifted.shape[1])
        shifted[:, places, places] += self.ridge[:: self.per_group, None]
        return shifted

    @property
    def diagonal(self) -> FloatArray:
        """The diagonal of A as each row sees it: float64[rows, columns]."""
        diagonal = np.asarray(np.einsum("gcc->gc", self.inputs.gram))
        return np.asarray(diagonal.repeat(self.per_group, axis=0) + self.ridge[:, None])

    def product(self, weight: FloatArray) -> FloatArray:
        """Each row times A."""
        return np.asarray(self.inputs.apply(weight) + self.ridge[:, None] * weight)


@dataclass(frozen=True, eq=False)
class Solution:
    """Survivors float64[rows, cols], exact zeros elsewhere, and their objective, sum of f over rows, up to a constant.

    `damping` is what the worst-conditioned block needed.
    """

    weight: FloatArray
    mask: BoolArray
    objective: float
    damping: float


def least_squares(
    weight: FloatArray,
    mask: BoolArray,
    moments: Moments,
    choose: Choose | None = None,
    *,
    step: int = 1,
    exchanges: bool = False,
    tolerance: float = EXACT,
) -> Solution:
    """The survivors of a mask by ridge least squares; with `choose`, the mask is searched and the given one is where it starts.

    Args:
        weight: the dense weight, float64[rows, cols].
        mask: True where a weight survives.
        moments: of the inputs the layer gets, aiming at the outputs it should give.
        choose: makes a mask of scores, see `Choose`; None keeps the mask.
        step: blocks of columns begin at its multiples, so that `choose` can keep its own blocks whole.
        exchanges: any weight may survive in place of any other, so that small layers may go on searching by exchanges.
        tolerance: of rows that are solved iteratively, EXACT or ROUGH.

    Raises:
        CalibrationError: no damping makes the Gram matrix positive definite.
    """
    mask = mask.copy()
    current = np.where(mask, weight, 0.0)
    damping = DAMPING
    parts = column_blocks(weight.shape[1], step)
    ridges = np.zeros(weight.shape)
    for sweep in range(SWEEPS if len(parts) > 1 else 1):
        for part in parts:
            inputs, linear = moments.inputs, moments.cross[:, part]
            if len(parts) > 1:
                others = current.copy()
                others[:, part] = 0.0
                inputs, linear = moments.inputs.part(part), linear - moments.inputs.apply(others, part)
            ridge, needed = inputs.ridge
            damping = max(damping, needed)
            ridge = ridge.repeat(len(weight) // len(ridge))
            ridges[:, part] = ridge[:, None]
            quadratic = Quadratic(inputs, ridge, linear + ridge[:, None] * weight[:, part])
            start = current[:, part]
            if choose is not None and sweep == 0:
                own = partial(choose, columns=part)
                found, start = search(quadratic, own, weight[:, part])
                if exchanges and weight.size <= EXCHANGED:
                    found = polished(quadratic, [found, mask[:, part], one_shot(quadratic, own)])
                mask[:, part] = found
            current[:, part] = solve(quadratic, mask[:, part], start, tolerance)
    fit = row_dots(moments.inputs.apply(current) - 2 * moments.cross, current).sum()
    return Solution(current, mask, float(fit + (ridges * (current - weight) ** 2).sum()), damping)


def column_blocks(cols: int, step: int = 1) -> list[slice]:
    """The columns in as few blocks of at most BLOCK as possible, about equally wide, beginning at multiples of `step`."""
    count = -(-cols // BLOCK)
    width = -(-cols // (count * step)) * step
    return [slice(start, min(start + width, cols)) for start in range(0, cols, width)]


def one_shot(quadratic: Quadratic, choose: Callable[[FloatArray], BoolArray]) -> BoolArray:
    """One round of Optimal Brain Surgeon: what costs most to remove from the full solution, w_j^2 / [A^-1]_jj, survives."""
    everything = np.ones(quadratic.linear.shape, np.bool_)
    inverse = np.linalg.inv(quadratic.matrices)
    cost = np.einsum("gcc->gc", inverse).repeat(quadratic.per_group, axis=0)
    return choose(np.abs(_row_by_row(quadratic, everything)) / np.sqrt(cost))


def polished(quadratic: Quadratic, starts: list[BoolArray]) -> BoolArray:
    """The best support that exchanges of single weights reach from any of the starts."""
    ends = [exchange(quadratic.matrices, quadratic.linear, mask) for mask in starts]
    return min(ends, key=lambda mask: -float((quadratic.linear * _row_by_row(quadratic, mask)).sum()))


def solve(quadratic: Quadratic, mask: BoolArray, start: FloatArray, tolerance: float = EXACT) -> FloatArray:
    """The minimiser of f on a support, float64[rows, cols]; `start` is a guess."""
    rows, cols = mask.shape
    direct = 2 / 3 * float((np.count_nonzero(mask, axis=1).astype(np.float64) ** 3).sum())
    if direct <= DIRECT_SHARE * 2.0 * rows * cols**2:
        return _row_by_row(quadratic, mask)
    return _all_rows(quadratic, mask, start, tolerance)


def search(quadratic: Quadratic, choose: Callable[[FloatArray], BoolArray], dense: FloatArray) -> tuple[BoolArray, FloatArray]:
    """A support by ADMM, and the survivors it came with: close to their optimum, good as a guess.

    Args:
        quadratic: the objective.
        choose: scores[rows, cols] -> which survive.
        dense: where the search starts, float64[rows, cols].
    """
    gram = quadratic.inputs.gram
    groups, cols, _ = gram.shape
    shape = groups, quadratic.per_group, cols
    # One ridge per group: every row of a group has the same.
    matrix = gram.astype(np.float32)
    matrix[:, np.arange(cols), np.arange(cols)] += quadratic.ridge[:: quadratic.per_group, None].astype(np.float32)
    unit = 1 / np.sqrt(np.einsum("gcc->gc", matrix))[:, None, :]
    matrix *= unit
    matrix *= unit.swapaxes(1, 2)
    values, vectors = np.linalg.eigh(matrix)
    del matrix
    values = values.clip(min=0.0)[:, None, :]
    linear = (quadratic.linear.reshape(shape) * unit).astype(np.float32) @ vectors
    kept = (dense.reshape(shape) / unit).astype(np.float32)
    dual = np.zeros_like(kept)
    mask = np.zeros((groups * quadratic.per_group, cols), np.bool_)
    rho = RHO
    for _ in range(SEARCH_STEPS):
        free = ((linear + (rho * kept - dual) @ vectors) / (values + rho)) @ vectors.swapaxes(1, 2)
        moved = free + dual / rho
        before, mask = mask, choose(np.abs(moved).reshape(mask.shape))
        kept = np.where(mask.reshape(shape), moved, np.float32(0))
        dual += rho * (free - kept)
        changed = int(np.count_nonzero(mask & ~before)) / max(1, int(np.count_nonzero(mask)))
        if changed == 0:
            break
        rho *= next(growth for share, growth in GROWTH if changed > share)
    return mask, (kept * unit).astype(np.float64).reshape(mask.shape)


def _row_by_row(quadratic: Quadratic, mask: BoolArray) -> FloatArray:
    """Every row's own system, rows of about the same number of survivors together."""
    gram = quadratic.inputs.gram.reshape(-1)
    kept = np.count_nonzero(mask, axis=1)
    order = np.argsort(kept, kind="stable")[np.count_nonzero(kept == 0) :]
    weight = np.zeros(mask.shape)
    while len(order):
        many = int(np.searchsorted(np.arange(1, len(order) + 1) * kept[order] ** 2, CHUNK, side="right"))
        rows, order = order[: max(1, many)], order[max(1, many) :]
        width = int(kept[rows[-1]])
        # Survivors first; a row with fewer of them is filled up with places of its own, cut out of the system.
        places = np.argsort(~mask[rows], axis=1, kind="stable")[:, :width]
        real = np.arange(width) < kept[rows][:, None]
        first = (rows // quadratic.per_group)[:, None] * mask.shape[1] + places
        system = gram.take(first[:, :, None] * mask.shape[1] + places[:, None, :])
        system *= real[:, :, None] & real[:, None, :]
        system[:, np.arange(width), np.arange(width)] += np.where(real, quadratic.ridge[rows][:, None], 1.0)
        target = np.take_along_axis(quadratic.linear[rows], places, axis=1) * real
        solved = np.linalg.solve(system, target[:, :, None])[:, :, 0]
        block = np.zeros((len(rows), mask.shape[1]))
        np.put_along_axis(block, places, solved * real, axis=1)
        weight[rows] = block
    return weight


def _all_rows(quadratic: Quadratic, mask: BoolArray, start: FloatArray, tolerance: float) -> FloatArray:
    """Conjugate gradients for all rows at once in float32, refined against residuals in float64."""
    weight = np.where(mask, start, 0.0)
    inputs = Covariance(quadratic.inputs.count, quadratic.inputs.mean, quadratic.inputs.gram.astype(np.float32), None)
    rough = Quadratic(inputs, quadratic.ridge.astype(np.float32), quadratic.linear)
    inverse = (mask / quadratic.diagonal).astype(np.float32)
    goal = tolerance * np.sqrt(row_dots(quadratic.linear, quadratic.linear))
    for _ in range(10):
        residual = np.where(mask, quadratic.linear - quadratic.product(weight), 0.0)
        size = np.sqrt(row_dots(residual, residual))
        if (size <= goal).all():
            break
        scale = np.where(size > 0, size, 1.0)[:, None]
        weight += scale * _conjugate_gradients(rough, mask, inverse, (residual / scale).astype(np.float32))
    return weight


def _conjugate_gradients(quadratic: Quadratic, mask: BoolArray, inverse: FloatArray, residual: FloatArray) -> FloatArray:
    """A_SS^-1 residual_S of each row, to about three digits; `inverse` is the preconditioner, zero off the support."""
    solution = np.zeros_like(residual)
    ahead = inverse * residual
    direction = ahead
    energy = row_dots(residual, ahead)
    for _ in range(60):
        moved = np.where(mask, quadratic.product(direction), np.float32(0))
        curve = row_dots(direction, moved)
        step = np.divide(energy, curve, out=np.zeros_like(energy), where=curve > 0)[:, None]
        solution += step * direction
        residual = residual - step * moved
        if (row_dots(residual, residual) <= 1e-6).all():
            break
        ahead = inverse * residual
        fresh = row_dots(residual, ahead)
        direction = ahead + np.divide(fresh, energy, out=np.zeros_like(energy), where=energy > 0)[:, None] * direction
        energy = fresh
    return solution
