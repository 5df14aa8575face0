"""`refine`: all survivors moved together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import report
from relrep_onnx.commands.common import check_files, command_line, config_of, publish, say_written, target_of
from relrep_onnx.commands.options import (
    CONFIG_OPTION,
    GATE_OPTIONS,
    JSON_OPTION,
    MODEL,
    NODE_OPTIONS,
    QUIET_OPTION,
    REFINE_OPTIONS,
    REPORT_OPTION,
    SAMPLE_OPTIONS,
)
from relrep_onnx.config import DEFAULT_EPOCHS
from relrep_onnx.exporting import check_places, written_at
from relrep_onnx.pipeline import refine as run_refine
from relrep_onnx.progress import shown_progress
from relrep_onnx.types import MOST, ConfigError


@click.command(short_help="Move all survivors of a sparse model together.")
@click.argument("dense", type=MODEL)
@click.argument("sparse", type=MODEL)
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--in-place", is_flag=True, help="Replace SPARSE.")
@click.option("--epochs", "refine", type=click.IntRange(1, MOST), help=f"Passes over the samples.  [default: {DEFAULT_EPOCHS}]")
@REFINE_OPTIONS
@SAMPLE_OPTIONS
@NODE_OPTIONS
@GATE_OPTIONS
@JSON_OPTION
@REPORT_OPTION
@CONFIG_OPTION
@QUIET_OPTION
def refine(
    dense: Path,
    sparse: Path,
    output: Path | None,
    in_place: bool,
    calib: str,
    holdout: str | None,
    resume: Path | None,
    json_path: Path | None,
    report_path: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Move all survivors of SPARSE together until it behaves like DENSE.

    Zeros stay zeros.  Held-out samples decide which state goes to OUTPUT; where none is better, that is SPARSE itself.  Ctrl-C
    writes the best state so far, and ends with the exit code 130.
    """
    replaced = sparse if in_place else None
    target = target_of(output, replaced=replaced)
    if target is None:
        raise ConfigError("give an OUTPUT file, or --in-place to replace SPARSE")
    check_places([target], {"DENSE": dense, "SPARSE": sparse}, {}, in_place=in_place)
    check_files(written_at([target]), replaced=replaced)
    with shown_progress(quiet) as progress:
        result = run_refine(
            dense,
            sparse,
            target,
            calib,
            config_of(config_path),
            holdout=holdout,
            in_place=in_place,
            resume=resume,
            progress=progress,
        )
    publish(report.of_refined(result, command_line()), json_path, report_path, quiet=quiet)
    say_written(str(target), result, quiet=quiet)
