"""What commands share: the configuration a command line means, where output goes, results written and shown."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource
from threadpoolctl import threadpool_limits

from relrep_onnx import report
from relrep_onnx.commands.options import InputFile, OutputFile
from relrep_onnx.config import Config, saved_settings
from relrep_onnx.escape import clean
from relrep_onnx.files import Named, check_separate, same_file
from relrep_onnx.results import Refined, Result
from relrep_onnx.types import ConfigError

COMMAND_LINE: Final = f"{__name__}.command_line"
"""Where a context's `meta` holds what the user typed."""


def config_of(path: Path | None, preset: Mapping[str, Any] | None = None) -> Config:
    """What the configuration file says, a preset over it, and over both what was said on the command line."""
    context = click.get_current_context()
    fields = {f.name for f in dataclasses.fields(Config)}
    said: dict[str, Any] = {
        name: _once(name, value) if name in ("input_shape", "layer_sparsity") else value
        for name, value in context.params.items()
        if name in fields and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    config = Config.merged({} if path is None else saved_settings(path), {**(preset or {}), **said})
    if config.threads:  # where others use the cores too, more threads than asked for wait for each other by spinning
        threadpool_limits(config.threads)
    return config


def _once(field: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The values of a repeatable option by name, each said once."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ConfigError(f"--{field.replace('_', '-')} names {name!r} twice; give one value")
        values[name] = value
    return values


def target_of(output: Path | None, option: Path | None = None, *, replaced: Path | None = None) -> Path | None:
    """Where a run writes, the model that --in-place replaces included; None where nothing says so."""
    if output is not None and option is not None:
        raise ConfigError(f"two outputs: {str(output)!r} and -o {str(option)!r}; give one")
    target = output or option
    if replaced is not None and target is not None and not same_file(target, replaced):
        raise ConfigError("--in-place replaces the input; it cannot apply together with another output")
    return replaced or target


def command_line() -> str:
    """What the user typed."""
    return str(click.get_current_context().meta[COMMAND_LINE])


def check_files(written: Iterable[Named] = (), *, replaced: Path | None = None) -> None:
    """Refuses what the command writes where it is what it reads, or the same twice; the types of options tell which is which.

    Args:
        written: what it writes besides files that options name.
        replaced: the model that --in-place gives up.

    Raises:
        ConfigError: naming both.
    """
    context = click.get_current_context()
    outputs, inputs = list(written), []
    for parameter in context.command.params:
        name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        value = context.params.get(parameter.name or "")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter.type, OutputFile) and item is not None:
                outputs.append((name, item))
            elif isinstance(parameter.type, InputFile) and item is not None and item is not replaced:
                inputs.append((name, parameter.type.files(item)))
    check_separate(outputs, ((name, file) for name, files in inputs for file in files))


def publish(document: report.Document, json_path: Path | None, report_path: Path | None, *, quiet: bool) -> None:
    """A report as files, where they were asked for, and in the terminal."""
    if json_path is not None:
        report.write(document, json_path, ".json")
    if report_path is not None:
        report.write(document, report_path)
    if not quiet:
        report.console_for().print(report.render(document))


def say_written(what: str, result: Result | Refined, *, quiet: bool) -> None:
    """The last line of a run that wrote something; one that was interrupted ends as such."""
    if not quiet:
        report.console_for().print(f"wrote {clean(what)} in {result.seconds:.1f} s", style="bold", markup=False)
    if result.refinement is not None and result.refinement.interrupted:
        raise failure(f"interrupted; {what} holds the best state so far", 128 + signal.SIGINT)


def failure(message: str, code: int = 1) -> click.ClickException:
    """An error that ends a command with an exit code."""
    error = click.ClickException(clean(message))
    error.exit_code = code  # type: ignore[misc]  # click says it is the class's, and reads the instance's
    return error
