"""Exact, repeatable masks: every pattern against plain loops over its blocks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.masks import Pattern, magnitude, pattern_named, saliency_for, unit_row_magnitude
from relrep_onnx.types import BoolArray, ConfigError, Contraction, FloatArray, Layer, Window

UNSTRUCTURED = pattern_named("unstructured")
SELECTIVE = ["2:4", "1:4", "3:7", "1:2", "4:5"]
BLOCKS = ["4x1", "1x4", "2x2", "3x2", "5x1", "1x3"]
Place = tuple[int, int]


def layer_of(groups: int, per_group: int, channels: int, kernel: tuple[int, ...] = ()) -> Layer:
    rows, cols = groups * per_group, channels * math.prod(kernel)
    ones = (1,) * len(kernel)
    view = Window(kernel, ones, ones, (0, 0) * len(kernel)) if kernel else Contraction(-1)
    return Layer("a", "Conv" if kernel else "Gemm", "w", (rows, channels, *kernel), rows, cols, groups, view, ())


def flat(rows: int, cols: int) -> Layer:
    return layer_of(1, rows, cols)


LAYER = flat(2, 3)
PLAIN = flat(8, 16)
GROUPED = layer_of(2, 5, 7, (2, 2))


@st.composite
def layers(draw: Any) -> Layer:
    kernel = draw(st.sampled_from([(), (), (1,), (3,), (2, 2)]))
    return layer_of(draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 10)), kernel)


@st.composite
def scored_layers(draw: Any) -> tuple[Layer, FloatArray]:
    layer = draw(layers())
    rng, ties = np.random.default_rng(draw(st.integers(0, 9999))), draw(st.integers(1, 40))
    # Whole numbers: their sums of squares are exact, so that equal blocks tie in floating point as well.
    return layer, rng.integers(0, ties, endpoint=True, size=(layer.rows, layer.cols)).astype(np.float64)


def column(layer: Layer, channel: int, position: int) -> int:
    return channel * layer.kernel + position


def blocks_of(pattern: Pattern, layer: Layer) -> list[list[Place]]:
    """The places of every block: by group, then output channels, input channels, kernel position."""
    per_group = layer.rows // layer.groups
    found = []
    for group in range(layer.groups):
        for top in range(0, per_group, pattern.rows):
            for first in range(0, layer.channels, pattern.cols):
                for position in range(layer.kernel):
                    rows = range(top, min(top + pattern.rows, per_group))
                    channels = range(first, min(first + pattern.cols, layer.channels))
                    found.append([(group * per_group + r, column(layer, c, position)) for r in rows for c in channels])
    return found


def losses_of(pattern: Pattern, layer: Layer, scores: FloatArray) -> list[tuple[list[Place], Fraction]]:
    """What each block gives up, its lowest scores, and their mean square; blocks that give nothing are left out."""
    found = []
    for block in blocks_of(pattern, layer):
        given_up = sorted(block, key=lambda place: scores[place])[: max(0, len(block) - pattern.keep)]
        if given_up:
            found.append((given_up, Fraction(sum(int(scores[place]) ** 2 for place in given_up), len(given_up))))
    return found


def brute_mask(pattern: Pattern, layer: Layer, scores: FloatArray, zeros: int) -> BoolArray:
    """The cheapest blocks while they fit, then of every size, from the largest, the cheapest that still fit."""
    order = sorted(losses_of(pattern, layer, scores), key=lambda block: block[1])
    mask: BoolArray = np.ones((layer.rows, layer.cols), np.bool_)

    def take(places: list[Place]) -> int:
        for place in places:
            mask[place] = False
        return len(places)

    while order and len(order[0][0]) <= zeros:
        zeros -= take(order.pop(0)[0])
    for size in sorted({len(places) for places, _ in order}, reverse=True):
        for places, _ in order:
            if len(places) == size <= zeros:
                zeros -= take(places)
    return mask


def dropped(mask: BoolArray) -> int:
    return int((~mask).sum())


@st.composite
def scores_with_ties(draw: Any) -> FloatArray:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 3), min_size=rows * cols, max_size=rows * cols))
    return np.array(values, np.float64).reshape(rows, cols)


def unstructured(scores: FloatArray, zeros: int) -> BoolArray:
    return UNSTRUCTURED.mask(flat(*scores.shape), scores, zeros)


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


@pytest.mark.parametrize("name", ["unstructured", *SELECTIVE, *BLOCKS])
@settings(deadline=None, max_examples=25)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_masks_are_those_of_plain_loops(name: str, case: tuple[Layer, FloatArray], share: float) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    zeros = round(share * layer.size)
    mask = pattern.mask(layer, scores, zeros)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, brute_mask(pattern, layer, scores, zeros))


@pytest.mark.parametrize("name", ["unstructured", SELECTIVE[0], BLOCKS[0]])
@settings(deadline=None, max_examples=25)
@given(case=scored_layers(), shares=st.lists(st.floats(0, 1), max_size=5), seed=st.integers(0, 99))
def test_many_masks_at_once_are_those_of_one_at_a_time(
    name: str, case: tuple[Layer, FloatArray], shares: list[float], seed: int
) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    zeros = [round(share * layer.size) for share in [0.0, *shares, 1.0]]
    rows = np.flatnonzero(np.random.default_rng(seed).random(layer.rows) < 0.5)
    found = pattern.masks(layer, scores, zeros, rows)
    assert len(found) == len(zeros)
    for mask, count in zip(found, zeros, strict=True):
        np.testing.assert_array_equal(mask, pattern.mask(layer, scores, count)[rows])


@pytest.mark.parametrize("name", ["unstructured", *SELECTIVE, *BLOCKS])
@settings(deadline=None, max_examples=20)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_the_count_is_met_within_a_block(name: str, case: tuple[Layer, FloatArray], share: float) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    zeros = round(share * pattern.limit(layer))
    assert 0 <= zeros - dropped(pattern.mask(layer, scores, zeros)) < pattern.step
    assert dropped(pattern.mask(layer, scores, pattern.limit(layer))) == pattern.limit(layer)
    assert dropped(pattern.mask(layer, scores, 0)) == 0


@pytest.mark.parametrize(
    ("name", "layer", "limit"),
    [
        ("unstructured", GROUPED, 280),
        ("4x1", GROUPED, 280),
        ("2x2", GROUPED, 280),
        ("1x4", flat(3, 2), 6),  # narrower than a block: what is left of it
        ("2:4", PLAIN, 64),
        ("1:4", PLAIN, 96),
        ("2:4", GROUPED, 10 * 4 * (2 + 1)),  # a whole group and a tail of three channels
        ("1:4", GROUPED, 10 * 4 * (3 + 2)),
        ("3:7", GROUPED, 10 * 4 * 4),
        ("4:5", GROUPED, 10 * 4 * 1),  # a tail of two keeps both
        ("1:4", flat(5, 3), 0),
        ("2:4", layer_of(1, 4, 3, (3, 3)), 0),  # 27 columns, but three channels
        ("2:4", layer_of(8, 1, 1, (3,)), 0),
    ],
)
def test_the_limit(name: str, layer: Layer, limit: int) -> None:
    assert pattern_named(name).limit(layer) == limit
    assert (pattern_named(name).misfit(layer) is None) == (limit > 0)


@settings(deadline=None, max_examples=40)
@given(layer=layers(), name=st.sampled_from(["unstructured", *SELECTIVE, *BLOCKS]))
def test_the_limit_is_what_all_blocks_give_up(layer: Layer, name: str) -> None:
    pattern = pattern_named(name)
    given_up = sum(len(places) for places, _ in losses_of(pattern, layer, np.zeros((layer.rows, layer.cols))))
    assert pattern.limit(layer) == (given_up if not pattern.selective or layer.channels >= pattern.cols else 0)


def test_a_misfit_says_why() -> None:
    assert pattern_named("3:7").misfit(flat(9, 6)) == "the pattern 3:7 needs 7 input channels; it has 6"
    assert pattern_named("2:4").misfit(layer_of(2, 4, 3, (3, 3))) == "the pattern 2:4 needs 4 input channels; it has 3"


@pytest.mark.parametrize("name", SELECTIVE)
@settings(deadline=None, max_examples=20)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_groups_of_input_channels_keep_enough_and_pruned_ones_no_more(
    name: str, case: tuple[Layer, FloatArray], share: float
) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    limit = pattern.limit(layer)
    keep, width = (int(part) for part in name.split(":"))
    for zeros in (round(share * limit), limit):
        mask = pattern.mask(layer, scores, zeros)
        for row, position, first in itertools.product(
            range(layer.rows), range(layer.kernel), range(0, layer.channels, width) if limit else ()
        ):
            columns = [column(layer, c, position) for c in range(first, min(first + width, layer.channels))]
            survivors = int(mask[row, columns].sum())
            assert survivors in (min(keep, len(columns)), len(columns))
            if zeros == limit:
                assert survivors == min(keep, len(columns))
            if survivors < len(columns):
                gone, kept = scores[row, columns][~mask[row, columns]], scores[row, columns][mask[row, columns]]
                assert gone.max() <= kept.min()


@pytest.mark.parametrize("name", BLOCKS)
@settings(deadline=None, max_examples=20)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_blocks_go_whole(name: str, case: tuple[Layer, FloatArray], share: float) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    mask = pattern.mask(layer, scores, round(share * layer.size))
    for block in blocks_of(pattern, layer):
        assert len({bool(mask[place]) for place in block}) == 1


@pytest.mark.parametrize("name", [*SELECTIVE, *BLOCKS])
@settings(deadline=None, max_examples=20)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_no_block_is_pruned_before_a_cheaper_one_of_its_size(name: str, case: tuple[Layer, FloatArray], share: float) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    mask = pattern.mask(layer, scores, round(share * pattern.limit(layer)))
    losses = losses_of(pattern, layer, scores)
    for size in {len(places) for places, _ in losses}:
        pruned = [loss for places, loss in losses if len(places) == size and not mask[places[0]]]
        left = [loss for places, loss in losses if len(places) == size and mask[places[0]]]
        assert max(pruned, default=Fraction(0)) <= min(left, default=Fraction(10**9))


def zeros_at(mask: BoolArray) -> list[Place]:
    return [(int(r), int(c)) for r, c in np.argwhere(~mask)]


def test_rows_of_a_block_are_output_channels_and_columns_input_channels_at_one_kernel_position() -> None:
    layer = layer_of(2, 4, 4, (2,))  # columns: channel 0 at both positions, channel 1 at both, ...
    scores = np.full((8, 8), 5.0)
    scores[4:8, 3] = 0.0  # second group, channel 1, position 1
    assert zeros_at(pattern_named("4x1").mask(layer, scores, 4)) == [(4, 3), (5, 3), (6, 3), (7, 3)]
    scores[2, 0::2] = 0.0  # channels 0 to 3, position 0
    scores[4:8, 3] = 5.0
    assert zeros_at(pattern_named("1x4").mask(layer, scores, 4)) == [(2, 0), (2, 2), (2, 4), (2, 6)]
    assert zeros_at(pattern_named("2:4").mask(layer, scores, 2)) == [(2, 0), (2, 2)]
    scores[6:8, [5, 7]] = 0.0  # channels 2 and 3, position 1
    scores[2] = 5.0
    assert zeros_at(pattern_named("2x2").mask(layer, scores, 4)) == [(6, 5), (6, 7), (7, 5), (7, 7)]


def test_blocks_do_not_straddle_groups() -> None:
    layer = layer_of(2, 3, 4)
    scores = np.full((6, 4), 5.0)
    scores[2:4, 0] = 0.0  # the last row of one group, the first of the next
    mask = pattern_named("2x1").mask(layer, scores, 3)
    # The last row of three is a block of its own; rows 3 and 4 go together, mean square 12.5.
    assert zeros_at(mask) == [(2, 0), (3, 0), (4, 0)]
    assert zeros_at(pattern_named("2x1").mask(layer, scores, 1)) == [(2, 0)]


def test_a_block_costs_its_mean_square() -> None:
    scores = np.array([[3.0, 3.0, 0.0, 4.0, 1.0]])  # 9, 8, and 1 for the narrow one
    assert zeros_at(pattern_named("1x2").mask(flat(1, 5), scores, 3)) == [(0, 2), (0, 3), (0, 4)]
    assert zeros_at(pattern_named("1x2").mask(flat(1, 5), scores, 2)) == [(0, 4)]  # the next does not fit
    scores[0, 4] = 10.0
    assert zeros_at(pattern_named("1x2").mask(flat(1, 5), scores, 3)) == [(0, 2), (0, 3), (0, 4)]  # the dearest, but it fits
    # N:M counts only what goes: 1 and 2 of the first four, 0 and 3 of the others.
    scores = np.array([[9.0, 1.0, 2.0, 9.0, 4.0, 3.0, 0.0, 4.0]])
    assert zeros_at(pattern_named("2:4").mask(flat(1, 8), scores, 2)) == [(0, 1), (0, 2)]


def test_what_is_left_goes_to_the_largest_blocks_that_fit() -> None:
    # Four weights at 1, two on the right at 4, two below at 3, and a corner at 2.
    scores = np.array([[1.0, 1.0, 4.0], [1.0, 1.0, 4.0], [3.0, 3.0, 2.0]])
    whole, lower, corner = [(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)], [(2, 2)]
    expected = {1: corner, 2: lower, 3: lower + corner, 4: whole, 5: whole + corner, 6: whole + corner, 7: whole + lower + corner}
    for zeros, places in expected.items():
        assert zeros_at(pattern_named("2x2").mask(flat(3, 3), scores, zeros)) == sorted(places)


@pytest.mark.parametrize("name", ["unstructured", *SELECTIVE, *BLOCKS])
def test_ties_go_by_position(name: str) -> None:
    pattern = pattern_named(name)
    layer = layer_of(2, 2 * pattern.rows, 3 * pattern.cols, (2,))
    scores = np.ones((layer.rows, layer.cols))
    blocks = losses_of(pattern, layer, scores)
    for count in range(len(blocks) + 1):
        first = sorted(itertools.chain.from_iterable(places for places, _ in blocks[:count]))
        assert zeros_at(pattern.mask(layer, scores, count * pattern.step)) == first


@pytest.mark.parametrize("name", ["unstructured", *SELECTIVE, *BLOCKS])
@settings(deadline=None, max_examples=15)
@given(case=scored_layers(), share=st.floats(0, 1))
def test_masks_depend_on_nothing_but_the_scores(name: str, case: tuple[Layer, FloatArray], share: float) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    zeros, before = round(share * layer.size), scores.copy()
    mask = pattern.mask(layer, scores, zeros)
    np.testing.assert_array_equal(scores, before)
    for other in (scores.copy(), scores.astype(np.float32), np.asfortranarray(scores), 4 * scores):
        np.testing.assert_array_equal(pattern.mask(layer, other, zeros), mask)


@pytest.mark.parametrize(("name", "layer"), [("2:4", PLAIN), ("1:4", PLAIN), ("4x1", PLAIN), ("1x4", PLAIN), ("3:7", GROUPED)])
def test_masks_of_whole_blocks_are_nested(name: str, layer: Layer) -> None:
    pattern = pattern_named(name)
    scores = np.random.default_rng(0).integers(0, 5, (layer.rows, layer.cols)).astype(np.float64)
    masks = [pattern.mask(layer, scores, zeros) for zeros in range(pattern.limit(layer) + 1)]
    for zeros, (fewer, more) in enumerate(itertools.pairwise(masks)):
        assert not (more & ~fewer).any()
        assert dropped(fewer) == zeros // pattern.step * pattern.step


@pytest.mark.parametrize("name", ["unstructured", *SELECTIVE, *BLOCKS])
@settings(deadline=None, max_examples=20)
@given(case=scored_layers())
def test_pooled_scores_share_what_a_block_would_lose(name: str, case: tuple[Layer, FloatArray]) -> None:
    (layer, scores), pattern = case, pattern_named(name)
    expected = scores.copy()
    for places, loss in losses_of(pattern, layer, scores):
        for place in places:
            expected[place] = math.sqrt(loss)
    np.testing.assert_allclose(pattern.pooled(layer, scores), expected, rtol=1e-14)


def test_pooling_leaves_single_weights_as_they_are() -> None:
    scores = np.random.default_rng(0).random((8, 16))
    np.testing.assert_array_equal(UNSTRUCTURED.pooled(PLAIN, scores), scores)
    scores = np.array([[1.0, 9.0, 7.0, 9.0]])
    np.testing.assert_array_equal(pattern_named("2:4").pooled(flat(1, 4), scores), [[5.0, 9.0, 5.0, 9.0]])
    np.testing.assert_array_equal(pattern_named("1x2").pooled(flat(1, 4), scores), np.sqrt([[41.0, 41.0, 65.0, 65.0]]))


@pytest.mark.parametrize(
    ("name", "rows", "cols", "keep"),
    [
        ("unstructured", 1, 1, 0),
        ("2:4", 1, 4, 2),
        ("1:4", 1, 4, 1),
        ("3:7", 1, 7, 3),
        ("31:32", 1, 32, 31),
        ("4x1", 4, 1, 0),
        ("1x4", 1, 4, 0),
        ("2x2", 2, 2, 0),
        ("64x1", 64, 1, 0),
        ("64x64", 64, 64, 0),
    ],
)
def test_patterns_have_names(name: str, rows: int, cols: int, keep: int) -> None:
    pattern = pattern_named(name)
    assert pattern == Pattern(name, rows, cols, keep)
    assert pattern.step == rows * cols - keep
    assert pattern.selective == (":" in name)
    assert pattern.unstructured == (name == "unstructured")


@pytest.mark.parametrize(
    "name",
    [
        *("4:2", "4:4", "0:4", "1:33", "1:0", "1.5:4", "2:4:8", "2:4 ", "2:4\n", "2/4", ":4", "2:"),
        *("1x1", "0x4", "4x0", "65x1", "1x65", "1000x1", "-1x4", "2x", "x2", "2X2", "Unstructured", "foo", ""),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pattern_named(name)
    assert str(caught.value).startswith(
        f"the pattern is {name!r}; give unstructured, N:M with N < M <= 32 such as 2:4, or blocks"
    )


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
