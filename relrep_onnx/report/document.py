"""A report before it has a face: sections of sentences, tables and charts.

What a report says is said once, in `content.py`; `terminal.py`, `markdown.py` and `html.py` each draw these few kinds of
parts, so a new row appears on every face at once.  All text is as it came, names from models included: each face escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, and the number to sort by where it is one.

    `bar` is the length of a bar to draw beside the text, as a fraction in [0, 1], and `ghost` that of a paler bar behind it.
    """

    text: str
    value: float | None = None
    bar: float | None = None
    ghost: float | None = None


@dataclass(frozen=True)
class Column:
    """One column of a table; `meaning` explains its title to a newcomer.

    A terminal too narrow for the table leaves out columns that are `spare`, those with the largest number first; 0 always stays.
    """

    title: str
    number: bool = False
    meaning: str = ""
    spare: int = 0


@dataclass(frozen=True)
class Table:
    """A table whose rows are headed by their first cells; those in `highlights` matter most."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    highlights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sentences:
    """Sentences that stand for themselves, one a line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """One line of a chart through points (x, y); `marked` is a point that it emphasizes."""

    name: str
    points: tuple[tuple[float, float], ...]
    marked: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over one axis; `says` is what a reader should see in them."""

    title: str
    x: str
    y: str
    says: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Code:
    """Text to copy, such as a command line."""

    title: str
    text: str


Part = Sentences | Table | Chart | Code


@dataclass(frozen=True)
class Section:
    """Parts under one title; a terminal leaves the `details` out."""

    title: str
    parts: tuple[Part, ...]
    details: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class Document:
    """A whole report: `kind` is the command it comes from, `subject` what it is about, `verdict` one sentence.

    `data` is the result itself, which the JSON face writes.
    """

    kind: str
    subject: str
    verdict: str
    sections: tuple[Section, ...]
    data: Any


def row(*cells: Cell | str) -> tuple[Cell, ...]:
    """A table's row; plain text is a cell without a number."""
    return tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells)


def table(caption: str, columns: Sequence[Column], rows: Sequence[tuple[Cell, ...]], *highlights: int) -> Table:
    """A table; `highlights` are numbers of rows."""
    return Table(caption, tuple(columns), tuple(rows), highlights)


def section(title: str, *parts: Part | None, details: Sequence[Part | None] = ()) -> tuple[Section, ...]:
    """A section of the parts that say something; none where no part does."""
    shown, more = (tuple(part for part in group if _says_something(part)) for group in (parts, details))
    return (Section(title, shown, more),) if shown or more else ()


def _says_something(part: Part | None) -> TypeGuard[Part]:
    match part:
        case None:
            return False
        case Table():
            return bool(part.rows)
        case Chart():
            return any(series.points for series in part.series)
        case Sentences():
            return bool(part.lines)
        case Code():
            return True
