"""Curves against brute force on the raw rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.masks import magnitude, unit_row_magnitude, unstructured
from relrep_onnx.moments import Moments, MomentStream
from relrep_onnx.repair import REPAIRS, Pruned
from relrep_onnx.score import CHANNELS, GRID, score_layer
from relrep_onnx.types import Contraction, FloatArray, Layer, ScoreCurve

LAYER = Layer("a", "MatMul", "w", (6, 10), 6, 10, 2, Contraction(-1), ())


def rows(seed: int, n: int = 40) -> FloatArray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(n, 2, 10)) @ rng.normal(size=(10, 10)) + rng.normal(size=(2, 10)))


def outputs(x: FloatArray, weight: FloatArray) -> FloatArray:
    return np.stack([x[:, r // 3] @ weight[r] for r in range(6)], axis=1)


def curve_of(seed: int, repair: str = "affine", n: int = 40) -> tuple[FloatArray, FloatArray, ScoreCurve]:
    x, weight = rows(seed, n), np.random.default_rng(seed + 1).normal(size=(6, 10))
    stream = MomentStream(2, 10)
    stream.add(x)
    return (
        x,
        weight,
        score_layer(LAYER, weight, Moments.dense(stream.covariance(), weight), REPAIRS[repair], unstructured, magnitude),
    )


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
    for point, sparsity in enumerate(GRID):
        threshold = np.sort(np.abs(weight), axis=None)[round(sparsity * 60) - 1]
        mask = np.abs(weight) > threshold
        raw = ((dense - outputs(x, weight * mask)) ** 2).mean(axis=0).sum()
        assert curve.raw[point] == pytest.approx(raw, rel=1e-9)
        repaired = REPAIRS[repair](Pruned(weight, mask, stream.moments()))
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
    stream = MomentStream(groups, 4)
    stream.add(np.repeat(x[:, :1], groups, axis=1))
    layer = Layer("a", "MatMul", "w", (400, 4), 400, 4, groups, Contraction(-1), ())
    curve = score_layer(
        layer, weight, Moments.dense(stream.covariance(), weight), REPAIRS["bias"], unstructured, magnitude, (1.0,)
    )
    output = x[:, 0] @ weight[0]
    assert curve.raw[0] == pytest.approx(400 * (output**2).mean())
    assert curve.residual[0] == pytest.approx(400 * output.var())
    assert curve.signal == pytest.approx(400 * output.var())


def test_the_pattern_ranks_the_saliency() -> None:
    x, weight, curve = curve_of(4)
    stream = MomentStream(2, 10)
    stream.add(x)
    weight[0] *= 1e-3
    other = score_layer(
        LAYER, weight, Moments.dense(stream.covariance(), weight), REPAIRS["bias"], unstructured, unit_row_magnitude, (0.5,)
    )
    mask = unstructured(unit_row_magnitude(weight), 30)
    gap = outputs(x, weight) - outputs(x, weight * mask)
    assert other.raw.tolist() == pytest.approx([(gap**2).mean(axis=0).sum()])
    assert other.residual.tolist() == pytest.approx([gap.var(axis=0).sum()])
    assert math.isnan(curve.damage)


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
