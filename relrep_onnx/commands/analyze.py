"""`analyze`: Relative Repairability, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import report
from relrep_onnx.commands.common import config_of, write_json
from relrep_onnx.commands.options import (
    CALIBRATE_OPTIONS,
    CONFIG_OPTION,
    JSON_OPTION,
    METHOD_OPTIONS,
    MODEL,
    QUIET_OPTION,
    SELECT_OPTIONS,
    OutputFile,
)
from relrep_onnx.pipeline import analyze as run_analyze
from relrep_onnx.progress import shown_progress


@click.command()
@click.argument("model", type=MODEL)
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@JSON_OPTION
@click.option("--plot", type=OutputFile(), help="RR curves as a picture (.png, .svg, .pdf).")
@CONFIG_OPTION
@QUIET_OPTION
def analyze(
    model: Path,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    json_path: Path | None,
    plot: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Measure Relative Repairability of every layer: how much pruning damage repair cannot undo."""
    with shown_progress(quiet) as progress:
        analysis = run_analyze(model, calib, config_of(config_path), holdout=holdout, cache_dir=cache_dir, progress=progress)
    write_json(analysis, json_path)
    if plot is not None:
        report.plot_curves(analysis, plot)
    if not quiet:
        report.console_for().print(report.render_analysis(analysis))
