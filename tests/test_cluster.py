"""A sweep on a local Dask cluster of two processes, whose workers are killed in the middle: the numbers of one process."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from relrep_onnx import Config, ConfigError, Grid, ModelError, sweep
from relrep_onnx.calibrate import DenseLayer, dense_pass
from relrep_onnx.cli import main
from relrep_onnx.graph import ModelSource
from relrep_onnx.job import Job, prepare, quiet
from relrep_onnx.sweeps.cluster import Cluster
from relrep_onnx.sweeps.trial import Task
from relrep_onnx.types import Array
from tests import models
from tests.test_pipeline import SMALL, inputs, small_net

distributed = pytest.importorskip("distributed", reason="a cluster needs distributed: pip install '.[dask]'")
BASE = dataclasses.replace(SMALL, sparsity=None, forms=("compact",), threads=1)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


class Killer:
    """A progress callback that kills a worker that holds results when a phase has come so far; another starts in its place."""

    def __init__(self, client: Any, phase: str, done: int) -> None:
        self.client, self.at, self.killed = client, (phase, done), 0

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        if (phase, done) == self.at:
            held = self.client.has_what()
            address = max(held, key=lambda worker: len(held[worker]))
            assert held[address]
            os.kill(self.client.run(os.getpid, workers=[address])[address], signal.SIGKILL)
            self.killed += 1


def shared_net() -> onnx.ModelProto:
    """A weight with two users, a residual sum, and a last batch that is smaller: x[N, 8, 6, 6] -> y[N, 8, 6, 6]."""
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["c"], pads=[1] * 4),
        node("Add", ["c", "b"], ["d"]),
        node("Transpose", ["d"], ["e"], perm=[0, 1, 3, 2]),
        node("Conv", ["d", "u"], ["f"], pads=[1] * 4),
        node("Conv", ["e", "u"], ["g"], pads=[1] * 4),
        node("Add", ["f", "g"], ["y"]),
    ]
    tensors = {name: models.random(seed, 8, 8, 3, 3) / 5 for seed, name in enumerate("wvu")}
    return models.build(nodes, {"x": ["N", 8, 6, 6]}, ["y"], tensors)


def job_of(model: ModelSource, data: Array) -> tuple[Job, Task]:
    config = dataclasses.replace(BASE, batch_size=10, positions=5)
    task = Task("point", model, data, None, config, Path(), None)
    return prepare(model, data, config, None, quiet), task


def same(a: DenseLayer, b: DenseLayer) -> None:
    assert (a.layer, a.macs, a.inputs.count) == (b.layer, b.macs, b.inputs.count)
    np.testing.assert_allclose(a.inputs.mean, b.inputs.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.inputs.gram, b.inputs.gram, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(a.targets.outputs, b.targets.outputs)
    np.testing.assert_array_equal(a.targets.ends, b.targets.ends)
    assert (a.targets.shortcut is None) == (b.targets.shortcut is None)
    if a.targets.shortcut is not None and b.targets.shortcut is not None:
        np.testing.assert_array_equal(a.targets.shortcut, b.targets.shortcut)


@pytest.mark.parametrize("model", [small_net(), shared_net()], ids=["small", "shared"])
def test_shards_show_what_one_process_sees(client: Any, model: onnx.ModelProto) -> None:
    job, task = job_of(model, inputs(95))
    alone = list(dense_pass(job.graph, job.layers, job.feeds(), job.settings))
    assert any(dense.targets.shortcut is not None for dense in alone)
    killer = Killer(client, "calibrate", 1)
    settings = dataclasses.replace(job.settings, progress=killer)
    spread = list(Cluster(client).dense_pass(task)(job.graph, job.layers, job.feeds(), settings))
    assert killer.killed == 1
    assert len(spread) == len(alone)
    for a, b in zip(alone, spread, strict=True):
        same(a, b)


def test_points_on_a_cluster_that_loses_a_worker(client: Any, tmp_path: Path) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", inputs())
    grid = Grid((0.5, 0.6, 0.7, 0.8), allocate=("uniform",), repair=("variance",))
    given = (tmp_path / "x.npy", grid, BASE)
    alone = sweep(tmp_path / "net.onnx", tmp_path / "alone", *given)
    killer = Killer(client, "sweep", 1)
    address = client.scheduler_info()["address"]
    spread = sweep(tmp_path / "net.onnx", tmp_path / "spread", *given, scheduler=address, progress=killer, pick="size min")
    assert killer.killed == 1
    for a, b in zip(alone.points, spread.points, strict=True):
        assert a.figures is not None
        assert b.figures is not None
        assert b.figures.error == pytest.approx(a.figures.error, rel=1e-6)
        assert b.figures.nonzeros == a.figures.nonzeros
    assert spread.picked == spread.points[-1]
    arguments = f"sweep {tmp_path}/net.onnx {tmp_path}/spread --calib {tmp_path}/x.npy --engine dask".split()
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 2
    assert "--scheduler ADDRESS go together" in told.output


def test_what_goes_wrong_is_said(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = client.scheduler_info()["address"]
    with pytest.raises(ConfigError, match="jobs counts processes of this machine"):
        sweep(small_net(), tmp_path, inputs(), Grid(), Config(forms=("onnx",)), jobs=2, scheduler=address)
    monkeypatch.setattr("relrep_onnx.sweeps.cluster.PATIENCE", 0.2)
    with pytest.raises(ModelError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        sweep(small_net(), tmp_path, inputs(), Grid(), BASE, scheduler="tcp://127.0.0.1:9")
