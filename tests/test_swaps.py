"""Exchanges against systems solved anew for every support."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relrep_onnx.swaps import LEAST, _Row, exchange
from relrep_onnx.types import BoolArray, FloatArray

Case = tuple[FloatArray, FloatArray, BoolArray]


def case(seed: int, groups: int, per_group: int, cols: int, keep: float) -> Case:
    """Correlated matrices of each group, right-hand sides, and a mask."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(groups, 2 * cols, cols)) + 2 * rng.normal(size=(groups, 2 * cols, 1))
    matrices = factors.swapaxes(1, 2) @ factors / cols + 0.05 * np.eye(cols)
    rows = groups * per_group
    return matrices, rng.normal(size=(rows, cols)) * rng.uniform(0.1, 3, size=(rows, 1)), rng.random((rows, cols)) < keep


cases = st.builds(
    case,
    st.integers(0, 9999),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
)


def least(matrix: FloatArray, linear: FloatArray, mask: BoolArray) -> float:
    """The least w A w' - 2 b w' of one row over weights that the mask keeps: -b A_SS^-1 b."""
    kept = np.flatnonzero(mask)
    return -float(linear[kept] @ np.linalg.solve(matrix[np.ix_(kept, kept)], linear[kept])) if len(kept) else 0.0


def total(matrices: FloatArray, linear: FloatArray, mask: BoolArray) -> float:
    per_group = len(linear) // len(matrices)
    return sum(least(matrices[r // per_group], linear[r], mask[r]) for r in range(len(mask)))


def with_places(mask: BoolArray, *turned: tuple[int, int]) -> BoolArray:
    changed = mask.copy()
    for place in turned:
        changed[place] = not changed[place]
    return changed


@settings(deadline=None, max_examples=60)
@given(c=cases)
def test_costs_and_gains_are_what_a_solution_anew_says(c: Case) -> None:
    matrices, linear, mask = c
    matrix, b = matrices[0], linear[0]
    kept, pruned = np.flatnonzero(mask[0]).tolist(), np.flatnonzero(~mask[0]).tolist()
    row, here = _Row.of(matrix, b, np.array(kept, np.int64)), least(matrix, b, mask[0])
    np.testing.assert_array_equal(row.pruned, pruned)
    costs = [least(matrix, b, with_places(mask, (0, i))[0]) - here for i in kept]
    gains = [here - least(matrix, b, with_places(mask, (0, j))[0]) for j in pruned]
    np.testing.assert_allclose(row.costs, costs, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(row.gains, gains, rtol=1e-6, atol=1e-9)
    nets = {(i, j): here - least(matrix, b, with_places(mask, (0, i), (0, j))[0]) for i in kept for j in pruned}
    net, lost, won = row.inner
    if not nets:
        assert net == -np.inf
    else:
        assert net == pytest.approx(max(nets.values()), rel=1e-6, abs=1e-9)
        assert nets[kept[lost], pruned[won]] == pytest.approx(net, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=80)
@given(c=cases)
@example(case(1, 1, 2, 3, 0.3))  # one row has both the best gain and the cheapest survivor
@example(case(6, 1, 6, 5, 0.5))
def test_no_exchange_is_left_that_gains(c: Case) -> None:
    matrices, linear, mask = c
    found = exchange(matrices, linear, mask)
    assert found.dtype == np.bool_
    assert found.sum() == mask.sum()
    reached = total(matrices, linear, found)
    enough = LEAST * (linear**2).sum() / np.einsum("gcc->gc", matrices).mean()
    assert reached <= total(matrices, linear, mask) + 1e-9
    kept, pruned = ([(int(r), int(c)) for r, c in np.argwhere(places)] for places in (found, ~found))
    for out, into in itertools.product(kept, pruned):
        assert total(matrices, linear, with_places(found, out, into)) >= reached - 2 * enough - 1e-12 * abs(reached)
