"""Dense against sparse on held-out samples, through plain sessions of the files themselves, and the gates.

    relative L2 = |ys - yd| / |yd|        cosine = ys . yd / (|ys| |yd|)        over all samples of one output
Top-1 agreement is reported for outputs that look like classes: one axis besides the samples' has more than one element.
"""

from __future__ import annotations

import gzip
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from relrep_onnx.runtime import Session
from relrep_onnx.types import Array, CalibrationError, ConfigError, Feeds, ModelError, VerificationError

HUGE: Final = 1 << 28
"""Bytes of a file beyond which gzip would take minutes: its size after gzip is estimated,"""
SAMPLED: Final = 1 << 26
"""from about so many of them,"""
PIECE: Final = 1 << 20
"""so many at a time."""

DIGITS: Final = 12
"""Of a drop that count."""

Metric = Callable[[Any], float]
"""The user's own measure: called with an onnxruntime.InferenceSession, larger is better."""


@dataclass(frozen=True)
class OutputFidelity:
    """How far one output of the sparse model is from the dense one's."""

    output: str
    relative_l2: float
    cosine: float
    worst_sample: int
    worst_relative_l2: float
    top1_agreement: float | None


@dataclass(frozen=True)
class Fidelity:
    """All floating-point outputs on `samples` held-out samples."""

    samples: int
    outputs: tuple[OutputFidelity, ...]

    @property
    def relative_l2(self) -> float:
        """The worst output's relative L2."""
        return float(np.max([o.relative_l2 for o in self.outputs], initial=0.0))  # NaN stays NaN

    @property
    def mean_relative_l2(self) -> float:
        """All outputs together, each scaled by its own energy: the root mean square of their relative L2."""
        return math.sqrt(sum(o.relative_l2**2 for o in self.outputs) / max(1, len(self.outputs)))

    @property
    def top1_agreement(self) -> float | None:
        """The worst class-like output's agreement; None where no output looks like classes."""
        return min((o.top1_agreement for o in self.outputs if o.top1_agreement is not None), default=None)


@dataclass(frozen=True)
class Gates:
    """Limits the written model must keep; None means not asked for."""

    max_error: float | None = None
    min_agreement: float | None = None
    min_metric: float | None = None
    max_bytes: int | None = None

    def check_resolution(self, samples: int, option: str = "--holdout") -> None:
        """Refuses an agreement that this many samples cannot tell from 1; `option` would give more of them.

        Raises:
            ConfigError: the gate lies between 1 - 1/samples and 1.
        """
        if self.min_agreement is not None and samples and 1 - 1 / samples < self.min_agreement < 1:
            raise ConfigError(
                f"--min-agreement {self.min_agreement:g} is finer than {samples} samples resolve (steps of "
                f"{1 / samples:.4g}); give more samples ({option}), or ask for 1 or at most {1 - 1 / samples:.4g}"
            )


@dataclass(frozen=True)
class Limit:
    """How far a model may drop: `error` in relative L2 of the worst output, `top1` in agreement, `eval` in the user's metric."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Reads `0.1` (relative L2), `top1:5%` or `eval:0.01`.

        Raises:
            ConfigError: none of these.
        """
        kind, _, number = text.rpartition(":")
        share = number.endswith("%")
        try:
            value = float(number.removesuffix("%")) / (100 if share else 1)
        except ValueError:
            value = math.nan
        if kind not in ("", "top1", "eval") or not 0 < value < math.inf or (kind == "top1" and value >= 1):
            raise ConfigError(f"--max-drop is {text!r}; give a relative L2 error such as 0.1, or top1:5%, or eval:0.01")
        return cls(kind or "error", value)

    def check_resolution(self, samples: int) -> None:
        """Refuses a drop in agreement that this many samples cannot tell from none.

        Raises:
            ConfigError: it is less than one sample.
        """
        if self.kind == "top1" and self.value * samples < 1:
            raise ConfigError(
                f"--max-drop top1:{self.value:.4g} is finer than {samples} deciding samples resolve (steps of "
                f"{1 / samples:.4g}); give more samples (--holdout), or allow more"
            )

    def drop(self, fidelity: Fidelity, before: float | None, after: float | None) -> float:
        """What a model lost, to be held against `value`, without the rounding of 1 - 0.95; NaN where its outputs are no numbers.

        Raises:
            ConfigError: no output looks like classes.
        """
        if self.kind == "eval" and before is not None and after is not None:
            return round(before - after, DIGITS)
        if self.kind != "top1":
            return fidelity.relative_l2
        if fidelity.top1_agreement is None:
            raise ConfigError("--max-drop top1 needs an output that looks like classes; this model has none")
        return round(1 - fidelity.top1_agreement, DIGITS)


def float_outputs(session: Session) -> list[str]:
    """Names of the outputs that can be compared by distance."""
    return [o.name for o in session.outputs if o.dtype is not None and np.issubdtype(o.dtype, np.floating)]


def check_same_signature(dense: Session, sparse: Session) -> None:
    """Raises `ModelError` where two models do not take and give the same tensors."""
    for kind, *sides in (("input", dense.inputs, sparse.inputs), ("output", dense.outputs, sparse.outputs)):
        wanted, given = ({tensor.name for tensor in tensors} for tensors in sides)
        if odd := sorted(wanted ^ given):
            raise ModelError(
                f"the two models have different inputs or outputs: only one has the {kind} {odd[0]!r}; take a model and its "
                "own sparse version"
            )


def compare_sessions(dense: Session, sparse: Session, batches: Iterable[Feeds]) -> Fidelity:
    """Runs both models on the same batches."""
    names = float_outputs(dense)
    return compare_outputs(names, ((feeds, dense.run(feeds, names)) for feeds in batches), sparse)


class Runs(Protocol):
    """What can be run: a session, or one with more to it."""

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs once."""


def compare_outputs(names: Sequence[str], dense: Iterable[tuple[Feeds, Feeds]], sparse: Runs) -> Fidelity:
    """Compares a model with what the dense one gave: pairs of (feeds, its outputs)."""
    sums = {name: _Sums() for name in names}
    samples = 0
    for feeds, expected in dense:
        given = sparse.run(feeds, names)
        size = _batch_size(feeds)
        for name in names:
            sums[name].add(expected[name], given[name], size, samples)
        samples += size
    if not samples:
        raise CalibrationError("there is no sample to compare the models on; give some")
    return Fidelity(samples, tuple(total.result(name) for name, total in sums.items()))


def check_gates(
    fidelity: Fidelity,
    metric: float | None,
    gates: Gates,
    file_bytes: int | None = None,
    consequence: str = "; nothing was written",
) -> None:
    """Raises `VerificationError` naming every gate that is not met; `file_bytes` is None where no file is to be written."""
    missed = []
    # Written so that NaN misses every gate.
    if gates.max_error is not None and not fidelity.relative_l2 <= gates.max_error:
        missed.append(f"relative L2 error {fidelity.relative_l2:.4g} is above --max-error {gates.max_error:g}")
    if gates.min_agreement is not None:
        if fidelity.top1_agreement is None:
            raise ConfigError("--min-agreement needs an output that looks like classes; this model has none")
        if not fidelity.top1_agreement >= gates.min_agreement:
            missed.append(f"top-1 agreement {fidelity.top1_agreement:.4f} is below --min-agreement {gates.min_agreement:g}")
    if gates.min_metric is not None and not (metric is not None and metric >= gates.min_metric):
        missed.append(f"metric {metric} is below --min-metric {gates.min_metric:g}")
    count = f" ({fidelity.samples} held-out samples)" if missed else ""
    if gates.max_bytes is not None and file_bytes is not None and file_bytes > gates.max_bytes:
        missed.append(f"{file_bytes:,} bytes are above --max-bytes {gates.max_bytes:,}")
    if missed:
        raise VerificationError("; ".join(missed) + count + consequence)


def load_metric(reference: str) -> Metric:
    """The function that `module:function` names; the current folder is searched first.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, function = reference.partition(":")
    if not module or not function or module.startswith("."):
        raise ConfigError(f"--eval takes module:function, not {reference!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # it is the user's code: anything may come out of it
        raise ConfigError(f"--eval: cannot import {module!r}: {type(error).__name__}: {error}") from error
    metric: Metric | None = getattr(found, function, None)
    if metric is None:
        raise ConfigError(f"--eval: module {module!r} has no {function!r}")
    if not callable(metric):
        raise ConfigError(f"--eval: {reference!r} is no function")
    return metric


def run_metric(metric: Metric, session: Session) -> float:
    """The user's metric of one model.

    Raises:
        ConfigError: it fails, or returns something that is no number.
    """
    try:
        value = metric(session.raw)
    except Exception as error:  # it is the user's code: anything may come out of it
        *_, last = traceback.extract_tb(error.__traceback__)
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ConfigError(f"the metric failed in line {last.lineno} of {last.filename}: {what}; call it alone first") from error
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metric returned {value!r}; it must return one number, larger is better") from error


def gzip_size(path: Path) -> int:
    """Bytes of a file after gzip (level 6), as a download would see it; of a huge file estimated from evenly spread pieces."""
    counter, size, read = _Counter(), path.stat().st_size, 0
    step = PIECE * (1 if size <= HUGE else size // SAMPLED)
    with gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6, mtime=0) as packed, path.open("rb") as source:
        for start in range(0, size, step):
            source.seek(start)
            read += packed.write(source.read(PIECE))
    return round(counter.count * size / read) if read else counter.count


class _Counter:
    """A sink that counts."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


def _batch_size(feeds: Feeds) -> int:
    lengths = {value.shape[0] for value in feeds.values() if value.ndim}
    return lengths.pop() if len(lengths) == 1 else 1


class _Sums:
    """Running sums of one output."""

    def __init__(self) -> None:
        self.difference = self.dense = self.sparse = self.product = 0.0
        self.worst = (-1.0, 0)
        self.hits = self.rows = 0
        self.classes = True

    def add(self, left: Array, right: Array, size: int, first: int) -> None:
        if not (isinstance(left, np.ndarray) and isinstance(right, np.ndarray)):  # whatever the model says it gives
            raise ModelError("an output is no dense tensor; such models cannot be compared")
        if left.shape != right.shape:
            raise ModelError(f"an output has shape {list(right.shape)}, but {list(left.shape)} in the dense model")
        per_sample = left.ndim > 0 and left.shape[0] == size
        a = left.astype(np.float64).reshape(size if per_sample else 1, -1)
        b = right.astype(np.float64).reshape(a.shape)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities in both models: the error is NaN, and misses every gate
            gap, energy = ((b - a) ** 2).sum(axis=1), (a**2).sum(axis=1)
            self.sparse += float((b**2).sum())
            self.product += float((a * b).sum())
        self.difference += float(gap.sum())
        self.dense += float(energy.sum())
        error = np.nan_to_num([_ratio(g, e) for g, e in zip(gap.tolist(), energy.tolist(), strict=True)], nan=np.inf)
        worst = int(np.argmax(error))
        self.worst = max(self.worst, (float(error[worst]), first + worst))
        self.classes &= per_sample and sum(n > 1 for n in left.shape[1:]) == 1
        if self.classes:
            self.hits += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
            self.rows += len(a)

    def result(self, name: str) -> OutputFidelity:
        norm = math.sqrt(self.dense) * math.sqrt(self.sparse)
        return OutputFidelity(
            output=name,
            relative_l2=_ratio(self.difference, self.dense),
            cosine=self.product / norm if norm > 0 else float(self.difference == 0),
            worst_sample=self.worst[1],
            worst_relative_l2=self.worst[0],
            top1_agreement=self.hits / self.rows if self.classes and self.rows else None,
        )


def _ratio(squared_gap: float, squared_norm: float) -> float:
    if squared_norm > 0:
        return math.sqrt(squared_gap / squared_norm)
    return 0.0 if squared_gap == 0 else math.inf
