"""A document in a terminal: no borders, the essential parts only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from relrep_onnx.escape import clean
from relrep_onnx.report.document import Chart, Code, Document, Part, Sentences, Table

GAP: Final = 2
"""Between columns."""
NAME: Final = 32
"""Rows' names get so many characters, where they need them, before a column is left out;"""
WORDS: Final = 12
"""other columns of text so many."""


def render(document: Document) -> RenderableType:
    """The document without the details."""
    parts: list[RenderableType] = [Text(clean(document.verdict), style="bold")]
    for section in document.sections:
        if section.parts:
            parts += ["", Text(clean(section.title), style="bold underline"), *(_part(part) for part in section.parts)]
    return Group(*parts, "")


def console_for(*, stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output goes to a file."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


def _part(part: Part) -> RenderableType:
    match part:
        case Table():
            return _Fitted(part)
        case Sentences():
            return Group(*(Text(clean(line)) for line in part.lines))
        case Chart():
            return Text(clean(part.says))
        case Code():
            return Text(clean(part.text))


@dataclass(frozen=True)
class _Fitted:
    """A table as wide as the terminal allows, and below it what its columns mean."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self.table.columns
        shown = _fitting(self.table, options.max_width)
        yield _grid(self.table, shown)
        said = [f"{columns[n].title}: {columns[n].meaning}" for n in shown if columns[n].meaning]
        left = [column.title for n, column in enumerate(columns) if n not in shown]
        said += [f"no room here for {', '.join(left)}"] if left else []
        if said:
            yield Text(clean("; ".join(said)), style="dim")


def _fitting(table: Table, width: int) -> list[int]:
    """The columns to show, by number."""
    shown = list(range(len(table.columns)))
    needs = [_need(table, n) for n in shown]
    while sum(needs[n] + GAP for n in shown) - GAP > width and (spare := [n for n in shown if table.columns[n].spare]):
        shown.remove(max(spare, key=lambda n: table.columns[n].spare))
    return shown


def _need(table: Table, number: int) -> int:
    """The least width at which a column can be read: numbers stay in one piece."""
    column = table.columns[number]
    widest = max(cell_len(clean(text)) for text in (column.title, *(cells[number].text for cells in table.rows)))
    return widest if column.number else min(widest, WORDS if number else NAME)


def _grid(table: Table, shown: list[int]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for column in (table.columns[n] for n in shown):
        side: JustifyMethod = "right" if column.number else "left"
        grid.add_column(escape(clean(column.title)), justify=side, overflow="fold", no_wrap=column.number)
    for cells in table.rows:
        grid.add_row(*(escape(clean(cells[n].text)) for n in shown))
    return grid
