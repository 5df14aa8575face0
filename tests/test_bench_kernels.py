"""The parts of `tools/bench/kernels.py` that compute something."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from relrep_onnx import kernels
from tests.models import random
from tools.bench.kernels import compare, non_negative, single_layer
from tools.bench.networks import NETWORKS, prune

PARAMETERS = {"resnet18": 11.7e6, "resnet20": 0.27e6, "mobilenetv2": 3.5e6}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_published_sizes(name: str) -> None:
    model = NETWORKS[name]()
    onnx.checker.check_model(model, full_check=True)
    assert sum(numpy_helper.to_array(t).size for t in model.graph.initializer) == pytest.approx(PARAMETERS[name], rel=0.03)


@pytest.mark.parametrize("block", [1, 4])
def test_every_layer_gets_its_sparsity(block: int) -> None:
    pruned = prune(NETWORKS["mobilenetv2"](), 0.9, block=block)
    depthwise = 0
    for tensor in pruned.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim == 4 and weight.shape[1] == 1:
            depthwise += 1
            assert np.count_nonzero(weight) == weight.size
        elif weight.ndim >= 2:
            assert np.count_nonzero(weight) / weight.size == pytest.approx(0.1, abs=0.01)
            if block == 4:
                matrix = (weight != 0).reshape(-1, 4, weight[0].size)
                assert np.array_equal(matrix.any(axis=1), matrix.all(axis=1))
    assert depthwise == 17


def test_non_negative_least_squares() -> None:
    rows = np.abs(random(1, 30, 3)).astype(np.float64)
    assert non_negative(rows, rows @ [1.0, 0.0, 2.0]) == pytest.approx([1, 0, 2], abs=1e-9)
    found = non_negative(rows, rows @ [1.0, -0.5, 2.0])
    assert (found >= 0).all()
    assert found[1] == 0


@pytest.mark.skipif(not kernels.available(), reason="the sparse kernels were not built: no compiler at install")
def test_rows_of_the_table() -> None:
    model = NETWORKS["resnet20"]()
    rows = list(compare("resnet20", model, random(1, 1, 3, 32, 32), 1, 2, [0.9]))
    assert [row.pattern for row in rows] == ["unstructured", "4x1"]
    assert all(row.error < 1e-4 and row.file_share < 0.27 for row in rows)
    assert single_layer("product", random(1, 6, 4), size=3)[1]["input"].shape == (3, 4)
