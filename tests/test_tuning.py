"""Tuning with a made-up clock: the proposals, the winner, and dense where nothing wins."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from relrep_onnx.export.tuning import tune
from relrep_onnx.types import Array
from tests.test_sparse_ort import operators, wide_network


def sparse_layers(model: ModelProto) -> int:
    return sum(op.startswith("Sparse") for op in operators(model))


def test_the_fastest_file_wins() -> None:
    raced: list[int] = []

    def race(files: list[ModelProto]) -> Array:
        raced.extend(map(sparse_layers, files))
        return np.array([[5.0 - sparse_layers(file)] * 3 for file in files])

    tuned = tune(wide_network(0.1), race, instruction_set="avx2")
    assert raced[0] == 0
    assert sparse_layers(tuned.model) == len(tuned.layers) == 3
    assert tuned.ratio == 2.5


def test_the_dense_model_stays_where_nothing_wins() -> None:
    model = wide_network(0.1)

    def race(files: list[ModelProto]) -> Array:
        return np.array([[1.0 if sparse_layers(file) == 0 else 0.98] * 3 for file in files])

    tuned = tune(model, race, instruction_set="avx2")
    assert tuned.model is model
    assert (tuned.layers, tuned.ratio) == ((), 1.0)


def test_a_dense_model_has_a_race_of_its_own() -> None:
    tuned = tune(wide_network(1.0), lambda files: np.ones((len(files), 2)), instruction_set="avx2")
    assert tuned.layers == ()
