"""Files on disk, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from relrep_onnx.types import ConfigError


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Writes under a temporary name and moves into place.

    Raises:
        OSError: the file cannot be written; an old one stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.relrep-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or there is nothing to remove it from
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes text in the same way.

    Raises:
        ConfigError: the file cannot be written; an old one stays.
    """
    try:
        write(path, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error
