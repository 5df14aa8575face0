"""A document in Markdown as GitHub reads it: for pull requests and wikis."""

from __future__ import annotations

import re
from typing import Final

from relrep_onnx.escape import clean_lines, plain
from relrep_onnx.report.document import Chart, Code, Document, Part, Sentences, Table

_FIRST: Final = re.compile(r"^(\d*)([-+=.)])")
"""What would be more than text at the start of a line."""


def markdown(document: Document) -> str:
    """The whole document, charts as what they say."""
    lines = [f"# {plain(document.subject)}: {document.kind}", f"**{plain(document.verdict)}**"]
    for section in document.sections:
        lines += [f"## {plain(section.title)}", *(_part(part) for part in (*section.parts, *section.details))]
    return "\n\n".join(lines) + "\n"


def item(text: str) -> str:
    """Text that means itself as an item of a list."""
    return "- " + _FIRST.sub(r"\1\\\2", plain(text))


def _part(part: Part) -> str:
    match part:
        case Table():
            return _table(part)
        case Sentences():
            return "\n".join(map(item, part.lines))
        case Chart():
            return f"{plain(part.title)}: {plain(part.says)}"
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
            return f"{plain(part.title)}:\n\n{fence}\n{clean_lines(part.text)}\n{fence}"


def _table(table: Table) -> str:
    rows = [
        [plain(column.title) for column in table.columns],
        ["---:" if column.number else "---" for column in table.columns],
        *([plain(cell.text) for cell in cells] for cells in table.rows),
    ]
    meanings = "".join(f"\n{item(f'{c.title}: {c.meaning}')}" for c in table.columns if c.meaning)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + f"\n{meanings}" * bool(meanings)
