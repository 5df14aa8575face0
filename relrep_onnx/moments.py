"""Input moments of a layer, streamed and mergeable, and every closed form on them.

With mu = E[x] and H = Cov(x) per group, any weight w of a channel can be judged without running the network:

    Cov(yd, ys) = wd H ws'      Var(ys) = ws H ws'      mean(ys) = ws mu
    E|yd - ys|^2 = Var(yd) - 2 ws g' + ws H ws' + (mean difference)^2,  g = Cov(yd, x)

Sums of squares are kept about the mean and merged by Chan, Golub and LeVeque (1979), in float64, so H stays positive
semi-definite.  While there are fewer rows than columns the rows themselves are kept: smaller, and exact.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from relrep_onnx.types import Array, CalibrationError, FloatArray

STRIP: Final = 256
DAMPING: Final = 1e-2
DAMPING_LIMIT: Final = 1e3
"""The ridge of a least-squares problem, as a share of the mean diagonal of H, and where raising it ends."""


def row_dots(a: FloatArray, b: FloatArray) -> FloatArray:
    """The inner product of each pair of rows: float64[rows]."""
    return np.asarray(np.einsum("rc,rc->r", a, b))


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean float64[groups, cols] and covariance of a layer's inputs over `count` rows.

    `values` are the covariance float64[groups, cols, cols], or, where `factored`, rows float64[groups, n, cols] with
    covariance = rows' rows / count.
    """

    count: int
    mean: FloatArray
    values: FloatArray
    factored: bool

    @cached_property
    def gram(self) -> FloatArray:
        """The covariance as a matrix: float64[groups, cols, cols]."""
        if not self.factored:
            return self.values
        return np.asarray(self.values.swapaxes(1, 2) @ self.values) / max(self.count, 1)

    @property
    def diagonal(self) -> FloatArray:
        """The variance of each input: float64[groups, cols]."""
        if self.factored:
            return np.asarray(np.einsum("gnc,gnc->gc", self.values, self.values)) / max(self.count, 1)
        return np.asarray(np.einsum("gcc->gc", self.values))

    @cached_property
    def ridge(self) -> tuple[FloatArray, float]:
        """Lambda of each group, float64[groups], that makes H + lambda I positive definite, and the damping it took.

        Lambda is the damping times the mean diagonal of H: DAMPING, raised tenfold until a Cholesky factor exists.  Of a
        factored H rounding leaves no eigenvalue below zero that DAMPING would not lift.

        Raises:
            CalibrationError: not even DAMPING_LIMIT is enough.
        """
        scale = self.diagonal.mean(axis=1)
        scale = np.where(scale > 0, scale, 1.0)
        damping = DAMPING
        if self.factored and np.isfinite(scale).all():
            return damping * scale, damping
        gram = self.gram
        places = np.arange(gram.shape[1])
        while damping <= DAMPING_LIMIT:
            shifted = gram.copy()
            shifted[:, places, places] += damping * scale[:, None]
            with contextlib.suppress(np.linalg.LinAlgError):
                if np.isfinite(np.linalg.cholesky(shifted)).all():
                    return damping * scale, damping
            damping *= 10
        raise CalibrationError(
            f"the Gram matrix of its inputs is not positive definite even with a damping of {DAMPING_LIMIT:g}; "
            "check the scale of the calibration data, exclude the layer, or use another repair"
        )

    def rounded(self) -> Covariance:
        """The same in float32."""
        return replace(self, values=self.values.astype(np.float32))

    def apply(self, weight: FloatArray) -> FloatArray:
        """Each row of weight[rows, cols] times its group's covariance: float64[rows, cols]."""
        grouped = weight.reshape(len(self.mean), -1, weight.shape[1])
        if self.factored:
            product = (grouped @ self.values.swapaxes(1, 2)) @ self.values / max(self.count, 1)
        else:
            product = grouped @ self.values
        return np.asarray(product).reshape(len(weight), -1)

    def means(self, weight: FloatArray) -> FloatArray:
        """Mean of each output without its bias: float64[rows]."""
        grouped = weight.reshape(len(self.mean), -1, weight.shape[1])
        return np.asarray(grouped @ self.mean[:, :, None]).reshape(-1)

    def variances(self, weight: FloatArray) -> FloatArray:
        """Variance of each output: float64[rows]."""
        return row_dots(self.apply(weight), weight).clip(min=0.0)


@dataclass(frozen=True, eq=False)
class Moments:
    """All a repair may know: the inputs x a layer gets now, and the outputs yd (without bias) it should give.

    `target_mean`, `target_variance`: float64[rows]; `cross` = Cov(yd, x): float64[rows, cols].  `output_variance` float64[rows]
    is the dense output's own variance: the target's, unless the target also makes up for another branch.
    """

    inputs: Covariance
    target_mean: FloatArray
    target_variance: FloatArray
    cross: FloatArray
    output_variance: FloatArray

    @classmethod
    def dense(cls, inputs: Covariance, weight: FloatArray) -> Moments:
        """The target is what the dense weight gives on these very inputs."""
        cross = inputs.apply(weight)
        variance = row_dots(cross, weight).clip(min=0.0)
        return cls(inputs, inputs.means(weight), variance, cross, variance)

    def only(self, rows: Array) -> Moments:
        """The same for some outputs, as many from each group; `rows` int[n] ascends."""
        per_row = (self.target_mean, self.target_variance, self.cross, self.output_variance)
        return Moments(self.inputs, *(values[rows] for values in per_row))

    def distortion(self, weight: FloatArray, bias_shift: FloatArray) -> FloatArray:
        """E|yd - (w x + shift)|^2 of each output channel: float64[rows]."""
        spread = row_dots(self.inputs.apply(weight) - 2 * self.cross, weight) + self.target_variance
        offset = self.target_mean - self.inputs.means(weight) - bias_shift
        return np.asarray(spread.clip(min=0.0) + offset**2)


@dataclass(eq=False)
class _Sums:
    """Sums about the means over `count` rows: squares of x, of y, and their products."""

    count: int
    mean_x: FloatArray  # [groups, cols]
    mean_y: FloatArray  # [rows]
    square_x: FloatArray  # [groups, cols, cols]
    square_y: FloatArray  # [rows]
    cross: FloatArray  # [rows, cols]

    @classmethod
    def empty(cls, groups: int, cols: int, rows: int) -> _Sums:
        zeros = np.zeros
        return cls(0, zeros((groups, cols)), zeros(rows), zeros((groups, cols, cols)), zeros(rows), zeros((rows, cols)))

    @classmethod
    def of(cls, x: FloatArray, y: FloatArray) -> _Sums:
        """Of float64 rows, which it may overwrite."""
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x -= mean_x
        y -= mean_y
        by_group = x.swapaxes(0, 1)
        return cls(len(x), mean_x, mean_y, by_group.swapaxes(1, 2) @ by_group, (y**2).sum(axis=0), _cross(y, x))

    def merge(self, other: _Sums) -> None:
        """Chan, Golub and LeVeque: the sums add up, plus what the distance of the means contributes."""
        total = self.count + other.count
        share = self.count * other.count / total
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        for start in range(0, step_x.shape[1], STRIP):  # in strips: a whole outer product would double the peak of a wide layer
            part = slice(start, start + STRIP)
            self.square_x[:, part] += other.square_x[:, part] + share * step_x[:, part, None] * step_x[:, None, :]
        self.square_y += other.square_y + share * step_y**2
        self.cross += other.cross + share * _cross(step_y[None], step_x[None])
        self.mean_x += step_x * (other.count / total)
        self.mean_y += step_y * (other.count / total)
        self.count = total


class MomentStream:
    """Accumulates the joint moments of inputs x[n, groups, cols] and, optionally, targets y[n, rows].

    Rows are gathered until there are enough for one large matrix product, so the order of summation does not depend on how
    batches were cut only up to rounding; `merge` combines shards.
    """

    BLOCK = 4096

    def __init__(self, groups: int, cols: int, rows: int = 0) -> None:
        self._shape = groups, cols, rows
        self._sums: _Sums | None = None
        self._waiting: list[tuple[FloatArray, FloatArray]] = []
        self._waiting_rows = 0

    @property
    def count(self) -> int:
        """Rows added so far."""
        return self._waiting_rows + (self._sums.count if self._sums else 0)

    def add(self, x: FloatArray, y: FloatArray | None = None) -> None:
        """Adds rows x[n, groups, cols] with their targets y[n, rows]; the arrays must not change afterwards."""
        _, cols, rows = self._shape
        if len(x) == 0:
            return
        self._waiting.append((x, np.zeros((len(x), rows)) if y is None else y))
        self._waiting_rows += len(x)
        if self._waiting_rows >= max(self.BLOCK, cols):
            self._fold()

    def merge(self, other: MomentStream) -> None:
        """Adds what another stream of the same layer saw."""
        if other._sums:
            self._fold()
            self._absorb(other._sums if self._sums else copy.deepcopy(other._sums))
        for x, y in list(other._waiting):
            self.add(x, y)

    def covariance(self) -> Covariance:
        """The inputs' mean and covariance so far."""
        return self.moments().inputs

    def moments(self) -> Moments:
        """Inputs and targets together."""
        if self._sums is None and 0 < self._waiting_rows < self._shape[1]:
            x, y = self._rows()
            mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
            x -= mean_x
            y -= mean_y
            inputs = Covariance(len(x), mean_x, np.ascontiguousarray(x.swapaxes(0, 1)), factored=True)
            variance = (y**2).mean(axis=0)
            return Moments(inputs, mean_y, variance, _cross(y, x) / len(x), variance)
        self._fold()
        sums = self._sums or _Sums.empty(*self._shape)
        n = max(sums.count, 1)
        inputs = Covariance(sums.count, sums.mean_x.copy(), sums.square_x / n, factored=False)
        variance = sums.square_y / n
        return Moments(inputs, sums.mean_y.copy(), variance, sums.cross / n, variance)

    def _rows(self) -> tuple[FloatArray, FloatArray]:
        """The waiting rows in float64, in arrays of their own."""
        return (
            np.concatenate([x for x, _ in self._waiting], dtype=np.float64),
            np.concatenate([y for _, y in self._waiting], dtype=np.float64),
        )

    def _fold(self) -> None:
        """Turns the waiting rows into sums."""
        if self._waiting:
            part = _Sums.of(*self._rows())
            self._waiting, self._waiting_rows = [], 0
            self._absorb(part)

    def _absorb(self, part: _Sums) -> None:
        if self._sums is None:
            self._sums = part
        else:
            self._sums.merge(part)


def _cross(y: FloatArray, x: FloatArray) -> FloatArray:
    """Sum over n of y[n, rows] x[n, groups, cols], each output with its own group: [rows, cols]."""
    groups, cols = x.shape[1:]
    product = y.T.reshape(groups, -1, len(y)) @ x.swapaxes(0, 1)
    return np.asarray(product).reshape(-1, cols)
