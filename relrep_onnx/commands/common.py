"""What commands share: the configuration a command line means, where output goes, results written and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from relrep_onnx import report
from relrep_onnx.config import Config
from relrep_onnx.escape import clean
from relrep_onnx.types import ConfigError

COMMAND_LINE: Final = f"{__name__}.command_line"
"""Where a context's `meta` holds what the user typed."""


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


def command_line() -> str:
    """What the user typed."""
    return str(click.get_current_context().meta[COMMAND_LINE])


def check_reports() -> None:
    """Refuses a report over what the command reads or writes itself.

    Raises:
        ConfigError: naming the file.
    """
    params = click.get_current_context().params
    reports = {name: params[name] for name in ("json_path", "report_path") if params.get(name) is not None}
    for name, value in params.items():
        for other in value if isinstance(value, tuple) else (value,):
            for path in reports.values():
                if name not in reports and isinstance(other, Path) and other.absolute() == path.absolute():
                    raise ConfigError(f"the report {str(path)!r} would replace another file of this command; give another name")


def publish(document: report.Document, json_path: Path | None, report_path: Path | None, *, quiet: bool) -> None:
    """A report as files, where they were asked for, and in the terminal."""
    if json_path is not None:
        report.write(document, json_path, ".json")
    if report_path is not None:
        report.write(document, report_path)
    if not quiet:
        report.console_for().print(report.render(document))


def say_written(what: str, seconds: float) -> None:
    """The last line of a run that wrote something."""
    report.console_for().print(f"wrote {clean(what)} in {seconds:.1f} s", style="bold", markup=False)
