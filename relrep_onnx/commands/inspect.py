"""`inspect`: a look at a model without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relrep_onnx import graph as graphs
from relrep_onnx import report
from relrep_onnx.commands.common import check_files, config_of, publish
from relrep_onnx.commands.options import INPUT_SHAPE, JSON_OPTION, MODEL, SELECT_OPTIONS
from relrep_onnx.distill import outlook
from relrep_onnx.escape import clean_lines
from relrep_onnx.inspection import inspect as inspect_model
from relrep_onnx.runtime import mobile_usability


@click.command(short_help="Show what can be pruned, what stays and why.")
@click.argument("model", type=MODEL)
@SELECT_OPTIONS
@INPUT_SHAPE
@click.option("--gradients", is_flag=True, help="Also list which layers can be refined, and what stops the gradients of others.")
@click.option("--mobile", is_flag=True, help="Also ask ONNX Runtime's mobile usability checker (NNAPI, CoreML).")
@JSON_OPTION
def inspect(model: Path, gradients: bool, mobile: bool, json_path: Path | None, **_: Any) -> None:
    """Show what can be pruned, what stays and why, and the MACs per layer."""
    check_files()
    config = config_of(None)
    inspection = inspect_model(model, config.as_selection(), config.input_shape)
    reach = None
    if gradients:
        reach = outlook(graphs.flatten(graphs.load(model).model).model, [facts.layer for facts in inspection.layers])
    publish(report.of_inspection(inspection, reach), json_path, None, quiet=False)
    if mobile:
        console = report.console_for()
        usable, lines = mobile_usability(model)
        console.print("\nONNX Runtime Mobile: NNAPI or CoreML " + ("may help" if usable else "will not help"), style="bold")
        console.print(clean_lines("\n".join(lines).expandtabs(2)), markup=False)
