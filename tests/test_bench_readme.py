"""README's table: every row of a small network is made, measured and timed; parts come together."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import pytest

from relrep_onnx import kernels
from relrep_onnx.types import Array
from tests.test_pipeline import inputs, small_net
from tools.bench import peer, readme
from tools.bench.data import Task, infer, open_session, write_json
from tools.bench.readme import NETWORKS, ROWS, Network, Row, describe, merged, parse, run

OWN = [row for row in ROWS if row != peer.PEER]


def options(*arguments: str) -> argparse.Namespace:
    return parse([*arguments, "--networks", "fashion", "--rounds", "1"])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Array:
    """A small network in place of the sample, labelled by its own answers; its test samples."""
    onnx.save(small_net(), tmp_path / "net.onnx")
    x = inputs(64, seed=3)
    labels = infer(open_session(tmp_path / "net.onnx", 1), x).argmax(axis=1)
    task = Task("net", tmp_path / "net.onnx", (inputs(),), x, x, labels)
    monkeypatch.setattr(readme, "TASKS", {"fashion": lambda folder, count: task})
    small = Network("small", 0.5, 1, MappingProxyType({"min_size": 64, "allocate": "lamp"}))
    monkeypatch.setattr(readme, "NETWORKS", {**NETWORKS, "fashion": small})
    return x


def test_every_row_is_made_and_measured(small: Array, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    rows = run("fashion", options("--rows", ",".join(OWN)), tmp_path / "kept")
    assert [row.row for row in rows] == OWN
    found = {row.row: row for row in rows}
    assert found["dense"].top1 == 1.0
    assert found["refined compact"].top1 == found["refined"].top1
    sparse = onnx.load(tmp_path / "kept" / "net.sparse.onnx")
    zeros = sum(int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in sparse.graph.initializer if len(t.dims) == 4)
    assert zeros > 0.4 * (16 * 8 * 9 + 16 * 16 * 9)
    assert found["dense int8"].file_bytes < 0.6 * found["dense"].file_bytes
    assert {row.dense_bytes for row in rows} == {(tmp_path / "net.onnx").stat().st_size}
    assert all(row.ms is not None and row.load is not None for row in rows)
    timed = {row.row for row in rows if row.sparse_ms is not None}
    assert timed == (set(readme.FLOATS) if kernels.available() else set())


def test_models_that_are_there_are_taken(small: Array, tmp_path: Path) -> None:
    other = small_net(seed=9)
    onnx.save(other, tmp_path / "net.sparse.onnx")
    dense, sparse = run("fashion", options("--rows", "dense,sparse", "--no-latency"), tmp_path)
    agreement = np.mean(
        infer(open_session(other, 1), small).argmax(axis=1) == infer(open_session(small_net(), 1), small).argmax(axis=1)
    )
    assert dense.top1 == 1.0
    assert sparse.top1 == pytest.approx(float(agreement))
    assert (dense.ms, sparse.sparsity) == (None, 0.5)


def test_parts_come_together_and_the_last_one_counts(tmp_path: Path) -> None:
    first = [Row("fashion", "sparse", 0.9, 5, 10, 0.5), Row("fashion", "dense", 0.0, 10, 10, 0.6, ms=1.0, load=99.0)]
    second = [Row("resnet20_bn", "dense", 0.0, 20, 20, 0.7), Row("fashion", "sparse", 0.9, 6, 10, 0.4)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, rows in zip(files, (first, second), strict=True):
        write_json(file, {"rows": [dataclasses.asdict(row) for row in rows]})
    together = merged(files, [])
    assert together == [second[0], first[1], second[1]]
    assert together[2].cells() == ["the sample", "0.9", "sparse", "6", "60.0", "40.0", "", ""]
    assert "busy machine (load 99.0" in describe(parse([]), together)
    assert "busy" not in describe(parse([]), [second[1]])
