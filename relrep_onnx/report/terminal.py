"""A document in a terminal: no borders, the essential parts only."""

from __future__ import annotations

from typing import Final

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from relrep_onnx.escape import clean
from relrep_onnx.report.document import Chart, Code, Document, Part, Sentences, Table

LONGEST: Final = 48
"""Names are shortened to so many characters; their ends tell more than their beginnings."""


def render(document: Document) -> RenderableType:
    """The document without the details."""
    parts: list[RenderableType] = [Text(clean(document.verdict), style="bold")]
    for section in document.sections:
        if section.parts:
            parts += ["", Text(section.title, style="bold underline"), *(_part(part) for part in section.parts)]
    return Group(*parts, "")


def console_for(*, stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output goes to a file."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


def _part(part: Part) -> RenderableType:
    match part:
        case Table():
            return _grid(part)
        case Sentences():
            return Group(*(Text(clean(line)) for line in part.lines))
        case Chart():
            return Text(clean(part.says))
        case Code():
            return Text(clean(part.text))


def _grid(table: Table) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        side: JustifyMethod = "right" if column.number else "left"
        grid.add_column(escape(clean(column.title)), justify=side, overflow="fold", no_wrap=column.number)
    for head, *cells in table.rows:
        name = clean(head.text)
        shown = name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
        grid.add_row(escape(shown), *(escape(clean(cell.text)) for cell in cells))
    return grid
