"""The command line's door: the commands in one group, and errors as one sentence and an exit code."""

from __future__ import annotations

import errno
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import click
import numpy as np
from google.protobuf.message import EncodeError

import relrep_onnx
from relrep_onnx.commands import COMMANDS
from relrep_onnx.commands.common import COMMAND_LINE, failure
from relrep_onnx.types import ConfigError, RelRepError, VerificationError

CODES: Final[Mapping[type[RelRepError], int]] = {ConfigError: 2, VerificationError: 3}
"""Of the package's errors; all others are 1."""


class Terminated(BaseException):
    """SIGTERM, on its way past whatever catches errors, as Ctrl-C's exception is."""


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: temporary files go, and the exit code tells."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread: whoever runs it there deals with signals
        yield
        return
    try:
        yield
    except KeyboardInterrupt as error:
        raise failure("interrupted; unfinished output was discarded", 128 + signal.SIGINT) from error
    except Terminated as error:
        raise failure("ended by SIGTERM; unfinished output was discarded", 128 + signal.SIGTERM) from error
    finally:
        signal.signal(signal.SIGTERM, before)


class Commands(click.Group):
    """Turns the package's errors into one sentence and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps what was typed, for reports."""
        ctx.meta[COMMAND_LINE] = shlex.join(["relrep-onnx", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            # Numbers that leave their range are found where results are checked, and said in one sentence there.
            with ending_cleanly(), np.errstate(over="ignore", invalid="ignore"):
                return super().invoke(ctx)
        except RelRepError as error:
            raise failure(str(error), CODES.get(type(error), 1)) from error
        except EncodeError as error:
            raise failure(
                "this needs the model in one piece, and it is over 2 GB; `optimize` without --refine, to the form onnx, does not"
            ) from error
        except MemoryError as error:
            raise failure("out of memory; give --max-memory, fewer --num-samples or a smaller --batch-size") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has gone; click ends quietly
                raise
            raise failure(f"{error.filename or 'the system'}: {error.strerror or error}") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(relrep_onnx.__version__, prog_name="relrep-onnx")
def main() -> None:
    """Prune an exported ONNX model with a few hundred unlabelled samples, and repair what pruning breaks.

    Exit codes: 0 ok, 1 error, 2 usage, 3 a gate was not met (nothing is written then), 130 and 143 ended by Ctrl-C or SIGTERM
    (nothing is written either, but for what Ctrl-C in refinement keeps: the best state so far).
    """


for command in COMMANDS:
    main.add_command(command)
