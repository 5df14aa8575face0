"""`analyze`: Relative Repairability, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import report
from relrep_onnx.commands.common import check_files, command_line, config_of, publish
from relrep_onnx.commands.options import (
    CALIBRATE_OPTIONS,
    CONFIG_OPTION,
    JSON_OPTION,
    METHOD_OPTIONS,
    MODEL,
    QUIET_OPTION,
    REPORT_OPTION,
    SELECT_OPTIONS,
    Picture,
)
from relrep_onnx.pipeline import analyze as run_analyze
from relrep_onnx.progress import shown_progress


@click.command(short_help="Measure how much pruning damage repair cannot undo, per layer.")
@click.argument("model", type=MODEL)
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@JSON_OPTION
@REPORT_OPTION
@click.option("--plot", type=Picture(), help="RR curves as a picture (.png, .svg, .pdf).")
@CONFIG_OPTION
@QUIET_OPTION
def analyze(
    model: Path,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    json_path: Path | None,
    report_path: Path | None,
    plot: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Measure Relative Repairability of every layer: how much pruning damage repair cannot undo."""
    check_files()
    with shown_progress(quiet) as progress:
        analysis = run_analyze(model, calib, config_of(config_path), holdout=holdout, cache_dir=cache_dir, progress=progress)
    if plot is not None:
        report.plot_curves(analysis, plot)
    publish(report.of_analysis(analysis, command_line()), json_path, report_path, quiet=quiet)
