"""Input moments of a layer, streamed and mergeable, and every closed form on them.

With mu = E[x] and H = Cov(x) per group, any weight w of a channel can be judged without running the network:

    Cov(yd, ys) = wd H ws'      Var(ys) = ws H ws'      mean(ys) = ws mu
    E|yd - ys|^2 = Var(yd) - 2 ws g' + ws H ws' + (mean difference)^2,  g = Cov(yd, x)

Sums of squares are kept about the mean and merged by Chan, Golub and LeVeque (1979), in float64, so H stays positive
semi-definite.  While there are fewer rows than columns the rows themselves are kept: smaller, and exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from relrep_onnx.types import FloatArray


def row_dots(a: FloatArray, b: FloatArray) -> FloatArray:
    """The inner product of each pair of rows: float64[rows]."""
    return np.asarray(np.einsum("rc,rc->r", a, b))


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean float64[groups, cols] and covariance of a layer's inputs over `count` rows.

    The covariance is either `matrix` float64[groups, cols, cols], or `factor` float64[groups, n, cols] with
    covariance = factor' factor / count.
    """

    count: int
    mean: FloatArray
    matrix: FloatArray | None
    factor: FloatArray | None

    def apply(self, weight: FloatArray) -> FloatArray:
        """Each row of weight[rows, cols] times its group's covariance: float64[rows, cols]."""
        groups = len(self.mean)
        grouped = weight.reshape(groups, -1, weight.shape[1])
        if self.matrix is not None:
            product: FloatArray = grouped @ self.matrix
        elif self.factor is not None:
            product = (grouped @ self.factor.swapaxes(1, 2)) @ self.factor / self.count
        else:
            raise ValueError("a covariance needs a matrix or a factor")
        return product.reshape(weight.shape)

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

    `target_mean`, `target_variance`: float64[rows]; `cross` = Cov(yd, x): float64[rows, cols].
    """

    inputs: Covariance
    target_mean: FloatArray
    target_variance: FloatArray
    cross: FloatArray

    @classmethod
    def dense(cls, inputs: Covariance, weight: FloatArray) -> Moments:
        """The target is what the dense weight gives on these very inputs."""
        cross = inputs.apply(weight)
        return cls(inputs, inputs.means(weight), row_dots(cross, weight).clip(min=0.0), cross)

    def distortion(self, weight: FloatArray, bias_shift: FloatArray) -> FloatArray:
        """E|yd - (w x + shift)|^2 of each output channel: float64[rows]."""
        spread = row_dots(self.inputs.apply(weight) - 2 * self.cross, weight) + self.target_variance
        offset = self.target_mean - self.inputs.means(weight) - bias_shift
        return np.asarray(spread.clip(min=0.0) + offset**2)


class MomentStream:
    """Accumulates the joint moments of inputs x[n, groups, cols] and, optionally, targets y[n, rows].

    Rows are gathered until there are enough for one large matrix product, so the order of summation does not depend on how
    batches were cut only up to rounding; `merge` combines shards.
    """

    BLOCK = 4096

    def __init__(self, groups: int, cols: int, rows: int = 0) -> None:
        self.count = 0
        self._mean_x = np.zeros((groups, cols))
        self._mean_y = np.zeros(rows)
        self._square_x: FloatArray | None = None  # [groups, cols, cols], sums about the mean
        self._square_y = np.zeros(rows)
        self._cross = np.zeros((rows, cols))
        self._waiting: list[tuple[FloatArray, FloatArray]] = []
        self._waiting_rows = 0

    def add(self, x: FloatArray, y: FloatArray | None = None) -> None:
        """Adds rows x[n, groups, cols] with their targets y[n, rows]."""
        if y is None:
            y = np.zeros((len(x), len(self._mean_y)), x.dtype)
        self._waiting.append((x, y))
        self._waiting_rows += len(x)
        if self._waiting_rows >= max(self.BLOCK, self._mean_x.shape[1]):
            self._fold()

    def merge(self, other: MomentStream) -> None:
        """Adds what another stream of the same layer saw."""
        other_rows = other._waiting
        if other.count:
            self._fold()
            self._combine(other.count, other._mean_x, other._mean_y, other._square_x, other._square_y, other._cross)
        for x, y in other_rows:
            self.add(x, y)

    def covariance(self) -> Covariance:
        """The inputs' mean and covariance so far."""
        if self.count == 0 and self._waiting_rows and self._waiting_rows < self._mean_x.shape[1]:
            x = np.concatenate([x for x, _ in self._waiting]).astype(np.float64)
            mean = x.mean(axis=0)
            return Covariance(len(x), mean, None, np.ascontiguousarray((x - mean).swapaxes(0, 1)))
        self._fold()
        square = self._square_x if self._square_x is not None else np.zeros((*self._mean_x.shape, self._mean_x.shape[1]))
        return Covariance(self.count, self._mean_x.copy(), square / max(self.count, 1), None)

    def moments(self) -> Moments:
        """Inputs and targets together."""
        inputs = self.covariance()
        if inputs.factor is not None:
            y = np.concatenate([y for _, y in self._waiting]).astype(np.float64)
            mean = y.mean(axis=0)
            y = y - mean
            return Moments(inputs, mean, (y**2).mean(axis=0), _cross(y, inputs.factor.swapaxes(0, 1)) / len(y))
        return Moments(inputs, self._mean_y.copy(), self._square_y / max(self.count, 1), self._cross / max(self.count, 1))

    def _fold(self) -> None:
        if not self._waiting:
            return
        x = np.concatenate([x for x, _ in self._waiting]).astype(np.float64)
        y = np.concatenate([y for _, y in self._waiting]).astype(np.float64)
        self._waiting, self._waiting_rows = [], 0
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x -= mean_x
        y -= mean_y
        by_group = x.swapaxes(0, 1)
        self._combine(len(x), mean_x, mean_y, by_group.swapaxes(1, 2) @ by_group, (y**2).sum(axis=0), _cross(y, x))

    def _combine(
        self,
        count: int,
        mean_x: FloatArray,
        mean_y: FloatArray,
        square_x: FloatArray | None,
        square_y: FloatArray,
        cross: FloatArray,
    ) -> None:
        if square_x is None:
            return
        total = self.count + count
        share = self.count * count / total
        step_x, step_y = mean_x - self._mean_x, mean_y - self._mean_y
        if self._square_x is None:
            self._square_x = square_x.copy()
        else:
            self._square_x += square_x
            if share:
                self._square_x += share * step_x[:, :, None] * step_x[:, None, :]
        self._square_y += square_y + share * step_y**2
        groups = len(step_x)
        self._cross += cross + share * (step_y.reshape(groups, -1, 1) * step_x[:, None, :]).reshape(self._cross.shape)
        self._mean_x += step_x * (count / total)
        self._mean_y += step_y * (count / total)
        self.count = total


def _cross(y: FloatArray, x: FloatArray) -> FloatArray:
    """Sum over n of y[n, rows] x[n, groups, cols], each output with its own group: [rows, cols]."""
    groups, cols = x.shape[1:]
    product = y.T.reshape(groups, -1, len(y)) @ x.swapaxes(0, 1)
    return np.asarray(product).reshape(-1, cols)
