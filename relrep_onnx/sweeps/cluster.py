"""A sweep on a Dask cluster that is already there: points spread over the workers, and the dense pass too, in shards of batches.

A shard is a chain of tasks, one for each stage, and what it shows of a layer is a task beside it.  At each stage all shards
meet: moments are sums, so they are merged here, and only then the next stage begins.  No task changes what it was given, so what
is lost with a worker is computed again from the model and the data.  Workers must see the sweep's folder, the model and the data
under the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from onnx import ModelProto

from relrep_onnx.calibrate import DenseLayer, Feeding, Seen, Walk, WalkSettings, join_shards, see
from relrep_onnx.graph import Graph, plan_stages
from relrep_onnx.job import prepare, quiet
from relrep_onnx.statistics import DensePass
from relrep_onnx.sweeps.trial import Outcome, Task, attempt
from relrep_onnx.types import ConfigError, Layer, ModelError

if TYPE_CHECKING:
    from distributed import Client

PATIENCE: Final = 10.0
"""Seconds to wait for the scheduler."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Some batches on their way through the dense network: their live tensors after a stage, and all that the next one needs."""

    model: ModelProto
    layers: Sequence[Layer]
    settings: WalkSettings
    feeds: Feeding

    @classmethod
    def of(cls, task: Task, number: int, shards: int) -> Shard:
        """The batches before the first stage."""
        job = prepare(task.model, task.calib, task.config, task.holdout, quiet)
        feeds = job.feeds()
        first, end = (feeds.total * n // shards for n in (number, number + 1))
        batches = [batch for n, batch in enumerate(feeds.batches) if first <= n < end]
        return cls(job.graph.model, job.layers, job.settings, replace(feeds, batches=batches, first=first))

    def advanced(self, stage: int) -> Shard:
        """After one more stage."""
        with self._walk() as walk:
            walk.advance(stage, {}, self.layers)
            batches, types = walk.halt()
        return replace(self, settings=replace(self.settings, input_types=types), feeds=replace(self.feeds, batches=batches))

    def seen(self, name: str) -> Seen:
        """What the batches show of a layer."""
        layer = next(layer for layer in self.layers if layer.name == name)
        with self._walk() as walk:
            return see(Graph(self.model), layer, walk, self.feeds, self.settings)

    def _walk(self) -> Walk:
        graph = Graph(self.model)
        return Walk(graph, plan_stages(graph, self.layers), self.feeds.batches, self.settings)


class Cluster:
    """A connection; `run` is an engine."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Points on whatever worker is free; those of a worker that dies go to another."""
        from distributed import as_completed

        futures = self._client.map(attempt, tasks, pure=False)
        known = {future.key: task for future, task in zip(futures, tasks, strict=True)}
        for future in as_completed(futures, loop=self._client.loop):
            error = future.exception()
            yield known[future.key], future.result() if error is None else f"{type(error).__name__} on the cluster: {error}"

    def dense_pass(self, task: Task) -> DensePass:
        """The dense pass over the task's data, in one shard for each thread of the cluster."""

        def walk(graph: Graph, layers: Sequence[Layer], feeds: Feeding, settings: WalkSettings) -> Iterator[DenseLayer]:
            submit, stages = self._client.submit, plan_stages(graph, layers)
            count = max(1, min(feeds.total, sum(self._client.nthreads().values())))
            shards = [submit(Shard.of, task, number, count, pure=False) for number in range(count)]
            for number, stage in enumerate(stages):
                settings.progress("calibrate", number, len(stages))
                shards = [submit(Shard.advanced, shard, number, pure=False) for shard in shards]
                for layer in stage.layers:
                    parts = self._client.gather([submit(Shard.seen, shard, layer.name, pure=False) for shard in shards])
                    yield join_shards(layer, parts, feeds.samples)
            settings.progress("calibrate", len(stages), len(stages))

        return walk


@contextmanager
def connected(scheduler: str) -> Iterator[Cluster]:
    """A cluster by its scheduler's address.

    Raises:
        ConfigError: Dask is missing.
        ModelError: nobody answers at the address, or there are no workers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError("--engine dask needs distributed: pip install 'relrep-onnx[dask]'") from error
    try:
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error
    with client:
        if not client.nthreads():
            raise ModelError(f"the Dask scheduler {scheduler!r} has no workers; start some")
        yield Cluster(client)
