"""Local search on a support: exchange one survivor for one pruned weight while that lowers the objective.

With P = A_SS^-1, w = P B_S and r_j = B_j - A_jS w, adding j to a row's support gains g_j and removing i costs c_i:

    u = P A_Sj      s_j = A_jj - A_jS u      g_j = r_j^2 / s_j      c_i = w_i^2 / P_ii
    after j was added:  w_i - u_i r_j / s_j  and  P_ii + u_i^2 / s_j  in c_i

so the net gain of every exchange inside a row is exact, as is that between two rows.  Each step takes the best one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from relrep_onnx.types import Array, BoolArray, FloatArray

LEAST: Final = 1e-9
"""An exchange has to gain this share of the largest possible decrease of the objective."""


@dataclass(frozen=True, eq=False)
class _Row:
    """A row's survivors and the others, what each costs or gains alone, and its best exchange with itself."""

    kept: Array
    pruned: Array
    costs: FloatArray
    gains: FloatArray
    inner: tuple[float, int, int]

    @classmethod
    def of(cls, matrix: FloatArray, linear: FloatArray, kept: Array) -> _Row:
        pruned = np.setdiff1d(np.arange(len(linear)), kept)
        inverse = np.linalg.inv(matrix[np.ix_(kept, kept)])
        across = matrix[np.ix_(kept, pruned)]
        weight = inverse @ linear[kept]
        left = linear[pruned] - weight @ across
        moved = inverse @ across
        spread = np.diagonal(matrix)[pruned] - np.einsum("ij,ij->j", across, moved)
        gains = left**2 / spread
        diagonal = np.diagonal(inverse)
        costs = weight**2 / diagonal
        inner = -np.inf, 0, 0
        if len(kept) and len(pruned):
            after = (weight[:, None] - moved * (left / spread)) ** 2 / (diagonal[:, None] + moved**2 / spread)
            net = gains - after
            place = int(np.argmax(net))
            inner = float(net.flat[place]), *divmod(place, len(pruned))
        return cls(kept, pruned, costs, gains, inner)

    @cached_property
    def gain(self) -> float:
        """What its best pruned weight gains."""
        return float(self.gains.max(initial=-np.inf))

    @cached_property
    def cost(self) -> float:
        """What its cheapest survivor costs."""
        return float(self.costs.min(initial=np.inf))

    def without(self, place: int) -> Array:
        """The survivors less one."""
        return np.delete(self.kept, place)

    def joined(self, place: int) -> Array:
        """The survivors and one more."""
        return np.append(self.kept, self.pruned[place])

    def exchanged(self, lost: int, won: int) -> Array:
        """The survivors, one of them exchanged."""
        return np.append(self.without(lost), self.pruned[won])


def exchange(matrices: FloatArray, linear: FloatArray, mask: BoolArray) -> BoolArray:
    """A mask with as many survivors, from which no exchange of two weights lowers the objective w A w' - 2 B w'.

    Args:
        matrices: A of each row's group, float64[groups, cols, cols], positive definite.
        linear: B, float64[rows, cols].
        mask: where the search starts, bool[rows, cols].
    """
    per_group = len(linear) // len(matrices)

    def row(number: int, kept: Array) -> _Row:
        return _Row.of(matrices[number // per_group], linear[number], kept)

    rows = [row(number, np.flatnonzero(mask[number])) for number in range(len(mask))]
    enough = LEAST * float(sum((b**2).sum() for b in linear)) / float(np.einsum("gcc->gc", matrices).mean())
    for _ in range(mask.size):
        own = max(range(len(rows)), key=lambda number: rows[number].inner[0])
        net, lost, won = rows[own].inner
        between, taker, giver = _best_pair(rows)
        if max(net, between) <= enough:
            break
        if net >= between:
            rows[own] = row(own, rows[own].exchanged(lost, won))
        else:
            rows[taker], rows[giver] = (
                row(taker, rows[taker].joined(int(np.argmax(rows[taker].gains)))),
                row(giver, rows[giver].without(int(np.argmin(rows[giver].costs)))),
            )
    result = np.zeros_like(mask)
    for number, one in enumerate(rows):
        result[number, one.kept] = True
    return result


def _best_pair(rows: Sequence[_Row]) -> tuple[float, int, int]:
    """The largest net gain between two rows, who takes and who gives; minus infinity where there is one row only."""
    takers = heapq.nlargest(2, range(len(rows)), key=lambda number: rows[number].gain)
    givers = heapq.nsmallest(2, range(len(rows)), key=lambda number: rows[number].cost)
    pairs = [(rows[taker].gain - rows[giver].cost, taker, giver) for taker in takers for giver in givers if taker != giver]
    return max(pairs, key=lambda pair: pair[0], default=(-np.inf, 0, 0))
