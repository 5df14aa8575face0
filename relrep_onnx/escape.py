"""Names from models and files as text that does nothing where it is shown: on terminals, in lines, in Markdown."""

from __future__ import annotations

import re
from typing import Final

_SPECIAL: Final = re.compile(r"[\\`*_\[\]<>|~&#$]")
"""What would be more than text anywhere in Markdown."""
_LINK: Final = re.compile(r"(?i)\b(?:www(?=\.)|[a-z]+(?=://)|mailto(?=:)|xmpp(?=:))|@")
"""Where GitHub would make a link, or call a person."""


def clean(text: str) -> str:
    """A name from a model or a file without control characters, which could drive a terminal or turn its line around."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def clean_lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join(map(clean, text.split("\n")))


def plain(text: str) -> str:
    """Text that means itself in Markdown; an empty comment keeps links apart."""
    return _LINK.sub(r"\g<0><!-- -->", _SPECIAL.sub(r"\\\g<0>", clean(text).strip()))
