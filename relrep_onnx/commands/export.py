"""`export`: a model in forms for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import graph as graphs
from relrep_onnx import report
from relrep_onnx.commands.common import check_files, config_of, publish, target_of
from relrep_onnx.commands.options import (
    CONFIG_OPTION,
    DATA,
    DATA_OPTIONS,
    EXPORT_OPTIONS,
    JSON_OPTION,
    MAX_BYTES,
    MODEL,
    OUTPUT_OPTIONS,
    QUIET_OPTION,
    RANDOM_OPTIONS,
    RUN_OPTIONS,
    Real,
    setting,
    whole,
)
from relrep_onnx.exporting import places_of, written_at
from relrep_onnx.pipeline import export_model
from relrep_onnx.progress import shown_progress
from relrep_onnx.types import ConfigError


@click.command(short_help="Write a model in a form for deployment.")
@click.argument("model", type=MODEL)
@OUTPUT_OPTIONS
@EXPORT_OPTIONS
@click.option(
    "--calib",
    type=DATA,
    metavar="DATA",
    help="Samples in every form optimize takes: int8 is calibrated on most of them, every export compared on the rest.  "
    "[default: compared on random inputs]",
)
@click.option("--holdout", type=DATA, metavar="DATA", help="Samples to compare on.  [default: from the end of --calib]")
@DATA_OPTIONS
@RANDOM_OPTIONS
@whole("--seed", help="Seed of random data.")
@RUN_OPTIONS
@setting("--max-error", type=Real(0), help="Largest relative L2 an export may move an output.  [default: by form]")
@setting("--min-agreement", type=Real(0, 1), help="Gate: least top-1 agreement with MODEL.")
@MAX_BYTES
@JSON_OPTION
@CONFIG_OPTION
@QUIET_OPTION
def export(
    model: Path,
    output: Path | None,
    output_option: Path | None,
    calib: str | None,
    holdout: str | None,
    json_path: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Write MODEL to OUTPUT in a form for deployment, load it again, and compare the two before the file counts."""
    config = config_of(config_path)
    target = target_of(output, output_option)
    if target is None:
        raise ConfigError("give one OUTPUT")
    check_files(written_at(places_of(model, target, config, {}).values()))
    with shown_progress(quiet) as progress:
        exports = export_model(model, target, calib, config, holdout=holdout, progress=progress)
    publish(
        report.of_exports(exports, model.name, sum(file.stat().st_size for file in graphs.files_of(model))),
        json_path,
        None,
        quiet=quiet,
    )
