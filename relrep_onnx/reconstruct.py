"""Reconstruction: which weights survive, and what they become, from a layer's moments alone.

With H = Cov(x), G = Cov(yd, x), W0 the dense weight, A = H + lambda I and B = G + lambda W0, a row w with the support S costs

    f(w) = E|yd - w x - b|^2 + lambda |w - w0|^2 = w A w' - 2 B w' + const        best on S:  A_SS w_S = B_S

(ridge least squares anchored at the dense weights).  The support is searched by ADMM, after ALPS (Meng et al. 2024), on A
scaled to unit diagonal, A = Q L Q' computed once:

    X <- (B + rho D - V) Q (L + rho)^-1 Q'        D <- X + V / rho, pruned by the pattern        V <- V + rho (X - D)

rho grows, slowly once the support hardly changes, until D stands still.  Small layers go on by exchanges (`swaps.py`).

Where fewer rows of inputs were kept than there are columns, H = F'F / n (F the rows about their mean), nothing of the size of H
is ever made: products go through F, Q spans the rows of F only, and systems are solved in whichever space is smaller (Woodbury).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from relrep_onnx.moments import Covariance, Moments, row_dots
from relrep_onnx.swaps import exchange
from relrep_onnx.types import BoolArray, FloatArray

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
NOISE: Final = 1e-6
"""Eigenvalues below this share of the largest are rounding errors of float32."""
EXACT: Final = 1e-12
ROUGH: Final = 1e-3
"""Largest residual of an iteratively solved row, relative to its right-hand side: for results, and for scores and trials."""


Choose = Callable[[FloatArray], BoolArray]
"""A pattern with its count: scores[rows, cols] -> which weights survive."""


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
        return np.asarray(self.inputs.diagonal.repeat(self.per_group, axis=0) + self.ridge[:, None])

    def product(self, weight: FloatArray) -> FloatArray:
        """Each row times A."""
        return np.asarray(self.inputs.apply(weight) + self.ridge[:, None] * weight)


@dataclass(frozen=True, eq=False)
class Solution:
    """Survivors float64[rows, cols], exact zeros elsewhere, their objective, the sum of f but for a constant; the damping."""

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
    exchanges: bool = False,
    tolerance: float = EXACT,
) -> Solution:
    """The survivors of a mask by ridge least squares; with `choose`, the mask is searched and the given one is where it starts.

    Args:
        weight: the dense weight, float64[rows, cols].
        mask: True where a weight survives.
        moments: of the inputs the layer gets, aiming at the outputs it should give.
        choose: makes a mask of scores; None keeps the mask.
        exchanges: any weight may survive in place of any other, so that small layers may go on searching by exchanges.
        tolerance: of rows that are solved iteratively, EXACT or ROUGH.

    Raises:
        CalibrationError: no damping makes the Gram matrix positive definite.
    """
    per_group, damping = moments.inputs.ridge
    ridge = per_group.repeat(len(weight) // len(per_group))
    quadratic = Quadratic(moments.inputs, ridge, moments.cross + ridge[:, None] * weight)
    start = weight
    if choose is not None:
        found, start = search(quadratic, choose, weight)
        if exchanges and weight.size <= EXCHANGED:
            found = polished(quadratic, [found, mask, one_shot(quadratic, choose)])
        mask = found
    solved = solve(quadratic, mask, start, tolerance)
    fit = row_dots(moments.inputs.apply(solved) - 2 * moments.cross, solved).sum()
    return Solution(solved, mask, float(fit + (ridge[:, None] * (solved - weight) ** 2).sum()), damping)


def one_shot(quadratic: Quadratic, choose: Choose) -> BoolArray:
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
    kept = np.count_nonzero(mask, axis=1).astype(np.float64)
    if not quadratic.inputs.factored:
        own, together = 2 / 3 * kept**3, 2.0 * mask.size * mask.shape[1]
    else:
        n = quadratic.inputs.values.shape[1]
        small = np.minimum(kept, n)
        own, together = 2.0 * n * kept * small + 2 / 3 * small**3, 4.0 * mask.size * n
    if own.sum() <= DIRECT_SHARE * together:
        return _row_by_row(quadratic, mask)
    return _all_rows(quadratic, mask, start, tolerance)


def search(quadratic: Quadratic, choose: Choose, dense: FloatArray) -> tuple[BoolArray, FloatArray]:
    """A support by ADMM, and the survivors it came with: close to their optimum, good as a guess.

    Args:
        quadratic: the objective.
        choose: scores[rows, cols] -> which survive.
        dense: where the search starts, float64[rows, cols].
    """
    spectrum = _Spectrum.of(quadratic)
    shape = len(spectrum.unit), quadratic.per_group, dense.shape[1]
    ridge = quadratic.ridge[:, None]
    data = (quadratic.linear - ridge * dense).reshape(shape) * spectrum.unit
    kept = (dense.reshape(shape) / spectrum.unit).astype(np.float32)
    linear = data.astype(np.float32) + spectrum.ridge * kept
    dual = np.zeros_like(kept)
    mask = np.zeros(dense.shape, np.bool_)
    rho = np.float32(RHO)
    for _ in range(SEARCH_STEPS):
        free = spectrum.solved(linear + rho * kept - dual, rho)
        moved = free + dual / rho
        before, mask = mask, choose(np.abs(moved).reshape(mask.shape))
        kept = np.where(mask.reshape(shape), moved, np.float32(0))
        dual += rho * (free - kept)
        changed = int(np.count_nonzero(mask & ~before)) / max(1, int(np.count_nonzero(mask)))
        if changed == 0:
            break
        rho *= np.float32(next(growth for share, growth in GROWTH if changed > share))
    return mask, (kept * spectrum.unit).astype(np.float64).reshape(mask.shape)


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A scaled to unit diagonal by `unit`, float64[groups, 1, cols], and decomposed, in float32.

    A = Q L Q' + floor (I - Q Q'): `values` are L, [groups, 1, m], `vectors` are Q, [groups, cols, m].  Q is complete and `floor`
    infinite where H is a matrix; else Q spans the rows of F, and `floor` is `ridge`.  `ridge` is that of A, [groups, 1, cols]:
    once scaled not the same for all columns; where H is a factor their mean stands for it, in the search only.
    """

    unit: FloatArray
    ridge: FloatArray
    values: FloatArray
    vectors: FloatArray
    floor: FloatArray

    @classmethod
    def of(cls, quadratic: Quadratic) -> _Spectrum:
        inputs = quadratic.inputs
        # Scaled in float64: what stands before may lie outside of float32's range.
        shift = quadratic.ridge[:: quadratic.per_group, None, None]  # every row of a group has the same
        unit = 1 / np.sqrt(inputs.diagonal[:, None, :] + shift)
        ridge = (shift * unit**2).astype(np.float32)
        if not inputs.factored:
            places = np.arange(unit.shape[2])
            scaled = inputs.gram * unit
            scaled *= unit.swapaxes(1, 2)
            matrix = scaled.astype(np.float32)
            del scaled
            matrix[:, places, places] += ridge[:, 0]
            values, vectors = np.linalg.eigh(matrix)
            return cls(unit, ridge, values[:, None, :], vectors, np.full_like(ridge[:, :, :1], np.inf))
        ridge = ridge.mean(axis=2, keepdims=True)
        rows = (inputs.values * (unit / np.sqrt(max(inputs.count, 1)))).astype(np.float32)
        squares, left = np.linalg.eigh(rows @ rows.swapaxes(1, 2))
        seen = squares > NOISE * squares.max(axis=1, keepdims=True)
        scale = seen / np.sqrt(np.where(seen, squares, 1))
        vectors = rows.swapaxes(1, 2) @ (left * scale[:, None, :])
        return cls(unit, ridge, (squares * seen)[:, None, :] + ridge, vectors, ridge)

    def solved(self, right: FloatArray, rho: np.float32) -> FloatArray:
        """(A + rho)^-1 times each row of right, float32[groups, rows, cols]."""
        outside = 1 / (self.floor + rho)
        inside = (right @ self.vectors) * (1 / (self.values + rho) - outside)
        return np.asarray(outside * right + inside @ self.vectors.swapaxes(1, 2))


def _row_by_row(quadratic: Quadratic, mask: BoolArray) -> FloatArray:
    """Every row's own system, rows of about the same number of survivors together."""
    if quadratic.inputs.factored:
        return _row_by_row_of_factor(quadratic, quadratic.inputs.values, mask)
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


def _row_by_row_of_factor(quadratic: Quadratic, factor: FloatArray, mask: BoolArray) -> FloatArray:
    """The same from the rows F that stand for H: as many equations as survivors or as rows, whichever are fewer.

    (F'F / n + r I)^-1 b = (b - F' (F F' + n r I)^-1 F b) / r
    """
    count = max(quadratic.inputs.count, 1)
    weight = np.zeros(mask.shape)
    for row in np.flatnonzero(mask.any(axis=1)):
        places, ridge = np.flatnonzero(mask[row]), quadratic.ridge[row]
        seen, target = factor[row // quadratic.per_group][:, places], quadratic.linear[row, places]
        if len(places) <= len(seen):
            weight[row, places] = np.linalg.solve(seen.T @ seen / count + ridge * np.eye(len(places)), target)
        else:
            inner = np.linalg.solve(seen @ seen.T + count * ridge * np.eye(len(seen)), seen @ target)
            weight[row, places] = (target - seen.T @ inner) / ridge
    return weight


def _all_rows(quadratic: Quadratic, mask: BoolArray, start: FloatArray, tolerance: float) -> FloatArray:
    """Conjugate gradients for all rows at once in float32, refined against residuals in float64."""
    weight = np.where(mask, start, 0.0)
    rough = Quadratic(quadratic.inputs.rounded(), quadratic.ridge.astype(np.float32), quadratic.linear)
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
