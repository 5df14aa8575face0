"""Reports as files: the suffix picks the face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from relrep_onnx.files import write_text
from relrep_onnx.report.document import Document
from relrep_onnx.report.html import page
from relrep_onnx.report.markdown import markdown
from relrep_onnx.results import to_json
from relrep_onnx.types import ConfigError

FACES: Final[Mapping[str, Callable[[Document], str]]] = {
    ".html": page,
    ".md": markdown,
    ".json": lambda document: to_json(document.data),
}


def write(document: Document, path: Path, suffix: str | None = None) -> None:
    """Writes a report in the face that its suffix names, or the one given, whole or not at all.

    Raises:
        ConfigError: no face has this suffix, or the file cannot be written.
    """
    face = FACES.get(path.suffix.lower() if suffix is None else suffix)
    if face is None:
        raise ConfigError(f"cannot write a report as {path.name!r}: its name must end in {', '.join(FACES)}")
    write_text(path, face(document))
