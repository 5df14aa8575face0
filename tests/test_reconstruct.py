"""Reconstruction against brute force: least squares row by row, and every support there is."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx import reconstruct as room
from relrep_onnx.masks import magnitude, pattern_named
from relrep_onnx.moments import DAMPING, Covariance, Moments, MomentStream
from relrep_onnx.reconstruct import least_squares
from relrep_onnx.repair import REPAIRS, Pruned, Task, reconstruct, search_and_reconstruct
from relrep_onnx.swaps import exchange
from relrep_onnx.types import BoolArray, CalibrationError, Contraction, FloatArray, Layer, Window


def moments_of(seed: int, n: int, groups: int, cols: int, rows: int, drift: float = 0.3) -> tuple[Moments, FloatArray]:
    """Correlated inputs, targets made of drifted ones by a dense weight: moments, weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, groups, cols)) @ (np.eye(cols) + rng.normal(size=(cols, cols)) / np.sqrt(cols)) + rng.normal(
        size=cols
    )
    weight = rng.normal(size=(rows, cols))
    per_group = rows // groups
    dense = x + drift * rng.normal(size=x.shape)
    y = np.stack([dense[:, r // per_group] @ weight[r] for r in range(rows)], axis=1)
    stream = MomentStream(groups, cols, rows)
    stream.add(x, y)
    return stream.moments(), weight


def matrix_layer(rows: int, cols: int, groups: int = 1) -> Layer:
    return Layer("a", "MatMul", "w", (cols, rows), rows, cols, groups, Contraction(-1), ())


def conv_layer(rows: int, channels: int, kernel: int, groups: int = 1) -> Layer:
    view = Window((kernel,), (1,), (1,), (0, 0))
    return Layer("a", "Conv", "w", (rows, channels, kernel), rows, channels * kernel, groups, view, ())


def task(layer: Layer, moments: Moments, weight: FloatArray, zeros: int, pattern: str = "unstructured") -> Task:
    return Task(layer, weight, magnitude(weight), pattern_named(pattern), zeros, moments)


def brute_force(moments: Moments, weight: FloatArray, mask: BoolArray) -> FloatArray:
    """Each row by numpy's least squares on its survivors, the ridge as extra equations."""
    ridge, _ = moments.inputs.ridge
    per_group = len(weight) // len(ridge)
    result = np.zeros(weight.shape)
    for r in range(len(weight)):
        keep = np.flatnonzero(mask[r])
        if len(keep):
            gram = moments.inputs.gram[r // per_group]
            values, vectors = np.linalg.eigh(gram)
            root = np.sqrt(values.clip(min=0))[:, None] * vectors.T  # root' root = gram
            ys = np.linalg.lstsq(root.T, moments.cross[r], rcond=None)[0]
            design = np.concatenate([root[:, keep], np.sqrt(ridge[r // per_group]) * np.eye(len(keep))])
            target = np.concatenate([ys, np.sqrt(ridge[r // per_group]) * weight[r, keep]])
            result[r, keep] = np.linalg.lstsq(design, target, rcond=None)[0]
    return result


def objective(moments: Moments, weight: FloatArray, solution: FloatArray) -> float:
    """f summed over rows, with its constant: the error over the data plus the ridge."""
    ridge, _ = moments.inputs.ridge
    shift = moments.target_mean - moments.inputs.means(solution)
    per_row = ridge.repeat(len(weight) // len(ridge))
    return float((moments.distortion(solution, shift) + per_row * ((solution - weight) ** 2).sum(axis=1)).sum())


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9999),
    n=st.sampled_from([5, 9, 80]),
    groups=st.sampled_from([1, 2]),
    cols=st.integers(1, 9),
    keep=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
)
@pytest.mark.parametrize("direct", [True, False])
def test_survivors_are_brute_force_least_squares(direct: bool, seed: int, n: int, groups: int, cols: int, keep: float) -> None:
    moments, weight = moments_of(seed, n, groups, cols, 2 * groups)
    mask = np.random.default_rng(seed).random(weight.shape) < keep
    with mock.patch.object(room, "DIRECT_SHARE", 1e9 if direct else 0):
        solution = least_squares(weight, mask, moments)
    expected = brute_force(moments, weight, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max(initial=1e-300))
    assert not solution.weight[~mask].any()
    np.testing.assert_array_equal(solution.mask, mask)
    assert solution.damping == DAMPING


def test_wide_rows_in_several_chunks() -> None:
    moments, weight = moments_of(1, 200, 2, 24, 10)
    mask = np.random.default_rng(3).random(weight.shape) < np.linspace(0, 1, 10)[:, None]
    whole = least_squares(weight, mask, moments).weight
    with mock.patch.object(room, "CHUNK", 300):
        np.testing.assert_allclose(least_squares(weight, mask, moments).weight, whole, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 9999),
    groups=st.sampled_from([1, 2]),
    cols=st.sampled_from([4, 8, 12]),
    n=st.sampled_from([6, 60]),
    share=st.floats(0.0, 1.0),
    pattern=st.sampled_from(["unstructured", "2:4", "1:4", "4x1", "1x4", "2x2", "3:7"]),
)
def test_the_search_is_never_worse_than_the_mask_of_the_scores(
    seed: int, groups: int, cols: int, n: int, share: float, pattern: str
) -> None:
    moments, weight = moments_of(seed, n, groups, cols, 4 * groups)
    layer = matrix_layer(4 * groups, cols, groups)
    one = task(layer, moments, weight, round(share * pattern_named(pattern).limit(layer)), pattern)
    start = one.pruned().mask
    plain = least_squares(weight, start, moments)
    found = REPAIRS["reconstruct"](one)
    assert objective(moments, weight, unscaled(moments, weight, found.weight)) <= plain_objective(moments, weight, plain.weight)
    assert plain.objective == pytest.approx(
        objective(moments, weight, plain.weight) - constant(moments, weight), rel=1e-8, abs=1e-8 * abs(constant(moments, weight))
    )


def constant(moments: Moments, weight: FloatArray) -> float:
    """What `Solution.objective` leaves out."""
    return float(moments.target_variance.sum())


def plain_objective(moments: Moments, weight: FloatArray, solution: FloatArray) -> float:
    return objective(moments, weight, solution) * (1 + 1e-9) + 1e-12


def unscaled(moments: Moments, weight: FloatArray, repaired: FloatArray) -> FloatArray:
    """The survivors before their variance was matched: least squares again on the same support."""
    return least_squares(weight, repaired != 0, moments).weight


def test_the_search_comes_close_to_the_best_of_all_supports() -> None:
    """Within 2 % of the exhaustive optimum in at least 95 of 100 cases."""
    close = 0
    for seed in range(100):
        moments, weight = moments_of(seed, 60, 1, 6, 2)
        found = search_and_reconstruct(task(matrix_layer(2, 6), moments, weight, 7))
        reached = objective(moments, weight, unscaled(moments, weight, found.weight))
        best = best_of_all_supports(moments, weight, 5)
        assert reached >= best * (1 - 1e-9)
        close += reached <= 1.02 * best
    assert close >= 95


def best_of_all_supports(moments: Moments, weight: FloatArray, survivors: int) -> float:
    """The least objective over every way to spread the survivors over two rows and their columns."""
    cols = weight.shape[1]
    least = np.full((2, cols + 1), np.inf)
    for number in range(2**cols):
        mask = np.tile(number >> np.arange(cols) & 1 == 1, (2, 1))
        solution = brute_force(moments, weight, mask)
        shift = moments.target_mean - moments.inputs.means(solution)
        ridge = moments.inputs.ridge[0][0]
        rows = moments.distortion(solution, shift) + ridge * ((solution - weight) ** 2).sum(axis=1)
        kept = int(mask[0].sum())
        least[:, kept] = np.minimum(least[:, kept], rows)
    return min(float(least[0, n] + least[1, survivors - n]) for n in range(survivors + 1))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4x1", "1x4", "2x2"])
def test_searched_masks_keep_the_pattern_and_the_count(pattern: str) -> None:
    moments, weight = moments_of(5, 300, 2, 24, 16)
    layer = conv_layer(16, 8, 3, groups=2)
    kind = pattern_named(pattern)
    zeros = kind.limit(layer) if kind.selective else 192
    repaired = search_and_reconstruct(task(layer, moments, weight, zeros, pattern))
    zero = repaired.weight == 0
    assert np.count_nonzero(zero) == zeros
    assert not np.signbit(repaired.weight[zero]).any()
    # The pattern, applied to the result itself, drops nothing else.
    np.testing.assert_array_equal(kind.mask(layer, np.abs(repaired.weight), zeros), ~zero)


def test_the_output_has_the_mean_and_the_variance_it_should() -> None:
    moments, weight = moments_of(7, 400, 1, 16, 5)
    repaired = search_and_reconstruct(task(matrix_layer(5, 16), moments, weight, 60))
    alive = (repaired.weight != 0).any(axis=1)
    np.testing.assert_allclose(moments.inputs.variances(repaired.weight)[alive], moments.output_variance[alive], rtol=1e-9)
    np.testing.assert_allclose(moments.inputs.means(repaired.weight) + repaired.bias_shift, moments.target_mean, rtol=1e-9)
    np.testing.assert_allclose(repaired.residual, moments.distortion(repaired.weight, repaired.bias_shift), rtol=1e-7)


def test_a_mask_that_does_worse_on_held_out_samples_is_not_kept() -> None:
    moments, weight = moments_of(11, 400, 1, 12, 6)
    one = task(matrix_layer(6, 12), moments, weight, 54)
    found, plain = search_and_reconstruct(one), reconstruct(one.pruned())
    assert ((found.weight != 0) != (plain.weight != 0)).any(), "the search found the same mask: nothing to decide"
    # Held-out moments on which the layer should give what the plain one gives.
    against = aiming_at(moments, plain.weight, plain.bias_shift)
    kept = search_and_reconstruct(replace(one, held_out=against))
    np.testing.assert_array_equal(kept.weight, plain.weight)
    assert kept.notes == ("keeps its magnitude mask: the searched one did worse on held-out samples",)
    agreed = search_and_reconstruct(replace(one, held_out=aiming_at(moments, found.weight, found.bias_shift)))
    np.testing.assert_array_equal(agreed.weight, found.weight)
    assert agreed.notes == ()


def aiming_at(moments: Moments, weight: FloatArray, shift: FloatArray) -> Moments:
    """The same inputs, with the outputs of a weight and a bias as the targets."""
    aim = Moments.dense(moments.inputs, weight)
    return replace(aim, target_mean=aim.target_mean + shift)


def indefinite(low: float) -> tuple[Moments, FloatArray]:
    """Moments whose Gram matrix has one negative eigenvalue, as rounding or damaged statistics can leave behind."""
    moments, weight = moments_of(13, 200, 1, 6, 3)
    values, vectors = np.linalg.eigh(moments.inputs.gram[0])
    values[0] = low * values.mean()
    matrix = (vectors * values) @ vectors.T
    inputs = Covariance(moments.inputs.count, moments.inputs.mean, matrix[None], factored=False)
    return replace(moments, inputs=inputs), weight


def test_damping_is_raised_until_the_gram_matrix_is_positive_definite() -> None:
    moments, weight = indefinite(-0.5)
    repaired = reconstruct(Pruned(weight, np.abs(weight) > 0.5, moments))
    assert repaired.notes == ("its Gram matrix needed a damping of 1 instead of 0.01",)
    assert np.isfinite(repaired.weight).all()
    assert not np.array_equal(repaired.weight, np.where(np.abs(weight) > 0.5, weight, 0))


def test_a_hopeless_gram_matrix_is_an_error() -> None:
    moments, weight = indefinite(-1e6)
    with pytest.raises(CalibrationError, match="not positive definite even with a damping of 1000"):
        reconstruct(Pruned(weight, np.abs(weight) > 0.5, moments))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [10, 400])
def test_the_search_solves_its_systems(n: int, groups: int) -> None:
    moments, weight = moments_of(17, n, groups, 24, 8)
    quadratic = quadratic_of(moments, weight)
    spectrum = room._Spectrum.of(quadratic)
    right = np.random.default_rng(0).normal(size=(groups, 8 // groups, 24)).astype(np.float32)
    got = spectrum.solved(right, np.float32(0.3))
    for group in range(groups):
        unit = spectrum.unit[group, 0]
        matrix = unit[:, None] * moments.inputs.gram[group] * unit + np.diag(np.broadcast_to(spectrum.ridge[group, 0], 24))
        if n == 400:
            np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)
        np.testing.assert_allclose(got[group], np.linalg.solve(matrix + 0.3 * np.eye(24), right[group].T).T, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e18])
@pytest.mark.parametrize("n", [10, 400])
def test_the_search_takes_what_float32_cannot(n: int, size: float) -> None:
    moments, weight = moments_of(23, n, 1, 24, 8)
    inputs = moments.inputs
    values = inputs.values * (size if inputs.factored else size**2)
    extreme = Moments.dense(replace(inputs, mean=inputs.mean * size, values=values), weight)
    usual = Moments.dense(inputs, weight)
    one = task(conv_layer(8, 8, 3), usual, weight, 96)
    found, expected = search_and_reconstruct(replace(one, moments=extreme)), search_and_reconstruct(one)
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-6)


def quadratic_of(moments: Moments, weight: FloatArray) -> room.Quadratic:
    ridge = moments.inputs.ridge[0].repeat(len(weight) // len(moments.inputs.mean))
    return room.Quadratic(moments.inputs, ridge, moments.cross + ridge[:, None] * weight)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_kept_rows_and_their_gram_matrix_lead_to_the_same(pattern: str) -> None:
    moments, weight = moments_of(19, 40, 1, 72, 40)
    assert moments.inputs.factored
    whole = replace(moments, inputs=replace(moments.inputs, values=moments.inputs.gram, factored=False))
    layer = conv_layer(40, 8, 9)
    zeros = layer.size // 2
    rows, matrix = (search_and_reconstruct(task(layer, m, weight, zeros, pattern)) for m in (moments, whole))
    for repaired in (rows, matrix):
        assert np.count_nonzero(repaired.weight == 0) == zeros
    assert np.mean((rows.weight == 0) == (matrix.weight == 0)) > 0.9
    assert rows.residual.sum() == pytest.approx(matrix.residual.sum(), rel=0.2)
    np.testing.assert_allclose(
        unscaled(moments, weight, rows.weight), unscaled(whole, weight, rows.weight), atol=1e-8 * np.abs(weight).max()
    )


@pytest.mark.parametrize("n", [4, 50])
def test_dead_inputs_and_dead_layers(n: int) -> None:
    rng = np.random.default_rng(0)
    stream = MomentStream(1, 6, 3)
    stream.add(np.zeros((n, 1, 6)), rng.normal(size=(n, 3)))
    one = task(matrix_layer(3, 6), stream.moments(), rng.normal(size=(3, 6)), 9)
    for zeros in (0, 9, 18):
        repaired = search_and_reconstruct(replace(one, zeros=zeros))
        assert np.isfinite(repaired.weight).all()
        np.testing.assert_allclose(repaired.bias_shift, one.moments.target_mean, rtol=1e-12)


def test_a_repair_searches_where_it_can_and_was_not_told_otherwise() -> None:
    moments, weight = moments_of(3, 80, 1, 12, 6)
    one = task(matrix_layer(6, 12), moments, weight, 40)
    both = REPAIRS["reconstruct"]
    searched, plain = search_and_reconstruct(one).weight, both.fold(one.pruned(rough=True)).weight
    assert ((searched != 0) != (plain != 0)).any()
    np.testing.assert_array_equal(both(one).weight, searched)
    np.testing.assert_array_equal(both.without_search()(one).weight, plain)
    np.testing.assert_array_equal(REPAIRS["affine"](one).weight, REPAIRS["affine"].fold(one.pruned()).weight)
    assert one.pruned(rough=True).rough
    assert not one.pruned().rough


def largest(count: int) -> room.Choose:
    return lambda scores: (-scores).reshape(-1).argsort(kind="stable").argsort().reshape(scores.shape) < count


def least(quadratic: room.Quadratic, mask: BoolArray) -> FloatArray:
    """The least f of each row on its support, but for its constant: -b A_SS^-1 b, by a solver of its own."""
    result = np.zeros(len(mask))
    for r, kept in enumerate(mask):
        matrix = quadratic.inputs.gram[r // quadratic.per_group] + quadratic.ridge[r] * np.eye(mask.shape[1])
        b = quadratic.linear[r, kept]
        result[r] = -b @ np.linalg.solve(matrix[np.ix_(kept, kept)], b)
    return result


@pytest.mark.parametrize("n", [6, 80])
def test_one_shot_ranks_by_what_a_removal_costs(n: int) -> None:
    moments, weight = moments_of(29, n, 2, 7, 6)
    quadratic, given_scores = quadratic_of(moments, weight), []

    def choose(scores: FloatArray) -> BoolArray:
        given_scores.append(scores)
        return largest(20)(scores)

    mask = room.one_shot(quadratic, choose)
    everything: BoolArray = np.ones(weight.shape, np.bool_)
    costs = np.zeros(weight.shape)
    for j in range(7):
        without = everything.copy()
        without[:, j] = False
        costs[:, j] = least(quadratic, without) - least(quadratic, everything)
    np.testing.assert_allclose(given_scores[0] ** 2, costs, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(mask, largest(20)(costs))


def test_polishing_takes_the_best_of_its_ends() -> None:
    seen = set()
    for seed in range(12):
        moments, weight = moments_of(seed, 60, 1, 8, 2)
        quadratic, rng = quadratic_of(moments, weight), np.random.default_rng(seed)
        starts = [largest(8)(rng.random(weight.shape)) for _ in range(3)]
        ends = [float(least(quadratic, exchange(quadratic.matrices, quadratic.linear, start)).sum()) for start in starts]
        assert least(quadratic, room.polished(quadratic, starts)).sum() == pytest.approx(min(ends), rel=1e-9)
        seen.add(ends.index(min(ends)))
    assert len(seen) > 1, "one start is always the best: nothing was decided"


def plain_search(quadratic: room.Quadratic, choose: room.Choose, dense: FloatArray, *, common: bool) -> BoolArray:
    """The search as its docstring says it, in float64, each row by a solver; `common` takes one ridge for all scaled columns."""
    cols, data = dense.shape[1], quadratic.linear - quadratic.ridge[:, None] * dense
    systems, right, d = [], np.zeros(dense.shape), np.zeros(dense.shape)
    for r in range(len(dense)):
        gram = quadratic.inputs.gram[r // quadratic.per_group]
        unit = 1 / np.sqrt(np.diag(gram) + quadratic.ridge[r])
        ridge = quadratic.ridge[r] * unit**2
        ridge = np.full(cols, ridge.mean()) if common else ridge
        systems.append(unit[:, None] * gram * unit + np.diag(ridge))
        d[r] = dense[r] / unit
        right[r] = data[r] * unit + ridge * d[r]
    v, mask, rho = np.zeros(dense.shape), np.zeros(dense.shape, np.bool_), 0.1
    for _ in range(100):
        x = np.stack([np.linalg.solve(a + rho * np.eye(cols), b) for a, b in zip(systems, right + rho * d - v, strict=True)])
        before, mask = mask, choose(np.abs(x + v / rho))
        d = np.where(mask, x + v / rho, 0)
        v = v + rho * (x - d)
        changed = (mask & ~before).sum() / mask.sum()
        if not changed:
            break
        rho *= 1.1 if changed > 0.1 else 1.07 if changed > 0.005 else 1.03
    return mask


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [10, 300])
def test_the_search_is_the_one_that_is_written_down(n: int, groups: int) -> None:
    for seed in range(8):
        moments, weight = moments_of(seed, n, groups, 16, 8)
        quadratic = quadratic_of(moments, weight)
        choose = largest(round(weight.size * (0.2 + 0.08 * seed)))
        mask, guess = room.search(quadratic, choose, weight)
        np.testing.assert_array_equal(mask, plain_search(quadratic, choose, weight, common=n == 10))
        np.testing.assert_array_equal(guess != 0, mask)
        # A guess that is close to the optimum on its support, in the weight's own units.
        exact = brute_force(moments, weight, mask)
        assert np.linalg.norm(guess - exact) < 0.5 * np.linalg.norm(weight - exact)


@pytest.mark.parametrize("n", [10, 300])
@pytest.mark.parametrize("rough", [False, True])
def test_results_are_exact_and_scores_need_not_be(n: int, rough: bool) -> None:
    moments, weight = moments_of(31, n, 1, 40, 12)
    quadratic, mask = quadratic_of(moments, weight), np.random.default_rng(0).random(weight.shape) < 0.7
    with mock.patch.object(room, "DIRECT_SHARE", 0):
        solved = room.solve(quadratic, mask, weight, room.ROUGH if rough else room.EXACT)
        repaired = reconstruct(Pruned(weight, mask, moments, rough) if rough else Pruned(weight, mask, moments))
    gram = moments.inputs.gram[0] + quadratic.ridge[0] * np.eye(40)
    left = np.where(mask, quadratic.linear - solved @ gram, 0)
    error = np.linalg.norm(left, axis=1) / np.linalg.norm(quadratic.linear, axis=1)
    assert error.max() <= (1e-3 if rough else 1e-11)
    exact = brute_force(moments, weight, mask)
    exact *= np.sqrt(moments.output_variance / moments.inputs.variances(exact))[:, None]
    gap = np.abs(repaired.weight - exact).max() / np.abs(exact).max()
    assert (gap < 1e-8) != rough
    assert gap < 0.05
