"""Arrays on disk under a key, each entry with its own checksum: what does not match is rebuilt, never trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relrep_onnx.files import write
from relrep_onnx.types import Array, ConfigError


class Cache:
    """A folder of entries; safe to share between processes, since entries are moved into place whole."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use the cache folder {str(folder)!r}: {error.strerror}") from error
        self.folder = folder

    def get(self, key: str) -> dict[str, Array] | None:
        """The arrays under a key, or None where there are none or they are damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, payload = data[:32], data[32:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        try:
            with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
                return dict(archive)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            return None

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Stores arrays; a full disk or a read-only folder leaves the cache as it was."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # newer stubs also see the flag allow_pickle in **arrays
        payload = buffer.getbuffer()  # no copy: it may be large
        with contextlib.suppress(OSError):
            write(self._path(key), hashlib.sha256(payload).digest(), payload)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.relrep"
