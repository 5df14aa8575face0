"""`sweep`: many settings, their table, and the choice among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from relrep_onnx import report
from relrep_onnx.commands.common import check_files, command_line, config_of, publish
from relrep_onnx.commands.options import (
    CALIBRATE_OPTIONS,
    CONFIG_OPTION,
    FORM_OPTIONS,
    JSON_OPTION,
    MODEL,
    QUIET_OPTION,
    REPORT_OPTION,
    SELECT_OPTIONS,
    Forms,
    Picture,
    setting,
)
from relrep_onnx.progress import shown_progress
from relrep_onnx.sweeps import Grid, parse_sparsities, written_in
from relrep_onnx.sweeps import sweep as run_sweep
from relrep_onnx.types import ConfigError, Unit


class Names(Forms):
    """Comma-separated names, checked where they are known."""

    name = "A,B"


@click.command(short_help="Run optimize at every combination of settings.")
@click.argument("model", type=MODEL)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="[OUT_FOLDER]", required=False)
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@click.option("--sparsity", "sparsities", default="0.5:0.95:0.05", show_default=True, help="FROM:TO:STEP, or values with commas.")
@click.option("--pattern", "patterns", type=Names(), default="unstructured", show_default=True, help="As in optimize.")
@click.option("--allocate", "allocators", type=Names(), default="auto", show_default=True, help="As in optimize.")
@click.option("--repair", "repairs", type=Names(), default="reconstruct", show_default=True, help="As in optimize.")
@click.option(
    "--measure",
    "measures",
    type=Names(),
    default="error,size",
    show_default=True,
    help="What goes into the table: error, size, latency (timed at the end, one model at a time).",
)
@setting("--budget", type=click.Choice(get_args(Unit)), help="What --sparsity counts, as in optimize.")
@setting("--to", field="forms", type=Forms(), help="The form that is measured and written, as in optimize.  [default: compact]")
@FORM_OPTIONS
@setting("--eval", metavar="MODULE:FUNCTION", help="Your own metric, called with an onnxruntime.InferenceSession.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Points that run at the same time.")
@click.option("--engine", type=click.Choice(["local", "dask"]), default="local", show_default=True, help="Where points run.")
@click.option("--scheduler", metavar="ADDRESS", help="Of a running Dask cluster, such as tcp://host:8786, for --engine dask.")
@click.option("--keep", is_flag=True, help="Keep the model of every point in OUT_FOLDER/points.")
@click.option(
    "--pick", metavar="WORDS", help='Choose a point, such as "error<0.05 & size min", and write its model to OUT_FOLDER/picked.'
)
@click.option("--plot", type=Picture(), help="Error against size or latency as a picture (.png, .svg, .pdf).")
@JSON_OPTION
@REPORT_OPTION
@CONFIG_OPTION
@QUIET_OPTION
def sweep(
    model: Path,
    folder: Path | None,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    sparsities: str,
    patterns: tuple[str, ...],
    allocators: tuple[str, ...],
    repairs: tuple[str, ...],
    measures: tuple[str, ...],
    jobs: int,
    engine: str,
    scheduler: str | None,
    keep: bool,
    pick: str | None,
    plot: Path | None,
    json_path: Path | None,
    report_path: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Run optimize at every combination of the listed settings; a sweep that was stopped goes on where it was.

    OUT_FOLDER holds the finished points and the tables; by default it is named after MODEL.  --max-memory is for all jobs
    together.
    """
    folder = folder or Path(f"{model.stem}.sweep")
    check_files(written_in(folder))
    if (engine == "dask") != (scheduler is not None):
        raise ConfigError("--engine dask and --scheduler ADDRESS go together; give both or neither")
    with shown_progress(quiet) as progress:
        found = run_sweep(
            model,
            folder,
            calib,
            Grid(parse_sparsities(sparsities), patterns, allocators, repairs),
            config_of(config_path, {} if config_path else {"forms": ("compact",)}),
            holdout=holdout,
            measures=measures,
            jobs=jobs,
            scheduler=scheduler,
            keep=keep,
            pick=pick,
            cache_dir=cache_dir,
            progress=progress,
        )
    if plot is not None:
        report.plot_front(found, plot)
    publish(report.of_sweep(found, command_line()), json_path, report_path, quiet=quiet)
