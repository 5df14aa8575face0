"""A document in Markdown as GitHub reads it: for pull requests and wikis."""

from __future__ import annotations

import re
from typing import Final

from relrep_onnx.report.document import Chart, Code, Document, Part, Sentences, Table
from relrep_onnx.report.words import clean, clean_lines

_SPECIAL: Final = re.compile(r"[\\`*_\[\]<>|~&#$]")
"""What would be more than text anywhere,"""
_FIRST: Final = re.compile(r"^(\d*)([-+=.)])")
"""and at the start of a line."""
_LINK: Final = re.compile(r"(?i)\b(?:www(?=\.)|[a-z]+(?=://)|mailto(?=:)|xmpp(?=:))|@")
"""Where GitHub would make a link, or call a person."""


def markdown(document: Document) -> str:
    """The whole document, charts as what they say."""
    lines = [f"# {plain(document.subject)}: {document.kind}", f"**{plain(document.verdict)}**"]
    for section in document.sections:
        lines += [f"## {plain(section.title)}", *(_part(part) for part in (*section.parts, *section.details))]
    return "\n\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that means itself; an empty comment keeps links apart."""
    return _LINK.sub(r"\g<0><!-- -->", _SPECIAL.sub(r"\\\g<0>", clean(text).strip()))


def item(text: str) -> str:
    """The same as an item of a list."""
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
