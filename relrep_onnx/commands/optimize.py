"""`optimize`: prune, repair, verify, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from relrep_onnx import report
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.commands.common import check_files, command_line, config_of, publish, say_written, target_of
from relrep_onnx.commands.options import (
    CALIBRATE_OPTIONS,
    CONFIG_OPTION,
    EXPORT_OPTIONS,
    FOR_OPTION,
    GATE_OPTIONS,
    JSON_OPTION,
    METHOD_OPTIONS,
    MODEL,
    OUTPUT_OPTIONS,
    QUIET_OPTION,
    REFINE_OPTIONS,
    REPORT_OPTION,
    SELECT_OPTIONS,
    NamedValue,
    OutputFile,
    Real,
    setting,
    whole,
)
from relrep_onnx.config import EFFORTS
from relrep_onnx.estimate import estimate
from relrep_onnx.exporting import places_of, written_at
from relrep_onnx.files import write_text
from relrep_onnx.pipeline import optimize as run_optimize
from relrep_onnx.progress import shown_progress
from relrep_onnx.types import ConfigError, Unit


@click.command(short_help="Prune a model, repair it, verify it, and write it.")
@click.argument("model", type=MODEL)
@OUTPUT_OPTIONS
@click.option("--in-place", is_flag=True, help="Replace the input file.")
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@setting(
    "--budget",
    type=click.Choice(get_args(Unit)),
    help="What --sparsity counts; latency: the time that the sparse kernels are predicted to spend on the weights.",
)
@setting(
    "--pattern",
    metavar="PATTERN",
    help="unstructured, N:M along input channels (2:4), or blocks RxC of output by input channels.",
)
@setting(
    "--max-drop",
    metavar="DROP",
    help="Find the largest sparsity that drops less: 0.1 (relative L2 of the outputs), top1:5%, or eval:0.01 with --eval.",
)
@setting(
    "--allocate", type=click.Choice([AUTO, *ALLOCATORS]), help="How the budget is spread over the layers; auto tries several."
)
@setting("--min-layer-sparsity", type=Real(0, 1), help="Every layer gets at least this.")
@setting("--max-layer-sparsity", type=Real(0, 1), help="No layer gets more than this.")
@setting(
    "--layer-sparsity",
    multiple=True,
    type=NamedValue("=", Real(0, 1), "NAME=0.3"),
    help="Fixes the sparsity of one layer; repeatable.",
)
@whole("--refine", metavar="EPOCHS", help="Then move all survivors together for so many epochs.")
@REFINE_OPTIONS
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    help="Sets samples, repair and epochs together (docs/refinement.md); other options win.",
)
@GATE_OPTIONS
@EXPORT_OPTIONS
@FOR_OPTION
@click.option("--dry-run", is_flag=True, help="Estimate time and memory, write nothing.")
@JSON_OPTION
@REPORT_OPTION
@CONFIG_OPTION
@click.option("--save-config", type=OutputFile(), help="Write the settings of this run as JSON.")
@QUIET_OPTION
def optimize(
    model: Path,
    output: Path | None,
    output_option: Path | None,
    in_place: bool,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    dry_run: bool,
    json_path: Path | None,
    report_path: Path | None,
    config_path: Path | None,
    save_config: Path | None,
    resume: Path | None,
    effort: str | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Prune MODEL, repair it, verify it on held-out samples, and write it to OUTPUT (a folder with several --to forms)."""
    config = config_of(config_path, EFFORTS[effort] if effort else {})
    replaced = model if in_place else None
    target = target_of(output, output_option, replaced=replaced)
    if target is None and not dry_run:
        raise ConfigError("give an OUTPUT file, or --in-place to replace the input")
    places = {} if target is None else places_of(model, target, config, {}, in_place=in_place)
    check_files(written_at(places.values()), replaced=replaced)
    for option, path in (("--json", json_path), ("--report", report_path)):
        if dry_run and path is not None:
            raise ConfigError(f"{option} cannot apply to --dry-run: there is no result to write")
    if save_config is not None:
        write_text(save_config, config.to_json() + "\n")
    if dry_run:
        plan = estimate(model, target, calib, config, holdout=holdout, in_place=in_place)
        spill = ", waiting activations partly on disk" if plan.spilled else ""
        click.echo(
            f"{plan.layers} layers, {plan.samples} calibration samples: about {plan.seconds:.0f} s and "
            f"{plan.memory_bytes / 1e6:.0f} MB of memory{spill}; no model was written"
        )
        return
    with shown_progress(quiet) as progress:
        result = run_optimize(
            model,
            target,
            calib,
            config,
            holdout=holdout,
            cache_dir=cache_dir,
            in_place=in_place,
            resume=resume,
            progress=progress,
        )
    publish(report.of_result(result, command_line()), json_path, report_path, quiet=quiet)
    say_written(", ".join(e.output for e in result.exports) or str(target), result, quiet=quiet)
