"""Text on disk, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from relrep_onnx.types import ConfigError


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and moves into place.

    Raises:
        ConfigError: the file cannot be written; an old one stays.
    """
    temporary = path.with_name(f".{path.name}.relrep-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error
