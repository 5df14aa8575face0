"""Streamed moments against numpy's two passes over the raw rows in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.moments import Covariance, Moments, MomentStream
from relrep_onnx.types import Array, FloatArray


@dataclass(frozen=True)
class Reference:
    mean: FloatArray
    matrix: FloatArray
    target_mean: FloatArray
    target_variance: FloatArray
    cross: FloatArray

    @classmethod
    def of(cls, x: Array, y: Array) -> Reference:
        x, y = x.astype(np.float64), y.astype(np.float64)
        n, groups, _ = x.shape
        dx, dy = x - x.mean(axis=0), y - y.mean(axis=0)
        matrix = np.stack([dx[:, g].T @ dx[:, g] / n for g in range(groups)])
        per_group = y.shape[1] // groups
        cross = [dy[:, r] @ dx[:, r // per_group] / n for r in range(y.shape[1])]
        return cls(x.mean(axis=0), matrix, y.mean(axis=0), (dy**2).mean(axis=0), np.array(cross))


def rows(seed: int, n: int, groups: int, cols: int, outputs: int) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, groups, cols)) @ rng.normal(size=(cols, cols)) + rng.normal(size=(groups, cols)) * 3
    y = x.reshape(n, -1) @ rng.normal(size=(groups * cols, outputs * groups)) + rng.normal(size=outputs * groups)
    return x, y


def stream_of(x: Array, y: Array | None, *cuts: int, block: int = MomentStream.BLOCK) -> MomentStream:
    stream = MomentStream(x.shape[1], x.shape[2], 0 if y is None else y.shape[1])
    stream.BLOCK = block
    for part in np.split(np.arange(len(x)), sorted(cuts)):
        stream.add(x[part], None if y is None else y[part])
    return stream


def matrix_of(inputs: Covariance) -> FloatArray:
    values = inputs.values
    return np.asarray(values.swapaxes(1, 2) @ values / inputs.count) if inputs.factored else values


def close(actual: FloatArray, expected: FloatArray) -> None:
    scale = np.abs(expected).max(initial=1e-300)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10 * scale)


def check(moments: Moments, x: Array, y: Array) -> None:
    expected = Reference.of(x, y)
    assert moments.inputs.count == len(x)
    close(moments.inputs.mean, expected.mean)
    close(matrix_of(moments.inputs), expected.matrix)
    close(moments.target_mean, expected.target_mean)
    close(moments.target_variance, expected.target_variance)
    close(moments.cross, expected.cross)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 40),
    groups=st.integers(1, 3),
    cols=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    block=st.sampled_from([1, 5, 4096]),
)
def test_any_cut_into_batches(seed: int, n: int, groups: int, cols: int, cuts: list[int], block: int) -> None:
    x, y = rows(seed, n, groups, cols, 2)
    stream = stream_of(x, y, *(min(c, n) for c in cuts), block=block)
    assert stream.count == n
    check(stream.moments(), x, y)
    check(stream.moments(), x, y)  # asking changes nothing
    close(stream.covariance().mean, Reference.of(x, y).mean)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    blocks=st.lists(st.sampled_from([1, 4, 4096]), min_size=7, max_size=7),
    picks=st.lists(st.integers(0, 99), min_size=12, max_size=12),
)
def test_any_tree_of_merges(seed: int, sizes: list[int], blocks: list[int], picks: list[int]) -> None:
    n = sum(sizes)
    x, y = rows(seed, max(n, 1), 2, 3, 2)
    parts = np.split(np.arange(n), np.cumsum(sizes)[:-1])
    shards = []
    for part, block in zip(parts, blocks, strict=False):
        shards.append(stream_of(x[part], y[part], block=block))
    while len(shards) > 1:
        absorbed = shards.pop(picks.pop() % len(shards))
        shards[picks.pop() % len(shards)].merge(absorbed)
    if n:
        check(shards[0].moments(), x[:n], y[:n])
    else:
        assert shards[0].moments().inputs.count == 0


def test_merging_leaves_the_other_stream_alone() -> None:
    x, y = rows(0, 30, 1, 4, 2)
    first, second, total = stream_of(x[:10], y[:10], block=1), stream_of(x[10:], y[10:], block=1), MomentStream(1, 4, 2)
    for shard in (first, second):
        total.merge(shard)
    check(total.moments(), x, y)
    check(first.moments(), x[:10], y[:10])
    check(second.moments(), x[10:], y[10:])


def test_merging_empty_streams_and_empty_batches() -> None:
    x, y = rows(0, 20, 1, 4, 2)
    for block in (1, 4096):
        stream = stream_of(x, y, block=block)
        stream.merge(MomentStream(1, 4, 2))
        stream.add(x[:0], y[:0])
        check(stream.moments(), x, y)
        empty = MomentStream(1, 4, 2)
        empty.add(x[:0], y[:0])
        empty.merge(stream)
        check(empty.moments(), x, y)


def test_a_stream_that_saw_nothing() -> None:
    stream = MomentStream(2, 3, 4)
    stream.add(np.zeros((0, 2, 3)), np.zeros((0, 4)))
    moments = stream.moments()
    assert moments.inputs.count == 0
    assert not moments.inputs.mean.any()
    assert moments.cross.shape == (4, 3)


def test_a_stream_merged_with_itself_counts_twice() -> None:
    x, y = rows(0, 9, 1, 4, 2)
    for block in (1, 4096):
        stream = stream_of(x, y, block=block)
        stream.merge(stream)
        check(stream.moments(), np.concatenate([x, x]), np.concatenate([y, y]))


def test_rows_are_kept_while_they_are_fewer_than_columns() -> None:
    x, _ = rows(0, 8, 2, 8, 1)
    assert stream_of(x[:7], None).covariance().factored
    assert not stream_of(x, None).covariance().factored


def test_targets_may_be_left_out() -> None:
    x, _ = rows(1, 50, 2, 5, 1)
    inputs = stream_of(x, None, 20).covariance()
    close(matrix_of(inputs), Reference.of(x, np.zeros((50, 2))).matrix)
    assert stream_of(x, None).moments().cross.shape == (0, 5)


@pytest.mark.parametrize("n", [12, 20_000])
def test_no_cancellation_far_from_zero(n: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, 1, 24)) + 1e4).astype(np.float32)
    shards = [stream_of(part, None) for part in np.array_split(x, 4)]
    for shard in shards[1:]:
        shards[0].merge(shard)
    matrix = matrix_of(shards[0].covariance())
    close(matrix, Reference.of(x, np.zeros((n, 1))).matrix)
    eigenvalues = np.linalg.eigvalsh(matrix[0])
    assert eigenvalues[0] >= -1e-9 * eigenvalues[-1]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(1, 30), groups=st.integers(1, 3))
def test_both_forms_answer_alike(seed: int, n: int, groups: int) -> None:
    x, y = rows(seed, n, groups, 32, 3)
    factor = stream_of(x, y).covariance()
    matrix = Covariance(factor.count, factor.mean, matrix_of(factor), factored=False)
    weight = np.random.default_rng(seed).normal(size=(3 * groups, 32))
    assert factor.factored
    outputs = np.stack([x[:, r // 3] @ weight[r] for r in range(3 * groups)], axis=1)
    for inputs in (factor, matrix):
        close(inputs.means(weight), outputs.mean(axis=0))
        close(inputs.variances(weight), outputs.var(axis=0))
        expected = np.stack([weight[r] @ matrix_of(factor)[r // 3] for r in range(3 * groups)])
        close(inputs.apply(weight), expected)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), n=st.integers(2, 60), groups=st.integers(1, 3))
def test_distortion_is_the_mean_squared_error_over_rows(seed: int, n: int, groups: int) -> None:
    x, y = rows(seed, n, groups, 10, 2)
    rng = np.random.default_rng(seed)
    weight, shift = rng.normal(size=(2 * groups, 10)), rng.normal(size=2 * groups)
    given_outputs = np.stack([x[:, r // 2] @ weight[r] for r in range(2 * groups)], axis=1) + shift
    error = ((y - given_outputs) ** 2).mean(axis=0)
    np.testing.assert_allclose(stream_of(x, y).moments().distortion(weight, shift), error, rtol=1e-9)


@pytest.mark.parametrize("n", [5, 50])
def test_the_dense_target_is_the_weights_own_output(n: int) -> None:
    x, _ = rows(3, n, 2, 10, 2)
    weight = np.random.default_rng(1).normal(size=(4, 10))
    outputs = np.stack([x[:, r // 2] @ weight[r] for r in range(4)], axis=1)
    check(Moments.dense(stream_of(x, None).covariance(), weight), x, outputs)


def test_moments_of_some_outputs() -> None:
    x, y = rows(5, 40, 2, 6, 3)
    moments, shown = stream_of(x, y).moments(), np.array([0, 2, 3, 4])
    weight, shift = np.random.default_rng(2).normal(size=(6, 6)), np.arange(6.0)
    expected = moments.distortion(weight, shift)[shown]
    np.testing.assert_allclose(moments.only(shown).distortion(weight[shown], shift[shown]), expected, rtol=1e-12)


def test_rounding_leaves_no_negative_variance() -> None:
    inputs = Covariance(9, np.zeros((1, 2)), np.array([[[1.0, 1.0], [1.0, 1.0 - 1e-12]]]), factored=False)
    weight = np.array([[1.0, -1.0], [1.0, 1.0]])
    assert (weight @ inputs.gram[0] * weight).sum(axis=1)[0] < 0
    moments = Moments.dense(inputs, weight)
    for values in (inputs.variances(weight), moments.target_variance, moments.output_variance):
        assert values.tolist() == [0.0, pytest.approx(4.0)]
    assert (moments.distortion(0 * weight, np.zeros(2)) >= 0).all()
