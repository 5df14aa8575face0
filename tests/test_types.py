"""The vocabulary: what it accepts, and what it derives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from relrep_onnx import types
from relrep_onnx.types import Budget, ConfigError, Contraction, Layer, RelRepError, TensorInfo


@pytest.mark.parametrize(
    ("spelled", "dtype"),
    [
        ("tensor(float)", np.float32),
        ("tensor(double)", np.float64),
        ("tensor(float16)", np.float16),
        ("tensor(int64)", np.int64),
        ("tensor(uint8)", np.uint8),
        ("tensor(bool)", np.bool_),
    ],
)
def test_tensor_types(spelled: str, dtype: type[np.generic]) -> None:
    assert TensorInfo("x", spelled, ("N", None, 3)).dtype == np.dtype(dtype)


@pytest.mark.parametrize("spelled", ["tensor(string)", "seq(tensor(float))", "optional(tensor(float))", "sparse_tensor(float)"])
def test_what_is_no_numeric_tensor_has_no_dtype(spelled: str) -> None:
    assert TensorInfo("x", spelled, ()).dtype is None


def test_a_layer_knows_its_size_and_does_not_change() -> None:
    layer = Layer("a", "Gemm", "w", (3, 4), 3, 4, 1, Contraction(-1), ())
    assert layer.size == 12
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.rows = 5  # type: ignore[misc]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, 80.0])
def test_a_budget_holds_fractions(value: float) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": value}, "the sparsity is"),
        ({"sparsity": 0.5, "floor": value}, "the minimum layer sparsity is"),
        ({"sparsity": 0.5, "ceiling": value}, "the maximum layer sparsity is"),
        ({"sparsity": 0.5, "layers": {"a": value}}, "the sparsity of layer 'a' is"),
    ]
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=message):
            Budget(**wrong)


def test_a_budgets_bounds_and_unit() -> None:
    assert Budget(0.0).ceiling == Budget(1.0, floor=1.0).floor == 1.0
    with pytest.raises(ConfigError, match=r"minimum layer sparsity 0\.6 is above the maximum 0\.5"):
        Budget(0.5, floor=0.6, ceiling=0.5)
    with pytest.raises(ConfigError, match="must be 'weights', 'macs' or 'latency'"):
        Budget(0.5, "flops")  # type: ignore[arg-type]


def test_every_error_is_one_of_ours() -> None:
    errors = {name for name, kind in vars(types).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert errors == {
        "RelRepError",
        "ModelError",
        "CalibrationError",
        "BudgetError",
        "VerificationError",
        "ConfigError",
    }
    assert all(issubclass(getattr(types, name), RelRepError) for name in errors)
