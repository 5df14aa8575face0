"""Every repair against its definition on the raw rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.moments import Moments, MomentStream
from relrep_onnx.repair import REPAIRS, Pruned, affine, asr, bias, none, reconstruct, variance
from relrep_onnx.types import BoolArray, FloatArray, RepairedLayer

NAMES = ["none", "bias", "variance", "asr", "affine"]
PER_GROUP = 3


@dataclass(frozen=True)
class Case:
    """Rows x the layer gets, targets y, a dense weight and a mask; `outputs` multiplies out row by row."""

    x: FloatArray
    y: FloatArray
    weight: FloatArray
    mask: BoolArray

    def outputs(self, weight: FloatArray) -> FloatArray:
        per_group = len(weight) // self.x.shape[1]
        return np.stack([self.x[:, r // per_group] @ weight[r] for r in range(len(weight))], axis=1)

    @property
    def moments(self) -> Moments:
        stream = MomentStream(self.x.shape[1], self.x.shape[2], len(self.weight))
        stream.add(self.x, self.y)
        return stream.moments()

    def error(self, repaired: RepairedLayer) -> FloatArray:
        gap = self.y - self.outputs(repaired.weight) - repaired.bias_shift
        return np.asarray((gap**2).mean(axis=0))

    def repair(self, name: str) -> RepairedLayer:
        return REPAIRS[name].fold(Pruned(self.weight, self.mask, self.moments))


def case(seed: int, *, n: int = 60, groups: int = 2, cols: int = 8, keep: float = 0.5, drift: float = 0.2) -> Case:
    """The targets come from other inputs than the layer gets, as in a network whose earlier layers are pruned."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, groups, cols)) @ rng.normal(size=(cols, cols)) + rng.normal(size=(groups, cols))
    weight = rng.normal(size=(groups * PER_GROUP, cols))
    dense = Case(x + drift * rng.normal(size=x.shape), x, weight, rng.random(weight.shape) < keep)
    return Case(x, dense.outputs(weight), weight, dense.mask)


cases = st.builds(
    case,
    st.integers(0, 9999),
    n=st.sampled_from([3, 7, 60]),
    groups=st.sampled_from([1, 2]),
    keep=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    drift=st.sampled_from([0.0, 0.3]),
)


def test_the_table_holds_all_repairs() -> None:
    assert list(REPAIRS) == [*NAMES, "reconstruct"]
    assert [repair.fold for repair in REPAIRS.values()] == [none, bias, variance, asr, affine, reconstruct]
    assert [name for name, repair in REPAIRS.items() if repair.search or repair.sums or repair.dear] == ["reconstruct"]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(c=cases)
def test_the_residual_is_the_error_over_rows(name: str, c: Case) -> None:
    repaired = c.repair(name)
    assert (repaired.residual >= 0).all()
    small = 1e-12 * (c.y**2).mean(axis=0)  # rounding, where hardly anything is left
    for other in (c.error(repaired), c.moments.distortion(repaired.weight, repaired.bias_shift)):
        np.testing.assert_array_less(np.abs(repaired.residual - other), 1e-9 * other + small)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(c=cases)
def test_masked_weights_are_exact_zeros(name: str, c: Case) -> None:
    dropped = c.repair(name).weight[~c.mask]
    assert (dropped == 0.0).all()
    assert not np.signbit(dropped).any()
    assert np.isfinite(c.repair(name).weight).all()


def test_none_only_masks() -> None:
    c = case(0)
    repaired = c.repair("none")
    np.testing.assert_array_equal(repaired.weight, np.where(c.mask, c.weight, 0))
    np.testing.assert_array_equal(repaired.bias_shift, 0)


@pytest.mark.parametrize("name", NAMES[1:])
@settings(deadline=None, max_examples=20)
@given(c=cases)
def test_means_match(name: str, c: Case) -> None:
    repaired = c.repair(name)
    mean = (c.outputs(repaired.weight) + repaired.bias_shift).mean(axis=0)
    scale = np.abs(c.outputs(repaired.weight)).max() + np.abs(c.y).max()
    np.testing.assert_allclose(mean, c.y.mean(axis=0), atol=1e-11 * scale)


@settings(deadline=None, max_examples=40)
@given(c=cases)
def test_variance_matches_the_variance(c: Case) -> None:
    given_variance = c.outputs(c.repair("variance").weight).var(axis=0)
    alive = c.mask.any(axis=1)
    np.testing.assert_allclose(given_variance[alive], c.y.var(axis=0)[alive], rtol=1e-9)
    np.testing.assert_array_equal(given_variance[~alive], 0)


@settings(deadline=None, max_examples=40)
@given(c=cases)
def test_asr_is_the_papers_formula(c: Case) -> None:
    pruned = c.outputs(np.where(c.mask, c.weight, 0.0))
    var = pruned.var(axis=0)
    alive = c.mask.any(axis=1)
    ghat = np.where(alive, np.sqrt(c.y.var(axis=0) / np.where(alive, var, 1.0)), 1.0)
    k = np.where(alive, var / np.where(alive, var + np.median(var), 1.0), 0.0)
    gamma = k * ghat + 1 - k
    repaired = c.repair("asr")
    np.testing.assert_allclose(repaired.weight, np.where(c.mask, c.weight, 0) * gamma[:, None], rtol=1e-9)
    shift = c.y.mean(axis=0) - gamma * pruned.mean(axis=0)
    np.testing.assert_allclose(repaired.bias_shift, shift, rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(c=cases)
def test_affine_is_the_least_squares_optimum(c: Case) -> None:
    repaired = c.repair("affine")
    pruned = c.outputs(np.where(c.mask, c.weight, 0.0))
    for r in range(len(c.weight)):
        design = np.stack([pruned[:, r], np.ones(len(pruned))], axis=1)
        solution = np.linalg.lstsq(design, c.y[:, r], rcond=None)[0]
        best = ((design @ solution - c.y[:, r]) ** 2).mean()
        assert repaired.residual[r] == pytest.approx(best, rel=1e-9, abs=1e-11 * (c.y[:, r] ** 2).mean())
        if c.mask[r].any():
            expected = np.where(c.mask[r], c.weight[r], 0) * solution[0]
            np.testing.assert_allclose(repaired.weight[r], expected, rtol=1e-7, atol=1e-9)
            assert repaired.bias_shift[r] == pytest.approx(solution[1], rel=1e-7, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(c=cases)
def test_more_freedom_is_never_worse(c: Case) -> None:
    slack = 1e-12 * (c.y**2).mean(axis=0)
    left = {name: c.repair(name).residual for name in NAMES}
    for name in NAMES:
        assert (left["affine"] <= left[name] + slack).all(), name
    assert (left["bias"] <= left["none"] + slack).all()


def dense_moments(x: FloatArray, weight: FloatArray) -> Moments:
    stream = MomentStream(x.shape[1], x.shape[2])
    stream.add(x)
    return Moments.dense(stream.covariance(), weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [5, 60])
def test_a_full_mask_changes_nothing(name: str, n: int) -> None:
    c = case(4, n=n)
    repaired = REPAIRS[name].fold(Pruned(c.weight, np.ones_like(c.mask), dense_moments(c.x, c.weight)))
    np.testing.assert_allclose(repaired.weight, c.weight, rtol=1e-12)
    np.testing.assert_allclose(repaired.bias_shift, 0, atol=1e-12)
    np.testing.assert_array_less(repaired.residual, 1e-12 * (c.y**2).mean(axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_a_channel_without_survivors_gets_its_mean(name: str) -> None:
    c = case(5)
    c.mask[1] = False
    repaired = c.repair(name)
    assert not repaired.weight[1].any()
    if name == "none":
        assert repaired.bias_shift[1] == 0
    else:
        assert repaired.bias_shift[1] == pytest.approx(c.y[:, 1].mean())
        assert repaired.residual[1] == pytest.approx(c.y[:, 1].var())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_survives(name: str) -> None:
    c = case(5, keep=0.0)
    repaired = c.repair(name)
    assert not repaired.weight.any()
    assert np.isfinite(repaired.residual).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [5, 1000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_constant_inputs_do_not_scale_rounding_noise(name: str, n: int, kind: type) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        stream = MomentStream(1, 12)
        row: FloatArray = (3 * rng.normal(size=(1, 1, 12))).astype(kind)
        for count in (n // 3, n // 2, n):
            stream.add(row.repeat(count, axis=0))
        weight, mask = rng.normal(size=(8, 12)), rng.random((8, 12)) < 0.3
        moments = Moments.dense(stream.covariance(), weight)
        repaired = REPAIRS[name].fold(Pruned(weight, mask, moments))
        np.testing.assert_allclose(repaired.weight, np.where(mask, weight, 0), rtol=1e-12)
        if name != "none":
            np.testing.assert_allclose(repaired.residual, 0, atol=1e-20)


@pytest.mark.parametrize("name", NAMES)
def test_one_constant_input_among_others(name: str) -> None:
    c = case(6)
    c.x[:, :, 2] = 0.1
    c.mask[0] = np.arange(8) == 2  # yp does not vary
    repaired = c.repair(name)
    np.testing.assert_allclose(repaired.weight[0], np.where(c.mask[0], c.weight[0], 0), rtol=1e-12)
    np.testing.assert_allclose(repaired.residual, c.error(repaired), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_target_that_does_not_vary(name: str, value: float) -> None:
    c = case(7)
    c.y[:, 0] = value
    repaired = c.repair(name)
    assert np.isfinite(repaired.weight).all()
    assert np.isfinite(repaired.bias_shift).all()
    np.testing.assert_allclose(repaired.residual, c.error(repaired), rtol=1e-9, atol=1e-20)
    if name in ("variance", "affine"):
        np.testing.assert_allclose(repaired.weight[0], 0, atol=1e-12)
        assert repaired.residual[0] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("name", NAMES)
def test_an_all_zero_weight(name: str) -> None:
    c = case(8)
    weight = np.zeros_like(c.weight)
    repaired = REPAIRS[name].fold(Pruned(weight, c.mask, dense_moments(c.x, weight)))
    for array in (repaired.weight, repaired.bias_shift, repaired.residual):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs(name: str) -> None:
    c = case(9)
    repaired = REPAIRS[name].fold(Pruned(c.weight, c.mask, dense_moments(np.zeros_like(c.x), c.weight)))
    np.testing.assert_array_equal(repaired.weight, np.where(c.mask, c.weight, 0))
    np.testing.assert_array_equal(repaired.residual, 0)
