"""What a run gives back: typed, printable, and JSON without NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.benchmark import Plan, Setting
from relrep_onnx.config import Config
from relrep_onnx.export import Exported
from relrep_onnx.inspection import Inspection
from relrep_onnx.runtime import VERSION as ORT_VERSION
from relrep_onnx.types import Layer, ScoreCurve, Skipped
from relrep_onnx.verify import Fidelity, gzip_size

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a file (with its external data), gzipped (over 256 MiB estimated), and what is left in its prunable layers."""

    file_bytes: int
    gzip_bytes: int
    nonzeros: int
    macs: int


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One prunable layer; after `optimize` with the sparsity it got."""

    layer: Layer
    macs: int
    curve: ScoreCurve
    zeros: int

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction."""
        return self.zeros / self.layer.size

    @property
    def rr(self) -> float:
        """Relative Repairability at this sparsity; NaN where undefined."""
        return self.curve.rr_at(self.sparsity)


@dataclass(frozen=True, eq=False)
class Provenance:
    """What is needed to run it again."""

    model: str
    model_sha256: str
    data: str
    data_sha256: str
    random_data: bool
    calibration_samples: int
    left_out: tuple[str, ...]
    """What is wrong with each bad sample that was left out."""
    versions: dict[str, str]


RANDOM: Final = "RANDOM calibration data: the error says little about real inputs."
"""What is said of data that were made up."""


@dataclass(frozen=True)
class Choice:
    """How `auto` chose: each candidate's relative L2 of the outputs on held-out samples, after a cheap repair."""

    allocator: str
    errors: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One step of the search for a sparsity."""

    sparsity: float
    drop: float


@dataclass(frozen=True)
class Finding:
    """What `max_drop` found: a sparsity, and its drop on the samples that decided; `kind` and `limit` as asked for."""

    kind: str
    limit: float
    sparsity: float
    drop: float
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Epoch:
    """A state on the way: mean loss of the epoch (NaN at the start); held out, the relative L2 of block ends and outputs."""

    number: int
    loss: float
    error: float


@dataclass(frozen=True)
class Refinement:
    """How refinement went: `ends` and `outputs` are the tensors aimed at, `walls` what stopped gradients, `kept` the best epoch.

    `trials` are the held-out errors of short runs with each kind of augmentation, empty where the kind was given.
    """

    epochs: int
    steps: int
    augment: tuple[str, ...]
    trials: dict[str, float]
    ends: tuple[str, ...]
    outputs: tuple[str, ...]
    walls: tuple[str, ...]
    history: tuple[Epoch, ...]
    kept: int
    restarts: int
    interrupted: bool
    seconds: float

    @property
    def start(self) -> Epoch:
        """Before the first step."""
        return self.history[0]

    @property
    def best(self) -> Epoch:
        """The state that was kept."""
        return self.history[self.kept]


@dataclass(frozen=True, eq=False)
class Analysis:
    """Result of `analyze`: curves of every prunable layer, and what is skipped."""

    config: Config
    provenance: Provenance
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Result(Analysis):
    """Result of `optimize`.  `model` is the sparse model itself, `allocator` the one that was used.

    `output` is None where nothing was written, or only `exports` were.
    """

    allocator: str
    choice: Choice | None
    finding: Finding | None
    refinement: Refinement | None
    model: ModelProto
    output: str | None
    before: ModelSize
    after: ModelSize
    fidelity: Fidelity
    metric_before: float | None
    metric_after: float | None
    seconds: float
    exports: tuple[Exported, ...] = ()

    @property
    def sparsity(self) -> float:
        """Zeros among the prunable weights, as a fraction."""
        return sum(r.zeros for r in self.layers) / max(1, sum(r.layer.size for r in self.layers))

    @property
    def macs_sparsity(self) -> float:
        """Multiply-accumulates of the prunable layers that zeros take, those from before included, as a fraction."""
        return 1 - self.after.macs / max(1, sum(r.macs for r in self.layers))


@dataclass(frozen=True, eq=False)
class Refined:
    """Result of `refine`: `model` is the refined model, before and after are its outputs against the dense model's."""

    config: Config
    provenance: Provenance
    notes: tuple[str, ...]
    refinement: Refinement
    before: Fidelity
    after: Fidelity
    metric_before: float | None
    metric_after: float | None
    model: ModelProto
    output: str | None
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What is known of one point of a sweep; None where it was not measured, or the model's outputs do not allow it.

    `sparsity` and `macs_sparsity` are fractions of the prunable layers, `error` the relative L2 of the worst output, `agreement`
    top-1 with the dense model, `metric` the user's own, `size` and `gzip` bytes of the file in the asked form, `latency`
    milliseconds and `speedup` the dense model's in the same rounds over it.
    """

    sparsity: float
    macs_sparsity: float
    nonzeros: int
    macs: int
    error: float
    agreement: float | None = None
    metric: float | None = None
    size: int | None = None
    gzip: int | None = None
    latency: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Point:
    """One combination of settings, `name` after its folder; `failure` says why it has no figures."""

    name: str
    sparsity: float
    pattern: str
    allocate: str
    repair: str
    figures: Figures | None
    failure: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`: the points in the order of the grid, what was measured, and the picked one with its file."""

    config: Config
    provenance: Provenance
    measures: tuple[str, ...]
    points: tuple[Point, ...]
    picked: Point | None
    output: str | None


@dataclass(frozen=True)
class ModelFile:
    """A model that was timed: bytes with external data, gzipped, and the hash of its graph and tensors."""

    path: str
    file_bytes: int
    gzip_bytes: int
    sha256: str


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of `benchmark`: every setting, and what is needed to run it again."""

    settings: tuple[Setting, ...]
    plan: Plan
    models: tuple[ModelFile, ...]
    processor: str
    versions: dict[str, str]


def benchmarked(settings: Sequence[Setting], plan: Plan, models: Iterable[Path]) -> BenchmarkResult:
    """What was measured, with the facts on the files and on this machine."""
    return BenchmarkResult(tuple(settings), plan, tuple(map(_model_file, models)), processor(), versions())


def _model_file(path: Path) -> ModelFile:
    loaded = graphs.load(path)
    with graphs.input_files(loaded) as files:
        sizes = sum(f.stat().st_size for f in files), sum(gzip_size(f) for f in files)
    return ModelFile(str(path), *sizes, graphs.model_hash(loaded.model))


def processor() -> str:
    """This machine's processor, as exactly as it says."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """What ran: this package and those that its numbers depend on."""
    return {
        "relrep-onnx": version("relrep-onnx"),
        "onnx": onnx.__version__,
        "onnxruntime": ORT_VERSION,
        "numpy": np.__version__,
    }


def measure(files: Iterable[Path], reports: Iterable[LayerReport], zeros: Mapping[str, int]) -> ModelSize:
    """Sizes of a model's files, and what these zeros leave of its prunable layers."""
    files, reports = list(files), list(reports)
    kept = [r.layer.size - zeros[r.layer.name] for r in reports]
    return ModelSize(
        file_bytes=sum(f.stat().st_size for f in files),
        gzip_bytes=sum(gzip_size(f) for f in files),
        nonzeros=sum(kept),
        macs=sum(round(r.macs * k / r.layer.size) for r, k in zip(reports, kept, strict=True)),
    )


@dataclass(frozen=True)
class Exports:
    """Result of `export`."""

    exports: tuple[Exported, ...]


Reportable = Analysis | Result | Refined | BenchmarkResult | Fidelity | Exports | Sweep | Inspection
"""What can be written as JSON."""


def to_json(value: Reportable) -> str:
    """The result as JSON, as docs/report.schema.json describes it; numbers that are not finite become null."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **_plain(value)}, indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, LayerReport):
        return {
            **_fields(value),
            "sparsity": value.sparsity,
            "rr": _plain(value.rr),
            "raw": _plain(value.curve.raw_at(value.sparsity)),
            "residual": _plain(value.curve.residual_at(value.sparsity)),
            "snr_db": _plain(value.curve.snr_db(value.sparsity)),
        }
    if isinstance(value, ScoreCurve):
        return {**_fields(value), "rr": _plain(value.rr)}
    if isinstance(value, Result):
        return {**_fields(value), "sparsity": value.sparsity, "macs_sparsity": value.macs_sparsity}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; the model itself does not belong into JSON."""
    values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: _plain(item) for name, item in values.items() if not isinstance(item, ModelProto)}
