"""Exact, nested, repeatable masks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.masks import PATTERNS, magnitude, saliency_for, unit_row_magnitude, unstructured
from relrep_onnx.types import Contraction, FloatArray, Layer

LAYER = Layer("a", "Gemm", "w", (2, 3), 2, 3, 1, Contraction(-1), ())


@st.composite
def scores_with_ties(draw: Any) -> FloatArray:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 3), min_size=rows * cols, max_size=rows * cols))
    return np.array(values, np.float64).reshape(rows, cols)


@settings(deadline=None, max_examples=80)
@given(scores=scores_with_ties(), share=st.floats(0, 1))
def test_the_lowest_scores_go_and_the_count_is_exact(scores: FloatArray, share: float) -> None:
    zeros = round(share * scores.size)
    mask = unstructured(scores, zeros)
    assert mask.shape == scores.shape
    assert mask.dtype == np.bool_
    assert int((~mask).sum()) == zeros
    # Python's sort is stable: among equal scores the first goes.
    order = sorted(range(scores.size), key=lambda i: scores.reshape(-1)[i])
    assert set(np.flatnonzero(~mask)) == set(order[:zeros])
    np.testing.assert_array_equal(unstructured(scores.copy(), zeros), mask)


@settings(deadline=None, max_examples=30)
@given(scores=scores_with_ties())
def test_masks_are_nested(scores: FloatArray) -> None:
    masks = [unstructured(scores, zeros) for zeros in range(scores.size + 1)]
    assert masks[0].all()
    assert not masks[-1].any()
    for fewer, more in itertools.pairwise(masks):
        assert not (more & ~fewer).any()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), present=st.integers(0, 20))
def test_zeros_go_first(seed: int, present: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=20)
    weight[rng.permutation(20)[:present]] = 0.0
    weight = weight.reshape(4, 5)
    for saliency in (magnitude, unit_row_magnitude):
        mask = unstructured(saliency(weight), present)
        np.testing.assert_array_equal(mask, weight != 0)


def test_the_only_pattern_is_unstructured() -> None:
    assert PATTERNS["unstructured"] is unstructured


def test_magnitude() -> None:
    np.testing.assert_array_equal(magnitude(np.array([[-2.0, 0.0, 1.5]])), [[2.0, 0.0, 1.5]])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), scale=st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3))
def test_unit_rows_ignore_the_scale_of_rows(seed: int, scale: list[float]) -> None:
    weight = np.random.default_rng(seed).normal(size=(3, 7))
    scores = unit_row_magnitude(weight)
    np.testing.assert_allclose(unit_row_magnitude(weight * np.array(scale)[:, None]), scores, rtol=1e-12)
    np.testing.assert_allclose((scores**2).sum(axis=1), 1.0, rtol=1e-12)


def test_unit_rows_keep_an_empty_row_at_zero() -> None:
    np.testing.assert_array_equal(unit_row_magnitude(np.array([[0.0, 0.0], [3.0, -4.0]])), [[0, 0], [0.6, 0.8]])


def test_saliency_follows_batch_normalization() -> None:
    normalized = dataclasses.replace(LAYER, normalized=True)
    assert saliency_for([LAYER, LAYER]) is unit_row_magnitude
    assert saliency_for([LAYER, normalized]) is magnitude
    assert saliency_for([]) is unit_row_magnitude
