"""A run's state in one file, whole or not at all, and only ever read back by the run it belongs to."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relrep_onnx.types import Array, ConfigError


def save(path: Path, key: str, about: Mapping[str, Any], state: Mapping[str, Array]) -> None:
    """Writes arrays, and what JSON can hold about them.

    Raises:
        ConfigError: the file cannot be written; an old one stays.
    """
    note = np.frombuffer(json.dumps({"key": key, **about}).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.relrep-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, about=note, **state)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the checkpoint {str(path)!r}: {error.strerror}") from error


def load(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """What `save` wrote, or None where there is no file yet.

    Raises:
        ConfigError: the file is damaged, or belongs to a run with another key.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            state = dict(archive)
        about = json.loads(state.pop("about").tobytes())
        owner = about.pop("key")
    except (OSError, ValueError, LookupError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the checkpoint {str(path)!r} cannot be read ({error}); remove it to start anew") from error
    if owner != key:
        raise ConfigError(f"the checkpoint {str(path)!r} is of another run (model, data or settings); remove it to start anew")
    return about, state
