"""How long models take, side by side: every round runs each of them once, so that whatever else the machine does meets them all.

A ratio is the median over the rounds of (first model's time / this model's time), which is steadier than the ratio of medians.
Random inputs; how far the outputs are from the first model's is the relative L2 error over all outputs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np

from relrep_onnx import kernels
from relrep_onnx.graph import check_external
from relrep_onnx.memory import has_room
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, ConfigError, Feeds, ModelError, Progress, TensorInfo, VerificationError

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """One model under one setting: median and quartiles in milliseconds, ratio to the first model and its quartiles."""

    model: str
    milliseconds: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    error: float


@dataclass(frozen=True)
class NodeTime:
    """Median microseconds of one node; fused nodes carry the runtime's own names."""

    node: str
    op: str
    microseconds: float


@dataclass(frozen=True)
class Setting:
    """All models with one number of threads and one batch size; profiles by model where asked for."""

    threads: int
    batch: int
    timings: tuple[Timing, ...]
    profiles: Mapping[str, tuple[NodeTime, ...]]


@dataclass(frozen=True)
class Plan:
    """What to measure; `shapes` fix inputs that the model leaves open beyond the batch."""

    threads: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 30
    profile: bool = False
    shapes: Mapping[str, tuple[int, ...]] | None = None
    seed: int = 0


def benchmark(models: Sequence[Path], plan: Plan, options: RuntimeOptions, progress: Progress) -> tuple[Setting, ...]:
    """Measures all models under every setting; the sparse kernels are loaded where they were built.

    Raises:
        ConfigError: no rounds, or an input whose shape is not known.
        ModelError: a model cannot be loaded, or has other inputs or outputs than the first.
    """
    if plan.rounds < 1:
        raise ConfigError(f"--rounds is {plan.rounds}; give at least 1")
    if kernels.available():
        options = options.with_library(kernels.library_path())
    for path in models:
        check_external(path)
    settings = [(threads, batch) for threads in plan.threads for batch in plan.batches]
    found = []
    for number, (threads, batch) in enumerate(settings):
        progress("benchmark", number, len(settings))
        found.append(_measure(models, plan, replace(options, threads=threads), batch))
    progress("benchmark", len(settings), len(settings))
    return tuple(found)


def require_same(settings: Sequence[Setting], most: float) -> None:
    """Refuses models whose outputs are farther from the first one's than `most`.

    Raises:
        VerificationError: naming the worst model and its error.
    """
    worst = max((timing for setting in settings for timing in setting.timings), key=lambda timing: timing.error)
    if not worst.error <= most:
        raise VerificationError(f"the outputs of {worst.model!r} differ by {worst.error:.3g} (relative L2), more than {most:.3g}")


def _measure(models: Sequence[Path], plan: Plan, options: RuntimeOptions, batch: int) -> Setting:
    sessions = [Session(path, options, what=repr(str(path))) for path in models]
    signatures = [([(i.name, i.type) for i in s.inputs], [o.name for o in s.outputs]) for s in sessions]
    for path, signature in zip(models, signatures, strict=True):
        if signature != signatures[0]:
            raise ModelError(
                f"{str(path)!r} has other inputs or outputs than {str(models[0])!r}; compare models of one interface"
            )
    feeds = random_feeds(sessions[0].inputs, batch, plan.shapes or {}, plan.seed)
    outputs = [session.run(feeds) for session in sessions]
    times = interleaved(sessions, feeds, plan.rounds)
    ratios = times[0] / times
    timings = []
    for index, path in enumerate(models):
        low, middle, high = np.percentile(times[index] * 1e3, [25, 50, 75])
        ratio_low, ratio, ratio_high = np.percentile(ratios[index], [25, 50, 75])
        error = relative_error(outputs[index], outputs[0])
        timings.append(
            Timing(
                str(path), float(middle), (float(low), float(high)), float(ratio), (float(ratio_low), float(ratio_high)), error
            )
        )
    profiles = {str(path): _profile(path, options, feeds) for path in models} if plan.profile else {}
    return Setting(options.threads, batch, tuple(timings), profiles)


class Runner(Protocol):
    """What can be timed: a session, or another engine's."""

    def run(self, feeds: Feeds) -> object:
        """Computes the outputs."""


def interleaved(sessions: Sequence[Runner], feeds: Feeds, rounds: int) -> Array:
    """Seconds of each run, float64[sessions, rounds], after a few rounds that do not count."""
    times = np.zeros((len(sessions), rounds))
    for round_ in range(-WARM_UP, rounds):
        for index, session in enumerate(sessions):
            started = time.perf_counter()
            session.run(feeds)
            if round_ >= 0:
                times[index, round_] = time.perf_counter() - started
    return times


def relative_error(outputs: Mapping[str, object], reference: Mapping[str, object]) -> float:
    """|y - r| / |r| over all outputs together; 0 where both are empty or zero, infinite where shapes or texts differ."""
    pairs = list(zip_longest(_tensors(outputs[name] for name in reference), _tensors(reference.values())))
    if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
        return float("inf")
    if any(b.dtype.kind not in "fiub" and (a != b).any() for a, b in pairs):
        return float("inf")
    numbers = [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs if b.dtype.kind in "fiub"]
    off = sum(float(np.sum((a - b) ** 2)) for a, b in numbers)
    size = sum(float(np.sum(b**2)) for _, b in numbers)
    return float(np.sqrt(off / size)) if size > 0 else float("inf") if off > 0 else 0.0


def _tensors(values: Iterable[object]) -> Iterator[Array]:
    """The tensors that outputs are made of: sequences are lists, maps dictionaries."""
    for value in values:
        if isinstance(value, dict):
            yield from (np.array(list(value)), np.array(list(value.values())))
        elif isinstance(value, list):
            yield from _tensors(value)
        else:
            yield np.asarray(value)


def random_feeds(inputs: Sequence[TensorInfo], batch: int, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Standard normal inputs, zeros for integers; an open first dimension is the batch.

    Raises:
        ConfigError: another dimension is open, the dtype is not numeric, or a shape is of no input or too large for the memory.
    """
    rng = np.random.default_rng(seed)
    if unknown := sorted(shapes.keys() - {info.name for info in inputs}):
        raise ConfigError(f"--input-shape names {unknown[0]!r}; the inputs are {', '.join(repr(info.name) for info in inputs)}")
    feeds = {}
    for info in inputs:
        shape = [size if isinstance(size, int) else None for size in shapes.get(info.name, info.shape)]
        if shape and not (info.shape and isinstance(info.shape[0], int)):
            shape[0] = batch
        if None in shape or info.dtype is None:
            raise ConfigError(f"the input {info.name!r} is {info.type}{list(info.shape)}; give --input-shape {info.name}:1,...")
        sizes = [size for size in shape if size is not None]
        if min(sizes, default=0) < 0 or not has_room(sizes):
            raise ConfigError(f"the input {info.name!r} of shape {sizes} does not fit into memory; give a smaller --input-shape")
        floating = np.issubdtype(info.dtype, np.floating)
        feeds[info.name] = rng.standard_normal(sizes).astype(info.dtype) if floating else np.zeros(sizes, info.dtype)
    return feeds


def _profile(path: Path, options: RuntimeOptions, feeds: Feeds) -> tuple[NodeTime, ...]:
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
        session = Session(path, options, what=repr(str(path)), profile=Path(folder) / "profile")
        for _ in range(2 * WARM_UP):
            session.run(feeds)
        return tuple(NodeTime(name, op, spent) for name, (op, spent) in session.end_profile().items())
