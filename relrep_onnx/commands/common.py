"""What commands share: the configuration a command line means, where output goes, results written and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import RenderableType

from relrep_onnx import report
from relrep_onnx.benchmark import BenchmarkResult
from relrep_onnx.config import Config
from relrep_onnx.files import write_text
from relrep_onnx.results import Analysis, Refined, Sweep, to_json
from relrep_onnx.types import ConfigError
from relrep_onnx.verify import Fidelity


def config_of(path: Path | None, preset: Mapping[str, Any] | None = None) -> Config:
    """The configuration file, a preset on top, and what was said on the command line on top of both."""
    context = click.get_current_context()
    fields = {f.name for f in dataclasses.fields(Config)}
    said: dict[str, Any] = {
        name: dict(value) if name in ("input_shape", "layer_sparsity") else value
        for name, value in context.params.items()
        if name in fields and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    runtime = said.pop("runtime", None)
    forms = {"forms": said["forms"]} if "forms" in said else {}
    beneath = Config() if runtime is None else Config.for_runtime(runtime, **forms)
    beneath = Config.load(path, beneath) if path is not None else beneath
    return dataclasses.replace(beneath, **{**(preset or {}), **said})


def target_of(model: Path, output: Path | None, option: Path | None, in_place: bool, dry_run: bool) -> Path | None:
    """Where a run writes; None where it writes nothing."""
    if output is not None and option is not None:
        raise ConfigError(f"two outputs: {str(output)!r} and -o {str(option)!r}; give one")
    target = output or option
    if in_place and target is not None and target.absolute() != model.absolute():
        raise ConfigError("--in-place replaces the input; it cannot apply together with another output")
    if target is None and not in_place and not dry_run:
        raise ConfigError("give an OUTPUT file, or --in-place to replace the input")
    return model if in_place else target


def show(summary: RenderableType, written: str, seconds: float) -> None:
    """The report of a run, and what it wrote."""
    console = report.console_for()
    console.print(summary)
    console.print(f"wrote {report.clean(written)} in {seconds:.1f} s", style="bold", markup=False)


def write_json(result: Analysis | BenchmarkResult | Fidelity | Refined | Sweep, path: Path | None) -> None:
    """A result as JSON, where a file was asked for."""
    if path is not None:
        write_text(path, to_json(result) + "\n")
