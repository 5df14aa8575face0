"""Curves against brute force on the raw rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.masks import magnitude, pattern_named, unit_row_magnitude
from relrep_onnx.moments import Moments, MomentStream
from relrep_onnx.repair import REPAIRS, Pruned, Task
from relrep_onnx.score import CHANNELS, FEW, GRID, interpolate, score_layer
from relrep_onnx.types import Contraction, FloatArray, Layer, ScoreCurve

LAYER = Layer("a", "MatMul", "w", (6, 10), 6, 10, 2, Contraction(-1), ())


def rows(seed: int, n: int = 40) -> FloatArray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(n, 2, 10)) @ rng.normal(size=(10, 10)) + rng.normal(size=(2, 10)))


def outputs(x: FloatArray, weight: FloatArray) -> FloatArray:
    return np.stack([x[:, r // 3] @ weight[r] for r in range(6)], axis=1)


def task_of(
    x: FloatArray, weight: FloatArray, scores: FloatArray, *, layer: Layer = LAYER, pattern: str = "unstructured", zeros: int = 0
) -> Task:
    stream = MomentStream(x.shape[1], x.shape[2])
    stream.add(x)
    return Task(layer, weight, scores, pattern_named(pattern), zeros, Moments.dense(stream.covariance(), weight))


def curve_of(seed: int, repair: str = "affine", n: int = 40) -> tuple[FloatArray, FloatArray, ScoreCurve]:
    x, weight = rows(seed, n), np.random.default_rng(seed + 1).normal(size=(6, 10))
    return x, weight, score_layer(task_of(x, weight, magnitude(weight)), REPAIRS[repair])


@pytest.mark.parametrize("repair", list(REPAIRS))
@pytest.mark.parametrize("n", [6, 40])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999))
def test_curves_are_errors_over_rows(repair: str, n: int, seed: int) -> None:
    x, weight, curve = curve_of(seed, repair, n)
    stream = MomentStream(2, 10, 6)
    dense = outputs(x, weight)
    stream.add(x, dense)
    assert (curve.layer, curve.size) == ("a", 60)
    assert curve.signal == pytest.approx(dense.var(axis=0).sum())
    np.testing.assert_array_equal(curve.sparsity, GRID)
    # A repair that solves systems is measured at a few points, see below for the others.
    for point, sparsity in enumerate(GRID):
        if REPAIRS[repair].dear and sparsity not in FEW:
            continue
        threshold = np.sort(np.abs(weight), axis=None)[round(sparsity * 60) - 1]
        mask = np.abs(weight) > threshold
        raw = ((dense - outputs(x, weight * mask)) ** 2).mean(axis=0).sum()
        assert curve.raw[point] == pytest.approx(raw, rel=1e-9)
        repaired = REPAIRS[repair].fold(Pruned(weight, mask, stream.moments()))
        left = ((dense - outputs(x, repaired.weight) - repaired.bias_shift) ** 2).mean(axis=0).sum()
        assert curve.residual[point] == pytest.approx(left, rel=1e-9)


def test_without_any_weight_all_of_the_output_is_lost() -> None:
    x, weight, curve = curve_of(3)
    energy = curve.signal + (outputs(x, weight).mean(axis=0) ** 2).sum()
    assert curve.raw_at(1.0) == pytest.approx(energy)
    assert curve.residual_at(1.0) == pytest.approx(curve.signal)  # only the mean can be repaired
    assert curve.snr_db(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("groups", [1, 2, 200])
def test_many_channels_are_scored_on_some(groups: int) -> None:
    """All channels of a group alike: any choice, scaled up, gives the sum over all."""
    per_group = 400 // groups
    assert groups * per_group > CHANNELS
    x = np.random.default_rng(0).normal(size=(30, groups, 4)) + 1
    weight = np.tile(np.array([1.0, -2.0, 0.5, 3.0]), (400, 1))
    layer = Layer("a", "MatMul", "w", (400, 4), 400, 4, groups, Contraction(-1), ())
    task = task_of(np.repeat(x[:, :1], groups, axis=1), weight, magnitude(weight), layer=layer)
    curve = score_layer(task, REPAIRS["bias"], (1.0,))
    output = x[:, 0] @ weight[0]
    assert curve.raw[0] == pytest.approx(400 * (output**2).mean())
    assert curve.residual[0] == pytest.approx(400 * output.var())
    assert curve.signal == pytest.approx(400 * output.var())


@pytest.mark.parametrize(
    ("groups", "per_group", "shown"),
    [(1, 100, 32), (1, 33, 32), (1, 20, 20), (3, 40, 10), (2, 16, 16), (2, 17, 16), (40, 3, 1)],
)
def test_the_channels_that_are_scored_are_spread_evenly(groups: int, per_group: int, shown: int) -> None:
    rng, rows = np.random.default_rng(0), groups * per_group
    x, weight = rng.normal(size=(50, groups, 3)), rng.normal(size=(rows, 3)) * rng.uniform(0.1, 10, size=(rows, 1))
    layer = Layer("a", "MatMul", "w", (rows, 3), rows, 3, groups, Contraction(-1), ())
    steps = [Fraction(i * (per_group - 1), shown - 1) for i in range(shown)] if shown > 1 else [Fraction(0)]
    chosen = [group * per_group + round(step) for group in range(groups) for step in steps]
    energy = [((x[:, r // per_group] @ weight[r]) ** 2).mean() for r in chosen]
    curve = score_layer(task_of(x, weight, magnitude(weight), layer=layer), REPAIRS["none"], (1.0,))
    assert curve.raw[0] == pytest.approx(per_group / shown * sum(energy))


def test_the_pattern_ranks_the_saliency() -> None:
    x, weight, curve = curve_of(4)
    weight[0] *= 1e-3
    other = score_layer(task_of(x, weight, unit_row_magnitude(weight)), REPAIRS["bias"], (0.5,))
    mask = pattern_named("unstructured").mask(LAYER, unit_row_magnitude(weight), 30)
    gap = outputs(x, weight) - outputs(x, weight * mask)
    assert other.raw.tolist() == pytest.approx([(gap**2).mean(axis=0).sum()])
    assert other.residual.tolist() == pytest.approx([gap.var(axis=0).sum()])
    assert math.isnan(curve.damage)


@pytest.mark.parametrize("pattern", ["2:4", "2x2", "1x4"])
@pytest.mark.parametrize("repair", ["none", "affine", "reconstruct"])
def test_the_masks_are_the_patterns(pattern: str, repair: str) -> None:
    x, weight = rows(5), np.random.default_rng(6).normal(size=(6, 10))
    grid = (0.2, 0.4)
    curve = score_layer(task_of(x, weight, magnitude(weight), pattern=pattern), REPAIRS[repair], grid)
    stream = MomentStream(2, 10, 6)
    dense = outputs(x, weight)
    stream.add(x, dense)
    for point, zeros in enumerate((12, 24)):
        mask = pattern_named(pattern).mask(LAYER, magnitude(weight), zeros)
        assert curve.raw[point] == pytest.approx(((dense - outputs(x, weight * mask)) ** 2).mean(axis=0).sum())
        repaired = REPAIRS[repair].fold(Pruned(weight, mask, stream.moments()))
        left = ((dense - outputs(x, repaired.weight) - repaired.bias_shift) ** 2).mean(axis=0).sum()
        assert curve.residual[point] == pytest.approx(left)


@pytest.mark.parametrize("pattern", ["unstructured", "1x2"])
def test_a_repair_that_solves_systems_is_measured_at_a_few_points(pattern: str) -> None:
    x, weight = rows(7), np.random.default_rng(8).normal(size=(6, 10))
    task = task_of(x, weight, magnitude(weight), pattern=pattern)
    curve = score_layer(task, REPAIRS["reconstruct"])
    np.testing.assert_array_equal(curve.sparsity, GRID)
    folded = {}
    for sparsity in FEW:
        pruned = task_of(x, weight, magnitude(weight), pattern=pattern, zeros=round(60 * sparsity)).pruned()
        folded[sparsity] = [float(REPAIRS[name].fold(pruned).residual.sum()) for name in ("none", "reconstruct")]
        point = GRID.index(sparsity)
        assert [curve.raw[point], curve.residual[point]] == pytest.approx(folded[sparsity], rel=1e-12)
    for values, measured in zip((curve.raw, curve.residual), np.transpose(list(folded.values())).tolist(), strict=True):
        assert values.tolist() == pytest.approx([interpolated(FEW, measured, s) for s in GRID], rel=1e-9)
    # All others, and a short grid, at every point.
    few = score_layer(task, REPAIRS["reconstruct"], GRID[3:8])
    for point, sparsity in enumerate(GRID[3:8]):
        pruned = task_of(x, weight, magnitude(weight), pattern=pattern, zeros=round(60 * sparsity)).pruned()
        assert few.residual[point] == pytest.approx(float(REPAIRS["reconstruct"].fold(pruned).residual.sum()), rel=1e-12)


def test_which_repairs_solve_systems() -> None:
    assert [name for name, repair in REPAIRS.items() if repair.dear] == ["reconstruct"]
    assert set(FEW) <= set(GRID)
    assert FEW[-1] == 1.0


def interpolated(points: Sequence[float], values: Sequence[float], wanted: float) -> float:
    """The definition: geometric between neighbours, below the first a power that is at least linear, above the last constant."""
    power = max(1.0, math.log(values[1] / values[0]) / math.log(points[1] / points[0]))
    if wanted <= points[0]:
        return values[0] * float((wanted / points[0]) ** power)
    if wanted >= points[-1]:
        return values[-1]
    after = next(i for i, point in enumerate(points) if point >= wanted)
    share = (wanted - points[after - 1]) / (points[after] - points[after - 1])
    return float(values[after - 1] ** (1 - share) * values[after] ** share)


@st.composite
def measured(draw: Any) -> tuple[list[float], list[float]]:
    points = sorted(draw(st.sets(st.integers(1, 100), min_size=2, max_size=6)))
    values = draw(st.lists(st.floats(1e-9, 1e9), min_size=len(points), max_size=len(points)))
    return [point / 100 for point in points], values


@settings(deadline=None, max_examples=60)
@given(case=measured(), grid=st.lists(st.floats(0, 1), min_size=1, max_size=9, unique=True).map(sorted))
def test_interpolation_is_geometric_and_a_power_below(case: tuple[list[float], list[float]], grid: list[float]) -> None:
    points, values = case
    got = interpolate(points, np.array(values), grid).tolist()
    if grid != points:
        assert got == pytest.approx([interpolated(points, values, wanted) for wanted in grid], rel=1e-9, abs=1e-300)


@settings(deadline=None, max_examples=60)
@given(case=measured())
def test_interpolation_meets_the_points_and_stays_between_them(case: tuple[list[float], list[float]]) -> None:
    points, values = case
    np.testing.assert_array_equal(interpolate(points, np.array(values), points), values)
    dense = np.union1d(np.linspace(0, 1, 41), points)
    got = interpolate(points, np.array(values), dense.tolist())
    np.testing.assert_allclose(got[np.searchsorted(dense, points)], values, rtol=1e-12)
    for (first, low), (last, high) in itertools.pairwise([(0.0, 0.0), *zip(points, values, strict=True)]):
        part = got[(dense >= first) & (dense <= last)]
        steps = np.diff(part) * (1 if low <= high else -1)
        assert (steps >= -1e-12 * max(low, high)).all()
        assert low * (1 - 1e-12) <= part.max() <= max(low, high) * (1 + 1e-12)


def test_interpolation_in_numbers() -> None:
    values = np.array([1.0, 8.0])
    # Doubling the sparsity from 0.25 makes it eight times as large: a cube below.
    got = interpolate([0.25, 0.5], values, [0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0])
    assert got.tolist() == pytest.approx([0.0, 0.125, 1.0, math.sqrt(8), 8.0, 8.0, 8.0])
    # A curve that hardly rises falls linearly to nothing, no slower.
    assert interpolate([0.5, 1.0], np.array([4.0, 4.0]), [0.0, 0.25, 0.75]).tolist() == pytest.approx([0.0, 2.0, 4.0])
    assert interpolate([0.5, 1.0], np.array([4.0, 1.0]), [0.25, 0.75, 1.0]).tolist() == pytest.approx([2.0, 2.0, 1.0])
    # As many points as are wanted, but others.
    assert interpolate([0.25, 0.5], values, [0.125, 0.375]).tolist() == pytest.approx([0.125, math.sqrt(8)])


def test_interpolation_is_linear_where_there_is_no_ratio() -> None:
    assert interpolate([0.5, 1.0], np.array([0.0, 8.0]), [0.25, 0.5, 0.75, 1.0]).tolist() == [0.0, 0.0, 4.0, 8.0]
    assert interpolate([0.2, 0.6, 1.0], np.array([1.0, 0.0, 4.0]), [0.1, 0.4, 0.8]).tolist() == pytest.approx([0.5, 0.5, 2.0])
    assert interpolate([0.5], np.array([3.0]), [0.25, 0.5, 1.0]).tolist() == [1.5, 3.0, 3.0]
    assert interpolate([0.5], np.array([3.0]), [0.5]).tolist() == [3.0]


def test_the_grid_ascends_to_all_weights() -> None:
    assert all(a < b for a, b in itertools.pairwise(GRID))
    assert GRID[0] > 0
    assert GRID[-1] == 1.0


def curve(raw: list[float], residual: list[float], signal: float = 8.0) -> ScoreCurve:
    return ScoreCurve("a", 100, signal, np.array([0.5, 1.0]), np.array(raw), np.array(residual))


def test_rr_is_residual_over_raw() -> None:
    c = curve([2.0, 8.0], [0.5, 4.0])
    np.testing.assert_array_equal(c.rr, [0.25, 0.5])
    assert c.rr_at(0.5) == 0.25
    assert c.rr_at(1.0) == 0.5


def test_rr_is_undefined_where_pruning_does_no_damage() -> None:
    c = curve([0.0, 8.0], [0.0, 4.0])
    assert np.isnan(c.rr).tolist() == [True, False]
    assert math.isnan(c.rr_at(0.5))
    assert math.isnan(c.rr_at(0.0))
    assert math.isnan(curve([2.0, 8.0], [0.5, 4.0]).rr_at(0.0))


def test_distortion_is_interpolated_linearly_from_nothing() -> None:
    c = curve([2.0, 8.0], [0.5, 4.0])
    assert [c.raw_at(s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 1.0, 2.0, 5.0, 8.0]
    assert [c.residual_at(s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.25, 0.5, 2.25, 4.0]
    assert c.rr_at(0.75) == 0.45


def test_signal_to_noise_in_decibels() -> None:
    c = curve([2.0, 8.0], [0.8, 8.0])
    assert c.snr_db(0.5) == pytest.approx(10.0)
    assert c.snr_db(1.0) == pytest.approx(0.0)
    assert c.snr_db(0.0) == math.inf
    assert curve([2.0, 8.0], [0.8, 8.0], signal=0.0).snr_db(0.5) == -math.inf
