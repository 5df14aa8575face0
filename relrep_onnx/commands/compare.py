"""`compare`: two models on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import report
from relrep_onnx.commands.common import check_files, config_of, publish
from relrep_onnx.commands.options import (
    DATA,
    DATA_OPTIONS,
    JSON_OPTION,
    MODEL,
    QUIET_OPTION,
    RANDOM_OPTIONS,
    REPORT_OPTION,
    RUN_OPTIONS,
    Real,
    setting,
    whole,
)
from relrep_onnx.pipeline import compare as run_compare
from relrep_onnx.verify import check_gates


@click.command(short_help="Compare the outputs of two models on the same samples.")
@click.argument("dense", type=MODEL)
@click.argument("sparse", type=MODEL)
@click.option("--data", type=DATA, required=True, metavar="DATA", help="Samples, in every form --calib takes.")
@DATA_OPTIONS
@RANDOM_OPTIONS
@whole("--seed", help="Seed of random data.")
@RUN_OPTIONS
@setting("--max-error", type=Real(0), help="Gate: largest relative L2 error of an output.")
@setting("--min-agreement", type=Real(0, 1), help="Gate: least top-1 agreement.")
@JSON_OPTION
@REPORT_OPTION
@QUIET_OPTION
def compare(
    dense: Path, sparse: Path, data: str, json_path: Path | None, report_path: Path | None, quiet: bool, **_: Any
) -> None:
    """Compare the outputs of SPARSE with those of DENSE on the same samples."""
    check_files()
    config = config_of(None)
    fidelity = run_compare(dense, sparse, data, config)
    publish(report.of_fidelity(fidelity, sparse.name), json_path, report_path, quiet=quiet)
    gates = config.as_gates()
    gates.check_resolution(fidelity.samples, "--data")
    check_gates(fidelity, None, gates, consequence="")
