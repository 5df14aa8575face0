"""How far a run is, as people see it: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from relrep_onnx.job import quiet as quiet_progress
from relrep_onnx.types import Progress as ProgressCallback


@contextmanager
def shown_progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Bars on a terminal, one line per quarter otherwise, nothing when quiet; all on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield quiet_progress
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def show(phase: str, done: int, total: int, note: str = "") -> None:
                task = tasks.get(phase)
                if task is None:
                    task = tasks[phase] = bars.add_task(phase, total=total, note="")
                bars.update(task, completed=done, total=total, note=note)

            yield show
    else:
        shown: dict[str, int] = {}

        def say(phase: str, done: int, total: int, note: str = "") -> None:
            quarter = 4 * done // max(1, total)
            if quarter > shown.get(phase, -1):
                shown[phase] = quarter
                click.echo(f"{phase} {done}/{total}" + f", {note}" * bool(note), err=True)

        yield say
