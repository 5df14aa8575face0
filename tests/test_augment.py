"""Augmented batches: what each kind may do, and that every value stays inside the data's range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relrep_onnx.augment import Augmenter, parse, possible
from relrep_onnx.types import ConfigError
from tests.models import random

KINDS = ("crop", "flip", "mixup")


def test_kinds_are_read_in_one_order() -> None:
    assert parse("mixup,crop") == ("crop", "mixup")
    assert parse("none") == ()
    assert parse("auto") is None


@pytest.mark.parametrize("text", ["cutout", "", "crop,,flip", "none,crop"])
def test_unknown_kinds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="augment"):
        parse(text)


@given(st.integers(0, 1000), st.sampled_from([KINDS, ("crop",), ("flip",), ("mixup",)]))
def test_values_stay_in_range_and_shapes_stay(seed: int, kinds: tuple[str, ...]) -> None:
    x = random(seed, 4, 3, 16, 9)
    given_x = x.copy()
    y = Augmenter(kinds, {"x": (2, 3)}).apply({"x": x}, np.random.default_rng(seed))["x"]
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    rounding = 1e-6 * np.abs(x).max()
    assert x.min() - rounding <= y.min()
    assert y.max() <= x.max() + rounding
    np.testing.assert_array_equal(x, given_x)  # the samples themselves are not touched


def test_flip_mirrors_some_images() -> None:
    x = random(0, 64, 1, 2, 5)
    y = Augmenter(("flip",), {"x": (2, 3)}).apply({"x": x}, np.random.default_rng(0))["x"]
    same = np.array([np.array_equal(a, b) for a, b in zip(x, y, strict=True)])
    turned = np.array([np.array_equal(a[..., ::-1], b) for a, b in zip(x, y, strict=True)])
    assert (same ^ turned).all()
    assert 16 < same.sum() < 48


def test_crop_moves_by_an_eighth_at_most() -> None:
    x = np.arange(16 * 16, dtype=np.float32).reshape(1, 16, 16, 1)
    places = set()
    for seed in range(200):
        y = Augmenter(("crop",), {"x": (1, 2)}).apply({"x": x}, np.random.default_rng(seed))["x"]
        places.add(tuple(int(v) for v in divmod(float(y[0, 8, 8, 0]), 16)))
    assert places == {(8 + i, 8 + j) for i in range(-2, 3) for j in range(-2, 3)}


def test_mixup_is_the_same_mix_for_every_input() -> None:
    x, y = random(0, 6, 3), random(1, 6, 2, 2)
    for seed in range(20):
        mixed = Augmenter(("mixup",), {}).apply({"x": x, "y": y}, np.random.default_rng(seed))
        if not np.array_equal(mixed["x"], x):
            break
    for row in range(6):
        # x' = l x + (1 - l) x_other: the other row and l are the same for both inputs.
        fits = []
        for other in range(6):
            gap = x[other] - x[row]
            share = float(gap @ (mixed["x"][row] - x[row]) / max(float(gap @ gap), 1e-30))
            near_x = np.allclose(x[row] + share * gap, mixed["x"][row], atol=1e-5)
            near_y = np.allclose(y[row] + share * (y[other] - y[row]), mixed["y"][row], atol=1e-5)
            fits.append(near_x and near_y)
        assert any(fits)


def test_what_is_possible_depends_on_the_inputs() -> None:
    floats, ints = random(0, 4, 3), np.zeros((4, 3), np.int64)
    assert possible({"x": floats}, {}) == ("mixup",)
    assert possible({"x": floats, "i": ints}, {}) == ()
    assert possible({"x": random(0, 4, 1, 8, 8)}, {"x": (2, 3)}) == KINDS
    assert possible({"x": random(0, 1, 1, 8, 8)}, {"x": (2, 3)}) == ("crop", "flip")
    assert possible({"x": floats, "y": random(1, 5, 3)}, {}) == ()
