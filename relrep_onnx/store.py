"""Arrays that wait: in memory up to a limit, past it on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from relrep_onnx.types import Array, CalibrationError


class TensorStore:
    """Arrays by key; past `limit` bytes they wait on disk.  Holds sequences too, in memory only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self._values: dict[Hashable, Array | Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Forgets everything."""
        for key in list(self._values):
            self.drop(key)
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Hashable, value: Array) -> None:
        """Keeps one tensor."""
        if isinstance(value, np.ndarray) and self.held + value.nbytes > self._limit and not value.dtype.hasobject:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="relrep-")
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.npy"
            try:
                np.save(path, value, allow_pickle=False)
            except OSError as error:
                raise CalibrationError(
                    f"no room for waiting activations in {tempfile.gettempdir()!r} ({error.strerror or error}); set TMPDIR to a "
                    "larger disk, give more --max-memory or fewer --num-samples"
                ) from error
            self._values[key] = path
            return
        self.held += getattr(value, "nbytes", 0)
        self._values[key] = value

    def get(self, key: Hashable) -> Array:
        """Gives one tensor back."""
        value = self._values[key]
        return np.load(value, allow_pickle=False) if isinstance(value, Path) else value

    def find(self, key: Hashable) -> Array | None:
        """One tensor, or None where there is none under this key."""
        return self.get(key) if key in self._values else None

    def drop(self, key: Hashable) -> None:
        """Forgets one tensor."""
        value = self._values.pop(key)
        if isinstance(value, Path):
            value.unlink()
        else:
            self.held -= getattr(value, "nbytes", 0)
