"""Walking networks over the calibration batches, a stage at a time, and measuring what reaches each layer.

All batches advance together: stage k runs on every batch before stage k + 1 begins, so a layer can be repaired in between with
statistics of all the data, and every node runs exactly once per batch however deep the network is.  Live tensors wait in memory,
past a limit on disk.  One layer's moments are held at a time.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from relrep_onnx.graph import Graph, Stage, plan_stages, read_weight, stage_model, write_layer
from relrep_onnx.moments import Covariance, Moments, MomentStream
from relrep_onnx.patches import choose_positions, design_rows, macs
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, CalibrationError, Feeds, FloatArray, Layer, Progress, RepairedLayer

WIDE: Final = 8192
WIDE_ROWS: Final = 4096
"""A layer with more than WIDE inputs keeps about WIDE_ROWS sampled rows instead of a Gram matrix of WIDE^2 numbers."""


@dataclass(frozen=True)
class WalkSettings:
    """How the data is walked: input types, sampled positions per sample (None: all), seed, bytes of live tensors in memory."""

    runtime: RuntimeOptions
    input_types: Mapping[str, str]
    positions: int | None
    seed: int
    memory: int
    progress: Progress
    observe: Callable[[int], None] = lambda live: None  # told the bytes of live tensors after each stage


class LiveTensors:
    """Tensors of every batch that later stages still read; past `limit` bytes they wait on disk."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self._values: dict[tuple[int, str], Array | Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def put(self, batch: int, name: str, value: Array) -> None:
        """Keeps one tensor."""
        if isinstance(value, np.ndarray) and self.held + value.nbytes > self._limit and not value.dtype.hasobject:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="relrep-")
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.npy"
            np.save(path, value, allow_pickle=False)
            self._values[batch, name] = path
            return
        self.held += getattr(value, "nbytes", 0)
        self._values[batch, name] = value

    def get(self, batch: int, name: str) -> Array:
        """Gives one tensor back."""
        value = self._values[batch, name]
        return np.load(value, allow_pickle=False) if isinstance(value, Path) else value

    def keep_only(self, names: frozenset[str]) -> None:
        """Forgets every other tensor."""
        for key in [key for key in self._values if key[1] not in names]:
            value = self._values.pop(key)
            if isinstance(value, Path):
                value.unlink()
            else:
                self.held -= getattr(value, "nbytes", 0)

    def close(self) -> None:
        """Forgets everything."""
        self.keep_only(frozenset())
        if self._folder is not None:
            self._folder.cleanup()


class Walk:
    """One network on its way through the stages."""

    def __init__(self, graph: Graph, stages: Sequence[Stage], batches: Iterable[Feeds], settings: WalkSettings) -> None:
        self._graph = graph
        self._stages = stages
        self._settings = settings
        self._types = dict(settings.input_types)
        self._live = LiveTensors(settings.memory)
        needed = {name for stage in stages for name in (*stage.inputs, *stage.alive)}
        self.batches = 0
        for feeds in batches:
            for name in feeds.keys() & needed:
                self._live.put(self.batches, name, feeds[name])
            self.batches += 1

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.close()

    def advance(self, number: int, repaired: Mapping[str, RepairedLayer], layers: Sequence[Layer]) -> None:
        """Runs one stage on every batch, with the layers repaired so far written into it."""
        stage = self._stages[number]
        if stage.nodes:
            model = stage_model(self._graph, stage, self._types)
            here = {name for position in stage.nodes for name in self._graph.model.graph.node[position].output}
            for layer in layers:
                if layer.name in repaired and layer.uses[0].output in here:
                    write_layer(model, layer, repaired[layer.name])
            session = Session(model.SerializeToString(), self._settings.runtime, what=f"stage {number + 1} of the model")
            self._types.update(session.types())
            for batch in range(self.batches):
                feeds = {name: self._live.get(batch, name) for name in stage.inputs}
                for name, value in session.run(feeds, stage.outputs).items():
                    self._live.put(batch, name, value)
        self._settings.observe(self._live.held)
        self._live.keep_only(stage.alive)

    def activation(self, batch: int, name: str) -> Array:
        """A live tensor of one batch."""
        return self._live.get(batch, name)


def dense_pass(
    graph: Graph, layers: Sequence[Layer], batches: Iterable[Feeds], samples: int, settings: WalkSettings
) -> Iterator[tuple[Layer, Covariance, int]]:
    """Yields each layer with the moments of its inputs in the dense network and its MACs per sample."""
    stages = plan_stages(graph, layers)
    with Walk(graph, stages, batches, settings) as walk:
        for number, stage in enumerate(stages):
            settings.progress("calibrate", number, len(stages))
            walk.advance(number, {}, layers)
            for layer in stage.layers:
                stream = MomentStream(layer.groups, layer.cols)
                work = 0
                for _, _, positions, x in _visits(layer, walk, samples, settings):
                    work += macs(layer, x.shape)
                    stream.add(_finite(layer, design_rows(layer, x, positions)))
                yield layer, stream.covariance(), round(work / samples)
        settings.progress("calibrate", len(stages), len(stages))


def sequential_pass(
    graph: Graph,
    layers: Sequence[Layer],
    batches: Sequence[Feeds],
    samples: int,
    settings: WalkSettings,
    repair: Callable[[Layer, FloatArray, Moments], RepairedLayer],
) -> dict[str, RepairedLayer]:
    """Repairs the layers in order: each sees the inputs of the already repaired network and aims at the dense outputs."""
    stages = plan_stages(graph, layers)
    repaired: dict[str, RepairedLayer] = {}
    with Walk(graph, stages, batches, settings) as dense, Walk(graph, stages, batches, settings) as sparse:
        for number, stage in enumerate(stages):
            settings.progress("repair", number, len(stages))
            dense.advance(number, {}, layers)
            sparse.advance(number, repaired, layers)
            for layer in stage.layers:
                weight = read_weight(graph, layer)
                grouped = weight.reshape(layer.groups, -1, layer.cols).swapaxes(1, 2)
                stream = MomentStream(layer.groups, layer.cols, layer.rows)
                for use, batch, positions, x in _visits(layer, sparse, samples, settings):
                    target = design_rows(layer, dense.activation(batch, use), positions)
                    y = target.swapaxes(0, 1).astype(np.float64) @ grouped  # [groups, n, rows / groups]
                    stream.add(_finite(layer, design_rows(layer, x, positions)), y.swapaxes(0, 1).reshape(len(target), -1))
                repaired[layer.name] = repair(layer, weight, stream.moments())
        settings.progress("repair", len(stages), len(stages))
    return repaired


def _visits(
    layer: Layer, walk: Walk, samples: int, settings: WalkSettings
) -> Iterator[tuple[str, int, Array | None, FloatArray]]:
    """Every input the layer's users get: (activation name, batch, sampled positions, activation)."""
    limit = settings.positions
    if layer.cols > WIDE:
        limit = min(limit or WIDE_ROWS, max(1, WIDE_ROWS // samples))
    for use in layer.uses:
        for batch in range(walk.batches):
            x = walk.activation(batch, use.activation)
            # The same positions in every pass over the same layer, however the passes are organised.
            rng = np.random.default_rng([settings.seed, zlib.crc32(use.output.encode()), batch])
            yield use.activation, batch, choose_positions(layer, x.shape, limit, rng), x


def _finite(layer: Layer, rows: FloatArray) -> FloatArray:
    if not np.isfinite(rows).all():
        raise CalibrationError(
            f"layer {layer.name!r} gets NaN or infinity from the calibration data; check the data's scale, or exclude the layer"
        )
    return rows


def default_memory() -> int:
    """A quarter of the free memory in bytes; 2 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError, AttributeError):
        return 2 << 30
