"""The measurements behind `docs/decisions/`: saliency, sampled positions, and the weights of `rr-curve`.

    python -m tools.bench.choices            # about five minutes on two idle cores

ResNet-20 with BatchNorm kept and folded, variance repair, the first calibration subset, seed 0, two threads.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from unittest import mock

from relrep_onnx import Config, optimize
from relrep_onnx.masks import Saliency, magnitude, unit_row_magnitude
from relrep_onnx.types import FloatArray
from tools.bench.data import DATA, TASKS, environment, markdown_table, top1

MODELS: Final = ("resnet20_bn", "resnet20_folded")
THREADS: Final = 2


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


def score(folder: Path, model: str, config: Config) -> str:
    """Top-1 in percent and seconds of one run."""
    task = TASKS[model](folder, 1)
    result = optimize(task.model, None, task.calibration[0], config)
    return f"{100 * top1(result.model, task.test_x, task.test_y, THREADS):.1f} ({result.seconds:.1f} s)"


def row(
    name: str, folder: Path, models: Sequence[str], sparsities: Sequence[float], change: Callable[[float], Config]
) -> list[str]:
    """One line of a table: every model at every sparsity."""
    line = [name, *(score(folder, model, change(sparsity)) for model in models for sparsity in sparsities)]
    print("  ".join(line), flush=True)
    return line


def saliency_table(folder: Path) -> str:
    """Which saliency survives folding (decision 2)."""
    rows = []
    for name, saliency in SALIENCIES.items():
        with mock.patch("relrep_onnx.job.saliency_for", return_value=saliency):
            rows.append(row(name, folder, MODELS, (0.8, 0.9), lambda s: Config(sparsity=s, allocate="global", threads=THREADS)))
    return markdown_table(["saliency", *(f"{model} {s}" for model in MODELS for s in (0.8, 0.9))], rows)


def positions_table(folder: Path) -> str:
    """How many positions are enough (decision 3)."""
    levels = (0.8, 0.9, 0.95)
    rows = []
    for count in POSITIONS:

        def config(sparsity: float, count: int = count) -> Config:
            return Config(sparsity=sparsity, allocate="global", positions=count, threads=THREADS)

        rows.append(row(str(count), folder, MODELS[:1], levels, config))
    return markdown_table(["positions", *(f"{MODELS[0]} {s}" for s in levels)], rows)


def weights_table(folder: Path) -> str:
    """What weighs a layer's residual in `rr-curve` (decision 4)."""

    def config(sparsity: float) -> Config:
        return Config(sparsity=sparsity, allocate="rr-curve", threads=THREADS)

    rows = []
    with mock.patch("relrep_onnx.damage.OutputDamage.of", return_value=math.nan):
        rows.append(row("1 / signal", folder, MODELS, (0.8, 0.9), config))
    for probe in PROBES:
        with mock.patch("relrep_onnx.pipeline.PROBE_RANGE", (probe, probe)):
            rows.append(row(f"damage at {probe}", folder, MODELS, (0.8, 0.9), config))
    rows.append(row("damage at the asked sparsity", folder, MODELS, (0.8, 0.9), config))
    return markdown_table(["weight of a layer", *(f"{model} {s}" for model in MODELS for s in (0.8, 0.9))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of docs/data.md (default: ../shared/data)")
    folder = parser.parse_args().data
    tables = [table(folder) for table in (saliency_table, positions_table, weights_table)]
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment().items()))
    print("\n\n".join(["", *tables]))


if __name__ == "__main__":
    main()
