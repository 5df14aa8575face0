"""Walking networks over the calibration batches, a stage at a time, and measuring what reaches each layer.

All batches advance together: stage k runs on every batch before stage k + 1 begins, so a layer can be repaired in between with
statistics of all the data, and every node runs exactly once per batch however deep the network is.  Live tensors wait in memory,
past a limit on disk.  One layer's moments are held at a time.

Two walks, dense then sparse, sample the same positions: the dense network's outputs there are all that the sparse walk needs to
know of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final

import numpy as np

from relrep_onnx.graph import (
    BETWEEN,
    SPLIT,
    Graph,
    Stage,
    branch_scale,
    plan_stages,
    read_weight,
    serialized,
    stage_model,
    write_layer,
)
from relrep_onnx.memory import free_memory
from relrep_onnx.moments import Covariance, Moments, MomentStream
from relrep_onnx.patches import choose_positions, design_rows, macs, output_rows
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.store import TensorStore
from relrep_onnx.types import EXTREME, Array, CalibrationError, Feeds, FloatArray, Layer, Progress, RepairedLayer

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
    observe: Callable[[int], None] = lambda live: None  # told the bytes of live tensors, often


@dataclass(frozen=True, eq=False)
class Feeding:
    """The batches a network walks with: the first `fitted` calibrate, the others are held out.

    `samples` and `total` count the samples and batches of a whole pass, which these batches may only begin; or be a shard of,
    `first` batches after its start.
    """

    batches: Iterable[Feeds]
    fitted: int
    samples: int
    total: int
    first: int = 0


class Walk:
    """One network on its way through the stages."""

    def __init__(self, graph: Graph, stages: Sequence[Stage], batches: Iterable[Feeds], settings: WalkSettings) -> None:
        self._graph = graph
        self._stages = stages
        self._settings = settings
        self._types = dict(settings.input_types)
        self._store = TensorStore(settings.memory)
        needed = {name for stage in stages for name in (*stage.inputs, *stage.alive)}
        self._live: list[set[str]] = []  # by batch
        try:
            for feeds in batches:
                self._live.append(set())
                for name in feeds.keys() & needed:
                    self._keep(len(self._live) - 1, name, feeds[name])
        except BaseException:  # nobody can close what was never made
            self._store.close()
            raise

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store.close()

    @property
    def batches(self) -> int:
        """How many batches walk."""
        return len(self._live)

    def advance(self, number: int, repaired: Mapping[str, RepairedLayer], layers: Sequence[Layer]) -> None:
        """Runs one stage on every batch, with the layers repaired so far written into it."""
        stage = self._stages[number]
        session = self._session(number, repaired, layers) if stage.nodes else None
        for batch, live in enumerate(self._live):
            if session is not None:
                feeds = {name: self.activation(batch, name) for name in stage.inputs}
                for name, value in session.run(feeds, stage.outputs).items():
                    self._keep(batch, name, value)
            self._settings.observe(self._store.held)
            for name in live - stage.alive:
                self._store.drop((batch, name))
            live &= stage.alive

    def activation(self, batch: int, name: str) -> Array:
        """A live tensor of one batch."""
        return self._store.get((batch, name))

    def halt(self) -> tuple[list[Feeds], Mapping[str, str]]:
        """The live tensors of each batch and the types known so far: what another walk needs to go on from here."""
        return [{name: self.activation(n, name) for name in live} for n, live in enumerate(self._live)], self._types

    def _keep(self, batch: int, name: str, value: Array) -> None:
        self._store.put((batch, name), value)
        self._live[batch].add(name)

    def _session(self, number: int, repaired: Mapping[str, RepairedLayer], layers: Sequence[Layer]) -> Session:
        stage = self._stages[number]
        model = stage_model(self._graph, stage, self._types)
        here = {name for node in stage.nodes for name in node.output}
        for layer in layers:
            if layer.name in repaired and layer.uses[0].output in here:
                write_layer(model, layer, repaired[layer.name])
        content = serialized(model, BETWEEN, SPLIT)
        session = Session(content, self._settings.runtime, what=f"stage {number + 1} of the model")
        self._types.update(session.types())
        return session


@dataclass(frozen=True, eq=False)
class Targets:
    """What the dense network gives at the sampled positions, visit by visit, in the order in which any pass samples.

    `outputs` float32[positions, rows] are a layer's outputs without bias; `shortcut` of the same shape, where the layer ends a
    residual branch, is what the sum's other operand is there, in units of the layer's output.  `ends` int64[visits] say where the
    positions of each visit end.
    """

    outputs: FloatArray
    shortcut: FloatArray | None
    ends: Array

    def visit(self, number: int) -> slice:
        """The positions of one visit."""
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """What the dense network shows of one layer: moments of its inputs on the calibration samples; MACs per sample."""

    layer: Layer
    inputs: Covariance
    targets: Targets
    macs: int


@dataclass(frozen=True, eq=False)
class Seen:
    """What some batches show of one layer: moments, MACs, and by visit the outputs and what the shortcut is there."""

    stream: MomentStream
    work: int
    outputs: Mapping[int, FloatArray]
    shortcuts: Mapping[int, FloatArray | None]


def dense_pass(graph: Graph, layers: Sequence[Layer], feeds: Feeding, settings: WalkSettings) -> Iterator[DenseLayer]:
    """Walks the dense network, and yields what it shows of each layer."""
    stages = plan_stages(graph, layers)
    with Walk(graph, stages, feeds.batches, settings) as walk:
        for number, stage in enumerate(stages):
            settings.progress("calibrate", number, len(stages))
            walk.advance(number, {}, layers)
            for layer in stage.layers:
                yield join_shards(layer, [see(graph, layer, walk, feeds, settings)], feeds.samples)
        settings.progress("calibrate", len(stages), len(stages))


def see(graph: Graph, layer: Layer, walk: Walk, feeds: Feeding, settings: WalkSettings) -> Seen:
    """What the batches of a dense walk show of a layer that it has just reached."""
    stream, work = MomentStream(layer.groups, layer.cols), 0
    weight = read_weight(graph, layer).reshape(layer.groups, -1, layer.cols).swapaxes(1, 2)
    outputs, shortcuts = {}, {}
    for visit in _visits(graph, layer, walk, feeds, settings):
        rows = visit.rows()
        if visit.batch < feeds.fitted:
            stream.add(rows)
        y = rows.swapaxes(0, 1).astype(np.float64) @ weight  # [groups, n, rows / groups]
        outputs[visit.number] = y.swapaxes(0, 1).reshape(len(rows), layer.rows).astype(np.float32)
        shortcuts[visit.number] = visit.shortcut()
        work += macs(layer, visit.x.shape)
    return Seen(stream, work, outputs, shortcuts)


def join_shards(layer: Layer, shards: Sequence[Seen], samples: int) -> DenseLayer:
    """What all batches together show of a layer: moments add up, visits go in order."""
    first, *others = shards
    for other in others:
        first.stream.merge(other.stream)
    outputs = {number: y for shard in shards for number, y in shard.outputs.items()}
    shortcuts = {number: y for shard in shards for number, y in shard.shortcuts.items() if y is not None}
    order = sorted(outputs)
    targets = Targets(
        outputs=np.concatenate([outputs[number] for number in order]),
        shortcut=np.concatenate([shortcuts[number] for number in order]) if len(shortcuts) == len(order) else None,
        ends=np.cumsum([len(outputs[number]) for number in order]),
    )
    return DenseLayer(layer, first.stream.covariance(), targets, round(sum(shard.work for shard in shards) / samples))


def sequential_pass(
    graph: Graph,
    layers: Sequence[Layer],
    feeds: Feeding,
    settings: WalkSettings,
    targets: Callable[[Layer], Targets | None],
    repair: Callable[[Layer, FloatArray, Moments, Moments | None], RepairedLayer],
    *,
    sums: bool = False,
    known: Callable[[Layer], RepairedLayer | None] = lambda layer: None,
) -> dict[str, RepairedLayer]:
    """Repairs layers in order: each sees the inputs of the already repaired network and aims at the dense outputs.

    Args:
        graph: the dense model.
        layers: those of the dense pass.
        feeds: what the dense pass had, or its first batches.
        settings: how to walk, as in the dense pass.
        targets: what the dense pass gave for a layer; None where the layer stays as it is.
        repair: (layer, dense weight, moments, moments of the held-out batches if there are any) -> what the sparse network gets.
        sums: aim at the dense sum where a layer ends a residual branch, instead of at its own dense output.
        known: what an earlier run made of a layer, if anything: it is taken as it is.
    """
    stages = plan_stages(graph, layers)
    repaired: dict[str, RepairedLayer] = {}
    with Walk(graph, stages, feeds.batches, settings) as walk:
        for number, stage in enumerate(stages):
            settings.progress("repair", number, len(stages))
            walk.advance(number, repaired, layers)
            for layer in stage.layers:
                aims = targets(layer)
                if aims is None:
                    continue
                if (finished := known(layer)) is not None:
                    repaired[layer.name] = finished
                    continue
                fit, held_out = (MomentStream(layer.groups, layer.cols, layer.rows) for _ in range(2))
                outputs = MomentStream(1, 1, layer.rows)
                for visit in _visits(graph, layer, walk, feeds, settings):
                    rows, here = visit.rows(), aims.visit(visit.number)
                    y = aims.outputs[here]
                    if len(rows) != len(y):
                        continue  # one network took another branch, or made another shape, than the other did
                    if visit.batch < feeds.fitted:
                        outputs.add(np.zeros((len(y), 1, 1)), y)
                    now = visit.shortcut() if sums else None
                    if now is not None and aims.shortcut is not None:
                        y = _finite(layer, y + (aims.shortcut[here] - now))
                    (fit if visit.batch < feeds.fitted else held_out).add(rows, y)
                moments = replace(fit.moments(), output_variance=outputs.moments().target_variance)
                unseen = held_out.moments() if held_out.count else None
                repaired[layer.name] = repair(layer, read_weight(graph, layer), moments, unseen)
        settings.progress("repair", len(stages), len(stages))
    return repaired


@dataclass(frozen=True, eq=False)
class _Visit:
    """One input that a layer's user gets in one batch, the positions sampled from it, and what the user's sum adds there."""

    layer: Layer
    number: int
    batch: int
    x: FloatArray
    other: FloatArray | None
    positions: Array | None
    scale: FloatArray | None

    def rows(self) -> FloatArray:
        """The layer's inputs: [positions, groups, cols]; none where the batch took another branch."""
        if not self.x.size:
            return np.zeros((0, self.layer.groups, self.layer.cols), np.float32)
        return _finite(self.layer, design_rows(self.layer, self.x, self.positions))

    def shortcut(self) -> FloatArray | None:
        """What the sum adds, in units of the layer's output: float32[positions, rows]; None without, or where it broadcasts."""
        if self.other is None or self.scale is None:
            return None
        values = output_rows(self.layer, self.other, self.x.shape, self.positions)
        return None if values is None else (values / self.scale).astype(np.float32)


def _visits(graph: Graph, layer: Layer, walk: Walk, feeds: Feeding, settings: WalkSettings) -> Iterator[_Visit]:
    """Every input the layer's users get, in an order that all passes share."""
    limit = settings.positions
    if layer.cols > WIDE:
        limit = min(limit or WIDE_ROWS, max(1, WIDE_ROWS // feeds.samples))
    scale = None if layer.shortcut is None else branch_scale(graph, layer)
    for i, use in enumerate(layer.uses):
        for batch in range(feeds.first, feeds.first + walk.batches):
            x = walk.activation(batch - feeds.first, use.activation)
            other = None if layer.shortcut is None else walk.activation(batch - feeds.first, layer.shortcut)
            # The same positions in every pass over the same layer, however the passes are organised.
            rng = np.random.default_rng([settings.seed, zlib.crc32(use.output.encode()), batch])
            positions = choose_positions(layer, x.shape, limit, rng)
            yield _Visit(layer, i * feeds.total + batch, batch, x, other, positions, scale)


def _finite(layer: Layer, rows: FloatArray) -> FloatArray:
    if not (np.abs(rows) <= np.float32(EXTREME)).all():  # NaN too; float16 has no such number
        raise CalibrationError(
            f"layer {layer.name!r} gets NaN, infinity or numbers beyond {EXTREME:g} from the calibration data; check the data's "
            "scale, or exclude the layer"
        )
    return rows


def default_memory() -> int:
    """A quarter of the free memory in bytes."""
    return free_memory() // 4
