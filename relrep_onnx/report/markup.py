"""HTML that cannot be broken from within: everything is escaped on its way in, but what is markup already."""

from __future__ import annotations

from html import escape
from typing import Final

from relrep_onnx.escape import clean

VOID: Final = frozenset({"meta", "br", "rect", "line", "circle", "path"})
"""Elements without content."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Inside = str | Markup | None
Attribute = str | float | bool | None


def tag(name: str, /, *inside: Inside, **attributes: Attribute) -> Markup:
    """An element.  `data_value` stands for the attribute data-value, `class_` for class; None and False leave one out."""
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{shown}>" if name in ("meta", "br") else f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{join(*inside)}</{name}>")


def join(*inside: Inside) -> Markup:
    """Elements and text side by side."""
    return Markup("".join(part if isinstance(part, Markup) else escape(clean(part)) for part in inside if part is not None))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(clean(shown))}"'
