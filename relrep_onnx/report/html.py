"""A document as one page: no network, light and dark, for screens, phones and paper.

The page says itself that it loads nothing and runs no script but its own (a Content-Security-Policy with hashes), so that a name
from a model that found a way past the escaping would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from itertools import groupby
from typing import Final

from relrep_onnx.escape import clean_lines
from relrep_onnx.report.document import Cell, Chart, Code, Column, Document, Part, Section, Sentences, Table
from relrep_onnx.report.markup import Markup, join, tag
from relrep_onnx.report.pictures import bar, chart

NEWLINE: Final = Markup("\n")


def page(document: Document) -> str:
    """The whole page."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{document.subject}: {document.kind}"),
        tag("style", style),
    )
    sections = list(enumerate(document.sections))
    body = tag(
        "body",
        tag(
            "header",
            tag("p", f"relrep-onnx {document.kind}", class_="kind"),
            tag("h1", document.subject),
            tag("p", document.verdict, class_="verdict"),
            *(_tiles(part) for s in document.sections for part in s.parts if isinstance(part, Table) and part.highlights),
        ),
        tag("nav", tag("ul", *(tag("li", tag("a", s.title, href=f"#s{i}")) for i, s in sections)), aria_label="On this page"),
        tag("main", *(_section(s, f"s{i}") for i, s in sections)),
        tag("script", script),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, NEWLINE, body, lang="en") + "\n"


def _asset(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _tiles(table: Table) -> Markup:
    """The rows that matter most, large."""
    tiles = []
    for index in table.highlights:
        name, before, after, *_ = table.rows[index]
        start = None if before.value is None else tag("dd", f"before: {before.text}")
        tiles.append(tag("div", tag("dt", name.text), tag("dd", after.text, class_="large"), start))
    return tag("dl", *tiles, class_="tiles")


def _section(section: Section, mark: str) -> Markup:
    """A section; charts that follow each other stand side by side."""
    parts = [_part(part) for part in section.parts]
    for charts, group in groupby(section.details, lambda part: isinstance(part, Chart)):
        drawn = [_part(part) if charts else _detail(part) for part in group]
        parts += [tag("div", *drawn, class_="charts")] if charts else drawn
    return tag("section", tag("h2", section.title, id=mark), *parts, NEWLINE, aria_labelledby=mark)


def _part(part: Part) -> Markup:
    match part:
        case Table():
            return _table(part)
        case Sentences():
            return join(*(tag("p", line) for line in part.lines))
        case Chart():
            caption = tag("figcaption", tag("strong", part.title), " ", part.says)
            return tag("figure", caption, chart(part), tag("output"))
        case Code():
            return tag("pre", tag("code", *_lines(part.text)), tabindex=0, role="region", aria_label=part.title)


def _detail(part: Part) -> Markup:
    """The same, folded where it is long."""
    match part:
        case Table(caption=summary) | Code(title=summary):
            return tag("details", tag("summary", summary), _part(part))
        case _:
            return _part(part)


def _lines(text: str) -> list[str | Markup]:
    """Text with its line breaks, which would be control characters elsewhere."""
    return [part for line in clean_lines(text).split("\n") for part in (line, NEWLINE)][:-1]


def _table(table: Table) -> Markup:
    """A table that scrolls sideways where it is too wide, and that the page's script makes sortable."""
    head = tag("tr", *(_head(column) for column in table.columns))
    rows = []
    for first, *cells in table.rows:
        name = tag("th", first.text, scope="row", class_=_kind(table.columns[0]), data_value=first.value)
        inside = (_cell(cell, column) for cell, column in zip(cells, table.columns[1:], strict=True))
        rows += [NEWLINE, tag("tr", name, *inside)]
    inner = tag("table", tag("caption", table.caption), tag("thead", head), tag("tbody", *rows))
    meanings = [join(tag("dt", c.title), tag("dd", c.meaning)) for c in table.columns if c.meaning]
    return join(
        tag("div", inner, class_="wide", tabindex=0, role="region", aria_label=table.caption),
        tag("dl", *meanings, class_="meanings") if meanings else None,
    )


def _head(column: Column) -> Markup:
    return tag("th", column.title or tag("span", "name", class_="hidden"), scope="col", class_=_kind(column))


def _cell(cell: Cell, column: Column) -> Markup:
    return tag("td", cell.text, bar(cell), class_=_kind(column), data_value=cell.value)


def _kind(column: Column) -> str | None:
    return "number" if column.number else None
