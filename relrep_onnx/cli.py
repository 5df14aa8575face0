"""The command line's door: the commands in one group, and errors as one sentence and an exit code."""

from __future__ import annotations

import shlex
from typing import Any

import click

import relrep_onnx
from relrep_onnx import report
from relrep_onnx.commands import COMMANDS
from relrep_onnx.commands.common import COMMAND_LINE
from relrep_onnx.types import ConfigError, RelRepError, VerificationError


class UsageFailure(click.ClickException):
    """A setting is wrong or cannot apply."""

    exit_code = 2


class GateFailure(click.ClickException):
    """A gate was not met."""

    exit_code = 3


FAILURES: dict[type[RelRepError], type[click.ClickException]] = {ConfigError: UsageFailure, VerificationError: GateFailure}


class Commands(click.Group):
    """Turns the package's errors into one sentence and an exit code; all but the above are 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps what was typed, for reports."""
        ctx.meta[COMMAND_LINE] = shlex.join(["relrep-onnx", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except RelRepError as error:
            kind = FAILURES.get(type(error), click.ClickException)
            raise kind(report.clean(str(error))) from error
        except MemoryError as error:
            raise click.ClickException(
                "out of memory; give --max-memory, fewer --num-samples or a smaller --batch-size"
            ) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(relrep_onnx.__version__, prog_name="relrep-onnx")
def main() -> None:
    """Prune an exported ONNX model with a few hundred unlabelled samples, and repair what pruning breaks.

    Exit codes: 0 ok, 1 error, 2 usage, 3 a gate was not met (nothing is written then).
    """


for command in COMMANDS:
    main.add_command(command)
