"""`benchmark`: models timed side by side."""

from __future__ import annotations

from pathlib import Path

import click

from relrep_onnx import report
from relrep_onnx.benchmark import Plan
from relrep_onnx.benchmark import benchmark as run_benchmark
from relrep_onnx.benchmark import require_same as check_same
from relrep_onnx.commands.common import check_files, command_line, publish
from relrep_onnx.commands.options import INPUT_SHAPE, JSON_OPTION, MODEL, QUIET_OPTION, REPORT_OPTION, Numbers, Real, whole
from relrep_onnx.progress import shown_progress
from relrep_onnx.results import benchmarked
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import MOST, THREADS


@click.command(short_help="Time models side by side.")
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="DENSE SPARSE...")
@click.option(
    "--batch",
    type=Numbers(int, between=(1, MOST)),
    default="1",
    show_default=True,
    help="Batch sizes, where the model leaves it open.",
)
@click.option(
    "--threads",
    type=Numbers(int, between=(0, THREADS)),
    default="1",
    show_default=True,
    help="Numbers of threads; 0 leaves it to ONNX Runtime.",
)
@click.option("--rounds", type=click.IntRange(1, MOST), default=30, show_default=True, help="Each round runs every model once.")
@click.option("--profile", is_flag=True, help="Also show the time of every node.")
@click.option("--require-same", type=Real(0), metavar="ERR", help="Gate: largest relative L2 difference of the outputs.")
@INPUT_SHAPE
@whole("--seed", help="Seed of the random inputs.")
@JSON_OPTION
@REPORT_OPTION
@QUIET_OPTION
def benchmark(
    models: tuple[Path, ...],
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    rounds: int,
    profile: bool,
    require_same: float | None,
    input_shape: tuple[tuple[str, tuple[int, ...]], ...],
    seed: int,
    json_path: Path | None,
    report_path: Path | None,
    quiet: bool,
) -> None:
    """Time models side by side, the first as reference, with the sparse kernels loaded: interleaved runs on random inputs."""
    plan = Plan(threads, batch, rounds, profile, dict(input_shape), seed)
    check_files()
    with shown_progress(quiet) as progress:
        settings = run_benchmark(models, plan, RuntimeOptions(), progress)
    result = benchmarked(settings, plan, models)
    publish(report.of_benchmark(result, command_line()), json_path, report_path, quiet=quiet)
    if require_same is not None:
        check_same(settings, require_same)
