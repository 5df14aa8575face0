"""Adam against a plain float64 version, and the schedule's shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relrep_onnx.adam import BETAS, EPSILON, FIRST, LAST, WARMUP, Buffers, one_cycle
from tests.models import random


def test_steps_follow_the_paper() -> None:
    start = random(0, 3, 4)
    buffers = Buffers({"w": start}, [], {"w": 2.0})
    values, mean, square = start.astype(np.float64), np.zeros((3, 4)), np.zeros((3, 4))
    for number in range(1, 6):
        gradient = random(number, 3, 4)
        buffers.views(buffers.gradients)["w"][...] = gradient
        buffers.step(0.1)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.astype(np.float64) ** 2
        corrected = (mean / (1 - BETAS[0] ** number)) / (np.sqrt(square / (1 - BETAS[1] ** number)) + EPSILON)
        values = values - 2.0 * 0.1 * corrected
    np.testing.assert_allclose(buffers.views(buffers.values)["w"], values, rtol=1e-5, atol=1e-6)


def test_zeros_of_masked_tensors_have_no_mask() -> None:
    buffers = Buffers({"w": np.array([[0.0, 2.0]]), "b": np.array([0.0, 1.0])}, ["w"], {"w": 1.0, "b": 1.0})
    assert buffers.mask.tolist() == [0, 1, 1, 1]


def test_restart_forgets() -> None:
    buffers = Buffers({"w": np.ones(2)}, [], {"w": 1.0})
    buffers.gradients[...] = 1
    buffers.step(0.5)
    buffers.restart(np.array([3.0, 4.0], np.float32))
    assert buffers.values.tolist() == [3, 4]
    assert not buffers.mean.any()
    assert not buffers.square.any()
    buffers.step(0.5)  # bias correction starts anew: the first step has the length of the rate
    np.testing.assert_allclose(buffers.values, [2.5, 3.5], rtol=1e-5)


def test_views_are_the_arrays_themselves() -> None:
    buffers = Buffers({"a": np.zeros((2, 2)), "b": np.zeros(3)}, [], {"a": 1.0, "b": 1.0})
    buffers.views(buffers.values)["b"][1] = 7
    assert buffers.values.tolist() == [0, 0, 0, 0, 0, 7, 0]


@given(st.floats(0, 1))
def test_schedule_stays_between_its_ends(share: float) -> None:
    assert min(FIRST, LAST) - 1e-12 <= one_cycle(share) <= 1


def test_schedule_rises_and_falls() -> None:
    assert one_cycle(0) == pytest.approx(FIRST)
    assert one_cycle(WARMUP) == pytest.approx(1)
    assert one_cycle(1) == pytest.approx(LAST)
    shares = np.linspace(0, 1, 101)
    rates = [one_cycle(s) for s in shares]
    assert int(np.argmax(rates)) == math.ceil(WARMUP * 100)
