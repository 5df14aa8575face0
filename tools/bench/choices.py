"""The measurements behind `docs/decisions/`: each table switches one decision off, or puts others in its place.

    python -m tools.bench.choices                             # about half an hour on two idle cores
    python -m tools.bench.choices --tables sums,search --subsets 1

ResNet-20 with BatchNorm kept and folded, seed 0, two threads.  The tables of saliency, positions and weights show the repair
`variance` on the first calibration subset; those about `reconstruct` hold the allocator fixed at `rr-curve` and show the mean
over the calibration subsets.  Everything else is at the package's defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final
from unittest import mock

from relrep_onnx import Config, compare, optimize
from relrep_onnx.masks import Saliency, magnitude, unit_row_magnitude
from relrep_onnx.moments import DAMPING
from relrep_onnx.repair import REPAIRS, bias
from relrep_onnx.types import FloatArray
from tools.bench.data import DATA, SUBSETS, TASKS, environment, markdown_table, top1
from tools.bench.options import names

MODELS: Final = ("resnet20_bn", "resnet20_folded")
THREADS: Final = 2
SPARSITIES: Final = (0.9, 0.95)
"""Of the tables about `reconstruct`."""


def unit_row_mean_square(weight: FloatArray) -> FloatArray:
    """Rows scaled to mean square 1 instead of norm 1, so that wide layers are not pruned more."""
    return unit_row_magnitude(weight) * math.sqrt(weight.shape[1])


SALIENCIES: Final[dict[str, Saliency]] = {
    "magnitude": magnitude,
    "rows scaled to unit L2 norm": unit_row_magnitude,
    "rows scaled to mean square 1": unit_row_mean_square,
}
POSITIONS: Final = (10, 20, 32, 80)
PROBES: Final = (0.5, 0.8, 0.9)
DAMPINGS: Final = (1e-3, 1e-2, 5e-2)


@dataclass(frozen=True)
class Score:
    """Means over the calibration subsets: top-1 in percent, held-out relative L2, seconds."""

    top1: float
    error: float
    seconds: float


def score(folder: Path, model: str, config: Config, subsets: int = 1) -> Score:
    """One setting on one model."""
    task = TASKS[model](folder, subsets)
    parts = []
    for samples in task.calibration[:subsets]:
        result = optimize(task.model, None, samples, config)
        error = compare(task.model, result.model, task.held_out, config).relative_l2
        parts.append(Score(100 * top1(result.model, task.test_x, task.test_y, THREADS), error, result.seconds))
    return Score(*(fmean(getattr(part, name) for part in parts) for name in ("top1", "error", "seconds")))


def row(
    name: str, folder: Path, models: Sequence[str], sparsities: Sequence[float], change: Callable[[float], Config]
) -> list[str]:
    """One line of a table: every model at every sparsity."""
    scores = [score(folder, model, change(sparsity)) for model in models for sparsity in sparsities]
    line = [name, *(f"{s.top1:.1f} ({s.seconds:.1f} s)" for s in scores)]
    print("  ".join(line), file=sys.stderr, flush=True)
    return line


def saliency_table(folder: Path) -> str:
    """Which saliency survives folding (decision 2)."""

    def config(sparsity: float) -> Config:
        return Config(sparsity=sparsity, allocate="global", repair="variance", threads=THREADS)

    rows = []
    for name, saliency in SALIENCIES.items():
        with mock.patch("relrep_onnx.job.saliency_for", return_value=saliency):
            rows.append(row(name, folder, MODELS, (0.8, 0.9), config))
    return markdown_table(["saliency", *(f"{model} {s}" for model in MODELS for s in (0.8, 0.9))], rows)


def positions_table(folder: Path) -> str:
    """How many positions are enough (decision 3)."""
    levels = (0.8, 0.9, 0.95)
    rows = []
    for count in POSITIONS:

        def config(sparsity: float, count: int = count) -> Config:
            return Config(sparsity=sparsity, allocate="global", repair="variance", positions=count, threads=THREADS)

        rows.append(row(str(count), folder, MODELS[:1], levels, config))
    return markdown_table(["positions", *(f"{MODELS[0]} {s}" for s in levels)], rows)


def weights_table(folder: Path) -> str:
    """What weighs a layer's residual in `rr-curve` (decision 4)."""

    def config(sparsity: float) -> Config:
        return Config(sparsity=sparsity, allocate="rr-curve", repair="variance", threads=THREADS)

    rows = []
    with mock.patch("relrep_onnx.damage.OutputDamage.of", return_value=math.nan):
        rows.append(row("1 / signal", folder, MODELS, (0.8, 0.9), config))
    for probe in PROBES:
        with mock.patch("relrep_onnx.steps.PROBE_RANGE", (probe, probe)):
            rows.append(row(f"damage at {probe}", folder, MODELS, (0.8, 0.9), config))
    rows.append(row("damage at the asked sparsity", folder, MODELS, (0.8, 0.9), config))
    return markdown_table(["weight of a layer", *(f"{model} {s}" for model in MODELS for s in (0.8, 0.9))], rows)


def without_sums() -> AbstractContextManager[object]:
    """Every layer aims at its own dense output."""
    return mock.patch.dict(REPAIRS, {"reconstruct": replace(REPAIRS["reconstruct"], sums=False)})


def without_search() -> AbstractContextManager[object]:
    """Least squares on the mask of the scores."""
    return mock.patch.dict(REPAIRS, {"reconstruct": REPAIRS["reconstruct"].without_search()})


@contextlib.contextmanager
def searching_slowly() -> Iterator[None]:
    """ADMM with a rho that grows ten times as slowly, and as many more steps: a lower objective."""
    with mock.patch("relrep_onnx.reconstruct.GROWTH", ((0.0, 1.01),)), mock.patch("relrep_onnx.reconstruct.SEARCH_STEPS", 1000):
        yield


def without_matching() -> AbstractContextManager[object]:
    """After least squares, only each channel's mean is matched."""
    return mock.patch("relrep_onnx.repair.variance", bias)


@contextlib.contextmanager
def damped(damping: float) -> Iterator[None]:
    """Another damping wherever it is read."""
    with contextlib.ExitStack() as stack:
        for module in ("moments", "repair"):
            stack.enter_context(mock.patch(f"relrep_onnx.{module}.DAMPING", damping))
        yield


def residual_share(residual: FloatArray, signal: float) -> FloatArray:
    """The plain loss: residual / signal."""
    return residual / (signal or 1.0)


def with_plain_loss() -> AbstractContextManager[object]:
    """`rr-curve` adds up residual shares as they are."""
    return mock.patch("relrep_onnx.allocate._loss", residual_share)


Variants = Mapping[str, Callable[[], AbstractContextManager[object]] | None]
"""What a row is called, and what it changes; None is the package as it is."""

VARIANTS: Final[Mapping[str, tuple[str, Variants]]] = {
    "sums": ("target of a residual branch's last layer", {"the dense sum": None, "its own dense output": without_sums}),
    "matching": ("after least squares", {"mean and variance matched": None, "mean matched": without_matching}),
    "damping": ("damping", {f"{d:g}": None if d == DAMPING else functools.partial(damped, d) for d in DAMPINGS}),
    "loss": ("loss of `rr-curve`", {"-log(1 - share)": None, "residual share": with_plain_loss}),
    "search": ("mask", {"searched": None, "searched slowly": searching_slowly, "of the scores": without_search}),
}
"""The tables about `reconstruct`: the head of the first column, and the rows."""


def score_reconstruct(folder: Path, subsets: int) -> list[Score]:
    """`reconstruct` under `rr-curve`, every model at every sparsity."""
    return [
        score(folder, model, Config(sparsity=sparsity, allocate="rr-curve", repair="reconstruct", threads=THREADS), subsets)
        for model in MODELS
        for sparsity in SPARSITIES
    ]


@functools.cache
def unchanged(folder: Path, subsets: int) -> list[Score]:
    """The package as it is: one measurement for all tables."""
    return score_reconstruct(folder, subsets)


def variants_table(name: str, folder: Path, subsets: int) -> str:
    """Top-1, held-out error and seconds of each variant."""
    head, variants = VARIANTS[name]
    rows = []
    for label, change in variants.items():
        if change is None:
            scores = unchanged(folder, subsets)
        else:
            with change():
                scores = score_reconstruct(folder, subsets)
        rows.append([label, *(f"{s.top1:.1f} / {s.error:.3f} ({s.seconds:.1f} s)" for s in scores)])
        print(f"{name}: {'  '.join(rows[-1])}", file=sys.stderr, flush=True)
    title = f"Top-1 % / held-out relative L2 (seconds), mean of {subsets} calibration subset{'s' * (subsets > 1)}:"
    return f"{title}\n\n{markdown_table([head, *(f'{model} {s}' for model in MODELS for s in SPARSITIES)], rows)}"


EARLIER: Final[Mapping[str, Callable[[Path], str]]] = {
    "saliency": saliency_table,
    "positions": positions_table,
    "weights": weights_table,
}
"""The tables about `variance`."""
TABLES: Final = (*EARLIER, *VARIANTS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action=names(TABLES), default=list(TABLES), metavar="A,B", help=", ".join(TABLES))
    parser.add_argument(
        "--subsets",
        type=int,
        choices=range(1, len(SUBSETS) + 1),
        default=len(SUBSETS),
        help="calibration subsets of the tables about reconstruct",
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of docs/data.md (default: ../shared/data)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    for name in options.tables:
        table = EARLIER[name](options.data) if name in EARLIER else variants_table(name, options.data, options.subsets)
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
